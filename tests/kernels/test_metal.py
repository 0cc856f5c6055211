"""The Metal kernels beyond the equivalence tests (which run them as backend `metal`): types, masks,
schedules, training, and that what is broken on purpose is found.
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
from fasttx.ops.contract import Operations, Spans
from fasttx.ops.dropout import NO_DROPOUT, Dropout
from fasttx.ops.mps import check as mps_check
from fasttx.testing.philox import key_of, philox
from fasttx.text.packing import RaggedIds, pack
from tests.metal import emulator

pytestmark = pytest.mark.skipif(emulator.MISSING is not None, reason=str(emulator.MISSING))

SEED = 0x0123456_789ABCDEF
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def metal() -> Operations:
    """The kernels, on the CPU."""
    from tests.metal.adapter import adapter

    return adapter.operations


def spans_of(starts: list[int], lens: list[int]) -> Spans:
    return Spans(torch.tensor(starts).int(), torch.tensor(lens).int(), max(lens))


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


def specialisations() -> Iterator[tuple[tuple[str, ...], dict[str, torch.dtype | int]]]:
    """The files and definitions of sources as the launchers ask for them."""
    from fasttx.kernels.metal import add_norm, attention, bias_act, embed

    for kind, d, dropout_, causal in itertools.product(DTYPES, (32, 20), (0, 1), (0, 1)):
        defined = {"element_type": kind, "HEAD_DIM": d, "DROPOUT": dropout_, "CAUSAL": causal}
        yield attention.FILES, defined
    for kind, other, drops in itertools.product(
        DTYPES, DTYPES[:2], ({"DROPOUT": 0}, {"DROPOUT": 1})
    ):
        wide = torch.promote_types(kind, other)
        yield (
            embed.FILES,
            {**drops, "table_type": other, "positions_type": kind, "element_type": wide},
        )
        types = {"h_type": other, "y_type": kind, "total_type": wide, "vector_type": other}
        yield add_norm.FILES, {**drops, **types, "COLUMNS": 257}
        for gelu in (0, 1):
            yield bias_act.FILES, {**drops, "element_type": kind, "bias_type": other, "GELU": gelu}
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
    expected = philox(
        [column.numpy().astype("uint64") for column in counters.unbind(1)], key_of(SEED)
    )
    for mine, theirs in zip(out.unbind(1), expected, strict=True):
        assert torch.equal(mine.long() & 0xFFFFFFFF, torch.from_numpy(theirs.astype("int64")))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("p", [0.1, 0.5, 1 - 2**-16])
def test_attention_masks_equal_the_reference_s_bit_for_bit(metal, p, causal):
    """Where v is the identity the output is the dropped weights, and their zeros the mask; where
    dout is, dv is those weights transposed: the mask as the backward pass draws it."""
    pairs = ((40, 61), (5, 0), (3, 33))
    spans = spans_of(*map(list, zip(*pairs, strict=True)))
    qkv = torch.randn(101, 3, 2, 64) * 0.1  # no weight is near 0
    dout = torch.zeros(101, 2, 64)
    for start, n in pairs:
        qkv[start : start + n, 2] = torch.eye(n, 64)[:, None]
        dout[start : start + n] = torch.eye(n, 64)[:, None]
    qkv.requires_grad_()
    seed = torch.tensor(SEED)
    out = metal.attention(qkv, spans, Dropout.of(p, seed), causal=causal)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    keep = dropout.attention_keep(seed, 3, 2, 61, 61, dropout.threshold(p))
    for b, (start, n) in enumerate(pairs):
        mask = keep[b, :, :n, :n]
        if causal:
            mask = mask & torch.ones(n, n).tril().bool()
        rows = slice(start, start + n)
        assert torch.equal(out[rows].transpose(0, 1)[..., :n] != 0, mask)
        assert torch.equal(dqkv[rows, 2].permute(1, 2, 0)[:, :n] != 0, mask)


@pytest.mark.parametrize("columns", [13, 256, 300])
def test_row_masks_equal_the_reference_s_bit_for_bit(metal, columns):
    drops = Dropout.of(0.3, torch.tensor(-SEED))
    keep = dropout.row_keep(drops.seed, 37, columns, drops.threshold)
    nothing, zeros, ids = torch.zeros(columns), torch.zeros(37, columns), torch.arange(37)
    x = torch.ones(37, columns, requires_grad=True)
    for out in (
        metal.bias_act(x, nothing, drops, "relu"),
        metal.bias_act(x, nothing, drops, "gelu"),
        metal.add_norm(zeros, x, nothing, nothing, nothing, drops)[0],
        metal.embed(ids, ids.int(), x, zeros, drops, 1.0),
    ):
        assert torch.equal(out != 0, keep)
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0] != 0, keep)


# ------------------------------------------------------------------- schedules and reproducibility


def attend_and_add(metal: Operations) -> list[Tensor]:
    """Outputs and gradients of everything, with dropout."""
    torch.manual_seed(1)
    drops = Dropout.of(0.2, torch.tensor(SEED))
    qkv = torch.randn(70, 3, 2, 20, requires_grad=True)
    out = metal.attention(qkv, spans_of([3, 30, 0], [25, 40, 1]), drops)
    values = [out, *torch.autograd.grad(out.square().sum(), qkv)]
    table, positions = torch.randn(9, 40, requires_grad=True), torch.randn(70, 40)
    ids = torch.randint(0, 9, (70,))
    h = metal.embed(ids, torch.arange(70).int(), table, positions, drops, 6.0)
    vectors = [torch.randn(40, requires_grad=True) for _ in range(3)]
    h, n = metal.add_norm(h, h * 2, *vectors, drops)
    u = h + metal.bias_act(n, vectors[0], drops, "gelu")
    u = metal.bias_act(u, vectors[1], drops, "relu")
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
        ("live ? lse[query] * LOG2_E", "live ? lse[query]"),
        ("- lse[query] * LOG2_E", "- lse[query]"),
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
        ("sum[i] * factor[1]", "sum[i]"),
        ("ROWS_OF_A_SUM 16", "ROWS_OF_A_SUM 8"),
        ("chunk * 256 + int(lane) * 8", "chunk * 256 + int(lane) * 4"),
        ("column_of(chunk, lane) + i < COLUMNS", "true"),
        ("- c * mean_gc", ""),
        ("sums[COLUMNS + column] = dgamma", "sums[COLUMNS + column] = dbeta"),
        ("x * 0.398942280f", "0.398942280f"),
        ("float(seen[at + i]) > 0.0f", "float(seen[at + i]) > 1.0f"),
        ("> 0.0f ? g * factor[0]", "> 0.0f ? g"),
        ("size[ROWS] + row] = inverse", "size[ROWS] + row] = mean"),
        ("size[HAS_DTOTAL] ?", "!size[HAS_DTOTAL] ?"),
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
    assert 0 < max(outcome.errors.values()) < 8 * torch.finfo(dtype).eps


# As far off as Metal's fast exp2 may be: 3 + |2 x| units in the last place, up or either way.
LOOSE = """
namespace loose {
inline float exp2(float x) {
  const float off = (3.0f + 2.0f * abs(x)) * 1.19e-7f;
  const int steps = int(max(x, -200.0f) * 1000.0f);
  return metal::exp2(x) * (1.0f + ((steps & 1) ? SIDE off : off));
}
}
#define fast loose
#define SPAN 32 """


@pytest.mark.parametrize("side", ["+", "-"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_check_allows_what_metal_allows(mutate, dtype, side):
    """It was not tuned to the emulator, whose exp2 is exact: a Mac's kernels would not pass."""
    mutate("#define SPAN 32 ", LOOSE.replace("SIDE", side))
    assert not mps_check.check("attention", "cpu", dtype, 32).failures


# -------------------------------------------------------------------------------------- launchers


def test_the_forward_pass_keeps_natural_logarithms_and_moments(metal):
    """What the kernels leave for the backward pass, as the contract of launchers has it."""
    qkv = torch.randn(30, 3, 2, 16)
    starts, lens, longest = spans_of([1, 20], [17, 9])
    _, lse = torch.ops.fasttx_metal.attention(qkv, starts, lens, longest, 0, None, False, 0.3)
    q, k, _ = qkv.double().permute(1, 2, 0, 3)
    expected = torch.zeros(2, 30, dtype=torch.float64)
    for start, n in ((1, 17), (20, 9)):
        rows = slice(start, start + n)
        expected[:, rows] = (q[:, rows] @ k[:, rows].mT * 0.3).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-6)
    x, vector = torch.randn(30, 40) + 3, torch.zeros(40)
    _, _, moments = torch.ops.fasttx_metal.add_norm(x, x, *[vector] * 3, 0, None, 1e-5)
    var, mean = torch.var_mean(2 * x.double(), -1, correction=0)
    exact = torch.stack([mean, (var + 1e-5).rsqrt()])
    torch.testing.assert_close(moments.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stream", DTYPES, ids=str)
@pytest.mark.parametrize("branch", DTYPES, ids=str)
def test_add_norm_of_any_two_dtypes(metal, stream, branch):
    """The wider one for the sum, the branch's for what the next layer takes."""
    leaves = [torch.randn(9, 20).to(stream), torch.randn(9, 20).to(branch)]
    leaves += [torch.randn(20).to(dtype) for dtype in (branch, stream, torch.float32)]
    leaves = [x.requires_grad_() for x in leaves]
    total, normed = metal.add_norm(*leaves, NO_DROPOUT)
    assert total.dtype == torch.promote_types(stream, branch) and normed.dtype == branch
    h, y, bias, gamma, beta = (x.detach().double() for x in leaves)
    exact = F.layer_norm(h + y + bias, (20,), gamma, beta)
    # The sum is rounded on its way, and LayerNorm has it from there.
    eps = torch.finfo(total.dtype).eps + torch.finfo(normed.dtype).eps
    assert (normed.double() - exact).abs().max() < 2 * eps * exact.abs().max()
    grads = torch.autograd.grad((total, normed), leaves, (total.detach(), normed.detach()))
    assert [x.dtype for x in grads] == [x.dtype for x in leaves]


def test_compiled_without_a_break(metal):
    """A whole layer in one graph, with the gradients of the eager one."""

    def layer(qkv: Tensor, gamma: Tensor) -> Tensor:
        out = metal.attention(qkv, spans, drops).flatten(1)
        h, n = metal.add_norm(out, out, gamma, gamma, gamma, drops)
        return metal.bias_act(h + n, gamma, drops, "gelu")

    spans, drops = spans_of([1, 20], [17, 9]), Dropout.of(0.1, torch.tensor(SEED))
    leaves = (torch.randn(30, 3, 2, 16, requires_grad=True), torch.randn(32, requires_grad=True))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for x, y in zip(
        torch.autograd.grad(compiled(*leaves).square().sum(), leaves),
        torch.autograd.grad(layer(*leaves).square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


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
