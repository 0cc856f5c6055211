"""The CPU kernels, beyond what every backend is tested for: each instruction set, bfloat16,
torch.compile, long sequences, errors, training.

T rows, B sequences, H heads, D head_dim, L length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasttx import TransformerClassifier
from fasttx.device import autocast
from fasttx.errors import BackendUnavailableError
from fasttx.kernels import cpu as kernels
from fasttx.ops import dropout, registry
from fasttx.ops.registry import BACKENDS
from tests import equivalence
from tests.equivalence import Case, Measure
from tests.ops.test_attention import check as check_attention
from tests.ops.test_rowops import RowCase
from tests.ops.test_rowops import check as check_rows

BUILT = kernels.library_path() is not None
BACKEND = BACKENDS["cpu"]
pytestmark = pytest.mark.skipif(
    not BUILT, reason="; ".join(BACKEND.unavailable_reasons("cpu", torch.float32, 16))
)

SETS = kernels.instruction_sets() if BUILT else []
SEED = torch.tensor(0x1234567_89ABCDEF)
CPU = torch.device("cpu")
FULL_AND_CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every one that this machine runs, in use."""
    before = kernels.instruction_set()
    kernels.use_instruction_set(request.param)
    assert kernels.instruction_set() == request.param
    yield request.param
    kernels.use_instruction_set(before)


# ------------------------------------------------------------------------- each instruction set


def test_the_fastest_set_is_the_default():
    assert BACKEND.unavailable_reasons("cpu", torch.float32, 16) == []
    assert kernels.instruction_set() == SETS[0]


@functools.cache
def expected_masks() -> list[tuple[dict[str, int], Tensor]]:
    """What to draw, and the mask that the specification draws: over a million counters in all."""
    generator = torch.Generator().manual_seed(5)

    def draw(high: int, low: int = 0) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    masks = []
    for blocks in (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 127, 1000):
        rows = -(-(1 << 16) // blocks)
        where = {
            "rows": rows, "columns": 8 * blocks - draw(8), "row0": draw(2**31 - rows),
            "head": draw(2**31), "sequence": draw(2**31), "seed": draw(2**62, -(2**62)) * 2 + 1,
            "threshold": (0, 1, 6554, 32768, 65535, 65536, draw(1 << 16))[len(masks) % 7],
        }  # fmt: skip
        block, row = torch.arange(blocks), where["row0"] + torch.arange(rows)[:, None]
        head, sequence, seed = (torch.tensor(where[k]) for k in ("head", "sequence", "seed"))
        words = dropout.philox4x32((block, row, head, sequence), dropout.split_seed(seed))
        masks.append((where, dropout.uniforms16(words, where["columns"]) >= where["threshold"]))
    return masks


def test_masks_are_those_of_the_specification(instruction_set):
    for where, expected in expected_masks():
        assert torch.equal(kernels.keep_mask(**where), expected), where


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("p", [0.0, 0.1])
@FULL_AND_CAUSAL
@pytest.mark.parametrize("head_dim", [8, 16, 20, 32, 64, 100, 128])
def test_attention(instruction_set, head_dim, causal, p):
    case = Case(f"head_dim {head_dim}", (33, 1, 0, 70, 16), head_dim=head_dim)
    check_attention(BACKEND, "cpu", case, torch.float32, causal, p)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ["gapped views", "infinite", "peaked", "long", "alike"])
def test_attention_of_hard_cases(instruction_set, name):
    case = equivalence.BY_NAME[name]
    check_attention(BACKEND, "cpu", case, torch.float32, name != "long", 0.1)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("columns", [1, 3, 7, 9, 15, 17, 31, 47, 100, 129])
@pytest.mark.parametrize("op", ["embed", "add_norm", "relu", "gelu"])
def test_rows_of_odd_width(instruction_set, op, columns, p):
    activation = op if op in ("relu", "gelu") else "relu"
    if (op, columns) == ("add_norm", 1):
        pytest.skip("the gradient of LayerNorm over one column is nothing but rounding errors")
    for rows in (1, 35, 530):
        case = RowCase(op if op in ("embed", "add_norm") else "bias_act", rows, columns, activation)
        check_rows(case, BACKEND, "cpu", torch.float32, p)


# ------------------------------------------------------------------------------------- bfloat16


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("head_dim", [8, 20, 32, 64, 128])
def test_attention_in_bfloat16(instruction_set, head_dim, p):
    case = Case(f"head_dim {head_dim}", (33, 1, 0, 70, 16), head_dim=head_dim)
    check_attention(BACKEND, "cpu", case, torch.bfloat16, p > 0, p)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ["gapped views", "infinite", "long"])
def test_attention_of_hard_cases_in_bfloat16(instruction_set, name):
    check_attention(BACKEND, "cpu", equivalence.BY_NAME[name], torch.bfloat16, False, 0.1)


def test_the_mask_in_bfloat16_is_the_reference_s(instruction_set):
    """Where v is the unit matrix, out is the weights; where dout is, dv is, transposed."""
    q, k = torch.randn(2, 100, 2, 128).bfloat16()
    eye = torch.eye(100, 128).bfloat16()[:, None].expand(-1, 2, -1)
    span, options = (torch.tensor([0]), torch.tensor([100])), {"dropout_p": 0.4, "seed": SEED}
    dropped = []
    for name in ("reference", "cpu"):
        v = eye.clone().requires_grad_()
        out = BACKENDS[name].adapter().attention_qkv(q, k, v, *span, max_seqlen=100, **options)
        (dv,) = torch.autograd.grad(out, v, eye)
        dropped.append(torch.stack((out == 0, dv == 0)))
    assert torch.equal(*dropped)
    share = dropped[0][..., :100].double().mean().item()
    assert 0.35 < share < 0.45


# How far a bfloat16 value may be from what it was rounded from: half of its last place.
ROUNDING = torch.finfo(torch.bfloat16).eps / 2


def check_autocast_s_mix(case: RowCase, p: float) -> None:
    """An operation on what autocast hands it: products of linear layers and gradients of what the
    next one reads in bfloat16, all else in float32. Against float64: as exact as float32, but for
    one rounding of each value that is stored in bfloat16.
    """
    low = {"y", "u"}
    leaves = {k: x.bfloat16() if k in low else x.float() for k, x in case.leaves().items()}
    g = torch.Generator().manual_seed(3)
    shape = case.rows, case.columns
    grads = [torch.randn(shape, generator=g).bfloat16()]
    if case.op == "add_norm":
        grads.insert(0, torch.randn(shape, generator=g))

    def compute(function: Any, *dtypes: torch.dtype) -> dict[str, Tensor]:
        given = {k: x.to(*dtypes).detach().requires_grad_() for k, x in leaves.items()}
        outs = function(**given)
        outs = outs if isinstance(outs, tuple) else (outs,)
        gradients = torch.autograd.grad(outs, tuple(given.values()), [x.to(*dtypes) for x in grads])
        names = [*("out", "normed")[-len(outs) :], *(f"d{k}" for k in given)]
        return dict(zip(names, (*outs, *gradients), strict=True))

    exact = compute(case.plain(p), torch.float64)
    actual = compute(case.by(BACKEND.adapter().rowops, "cpu", p))
    for name, x in actual.items():
        is_low = name in ("normed", "dy", "du")
        assert x.dtype == (torch.bfloat16 if is_low else torch.float32), name
        allowed = ROUNDING * exact[name].abs() if is_low else 0.0
        allowed = allowed + 1e-5 * max(1.0, equivalence.largest(exact[name]))
        assert ((x.double() - exact[name]).abs() <= allowed).all(), f"{case}: {name}"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("columns", [3, 16, 31, 129, 256])
@pytest.mark.parametrize("op", ["add_norm", "relu", "gelu"])
def test_rows_under_autocast(instruction_set, op, columns, p):
    for rows in (1, 35, 530):
        if op == "add_norm":
            check_autocast_s_mix(RowCase(op, rows, columns), p)
        else:
            check_autocast_s_mix(RowCase("bias_act", rows, columns, op), p)


@pytest.mark.parametrize("wanted", ["sum", "normed"])
def test_add_norm_of_which_one_output_is_used(wanted):
    h, y = torch.randn(5, 16, requires_grad=True), torch.randn(5, 16).bfloat16().requires_grad_()
    vectors = torch.randn(3, 16).unbind()
    values = []
    for name in ("reference", "cpu"):
        out = BACKENDS[name].adapter().rowops.add_norm(h, y, *vectors, 0.0, None)
        used = out[wanted == "normed"].float()
        values.append(torch.autograd.grad(used.square().sum(), (h, y)))
        assert [x.dtype for x in values[-1]] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(values[1], values[0], rtol=0.1, atol=0.1)


def test_projections_of_two_dtypes():
    q, k, v = torch.randn(3, 9, 2, 16)
    span = torch.tensor([0]), torch.tensor([9])
    attention_qkv = functools.partial(BACKEND.adapter().attention_qkv, max_seqlen=9)
    low = q.bfloat16()
    out = attention_qkv(low, k, v, *span)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attention_qkv(low.float(), k, v, *span).bfloat16())


def test_autocast_copies_nothing_inside_the_blocks():
    """Tensors with a row for each token change their dtype before the first block and after the
    last one only, so the number of those that do does not depend on the number of blocks."""

    class Copies(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and len(args[0]) == 58:
                self.found += 1
            return function(*args, **(kwargs or {}))

    found = []
    for layers in (1, 3):
        model = tiny(num_layers=layers, dropout=0.1).train()
        with Copies() as copies:
            step(model, model, "bf16")
        found.append(copies.found)
    assert found[0] == found[1] <= 4


# ----------------------------------------------------------------------- operators, torch.compile


def operator_calls(dtype: torch.dtype) -> list[Any]:
    """(operator, arguments) of each one, with and without dropout; dtype of what linear layers
    hand in and take."""
    starts, lens = torch.tensor([0, 6], dtype=torch.int32), torch.tensor([5, 3], dtype=torch.int32)
    ids, position_ids = torch.tensor([1, 4, 1]), torch.arange(3, dtype=torch.int32)
    calls = []

    def add(name: str, *arguments: Any) -> None:
        threshold = next(x for x in arguments if type(x) is int and x in (0, 6554))
        identity = f"{name}, {'dropout' if threshold else 'plain'}, {dtype}"
        calls.append(pytest.param(name, arguments, id=identity))

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    def vector() -> Tensor:
        return leaf(12, dtype=torch.float32)

    for drop in ((None, 0), (SEED, 6554)):
        spans = (starts, lens, *drop, True, 0.3)
        out, q, k, v = torch.randn(4, 9, 2, 8).to(dtype)
        lse = torch.randn(2, 9)
        add("attention", leaf(9, 3, 2, 8), *spans)
        add("attention_qkv", leaf(9, 2, 8), leaf(9, 2, 8), leaf(9, 2, 8), *spans)
        add("attention_backward", out, torch.stack((q, k, v), 1), out, lse, *spans)
        add("attention_qkv_backward", out, q, k, v, out, lse, *spans)
        h = leaf(5, 12, dtype=torch.float32)
        add("add_norm", h, leaf(5, 12), vector(), vector(), vector(), *drop)
        row, column = torch.rand(5), torch.randn(12)
        h, x = torch.randn(5, 12), torch.randn(5, 12).to(dtype)
        add("add_norm_backward", h, x, h, column, row, row, *drop)
        add("bias_act", leaf(5, 12), vector(), *drop, False)
        add("bias_act", leaf(5, 12), vector(), *drop, True)
        add("bias_act_backward", x, x, column, None, *drop, True)
        add("bias_act_backward", x, None, None, x, *drop, False)
        if dtype == torch.float32:
            add("embed", ids, position_ids, leaf(6, 12), torch.randn(4, 12), *drop)
            add("embed_backward", torch.randn(3, 12), ids, 6, *drop)
    return calls


OPERATOR_CALLS = operator_calls(torch.float32) + operator_calls(torch.bfloat16)


@pytest.mark.parametrize(("name", "arguments"), OPERATOR_CALLS)
def test_operators_keep_torch_s_rules(name, arguments):
    BACKEND.adapter()
    torch.library.opcheck(getattr(torch.ops.fasttx, f"cpu_{name}"), arguments)


def test_every_operator_is_checked():
    schemas = (line.partition("(")[0] for line in BACKEND.adapter()._SCHEMAS.split("\n") if line)
    assert {f"cpu_{call.values[0]}" for call in OPERATOR_CALLS} == set(schemas)


def test_a_second_derivative_is_refused():
    model = tiny()
    loss = model(torch.tensor([[3, 4, 5, 0]])).square().sum()
    first = torch.autograd.grad(loss, model.embedding, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivative.*reference"):
        first.square().sum().backward()


def tiny(backend: str = "cpu", **settings: Any) -> TransformerClassifier:
    torch.manual_seed(0)
    settings = {
        "d_model": 32,
        "num_heads": 2,
        "num_layers": 2,
        "d_ff": 40,
        "max_len": 40,
    } | settings
    return TransformerClassifier(50, attn_backend=backend, **settings)


def packed(*lens: int) -> dict[str, Any]:
    """A batch, as keyword arguments of a model."""
    ids = torch.randint(2, 50, (sum(lens),), generator=torch.Generator().manual_seed(len(lens)))
    cu_seqlens = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
    return {"input_ids": ids, "cu_seqlens": cu_seqlens, "max_seqlen": 40}


def step(run: Any, model: TransformerClassifier, precision: str = "fp32") -> list[Tensor]:
    """The loss of a training step with dropout, and every gradient."""
    model.zero_grad()
    with autocast(CPU, precision):
        logits = run(**packed(17, 40, 1), seed=SEED)
    loss = F.cross_entropy(logits.float(), torch.tensor([0, 1, 1]))
    loss.backward()
    return [loss.detach(), *(x.grad.clone() for x in model.parameters())]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_model_is_the_same(precision):
    model = tiny(dropout=0.2).train()
    eager = step(model, model, precision)
    compiled = step(torch.compile(model, fullgraph=True, backend="aot_eager"), model, precision)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------- long sequences


@FULL_AND_CAUSAL
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("length", [511, 512, 513, 1024, 1025, 1300])
def test_blocks_of_keys(length, p, causal):
    """A block is 512 keys, and a thread's share 512 queries."""
    case = Case(f"length {length}", (3, length), heads=1)
    check_attention(BACKEND, "cpu", case, torch.float32, causal, p)


def attend_by_rows(qkv: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Causal attention, 1,024 queries at a time. qkv (L, 3, 1, D), grad (L, 1, D)."""
    q, k, v = (x[:, 0].detach().requires_grad_() for x in qkv.unbind(1))
    outs = []
    for first in range(0, len(q), 1024):
        rows = slice(first, first + 1024)
        scores = q[rows] @ k.T * qkv.shape[-1] ** -0.5
        query = torch.arange(first, first + len(scores))[:, None]
        scores = scores.masked_fill(torch.arange(len(q)) > query, -torch.inf)
        out = scores.softmax(-1) @ v
        out.backward(grad[rows, 0])
        outs.append(out.detach())
    values = {"out": torch.cat(outs), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return {name: x[:, None] for name, x in values.items()}


def test_a_sequence_of_8192():
    case = Case("8192", (8192,), heads=1)
    qkv, grad = case.inputs(torch.float32)
    exact = Measure.of(lambda wide: attend_by_rows(qkv.to(wide), grad.to(wide)), torch.float32)
    starts, lens = case.index("cpu")
    out, dqkv = equivalence.run(
        lambda x: BACKEND.adapter().attention(x, starts, lens, max_seqlen=8192, causal=True),
        grad, qkv,
    )  # fmt: skip
    dq, dk, dv = dqkv.unbind(1)
    exact.check("8192", out=out, dq=dq, dk=dk, dv=dv)


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("starts", "lens", "sequence"),
    [
        ([0, 3], [4, 2], 1),  # overlap
        ([0, 8], [4, 3], 1),  # past the end
        ([-1, 4], [2, 2], 0),
        ([0, 4, 6], [4, 2, -1], 2),
        ([2**31 - 1, 0], [2, 1], 0),
    ],
)
def test_spans_that_cannot_be(starts, lens, sequence):
    qkv = torch.randn(10, 3, 1, 8)
    for call, given in (
        (BACKEND.adapter().attention, (qkv,)),
        (BACKEND.adapter().attention_qkv, qkv.unbind(1)),
    ):
        with pytest.raises(
            ValueError, match=f"^sequence {sequence} leaves the rows .* or overlaps"
        ):
            call(*given, torch.tensor(starts), torch.tensor(lens), max_seqlen=10)


@pytest.mark.parametrize(
    ("ids", "places"),
    [
        ([1, 2, 6], [0, 1, 2]),
        ([1, 2, -1], [0, 1, 2]),
        ([1, 2, 3], [0, 1, 4]),
        ([1, 2, 3], [0, 1, -1]),
    ],
)
def test_an_id_outside_its_table(ids, places):
    table, positions = torch.randn(6, 8), torch.randn(4, 8)
    with pytest.raises(IndexError, match="row 2 has an id outside the embedding table"):
        BACKEND.adapter().rowops.embed(
            torch.tensor(ids), torch.tensor(places), table, positions, 0.0, None
        )


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (torch.float32, 200, "head_dim 200: the kernels go up to 128; use more heads"),
        (torch.float64, 16, "float64: takes"),
    ],
)
def test_what_the_kernels_do_not_take(dtype, head_dim, reason):
    with pytest.raises(BackendUnavailableError, match=reason):
        registry.resolve("cpu", "cpu", dtype, head_dim)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(kernels, "library_path", lambda: None)
    with pytest.raises(
        BackendUnavailableError, match="install a C\\+\\+ compiler .*apt install g\\+\\+"
    ):
        registry.resolve("cpu", "cpu", torch.float32, 16)
    assert len(BACKEND.unavailable_reasons("cpu", torch.float32, 200)) == 2


def test_a_library_that_does_not_load(monkeypatch, tmp_path):
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(kernels, "library_path", lambda: broken)
    monkeypatch.setattr(kernels, "library", kernels.library.__wrapped__)
    (reason,) = BACKEND.unavailable_reasons("cpu", torch.float32, 16)
    assert "does not load" in reason and str(broken) in reason


def test_a_library_of_another_version(monkeypatch):
    """Built before the Python beside it, as after a `git pull` without another install."""
    monkeypatch.setattr(kernels, "INTERFACE", kernels.INTERFACE + 1)
    monkeypatch.setattr(kernels, "library", kernels.library.__wrapped__)
    (reason,) = BACKEND.unavailable_reasons("cpu", torch.float32, 16)
    assert "was built for another version" in reason and "install fasttx again" in reason


def test_an_unknown_instruction_set():
    before = kernels.instruction_set()
    with pytest.raises(ValueError, match=f"'nope'; expected one of {', '.join(SETS)}"):
        kernels.use_instruction_set("nope")
    assert kernels.instruction_set() == before


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("precision", "apart"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_the_loss_curve_is_the_reference_s(precision, apart):
    curves = []
    for backend in ("reference", "cpu"):
        model = tiny(backend, dropout=0.1).train()
        adam, losses = torch.optim.Adam(model.parameters(), lr=1e-3), []
        for micro_step in range(30):
            seed = torch.tensor(dropout.forward_seed(7, micro_step))
            with autocast(CPU, precision):
                logits = model(**packed(17, 40, 1, 8), seed=seed)
            loss = F.cross_entropy(logits.float(), torch.tensor([0, 1, 1, 0]))
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    reference, cpu = curves
    assert reference[-1] < reference[0]
    assert (cpu - reference).abs().max() < apart
