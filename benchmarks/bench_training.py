"""How fast is a whole training step? Forward, loss, backward and Adam, dropout everywhere."""

from __future__ import annotations

import functools
from typing import Any

import model_level
import pytest
from contest import Unavailable
from side_by_side import available_mb
from workload import FULL

PADDED_MB = 65  # what a text's share of a padded peer's step takes, at 256 tokens


def step(batch_size: int, setting: Any) -> Any:
    scale = setting.scale
    needed, there = PADDED_MB * scale.of(batch_size), available_mb(setting.device)
    if scale is FULL and needed > there:
        raise Unavailable(f"{there:,.0f} MB are free; padded peers need {needed:,.0f} MB for this")
    ids, what = setting.ids(4 * scale.of(batch_size))
    return model_level.training(ids, scale.of(batch_size), scale.config, setting.device, what=what)


CONTESTS = [
    pytest.param(functools.partial(step, size), id=f"batch{size}-forward+backward")
    for size in (32, 256)
]


@pytest.mark.parametrize("contest", CONTESTS, indirect=True)
@pytest.mark.parametrize("name", model_level.training_names())
def test_training_step(compete, name):
    compete(name)
