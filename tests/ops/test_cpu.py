"""The CPU kernels beyond what every backend is tested for: each instruction set, bfloat16, long
sequences, torch.compile, errors, training. L length, D head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fasttx.kernels.cpu import library as kernels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasttx import TransformerClassifier
from fasttx.device import autocast
from fasttx.errors import BackendUnavailableError
from fasttx.ops import dropout, registry
from fasttx.ops.contract import Spans
from fasttx.ops.dropout import NO_DROPOUT
from fasttx.ops.registry import BACKENDS
from fasttx.testing import AttentionCase, Measure, RowCase, checking, dropout_of, largest
from fasttx.testing.attention import BY_NAME
from tests.backends import Target, check

BUILT = kernels.library_path() is not None
BACKEND = BACKENDS["cpu"]
TARGET = Target(BACKEND, "cpu")
pytestmark = pytest.mark.skipif(
    not BUILT, reason="; ".join(BACKEND.unavailable_reasons("cpu", torch.float32, 16))
)

SETS = kernels.instruction_sets() if BUILT else []
SEED = torch.tensor(0x1234567_89ABCDEF)
LENS = (33, 1, 0, 70, 16)
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


OPERATIONS = ("embed", "add_norm", "relu", "gelu", "linear", "feed_forward")


def row_case(op: str, rows: int, columns: int) -> RowCase:
    if op in ("relu", "gelu"):
        return RowCase("bias_act", rows, columns, op)
    return RowCase(op, rows, columns)


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
@FULL_AND_CAUSAL
@pytest.mark.parametrize("head_dim", [8, 16, 20, 32, 64, 100, 128])
def test_attention(instruction_set, head_dim, causal):
    case = AttentionCase(f"head_dim {head_dim}", LENS, head_dim=head_dim, causal=causal)
    check(TARGET, case, torch.float32, 0.0, 0.1)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ["gapped views", "infinite", "peaked", "long", "alike"])
def test_attention_of_hard_cases(instruction_set, name):
    check(TARGET, replace(BY_NAME[name], causal=name != "long"), torch.float32, 0.1)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("columns", [1, 3, 7, 9, 15, 17, 31, 47, 100, 129])
@pytest.mark.parametrize("op", OPERATIONS)
def test_rows_of_odd_width(instruction_set, op, columns):
    if (op, columns) == ("add_norm", 1):
        columns = 2  # over one column the gradient of LayerNorm is nothing but rounding errors
    for rows in (1, 35, 530):
        check(TARGET, row_case(op, rows, columns), torch.float32, 0.0, 0.1)


# ------------------------------------------------------------------------------------- bfloat16


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("head_dim", [8, 20, 32, 64, 128])
def test_attention_in_bfloat16(instruction_set, head_dim):
    case = AttentionCase(f"head_dim {head_dim}", LENS, head_dim=head_dim)
    check(TARGET, case, torch.bfloat16, 0.0)
    check(TARGET, replace(case, causal=True), torch.bfloat16, 0.1)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ["gapped views", "infinite", "long"])
def test_attention_of_hard_cases_in_bfloat16(instruction_set, name):
    check(TARGET, BY_NAME[name], torch.bfloat16, 0.1)


def test_the_mask_in_bfloat16_is_the_reference_s(instruction_set):
    """Where v is the unit matrix, out is the weights; where dout is, dv is, transposed."""
    q, k = torch.randn(2, 100, 2, 128).bfloat16()
    eye = torch.eye(100, 128).bfloat16()[:, None].expand(-1, 2, -1)
    spans, dropped = AttentionCase("one", (100,)).spans(), []
    for name in ("reference", "cpu"):
        v = eye.clone().requires_grad_()
        out = BACKENDS[name].operations.attention_qkv(q, k, v, spans, dropout_of(0.4, "cpu"))
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
    exact = case.define(torch.bfloat16, torch.float64, p, checking.SEED)
    for name, x in case.run(TARGET.operations, "cpu", torch.bfloat16, dropout_of(p, "cpu")).items():
        is_low = name in ("normed", "dy", "du") or (name, case.op) == ("out", "bias_act")
        assert x.dtype == (torch.bfloat16 if is_low else torch.float32), name
        allowed = ROUNDING * exact[name].abs() if is_low else 0.0
        allowed = allowed + 1e-5 * max(1.0, largest(exact[name]))
        assert ((x.double() - exact[name]).abs() <= allowed).all(), f"{case}: {name}"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("columns", [3, 16, 31, 129, 256])
@pytest.mark.parametrize("op", ["add_norm", "relu", "gelu"])
def test_rows_under_autocast(instruction_set, op, columns):
    for rows in (1, 35, 530):
        for p in (0.0, 0.1):
            check_autocast_s_mix(replace(row_case(op, rows, columns), mixed=True), p)


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


# --------------------------------------------------------------------------------- torch.compile


def tiny(backend: str = "cpu", **settings: Any) -> TransformerClassifier:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "num_heads": 2, "num_layers": 2, "d_ff": 40, "max_len": 40}
    settings = sizes | settings
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
@pytest.mark.parametrize("length", [511, 512, 513, 1024, 1025, 1300])
def test_blocks_of_keys(length, causal):
    """A block is 512 keys, and a thread's share 512 queries."""
    case = AttentionCase(f"length {length}", (3, length), heads=1, causal=causal)
    check(TARGET, case, torch.float32, 0.0, 0.1)


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
    case = AttentionCase("8192", (8192,), heads=1, causal=True)
    qkv, grad = case.inputs(torch.float32)
    exact, plain = (attend_by_rows(qkv.to(x), grad.to(x)) for x in (torch.float64, torch.float32))
    values = case.run(TARGET.operations, "cpu", torch.float32)
    assert not Measure.of(exact, plain, torch.float32).compare("8192", values).failures


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
def test_the_kernels_refuse_spans_that_nobody_checked(starts, lens, sequence):
    """They would read and write past the end."""
    qkv = torch.randn(10, 3, 1, 8)
    spans = Spans(torch.tensor(starts).int(), torch.tensor(lens).int(), 10)
    message = f"^sequence {sequence} leaves the rows .* or overlaps"
    with pytest.raises(ValueError, match=message):
        TARGET.operations.attention(qkv, spans)
    with pytest.raises(ValueError, match=message):
        TARGET.operations.attention_qkv(*qkv.unbind(1), spans)


@pytest.mark.parametrize(
    ("ids", "places"),
    [
        ([1, 2, 6], [0, 1, 2]),
        ([1, 2, -1], [0, 1, 2]),
        ([1, 2, 3], [0, 1, 4]),
        ([1, 2, 3], [0, 1, -1]),
    ],
)
def test_the_kernels_refuse_an_id_that_nobody_checked(ids, places):
    tables = torch.randn(6, 8), torch.randn(4, 8)
    embed = TARGET.operations._embed
    with pytest.raises(IndexError, match="row 2 has an id outside the embedding table"):
        embed(torch.tensor(ids), torch.tensor(places), *tables, NO_DROPOUT, 1.0)


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
