"""The CPU kernels without Python (cpu_driver.cpp): every x86 set under sanitizers, and arm64's.
Their team of threads (team_driver.cpp) under ThreadSanitizer.

What a processor lacks is emulated: AVX-512 by avx512.h, arm64 by QEMU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "kernels" / "cpu"

SANITIZED = [
    "-O0", "-g1", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
]  # fmt: skip
AVX2 = ["-mavx2", "-mfma"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]
EMULATED = [*AVX2, "-Wno-psabi", "-include", str(HERE / "avx512.h")]
# Name -> what /proc/cpuinfo lists where it runs, its flags, and those of its emulation.
X86_SETS = {
    "avx512bf16": (
        "avx512f avx512bw avx512dq avx512vl avx512_bf16 avx512_vnni",
        [*AVX512, "-mavx512bf16", "-mavx512vnni"],
        [*EMULATED, "-DEMULATE_BFLOAT16"],
    ),
    "avx512": ("avx512f avx512bw avx512dq avx512vl", AVX512, EMULATED),
    "avx2": ("avx2 fma", AVX2, None),
    "baseline": ("", [], None),
}


def x86_sets() -> dict[str, list[str]]:
    """The flags of every set, here where it runs, else emulated; one that needs AVX2 for that and
    has none is left out."""
    here = set(Path("/proc/cpuinfo").read_text().split())
    chosen = {}
    for name, (needed, own, emulated) in X86_SETS.items():
        if here.issuperset(needed.split()):
            chosen[name] = own
        elif emulated is not None and here.issuperset(("avx2", "fma")):
            chosen[name] = emulated
    return chosen


def compile_driver(
    compiler: str, flags: list[str], sets: dict[str, list[str]], out: Path
) -> list[Path]:
    """cpu_driver.cpp and the kernels of these sets: an object each, that of the driver first."""
    common = f"{compiler} -std=c++17 -ffp-contract=fast -fno-math-errno -I{SOURCE}".split() + flags
    listed = ",".join(f"&fasttx_kernels_{name}" for name in sets)
    # What the driver compares with takes longest. The kernels would take longer to be optimised.
    jobs = {"driver": ["-O1", f"-DFASTTX_SETS={listed}", str(HERE / "cpu_driver.cpp")]}
    jobs |= {name: [*own, str(SOURCE / "isa.cpp")] for name, own in sets.items()}
    running = [
        subprocess.Popen([*common, "-c", *job, "-o", out / f"{name}.o"], stderr=subprocess.PIPE)
        for name, job in jobs.items()
    ]
    for process in running:
        _, complaint = process.communicate()
        assert process.returncode == 0, complaint.decode()
    return [out / f"{name}.o" for name in jobs]


def link(compiler: str, flags: list[str], objects: list[Path]) -> Path:
    program = objects[0].with_suffix("")
    subprocess.run([compiler, *flags, *objects, "-o", program], check=True)
    return program


def run_driver(*command: str | Path) -> list[str]:
    """The sets that it has checked."""
    done = subprocess.run(command, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.partition(":")[0] for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The objects of the driver and of every set, under sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    compiler = shutil.which("g++")
    if compiler is None or os.uname().machine != "x86_64" or not Path("/proc/cpuinfo").exists():
        pytest.skip("needs Linux and g++ on x86-64")
    (folder / "empty.cpp").write_text("int main() {}")
    probe = [compiler, *SANITIZED, folder / "empty.cpp", "-o", folder / "empty"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("g++ is here without its sanitizers: apt install libasan8 libubsan1")
    return compile_driver(compiler, SANITIZED, x86_sets(), folder)


@pytest.mark.xdist_group("cpu driver")
def test_no_byte_out_of_bounds_no_undefined_behaviour(sanitized):
    driver = link("g++", SANITIZED, sanitized)
    assert run_driver(driver) == list(x86_sets())


@pytest.mark.xdist_group("cpu driver")
def test_sets_share_no_function(sanitized):
    """Of a function that several objects hold the linker keeps one: perhaps that of a set which the
    machine lacks. Without optimisation nothing is inlined that need not be, so all show here."""
    for path in sanitized[1:]:
        symbols = subprocess.run(["nm", "-C", path], text=True, capture_output=True, check=True)
        weak = [line for line in symbols.stdout.splitlines() if line[17:18] == "W"]
        assert weak, "templates of the set itself"
        assert not [line for line in weak if f"{path.stem}::" not in line], path.name


def test_no_data_race_in_the_team_of_threads(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    flags = ["-std=c++17", "-O1", "-g1", "-pthread", "-fsanitize=thread"]
    source, driver = HERE / "team_driver.cpp", tmp_path / "team"
    build = [compiler, *flags, f"-I{SOURCE}", source, "-o", driver]
    (tmp_path / "empty.cpp").write_text("int main() {}")
    probe = [compiler, *flags, tmp_path / "empty.cpp", "-o", tmp_path / "empty"]
    for command in (probe, [tmp_path / "empty"]):
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("g++ is here without its sanitizer, or that does not run here (libtsan2)")
    subprocess.run(build, check=True)
    assert run_driver(driver) == ["every item once, in order"]


def test_arm64(tmp_path):
    """The NEON kernels, cross-compiled; under emulation where QEMU is installed."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compiler is None:
        pytest.skip("needs aarch64-linux-gnu-g++: apt install g++-aarch64-linux-gnu")
    flags = ["-O0", "-static", "-pthread"]
    driver = link(compiler, flags, compile_driver(compiler, flags, {"neon": []}, tmp_path))
    if emulator is None:
        pytest.skip("it compiles; to run it needs qemu-aarch64: apt install qemu-user")
    assert run_driver(emulator, driver) == ["neon"]
