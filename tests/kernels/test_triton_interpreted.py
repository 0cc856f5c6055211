"""The Triton kernels under Triton's interpreter, on tensors of the CPU: TRITON_INTERPRET=1.

Triton decides when a kernel is defined whether it interprets, so this needs a process of its own:
test_triton.py starts one, for these tests and for the equivalence tests over the same kernels.
T rows, B sequences, H heads, D head_dim.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttx import TransformerClassifier
from tests import equivalence

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs TRITON_INTERPRET=1; test_triton.py runs it so",
)

SEED = -0x1234567_89ABCDEF  # both halves in use, the sign too


@pytest.fixture
def adapter() -> Any:
    return equivalence.adapter_of(equivalence.BACKENDS["triton"], "cpu")


def spans(*pairs: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """seq_starts and seq_lens of (start, length)."""
    starts, lens = torch.tensor(pairs, dtype=torch.int32).unbind(1)
    return starts, lens


# ------------------------------------------------------------------------------------------ masks
# Where all scores are alike, the weights are 1 / length times the dropout factors, and a v (or a
# gradient of the output) of unit vectors copies them out.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "causal"), [(17, False), (33, True), (130, False), (130, True)])
def test_masks_bit_for_bit(adapter, length, causal, dtype):
    """Those of the forward and of the backward pass, from whole-row and from tiled kernels."""
    p, heads, head_dim = 0.3, 2, 128
    expected = equivalence.attention_uniforms(SEED, 2, heads, length, length)[1] >= 0.3 * 65536
    keep = torch.from_numpy(expected)  # (H, queries, keys)
    if causal:
        keep = keep & torch.ones(length, length, dtype=torch.bool).tril()
    rows = length + 3
    where = spans((1, 2), (3, length))
    for first in range(0, length, head_dim):
        unit = torch.zeros(rows, heads, head_dim, dtype=dtype)
        width = min(head_dim, length - first)
        unit[3 + first : 3 + first + width, :, :width] = torch.eye(width)[:, None]
        zero = torch.zeros_like(unit)
        v = unit.clone().requires_grad_()
        out = adapter.attention_qkv(
            zero, zero, v, *where, max_seqlen=length, dropout_p=p, seed=torch.tensor(SEED),
            causal=causal,
        )  # fmt: skip
        (dv,) = torch.autograd.grad(out, v, unit)
        columns = slice(first, first + width)
        assert torch.equal(out[3:, :, :width].transpose(0, 1) > 0, keep[:, :, columns])
        assert torch.equal(dv[3:, :, :width].permute(1, 2, 0) > 0, keep[:, columns])


@pytest.mark.parametrize("columns", [8, 20, 300])
def test_row_masks_bit_for_bit(adapter, columns):
    """Of all three operations, forward and backward."""
    rows, p, seed = 37, 0.3, torch.tensor(SEED)
    keep = torch.from_numpy(equivalence.row_uniforms(SEED, rows, columns) >= 0.3 * 65536)
    zero, bias = torch.zeros(rows, columns), torch.ones(columns)
    u = zero.clone().requires_grad_()
    out = adapter.rowops.bias_act(u, bias, p, seed, "relu")
    h, _ = adapter.rowops.add_norm(zero, u, bias, bias, bias, p, seed)
    ids = torch.arange(rows)
    table = torch.ones(rows, columns, requires_grad=True)
    embedded = adapter.rowops.embed(ids, ids, table, zero, p, seed)
    for name, value, leaf in (("bias_act", out, u), ("add_norm", h, u), ("embed", embedded, table)):
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert torch.equal(value > 0, keep), name
        assert torch.equal(gradient > 0, keep), f"{name}, backward"


# ------------------------------------------------------------------------------------- operators


def _attention_arguments(p: int) -> tuple[Any, ...]:
    seed = torch.tensor(SEED) if p else None
    return (*spans((0, 7), (7, 0), (8, 9)), 12, p, seed, True, 0.25)


def _operator_calls(threshold: int) -> dict[str, tuple[Any, ...]]:
    """Arguments for every operator."""
    seed = torch.tensor(SEED) if threshold else None

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=True)

    options = _attention_arguments(threshold)
    qkv, ids = leaf(20, 3, 2, 16), torch.randint(0, 11, (9,))
    q, k, v = (leaf(20, 2, 16) for _ in range(3))
    calls: dict[str, tuple[Any, ...]] = {
        "attention": (qkv, *options),
        "attention_qkv": (q, k, v, *options),
        "add_norm": (*(leaf(9, 24) for _ in range(2)), *(leaf(24) for _ in range(3)), threshold,
                     seed, 1e-5),
        "bias_act": (leaf(9, 24), leaf(24), threshold, seed, True),
        "embed": (ids, torch.arange(9), leaf(11, 24), torch.randn(12, 24), threshold, seed),
    }  # fmt: skip
    out, lse = torch.randn(20, 2, 16), torch.randn(2, 20)
    x, vector = torch.randn(9, 24), torch.randn(24)
    fp32 = torch.float32
    return calls | {
        "attention_backward": (out, qkv.detach(), out, lse, *options),
        "attention_qkv_backward": (out, *(y.detach() for y in (q, k, v)), out, lse, *options),
        "add_norm_backward": (x, x, x, x[:, 0].clone(), x[:, 1].clone(), vector, fp32, fp32,
                              threshold, seed),
        "bias_act_backward": (x, x, vector, threshold, seed, False),
        "embed_backward": (x, ids, torch.randn(11, 24), threshold, seed),
    }  # fmt: skip


@pytest.mark.parametrize("threshold", [0, 6554])
@pytest.mark.parametrize("name", _operator_calls(0))
def test_opcheck(adapter, name, threshold):
    """Schema, fake implementation, derivative, and that tracing changes nothing."""
    from fasttx.kernels.triton import add_norm, attention, bias_act, embed  # noqa: F401

    operator = getattr(torch.ops.fasttx_triton, name).default
    torch.library.opcheck(operator, _operator_calls(threshold)[name])


@pytest.mark.parametrize("name", [n for n in _operator_calls(0) if not n.endswith("_backward")])
def test_a_second_derivative_is_refused(adapter, name):
    """By each operator, and not left out with a warning. The first one stands."""
    from fasttx.kernels.triton import add_norm, attention, bias_act, embed  # noqa: F401

    arguments = _operator_calls(6554)[name]
    out = getattr(torch.ops.fasttx_triton, name).default(*arguments)
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    loss = (out if isinstance(out, Tensor) else out[0]).square().sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
    assert all(x.isfinite().all() for x in first)
    with pytest.raises(NotImplementedError, match="triton backend.*second derivative.*reference"):
        sum(x.square().sum() for x in first).backward()


def test_a_model_compiles_to_one_graph(adapter):
    """No graph break, the gradients of eager, and the same graph for other batches."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    settings: dict[str, Any] = {"d_model": 32, "num_heads": 2, "num_layers": 2, "d_ff": 64}
    model = TransformerClassifier(50, max_len=64, attn_backend="triton", **settings)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for lens in ([7, 0, 9], [3, 5, 20, 1], [2, 30]):
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


def test_a_training_step_equals_the_reference_s(adapter):
    """Every operation at once, all masks drawn: the same loss, the same gradients. Under autocast
    they are as far from those of float32 as the reference's are."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"d_model": 48, "num_heads": 2, "num_layers": 2, "d_ff": 40}
    # A relu flips where a sum rounds to the other side of 0, which outweighs all rounding.
    settings["activation"] = "gelu"
    models = [
        TransformerClassifier(50, max_len=64, attn_backend=name, **settings)
        for name in ("triton", "reference")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_a_length_of_8192(adapter, monkeypatch, causal, dtype):
    """The tiled kernels, with tiles large enough for the interpreter to get through."""
    from fasttx.kernels.triton import tiles

    monkeypatch.setattr(
        tiles, "tile", lambda *where: tiles.Tile(1024, 512, 4, 1, whole=False)
    )  # fmt: skip
    length = 8192
    qkv = torch.randn(length + 2, 3, 1, 16, dtype=torch.float64).to(dtype)
    grad = torch.randn(length + 2, 1, 16, dtype=torch.float64).to(dtype)
    leaf = qkv.clone().requires_grad_()
    out = adapter.attention(leaf, *spans((1, length)), max_seqlen=length, causal=causal)
    (dqkv,) = torch.autograd.grad(out, leaf, grad)
    wide = qkv[1:-1].float().requires_grad_()
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in wide.unbind(1)), is_causal=causal
    )[0].transpose(0, 1)
    (expected_dqkv,) = torch.autograd.grad(expected, wide, grad[1:-1].float())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    assert (out[1:-1].float() - expected).norm() <= tolerance * expected.norm()
    assert (dqkv[1:-1].float() - expected_dqkv).norm() <= tolerance * expected_dqkv.norm()
    assert not out[[0, -1]].any() and not dqkv[[0, -1]].any()


def test_offsets_beyond_32_bits(adapter):
    """Row 2 lies 2^31 elements behind row 0 (4 GiB of address space, of which 3 rows are used)."""
    stride = 2**30
    memory = torch.empty(2 * stride + 48, dtype=torch.float16)
    view = memory.as_strided((3, 3, 1, 16), (stride, 16, 16, 1))
    qkv = torch.randn(3, 3, 1, 16).half()
    view.copy_(qkv)
    where = spans((0, 3))
    out = adapter.attention(view, *where, max_seqlen=3)
    torch.testing.assert_close(out, adapter.attention(qkv, *where, max_seqlen=3), rtol=0, atol=0)


def test_a_max_seqlen_that_is_too_small_reads_and_writes_what_the_reference_does(adapter):
    qkv = torch.randn(40, 3, 2, 16)
    where = spans((0, 20), (20, 20))
    reference = equivalence.BACKENDS["reference"].adapter()
    mine, theirs = (x.attention(qkv, *where, max_seqlen=11) for x in (adapter, reference))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_an_index_outside_its_table_is_nan(adapter):
    """Never what happens to lie there; and it moves no gradient."""
    ids, positions = torch.tensor([1, -1, 5, 4, 0]), torch.tensor([0, 0, 0, 7, 6])
    table = torch.ones(5, 8, requires_grad=True)
    out = adapter.rowops.embed(ids, positions, table, torch.ones(7, 8), 0.0, None)
    assert out.isnan().all(1).tolist() == [False, True, True, True, False]
    (gradient,) = torch.autograd.grad(out.sum(), table)
    assert (gradient[:, 0] > 0).tolist() == [True, True, False, False, True]


def test_precision_follows_torch_s_setting(adapter):
    from fasttx.kernels.triton.operators import dot_precision

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert dot_precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert dot_precision(torch.float32) == "tf32"
        assert dot_precision(torch.float16) == "ieee"  # only float32 can be lowered
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(4, 16)}, r"q, k, v have shapes \(4, 16\).*three equal \(T, H, D\)"),
        ({"k": torch.randn(5, 2, 16)}, r"\(5, 2, 16\).*three equal"),
        ({"v": torch.randn(4, 2, 16).half()}, "float16; expected one of float32"),
        (dict.fromkeys("qkv", torch.randn(4, 2, 16).double()), "float64.*expected one of float32"),
        (dict.fromkeys("qkv", torch.randn(4, 2, 129)), "head_dim is 129; expected at most 128"),
        ({"starts": torch.tensor([0])}, r"seq_starts is torch.int64 \(1,\); expected int32"),
        ({"lens": torch.tensor([4, 0], dtype=torch.int32)}, r"seq_starts is .*the same B"),
        ({"starts": torch.zeros(1, dtype=torch.int32, device="meta")}, "on meta.*one device"),
    ],
)
def test_refusals(adapter, change, message):
    from fasttx.kernels.triton.attention import attention_qkv

    arguments = {x: torch.randn(4, 2, 16) for x in "qkv"}
    arguments |= dict(zip(("starts", "lens"), spans((0, 4)), strict=True))
    if change.get("starts", torch.empty(0)).is_meta:
        from fasttx.kernels.triton.attention import _check

        with pytest.raises(ValueError, match=message):
            _check(*(arguments | change).values())
        return
    with pytest.raises((TypeError, ValueError), match=message):
        attention_qkv(*(arguments | change).values(), 4, 0, None, False, 1.0)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("add_norm", ((4, 8), (4, 9), (8,), (8,), (8,)), r"h, y have shapes \(4, 8\), \(4, 9\)"),
        ("add_norm", ((4, 8), (4, 8), (8,), (9,), (8,)), r"gamma has shape \(9,\); expected \(8,"),
        ("bias_act", ((4, 8), (9,)), r"u, bias have shapes \(4, 8\), \(9,\)"),
        ("embed", ((4,), (5,), (9, 8), (7, 8)), r"ids, position_ids have shapes \(4,\), \(5,\)"),
        ("embed", ((4,), (4,), (9, 8), (7, 6)), r"table, pe have shapes \(9, 8\), \(7, 6\)"),
    ],
)
def test_row_operations_refuse(adapter, op, arguments, message):
    tensors = [torch.zeros(shape) for shape in arguments]
    if op == "embed":
        tensors[:2] = [x.long() for x in tensors[:2]]
    with pytest.raises(ValueError, match=message):
        getattr(adapter.rowops, op)(*tensors, 0.0, None)


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_tuning_runs_what_it_measures(adapter, kernel):
    """Each candidate of a length, through the launcher; what they compute is tested elsewhere."""
    from fasttx.kernels.triton import tiles, tune

    tried = list(tune.candidates(16))
    assert tiles.Tile(16, 16, 4, 1, whole=True) in tried
    calls = []

    def timer(function: Any) -> float:
        calls.append(function())
        return 1.0

    for tile in tried[:2]:
        assert tune.measure(kernel, tile, torch.float32, 16, 16, 16, "cpu", timer) == 1.0
    assert len(calls) == 2
