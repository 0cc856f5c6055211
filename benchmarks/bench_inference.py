"""How fast does a trained model answer? Many texts at a time, and one."""

from __future__ import annotations

import model_level
import pytest

CONTESTS = [
    pytest.param(lambda setting: model_level.bulk(setting, 32), id="batch32-forward-bulk"),
    pytest.param(model_level.latency, id="batch1-forward-latency"),
]


@pytest.mark.parametrize("contest", CONTESTS, indirect=True)
@pytest.mark.parametrize("name", model_level.inference_names())
def test_inference(compete, name):
    compete(name)
