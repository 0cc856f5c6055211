"""The report about a machine at hand: it goes on after failures, and says what is too far off."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import device_report
import figures
import torch

from fasttx.ops.reference import ReferenceOperations
from fasttx.ops.registry import BACKENDS, Backend
from fasttx.testing import quick_cases
from tests import forks

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_device_report(tmp_path):
    path = tmp_path / "report.json"
    script = ROOT / "benchmarks" / "device_report.py"
    options = ("--small", "--device", "cpu", "--minutes", "0.7", "--json", path)
    env = os.environ | {"FASTTX_DATA": "", "CUDA_VISIBLE_DEVICES": ""}
    done = forks.run([str(script), *map(str, options)], tmp_path, env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= device_report.LINES
    assert "FAILED" not in done.stdout and "TOO FAR" not in done.stdout
    for part in ("errors of reference", "attention, forward + backward", "training step"):
        assert part in done.stdout
    assert json.loads(path.read_text())["lines"] == lines


def test_device_report_goes_on_after_a_failure(capsys):
    report = device_report.Report(seconds=60)

    def fails():
        raise RuntimeError("no\nluck")

    report.part("first", 1, fails)
    report.part("second", 1e6, fails)
    report.part("third", 1, lambda: report.say("fine"))
    first, second, third = report.lines
    assert first == "first: FAILED: RuntimeError: no luck"
    assert second.startswith("second: left out") and third == "fine"
    for _ in range(100):
        report.say("more")
    assert len(report.lines) == device_report.LINES


def test_device_report_measures_errors(fake_backend):
    def attend(self, *args):
        return 1.001 * ReferenceOperations._attend(self, *args)

    cases = (*device_report.ATTENTION[:1], *quick_cases(head_dim=32))
    report = device_report.Report(seconds=60)
    device_report.errors(report, fake_backend(_attend=attend), cases, CPU)
    device_report.errors(report, BACKENDS["reference"], cases, CPU)
    assert "TOO FAR: float32 odd, causal: out" in report.lines[0]
    assert "TOO FAR" not in report.lines[1] and "bfloat16 " in report.lines[1]


def test_device_report_names_the_fastest_peer_of_the_same_function():
    def result(name: str, ms: float, kernel_ms: float = math.nan, note: str = "") -> figures.Result:
        return figures.Result(
            name, 1.0, 1.0, ms, (ms, ms), 1.0, 0.5, 0.0, kernel_ms, 3, note, False
        )

    ours, peer = result("fasttx-a", 4.0), result("peer", 6.0)
    found = [peer, result("fasttx-b", 5.0), ours, result("other", 1.0, note="no dropout")]
    assert "fasttx-a is 1.50x as fast as the fastest peer, peer, at 50 %" in device_report.lead(
        found
    )
    timed_kernels = [result("fasttx-a", 4.0, 1.0), result("peer", 3.0, 2.0)]
    assert "fasttx-a is 2.00x" in device_report.lead(timed_kernels)
    assert device_report.lead([ours]) == device_report.lead([peer]) == ""


def test_device_report_shows_what_the_suite_found(monkeypatch):
    says = "print('FAILED tests/x.py::y'); print('1 failed, 8 passed in 2 s'); raise SystemExit(1)"
    monkeypatch.setattr(device_report, "suite_command", lambda _: [sys.executable, "-c", says])
    report = device_report.Report(seconds=60)
    device_report.equivalence_suite(report, CPU)
    assert "1 failed, 8 passed" in report.lines[0] and "tests/x.py::y" in report.lines[1]
    monkeypatch.undo()
    command = device_report.suite_command(torch.device("cuda"))
    assert command[-1] == "cuda"
    files = [word for word in command if word.startswith("tests/")]
    assert files and all((ROOT / name).exists() for name in files)


def test_device_report_compares_the_machine_with_the_gpu(monkeypatch):
    report = device_report.Report(seconds=60)
    device_report.machine(report, CPU)
    says = ["sm_90: 41 of 50 cases have the same bits, 9 agree to rounding"]

    def run(command: list[str], **options: object) -> object:
        assert (
            command[1:] == ["-m", "tests.ptx.hardware"]
            and (ROOT / "tests/ptx/hardware.py").exists()
        )
        return subprocess.CompletedProcess(command, 0, says[0] + "\n", "")

    monkeypatch.setattr(device_report.subprocess, "run", run)
    device_report.machine(report, torch.device("cuda"))
    assert report.lines[0] == "PTX machine: left out, it is compared with cuda and this is cpu"
    assert report.lines[1] == f"PTX machine beside the GPU: {says[0]}"


def test_device_report_sanitizes_what_runs_on_cuda(monkeypatch, tmp_path):
    """With an allocation for each tensor; and says how where the tool is missing."""
    cuda = torch.device("cuda")
    ours = dataclasses.replace(BACKENDS["reference"], name="ours", devices=("cuda",))
    monkeypatch.setattr(device_report, "BACKENDS", {"ours": ours})
    monkeypatch.setattr(device_report.shutil, "which", lambda *_, **__: None)
    report = device_report.Report(seconds=60)
    device_report.sanitizer(report, cuda)
    assert device_report.UNCACHED in report.lines[0] and "--once triton" in report.lines[0]
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\necho "ERROR SUMMARY: $PYTORCH_NO_CUDA_MEMORY_CACHING errors in $6"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setattr(Backend, "unavailable_reasons", lambda *_: [])
    monkeypatch.setattr(device_report.shutil, "which", lambda *_, **__: str(tool))
    device_report.sanitizer(report, cuda)
    assert report.lines[1] == "compute-sanitizer, ours: ERROR SUMMARY: 1 errors in ours"


def test_device_report_s_pass_for_the_sanitizer(monkeypatch, fake_backend):
    """Every operation, forward and backward."""
    monkeypatch.setattr(device_report.devices, "pick", lambda: CPU)
    seen = set()

    def seeing(name):
        def operation(self, *args, **options):
            seen.add(name)
            return getattr(ReferenceOperations, name)(self, *args, **options)

        return operation

    names = ("attention", "embed", "add_norm", "bias_act", "linear")
    fake_backend(**{name: seeing(name) for name in names})
    device_report.once("fake")
    assert seen == {*names}
