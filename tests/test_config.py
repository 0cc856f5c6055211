"""Settings that cannot work are refused by name, wherever they come from."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fasttx.config import RECIPES, ModelConfig, PretrainConfig, TrainConfig
from fasttx.errors import ConfigError
from fasttx.training.optimizer import make_optimizer

# More in a soak: FASTTX_EXAMPLES=10000.
MANY = settings(
    max_examples=int(os.environ.get("FASTTX_EXAMPLES", "50")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta2": 1.0}, "beta2 is 1.0; expected at least 0 and less than 1"),
        ({"beta2": -0.1}, "beta2 is -0.1; expected at least 0 and less than 1"),
        ({"lr": -1.0}, "lr is -1.0; expected at least 0"),
        ({"lr": 1e300}, "lr is 1e\\+300; expected at most 1,000"),
        ({"lr": 10**400}, "lr is 1000000.*\\.\\.\\.; expected at most 1,000"),
        ({"epochs": 10**5000}, "epochs is a number of thousands of digits; expected at most"),
        ({"weight_decay": -1.0, "optimizer": "adamw"}, "weight_decay is -1.0"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"batch_size": 2**63}, "batch_size is 9223372036854775808; expected at most 1,000,000"),
        ({"epochs": 10**12}, "epochs is 1000000000000; expected at most 1,000,000"),
        ({"grad_accumulation": 10**12}, "grad_accumulation is 1000000000000; expected at most"),
        ({"log_every": 0}, "log_every is 0; expected at least 1"),
        ({"log_every": 10**18}, "log_every is .*; expected at most"),
        ({"warmup_steps": 2**70}, "warmup_steps is .*; expected at most"),
        ({"train_samples": 10**12}, "train_samples is .*; expected at most"),
        ({"seed": 2**63}, "seed is .*; expected at most 9,223,372,036,854,775,807"),
        ({"checkpoint_seconds": math.inf}, "checkpoint_seconds is inf; expected a finite number"),
        ({"dataset": ""}, "dataset is ''; expected a text"),
        ({"init_from": "a\0b"}, "init_from is 'a\\\\x00b'; expected a text"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; expected between 0 and 1"),
    ],
)
def test_a_setting_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**values)


@pytest.mark.parametrize("share", [0.0, 1.0, 0.95])
def test_a_share_of_hidden_words_out_of_range(share: float) -> None:
    with pytest.raises(ConfigError, match="mask_share is .*; expected between 0.01 and 0.9"):
        PretrainConfig(mask_share=share)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 10**9}, "d_model is 1000000000; expected at most 100,000"),
        ({"max_len": 10**12}, "max_len is 1000000000000; expected at most 1,000,000"),
        ({"vocab_size": 2**62}, "vocab_size is .*; expected at most 100,000,000"),
        ({"num_layers": 10**6}, "num_layers is 1000000; expected at most 1,000"),
        ({"vocab_size": 10**8, "d_model": 1024}, "make 102,4.* weights; expected at most 10,000"),
        ({"d_model": 65536, "num_heads": 64, "d_ff": 262144, "num_layers": 100}, "weights"),
    ],
)
def test_an_absurd_size_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**values)


# The names and types of the settings, and whatever else JSON can hold.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, 1, -1, 2**63, 10**12, 1e308, "adam", "sgd", "fp32", "head", "cuda"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)  # fmt: skip


def changed(cls: type, kept: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Dictionaries of settings of which some have been changed, removed or added."""
    names = st.sampled_from(sorted(kept)) | st.text(max_size=8)
    changes = st.dictionaries(names, JSON, max_size=3)
    gone = st.sets(st.sampled_from(sorted(kept)), max_size=2)
    return st.builds(
        lambda new, out: {k: v for k, v in {**kept, **new}.items() if k not in out}, changes, gone
    )


@MANY
@given(data=st.data())
def test_any_dictionary_is_a_config_or_a_config_error(data: st.DataObject) -> None:
    """A config that is accepted survives the way through JSON, and torch takes its optimiser."""
    recipe = data.draw(st.sampled_from(sorted(RECIPES)))
    values = RECIPES[recipe].to_dict()
    values["model"] = data.draw(changed(ModelConfig, values["model"]) | JSON)
    values = data.draw(changed(TrainConfig, values) | JSON)
    try:
        config = TrainConfig.from_dict(values)
    except ConfigError as error:
        said = str(error)
    else:
        said, again = "", TrainConfig.from_dict(config.to_dict())
        assert again == config
        make_optimizer(torch.nn.Linear(2, 2), config)
    assert len(said) < 1000


@MANY
@given(
    st.sampled_from(("lr", "beta2", "weight_decay", "grad_clip", "label_smoothing")),
    st.floats() | st.integers(),
    st.sampled_from(("adam", "adamw", "sgd")),
)
def test_what_torch_would_refuse_is_refused_before(name: str, value: Any, kind: str) -> None:
    try:
        config = TrainConfig(optimizer=kind, **{name: value})
    except ConfigError:
        return
    layer = torch.nn.Linear(2, 2)
    make_optimizer(layer, config)
    target = torch.tensor([1])
    torch.nn.functional.cross_entropy(
        layer(torch.ones(1, 2)), target, label_smoothing=config.label_smoothing
    ).backward()
    if config.grad_clip:
        torch.nn.utils.clip_grad_norm_(layer.parameters(), config.grad_clip)
