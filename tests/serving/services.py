"""A service in a process of its own, and a client that says little."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for name in ("starlette", "uvicorn", "httptools", "prometheus_client"):
    pytest.importorskip(name)

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "tests" / "data" / "runs" / "classification-finished"


class Client:
    """One kept connection."""

    def __init__(self, port: int, timeout: float = 30) -> None:
        self.port = port
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body (JSON where it is such) and headers."""
        self._connection.request(method, path, body, headers or {})
        response = self._connection.getresponse()
        content = response.read()
        found = {name.lower(): value for name, value in response.getheaders()}
        if found.get("content-type", "").startswith("application/json"):
            return response.status, json.loads(content), found
        return response.status, content.decode(), found

    def post(self, path: str, asked: Any) -> tuple[int, Any, dict[str, str]]:
        return self.ask("POST", path, json.dumps(asked), {"content-type": "application/json"})

    def predict(self, text: Any, **fields: Any) -> tuple[int, Any]:
        status, answer, _ = self.post("/predict", {"text": text, **fields})
        return status, answer


class Process:
    """`fasttx serve` with these arguments; `port` is the one it took."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "fasttx", "serve", *arguments, "--port", "0"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if "http://" not in line:
            self.kill()
            raise AssertionError(f"no service: {line}{self.errors}")
        self.port = int(line.rstrip().rpartition(":")[2])
        self.pid = self._popen.pid
        self.client = Client(self.port)

    def send(self, number: int) -> None:
        self._popen.send_signal(number)

    def wait(self, timeout: float = 30) -> int:
        _, self.errors = self._popen.communicate(timeout=timeout)
        return self._popen.returncode

    errors = ""

    def kill(self) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
        with contextlib.suppress(ValueError):
            self.wait()


@contextlib.contextmanager
def serving(*arguments: str, env: dict[str, str] | None = None) -> Iterator[Process]:
    process = Process(*arguments, env=env)
    try:
        yield process
    finally:
        process.kill()


def until(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


TERM, INT, HUP, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL
