"""A training that torchrun has started again."""

from __future__ import annotations

import pytest

from fasttx.errors import ConfigError
from fasttx.training import distributed
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


def test_one_agent_of_several_counts_the_restart(tmp_path, monkeypatch):
    """The other one's processes were healthy, and are started again all the same."""

    class OneOfTwo(Processes):
        def any(self, flag):
            return flag or self.other

        def from_main(self, value):
            return value

    (tmp_path / "config.json").write_text("{}")
    for other, expected in ((True, tmp_path), (False, None)):
        processes = OneOfTwo(1, 2, 0)
        object.__setattr__(processes, "other", other)
        assert runs.to_resume(None, tmp_path, processes) == expected


@pytest.mark.parametrize(("nodes", "said"), [("2", True), ("1", False)])
def test_who_does_not_meet_hears_of_the_shared_store(monkeypatch, nodes, said):
    def refuse():
        raise RuntimeError("connection refused")

    monkeypatch.setattr(distributed.dist, "init_process_group", refuse)
    for name, value in {
        "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": nodes,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="do not meet at localhost:1") as refused:
        distributed.start()
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in str(refused.value)) == said
