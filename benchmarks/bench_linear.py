"""How fast is `linear`, each linear layer of a block?"""

from __future__ import annotations

import operation_level
import pytest

CONTESTS = [pytest.param(make, id=k) for k, make in operation_level.contests("linear").items()]


@pytest.mark.parametrize("contest", CONTESTS, indirect=True)
@pytest.mark.parametrize("name", operation_level.operation_names())
def test_linear(compete, name):
    compete(name)
