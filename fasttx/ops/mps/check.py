"""Is the machine what the Metal kernels take it for, are they right on it, and are they faster?

The kernels were written without a Mac. So the first use on one compares them, forward and backward,
with definitions in float64: on the CPU, where nothing of the judge is MPS's own.
`fasttx.testing`, which holds those, is imported when it is first needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fasttx.ops.mps import lean

if TYPE_CHECKING:
    from fasttx.testing import Case, Outcome

PARTS = ("attention", "rowops")


def check(part: str, device: str, dtype: torch.dtype, head_dim: int) -> Outcome:
    """Compiles and runs a part ("attention", "rowops") on a device; never raises."""
    from fasttx import testing

    try:
        from fasttx.ops.mps import metal

        failures = _probe(device)
    except Exception as error:  # of an import, the compiler, the driver, or a launch
        failures = [testing.describe(error)]
    if failures:
        return testing.Outcome(failures)
    cases: Sequence[Case] = testing.attention.cases(head_dim)
    if part == "rowops":  # `linear` is torch's own on either path
        cases = [case for case in testing.rows.cases() if case.op != "linear"]
    return testing.check(metal.operations, cases, device, dtype)


def _probe(device: str) -> list[str]:
    """What the kernels take for granted and the machine does otherwise."""
    from fasttx.kernels.metal import shaders

    found = torch.full((32, 2), -1.0, device=device)
    width = torch.zeros(1, dtype=torch.int32, device=device)
    numbers = torch.arange(64, dtype=torch.float32, device=device)
    probe = shaders.kernel(device, "probe", "probe")
    probe(numbers, found, width, threads=(32,), group_size=(32,))
    failures = []
    if (lanes := int(width)) != 32:
        failures.append(f"a simdgroup has {lanes} lanes; the kernels need 32")
    lane = torch.arange(32)
    row, column = (lane >> 2 & 4) + (lane >> 1 & 3), (lane >> 1 & 4) + (lane << 1 & 2)
    expected = torch.stack([row * 8 + column, row * 8 + column + 1], 1).float()
    if not torch.equal(found.cpu(), expected):
        failures.append("lanes hold other elements of an 8 x 8 matrix than they should")
    return failures


def timings(part: str, device: str, dtype: torch.dtype, head_dim: int) -> dict[str, float]:
    """Milliseconds of `metal` and `lean`, of what `testing.Shape` says is usual."""
    from fasttx import testing
    from fasttx.ops.mps import metal

    step = testing.attention_step if part == "attention" else testing.rows_step
    paths = {"metal": metal.operations, "lean": lean.adapter.operations}
    return {
        name: testing.milliseconds(step(path, device, dtype, head_dim, testing.Shape()), device)
        for name, path in paths.items()
    }
