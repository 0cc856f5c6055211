"""Arguments that cannot be are refused, with one message on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttx.ops import scaled_dot_product_attention
from fasttx.ops.contract import Spans
from fasttx.ops.dropout import NO_DROPOUT, Dropout
from fasttx.text.packing import unpad
from tests import backends
from tests.backends import over_backends

pytestmark = backends.POISONED

Refused = tuple[Any, type[Exception], str]

# ------------------------------------------------------------------------------------------- masks

MASK = [[1, 1, 0], [0, 1, 1]]
WRONG_MASKS: dict[str, Refused] = {
    "additive": ((torch.tensor(MASK) - 1) * 1e9, ValueError, "holds -1000000000.0; expected bool"),
    "additive, infinite": (
        torch.zeros(2, 3).masked_fill(~torch.tensor(MASK).bool(), -math.inf),
        ValueError, r"holds -inf; .*`mask == 0` makes one of an additive mask",
    ),
    "0 and 2": (torch.tensor(MASK) * 2, ValueError, "holds 2; expected bool, or 0"),
    "0 and 255": (torch.tensor(MASK).to(torch.uint8) * 255, ValueError, "holds 255"),
    "-1": (-torch.tensor(MASK), ValueError, "holds -1"),
    "halves": (torch.tensor(MASK) * 0.5, ValueError, "holds 0.5"),
    "NaN": (torch.full((2, 3), math.nan), ValueError, "holds nan"),
    "complex": (torch.tensor(MASK) + 0j, TypeError, "attention_mask is torch.complex64"),
    "a list": (MASK, TypeError, "attention_mask is a list"),
    "another shape": (torch.ones(2, 4), ValueError, r"attention_mask has shape \(2, 4\)"),
    "a shape that broadcasts": (torch.ones(3), ValueError, r"attention_mask has shape \(3,\)"),
    "four dimensions": (torch.ones(2, 1, 3, 3), ValueError, "attention_mask has shape"),
}  # fmt: skip
over_masks = pytest.mark.parametrize("what", WRONG_MASKS)


@over_masks
def test_unpad_refuses_a_mask(what):
    mask, error, message = WRONG_MASKS[what]
    with pytest.raises(error, match=message):
        unpad(torch.ones(2, 3).long(), mask)


@over_masks
@over_backends()
def test_attention_refuses_a_mask(target, what):
    mask, error, message = WRONG_MASKS[what]
    q = torch.randn(2, 1, 3, 8, device=target.device)
    if isinstance(mask, Tensor):
        mask = mask.to(target.device)
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(q, q, q, mask, backend=target.name)


@pytest.mark.parametrize(
    "kind", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.bfloat16, torch.float64],
    ids=str,
)  # fmt: skip
def test_zeros_and_ones_of_any_type_are_masks(kind):
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    packed, cu_seqlens = unpad(ids, torch.tensor(MASK).to(kind))
    assert packed.tolist() == [3, 4, 7, 8]
    assert cu_seqlens.tolist() == [0, 2, 4]


# --------------------------------------------------------------------------------------------- ids

TABLES = torch.randn(6, 8), torch.randn(4, 8)
PLACES = torch.tensor([0, 3, 1])
IDS = torch.tensor([5, 0, 2])
WRONG_IDS: dict[str, Refused] = {
    "float": (IDS.float(), TypeError, "ids is torch.float32 .*; expected integers"),
    "half": (IDS.half(), TypeError, "ids is torch.float16"),
    "bool": (IDS.bool(), TypeError, "ids is torch.bool"),
    "complex": (IDS + 0j, TypeError, "ids is torch.complex64"),
    "too large": (torch.tensor([5, 0, 6]), IndexError, "ids holds 6 in row 2; expected 0 to 5"),
    "negative": (torch.tensor([5, -1, 2]), IndexError, "ids holds -1 in row 1; expected 0 to 5"),
    "far": (torch.tensor([2**62, 0, 2]), IndexError, f"ids holds {2**62} in row 0"),
}
WRONG_PLACES: dict[str, Refused] = {
    "float": (PLACES.float(), TypeError, "position_ids is torch.float32"),
    "bool": (PLACES.bool(), TypeError, "position_ids is torch.bool"),
    "too large": (torch.tensor([0, 4, 1]), IndexError, "position_ids holds 4 in row 1.*0 to 3"),
    "negative": (torch.tensor([0, 3, -1]), IndexError, "position_ids holds -1 in row 2"),
    "longer": (torch.tensor([0, 3]), ValueError, "two equal"),
}


def refused(target: backends.Target, call: Any, case: Refused) -> None:
    """Values are looked at on the CPU only."""
    value, error, message = case
    if target.device == "cpu" or error is not IndexError:
        with pytest.raises(error, match=message):
            call(value.to(target.device))


@pytest.mark.parametrize("what", WRONG_IDS)
@over_backends()
def test_ids(target, what):
    tables = [x.to(target.device) for x in TABLES]
    places = PLACES.to(target.device)
    embed = target.operations.embed
    refused(target, lambda x: embed(x, places, *tables, NO_DROPOUT, 1.0), WRONG_IDS[what])


@pytest.mark.parametrize("what", WRONG_PLACES)
@over_backends()
def test_positions(target, what):
    tables = [x.to(target.device) for x in TABLES]
    ids = IDS.to(target.device)
    embed = target.operations.embed
    refused(target, lambda x: embed(ids, x, *tables, NO_DROPOUT, 1.0), WRONG_PLACES[what])


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
@over_backends()
def test_integers_of_any_width(target, kind):
    """uint8 is no mask of positions."""
    tables = [x.to(target.device) for x in TABLES]
    ids, places = IDS.to(target.device), PLACES.to(target.device)
    expected = target.operations.embed(ids, places, *tables, NO_DROPOUT, 1.0)
    found = target.operations.embed(ids.to(kind), places.to(kind), *tables, NO_DROPOUT, 1.0)
    assert torch.equal(found, expected)


# ------------------------------------------------------------------------------------------- spans


@pytest.mark.parametrize(
    ("starts", "lens", "longest", "error", "message"),
    [
        ([0, 3], [4, 2], 10, ValueError, "overlaps"),
        ([0, 8], [4, 3], 10, ValueError, "overlaps|rows 8 to 11|sequence 1"),
        ([-1, 4], [2, 2], 10, ValueError, "sequence 0"),
        ([0, 6], [4, -1], 10, ValueError, "sequence 1"),
        ([0.0, 4.0], [4.0, 4.0], 10, TypeError, "seq_starts is torch.float32"),
        ([0, 4], [4, 4], 10.0, TypeError, "max_seqlen is 10.0; expected an int"),
        ([0, 4], [4, 4], True, TypeError, "max_seqlen is True"),
        ([0, 4], [4, 4], None, TypeError, "max_seqlen is None"),
        ([0, 4], [4, 4], -1, ValueError, "max_seqlen is -1"),
    ],
)  # fmt: skip
@over_backends()
def test_spans_that_nobody_checked(target, starts, lens, longest, error, message):
    """Made without `Spans.of`."""
    qkv = torch.randn(10, 3, 1, 8, device=target.device)
    spans = Spans(*(torch.tensor(x, device=target.device) for x in (starts, lens)), longest)
    if target.device != "cpu" and error is ValueError and longest == 10:
        return
    with pytest.raises(error, match=message):
        target.operations.attention(qkv, spans)
    with pytest.raises(error, match=message):
        target.operations.attention_qkv(*qkv.unbind(1), spans)


# ----------------------------------------------------------------------------------------- numbers


@over_backends()
def test_numbers_and_dtypes(target):
    ops, x = target.operations, torch.randn(4, 8, device=target.device)
    qkv, ids = x.view(4, 1, 1, 8).expand(4, 3, 1, 8), torch.zeros(4, device=target.device).int()
    spans = Spans.of(*torch.tensor([[0], [4]], device=target.device), 4, 4)
    finite = "is {}; expected a finite number"
    for value in (math.nan, math.inf, -math.inf):
        for call in (
            lambda v: ops.attention(qkv, spans, scale=v),
            lambda v: ops.attention_qkv(*qkv.unbind(1), spans, scale=v),
            lambda v: ops.embed(ids, ids, x, x, NO_DROPOUT, v),
            lambda v: ops.add_norm(x, x, x[0], x[0], x[0], NO_DROPOUT, v),
        ):
            with pytest.raises(ValueError, match=finite.format(value)):
                call(value)
    with pytest.raises(TypeError, match="scale is '1'; expected a number"):
        ops.attention(qkv, spans, scale="1")
    for name, call in (
        ("qkv", lambda: ops.attention(qkv.int(), spans)),
        ("q, k, v", lambda: ops.attention_qkv(*qkv.to(torch.complex64).unbind(1), spans)),
        ("table and positions", lambda: ops.embed(ids, ids, x.int(), x, NO_DROPOUT, 1.0)),
        ("h and y", lambda: ops.add_norm(x.long(), x, x[0], x[0], x[0], NO_DROPOUT)),
        ("u", lambda: ops.bias_act(x.bool(), x[0], NO_DROPOUT, "relu")),
    ):
        with pytest.raises(TypeError, match=f"^{name}: got torch.* expected floating"):
            call()


@pytest.mark.parametrize("p", [math.nan, math.inf, -0.1, 1.1])
def test_what_is_no_probability(p):
    with pytest.raises(ValueError, match="expected a probability between 0 and 1"):
        Dropout.of(p, torch.tensor(1))


@pytest.mark.parametrize(
    "seed", [None, 3, torch.tensor(3.0), torch.tensor(3).int(), torch.tensor([3])]
)
def test_what_is_no_seed(seed):
    with pytest.raises(TypeError, match=r"dropout needs a \(\) int64 tensor"):
        Dropout.of(0.5, seed)
