"""Inputs that cannot be: every model refuses them, with one message on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttx import ModelConfig, TransformerClassifier
from fasttx.models.linear_cross_entropy import linear_cross_entropy
from fasttx.models.lstm import LSTMClassifier
from fasttx.models.masked_lm import MaskedLanguageModel

CONFIG = {
    "vocab_size": 20, "d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 8, "max_len": 8,
}  # fmt: skip
IDS = torch.tensor([3, 4, 5, 6, 7])
CU_SEQLENS = torch.tensor([0, 3, 5], dtype=torch.int32)
PLACES = torch.tensor([0, 1, 2, 0, 1], dtype=torch.int32)
RIGHT = {"input_ids": IDS, "cu_seqlens": CU_SEQLENS, "position_ids": PLACES, "max_seqlen": 3}
ENTRIES = ("cpu", "reference", "sdpa", "masked", "lstm")


def model(entry: str) -> Any:
    torch.manual_seed(0)
    if entry == "lstm":
        return LSTMClassifier(ModelConfig(**CONFIG)).eval()
    backend = "reference" if entry == "masked" else entry
    if entry == "masked":
        return MaskedLanguageModel(ModelConfig(**CONFIG, attn_backend=backend)).eval()
    return TransformerClassifier(**CONFIG, attn_backend=backend).eval()


def logits(entry: str, **inputs: Any) -> Tensor:
    rows = {"rows": torch.tensor([1])} if entry == "masked" else {}
    return model(entry)(**rows, **inputs)


def ids(*values: float, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values).to(dtype)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "float ids": ({"input_ids": IDS.float()}, TypeError, "input_ids is torch.float32"),
    "bool ids": ({"input_ids": IDS.bool()}, TypeError, "input_ids is torch.bool"),
    "complex ids": ({"input_ids": IDS + 0j}, TypeError, "input_ids is torch.complex64"),
    "a list of ids": ({"input_ids": IDS.tolist()}, TypeError, "input_ids is a list"),
    "an id past the table": ({"input_ids": ids(3, 4, 5, 6, 20)}, IndexError,
                             "ids holds 20 in row 4; expected 0 to 19"),
    "a negative id": ({"input_ids": ids(3, 4, -1, 6, 7)}, IndexError, "ids holds -1 in row 2"),
    "float bounds": ({"cu_seqlens": CU_SEQLENS.float()}, TypeError, "cu_seqlens is torch.float32"),
    "bool bounds": ({"cu_seqlens": CU_SEQLENS.bool()}, TypeError, "cu_seqlens is torch.bool"),
    "a list of bounds": ({"cu_seqlens": [0, 3, 5]}, TypeError, "cu_seqlens is a list"),
    "no bounds": ({"cu_seqlens": CU_SEQLENS[:0]}, TypeError, "cu_seqlens is torch.int32"),
    "decreasing bounds": ({"cu_seqlens": ids(0, 3, 2, 5)}, ValueError, "rows 3 to 2"),
    "a start above 0": ({"cu_seqlens": ids(1, 3, 5)}, ValueError, "begins with 1; expected 0"),
    "a start below 0": ({"cu_seqlens": ids(-1, 2, 5)}, ValueError, "sequence 0 is rows -1 to 2"),
    "bounds past the rows": ({"cu_seqlens": ids(0, 3, 6)}, ValueError, "rows 3 to 6"),
    "huge bounds": ({"cu_seqlens": ids(0, 3, 2**40)}, ValueError, "sequence 1 is rows 3 to"),
    "a low max_seqlen": ({"max_seqlen": 2}, ValueError, "has 3 rows and max_seqlen is 2"),
    "a negative max_seqlen": ({"max_seqlen": -1}, ValueError, "max_seqlen is -1"),
    "a float max_seqlen": ({"max_seqlen": 3.0}, TypeError, "max_seqlen is 3.0; expected an int"),
    "a seed of Python": ({"seed": 3}, TypeError, "seed is 3"),
    "a float seed": ({"seed": torch.tensor(3.0)}, TypeError, "seed is torch.float32"),
    "two seeds": ({"seed": torch.tensor([1, 2])}, TypeError, r"seed is torch.int64 \(2,\)"),
}  # fmt: skip
WRONG_PLACES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "float": ({"position_ids": PLACES.float()}, TypeError, "position_ids is torch.float32"),
    "bool": ({"position_ids": PLACES.bool()}, TypeError, "position_ids is torch.bool"),
    "short": ({"position_ids": PLACES[:4]}, ValueError, "two equal"),
    "a list": ({"position_ids": PLACES.tolist()}, TypeError, "position_ids is a list"),
    "negative": ({"position_ids": PLACES - 1}, IndexError, "position_ids holds -1 in row 0"),
    "past the table": ({"position_ids": PLACES + 6}, IndexError, "holds 8 in row 2; .* 0 to 7"),
}


@pytest.mark.parametrize("given_longest", [False, True])
@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("entry", ENTRIES)
def test_packed(entry, what, given_longest):
    wrong, error, message = WRONG[what]
    inputs = {**RIGHT, **({} if given_longest else {"max_seqlen": None}), **wrong}
    with pytest.raises(error, match=message):
        logits(entry, **inputs)


@pytest.mark.parametrize("what", WRONG_PLACES)
@pytest.mark.parametrize("entry", ENTRIES[:-1])  # an LSTM looks at none
def test_positions(entry, what):
    wrong, error, message = WRONG_PLACES[what]
    with pytest.raises(error, match=message):
        logits(entry, **{**RIGHT, **wrong})


@pytest.mark.parametrize("entry", ENTRIES)
def test_right_ones_of_any_integer_type(entry):
    expected = logits(entry, **RIGHT)
    for kind in (torch.int32, torch.int16, torch.uint8):
        inputs = {**RIGHT, "input_ids": IDS.to(kind), "position_ids": PLACES.to(kind)}
        assert torch.equal(logits(entry, **inputs), expected)
    inputs = {**RIGHT, "cu_seqlens": CU_SEQLENS.long()}
    assert torch.equal(logits(entry, **inputs), expected)


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_text_and_no_row(entry):
    """Not wrong: nothing comes of nothing."""
    nothing = {"input_ids": IDS[:0], "rows": IDS[:0]}
    inputs = {k: x for k, x in nothing.items() if k == "input_ids" or entry == "masked"}
    for cu_seqlens in (ids(0), ids(0, 0, 0)):
        for longest in (None, 0, 5):
            out = model(entry)(**inputs, cu_seqlens=cu_seqlens, max_seqlen=longest)
            assert len(out) == (0 if entry == "masked" else len(cu_seqlens) - 1)
            assert out.isfinite().all()


@pytest.mark.parametrize("entry", ENTRIES[:3])
def test_padded(entry):
    padded, classifier = torch.tensor([[3, 4, 5], [6, 7, 0]]), model(entry)
    for wrong, error, message in (
        ((padded.float(),), TypeError, "input_ids is torch.float32"),
        ((padded.bool(),), TypeError, "input_ids is torch.bool"),
        ((padded + 15,), IndexError, "ids holds 20 in row 2"),
        ((-padded,), IndexError, "ids holds -3 in row 0"),
        ((padded, (padded == 0) * -1e4), ValueError, "attention_mask holds -10000.0"),
        ((padded, torch.full((2, 3), math.nan)), ValueError, "attention_mask holds nan"),
        ((padded, 2 * (padded > 0)), ValueError, "attention_mask holds 2"),
        ((padded, (padded > 0) + 0j), TypeError, "attention_mask is torch.complex64"),
        ((padded, [[1, 1, 1], [1, 1, 0]]), TypeError, "attention_mask is a list"),
        ((padded, torch.ones(2, 1, 3)), ValueError, r"attention_mask \(2, 1, 3\)"),
    ):
        with pytest.raises(error, match=message):
            classifier(*wrong)
    # What the mask hides is no id.
    hidden = torch.tensor([[3, 4, 5], [6, 7, -100]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert torch.equal(classifier(hidden, mask), classifier(padded))


def test_rows_and_labels_of_the_masked_model():
    masked, right = model("masked"), {**RIGHT, "rows": torch.tensor([4, 0])}
    words = torch.tensor([3, 19])
    for wrong, error, message in (
        ({"rows": ids(4, 5)}, IndexError, "rows holds 5 in row 1; expected 0 to 4"),
        ({"rows": ids(-1, 0)}, IndexError, "rows holds -1"),
        ({"rows": torch.tensor([True, False, True, False, False])}, TypeError, "torch.bool"),
        ({"rows": ids(4.0, 0.0, dtype=torch.float32)}, TypeError, "rows is torch.float32"),
        ({"rows": torch.tensor([[4, 0]])}, ValueError, r"rows has shape \(1, 2\)"),
        ({"labels": ids(3, 20)}, IndexError, "labels holds 20 in row 1; expected 0 to 19"),
        ({"labels": ids(-100, 3)}, IndexError, "labels holds -100"),
        ({"labels": words.float()}, TypeError, "labels is torch.float32"),
        ({"labels": words[:1]}, ValueError, r"labels has shape \(1,\); expected \(2,\)"),
    ):
        with pytest.raises(error, match=message):
            masked(**{**right, "labels": words, **wrong})
    loss, _ = masked(**right, labels=words)
    assert torch.equal(masked(**right, labels=words.int())[0], loss)


def test_shapes_of_linear_cross_entropy():
    x, weight, bias, labels = torch.randn(4, 8), torch.randn(9, 8), torch.randn(9), IDS[:4]
    for wrong in (
        (x[:, :7], weight, bias), (x, weight, bias[:8]), (x[0], weight, bias), (x, weight[0], bias),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="x, weight and bias have shapes"):
            linear_cross_entropy(*wrong, labels)
    with pytest.raises(TypeError, match="x, weight and bias: got torch.int64"):
        linear_cross_entropy(x.long(), weight, bias, labels)
