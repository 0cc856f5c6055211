"""Is the machine what the Metal kernels take it for, are they right on it, and are they faster?

The kernels were written without a Mac. So the first use on one compares them with plain tensor
algebra (`lean`, and the specification of the row operations), forward and backward: on the CPU,
where nothing of the judge is MPS's own.
"""

from __future__ import annotations

import torch

from fasttx.ops.mps import lean
from fasttx.ops.rows import specification
from fasttx.testing.selfcheck import (
    TOLERANCES,
    Outcome,
    Shape,
    attention_cases,
    attention_step,
    milliseconds,
    row_cases,
    rowops_step,
)

PARTS = ("attention", "rowops")


def check(part: str, device: str, dtype: torch.dtype, head_dim: int) -> Outcome:
    """Compiles and runs a part ("attention", "rowops") on a device; never raises."""
    outcome = Outcome()
    try:
        from fasttx.ops.mps import metal
    except Exception as error:
        outcome.failures.append(f"the kernels cannot be loaded: {_line(error)}")
        return outcome
    try:
        _probe(outcome, device)
        if not outcome.failures:
            cases = attention_cases if part == "attention" else row_cases
            plain = lean if part == "attention" else specification
            kernels = metal if part == "attention" else metal.rowops
            here, on_cpu = (cases(where, dtype, head_dim) for where in (device, "cpu"))
            for (what, run), (_, judge) in zip(here, on_cpu, strict=True):
                outcome.compare(what, run(kernels), judge(plain), TOLERANCES[dtype])
    except Exception as error:  # of the compiler, the driver, or a launch
        outcome.failures.append(_line(error))
    return outcome


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _probe(outcome: Outcome, device: str) -> None:
    from fasttx.kernels.metal import shaders

    found = torch.full((32, 2), -1.0, device=device)
    width = torch.zeros(1, dtype=torch.int32, device=device)
    numbers = torch.arange(64, dtype=torch.float32, device=device)
    probe = shaders.kernel(device, "probe", "probe")
    probe(numbers, found, width, threads=(32,), group_size=(32,))
    if (lanes := int(width)) != 32:
        outcome.failures.append(f"a simdgroup has {lanes} lanes; the kernels need 32")
    lane = torch.arange(32)
    row, column = (lane >> 2 & 4) + (lane >> 1 & 3), (lane >> 1 & 4) + (lane << 1 & 2)
    expected = torch.stack([row * 8 + column, row * 8 + column + 1], 1).float()
    if not torch.equal(found.cpu(), expected):
        outcome.failures.append("lanes hold other elements of an 8 x 8 matrix than they should")


def timings(
    part: str, device: str, dtype: torch.dtype, head_dim: int, shape: Shape
) -> dict[str, float]:
    """Milliseconds of `metal` and `lean`."""
    from fasttx.ops.mps import metal

    if part == "attention":
        steps = {
            name: attention_step(adapter.attention, device, dtype, head_dim, shape)
            for name, adapter in (("metal", metal), ("lean", lean))
        }
    else:
        steps = {
            name: rowops_step(ops, device, dtype, head_dim, shape)
            for name, ops in (("metal", metal.rowops), ("lean", specification))
        }
    return {name: milliseconds(step, device) for name, step in steps.items()}
