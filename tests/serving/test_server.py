"""Signals, models that are read again, workers that die, disks that are full."""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.serving.services import HUP, INT, KILL, ROOT, RUN, TERM, Client, serving, until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")

SLOW = """
import importlib, time
loading = importlib.import_module("fasttx.load")
compute = loading.TextClassifier.window_logits
def slow(self, ids, **options):
    time.sleep({seconds} if len(ids) and ids.lengths.sum() > 2 else 0)
    return compute(self, ids, **options)
loading.TextClassifier.window_logits = slow
"""


def slowly(tmp_path: Path, seconds: float) -> dict[str, str]:
    """An environment in which a batch takes so long."""
    (tmp_path / "sitecustomize.py").write_text(SLOW.format(seconds=seconds), encoding="utf-8")
    return {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}


def test_sigterm_answers_what_waits_and_a_second_one_ends_at_once(tmp_path):
    env = slowly(tmp_path, 1.0)
    with serving(str(RUN), "--batch-tokens", "8", env=env) as service:
        asked = [Client(service.port) for _ in range(3)]
        with concurrent.futures.ThreadPoolExecutor(3) as threads:
            answers = [threads.submit(c.predict, "a few words more") for c in asked]
            time.sleep(0.4)
            service.send(TERM)
            until(lambda: service.client.ask("GET", "/readyz")[0] == 503)
            status, answer = service.client.predict("one more")
            assert status == 503 and "stopping" in answer["error"]["message"]
            assert service.client.ask("GET", "/healthz")[0] == 200
            assert [a.result()[0] for a in answers] == [200] * 3
        assert service.wait() == 0

    with serving(str(RUN), env=env) as service, concurrent.futures.ThreadPoolExecutor(1) as threads:
        asked = threads.submit(Client(service.port).predict, "a few words more")
        time.sleep(0.3)
        service.send(TERM)
        time.sleep(0.1)
        service.send(TERM)
        assert service.wait(5) == 143
        with pytest.raises(OSError):
            asked.result()


def test_ctrl_c_ends_with_its_own_status():
    with serving(str(RUN)) as service:
        service.send(INT)
        assert service.wait() == 130


def test_a_model_is_read_again(tmp_path):
    """The new one, once it answers; of a damaged one nothing is seen but a line in the log."""
    run, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(RUN, run)
    with serving(str(run), "--log-file", str(log)) as service:
        before = service.client.predict("a film")[1]["predictions"]
        log.rename(tmp_path / "old")
        weights = (run / "best_model.pt").read_bytes()
        (run / "best_model.pt").write_bytes(weights[: len(weights) // 2])

        def reloads(outcome: str) -> bool:
            _, page, _ = service.client.ask("GET", "/metrics")
            return f'fasttx_reloads_total{{model="run",outcome="{outcome}"}} 1.0' in page

        service.send(HUP)
        until(lambda: reloads("failed"))
        assert service.client.predict("a film")[1]["predictions"] == before
        (run / "best_model.pt").write_bytes(weights)
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        config["label_names"] = [f"new {name}" for name in config["label_names"]]
        (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
        subprocess.run(
            [sys.executable, "-m", "fasttx", "verify", str(run), "--accept"],
            cwd=ROOT, check=True, capture_output=True,
        )  # fmt: skip
        service.send(HUP)
        until(lambda: reloads("done"))
        found = service.client.predict("a film")[1]["predictions"][0]["label"]
        assert found == "new " + before[0]["label"]
        assert log.exists()  # begun anew after it was moved away
        service.send(TERM)
        assert service.wait() == 0
        assert "stays as it was" in service.errors and "best_model.pt" in service.errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_loses_lines_and_no_requests():
    with serving(str(RUN), "--log-file", "/dev/full") as service:
        assert service.client.predict("a film")[0] == 200
        _, page, _ = service.client.ask("GET", "/metrics")
        assert "fasttx_lost_log_lines_total 1.0" in page


def test_bursts_are_refused_and_over(tmp_path):
    """Fifty at once where a few may wait: some are answered, the others told to come again."""
    env = slowly(tmp_path, 0.1)
    options = ("--queue-texts", "5", "--batch-tokens", "4")
    with serving(str(RUN), *options, env=env) as service:

        def ask(i: int) -> tuple[int, dict[str, str]]:
            status, _, headers = Client(service.port).post("/predict", {"text": "a few words"})
            return status, headers

        with concurrent.futures.ThreadPoolExecutor(50) as threads:
            answers = list(threads.map(ask, range(50)))
        statuses = [status for status, _ in answers]
        assert set(statuses) == {200, 429}
        assert all(int(headers["retry-after"]) >= 1 for s, headers in answers if s == 429)
        assert service.client.predict("a few words")[0] == 200


def test_a_worker_that_is_killed_is_replaced():
    with serving(str(RUN), "--workers", "2", "--log-texts") as service:
        until(lambda: len(children(service.pid)) == 2)
        assert service.client.predict("a film")[0] == 200
        first = children(service.pid)[0]
        os.kill(first, KILL)
        until(lambda: first not in children(service.pid) and len(children(service.pid)) == 2)
        for _ in range(5):
            assert Client(service.port).predict("a film")[0] == 200
        _, page, _ = Client(service.port).ask("GET", "/metrics")
        total = [x for x in page.splitlines() if x.startswith("fasttx_texts_total")]
        assert float(total[0].split()[-1]) >= 5  # of both workers
        service.send(TERM)
        assert service.wait() == 0
        assert "a worker died" in service.errors
        assert '"text": ["a film"]' in service.errors


def children(pid: int) -> list[int]:
    """The worker processes of a service (and not the one that watches over shared memory)."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            command = Path(f"/proc/{child}/cmdline").read_text()
        except OSError:
            continue
        if "spawn_main" in command:
            found.append(int(child))
    return found


def test_starts_that_cannot_be(tmp_path, capsys):
    from fasttx.commands import cli

    def refused(*arguments: str) -> str:
        assert cli.main(["serve", *arguments]) == 2
        return capsys.readouterr().err

    assert "is not a folder" in refused(str(tmp_path / "nix"), "--port", "0")
    assert "'a' of a=y is taken" in refused("a=x", "a=y")
    assert "'' of =x is empty" in refused("=x")
    assert "port is 99999; expected" in refused(str(RUN), "--port", "99999")
    assert "cannot listen on 192.0.2.1" in refused(str(RUN), "--host", "192.0.2.1")
    assert "texts is 0; expected at least 1" in refused(str(RUN), "--texts", "0")
    assert "No such file" in refused(str(RUN), "--port", "0", "--log-file", str(tmp_path / "a/b"))


@pytest.mark.parametrize(
    ("module", "package"), [("server", "uvicorn"), ("app", "starlette.applications")]
)
def test_without_its_packages_it_says_what_to_install(monkeypatch, capsys, module, package):
    import fasttx.serving
    from fasttx.commands import cli

    monkeypatch.delattr(fasttx.serving, module, raising=False)
    monkeypatch.delitem(sys.modules, f"fasttx.serving.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["serve", str(RUN)]) == 2
    assert "pip install 'fasttx[serve]'" in capsys.readouterr().err
