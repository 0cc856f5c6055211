"""How fast is `embed`, the embedding with positions and dropout?"""

from __future__ import annotations

import operation_level
import pytest

CONTESTS = [pytest.param(make, id=k) for k, make in operation_level.contests("embed").items()]


@pytest.mark.parametrize("contest", CONTESTS, indirect=True)
@pytest.mark.parametrize("name", operation_level.operation_names())
def test_embed(compete, name):
    compete(name)
