"""The contract: all backends' operations have its signatures, and spans are checked for all."""

from __future__ import annotations

import inspect

import pytest
import torch

from fasttx import TransformerClassifier
from fasttx.ops.contract import Operations, Spans
from fasttx.ops.dropout import NO_DROPOUT
from fasttx.testing import AttentionCase, dropout_of
from tests import backends
from tests.backends import EVERY, over_backends

pytestmark = backends.POISONED

OPERATIONS = [name for name in vars(Operations) if not name.startswith("_")]


def test_there_are_five_operations():
    """And attention a second time, of projections that lie apart; and three of them as one."""
    five = ["attention", "attention_qkv", "embed", "add_norm", "bias_act", "linear"]
    assert [*five, "feed_forward"] == OPERATIONS


@pytest.mark.parametrize("name", EVERY)
def test_no_backend_has_entries_of_its_own(name):
    """Arguments are checked once, for all; also for those that cannot run here."""
    try:
        adapter = EVERY[name].adapter()
        operations = adapter.operations
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported here: {error}")
    assert isinstance(operations, Operations)
    for operation in OPERATIONS:
        assert getattr(type(operations), operation) is getattr(Operations, operation), operation
    reasons = inspect.signature(adapter.unavailable_reasons).parameters
    assert list(reasons) == ["device", "dtype", "head_dim"]
    assert isinstance(adapter.description(), dict)


# --------------------------------------------------------------------------------------- arguments


@over_backends()
def test_shapes_that_do_not_fit_are_refused(target):
    """Kernels see addresses: they would read past the end. One message on every backend."""
    ops, x = target.operations, torch.zeros(4, 8, device=target.device)
    q, ids, bias = x.view(4, 1, 8), torch.zeros(4, device=target.device).int(), x[0]
    spans = AttentionCase("one", (4,)).spans(target.device)
    for refused, message in (
        (lambda: ops.attention(torch.stack([q, q], 1), spans), r"qkv has shape \(4, 2, 1, 8\)"),
        (lambda: ops.attention_qkv(q, q[:3], q, spans), r"q, k, v have shapes .*three equal"),
        (lambda: ops.embed(ids, ids[:3], x, x, NO_DROPOUT, 1.0), r"ids and position_ids"),
        (lambda: ops.embed(ids, ids, x, x[:, :7], NO_DROPOUT, 1.0), r"table and positions"),
        (lambda: ops.add_norm(x, x[:3], bias, bias, bias, NO_DROPOUT), r"h and y have shapes"),
        (lambda: ops.add_norm(x, x, bias, bias[:7], bias, NO_DROPOUT), r"gamma has shape \(7,\)"),
        (lambda: ops.bias_act(x, bias[:7], NO_DROPOUT, "relu"), r"bias has shape \(7,\)"),
        (lambda: ops.bias_act(q, bias, NO_DROPOUT, "relu"), r"u has shape \(4, 1, 8\)"),
        (lambda: ops.linear(x, x[:, :7]), r"x and weight have shapes \(4, 8\) and \(4, 7\)"),
        (lambda: ops.linear(q, x), r"x and weight have shapes \(4, 1, 8\) and \(4, 8\)"),
        (lambda: ops.feed_forward(x, x, x[:, 0], x, NO_DROPOUT, "relu"), r"n, up and down have"),
        (lambda: ops.feed_forward(x, x, bias, x.T, NO_DROPOUT, "relu"), r"bias has shape \(8,\)"),
        (lambda: ops.linear(x, x, bias), r"bias has shape \(8,\); expected \(4,\)"),
        (lambda: ops.bias_act(x, bias, NO_DROPOUT, "swish"), "'swish'; expected one of relu, gelu"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


@over_backends()
def test_tensors_of_two_devices_are_refused(target):
    ops, x = target.operations, torch.zeros(4, 8, device=target.device)
    qkv, ids = x.view(4, 1, 1, 8).expand(4, 3, 1, 8), torch.zeros(4, device=target.device).int()
    far, elsewhere = x.to("meta"), AttentionCase("one", (4,)).spans("meta")
    seed = dropout_of(0.5, "meta")
    here = AttentionCase("one", (4,)).spans(target.device)
    for refused in (
        lambda: ops.attention(qkv, elsewhere),
        lambda: ops.attention(qkv, here, seed),
        lambda: ops.attention_qkv(qkv[:, 0], qkv[:, 1].to("meta"), qkv[:, 2], here),
        lambda: ops.embed(ids, ids.to("meta"), x, x, NO_DROPOUT, 1.0),
        lambda: ops.add_norm(x, far, x[0], x[0], x[0], NO_DROPOUT),
        lambda: ops.bias_act(x, far[0], NO_DROPOUT, "relu"),
        lambda: ops.bias_act(x, x[0], seed, "relu"),
    ):
        with pytest.raises(ValueError, match="and meta; expected one device for all"):
            refused()


@over_backends()
def test_spans_with_strides(target):
    """Kernels read starts and lens as dense."""
    case = AttentionCase("pairs", (3, 1, 4), starts=(5, 0, 1), rows=9)
    qkv, device = case.inputs(torch.float32)[0].to(target.device), target.device
    pairs = torch.tensor(case.pairs, dtype=torch.int32, device=device)
    out = target.operations.attention(qkv, Spans(*pairs.unbind(1), 4))
    dense = Spans(*(x.contiguous() for x in pairs.unbind(1)), 4)
    assert torch.equal(out, target.operations.attention(qkv, dense))


# ------------------------------------------------------------------------------------------- spans


def spans(starts: list[int], lens: list[int], max_seqlen: int = 10, rows: int = 10) -> Spans:
    return Spans.of(torch.tensor(starts), torch.tensor(lens), max_seqlen, rows)


def test_spans_are_what_they_were_given():
    """In any order, with gaps and empty sequences, int32 whatever integers they were."""
    found = spans([7, 0, 0, 10, 3], [3, 2, 0, 0, 4])
    assert found.starts.tolist() == [7, 0, 0, 10, 3]
    assert found.lens.tolist() == [3, 2, 0, 0, 4]
    assert found.starts.dtype == found.lens.dtype == torch.int32
    assert found.max_seqlen == 10
    found = Spans.from_cu_seqlens(torch.tensor([0, 4, 4, 9]), 5, 10)
    assert (found.starts.tolist(), found.lens.tolist()) == ([0, 4, 4], [4, 0, 5])
    assert len(Spans.from_cu_seqlens(torch.tensor([0]), 0, 3).starts) == 0


@pytest.mark.parametrize(
    ("starts", "lens", "message"),
    [
        ([0, 3], [4, 2], "starts at row 3 overlaps another one"),
        ([3, 0], [2, 4], "starts at row 3 overlaps another one"),
        ([2, 2], [1, 1], "starts at row 2 overlaps another one"),
        ([0, 8], [4, 3], r"sequence 1 is rows 8 to 11 .*within 0 to 10"),
        ([-1, 4], [2, 2], r"sequence 0 is rows -1 to 1 .*within 0 to 10"),
        ([0, 4, 6], [4, 2, -1], r"sequence 2 is rows 6 to 5 \(length -1\)"),
        ([2**31 - 1, 0], [2, 1], "sequence 0 is rows 2147483647"),
        ([0, 4], [4, 6], "sequence 1 has 6 rows and max_seqlen is 5"),
    ],
)  # fmt: skip
def test_spans_that_cannot_be(starts, lens, message):
    with pytest.raises(ValueError, match=message):
        spans(starts, lens, max_seqlen=5 if 6 in lens else 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.uint8], ids=str)
def test_spans_of_another_type(dtype):
    ids, right = torch.zeros(2, dtype=dtype), torch.zeros(2, dtype=torch.int32)
    for starts, lens, name in ((ids, right, "seq_starts"), (right, ids, "seq_lens")):
        with pytest.raises(TypeError, match=f"{name} is {dtype} .*expected int32"):
            Spans.of(starts, lens, 1, 2)
    with pytest.raises(TypeError, match=f"cu_seqlens is {dtype} .*expected int32"):
        Spans.from_cu_seqlens(ids, 1, 2)


def test_spans_of_another_shape():
    right = torch.zeros(2, dtype=torch.int32)
    for wrong in (right[:1], right[None], right[0]):
        with pytest.raises(TypeError, match="the same B for both"):
            Spans.of(right, wrong, 1, 2)
        with pytest.raises(TypeError, match="the same B for both"):
            Spans.of(wrong, right, 1, 2)
    for wrong in (right[:0], right[None], right[0]):
        with pytest.raises(TypeError, match=r"cu_seqlens is .*expected int32 \(B \+ 1,\)"):
            Spans.from_cu_seqlens(wrong, 1, 2)


WRONG_CU_SEQLENS = {
    "float": (torch.tensor([0.0, 3.0]), TypeError, r"cu_seqlens is torch.float32 \(2,\)"),
    "bool": (torch.tensor([False, True]), TypeError, r"cu_seqlens is torch.bool \(2,\)"),
    "a matrix": (torch.tensor([[0, 3]]), TypeError, r"cu_seqlens is torch.int64 \(1, 2\)"),
    "decreasing": (torch.tensor([0, 3, 2, 4]), ValueError, r"sequence 1 is rows 3 to 2"),
    "below 0": (torch.tensor([-1, 3]), ValueError, "sequence 0 is rows -1 to 3"),
    "past the end": (torch.tensor([0, 3, 5]), ValueError, "sequence 1 is rows 3 to 5"),
    "longer than max_seqlen": (torch.tensor([0, 4]), ValueError, "has 4 rows and max_seqlen is 3"),
}


@pytest.mark.parametrize("what", WRONG_CU_SEQLENS)
@over_backends()
def test_a_model_refuses_wrong_cu_seqlens(target, what):
    """With one message on every backend. Other devices would have to be waited for."""
    if target.device != "cpu":
        return
    model = TransformerClassifier(
        20, d_model=16, num_heads=2, num_layers=1, d_ff=8, max_len=8, attn_backend=target.name
    )
    cu_seqlens, error, message = WRONG_CU_SEQLENS[what]
    places = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(error, match=message):
        model(torch.ones(4).long(), cu_seqlens=cu_seqlens, position_ids=places, max_seqlen=3)
