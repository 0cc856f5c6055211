"""Random attention problems on the backends that run here, each against float64, both ways.

    python -m tests.soak_attention --count 100000 --seed 0

A problem is a pure function of its seed and its number, so a line of the output says how to run
that one again. The tests run the first of them (ops/test_soak.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fasttx.testing import AttentionCase, checking, describe, dropout_of
from tests.backends import TARGETS, Target

BACKENDS = ("cpu", "reference", "sdpa")
LENGTHS = (0, 0, 1, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 100)
LONG = (127, 128, 129, 255, 257, 511, 512, 513, 529)
HEAD_DIMS = (1, 2, 3, 4, 5, 8, 8, 12, 16, 16, 17, 20, 24, 32, 32, 33, 40, 64, 65, 100, 128)
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
DROPOUTS = (0.0, 0.0, 0.1, 0.5, 0.97, 1.0)
DEAD = (0.0, np.nan, np.inf, -np.inf)


@dataclass(frozen=True)
class Problem:
    case: AttentionCase
    dtype: torch.dtype
    p: float
    packed: bool  # by `attention`, or by `attention_qkv`

    def __str__(self) -> str:
        how = "packed" if self.packed else "q, k, v apart"
        return f"{self.case!r}, {self.dtype}, dropout {self.p:g}, {how}"


def draw(seed: int, number: int) -> Problem:
    rng = np.random.default_rng([seed, number])

    def one_of(values: Sequence[float]) -> float:
        return values[rng.integers(len(values))]

    lens = [int(one_of(LENGTHS)) for _ in range(rng.integers(0, 6))]
    if rng.random() < 0.03:
        lens.append(int(one_of(LONG)))
    starts = rows = None
    if rng.random() < 0.6:  # anywhere, in any order, with gaps between
        places, at = [0] * len(lens), int(rng.integers(0, 5))
        for i in rng.permutation(len(lens)):
            places[i], at = at, at + lens[i] + int(rng.integers(0, 5)) * int(rng.random() < 0.5)
        rows = at + int(rng.integers(0, 5))
        starts = tuple(
            start if n else int(rng.integers(0, rows + 1))
            for start, n in zip(places, lens, strict=True)
        )
    head_dim = int(one_of(HEAD_DIMS))
    scale = None
    if rng.random() < 0.4:
        scale = float(rng.choice([0.0, *rng.uniform(-0.5, 2.0, 9)])) * head_dim**-0.5
    case = AttentionCase(
        "x" * int(rng.integers(1, 30)),  # its length decides the values
        tuple(lens),
        heads=int(one_of((1, 1, 2, 3))),
        head_dim=head_dim,
        causal=bool(rng.random() < 0.5),
        starts=starts or None,
        rows=rows,
        dead=float(one_of(DEAD)),
        strided=bool(rng.random() < 0.4),
        scale=scale,
        spread=float(one_of((1.0, 1.0, 1.0, 1e-3, 4.0))),
        slack=int(rng.integers(0, 70)) * int(rng.random() < 0.3),
    )
    dtype, p = DTYPES[rng.integers(len(DTYPES))], float(one_of(DROPOUTS))
    return Problem(case, dtype, p, bool(rng.random() < 0.5))


def failures(problem: Problem, targets: Sequence[Target]) -> dict[str, list[str]]:
    """What is wrong, by backend: those that take the problem."""
    case, dtype, p, packed = problem.case, problem.dtype, problem.p, problem.packed
    found, judge = {}, None
    for target in targets:
        is_known = p in (0, 1) or target.backend.dropout == "shared"
        if not is_known or not target.takes(dtype, case.head_dim):
            continue
        # Not the one that keeps what it has measured: there would be no end to that.
        if judge is None:
            judge = checking.measure.__wrapped__(case, dtype, p)
            # A test has an allowance for its cases. Among many thousands, plain torch's own error
            # happens to be small, and a sound backend's large: what is wrong is off by far more.
            judge = replace(judge, allowed={name: 2 * x for name, x in judge.allowed.items()})
        try:
            dropout = dropout_of(p, target.device)
            values = case.run(target.operations, target.device, dtype, dropout, packed=packed)
            found[target.name] = judge.compare("", values).failures
        except Exception as error:
            found[target.name] = [describe(error)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=1000, help="problems (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first problem")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backends", nargs="+", default=BACKENDS, metavar="NAME")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    targets = [t for t in TARGETS if t.name in args.backends and t.device == "cpu"]
    start, runs, wrong = time.monotonic(), Counter(), 0
    number = args.first
    for number in range(args.first, args.first + args.count):
        problem = draw(args.seed, number)
        for name, found in failures(problem, targets).items():
            runs[name] += 1
            wrong += bool(found)
            for failure in found:
                print(f"--seed {args.seed} --first {number} --count 1: {name}:{failure}; {problem}")
        if time.monotonic() - start > args.seconds:
            break
    shown = ", ".join(f"{name} {count:,}" for name, count in runs.items())
    print(
        f"{number + 1 - args.first:,} problems in {time.monotonic() - start:.0f} s, seed "
        f"{args.seed}: {shown}; {wrong} wrong"
    )
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
