"""The load test of services: who answers otherwise is not timed, and what counts as the best."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import serving


def load(**changes):
    values = {
        "service": "fasttx", "texts": "short", "connections": 1, "rate": None,
        "requests_per_second": 10.0, "p50_ms": 1.0, "p99_ms": 20.0, "failed": 0,
    }  # fmt: skip
    return serving.Load(**values | changes)


def test_the_best_keeps_the_limit_and_loses_nothing():
    slow = load(requests_per_second=99.0, p99_ms=serving.LIMIT_MS + 1)
    failing = load(requests_per_second=98.0, failed=1)
    right = load(requests_per_second=20.0, connections=4)
    assert serving.best([load(), slow, right, failing]) is right
    assert serving.best([slow, failing]) is None


def test_the_table_names_who_keeps_no_limit():
    loads = [
        load(connections=4, requests_per_second=20.0),
        load(service="other", p99_ms=99.0),
        load(rate=5.0, requests_per_second=4.9),
        load(service="other", rate=5.0, failed=3),
        load(texts="reviews", requests_per_second=77.0),
    ]
    lines = serving.table(loads, ["fasttx", "other"], "short").splitlines()
    assert "20.0/s" in lines[1] and "4 connections" in lines[1]
    assert lines[2].split() == ["other", "none"]
    assert lines[3] == "short, 5 requests/s"
    assert "4.9/s" in lines[4] and "3 failed" in lines[5]
    assert "77.0" not in "\n".join(lines)


def test_a_soak_ends_after_its_requests_and_lets_none_fail(monkeypatch):
    asked = []

    def measured(service, port, what, bodies, connections, seconds, rate):
        asked.append(seconds)
        return load(requests_per_second=100.0, failed=failed)

    def soak():
        return list(serving.soak(None, 0, 0, None, 5000, 8))

    monkeypatch.setattr(serving, "load", measured)
    monkeypatch.setattr(serving, "resident_mb", lambda pid: 7.0)
    failed = 0
    assert soak() == [(0, 7.0), *((300 + 500 * i, 7.0) for i in range(11))]
    assert asked == [3] + 10 * [5] and all(type(seconds) is int for seconds in asked)
    failed = 2
    with pytest.raises(AssertionError, match="2 requests failed"):
        soak()


@pytest.fixture
def port():
    """A service that is sure of the first label."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self):
            content = json.dumps({"probabilities": {"a": 0.9, "b": 0.1}}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_another_answer_is_not_timed(port):
    def service(tolerance):
        return serving.Service(
            "other", lambda port: [], "/predict", serving._plain, serving._theirs, tolerance
        )

    serving.verify([{"a": 0.905, "b": 0.095}], service(0.01), port, ["a text"])
    with pytest.raises(AssertionError, match=r"other: 0\.1000 off at 'a text'"):
        serving.verify([{"a": 0.8, "b": 0.2}], service(0.01), port, ["a text"])
    with pytest.raises(AssertionError, match=r"labels \['a', 'b'\]"):
        serving.verify([{"a": 0.9, "c": 0.1}], service(0.01), port, ["a text"])


def test_a_service_that_does_not_start_says_why():
    def service(*code):
        return serving.Service(
            "other", lambda port: [sys.executable, "-c", *code], "/predict", str, dict, 0.0
        )

    for code, why in (("raise SystemExit('no such model')", "no such model"), ("", "nothing")):
        running = serving.started(service(code), 1)
        with pytest.raises(SystemExit, match=f"other does not start: .*{why}"):
            running.__enter__()


def test_what_is_missing_is_said(tmp_path):
    script = Path(serving.__file__)
    done = subprocess.run(
        [sys.executable, script, "run"], capture_output=True, text=True,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2 and "wrk is not installed: apt install wrk" in done.stderr
