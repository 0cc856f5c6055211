"""A slice of what `python -m tests.faults` tries; docs/reliability.md has the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the trainings are forked")
@pytest.mark.parametrize(("fault", "count"), [("kills", 20), ("flips", 36), ("full-disk", 10)])
def test_a_run_survives(fault: str, count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", fault, "--count", str(count)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{fault}: {count} tried, 0 not survived" in done.stdout
