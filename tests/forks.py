"""Commands as processes of their own that begin where torch is imported: a start is a fork, and
costs milliseconds, not seconds. Of fasttx they import everything themselves.

    run(["-m", "fasttx", "predict", ...], cwd, env)     as subprocess.run([sys.executable, ...])

What a start itself is tested for (imports, signals, streams, threads) needs a real one.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# Read where torch, Triton or Python start, so one process to fork from for each of their values.
AT_START = ("PYTHONPATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TRITON_INTERPRET")


def run(
    argv: list[str], cwd: Path, env: dict[str, str], input: str = "", timeout: int = 600
) -> subprocess.CompletedProcess[str]:
    if sys.platform != "linux":
        command = [sys.executable, *argv]
        return subprocess.run(
            command, cwd=cwd, env=env, input=input, capture_output=True, text=True, timeout=timeout
        )
    parent = _parent(tuple(env.get(name) for name in AT_START))
    with tempfile.TemporaryDirectory() as folder:
        streams = [str(Path(folder) / name) for name in ("in", "out", "err")]
        Path(streams[0]).write_text(input, encoding="utf-8")
        asked = {"argv": argv, "cwd": str(cwd), "env": env, "streams": streams, "timeout": timeout}
        parent.stdin.write(json.dumps(asked) + "\n")
        parent.stdin.flush()
        status = int(parent.stdout.readline())
        said = [Path(name).read_text(encoding="utf-8", errors="replace") for name in streams[1:]]
    if status == -signal.SIGALRM:
        raise subprocess.TimeoutExpired(argv, timeout, *said)
    return subprocess.CompletedProcess(argv, status, *said)


@functools.cache
def _parent(values: tuple[str | None, ...]) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if name not in AT_START}
    env |= {name: value for name, value in zip(AT_START, values, strict=True) if value is not None}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, __file__], env=env, stdin=pipe, stdout=pipe, text=True)


def _forked() -> dict | None:
    """In each child what is asked of it; in the parent None, once nothing more is asked."""
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if not pid:
            return asked
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def _become(asked: dict) -> None:
    """The command, whose end is that of the process."""
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    modes = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT)
    for number, (name, mode) in enumerate(zip(asked["streams"], modes, strict=True)):
        os.dup2(os.open(name, mode, 0o600), number)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    signal.alarm(asked["timeout"])
    first, *rest = asked["argv"]
    if first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a person's Ctrl-C is for pytest
    for name in ("torch", "torch._dynamo", "numpy", "pytest"):
        importlib.import_module(name)
    if os.environ.get("TRITON_INTERPRET") == "1":
        importlib.import_module("triton")
    if (request := _forked()) is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _become(request)
