"""How fast is a whole training step? Forward, loss, backward and Adam, dropout everywhere."""

from __future__ import annotations

import functools
from typing import Any

import levels
import pytest


def step(batch_size: int, setting: Any) -> Any:
    scale = setting.scale
    ids, what = setting.ids(4 * scale.of(batch_size))
    return levels.training(ids, scale.of(batch_size), scale.config, setting.device, what=what)


CONTESTS = [
    pytest.param(functools.partial(step, size), id=f"batch{size}-forward+backward")
    for size in (32, 256)
]


@pytest.mark.parametrize("contest", CONTESTS, indirect=True)
@pytest.mark.parametrize("name", levels.training_names())
def test_training_step(compete, name):
    compete(name)
