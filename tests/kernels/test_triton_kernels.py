"""What is particular to the Triton kernels, on tensors of the CPU: compiled for two GPUs and
executed by the PTX machine, or under Triton's interpreter (TRITON_INTERPRET=1).

Triton decides when a kernel is defined whether it interprets, so that needs a process of its own:
test_triton.py starts one, for these tests and for those of every backend over the same kernels.
T rows, B sequences, H heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttx import TransformerClassifier
from fasttx.ops.contract import Operations, Spans
from fasttx.ops.dropout import NO_DROPOUT, Dropout
from fasttx.ops.registry import BACKENDS
from fasttx.testing import AttentionCase
from fasttx.testing.philox import attention_uniforms, row_uniforms
from tests.backends import INTERPRETED, TRITON, Target, check

pytestmark = pytest.mark.usefixtures("unlisted_backends")
SEED = -0x1234567_89ABCDEF  # both halves in use, the sign too


@pytest.fixture(params=TRITON, ids=str)
def target(request) -> Target:
    return request.param


@pytest.fixture
def triton(target) -> Operations:
    return target.operations


def spans_of(max_seqlen: int, *pairs: tuple[int, int]) -> Spans:
    """Of (start, length)."""
    starts, lens = torch.tensor(pairs, dtype=torch.int32).unbind(1)
    return Spans(starts, lens, max_seqlen)


# ------------------------------------------------------------------------------------------ masks
# Where all scores are alike, the weights are 1 / length times the dropout factors, and a v (or a
# gradient of the output) of unit vectors copies them out.


@pytest.mark.parametrize(
    ("length", "causal", "dtype"),
    [(17, False, torch.float32), (33, True, torch.float16), (130, True, torch.float32)],
)
def test_masks_bit_for_bit(triton, length, causal, dtype):
    """Those of the forward and of the backward pass, over whole rows and in tiles."""
    heads, head_dim, dropout = 2, 128, Dropout.of(0.3, torch.tensor(SEED))
    expected = attention_uniforms(SEED, 2, heads, length, length)[1] >= 0.3 * 65536
    keep = torch.from_numpy(expected)  # (H, queries, keys)
    if causal:
        keep = keep & torch.ones(length, length, dtype=torch.bool).tril()
    rows, spans = length + 3, spans_of(length, (1, 2), (3, length))
    for first in range(0, length, head_dim):
        unit = torch.zeros(rows, heads, head_dim, dtype=dtype)
        width = min(head_dim, length - first)
        unit[3 + first : 3 + first + width, :, :width] = torch.eye(width)[:, None]
        zero = torch.zeros_like(unit)
        v = unit.clone().requires_grad_()
        out = triton.attention_qkv(zero, zero, v, spans, dropout, causal=causal)
        (dv,) = torch.autograd.grad(out, v, unit)
        columns = slice(first, first + width)
        assert torch.equal(out[3:, :, :width].transpose(0, 1) > 0, keep[:, :, columns])
        assert torch.equal(dv[3:, :, :width].permute(1, 2, 0) > 0, keep[:, columns])


@pytest.mark.parametrize("columns", [8, 20, 300])
def test_row_masks_bit_for_bit(triton, columns):
    """Of all three operations, forward and backward."""
    rows, dropout = 37, Dropout.of(0.3, torch.tensor(SEED))
    keep = torch.from_numpy(row_uniforms(SEED, rows, columns) >= 0.3 * 65536)
    zero, bias = torch.zeros(rows, columns), torch.ones(columns)
    u = zero.clone().requires_grad_()
    ids = torch.arange(rows)
    table = torch.ones(rows, columns, requires_grad=True)
    for name, value, leaf in (
        ("relu", triton.bias_act(u, bias, dropout, "relu"), u),
        ("gelu", triton.bias_act(u, bias, dropout, "gelu"), u),
        ("add_norm", triton.add_norm(zero, u, bias, bias, bias, dropout)[0], u),
        ("embed", triton.embed(ids, ids, table, zero, dropout, 1.5), table),
    ):
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert torch.equal(value > 0, keep), name
        assert torch.equal(gradient > 0, keep), f"{name}, backward"


# ----------------------------------------------------------------------------- what is handed over


def test_logarithms_are_natural_and_moments_those_of_the_sum(target):
    """What the forward pass leaves for the backward pass, as the contract of launchers has it."""
    assert target.operations  # whose operators these are
    operators = getattr(torch.ops, f"fasttx_{target.name}")
    qkv = torch.randn(30, 3, 2, 16)
    pairs = ((1, 17), (20, 9))
    arguments = (*spans_of(17, *pairs), 0, None, False, 0.3)
    _, lse = operators.attention(qkv, *arguments)
    q, k, _ = qkv.double().permute(1, 2, 0, 3)
    expected = torch.zeros(2, 30, dtype=torch.float64)
    for start, n in pairs:
        rows = slice(start, start + n)
        expected[:, rows] = (q[:, rows] @ k[:, rows].mT * 0.3).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-6)
    x, vector = torch.randn(30, 40) + 3, torch.zeros(40)
    _, _, moments = operators.add_norm(x, x, *[vector] * 3, 0, None, 1e-5)
    variance, mean = torch.var_mean(2 * x.double(), -1, correction=0)
    exact = torch.stack([mean, (variance + 1e-5).rsqrt()])
    torch.testing.assert_close(moments.double(), exact, rtol=1e-6, atol=1e-6)


def test_the_output_of_relu_stands_in_for_its_input(triton):
    """Nothing as large as u is kept for the backward pass but the output, which lives anyway."""
    u, bias = torch.randn(9, 24, requires_grad=True), torch.zeros(24)
    kept: list[int] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = triton.bias_act(u, bias, Dropout.of(0.3, torch.tensor(SEED)), "relu")
    assert out.data_ptr() in kept and u.data_ptr() not in kept


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_relu_of_what_is_not_finite(triton, p):
    """NaN and its gradient go through, as through torch's relu; infinities and zeros as well."""
    nan, inf = float("nan"), float("inf")
    row = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, nan])
    dropout, found = Dropout.of(p, torch.tensor(SEED)), []
    for ops in (triton, BACKENDS["reference"].operations):
        u = row.repeat(3, 4).requires_grad_()
        bias = torch.zeros(32, requires_grad=True)
        out = ops.bias_act(u, bias, dropout, "relu")
        found.append((out, *torch.autograd.grad(out.sum(), (u, bias))))
    torch.testing.assert_close(*found, equal_nan=True)


# ----------------------------------------------------------------------------------- whole models


def test_a_model_compiles_to_one_graph(target):
    """No graph break, the gradients of eager, and the same graph for other batches."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    settings: dict[str, Any] = {"d_model": 32, "num_heads": 2, "num_layers": 1, "d_ff": 64}
    model = TransformerClassifier(50, max_len=64, attn_backend=target.name, **settings)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for lens in ([7, 0, 9], [3, 5, 20, 1]):
        cu_seqlens = torch.tensor([0, *lens]).cumsum(0).int()
        ids = torch.randint(1, 50, (sum(lens) + 4,))
        options = {"cu_seqlens": cu_seqlens, "max_seqlen": max(lens), "seed": torch.tensor(SEED)}
        results = []
        for run in (model, compiled):
            model.zero_grad()
            logits = run(ids, **options)
            logits.square().sum().backward()
            results.append([logits.detach(), *(x.grad.clone() for x in model.parameters())])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6)


def test_a_training_step_equals_the_reference_s(target):
    """Every operation at once, all masks drawn: the same loss, the same gradients. Under autocast
    they are as far from those of float32 as the reference's are."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"d_model": 48, "num_heads": 2, "num_layers": 2, "d_ff": 40}
    # A relu flips where a sum rounds to the other side of 0, which outweighs all rounding.
    settings["activation"] = "gelu"
    models = [
        TransformerClassifier(50, max_len=64, attn_backend=name, **settings)
        for name in (target.name, "reference")
    ]
    models[1].load_state_dict(models[0].state_dict())
    lens = [13, 1, 0, 37, 21]
    ids = torch.randint(1, 50, (sum(lens),))
    options = {"cu_seqlens": torch.tensor([0, *lens]).cumsum(0).int(), "seed": torch.tensor(SEED)}

    def step(model: TransformerClassifier, autocast: bool) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            logits = model(ids, **options)
        # Scaled, as float16 asks for: the smallest gradients would be lost.
        loss = 2**12 * F.cross_entropy(logits.float(), torch.tensor([0, 1, 0, 1, 1]))
        loss.backward()
        return [loss.detach(), *(x.grad / 2**12 for x in model.parameters())]

    mine, theirs = (step(model, False) for model in models)
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    for x, y, exact in zip(*(step(model, True) for model in models), theirs, strict=True):
        assert (x - exact).norm() <= 3 * (y - exact).norm() + 1e-3 * exact.norm()


# ----------------------------------------------------------------------------------- at the edges


def test_more_sequences_than_a_program_looks_at_together(target):
    """Which rows are dead is found out from 32 sequences at a time; each has a gap behind it."""
    sequences = 65
    lens = tuple(1 + i % 3 for i in range(sequences))
    starts = tuple(4 * i + 1 for i in range(sequences))
    rows, nan = 4 * sequences + 1, float("nan")
    case = AttentionCase("many", lens, 1, 8, starts=starts, rows=rows, dead=nan)
    check(target, case, torch.float32, 0.1)


@pytest.mark.skipif(not INTERPRETED, reason="minutes on the PTX machine, where `long` has tiles")
def test_a_length_of_8192(triton, monkeypatch):
    """The tiled kernels, with tiles large enough for the interpreter to get through."""
    from fasttx.kernels.triton import tiles

    monkeypatch.setattr(tiles, "tile", lambda *where: tiles.Tile(1024, 512, 4, 1, whole=False))
    length, dtype = 8192, torch.float16
    qkv = torch.randn(length + 2, 3, 1, 16, dtype=torch.float64).to(dtype)
    grad = torch.randn(length + 2, 1, 16, dtype=torch.float64).to(dtype)
    leaf = qkv.clone().requires_grad_()
    out = triton.attention(leaf, spans_of(length, (1, length)), causal=True)
    (dqkv,) = torch.autograd.grad(out, leaf, grad)
    wide = qkv[1:-1].float().requires_grad_()
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in wide.unbind(1)), is_causal=True
    )[0].transpose(0, 1)
    (expected_dqkv,) = torch.autograd.grad(expected, wide, grad[1:-1].float())
    tolerance = 2e-3
    assert (out[1:-1].float() - expected).norm() <= tolerance * expected.norm()
    assert (dqkv[1:-1].float() - expected_dqkv).norm() <= tolerance * expected_dqkv.norm()
    assert not out[[0, -1]].any() and not dqkv[[0, -1]].any()


def test_offsets_beyond_32_bits(triton):
    """Row 2 lies 2^31 elements behind row 0 (4 GiB of address space, of which 3 rows are used)."""
    stride = 2**30
    memory = torch.empty(2 * stride + 48, dtype=torch.float16)
    view = memory.as_strided((3, 3, 1, 16), (stride, 16, 16, 1))
    qkv = torch.randn(3, 3, 1, 16).half()
    view.copy_(qkv)
    spans = spans_of(3, (0, 3))
    assert torch.equal(triton.attention(view, spans), triton.attention(qkv, spans))


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Values are not read there, so that the kernels meet whatever is in them."""
    from fasttx.ops import arguments, contract

    for module in (arguments, contract):
        monkeypatch.setattr(module, "readable", lambda x: False)


@pytest.mark.usefixtures("as_on_a_device")
def test_a_max_seqlen_that_is_too_small_reads_and_writes_what_the_reference_does(triton):
    qkv = torch.randn(40, 3, 2, 16)
    spans = spans_of(11, (0, 20), (20, 20))
    reference = BACKENDS["reference"].operations
    mine, theirs = (x.attention(qkv, spans) for x in (triton, reference))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("as_on_a_device")
def test_an_index_outside_its_table_is_nan(triton):
    """Never what happens to lie there; and it moves no gradient."""
    ids, positions = torch.tensor([1, -1, 5, 4, 0]), torch.tensor([0, 0, 0, 7, 6])
    table = torch.ones(5, 8, requires_grad=True)
    out = triton.embed(ids, positions, table, torch.ones(7, 8), NO_DROPOUT, 1.0)
    assert out.isnan().all(1).tolist() == [False, True, True, True, False]
    (gradient,) = torch.autograd.grad(out.sum(), table)
    assert (gradient[:, 0] > 0).tolist() == [True, True, False, False, True]


def test_precision_follows_torch_s_setting():
    from fasttx.kernels.triton.launch import dot_precision

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert dot_precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert dot_precision(torch.float32) == "tf32"
        assert dot_precision(torch.float16) == "ieee"  # only float32 can be lowered
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not INTERPRETED, reason="to launch needs a device: here the interpreter")
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_tuning_runs_what_it_measures(way):
    """Each candidate of a length, through the launcher; what they compute is tested elsewhere."""
    from fasttx.kernels.triton import tiles, tune

    tried = list(tune.candidates(16))
    assert tiles.Tile(16, 16, 4, 1, whole=True) in tried
    calls = []

    def timer(function: Any) -> float:
        calls.append(function())
        return 1.0

    for tile in tried[:2]:
        assert tune.measure(way, tile, torch.float32, 16, 16, 16, "cpu", timer) == 1.0
    assert len(calls) == 2
