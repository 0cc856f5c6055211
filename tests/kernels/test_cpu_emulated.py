"""The AVX-512 kernels under the tests of the `cpu` backend, on machines without AVX-512 (avx512.h).

test_cpu_driver.py has every set, under sanitizers. This is what it lacks: the hard cases, a million
random numbers, the same bits in every batch. In a process of its own, which loads another library.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import forks
from tests.kernels.test_cpu_driver import SOURCE, X86_SETS

ROOT = Path(__file__).resolve().parents[2]
SET = "avx512bf16"  # all of avx512, but for its products of bfloat16
SCRIPT = """
import sys
from pathlib import Path

import pytest

sys.path.insert(0, {root!r})
from fasttx.kernels.cpu import library

library.library_path = lambda: Path({library!r})
assert library.instruction_sets() == [{set!r}]
sys.exit(pytest.main(sys.argv[1:]))
"""


def build(folder: Path) -> Path:
    """A library of that set alone."""
    flags = ["-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", "-fPIC"]
    commands = {
        "isa": ["-O0", *X86_SETS[SET][2]],  # optimising what is emulated would take minutes
        "library": ["-O1", f"-DFASTTX_SETS=&fasttx_kernels_{SET}"],
        "encoder": ["-O1", "-pthread"],
    }
    for name, own in commands.items():
        out = ["-c", str(SOURCE / f"{name}.cpp"), "-o", str(folder / f"{name}.o")]
        subprocess.run(["g++", *flags, *own, *out], check=True)
    objects = [str(folder / f"{name}.o") for name in commands]
    subprocess.run(["g++", "-shared", *objects, "-o", str(folder / "_native.so")], check=True)
    return folder / "_native.so"


def test_avx512_emulated(tmp_path):
    if shutil.which("g++") is None or not Path("/proc/cpuinfo").exists():
        pytest.skip("needs Linux and g++ on x86-64")
    here = set(Path("/proc/cpuinfo").read_text().split())
    if here.issuperset(X86_SETS[SET][0].split()):
        pytest.skip(f"this machine has {SET}: tests/ops/test_cpu.py runs it")
    if not here.issuperset(("avx2", "fma")):
        pytest.skip("needs a processor with AVX2")
    script = tmp_path / "emulated.py"
    script.write_text(SCRIPT.format(root=str(ROOT), library=str(build(tmp_path)), set=SET))
    files = ["tests/ops/test_cpu.py", "tests/ops/test_products.py"]
    options = ["-q", "-p", "no:cacheprovider", "-k", SET]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    run = forks.run([str(script), *files, *options], ROOT, environment)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 115, run.stdout[-1000:]
