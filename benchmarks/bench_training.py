"""How fast is a whole training step? Forward, loss, backward and Adam, dropout everywhere."""

from __future__ import annotations

import functools

import model_level
import pytest
from contest import Contest, require
from side_by_side import available_mb
from workload import Setting

PADDED_MB = 65  # a text's share of the memory of a padded peer's step, at 256 tokens


def step(batch_size: int, setting: Setting) -> Contest:
    needed, there = PADDED_MB * setting.of(batch_size), available_mb(setting.device)
    if setting.divisor == 1 and needed > there:
        require([f"{there:,.0f} MB are free; padded peers need {needed:,.0f} MB for this"])
    return model_level.training(setting, batch_size)


CONTESTS = [
    pytest.param(functools.partial(step, size), id=f"batch{size}-forward+backward")
    for size in (32, 256)
]


@pytest.mark.parametrize("contest", CONTESTS, indirect=True)
@pytest.mark.parametrize("name", model_level.training_names())
def test_training_step(compete, name):
    compete(name)
