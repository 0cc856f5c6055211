"""`fasttx.hf.accelerate` against the model as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fasttx.errors import ConfigError, UnsupportedError
from tests.hf.models import (
    CONFIGS,
    backends_with_shared_masks,
    close,
    padded,
    pair,
    transformers,
    values,
)

import fasttx.hf  # isort: skip

pytestmark = pytest.mark.xdist_group("transformers")
over_families = pytest.mark.parametrize("family", CONFIGS)

COUNTS = {
    "bert": "2 x MLP with its LayerNorm, 2 x dropout, residual and LayerNorm, 7 x linear layer",
    "roberta": "2 x MLP with its LayerNorm, 2 x dropout, residual and LayerNorm, 7 x linear layer",
    "electra": "2 x MLP with its LayerNorm, 2 x dropout, residual and LayerNorm, 7 x linear layer",
    "distilbert": "2 x MLP with its LayerNorm, 8 x linear layer",
    "modernbert": "8 x linear layer",
}


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@over_families
def test_equals_the_model_as_it_was(family, dtype, allowed):
    before, model = pair(family, dtype, how="sdpa")
    replaced = fasttx.hf.accelerate(model)
    assert str(replaced) == COUNTS[family]
    ids, mask = padded("right")
    weights = torch.randn(*ids.shape, 32, dtype=dtype) * mask[..., None]
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected, gradients = values(before, weights, **inputs)
    found, ours = values(model, weights, **inputs)
    close(found[mask.bool()], expected[mask.bool()], allowed)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        close(ours[name], gradient, 4 * allowed)
    assert model.state_dict().keys() == before.state_dict().keys()

    replaced.restore()
    replaced.restore()
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model(**inputs).last_hidden_state, expected)


@over_families
def test_dropout_is_that_of_all_backends(family):
    _, model = pair(family)
    ids, mask = padded("right")
    model.train()
    found = {}
    for name in backends_with_shared_masks():
        model.set_attn_implementation(f"fasttx:{name}")
        replaced = fasttx.hf.accelerate(model, name)
        torch.manual_seed(7)
        found[name] = model(input_ids=ids, attention_mask=mask).last_hidden_state
        replaced.restore()
    expected = found.pop("reference")
    assert found
    for hidden in found.values():
        close(hidden[mask.bool()], expected[mask.bool()], 1e-5)


def test_bfloat16_under_autocast():
    before, model = pair("bert")
    fasttx.hf.accelerate(model)
    ids, mask = padded("right")
    inputs = {"input_ids": ids, "attention_mask": mask}
    exact = before(**inputs).last_hidden_state[mask.bool()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = before(**inputs).last_hidden_state[mask.bool()]
        ours = model(**inputs).last_hidden_state[mask.bool()]
    error, allowed = ((x.float() - exact).square().mean().sqrt() for x in (ours, theirs))
    assert error <= 2 * allowed


def test_copies_have_layers_of_their_own():
    _, model = pair("bert")
    fasttx.hf.accelerate(model)
    ids, mask = padded("right")
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(input_ids=ids, attention_mask=mask)[0], expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not torch.equal(other(input_ids=ids, attention_mask=mask)[0], expected)
        assert torch.equal(model(input_ids=ids, attention_mask=mask)[0], expected)


def test_layers_that_somebody_changed_stay():
    _, model = pair("bert")
    block = model.encoder.layer[0]
    seen = []
    block.attention.self.query.register_forward_hook(lambda *_: seen.append("query"))
    block.intermediate.dense.register_forward_hook(lambda *_: seen.append("up"))
    replaced = fasttx.hf.accelerate(model)
    assert replaced.counts["linear layer"] == 6
    ids, _ = padded("right")
    model(input_ids=ids)
    assert seen == ["query", "up"]


def test_activations_that_no_backend_has_stay():
    _, model = pair("bert", hidden_act="gelu_new")
    assert str(fasttx.hf.accelerate(model)).startswith("2 x dropout, residual and LayerNorm, 11 x")


def test_bad_requests():
    _, model = pair("bert")
    with pytest.raises(ConfigError, match="unknown attention backend 'cuda'"):
        fasttx.hf.accelerate(model, "cuda")
    fasttx.hf.accelerate(model)
    with pytest.raises(UnsupportedError, match="all are exchanged already"):
        fasttx.hf.accelerate(model)
    with pytest.raises(UnsupportedError, match="has no layer"):
        fasttx.hf.accelerate(torch.nn.LayerNorm(4))


def test_saved_weights_are_the_same(tmp_path):
    before, model = pair("bert")
    fasttx.hf.accelerate(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    for name, weight in before.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
