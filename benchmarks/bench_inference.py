"""How fast does a trained model answer? Many texts at a time, and one."""

from __future__ import annotations

import functools
from typing import Any

import model_level
import pytest

TEXTS = 128  # a step, in batches of 32


def bulk(batch_size: int, setting: Any) -> Any:
    scale = setting.scale
    size, texts = scale.of(batch_size), scale.of(TEXTS)
    ids, what = setting.ids(4 * texts)
    return model_level.bulk(ids, size, scale.config, setting.device, texts=texts, what=what)


def latency(setting: Any) -> Any:
    ids, what = setting.ids(setting.scale.of(64))
    return model_level.latency(ids, setting.scale.config, setting.device, what=what)


CONTESTS = [
    pytest.param(functools.partial(bulk, 32), id="batch32-forward-bulk"),
    pytest.param(latency, id="batch1-forward-latency"),
]


@pytest.mark.parametrize("contest", CONTESTS, indirect=True)
@pytest.mark.parametrize("name", model_level.inference_names())
def test_inference(compete, name):
    compete(name)
