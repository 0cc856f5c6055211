"""The threads of the CPU kernels: torch's own, however many, and no bit depends on their number."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fasttx.kernels.cpu import library as kernels
from torch import Tensor

from fasttx import TransformerClassifier
from fasttx.ops.registry import BACKENDS
from fasttx.testing import AttentionCase, RowCase, dropout_of

BACKEND = BACKENDS["cpu"]
pytestmark = pytest.mark.skipif(
    kernels.library_path() is None,
    reason="; ".join(BACKEND.unavailable_reasons("cpu", torch.float32, 16)),
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def threads() -> Iterator[Any]:
    """torch.set_num_threads, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


CASES = (
    AttentionCase("one long", (1100,), heads=1),
    AttentionCase("many", (5, 64, 0, 33) * 4),
    *(RowCase(op, 1200, 33) for op in ("embed", "add_norm", "bias_act")),
)


def everything() -> list[Tensor]:
    """Outputs and gradients of attention, with work for many threads, and of the row operations."""
    run = [
        case.run(BACKEND.operations, "cpu", torch.float32, dropout_of(0.1, "cpu")) for case in CASES
    ]
    return [x for values in run for x in values.values()]


def test_the_number_of_threads_changes_no_bit(threads):
    threads(1)
    one = everything()
    for n in range(2, 9):
        threads(n)
        for x, y in zip(everything(), one, strict=True):
            assert torch.equal(x, y), n


def test_fifty_times_the_same_bits(threads):
    """What is shared out among threads is added up in one order, whoever comes first."""
    threads(4)
    first = everything()
    for _ in range(50):
        for x, y in zip(everything(), first, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("count", [1, 3])
def test_two_models_in_two_threads_of_python(threads, count):
    """Each computes what it computes alone: the kernels' scratch space belongs to a thread."""
    threads(count)
    models = [tiny(seed, d_model) for seed, d_model in ((1, 32), (2, 64))]
    alone = [step(model) for model in models]

    def again(i: int) -> list[list[Tensor]]:
        torch.set_num_threads(count)
        return [step(models[i]) for _ in range(10)]

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(again, (0, 1)))
    for expected, steps in zip(alone, together, strict=True):
        for found in steps:
            for x, y in zip(found, expected, strict=True):
                assert torch.equal(x, y)


def tiny(seed: int, d_model: int) -> TransformerClassifier:
    torch.manual_seed(seed)
    return TransformerClassifier(
        50, d_model=d_model, num_heads=2, num_layers=2, d_ff=40, max_len=300, attn_backend="cpu"
    )


def step(model: TransformerClassifier) -> list[Tensor]:
    """The logits of a training step with dropout, and every gradient."""
    lens = (300, 17, 0, 120)
    ids = torch.randint(2, 50, (sum(lens),), generator=torch.Generator().manual_seed(1))
    cu_seqlens = torch.tensor([0, *lens]).cumsum(0).int()
    logits = model(ids, cu_seqlens=cu_seqlens, seed=torch.tensor(3))
    gradients = torch.autograd.grad(logits.sin().sum(), list(model.parameters()))
    return [logits.detach(), *gradients]


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
        from fasttx.ops.contract import Spans
        from fasttx.ops.registry import BACKENDS
        torch.set_num_threads(2)
        count = lambda: len(os.listdir("/proc/self/task"))
        at_first = count()
        spans = Spans.from_cu_seqlens(torch.arange(9) * 64, 64, 512)
        BACKENDS["cpu"].operations.attention(torch.randn(512, 3, 2, 16), spans)
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
        from fasttx.kernels.cpu import library
        address = next(a for a in library.openmp_entry_points() if a)
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
