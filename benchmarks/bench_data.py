"""How fast does text become batches? Tokenise, and lay out a batch."""

from __future__ import annotations

import data_level
import pytest

TOKENISE = pytest.param(lambda setting: data_level.tokenising(setting, 1000), id="batch1000")
BATCH = pytest.param(lambda setting: data_level.batching(setting, 32), id="batch32")


@pytest.mark.parametrize("contest", [TOKENISE], indirect=True)
@pytest.mark.parametrize("name", data_level.TOKENISERS)
def test_tokenise(compete, name):
    compete(name)


@pytest.mark.parametrize("contest", [BATCH], indirect=True)
@pytest.mark.parametrize("name", data_level.BATCHERS)
def test_batch(compete, name):
    compete(name)
