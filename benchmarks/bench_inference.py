"""How fast does a trained model answer? Many texts at a time, from ids and from text."""

from __future__ import annotations

import model_level
import pytest
import text_level

IDS = pytest.param(lambda setting: model_level.bulk(setting, 32), id="batch32-forward-bulk")
TEXTS = pytest.param(lambda setting: text_level.bulk(setting, 32), id="batch32-text-bulk")


@pytest.mark.parametrize("contest", [IDS], indirect=True)
@pytest.mark.parametrize("name", model_level.inference_names())
def test_inference(compete, name):
    compete(name)


@pytest.mark.parametrize("contest", [TEXTS], indirect=True)
@pytest.mark.parametrize("name", text_level.names())
def test_text(compete, name):
    compete(name)
