"""The threads of the CPU kernels: torch's own, however many, and no bit depends on their number."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttx.kernels import cpu as kernels
from fasttx.ops.registry import BACKENDS
from tests import equivalence
from tests.equivalence import Case
from tests.ops.test_rowops import RowCase

BACKEND = BACKENDS["cpu"]
pytestmark = pytest.mark.skipif(
    kernels.library_path() is None,
    reason="; ".join(BACKEND.unavailable_reasons("cpu", torch.float32, 16)),
)

ROOT = Path(__file__).resolve().parents[2]
SEED = torch.tensor(0x1234567_89ABCDEF)


@pytest.fixture
def threads() -> Iterator[Any]:
    """torch.set_num_threads, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything() -> list[Tensor]:
    """Outputs and gradients of attention, with work for many threads, and of the row operations."""
    values = []
    for case in (Case("one long", (1100,), heads=1), Case("many", (5, 64, 0, 33) * 4)):
        qkv, grad = case.inputs(torch.float32)
        options = {"max_seqlen": 1100, "dropout_p": 0.1, "seed": SEED}
        call = functools.partial(BACKEND.adapter().attention, **options)
        values += equivalence.run(lambda x: call(x, *case.index("cpu")), grad, qkv)  # noqa: B023
    for op in ("embed", "add_norm", "bias_act"):
        case = RowCase(op, 1200, 33)
        computed = case.compute(
            case.by(BACKEND.adapter().rowops, "cpu", 0.1), "cpu", torch.float32, torch.float32
        )
        values += computed.values()
    return values


def test_the_number_of_threads_changes_no_bit(threads):
    threads(1)
    one = everything()
    for n in (2, 3):
        threads(n)
        for x, y in zip(everything(), one, strict=True):
            assert torch.equal(x, y), n


def in_a_process(script: str) -> str:
    """What a script prints that has two threads and two packages with an OpenMP runtime."""
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        cwd=ROOT, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_the_threads_are_torch_s_own():
    """Attention makes one thread beside the caller, and torch's operators then make no other."""
    counts = in_a_process("""
        import os
        import sklearn.utils._openmp_helpers, torch
        from fasttx.ops import cpu
        torch.set_num_threads(2)
        count = lambda: len(os.listdir("/proc/self/task"))
        at_first = count()
        starts = torch.arange(8, dtype=torch.int32) * 64
        lens = torch.full_like(starts, 64)
        cpu.attention(torch.randn(512, 3, 2, 16), starts, lens, max_seqlen=64)
        by_attention = count()
        torch.randn(1 << 20).exp()
        print(by_attention - at_first, count() - at_first)
    """)
    assert counts.split() == ["1", "1"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and asks ldd")
def test_the_runtime_is_the_one_that_torch_is_linked_to():
    printed = in_a_process("""
        import subprocess
        import sklearn.utils._openmp_helpers, torch
        from pathlib import Path
        from fasttx.kernels import cpu
        address = next(a for a in cpu.openmp_entry_points() if a)
        for line in open("/proc/self/maps"):
            span, *_, path = line.split()
            first, last = (int(x, 16) for x in span.split("-"))
            if first <= address < last:
                print(Path(path).resolve())
        library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        linked = subprocess.run(["ldd", library], text=True, capture_output=True).stdout
        for line in linked.splitlines():
            if "libgomp" in line or "libomp" in line:
                print(Path(line.split()[2]).resolve())
    """)
    used, linked = printed.split()
    assert used == linked


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_the_workers_of_a_dataloader():
    """Forked from a process whose pool of threads runs; torch gives each worker one thread."""
    printed = in_a_process("""
        import sklearn.utils._openmp_helpers, torch
        from fasttx import TransformerClassifier
        torch.set_num_threads(2)
        model = TransformerClassifier(50, attn_backend="cpu", num_layers=1).eval()
        ids = torch.randint(2, 50, (6, 8, 100))

        class Classified(torch.utils.data.Dataset):
            def __len__(self):
                return len(ids)

            @torch.no_grad()
            def __getitem__(self, i):
                return model(ids[i]), torch.get_num_threads()

        here = torch.stack([Classified()[i][0] for i in range(6)])
        loader = torch.utils.data.DataLoader(
            Classified(), batch_size=3, num_workers=2, multiprocessing_context="fork"
        )
        logits, threads = zip(*loader)
        torch.testing.assert_close(torch.cat(logits), here)
        print(set(torch.cat(threads).tolist()))
    """)
    assert printed.strip() == "{1}"
