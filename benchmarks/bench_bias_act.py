"""How fast is `bias_act`, bias, activation and dropout inside the MLP?"""

from __future__ import annotations

import operation_level
import pytest

CONTESTS = [pytest.param(make, id=k) for k, make in operation_level.contests("bias_act").items()]


@pytest.mark.parametrize("contest", CONTESTS, indirect=True)
@pytest.mark.parametrize("name", operation_level.operation_names())
def test_bias_act(compete, name):
    compete(name)
