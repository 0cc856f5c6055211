"""What each kernel takes on the machine, in counts (not times): a table, and the file that tests
compare.

    python -m tests.ptx.counts            the table
    python -m tests.ptx.counts --write    writes counts.json anew

instructions: of warps. sectors: of 32 bytes of global memory, as the warps' loads and stores ask
for them (caches are not modelled), and the fewest that these bytes fit in. wavefronts of shared
memory, and how many of them are bank conflicts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fasttx.testing import AttentionCase, Case, dropout_of
from fasttx.testing.rows import RowCase
from tests.backends import EVERY
from tests.ptx.machine import COUNTED, Counts
from tests.ptx.settings import Ran, changed

FILE = Path(__file__).with_name("counts.json")
# The default model's kernels (head_dim 32, d 256, d_ff 1024) in bf16 with dropout. Of add_norm so
# many rows that each program of the backward pass takes several blocks of them.
WORK: tuple[Case, ...] = (
    AttentionCase("whole", (128, 100), heads=2, head_dim=32),
    AttentionCase("online", (300,), heads=2, head_dim=32),
    RowCase("add_norm", 4096, 256, mixed=True),
    RowCase("bias_act", 64, 1024),
    RowCase("embed", 64, 256),
)


def counted(target: str, case: Case, dtype: torch.dtype = torch.bfloat16) -> dict[str, Counts]:
    """Of each kernel that a case launches, forward and backward."""
    found: dict[str, Counts] = {}

    def note(ran: Ran) -> None:
        name = f"{ran.kernel}, {case.name}" if isinstance(case, AttentionCase) else ran.kernel
        found[name] = found.get(name, Counts()) + ran.counts

    with changed(note=note, seed=0):
        case.run(EVERY[target].operations, "cpu", dtype, dropout_of(0.1, "cpu"))
    return found


def measure(targets: Sequence[str]) -> dict[str, dict[str, Counts]]:
    return {
        target: {name: c for case in WORK for name, c in counted(target, case).items()}
        for target in targets
    }


def version() -> str:
    """Whose counts the committed file has: another Triton compiles otherwise."""
    return json.loads(FILE.read_text(encoding="utf-8"))["triton"]


def kept() -> dict[str, dict[str, Counts]]:
    """The counts of the committed file."""
    targets = json.loads(FILE.read_text(encoding="utf-8"))["counts"]
    return {t: {n: Counts(*values) for n, values in rows.items()} for t, rows in targets.items()}


def worse(now: Counts, then: Counts) -> list[str]:
    """What has doubled."""
    return [
        f"{name} {getattr(now, name)}, was {getattr(then, name)}"
        for name in COUNTED
        # A few conflicts more than none are no doubling.
        if getattr(now, name) > 2 * getattr(then, name) + 64
    ]


def table(found: dict[str, dict[str, Counts]]) -> str:
    lines = [f"| kernel | target | {' | '.join(name.replace('_', ' ') for name in COUNTED)} |"]
    lines.append("|---|---|" + "---|" * len(COUNTED))
    for target, rows in found.items():
        for name, counts in rows.items():
            lines.append(f"| {name} | {target} | {' | '.join(map(str, counts.values))} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args(argv)
    found = measure(("sm_80", "sm_90"))
    print(table(found))
    if arguments.write:
        import triton

        rows = {t: {n: c.values for n, c in of.items()} for t, of in found.items()}
        text = json.dumps({"triton": triton.__version__, "counts": rows}, indent=1)
        text = re.sub(r"\[\s+|\s+\]", lambda m: m[0].strip(), text)  # numbers on one line
        FILE.write_text(re.sub(r",\s+(?=\d)", ", ", text) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
