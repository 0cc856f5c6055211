"""What every model has in common: state dicts of wrapped models, and an error for absurd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fasttx import ModelConfig, TransformerClassifier
from fasttx.errors import ConfigError
from fasttx.models import module
from fasttx.models.lstm import LSTMClassifier
from fasttx.models.masked_lm import MaskedLanguageModel
from fasttx.weights import own_names

SIZES = {"vocab_size": 20, "d_model": 16, "num_heads": 2, "num_layers": 2, "d_ff": 8, "max_len": 8}
CONFIG = ModelConfig(**SIZES, attn_backend="reference")
BUILDERS = {
    "classifier": TransformerClassifier.from_config,
    "masked": MaskedLanguageModel,
    "lstm": LSTMClassifier,
}
over_models = pytest.mark.parametrize("name", BUILDERS)


def build(name: str, config: ModelConfig = CONFIG) -> nn.Module:
    return BUILDERS[name](config)


# ------------------------------------------------------------------------------------- state dicts


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."],
)
@over_models
def test_prefixes_of_wrappers(name, prefix):
    source, model = build(name), build(name)
    state = {prefix + k: x for k, x in source.state_dict().items()}
    assert str(model.load_state_dict(state)) == "<All keys matched successfully>"
    for a, b in zip(source.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@over_models
def test_what_torch_makes_of_names(name):
    """By DDP's parent of one module, and by torch.compile, which is not run."""
    source, model = build(name), build(name)
    for wrapped in (nn.DataParallel(source), torch.compile(source)):
        assert set(wrapped.state_dict()).isdisjoint(model.state_dict())
        model.load_state_dict(wrapped.state_dict())
        assert torch.equal(model.embedding, source.embedding)


def test_parts_that_were_wrapped():
    """Into a model whose own parts are wrapped, and out of it."""
    plain, other = build("classifier"), build("classifier")
    other.blocks[0] = torch.compile(other.blocks[0])
    assert "blocks.0._orig_mod.qkv.weight" in other.state_dict()
    other.load_state_dict(plain.state_dict())
    other.load_state_dict(other.state_dict())
    assert torch.equal(other.blocks[0].qkv.weight, plain.blocks[0].qkv.weight)
    plain.load_state_dict({f"module.{k}": x for k, x in other.state_dict().items()})


def test_other_names_are_still_refused():
    model = build("classifier")
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"model.embedding"'):
        model.load_state_dict({f"model.{k}": x for k, x in state.items()})
    twice = {**state, "module.embedding": state["embedding"] + 1}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"module.embedding"'):
        model.load_state_dict(twice)
    both = {f"{p}.{k}": x for p in ("module", "_orig_mod") for k, x in state.items()}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"_orig_mod.embedding"'):
        model.load_state_dict(both)
    missing, unexpected = model.load_state_dict({"module.x": torch.ones(1)}, strict=False)
    assert set(missing) == set(state) and unexpected == ["module.x"]
    with pytest.raises(TypeError, match="dict-like"):
        model.load_state_dict([1])


def test_own_names_leaves_values_and_order_alone():
    state: dict[Any, Any] = {"module.b": 1, "a": 2, 3: 4, "module.c": 5}
    renamed = own_names(state, ["a", "b"])
    assert list(renamed.items()) == [("b", 1), ("a", 2), (3, 4), ("module.c", 5)]


# -------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "config",
    [CONFIG, ModelConfig(), ModelConfig(7, 3, 20, 5, 3, 11, 4)],
    ids=["tiny", "default", "odd"],
)
def test_the_parameters_are_counted_before_they_are_made(config):
    with torch.device("meta"):
        model = TransformerClassifier.from_config(config)
    assert module.parameter_count(config) == sum(p.numel() for p in model.parameters())


@over_models
def test_a_model_that_exceeds_the_memory(name, monkeypatch):
    positions = CONFIG.max_len * CONFIG.d_model
    memory = 4.0 * (module.parameter_count(CONFIG) + positions)
    monkeypatch.setattr(module, "_memory", lambda: memory)
    build(name)
    larger = ModelConfig(**{**SIZES, "num_layers": 3}, attn_backend="reference")
    message = r"a model with vocab_size 20, .*num_layers 3, .* takes 0 GB, more than this machine"
    with pytest.raises(ConfigError, match=message):
        build(name, larger)
    with torch.device("meta"):  # it takes none there
        build(name, larger)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate "
                     "memory: you tried to allocate 40000000000000 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 37.25 GiB."),
        RuntimeError("Invalid buffer size: 37.25 GiB"),
    ],
    ids=["Python", "CPU", "CUDA", "MPS"],
)  # fmt: skip
def test_what_torch_says_when_memory_is_short(error, monkeypatch):
    def fail(*sizes: int) -> None:
        raise error

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(ConfigError, match="more than this machine has memory for"):
        build("classifier")


def test_other_errors_are_what_they_are(monkeypatch):
    def fail(*sizes: int) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(RuntimeError, match="something else"):
        build("classifier")


@pytest.mark.parametrize(
    "absurd",
    [
        {"d_model": 10**9},
        {"vocab_size": 2**40},
        {"num_layers": 10**6},
        {"d_ff": 2**50},
        {"max_len": 2**45},
        {"num_classes": 2**60},
        {"num_heads": 2**62, "d_model": 2**62},
        {"d_model": 2**80},
        {"d_model": 60_000, "d_ff": 200_000, "num_layers": 900},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["classifier", "lstm"])
def test_absurd_sizes(name, absurd):
    """One line that names the setting, and no memory taken on the way there."""
    settings = {"attn_backend": "reference", **absurd}
    with pytest.raises(ConfigError) as caught:
        build(name, ModelConfig(**settings))
    assert any(setting in str(caught.value) for setting in absurd)
    assert "\n" not in str(caught.value)
