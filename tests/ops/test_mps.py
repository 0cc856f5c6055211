"""How backend `mps` decides between Metal kernels and plain tensor algebra, told on the CPU; and
that the lean path is lean.
"""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fasttx import testing
from fasttx.errors import MetalError
from fasttx.ops import reference
from fasttx.ops.contract import Attend, Operations, Spans
from fasttx.ops.dropout import NO_DROPOUT, Dropout
from fasttx.ops.mps import adapter as mps
from fasttx.ops.mps import check as mps_check
from fasttx.ops.mps import choice, lean
from fasttx.ops.registry import BACKENDS, descriptions
from tests.metal import emulator

needs_emulator = pytest.mark.skipif(emulator.MISSING is not None, reason=str(emulator.MISSING))
FLOAT = ("attention", "cpu", torch.float32, 16)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path) -> Iterator[None]:
    """No choice made yet, nothing kept on the disk, a small shape to time, Metal emulated."""
    choice.choices.clear()
    shape = testing.Shape((9, 4), heads=2)
    monkeypatch.setattr(testing, "Shape", lambda: shape)
    monkeypatch.setenv("FASTTX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTTX_MPS", raising=False)
    if emulator.MISSING is None:
        from tests.metal import adapter  # noqa: F401  (enters the emulator)
    yield
    choice.choices.clear()
    choice._machine.cache_clear()


@pytest.fixture
def failing(monkeypatch) -> None:
    outcome = testing.Outcome(["dq is 3.1 off, 0.0001 allowed"], {"dq": 3.1})
    monkeypatch.setattr(choice, "check", lambda *args: outcome)


@pytest.fixture
def timed(monkeypatch) -> dict[str, float]:
    times = {"metal": 1.0, "lean": 2.0}
    monkeypatch.setattr(choice, "timings", lambda *args: dict(times))
    return times


SPANS = Spans.from_cu_seqlens(torch.tensor([0, 5, 9]), 5, 9)


def attend(operations: Operations = mps.adapter.operations) -> torch.Tensor:
    torch.manual_seed(0)
    return operations.attention(torch.randn(9, 3, 2, 16), SPANS)


# ------------------------------------------------------------------------------------- the choice


@needs_emulator
def test_the_faster_of_two_sound_paths(timed):
    assert choice.choose(*FLOAT).path == "metal"
    assert choice.choose("rowops", "cpu", torch.float32).path == "metal"
    timed["metal"] = 3.0
    assert choice.choose(*FLOAT).path == "metal", "the choice is made once"
    made = choice.choose("attention", "cpu", torch.float16, 16)
    assert made.path == "lean"
    assert made.reason == "the faster: metal 3.00 ms, lean 2.00 ms"
    assert made.errors and max(made.errors.values()) < 1e-2


@needs_emulator
def test_times_are_measured_once_a_machine(monkeypatch, tmp_path):
    first = choice.choose(*FLOAT)
    assert set(first.milliseconds) == {"metal", "lean"}
    assert all(x > 0 for x in first.milliseconds.values())
    choice.choices.clear()
    monkeypatch.setattr(choice, "timings", None)
    assert choice.choose(*FLOAT).milliseconds == first.milliseconds
    kept = json.loads((tmp_path / "cache" / "mps.json").read_text())
    (key,) = kept
    assert torch.__version__ in key


@needs_emulator
@pytest.mark.parametrize("part", ["chip", "torch", "kernels"])
def test_another_machine_measures_again(monkeypatch, timed, part):
    choice.choose(*FLOAT)
    choice.choices.clear()
    timed["metal"] = 9.0
    choice._machine.cache_clear()
    if part == "chip":
        monkeypatch.setattr(choice.devices, "chip", lambda: "Apple M9")
    elif part == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    else:
        monkeypatch.setattr(choice.hashlib, "sha256", choice.hashlib.sha512)
    assert choice.choose(*FLOAT).path == "lean"


@needs_emulator
@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', "\xff"])
def test_a_damaged_cache_is_written_anew(timed, tmp_path, text):
    path = tmp_path / "cache" / "mps.json"
    path.parent.mkdir()
    path.write_text(text, encoding="latin-1")
    assert choice.choose(*FLOAT).milliseconds == timed
    assert timed in json.loads(path.read_text()).values()


@needs_emulator
def test_a_cache_that_cannot_be_written_is_done_without(timed, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTTX_CACHE", str(tmp_path / "file"))
    assert choice.choose(*FLOAT).path == "metal"


def test_a_failed_check_is_said_once(failing, caplog):
    with caplog.at_level(logging.WARNING, "fasttx"):
        outs = [attend() for _ in range(3)]
    assert len(caplog.records) == 1
    said = caplog.records[0].getMessage()
    assert "attention" in said and "dq is 3.1 off" in said and "fasttx doctor" in said
    torch.testing.assert_close(outs[0], attend(reference.adapter.operations))
    (made,) = mps.adapter.description().values()
    assert made["path"] == "lean" and made["errors"] == {"dq": 3.1}


def test_metal_or_an_error(failing, monkeypatch):
    monkeypatch.setenv("FASTTX_MPS", "metal")
    with pytest.raises(MetalError, match=r"FASTTX_MPS=metal.*dq is 3.1 off.*doctor"):
        attend()


@needs_emulator
def test_metal_whatever_it_takes(timed, monkeypatch):
    monkeypatch.setenv("FASTTX_MPS", "metal")
    timed["metal"] = 9.0
    assert choice.choose(*FLOAT).path == "metal"


def test_the_adapter_is_imported_without_kernels_and_oracle():
    """They come in at the first choice: a model on another path, or a listing, needs neither."""
    code = "import sys, fasttx.ops.mps.adapter; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"fasttx.kernels.metal", "fasttx.ops.mps.metal", "fasttx.testing"}
    assert not heavy & set(done.stdout.split())


def test_lean_on_request(monkeypatch):
    monkeypatch.setenv("FASTTX_MPS", "lean")
    monkeypatch.setattr(choice, "check", None)
    attend()
    assert mps.adapter.description() == {
        "attention float32 head_dim 16": {
            "path": "lean", "reason": "FASTTX_MPS=lean", "errors": {}, "milliseconds": {},
        }
    }  # fmt: skip
    assert mps._chosen("rowops", torch.zeros(1)) is lean.adapter.operations


@pytest.mark.parametrize(("max_seqlen", "rounded"), [(5, 64), (64, 64), (65, 128), (0, 0)])
def test_the_lean_path_meets_few_sizes(monkeypatch, max_seqlen, rounded):
    """And the results are those of the true length."""
    monkeypatch.setenv("FASTTX_MPS", "lean")
    how = Attend(SPANS._replace(max_seqlen=max_seqlen), NO_DROPOUT, False, 1.0)
    operations, found = mps._chosen_attention(torch.zeros(9, 3, 2, 16), how)
    assert operations is lean.adapter.operations
    assert found.spans.max_seqlen == rounded and found.spans.lens is SPANS.lens


@needs_emulator
def test_metal_is_given_the_length_as_it_is(timed):
    how = Attend(SPANS, NO_DROPOUT, False, 1.0)
    operations, found = mps._chosen_attention(torch.zeros(9, 3, 2, 16), how)
    assert operations is not lean.adapter.operations
    assert found is how


def test_a_report_holds_the_choices(monkeypatch):
    monkeypatch.setenv("FASTTX_MPS", "lean")
    attend()
    assert descriptions("mps")["mps"]["attention float32 head_dim 16"]["path"] == "lean"
    assert descriptions("sdpa")["mps"] == {}


@needs_emulator
@pytest.mark.parametrize("path", ["metal", "lean"])
def test_every_operation_goes_the_way_that_was_chosen(timed, path):
    """With both paths' values right, the choices tell which way was gone."""
    timed["metal" if path == "lean" else "lean"] = 9.0
    cases = testing.quick_cases(head_dim=16)
    assert not testing.check(mps.adapter.operations, cases, "cpu", torch.float32).failures
    made = mps.adapter.description()
    assert set(made) == {"attention float32 head_dim 16", "rowops float32"}
    assert {choice["path"] for choice in made.values()} == {path}


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
    assert choice.choose(*FLOAT).path == "metal"


@needs_emulator
def test_the_choice_leaves_torch_s_generator_alone():
    state = torch.get_rng_state()
    choice.choose(*FLOAT)
    choice.choose("rowops", "cpu", torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


@needs_emulator
def test_the_choice_when_compiling(timed):
    """Made once while the graph is traced, and no part of it."""

    def function(qkv: torch.Tensor) -> torch.Tensor:
        return mps.adapter.operations.attention(qkv, SPANS).square()

    qkv = torch.randn(9, 3, 2, 16)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(qkv), function(qkv))
    assert choice.choose(*FLOAT).path == "metal"


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
    assert choice.choose(*FLOAT).path == "lean"


@needs_emulator
@pytest.mark.parametrize("part", mps_check.PARTS)
def test_timings_are_of_both_paths(part):
    times = mps_check.timings(part, "cpu", torch.float32, 16)
    assert set(times) == {"metal", "lean"}
    assert all(0 < x < math.inf for x in times.values())


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


def attend_to_32(operations: Operations) -> torch.Tensor:
    """Two sequences of 32 rows, two heads, dropout."""
    torch.manual_seed(0)
    qkv = torch.randn(64, 3, 2, 8, requires_grad=True)
    spans = Spans.from_cu_seqlens(torch.tensor([0, 32, 64]), 32, 64)
    return operations.attention(qkv, spans, Dropout.of(0.1, torch.tensor(1)))


def passes(operations: Operations) -> int:
    count = Passes(2 * 2 * 32 * 32)
    with count:
        attend_to_32(operations).sum().backward()
    return count.passes


def test_lean_is_leaner_than_autograd():
    assert passes(lean.adapter.operations) <= 0.8 * passes(reference.adapter.operations)


def test_lean_keeps_two_matrices():
    """The weights, before and after dropout; the mask is not kept."""
    kept: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attend_to_32(lean.adapter.operations)
    assert sum(x.numel() == 2 * 2 * 32 * 32 for x in kept) == 2
