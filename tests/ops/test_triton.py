"""The Triton backend where no GPU is: why it refuses, its kernels interpreted, compiled, mutated.

Triton decides when a kernel is defined whether it interprets, so interpreted tests run in processes
of their own, by pytest under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fasttx.ops import triton
from fasttx.ops.contract import Spans
from fasttx.ops.dropout import Dropout
from fasttx.ops.registry import BACKENDS
from tests import forks

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

needs_triton = pytest.mark.skipif(
    INTERPRETED or importlib.util.find_spec("triton") is None,
    reason="needs Triton (Linux: pip install triton), and a process that does not interpret",
)


# ---------------------------------------------------------------------------------- refusals


def reasons(head_dim: int = 32) -> list[str]:
    return triton.adapter.unavailable_reasons(torch.device("cuda"), torch.float32, head_dim)


@pytest.fixture
def a_gpu(monkeypatch):
    """Pretends that there is one, of compute capability 9.0, and Triton 3.9."""
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(triton.importlib.metadata, "version", lambda name: "3.9.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    triton._of_triton.cache_clear()
    yield monkeypatch
    triton._of_triton.cache_clear()


def test_available_where_everything_is_there(a_gpu):
    assert reasons() == []
    assert BACKENDS["triton"].unavailable_reasons("cuda", torch.bfloat16, 128) == []


def test_no_device(a_gpu):
    a_gpu.setattr(torch.cuda, "is_available", lambda: False)
    (reason,) = reasons()
    assert "no CUDA device" in reason and "pytorch.org" in reason


def test_too_old_a_device(a_gpu):
    a_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    (reason,) = reasons()
    assert "GPU X has compute capability 7.5: needs 8.0" in reason and "sdpa" in reason


def test_no_triton(a_gpu):
    a_gpu.setattr(triton.importlib.util, "find_spec", lambda name: None)
    (reason,) = reasons()
    assert "not installed" in reason and "pip install" in reason


def test_too_old_a_triton(a_gpu):
    a_gpu.setattr(triton.importlib.metadata, "version", lambda name: "3.1.0")
    (reason,) = reasons()
    assert "Triton 3.1.0 is too old" in reason and "pip install -U" in reason


@pytest.mark.parametrize("head_dim", [0, 129, 256])
def test_head_dim(a_gpu, head_dim):
    (reason,) = reasons(head_dim)
    assert f"head_dim {head_dim}: takes 1 to 128" in reason and "sdpa" in reason


def test_dtype_and_device():
    wrong = BACKENDS["triton"].unavailable_reasons("xpu", torch.float64, 32)
    assert len(wrong) == 2 and "needs" in wrong[0] and "float64" in wrong[1]


# -------------------------------------------------------------------------------- interpreted


def interpreted(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest over the interpreted kernels of the checkout at `root`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return forks.run(command, root, environment)


# What the interpreter does, the PTX machine does with what the compiler made of it. So the ordinary
# run has of the interpreter's that it works.
in_full = pytest.mark.skipif(os.environ.get("FASTTX_PTX") != "all", reason="make ptx runs it")

IN = "triton-cpu"
ROWS = "ops/test_embed.py ops/test_add_norm.py ops/test_bias_act.py"
RULES = "ops/test_fused.py"
ONE = "test_isolation and test_rows and 0.3 and nan"


@needs_triton
@pytest.mark.parametrize(
    ("files", "chosen", "least"),
    [
        ("ops/test_attention.py", "test_float32 and triton-cpu and gaps", 2),
        pytest.param("ops/test_attention.py", "triton-cpu and test_float32", 45, marks=in_full),
        pytest.param("ops/test_attention.py", "triton-cpu and not test_float32", 35, marks=in_full),
        (ROWS, f"{IN} and 7x20", 4),
        pytest.param(
            f"{ROWS} models/test_isolation.py",
            f"{IN} and not test_isolation or {IN} and {ONE}",
            55,
            marks=in_full,
        ),
        pytest.param(
            f"{RULES} kernels/test_triton_kernels.py",
            f"{IN} and not bfloat16 or triton_",
            37,
            marks=in_full,
        ),
    ],
    ids=[
        "some attention",
        "attention in float32",
        "attention otherwise",
        "some row operations",
        "row operations",
        "the rest",
    ],
)
def test_interpreted(files, chosen, least):
    """The tests of every backend over Triton's kernels, and what is particular to these.

    Of isolation one case, since the interpreter is slow; of torch's rules for operators those in
    float32 only: what registers an operator is the same for every backend, and `cpu` has both.
    """
    run = interpreted(ROOT, *(f"tests/{name}" for name in files.split()), "-k", chosen)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= least, run.stdout[-1000:]


# A kernel that is wrong in one place, and a test that must see it.
MUTATIONS = {
    "a wrong scale": ("attention.py", "scale * LOG2_E", "scale * 1.44"),
    "a dropped mask": ("attention_forward.py", "p = tl.where(keep, p, 0.0)", "p = p"),
    "a dropped mask of the backward": ("attention_backward.py", "tl.where(keep, p, 0.0)", "p"),
    "another logarithm": ("attention_forward.py", "tl.log2(sum_)) * LN_2", "tl.log2(sum_))"),
    "a shifted counter": ("device.py", "first_key // 8 + tl", "1 + first_key // 8 + tl"),
    "a missing delta": ("attention_backward.py", "p * (dp - delta[None, :])", "p * dp"),
    "a tile's own counter": ("device.py", "block = first_key // 8", "block = 0 * first_key // 8"),
    "dead rows unwritten": ("device.py", "(live == 0) & (row < rows)", "(live == 2)"),
    "round keys of ten rounds": ("device.py", "tl.constexpr(7)", "tl.constexpr(10)"),
}


@needs_triton
@in_full
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_kernel_is_seen(tmp_path, mutation):
    name, right, wrong = MUTATIONS[mutation]
    for part in ("fasttx", "kernels", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignored)
    for part in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / part, tmp_path / part)
    path = tmp_path / "kernels" / "triton" / name
    source = path.read_text(encoding="utf-8")
    assert right in source
    path.write_text(source.replace(right, wrong), encoding="utf-8")
    chosen = "test_float32_with_dropout and triton-cpu and (odd or tail or long-causal)"
    run = interpreted(tmp_path, "tests/ops/test_attention.py", "-x", "-k", chosen)
    assert run.returncode == 1, run.stdout[-3000:]
    assert re.search(r"AssertionError: .*(off|not finite|not 0)", run.stdout), run.stdout[-3000:]


# ----------------------------------------------------------------------------------- compiled


def _compiled() -> list[object]:
    """The default model's configurations. For AMD the ordinary run has its main ones."""
    if INTERPRETED or importlib.util.find_spec("triton") is None:
        return []
    from fasttx.kernels.triton import aot

    found: list[object] = []
    for configuration in aot.default_model():
        name = str(configuration)
        others = "attention" in name and not re.search("bf16 D=32 .*256 dropout whole", name)
        found += [
            pytest.param(configuration, "sm_90", id=f"{name}-sm_90"),
            pytest.param(
                configuration, "gfx942", id=f"{name}-gfx942", marks=[in_full] if others else []
            ),
        ]
    return found


@needs_triton
@pytest.mark.parametrize(("configuration", "target"), _compiled())
def test_compiles(configuration, target, tmp_path, monkeypatch):
    """Within the chip's shared memory, without spills where none are promised, without atomics."""
    from fasttx.kernels.triton import aot

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = aot.compile_for(configuration, target)
    assert aot.faults(configuration, target, aot.usage(compiled, target)) == []
    assert "atomic" not in compiled.asm["ttir"]


@needs_triton
@pytest.mark.parametrize(
    ("target", "head_dim", "length", "causal"),
    [("sm_90", 64, 16, True), ("sm_90", 16, 32, True), ("sm_100", 16, 32, True),
     ("sm_100", 64, 64, False)],
)  # fmt: skip
def test_tiles_at_the_edge_of_a_spill(target, head_dim, length, causal, tmp_path, monkeypatch):
    """Where the first key of a whole tile is no constant, ptxas spills for fewer registers."""
    from fasttx.kernels.triton import aot

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    configuration = aot.attention("backward", "bf16", head_dim, length, causal, True)
    row = aot.examine((configuration, target))
    assert row.faults == [] and row.used.stack == 0


@needs_triton
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_each_block_of_the_generator_is_drawn_once(way, tmp_path, monkeypatch):
    """Ten wide multiplications a block of eight keys: five rounds of two; two rounds are shared."""
    from fasttx.kernels.triton import aot, tiles

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = aot.compile_for(aot.attention(way, "bf16", 32, 256, False, True), "sm_90")
    tile = tiles.tile(way, 16, 32, 256)
    blocks = tile.block_m * tile.block_n // 8 // (32 * tile.num_warps)  # of one thread
    found = len(re.findall(r"\bmul\.hi\.u32\b", compiled.asm["ptx"]))
    assert 10 * blocks <= found <= 10 * blocks + 8


def test_faults_are_seen():
    pytest.importorskip("triton")
    from fasttx.kernels.triton import aot

    narrow = aot.attention("forward", "bf16", 32, 256, False, True)
    wide = aot.attention("forward", "fp32", 128, 256, False, True)
    assert aot.faults(narrow, "sm_90", aot.Usage(128, 1000, 0)) == []
    assert "shared memory" in aot.faults(narrow, "gfx942", aot.Usage(128, 65537, 0))[0]
    assert "spilled" in aot.faults(narrow, "sm_90", aot.Usage(255, 1000, 8))[0]
    assert aot.faults(wide, "sm_90", aot.Usage(255, 1000, 8)) == []


def test_what_does_not_compile_is_a_fault_among_others(monkeypatch):
    pytest.importorskip("triton")
    from fasttx.kernels.triton import aot

    def fails(*work: object) -> None:
        raise RuntimeError("ptxas\nfailed")

    monkeypatch.setattr(aot, "compile_for", fails)
    configuration = aot.attention("forward", "bf16", 32, 256, False, True)
    broken = aot.examine((configuration, "sm_90"))
    assert broken.faults == ["does not compile: RuntimeError: ptxas failed"]
    sound = aot.Row(configuration, "gfx942", aot.Usage(128, 1000, 8), [])
    head, _, line = aot.table([broken, sound]).splitlines()
    assert head == "| kernel | warps | sm_90 | gfx942 |"
    assert line == f"| {configuration} | 4 | - | 128 / 1000 / 8 |"


def test_only_takes_what_matches(capsys):
    pytest.importorskip("triton")
    from fasttx.kernels.triton import aot

    with pytest.raises(SystemExit):
        aot.main(["--only", "fp64"])
    assert "--only 'fp64' matches no configuration" in capsys.readouterr().err


def test_tiles_cover_every_length():
    from fasttx.kernels.triton import tiles

    for way in ("forward", "backward"):
        for bits in (16, 32):
            for head_dim in range(1, 129):
                for length in (0, 1, 16, 17, 31, 64, 65, 255, 256, 257, 8192):
                    tile = tiles.tile(way, bits, head_dim, length)
                    sizes = (tile.block_m, tile.block_n, tile.num_warps)
                    assert all(n & (n - 1) == 0 for n in sizes)
                    assert min(tile.block_m, tile.block_n) >= 16
                    assert not tile.whole or tile.block_n >= length


# ------------------------------------------------------------------------------------ on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_draws_new_masks():
    """The seed is read on the device: a replay with another seed is another mask."""
    operations = triton.adapter.operations
    qkv = torch.randn(300, 3, 8, 32, device="cuda", dtype=torch.bfloat16)
    starts, lens = torch.tensor([[0, 100], [100, 200]], dtype=torch.int32, device="cuda")
    spans = Spans.of(starts, lens, 200, len(qkv))
    seed = torch.tensor(1, device="cuda")
    dropout = Dropout.of(0.1, seed)
    operations.attention(qkv, spans, dropout)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operations.attention(qkv, spans, dropout)
    for number in (1, 2):
        seed.fill_(number)
        graph.replay()
        assert torch.equal(captured, operations.attention(qkv, spans, dropout))
