"""Generated arguments of a model's forward: it answers in numbers, or refuses with a reason.

FASTTX_EXAMPLES: how many of them (50).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttx import TransformerClassifier

MODEL = TransformerClassifier(
    20, 3, d_model=8, num_heads=2, num_layers=1, d_ff=8, max_len=6, attn_backend="reference"
)
REFUSALS = (TypeError, ValueError, IndexError)

DTYPES = st.sampled_from(
    [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.complex64]
)
SHAPES = st.one_of(
    st.lists(st.integers(0, 4), max_size=3).map(tuple), st.sampled_from([(5,), (2, 3), (1, 6)])
)


@st.composite
def tensors(draw: st.DrawFn, low: int, high: int) -> torch.Tensor:
    """Mostly sound ones: integers from `low` to `high`, of a random shape and dtype."""
    shape = draw(SHAPES)
    count = int(torch.Size(shape).numel())
    values = draw(st.lists(st.integers(low, high), min_size=count, max_size=count))
    dtype = draw(st.one_of(st.just(torch.int64), DTYPES))
    return torch.tensor(values, dtype=torch.int64).reshape(shape).to(dtype)


@st.composite
def bounds(draw: st.DrawFn) -> torch.Tensor:
    steps = draw(st.lists(st.integers(-1, 4), max_size=3))
    first = draw(st.sampled_from([0, 0, 0, 1, -1]))
    dtype = draw(st.sampled_from([torch.int32, torch.int32, torch.int64, torch.float32]))
    return torch.tensor([first, *steps]).cumsum(0).to(dtype)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), strategy)


@settings(max_examples=int(os.environ.get("FASTTX_EXAMPLES", "50")), deadline=None)
@given(
    ids=tensors(-1, 21),
    mask=optional(tensors(-1, 2)),
    cu_seqlens=optional(bounds()),
    position_ids=optional(tensors(-1, 7)),
    max_seqlen=optional(st.integers(-1, 9)),
)
def test_any_arguments_of_forward_are_answered_or_refused(
    ids: torch.Tensor, mask: Any, cu_seqlens: Any, position_ids: Any, max_seqlen: Any
) -> None:
    given = {"cu_seqlens": cu_seqlens, "position_ids": position_ids, "max_seqlen": max_seqlen}
    refused = None
    try:
        logits = MODEL.eval()(ids, mask, **given)
    except REFUSALS as refusal:
        refused = str(refusal)
    if refused is not None:
        assert refused
        return
    texts = len(ids) if cu_seqlens is None else len(cu_seqlens) - 1
    assert logits.shape == (texts, 3) and bool(logits.isfinite().all())


@settings(max_examples=int(os.environ.get("FASTTX_EXAMPLES", "50")), deadline=None)
@given(
    sizes=st.fixed_dictionaries(
        {name: st.one_of(st.integers(-1, 9), st.sampled_from([10**9, 2**63, 1.5, None, True, "8"]))
         for name in ("vocab_size", "num_classes", "d_model", "num_heads", "num_layers", "d_ff",
                      "max_len")}
    ),
    dropout=st.sampled_from([0, 0.1, 1.0, -0.1, 2, float("nan"), "0.1", None]),
)  # fmt: skip
def test_any_sizes_make_a_model_or_are_refused(sizes: dict[str, Any], dropout: Any) -> None:
    refused = None
    try:
        model = TransformerClassifier(**sizes, dropout=dropout, attn_backend="reference")
    except REFUSALS as refusal:
        refused = str(refusal)
    if refused is not None:
        assert any(name in refused for name in (*sizes, "dropout"))
        return
    assert model.eval()(torch.zeros(1, 1, dtype=torch.int64)).shape == (1, sizes["num_classes"])
