"""How fast is `add_norm`, the residual sum with dropout and the next LayerNorm?"""

from __future__ import annotations

import operation_level
import pytest

CONTESTS = [pytest.param(make, id=k) for k, make in operation_level.contests("add_norm").items()]


@pytest.mark.parametrize("contest", CONTESTS, indirect=True)
@pytest.mark.parametrize("name", operation_level.operation_names())
def test_add_norm(compete, name):
    compete(name)
