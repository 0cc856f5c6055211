"""`fasttx serve` and its peers under load, side by side: python benchmarks/serving.py RUN

The load comes from wrk (4.1) on the same machine: one thread, which takes a few percent of a core
from the service. All services are started at once and are loaded in turn. A service first has to
answer as fasttx does in fp32.

--soak N: instead, N requests of short texts to fasttx serve, and its memory after each tenth.
--onnx FOLDER, --onnx-int8 FOLDER: what `fasttx export RUN --format onnx` wrote: served by
serving_peer.py. --infinity FOLDER: the same weights as a folder of Hugging Face's, served by
infinity-emb; --infinity-command is its program.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from figures import load_average
from workload import reviews

HERE = Path(__file__).resolve().parent
LIMIT_MS = 50.0  # of the 99th percentile
SHORT = 16  # words, about 20 tokens


@dataclass(frozen=True)
class Service:
    """How a service is started on a port, asked, and what of its answer is compared."""

    name: str
    command: Callable[[int], list[str]]
    path: str
    body: Callable[[str], Any]
    probabilities: Callable[[Any], dict[str, float]]
    tolerance: float  # of a probability


@dataclass(frozen=True)
class Load:
    """One measurement."""

    service: str
    texts: str
    connections: int
    rate: float | None
    requests_per_second: float
    p50_ms: float
    p99_ms: float
    failed: int


# ---------------------------------------------------------------------------------------- services


def _plain(text: str) -> Any:
    return {"text": text}


def _ours(answer: Any) -> dict[str, float]:
    return answer["predictions"][0]["probabilities"]


def _theirs(answer: Any) -> dict[str, float]:
    return answer["probabilities"]


def services(arguments: argparse.Namespace) -> list[Service]:
    threads = str(arguments.threads)

    def ours(precision: str) -> Callable[[int], list[str]]:
        return lambda port: [
            sys.executable, "-m", "fasttx", "serve", arguments.run, "--port", str(port),
            "--threads", threads, "--precision", precision, "--log-file", os.devnull,
        ]  # fmt: skip

    def onnx(folder: str) -> Callable[[int], list[str]]:
        return lambda port: [
            sys.executable, str(HERE / "serving_peer.py"), folder, "--port", str(port),
            "--threads", threads,
        ]  # fmt: skip

    found = [Service("fasttx", ours("fp32"), "/predict", _plain, _ours, 0.0)]
    found.append(Service("fasttx-int8", ours("int8"), "/predict", _plain, _ours, arguments.int8))
    for name, folder, tolerance in (
        ("onnxruntime", arguments.onnx, 1e-3),
        ("onnxruntime-int8", arguments.onnx_int8, arguments.int8),
    ):
        if folder:
            found.append(Service(name, onnx(folder), "/predict", _plain, _theirs, tolerance))
    if arguments.infinity:
        folder = arguments.infinity
        found.append(
            Service(
                "infinity-emb",
                lambda port: [
                    arguments.infinity_command, "v2", "--model-id", folder, "--port", str(port),
                    "--engine", arguments.infinity_engine, "--device", "cpu",
                    "--no-bettertransformer", "--served-model-name", "model",
                ],
                "/classify",
                lambda text: {"model": "model", "input": [text]},
                lambda x: {one["label"]: one["score"] for one in x["data"][0]},
                1e-3,
            )
        )  # fmt: skip
    return found


def _ask(port: int, service: Service, text: str) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    content = json.dumps(service.body(text))
    connection.request("POST", service.path, content, {"content-type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    assert response.status == 200, f"{service.name}: {response.status} {answer[:200]!r}"
    return service.probabilities(json.loads(answer))


@contextlib.contextmanager
def started(service: Service, threads: int) -> Iterator[tuple[int, int]]:
    """Its port and process, once it answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    root = str(HERE.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": root}
    if service.name == "infinity-emb":
        del environment["PYTHONPATH"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            service.command(port), stdout=subprocess.DEVNULL, stderr=said, env=environment
        )
        try:
            end = time.monotonic() + 120
            while not _answers(port, service):
                if process.poll() is not None or time.monotonic() > end:
                    said.seek(0)
                    reason = ["it says nothing", *said.read().strip().splitlines()][-1]
                    raise SystemExit(f"{service.name} does not start: {reason}")
                time.sleep(0.2)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(30)


def _answers(port: int, service: Service) -> bool:
    try:
        _ask(port, service, "is it there?")
    except (OSError, http.client.HTTPException):
        return False
    return True


def resident_mb(pid: int) -> float:
    """Of a process and its children, MiB (Linux)."""
    total, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        pages = int(Path(f"/proc/{one}/statm").read_text().split()[1])
        total += pages * os.sysconf("SC_PAGE_SIZE")
        with contextlib.suppress(OSError):
            waiting += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return total / 2**20


def verify(expected: list[dict[str, float]], service: Service, port: int, texts: list[str]) -> None:
    """Raises AssertionError where it answers otherwise than fasttx in fp32."""
    for text, wanted in zip(texts, expected, strict=True):
        found = _ask(port, service, text)
        assert found.keys() == wanted.keys(), f"{service.name}: labels {sorted(found)}"
        off = max(abs(found[label] - p) for label, p in wanted.items())
        assert off <= service.tolerance, f"{service.name}: {off:.4f} off at {text[:60]!r}"


# -------------------------------------------------------------------------------------------- load


def load(
    service: Service, port: int, what: str, bodies: Path, connections: int, seconds: float,
    rate: float | None,
) -> Load:  # fmt: skip
    environment = {**os.environ, "BODIES": str(bodies), "CONNECTIONS": str(connections),
                   "WRK_PATH": service.path}  # fmt: skip
    environment.pop("RATE", None)
    if rate is not None:
        environment["RATE"] = str(rate)
    done = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "10s", "-s",
         str(HERE / "serving.lua"), f"http://127.0.0.1:{port}"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    line = next(x for x in done.stdout.splitlines() if x.startswith("JSON "))
    found = json.loads(line[5:])
    return Load(
        service.name, what, connections, rate, found["requests"] / found["seconds"],
        found["p50"], found["p99"], found["failed"],
    )  # fmt: skip


def soak(
    service: Service, port: int, pid: int, bodies: Path, requests: int, connections: int
) -> Iterator[tuple[int, float]]:
    """Requests answered so far and resident MiB, about ten times."""
    answered, seconds = 0, 3  # whole ones, as wrk has them
    yield answered, resident_mb(pid)
    while answered < requests:
        one = load(service, port, "short", bodies, connections, seconds, None)
        assert not one.failed, f"{one.failed} requests failed"
        answered += round(one.requests_per_second * seconds)
        yield answered, resident_mb(pid)
        seconds = max(1, min(60, round(requests / 10 / one.requests_per_second)))


def write_bodies(path: Path, service: Service, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps(service.body(text)) + "\n" for text in texts))
    return path


def best(loads: list[Load]) -> Load | None:
    """The most requests a second with the 99th percentile below the limit, and nothing failed."""
    able = [one for one in loads if one.p99_ms <= LIMIT_MS and not one.failed]
    return max(able, key=lambda one: one.requests_per_second, default=None)


def table(loads: list[Load], names: list[str], what: str) -> str:
    """Of one kind of texts: the best of each service, then fixed rates."""
    lines = [f"{what}: most requests/s with p99 below {LIMIT_MS:g} ms (of the connections tried)"]
    for name in names:
        mine = [one for one in loads if one.service == name and one.texts == what]
        found = best([one for one in mine if one.rate is None])
        lines.append(f"  {name:18s} " + (
            "none" if found is None else
            f"{found.requests_per_second:8.1f}/s  p50 {found.p50_ms:6.1f}  "
            f"p99 {found.p99_ms:6.1f} ms  {found.connections} connections"
        ))  # fmt: skip
    for rate in sorted({one.rate for one in loads if one.texts == what and one.rate is not None}):
        lines.append(f"{what}, {rate:g} requests/s")
        for one in loads:
            if one.texts == what and one.rate == rate:
                lines.append(
                    f"  {one.service:18s} {one.requests_per_second:8.1f}/s  p50 {one.p50_ms:6.1f}  "
                    f"p99 {one.p99_ms:6.1f} ms" + (f"  {one.failed} failed" if one.failed else "")
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--data", default=os.environ.get("FASTTX_DATA"), help="of the reviews")
    parser.add_argument("--onnx", metavar="FOLDER")
    parser.add_argument("--onnx-int8", metavar="FOLDER")
    parser.add_argument("--infinity", metavar="FOLDER")
    parser.add_argument("--infinity-command", default="infinity_emb")
    parser.add_argument("--infinity-engine", default="torch")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="requests/s")
    parser.add_argument("--texts", nargs="+", default=["short", "reviews", "mixture"])
    parser.add_argument(
        "--int8", type=float, default=0.1, help="how far its probabilities may be off"
    )
    parser.add_argument("--soak", type=int, metavar="N", help="requests")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not shutil.which("wrk"):
        parser.error("wrk is not installed: apt install wrk (or brew install wrk)")
    if not arguments.data:
        parser.error("the reviews are missing: pass --data or set $FASTTX_DATA")
    long = reviews(arguments.data, 400)
    short = [" ".join(text.split()[:SHORT]) for text in long]
    kinds = {"short": short, "reviews": long, "mixture": [*short[::2], *long[1::2]]}
    if arguments.soak is not None and arguments.soak < 1:
        parser.error(f"--soak is {arguments.soak}; expected at least 1 request")
    entered = services(arguments)[: 1 if arguments.soak else None]
    loads: list[Load] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = {s.name: stack.enter_context(started(s, arguments.threads)) for s in entered}
        if arguments.soak:
            bodies = write_bodies(folder / "short", entered[0], kinds["short"])
            asked = arguments.soak, max(arguments.connections)
            for answered, mb in soak(entered[0], *running["fasttx"], bodies, *asked):
                print(f"{answered:>9,} requests  {mb:7.1f} MB", flush=True)
            return
        checked = kinds["mixture"][:10] + kinds["mixture"][-10:]
        expected = [_ask(running["fasttx"][0], entered[0], text) for text in checked]
        for service in entered[1:]:
            verify(expected, service, running[service.name][0], checked)
        print(f"load {load_average():.2f}; {arguments.threads} threads a service; wrk: 1 thread")
        for what in arguments.texts:
            bodies = {
                s.name: write_bodies(folder / f"{what}-{s.name}", s, kinds[what]) for s in entered
            }
            turns = [(c, None) for c in arguments.connections]
            turns += [(max(arguments.connections), rate) for rate in arguments.rates]
            for connections, rate in turns:
                for service in entered:
                    port, _ = running[service.name]
                    loads.append(
                        load(service, port, what, bodies[service.name], connections,
                             arguments.seconds, rate)
                    )  # fmt: skip
            print("\n" + table(loads, [s.name for s in entered], what), flush=True)
        memory = {name: resident_mb(pid) for name, (_, pid) in running.items()}
    print("\nresident at the end: " + ", ".join(f"{n} {mb:.0f} MB" for n, mb in memory.items()))
    if arguments.json:
        records = {"loads": [vars(one) for one in loads], "resident_mb": memory}
        arguments.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
