"""What a model may be built of beside the default: norms after the additions, learned positions, a
narrower embedding, other heads. Each is the same function on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fasttx import TransformerClassifier
from fasttx.models import module
from fasttx.models.mean_pool import first_rows
from fasttx.ops.dropout import site_seeds
from tests import backends
from tests.backends import over_backends
from tests.models.test_classifier import (
    TEXTS,
    assert_same,
    count,
    gradients,
    packed,
    padded,
    seed_on,
    small,
)

pytestmark = backends.POISONED

BERT: dict[str, Any] = {
    "norm_first": False, "positions": "learned", "embedding_norm": True, "norm_eps": 1e-12,
    "activation": "gelu", "pooling": "cls", "head_activation": "tanh",
}  # fmt: skip
CHOICES: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "electra": BERT | {"embedding_size": 10, "head_activation": "gelu"},
    "distilbert, mean": BERT | {"pooling": "mean", "head_activation": "relu"},
    "pre-norm, learned": {"positions": "learned"},
    "sinusoidal, narrow": {"embedding_size": 6, "embedding_norm": True},
    "post-norm, sinusoidal": {"norm_first": False, "activation": "relu"},
}
over_choices = pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)


@over_choices
def test_the_parameters_are_counted(choices):
    model = small("reference", **choices)
    assert module.parameter_count(model.config) == count(model)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert ("positions" in model.state_dict()) == (model.config.positions == "learned")


@over_choices
@over_backends(p=(0.0, 0.3))
def test_backends_agree(target, p, choices):
    """In training, dropout included: the same logits and gradients as the reference in float64."""
    inputs = packed(TEXTS, tail=3)
    exact = small("reference", dtype=torch.float64, dropout=p, **choices).train()
    model = small(target.name, target.device, dropout=p, **choices).train()
    expected = exact(**inputs, seed=seed_on("cpu"))
    inputs = {k: x.to(target.device) if isinstance(x, Tensor) else x for k, x in inputs.items()}
    logits = model(**inputs, seed=seed_on(target.device))
    assert_same(logits.cpu().double(), expected)
    into, theirs = gradients(model, logits), gradients(exact, expected)
    for name, x in into.items():
        torch.testing.assert_close(x.cpu().double(), theirs[name], rtol=1e-4, atol=3e-5, msg=name)


@over_choices
def test_gradcheck_of_every_parameter(choices):
    sizes = {"d_model": 8, "num_heads": 2, "d_ff": 8, "num_layers": 1, "dropout": 0.3}
    choices = choices | ({"embedding_size": 6} if "embedding_size" in choices else {})
    model = small("reference", dtype=torch.float64, **sizes, **choices).train()
    names, parameters = zip(*model.named_parameters(), strict=True)
    inputs = packed([[3, 4, 3], [], [5, 6]], tail=1)

    def logits(*parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(model, values, (), {**inputs, "seed": seed_on("cpu")})

    assert torch.autograd.gradcheck(logits, parameters, fast_mode=True)


@over_choices
def test_logits_do_not_depend_on_padding(choices):
    model = small("reference", **choices).eval()
    expected = model(**packed(TEXTS))
    for side in ("left", "right"):
        ids = padded(TEXTS, 12, side)
        assert_same(model(ids, ids != 0), expected)


def test_padding_is_told_by_its_id():
    """RoBERTa pads with 1, and 0 begins its texts."""
    model = small("reference", **BERT, pad_id=1).eval()
    ids = torch.tensor([[0, 5, 2, 1, 1], [0, 6, 7, 8, 2]])
    assert_same(model(ids), model(ids, ids != 1))
    assert not torch.allclose(model(ids), model(ids, ids != 0), atol=1e-3)


def test_the_start_of_learned_tables():
    torch.manual_seed(0)
    model = TransformerClassifier(2000, pad_id=1, **BERT)
    assert (model.embedding[1] == 0).all()
    assert (model.embedding[0] != 0).any()
    assert abs(model.positions.std().item() - 0.02) < 1e-3
    assert model.positions.requires_grad


def test_dropout_follows_the_embedding_s_norm(monkeypatch):
    """It is the first site: what it drops is 0, the rest a normed row times the scale."""
    model = small("reference", num_layers=0, dropout=0.5, **BERT).train()
    inputs, seed = packed(TEXTS), seed_on("cpu")
    rows = model.encode(**inputs, seed=seed).n
    whole = model.eval().encode(**inputs).n
    kept = rows != 0
    assert 0.3 < kept.float().mean() < 0.7
    assert_same(rows[kept], 2 * whole[kept])
    other = model.train().encode(**inputs, seed=site_seeds(seed, 1)[0]).n
    assert not torch.equal(other != 0, kept)


def test_first_rows():
    n = torch.arange(12.0).view(6, 2).requires_grad_()
    cu_seqlens = torch.tensor([0, 2, 2, 5, 5], dtype=torch.int32)
    rows = first_rows(n, cu_seqlens)
    assert rows.tolist() == [[0, 1], [0, 0], [4, 5], [0, 0]]
    (gradient,) = torch.autograd.grad(rows.sum(), n)
    assert gradient.sum(1).tolist() == [2, 0, 2, 0, 0, 0]
    assert first_rows(n[:0], cu_seqlens[:1].repeat(3)).tolist() == [[0, 0], [0, 0]]
    bad = torch.full((6, 2), torch.nan)
    bad[:2] = 1.0
    assert first_rows(bad, torch.tensor([0, 2, 2])).tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@over_backends(dropout="shared")
def test_under_autocast(target, dtype):
    if not target.takes(dtype):
        pytest.skip(f"{target.name} has no {dtype} here")
    model = small(target.name, target.device, **BERT).eval()
    inputs = {
        k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in packed(TEXTS).items()
    }
    expected = model(**inputs)
    with torch.autocast(target.device, dtype):
        logits = model(**inputs)
    assert (logits.float() - expected).abs().max() < 0.1


def test_moved_and_given_memory():
    """Learned positions are a weight: they keep their values, and a state dict brings them."""
    model = small("reference", **BERT).eval()
    with torch.device("meta"):
        other = TransformerClassifier.from_config(model.config)
    other = other.to_empty(device="cpu").eval()
    other.load_state_dict(model.state_dict())
    assert_same(other(**packed(TEXTS)), model(**packed(TEXTS)))
    with torch.device("meta"):
        third = TransformerClassifier.from_config(model.config)
    third.load_state_dict(model.state_dict(), assign=True)
    assert_same(third.eval()(**packed(TEXTS)), model(**packed(TEXTS)))
    assert_same(model.double()(**packed(TEXTS)).float(), other(**packed(TEXTS)))


def test_attention_weights():
    model = small("reference", **BERT).eval()
    logits, weights = model(**packed(TEXTS), return_attention=True)
    assert_same(logits, model(**packed(TEXTS)))
    assert len(weights) == 2
    assert torch.allclose(weights[1][0, :, :5].sum(-1), torch.ones(2, 5))
