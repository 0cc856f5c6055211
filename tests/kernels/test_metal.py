"""The Metal kernels beyond the equivalence tests (which run them as backend `metal`): types, masks,
schedules, training, operators, and that what is broken on purpose is found.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttx import TransformerClassifier
from fasttx.ops import dropout
from fasttx.ops.mps import check as mps_check
from fasttx.testing import selfcheck
from fasttx.text.packing import RaggedIds, pack
from tests import equivalence
from tests.metal import emulator

pytestmark = pytest.mark.skipif(emulator.MISSING is not None, reason=str(emulator.MISSING))

SEED = 0x0123456_789ABCDEF
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def metal() -> Any:
    """The kernels, on the CPU."""
    from tests.metal import adapter

    return adapter


@pytest.fixture
def mutate(metal, monkeypatch) -> Iterator[Any]:
    """Replaces a text in a .metal file, for the length of a test."""
    from fasttx.kernels.metal import shaders

    source = shaders.source

    def apply(old: str, new: str) -> None:
        texts = [path.read_text() for path in shaders.HERE.glob("*.metal")]
        assert any(old in text for text in texts), f"{old!r} is not in the kernels"

        def mutated(*files: str, **defined: str | int) -> str:
            return source(*files, **defined).replace(old, new)

        monkeypatch.setattr(shaders, "source", mutated)

    caches = (shaders.library, shaders.kernel)
    for cache in caches:
        cache.cache_clear()
    yield apply
    for cache in caches:
        cache.cache_clear()


# -------------------------------------------------------------------------------- the type check


def specialisations() -> Iterator[tuple[tuple[str, ...], dict[str, str | int]]]:
    """The files and definitions of sources as the launchers ask for them."""
    types = ("float", "half", "bfloat")
    for kind, d, dropout_, causal in itertools.product(types, (32, 20), (0, 1), (0, 1)):
        defined = {"element_type": kind, "HEAD_DIM": d, "DROPOUT": dropout_, "CAUSAL": causal}
        yield ("philox", "tiles", "attention_forward", "attention_backward"), defined
    for kind, other, dropout_ in itertools.product(types, ("float", "half"), (0, 1)):
        some = {"element_type": kind, "DROPOUT": dropout_}
        yield ("philox", "rows", "embed"), {**some, "table_type": other, "pe_type": kind}
        yield (
            ("philox", "rows", "add_norm"),
            {**some, "branch_type": other, "bias_type": kind, "norm_type": other, "COLUMNS": 257},
        )
        for gelu in (0, 1):
            yield ("philox", "rows", "bias_act"), {**some, "bias_type": other, "GELU": gelu}
    yield ("probe",), {}


def test_types():
    pytest.importorskip("clang.cindex", reason="libclang is not installed: pip install libclang")
    from fasttx.kernels.metal import shaders

    from tests.metal.typecheck import complaints

    for files, defined in specialisations():
        found = complaints(shaders.source(*files, **defined))
        assert not found, f"{files[-1]}, {defined}: {found}"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("load_tile(const device element_type* x", "load_tile(const element_type* x"),
        ("device element_type* out [[", "element_type* out [["),
        ("constant long* size", "device long* size, constant int* n = size"),
        ("log2(total)", "log2f(total)"),
        ("1.0f / total", "1.0 / total"),
        ("simd_shuffle_xor(x, ushort(1))", "__shfl_xor_sync(x, 1)"),
        ("max(maximum, row_max(largest))", "max(maximum, 0)"),
        ("lse += head", "float* rows = lse; lse += head"),
        ("load_tile(v, v_row", "load_tile(lens, v_row"),
        ("// Key 0 is seen", "// Key 0 \N{LATIN SMALL LETTER E WITH ACUTE} is seen"),
    ],
)
def test_wrong_types_are_found(old, new):
    pytest.importorskip("clang.cindex", reason="libclang is not installed: pip install libclang")
    from fasttx.kernels.metal import shaders

    from tests.metal.typecheck import complaints

    files, defined = next(specialisations())
    text = shaders.source(*files, **defined)
    assert old in text
    assert not complaints(text)
    assert complaints(text.replace(old, new))


# ------------------------------------------------------------------------------ the shared masks

PHILOX = """
kernel void words(const device uint* counters [[buffer(0)]], const device uint* seed [[buffer(1)]],
                  device uint* out [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  const device uint* c = counters + i * 4;
  const uint4 w = philox(uint4(c[0], c[1], c[2], c[3]), philox_key(seed));
  out[i * 4] = w.x;
  out[i * 4 + 1] = w.y;
  out[i * 4 + 2] = w.z;
  out[i * 4 + 3] = w.w;
}
"""


def test_philox_words(metal):
    from fasttx.kernels.metal import shaders

    counters = torch.randint(0, 2**32, (64, 4))
    counters[0], counters[1] = 0, 2**32 - 1
    seed = torch.tensor(SEED)
    out = torch.zeros(64, 4, dtype=torch.int32)
    words = emulator.compile_shader(shaders.source("philox") + PHILOX).words
    words(counters.int(), seed, out, threads=(64,), group_size=(64,))
    expected = equivalence.philox(
        [column.numpy().astype("uint64") for column in counters.unbind(1)],
        equivalence.key_of(SEED),
    )
    for mine, theirs in zip(out.unbind(1), expected, strict=True):
        assert torch.equal(mine.long() & 0xFFFFFFFF, torch.from_numpy(theirs.astype("int64")))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("p", [0.1, 0.5, 1 - 2**-16])
def test_attention_masks_equal_the_reference_s_bit_for_bit(metal, p, causal):
    """Where v is the identity the output is the dropped weights, and their zeros the mask; where
    dout is, dv is those weights transposed: the mask as the backward pass draws it."""
    lens = torch.tensor([61, 0, 33], dtype=torch.int32)
    starts = torch.tensor([40, 5, 3], dtype=torch.int32)
    qkv = torch.randn(101, 3, 2, 64) * 0.1  # no weight is near 0
    dout = torch.zeros(101, 2, 64)
    for start, n in zip(starts.tolist(), lens.tolist(), strict=True):
        qkv[start : start + n, 2] = torch.eye(n, 64)[:, None]
        dout[start : start + n] = torch.eye(n, 64)[:, None]
    qkv.requires_grad_()
    seed = torch.tensor(SEED)
    out = metal.attention(qkv, starts, lens, max_seqlen=61, dropout_p=p, seed=seed, causal=causal)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    keep = dropout.attention_keep(seed, 3, 2, 61, 61, dropout.threshold(p))
    for b, (start, n) in enumerate(zip(starts.tolist(), lens.tolist(), strict=True)):
        mask = keep[b, :, :n, :n]
        if causal:
            mask = mask & torch.ones(n, n).tril().bool()
        rows = slice(start, start + n)
        assert torch.equal(out[rows].transpose(0, 1)[..., :n] != 0, mask)
        assert torch.equal(dqkv[rows, 2].permute(1, 2, 0)[:, :n] != 0, mask)


def test_row_masks_equal_the_reference_s_bit_for_bit(metal):
    seed = torch.tensor(-SEED)
    for columns in (13, 256, 300):
        u = torch.ones(37, columns, requires_grad=True)
        nothing = torch.zeros(columns)
        keep = dropout.row_keep(seed, 37, columns, dropout.threshold(0.3))
        out = metal.rowops.bias_act(u, nothing, 0.3, seed)
        assert torch.equal(out != 0, keep)
        assert torch.equal(torch.autograd.grad(out.sum(), u)[0] != 0, keep)
        h, y = torch.zeros(37, columns), torch.ones(37, columns, requires_grad=True)
        out, _ = metal.rowops.add_norm(h, y, nothing, nothing, nothing, 0.3, seed)
        assert torch.equal(out != 0, keep)
        assert torch.equal(torch.autograd.grad(out.sum(), y)[0] != 0, keep)
        ids = torch.arange(37)
        table = torch.ones(37, columns, requires_grad=True)
        out = metal.rowops.embed(ids, ids.int(), table, torch.zeros(37, columns), 0.3, seed)
        assert torch.equal(out != 0, keep)
        assert torch.equal(torch.autograd.grad(out.sum(), table)[0] != 0, keep)


# ------------------------------------------------------------------- schedules and reproducibility


def attend_and_add(metal: Any) -> list[Tensor]:
    """Outputs and gradients of everything, with dropout."""
    torch.manual_seed(1)
    seed = torch.tensor(SEED)
    qkv = torch.randn(70, 3, 2, 20, requires_grad=True)
    starts, lens = (torch.tensor(x, dtype=torch.int32) for x in ([3, 30, 0], [25, 40, 1]))
    out = metal.attention(qkv, starts, lens, max_seqlen=40, dropout_p=0.2, seed=seed)
    values = [out, *torch.autograd.grad(out.square().sum(), qkv)]
    table, pe = torch.randn(9, 40, requires_grad=True), torch.randn(70, 40)
    ids = torch.randint(0, 9, (70,))
    h = metal.rowops.embed(ids, torch.arange(70).int(), table, pe, 0.2, seed)
    vectors = [torch.randn(40, requires_grad=True) for _ in range(3)]
    h, n = metal.rowops.add_norm(h, h * 2, *vectors, 0.2, seed)
    u = metal.rowops.bias_act(n, vectors[0], 0.2, seed, "gelu")
    leaves = (table, *vectors)
    return [x.detach() for x in (*values, u, *torch.autograd.grad(u.square().sum(), leaves))]


def test_no_order_of_the_threads_changes_a_bit(metal, monkeypatch):
    first = attend_and_add(metal)
    for order in (emulator.REVERSE, emulator.SHUFFLED, emulator.SHUFFLED + 7):
        monkeypatch.setattr(emulator.Launch, "order", order)
        for x, y in zip(attend_and_add(metal), first, strict=True):
            assert torch.equal(x, y)


# ------------------------------------------------------------------------- what is broken is found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("((lane >> 1) & 3u)", "((lane >> 2) & 3u)"),  # another lane layout
        ("((lane & 1u) << 1)", "(lane & 1u)"),
        ("uint4(key_block + mine, query, head, sequence)",  # another counter
         "uint4(key_block + mine, head, query, sequence)"),
        ("uint(q0) + lane, uint(head)", "uint(q0), uint(head)"),
        ("key < 4 ? (key < 2 ? x : y)", "key < 4 ? (key < 2 ? y : x)"),
        ("(i & 1) ? word >> 16 : word & 0xFFFFu", "(i & 1) ? word & 0xFFFFu : word >> 16"),
        ("round < 7", "round < 6"),
        ("0xBB67AE85u", "0xBB67AE84u"),
        ("odd ? w.z : w.w", "odd ? w.w : w.z"),
        ("const bool seen = at_key < n &&", "const bool seen = at_key <= n &&"),
        ("(!CAUSAL || at_key <= query)", "(!CAUSAL || at_key < query)"),
        ("(!CAUSAL || key <= query)", "(!CAUSAL || key < query)"),
        ("row < rows && (HEAD_DIM", "(HEAD_DIM"),  # beyond the sequence, and the memory
        ("if (r < rows && (HEAD_DIM", "if ((HEAD_DIM"),
        ("x, ushort(8)", "x, ushort(4)"),
        ("dweight - product", "dweight"),
        ("sum_k[d], factor[2]", "sum_k[d], 1.0f"),
        ("total * shrink + row_sum", "total + row_sum"),
        ("weight * mask;", "weight;"),
        ("if (col == 0 && live) delta[query] = product;", ""),
    ],
)  # fmt: skip
def test_broken_attention_is_found(mutate, old, new):
    """By the very check that runs on a Mac at the first use."""
    mutate(old, new)
    assert mps_check.check("attention", "cpu", torch.float32, 20).failures


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("uint(column_block), uint(row), 0u", "uint(row), uint(column_block), 0u"),
        ("ids[first - 1] == id", "ids[first - 1] == id - 1"),
        ("ids[at] == id; at++", "at < first + 1; at++"),
        ("sum[i] * factor[0]", "sum[i]"),
        ("ROWS_OF_A_SUM 16", "ROWS_OF_A_SUM 8"),
        ("chunk * 256 + int(lane) * 8", "chunk * 256 + int(lane) * 4"),
        ("column_of(chunk, lane) + i < COLUMNS", "true"),
        ("- c * mean_gc", ""),
        ("sums[COLUMNS + column] = dgamma", "sums[COLUMNS + column] = dbeta"),
        ("x * 0.398942280f", "0.398942280f"),
        ("x > 0.0f ? 1.0f", "x > 1.0f ? 1.0f"),
        ("1.0f - tail", "1.0f + tail"),
        ("i >= end", "i > end"),
    ],
)  # fmt: skip
def test_broken_row_operations_are_found(mutate, old, new):
    mutate(old, new)
    assert mps_check.check("rowops", "cpu", torch.float32, 0).failures


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", mps_check.PARTS)
def test_sound_kernels_pass_the_check(metal, part, dtype):
    outcome = mps_check.check(part, "cpu", dtype, 32)
    assert not outcome.failures
    worst = max(outcome.errors.values())
    assert 0 < worst < selfcheck.TOLERANCES[dtype] / 2, "the tolerance is too tight to rely on"


# -------------------------------------------------------------------------------------- operators


def operator_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Each operator that has a derivative, with arguments."""
    from fasttx.kernels.metal import attention, rowops

    seed = torch.tensor(SEED)
    starts, lens = (torch.tensor(x, dtype=torch.int32) for x in ([1, 20], [17, 9]))
    spans = (starts, lens, 17, 6554, seed, False, 0.3)
    qkv = torch.randn(30, 3, 2, 16, requires_grad=True)
    apart = [torch.randn(30, 2, 16, requires_grad=True) for _ in range(3)]
    h, y = (torch.randn(30, 40, requires_grad=True) for _ in range(2))
    vectors = [torch.randn(40, requires_grad=True) for _ in range(3)]
    table = torch.randn(11, 40, requires_grad=True)
    ids = torch.arange(30) % 11
    yield attention.attention, (qkv, *spans)
    yield attention.attention_qkv, (*apart, *spans)
    yield rowops.embed, (ids, ids.int(), table, torch.randn(30, 40), 6554, seed)
    yield rowops.add_norm, (h, y, *vectors, 6554, seed, 1e-5)
    yield rowops.bias_act, (h, vectors[0], 6554, seed, True)


def test_operators_keep_torch_s_rules(metal):
    """Schemas, fake kernels, autograd registration, and tracing with dynamic shapes."""
    for operator, arguments in operator_calls():
        torch.library.opcheck(operator, arguments)


def test_a_second_derivative_is_refused(metal):
    """By each operator, and not left out with a warning. The first one stands."""
    for operator, arguments in operator_calls():
        out = operator(*arguments)
        leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
        loss = (out if isinstance(out, Tensor) else out[0]).square().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        assert all(x.isfinite().all() for x in first)
        with pytest.raises(
            NotImplementedError, match="Metal kernels.*second derivative.*reference"
        ):
            sum(x.square().sum() for x in first).backward()


def test_compiled_without_a_break(metal):
    """A whole layer in one graph, with the gradients of the eager one."""

    def layer(qkv: Tensor, gamma: Tensor) -> Tensor:
        out = metal.attention(qkv, starts, lens, max_seqlen=17, dropout_p=0.1, seed=seed).flatten(1)
        h, n = metal.rowops.add_norm(out, out, gamma, gamma, gamma, 0.1, seed)
        return metal.rowops.bias_act(h + n, gamma, 0.1, seed, "gelu")

    seed = torch.tensor(SEED)
    starts, lens = (torch.tensor(x, dtype=torch.int32) for x in ([1, 20], [17, 9]))
    leaves = (torch.randn(30, 3, 2, 16, requires_grad=True), torch.randn(32, requires_grad=True))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for x, y in zip(
        torch.autograd.grad(compiled(*leaves).square().sum(), leaves),
        torch.autograd.grad(layer(*leaves).square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": torch.zeros(4, 2, 2, 8)}, ValueError, r"\(4, 2, 2, 8\); expected \(T, 3, H, D\)"),
        ({"qkv": torch.zeros(4, 3, 2, 8).double()}, TypeError, "float64.*expected one dtype"),
        ({"seq_lens": torch.zeros(2).int()}, ValueError, r"\(1,\) and \(2,\); expected two equal"),
    ],
)
def test_what_does_not_fit_is_refused(metal, change, error, message):
    """The kernels see no shapes: they would read past the end."""
    arguments = {
        "qkv": torch.zeros(4, 3, 2, 8), "seq_starts": torch.zeros(1).int(),
        "seq_lens": torch.ones(1).int(), "seed": torch.tensor(1), **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        metal.attention(**arguments, max_seqlen=1, dropout_p=0.1)


@pytest.mark.parametrize("name", ["k", "starts", "lens", "seed"])
def test_tensors_of_two_devices_are_refused(metal, name):
    from fasttx.kernels.metal.attention import _check

    x = torch.zeros(4, 2, 8)
    tensors = {"k": x, "starts": torch.zeros(1).int(), "lens": torch.zeros(1).int()}
    tensors |= {"seed": torch.tensor(1)}
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta, q on cpu"):
        _check(x, v=x, **tensors)


def test_where_nothing_compiles_metal():
    from fasttx.kernels.metal import shaders

    with pytest.raises(RuntimeError, match="need tensors on mps, not on meta"):
        shaders.compiler("meta")


# --------------------------------------------------------------------------------------- training


def losses(backend: str, steps: int) -> list[float]:
    """Of a small model on texts of unequal length that hold their label, dropout on."""
    torch.manual_seed(3)
    model = TransformerClassifier(
        60, d_model=32, num_heads=2, num_layers=2, d_ff=48, max_len=24, attn_backend=backend
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(4)
    found = []
    for step in range(steps):
        lens = torch.randint(1, 25, (12,), generator=generator).tolist()
        texts = [torch.randint(3, 60, (n,), generator=generator).tolist() for n in lens]
        labels = torch.tensor([int(7 in text or sum(text) % 2) for text in texts])
        batch = pack(RaggedIds.from_lists(texts), labels.numpy(), token_multiple=32)
        logits = model(**batch.model_inputs(), seed=torch.tensor(step))
        loss = F.cross_entropy(logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("backend", ["metal", "lean"])
def test_a_model_trains_as_on_the_reference(unlisted_backends, backend):
    mine, reference = losses(backend, 50), losses("reference", 50)
    assert max(abs(x - y) for x, y in zip(mine, reference, strict=True)) < 1e-4
    assert mine[-1] != mine[0]
