"""How backend `mps` decides between Metal kernels and plain tensor algebra, told on the CPU; and
that the lean path is lean.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fasttx.errors import MetalError
from fasttx.ops import reference
from fasttx.ops.mps import adapter as mps
from fasttx.ops.mps import check as mps_check
from fasttx.ops.mps import lean
from fasttx.ops.registry import BACKENDS
from fasttx.ops.rows import specification
from fasttx.testing import selfcheck
from tests.metal import emulator

needs_emulator = pytest.mark.skipif(emulator.MISSING is not None, reason=str(emulator.MISSING))
FLOAT = ("attention", "cpu", torch.float32, 16)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path) -> Iterator[None]:
    """No choice made yet, nothing kept on the disk, a small shape to time, Metal emulated."""
    monkeypatch.setattr(mps, "_choices", {})
    monkeypatch.setattr(mps, "REAL_SHAPE", selfcheck.Shape((9, 4), heads=2))
    monkeypatch.setenv("FASTTX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTTX_MPS", raising=False)
    if emulator.MISSING is None:
        from tests.metal import adapter  # noqa: F401  (enters the emulator)
    yield
    mps._machine.cache_clear()


@pytest.fixture
def failing(monkeypatch) -> None:
    outcome = selfcheck.Outcome(["dq is 3.1 off, 0.0001 allowed"], {"dq": 3.1})
    monkeypatch.setattr(mps, "check", lambda *args: outcome)


@pytest.fixture
def timed(monkeypatch) -> dict[str, float]:
    times = {"metal": 1.0, "lean": 2.0}
    monkeypatch.setattr(mps, "timings", lambda *args: dict(times))
    return times


def attend(**options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    qkv = torch.randn(9, 3, 2, 16)
    starts, lens = torch.tensor([0, 5]).int(), torch.tensor([5, 4]).int()
    return mps.attention(qkv, starts, lens, max_seqlen=5, **options)


# ------------------------------------------------------------------------------------- the choice


@needs_emulator
def test_the_faster_of_two_sound_paths(timed):
    assert mps.choose(*FLOAT).path == "metal"
    assert mps.choose("rowops", "cpu", torch.float32).path == "metal"
    timed["metal"] = 3.0
    assert mps.choose(*FLOAT).path == "metal", "the choice is made once"
    choice = mps.choose("attention", "cpu", torch.float16, 16)
    assert choice.path == "lean"
    assert choice.reason == "the faster: metal 3.00 ms, lean 2.00 ms"
    assert choice.errors and max(choice.errors.values()) < 1e-2


@needs_emulator
def test_times_are_measured_once_a_machine(monkeypatch, tmp_path):
    first = mps.choose(*FLOAT)
    assert set(first.milliseconds) == {"metal", "lean"}
    assert all(x > 0 for x in first.milliseconds.values())
    monkeypatch.setattr(mps, "_choices", {})
    monkeypatch.setattr(mps, "timings", None)
    assert mps.choose(*FLOAT).milliseconds == first.milliseconds
    kept = json.loads((tmp_path / "cache" / "mps.json").read_text())
    (key,) = kept
    assert torch.__version__ in key


@needs_emulator
@pytest.mark.parametrize("part", ["chip", "torch", "kernels"])
def test_another_machine_measures_again(monkeypatch, timed, part):
    mps.choose(*FLOAT)
    monkeypatch.setattr(mps, "_choices", {})
    timed["metal"] = 9.0
    mps._machine.cache_clear()
    if part == "chip":
        monkeypatch.setattr(mps.devices, "chip", lambda: "Apple M9")
    elif part == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    else:
        monkeypatch.setattr(mps.hashlib, "sha256", mps.hashlib.sha512)
    assert mps.choose(*FLOAT).path == "lean"


@needs_emulator
@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', "\xff"])
def test_a_damaged_cache_is_written_anew(timed, tmp_path, text):
    path = tmp_path / "cache" / "mps.json"
    path.parent.mkdir()
    path.write_text(text, encoding="latin-1")
    assert mps.choose(*FLOAT).milliseconds == timed
    assert timed in json.loads(path.read_text()).values()


@needs_emulator
def test_a_cache_that_cannot_be_written_is_done_without(timed, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTTX_CACHE", str(tmp_path / "file"))
    assert mps.choose(*FLOAT).path == "metal"


def test_a_failed_check_is_said_once(failing, caplog):
    with caplog.at_level(logging.WARNING, "fasttx"):
        outs = [attend() for _ in range(3)]
    assert len(caplog.records) == 1
    said = caplog.records[0].getMessage()
    assert "attention" in said and "dq is 3.1 off" in said and "fasttx doctor" in said
    torch.manual_seed(0)
    qkv = torch.randn(9, 3, 2, 16)
    spans = torch.tensor([0, 5]).int(), torch.tensor([5, 4]).int()
    torch.testing.assert_close(outs[0], reference.attention(qkv, *spans, max_seqlen=5))
    (choice,) = mps.choices().values()
    assert choice["path"] == "lean" and choice["errors"] == {"dq": 3.1}


def test_metal_or_an_error(failing, monkeypatch):
    monkeypatch.setenv("FASTTX_MPS", "metal")
    with pytest.raises(MetalError, match=r"FASTTX_MPS=metal.*dq is 3.1 off.*doctor"):
        attend()


@needs_emulator
def test_metal_whatever_it_takes(timed, monkeypatch):
    monkeypatch.setenv("FASTTX_MPS", "metal")
    timed["metal"] = 9.0
    assert mps.choose(*FLOAT).path == "metal"


def test_lean_on_request(monkeypatch):
    monkeypatch.setenv("FASTTX_MPS", "lean")
    monkeypatch.setattr(mps, "check", None)
    attend()
    assert mps.choices() == {
        "attention float32 head_dim 16": {
            "path": "lean", "reason": "FASTTX_MPS=lean", "errors": {}, "milliseconds": {},
        }
    }  # fmt: skip
    assert mps._rows_of(torch.zeros(1)) is specification


def test_a_run_records_the_choices(monkeypatch):
    from fasttx.config import TrainConfig
    from fasttx.training import progress as report
    from fasttx.training.checkpoint import RunConfig

    monkeypatch.setenv("FASTTX_MPS", "lean")
    attend()
    run = RunConfig(TrainConfig(), "mps", "mps", ("a", "b"), {})
    assert report._mps_choices(run)["attention float32 head_dim 16"]["path"] == "lean"
    assert report._mps_choices(RunConfig(TrainConfig(), "sdpa", "cpu", ("a", "b"), {})) == {}


def test_an_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setenv("FASTTX_MPS", "fast")
    with pytest.raises(ValueError, match="FASTTX_MPS is 'fast'; expected auto, metal, lean"):
        attend()
    reasons = BACKENDS["mps"].unavailable_reasons("mps", torch.float32, 32)
    assert reasons == ["FASTTX_MPS is 'fast': takes auto, metal, lean"]


@needs_emulator
def test_the_caller_s_modes_do_not_reach_the_check(timed):
    """The first call may be an evaluation, or stand under autocast."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        attend()
    assert mps.choose(*FLOAT).path == "metal"


@needs_emulator
def test_the_choice_leaves_torch_s_generator_alone():
    state = torch.get_rng_state()
    mps.choose(*FLOAT)
    mps.choose("rowops", "cpu", torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


@needs_emulator
def test_the_choice_when_compiling(timed):
    """Made once while the graph is traced, and no part of it."""

    def function(qkv: torch.Tensor) -> torch.Tensor:
        return mps.attention(qkv, starts, lens, max_seqlen=5).square()

    starts, lens = torch.tensor([0, 5]).int(), torch.tensor([5, 4]).int()
    qkv = torch.randn(9, 3, 2, 16)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(qkv), function(qkv))
    assert mps.choose(*FLOAT).path == "metal"


def test_without_a_compiler_for_metal(monkeypatch, caplog):
    """As on torch older than 2.7."""
    from fasttx.kernels.metal import shaders

    monkeypatch.setattr(shaders, "COMPILERS", {})
    for cache in (shaders.kernel, shaders.library):
        cache.cache_clear()
    monkeypatch.delattr(torch.mps, "compile_shader")
    outcome = mps_check.check("attention", "mps", torch.float32, 32)
    assert outcome.failures
    with pytest.raises(RuntimeError, match="no torch.mps.compile_shader: needs 2.7"):
        shaders.compiler("mps")
    assert mps.choose(*FLOAT).path == "lean"


@needs_emulator
@pytest.mark.parametrize("part", mps_check.PARTS)
def test_timings_are_of_both_paths(part):
    times = mps_check.timings(part, "cpu", torch.float32, 16, selfcheck.Shape((9, 4), heads=2))
    assert set(times) == {"metal", "lean"}
    assert all(0 < x < math.inf for x in times.values())


def test_the_real_shape_is_that_of_imdb():
    shape = selfcheck.Shape()
    assert len(shape.lens) == 32 and max(shape.lens) == 256 and shape.heads == 8
    assert 0.69 < sum(shape.lens) / (32 * 256) < 0.72


# ---------------------------------------------------------------------------------- the lean path


class Passes(TorchDispatchMode):
    """Counts the (sequences, heads, L, L) floats that operators read and write, views aside."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.passes = elements, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            outs = out if isinstance(out, tuple | list) else (out,)
            for x in (*args, *outs):
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    self.passes += x.numel() == self.elements
        return out


def passes(adapter: Any) -> int:
    torch.manual_seed(0)
    qkv = torch.randn(64, 3, 2, 8, requires_grad=True)
    starts, lens = torch.tensor([0, 32]).int(), torch.tensor([32, 32]).int()
    count = Passes(2 * 2 * 32 * 32)
    with count:
        out = adapter.attention(
            qkv, starts, lens, max_seqlen=32, dropout_p=0.1, seed=torch.tensor(1)
        )
        out.sum().backward()
    return count.passes


def test_lean_is_leaner_than_autograd():
    assert passes(lean) <= 0.8 * passes(reference)


def test_lean_keeps_two_matrices():
    """The weights, before and after dropout; the mask is not kept."""
    qkv = torch.randn(64, 3, 2, 8, requires_grad=True)
    kept: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        lean.attention(
            qkv, torch.tensor([0, 32]).int(), torch.tensor([32, 32]).int(), max_seqlen=32,
            dropout_p=0.1, seed=torch.tensor(1),
        )  # fmt: skip
    assert sum(x.numel() == 2 * 2 * 32 * 32 for x in kept) == 2
