"""A training that torchrun has started again."""

from __future__ import annotations

import pytest

from fasttx.errors import ConfigError
from fasttx.training import run as runs
from fasttx.training.distributed import Processes


def test_which_run_a_restart_goes_on_with(tmp_path, monkeypatch):
    alone, out = Processes(), tmp_path / "run"
    assert runs.to_resume(None, out, alone) is None
    assert runs.to_resume(tmp_path, None, alone) == tmp_path
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert runs.to_resume(None, out, alone) is None  # killed before there was a run
    with pytest.raises(ConfigError, match="expected --out DIR"):
        runs.to_resume(None, None, alone)
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert runs.to_resume(None, out, alone) == out
    assert runs.to_resume(tmp_path, out, alone) == tmp_path
