"""The PTX machine beside a GPU: the same kernels on the same inputs, in float32.

    python -m tests.ptx.hardware          needs a CUDA device of compute capability 8.x or 9.x

Says how many of the cases have the same bits, how many agree to rounding, and which do not: there
the machine, or what we take for the PTX ISA, is wrong. Products are exact to float32 ("ieee");
exponentials and reciprocal roots are approximations whose last bits the ISA leaves open.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fasttx.ops.contract import Operations
from fasttx.ops.registry import BACKENDS
from fasttx.testing import Case, dropout_of, measure
from fasttx.testing.attention import CASES
from fasttx.testing.rows import ADD_NORM, BIAS_ACT, EMBED

SMALL = [case for case in CASES if case.name not in ("long", "300 sequences")]
# 50 in all: each case with dropout, and the first of them without it too.
ROWS = (*EMBED, *ADD_NORM, *BIAS_ACT)
WORK: tuple[tuple[Case, float], ...] = tuple(
    itertools.islice(
        ((case, p) for p in (0.1, 0.0) for case in (*SMALL, *ROWS) if "0x" not in str(case)), 50
    )
)


@dataclass
class Comparison:
    same: int = 0
    rounding: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = self.same + self.rounding + len(self.wrong)
        words = (
            f"{self.same} of {total} cases have the same bits, {self.rounding} agree to rounding"
        )
        return "; ".join([words, *(f"NOT: {what}" for what in self.wrong[:3])])


def compare(
    hardware: Operations, device: torch.device | str, machine: Operations,
    work: Sequence[tuple[Case, float]] = WORK,
) -> Comparison:  # fmt: skip
    """Each case on both; "rounding" is what a result may be off from float64."""
    found = Comparison()
    for case, p in work:
        theirs = case.run(hardware, device, torch.float32, dropout_of(p, device))
        mine = case.run(machine, "cpu", torch.float32, dropout_of(p, "cpu"))
        allowed = measure(case, torch.float32, p).allowed
        off = {name: float((theirs[name] - x).abs().max()) for name, x in mine.items() if x.numel()}
        beyond = [f"{case}, p={p:g}, {n} by {e:.1e}" for n, e in off.items() if not e <= allowed[n]]
        if all(torch.equal(theirs[name], x) for name, x in mine.items()):
            found.same += 1
        elif beyond:
            found.wrong += beyond[:1]
        else:
            found.rounding += 1
    return found


def main() -> int:
    from tests.backends import EVERY

    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    capability = 10 * torch.cuda.get_device_capability()[0]
    target = EVERY.get(f"sm_{capability}")
    if target is None:
        print(f"the machine has no sm_{capability}: it executes sm_80 and sm_90", file=sys.stderr)
        return 2
    if reasons := target.unavailable_reasons("cpu", torch.float32, 32):
        print("; ".join(reasons), file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")
    found = compare(BACKENDS["triton"].operations, "cuda", target.operations)
    print(f"sm_{capability}: {found}")
    return bool(found.wrong)


if __name__ == "__main__":
    sys.exit(main())
