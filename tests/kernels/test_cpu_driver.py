"""The CPU kernels without Python (cpu_driver.cpp): under sanitizers, and on arm64. Their team of
threads (team_driver.cpp) under ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SANITIZED = [
    "-O0", "-g1", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
]  # fmt: skip
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma".split()
X86_SETS = {
    "avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
    "avx512": AVX512,
    "avx2": ["-mavx2", "-mfma"],
    "baseline": [],
}


def build_driver(compiler: str, flags: list[str], sets: dict[str, list[str]], out: Path) -> Path:
    """tests/kernels/cpu_driver.cpp and the kernels of these sets, as one program."""
    source = ROOT / "kernels" / "cpu"
    common = f"{compiler} -std=c++17 -ffp-contract=fast -fno-math-errno -I{source}".split() + flags
    # What it compares with takes longest; the kernels take longer to optimise than to run.
    jobs = {"driver": ["-O1", str(ROOT / "tests" / "kernels" / "cpu_driver.cpp")]}
    jobs |= {name: [*own, str(source / "isa.cpp")] for name, own in sets.items()}
    running = [
        subprocess.Popen([*common, "-c", *job, "-o", out / f"{name}.o"], stderr=subprocess.PIPE)
        for name, job in jobs.items()
    ]
    for process in running:
        _, complaint = process.communicate()
        assert process.returncode == 0, complaint.decode()
    # The linker takes an inline function that several objects hold from the first of them, so the
    # plainest comes first: without optimisation they hold some, and a processor may lack AVX-512.
    objects = [out / f"{name}.o" for name in ("driver", *reversed(sets))]
    subprocess.run([compiler, *flags, *objects, "-o", out / "driver"], check=True)
    return out / "driver"


def run_driver(*command: str | Path) -> list[str]:
    """The sets that it has checked."""
    done = subprocess.run(command, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.partition(":")[0] for line in done.stdout.splitlines()]


def test_no_byte_out_of_bounds_no_undefined_behaviour(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None or os.uname().machine != "x86_64":
        pytest.skip("needs g++ on x86-64")
    (tmp_path / "empty.cpp").write_text("int main() {}")
    probe = [compiler, *SANITIZED, tmp_path / "empty.cpp", "-o", tmp_path / "empty"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("g++ is here without its sanitizers: apt install libasan8 libubsan1")
    driver = build_driver(compiler, SANITIZED, X86_SETS, tmp_path)
    assert run_driver(driver)[-1] == "baseline"


def test_no_data_race_in_the_team_of_threads(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    flags = ["-std=c++17", "-O1", "-g1", "-pthread", "-fsanitize=thread"]
    source, driver = ROOT / "tests" / "kernels" / "team_driver.cpp", tmp_path / "team"
    build = [compiler, *flags, f"-I{ROOT / 'kernels' / 'cpu'}", source, "-o", driver]
    (tmp_path / "empty.cpp").write_text("int main() {}")
    probe = [compiler, *flags, tmp_path / "empty.cpp", "-o", tmp_path / "empty"]
    for command in (probe, [tmp_path / "empty"]):
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("g++ is here without its sanitizer, or that does not run here (libtsan2)")
    subprocess.run(build, check=True)
    assert run_driver(driver) == ["every item once, in order"]


def test_arm64(tmp_path):
    """The NEON kernels, cross-compiled; under emulation where QEMU is installed."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
    if compiler is None:
        pytest.skip("needs aarch64-linux-gnu-g++: apt install g++-aarch64-linux-gnu")
    driver = build_driver(compiler, ["-O1", "-static", "-pthread"], {"neon": []}, tmp_path)
    if emulator is None:
        pytest.skip(
            "it compiles; to run it needs qemu-aarch64-static: apt install qemu-user-static"
        )
    assert run_driver(emulator, driver) == ["neon"]
