"""`attn_implementation="fasttx"` against transformers' own SDPA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf import models
from tests.hf.models import (
    CONFIGS,
    LENGTHS,
    backends_with_shared_masks,
    close,
    padded,
    pair,
    transformers,
    values,
)

import fasttx.hf  # isort: skip
from fasttx.errors import UnsupportedError
from fasttx.hf import attention
from fasttx.ops.contract import Spans
from fasttx.ops.dropout import NO_DROPOUT, Dropout, attention_keep, keep_scale, threshold
from fasttx.ops.local import local_attention

pytestmark = pytest.mark.xdist_group("transformers")  # one import of transformers

over_families = pytest.mark.parametrize("family", CONFIGS)
# Gradients in float64 are the same function's; in float32 both are off by their own rounding.
PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-11)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that asked our attention: a model that ignores it must not pass."""
    names: list[str] = []
    refuse = attention._refuse

    def counted(module: Any, *rest: Any) -> None:
        names.append(type(module).__name__)
        refuse(module, *rest)

    monkeypatch.setattr(attention, "_refuse", counted)
    return names


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("dtype", "allowed"), PRECISIONS, ids=str)
@over_families
def test_equals_sdpa(family, dtype, allowed, side, asked):
    """Hidden states of real tokens, and all gradients."""
    theirs, ours = pair(family, dtype)
    ids, mask = padded(side)
    weights = torch.randn(*ids.shape, 32, dtype=dtype) * mask[..., None]
    expected, gradients = values(theirs, weights, input_ids=ids, attention_mask=mask)
    assert not asked
    found, ours_gradients = values(ours, weights, input_ids=ids, attention_mask=mask)
    assert len(asked) == 2
    close(found[mask.bool()], expected[mask.bool()], allowed)
    assert ours_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        close(ours_gradients[name], gradient, 2 * allowed)


@over_families
def test_without_padding(family, asked):
    theirs, ours = pair(family)
    ids, _ = padded("right")
    expected = theirs(input_ids=ids).last_hidden_state
    close(ours(input_ids=ids).last_hidden_state, expected, 1e-5)
    whole = torch.ones_like(ids)
    close(ours(input_ids=ids, attention_mask=whole).last_hidden_state, expected, 1e-5)
    assert len(asked) == 4


@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "distilbert"])
def test_packed_texts_do_not_see_one_another(family):
    _, ours = pair(family, torch.float64)
    ids, mask = padded("right")
    packed = ids[mask.bool()][None]
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    start = 2 if family == "roberta" else 0  # after the padding's position
    places = torch.cat([torch.arange(start, start + n) for n in LENGTHS])[None]
    found = ours(
        input_ids=packed, position_ids=places, cu_seq_lens_q=borders, cu_seq_lens_k=borders,
        max_length_q=max(LENGTHS), max_length_k=max(LENGTHS),
    )  # fmt: skip
    pieces = found.last_hidden_state[0].split(LENGTHS)
    for row, length, piece in zip(ids, LENGTHS, pieces, strict=True):
        alone = ours(input_ids=row[None, :length]).last_hidden_state[0]
        torch.testing.assert_close(piece, alone)


def test_packed_texts_of_distilbert():
    """Its embeddings count positions over the whole row, so each text is embedded alone."""
    _, ours = pair("distilbert", torch.float64)
    ids, _ = padded("right")
    embeddings = [ours.embeddings(row[None, :n]) for row, n in zip(ids, LENGTHS, strict=True)]
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    spans = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
    h = ours.transformer(torch.cat(embeddings, 1), None, **spans).last_hidden_state[0]
    for row, length, piece in zip(ids, LENGTHS, h.split(LENGTHS), strict=True):
        alone = ours(input_ids=row[None, :length]).last_hidden_state[0]
        torch.testing.assert_close(piece, alone)


@over_families
def test_dropout_is_that_of_all_backends(family):
    _, ours = pair(family)
    ids, mask = padded("right")
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # these would draw by torch's generator
    for module in ours.modules():
        if "SelfAttention" in type(module).__name__:
            module.dropout.p = 0.3
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    ours.train()
    found = {}
    for name in backends_with_shared_masks():
        ours.set_attn_implementation(f"fasttx:{name}")
        torch.manual_seed(7)
        found[name] = ours(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = found.pop("reference")
    undropped = ours.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
    assert not torch.allclose(expected[mask.bool()], undropped[mask.bool()], atol=1e-2)
    assert found
    for hidden in found.values():
        close(hidden[mask.bool()], expected[mask.bool()], 1e-5)


def test_a_decoder_without_cache_is_causal(asked):
    auto = transformers.AutoModelForCausalLM
    theirs, ours = pair("bert", auto=auto, is_decoder=True)
    ids, mask = padded("right")
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    found, expected = ours(**inputs).logits, theirs(**inputs).logits
    close(found[mask.bool()], expected[mask.bool()], 1e-5)
    assert asked


def test_gradient_checkpointing_draws_the_same_masks():
    _, ours = pair("bert")
    ids, mask = padded("right")
    inputs = {"input_ids": ids, "attention_mask": mask}
    weights, found = torch.randn(*ids.shape, 32) * mask[..., None], []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        found.append(values(ours.train(), weights, **inputs)[1])
    for name, gradient in found[0].items():
        close(found[1][name], gradient, 1e-5)


# ----------------------------------------------------------------------------------------- refusals


def refused(model: Any, match: str, **inputs: Any) -> None:
    with pytest.raises(UnsupportedError, match=match):
        model(**inputs)


def test_what_cannot_be_had_is_refused():
    _, ours = pair("bert")
    ids, mask = padded("right")
    pairs = torch.ones(3, 1, 30, 30, dtype=torch.bool).tril()
    refused(ours, r"attention_mask has shape \(3, 1, 30, 30\)", input_ids=ids, attention_mask=pairs)
    borders = {"cu_seq_lens_q": torch.tensor([0, 10, 90]), "cu_seq_lens_k": torch.tensor([0, 90])}
    refused(ours, "cu_seq_lens_q and cu_seq_lens_k differ", input_ids=ids, **borders)
    borders["cu_seq_lens_k"] = borders["cu_seq_lens_q"]
    refused(ours, "in one row", input_ids=ids, **borders)
    one = {"input_ids": ids[:1], "attention_mask": mask[:1]}
    refused(ours, "leave attention_mask away", **one, **borders)
    hole = mask.clone()
    hole[0, 3] = 0
    with pytest.raises(ValueError, match="row 0 has a hole"):
        ours(input_ids=ids, attention_mask=hole)


def test_caches_and_other_texts_are_refused():
    auto = transformers.AutoModelForCausalLM
    _, ours = pair("bert", auto=auto, is_decoder=True, add_cross_attention=True)
    ids, _ = padded("right")
    other = torch.randn(3, 30, 32)
    refused(ours, "attends to another text", input_ids=ids, encoder_hidden_states=other)
    _, ours = pair("bert", auto=auto, is_decoder=True)
    cache = ours(input_ids=ids).past_key_values
    refused(ours, "1 queries and 31 keys", input_ids=ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("option", sorted(attention._REFUSED))
def test_options_that_no_backend_has_are_refused(option):
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(UnsupportedError, match=option):
        attention.attention(torch.nn.Module(), x, x, x, None, **{option: 1.0})


def test_grouped_heads_are_refused():
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(UnsupportedError, match="as many heads for keys"):
        attention.attention(torch.nn.Module(), query, key, key, None)


def test_masks_of_a_model_s_own_are_refused():
    from transformers.masking_utils import chunked_causal_mask_function

    for options in ({"use_vmap": True}, {"local_size": 4}, {}):
        with pytest.raises(UnsupportedError, match="mask of its own"):
            attention.spans_of_batch(
                1, 16, 16, chunked_causal_mask_function(4, torch.zeros(1)), **options
            )


def test_models_that_would_ignore_it_are_refused():
    config = transformers.DebertaV2Config(**models.SIZES)
    with pytest.raises(UnsupportedError, match="DebertaV2Model computes its attention itself"):
        transformers.AutoModel.from_config(config, attn_implementation="fasttx")
    transformers.AutoModel.from_config(config, attn_implementation="eager")
    _, ours = pair("bert")
    with pytest.raises(ValueError, match="fasttx:cuda"):
        ours.set_attn_implementation("fasttx:cuda")


# ------------------------------------------------------------------------------------------ windows


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: int, dropout: Dropout
) -> Tensor:
    out = torch.zeros_like(q)
    heads, longest = q.shape[1], spans.max_seqlen
    t = dropout.threshold
    lengths = spans.lens.tolist()
    for i, (start, length) in enumerate(zip(spans.starts.tolist(), lengths, strict=True)):
        rows = slice(start, start + length)
        place = torch.arange(length)
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[rows]) * q.shape[-1] ** -0.5
        near = (place[:, None] - place).abs() < window
        weights = scores.masked_fill(~near, -torch.inf).softmax(-1)
        if t:
            keep = attention_keep(dropout.seed, i + 1, heads, longest, longest, t)[i]
            weights = weights * keep[:, :length, :length] * keep_scale(t)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, v[rows])
    return out


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("window", [1, 3, 8, 17, 100])
def test_a_window_by_definition(window, p):
    spans = Spans(torch.tensor([30, 0, 29]), torch.tensor([40, 29, 0]), 41)
    q, k, v = torch.randn(3, 75, 2, 8, dtype=torch.float64).requires_grad_().unbind()
    dropout = Dropout.of(p, torch.tensor(5)) if p else NO_DROPOUT
    assert dropout.threshold == threshold(p)
    found = local_attention(q, k, v, spans, window, dropout)
    expected = by_definition(q, k, v, spans, window, dropout)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_window_is_at_least_one_token():
    x = torch.randn(3, 1, 4)
    with pytest.raises(ValueError, match="window is 0"):
        local_attention(x, x, x, Spans(torch.tensor([0]), torch.tensor([3]), 3), 0)


def test_import_without_transformers_says_what_to_install(monkeypatch):
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'fasttx\[hf\]'"):
        importlib.reload(fasttx.hf)
