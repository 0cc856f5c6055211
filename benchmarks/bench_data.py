"""How fast does text become batches? Tokenise, and lay out a batch."""

from __future__ import annotations

import functools
from typing import Any

import data_level
import pytest


def tokenise(setting: Any) -> Any:
    return data_level.tokenising(setting.data, setting.scale.of(1000), setting.scale.config)


def batch(batch_size: int, setting: Any) -> Any:
    ids, what = setting.ids(8 * setting.scale.of(batch_size))
    return data_level.batching(ids, setting.scale.of(batch_size), what)


@pytest.mark.parametrize("contest", [pytest.param(tokenise, id="batch1000")], indirect=True)
@pytest.mark.parametrize("name", data_level.TOKENISERS)
def test_tokenise(compete, name):
    compete(name)


@pytest.mark.parametrize(
    "contest", [pytest.param(functools.partial(batch, 32), id="batch32")], indirect=True
)
@pytest.mark.parametrize("name", data_level.BATCHERS)
def test_batch(compete, name):
    compete(name)
