"""The first of the random problems of tests/soak_attention.py."""

from __future__ import annotations

from tests import soak_attention
from tests.backends import TARGETS

TARGETS_HERE = [t for t in TARGETS if t.name in soak_attention.BACKENDS and t.device == "cpu"]


def test_random_attention_problems():
    for number in range(200):
        problem = soak_attention.draw(0, number)
        for name, found in soak_attention.failures(problem, TARGETS_HERE).items():
            assert not found, f"problem {number} on {name}: {found}; {problem}"
