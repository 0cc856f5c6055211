"""One of two processes is killed, torchrun's elastic agent starts both again, and the run ends
where an undisturbed one ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fasttx.errors import ConfigError
from fasttx.training import run as runs
from fasttx.training.distributed import Processes

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--dataset demo --train-samples 200 --test-samples 20 --epochs 12 --batch-size 10 --d-model 16 "
    "--num-heads 2 --num-layers 1 --d-ff 16 --max-len 16 --device cpu --dropout 0.1"
).split()
# Slowed down, so that a kill meets it in the midst.
SLOW = """
import sys, time
from fasttx.training import trainer
step = trainer.Trainer._end_epoch
def slow(self):
    time.sleep(0.25)
    return step(self)
trainer.Trainer._end_epoch = slow
import train
sys.exit(train.main())
"""


def workers(agent: int) -> list[int]:
    found = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [int(pid) for pid in found if b"slow.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_process_costs_nothing_but_time(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher += ["--max-restarts", "3", "--monitor-interval", "0.1", str(tmp_path / "slow.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name, kill in (("undisturbed", False), ("killed", True)):
        out = tmp_path / name
        with open(tmp_path / f"{name}.txt", "wb") as said:
            agent = subprocess.Popen(
                [sys.executable, *launcher, *SMALL, "--out", str(out)], cwd=ROOT, env=env,
                stdout=said, stderr=said,
            )  # fmt: skip
            try:
                if kill:
                    end, metrics = time.monotonic() + 60, out / "metrics.jsonl"
                    while not metrics.exists() or metrics.read_bytes().count(b'"epoch"') < 4:
                        assert time.monotonic() < end and agent.poll() is None
                        time.sleep(0.05)
                    os.kill(workers(agent.pid)[1], signal.SIGKILL)
                assert agent.wait(120) == 0, (tmp_path / f"{name}.txt").read_text()[-3000:]
            finally:
                agent.kill()
    undisturbed, killed = (tmp_path / n for n in ("undisturbed", "killed"))
    assert "going on from epoch" in (killed / "train.log").read_text()
    assert "going on" not in (undisturbed / "train.log").read_text()
    for file in ("best_model.pt", "test_predictions.npz"):
        assert (killed / file).read_bytes() == (undisturbed / file).read_bytes()


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
