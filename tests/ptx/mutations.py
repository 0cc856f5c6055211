"""Breaks the PTX of the kernels in one place at a time: does a run notice?

    python -m tests.ptx.mutations [--target sm_90] [--sites 2]

A mutant is seen by a fault of the machine, or by a result that is too far from float64's. One that
is not seen is printed with its line. Exits with 1 where more go unseen than UNSEEN allows.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fasttx.testing import AttentionCase, Case, dropout_of, measure
from fasttx.testing.attention import BY_NAME
from fasttx.testing.rows import RowCase
from tests.backends import EVERY
from tests.ptx.machine import Fault
from tests.ptx.settings import changed


def _exchange(first: int, second: int) -> Callable[[str], str]:
    """Two registers of a line change places; they are counted from 0."""

    def change(line: str) -> str:
        parts = re.split(r"(%r\d+)", line)
        a, b = 2 * first + 1, 2 * second + 1
        parts[a], parts[b] = parts[b], parts[a]
        return "".join(parts)

    return change


def _replace(pattern: str, by: str | Callable[[re.Match[str]], str]) -> Callable[[str], str]:
    return lambda line: re.sub(pattern, by, line, count=1)


def _transpose(line: str) -> str:
    return (
        line.replace(".trans", "") if ".trans" in line else line.replace(".shared", ".trans.shared")
    )


# name -> (the lines that it can break, how)
MUTATIONS: dict[str, tuple[str, Callable[[str], str]]] = {
    "no bar.sync": (r"\bbar\.sync\b", lambda line: ""),
    "cp.async: waits for one group less": (
        r"cp\.async\.wait_group", _replace(r"(\d+);", lambda m: f"{int(m[1]) + 1};"),
    ),
    "wgmma: no wait": (r"wgmma\.wait_group", lambda line: ""),
    "wgmma: no fence of the proxy": (r"fence\.proxy\.async", lambda line: ""),
    "mma: a1 and a2 exchanged": (r"\bmma\.sync", _exchange(5, 6)),
    "mma: b0 and b1 exchanged": (r"\bmma\.sync", _exchange(8, 9)),
    "mma: d0 and d1 exchanged": (r"\bmma\.sync", _exchange(0, 1)),
    "wgmma: d0 and d1 exchanged": (r"wgmma\.mma_async", _exchange(0, 1)),
    "ldmatrix: transposed, or not": (r"ldmatrix", _transpose),
    "ldmatrix: two registers exchanged": (r"ldmatrix.*\.x4", _exchange(0, 1)),
    "shuffle: another lane": (
        r"shfl\.sync\.bfly", _replace(r", (\d+), 31", lambda m: f", {int(m[1]) // 2 or 2}, 31"),
    ),
    "half words exchanged": (
        r"cvt\.rn\.(bf16|f16)x2", _replace(r"(%r\d+), (%r\d+);", r"\2, \1;"),
    ),
    "< becomes <=": (r"setp\.lt\.s32", _replace(r"setp\.lt", "setp.le")),
    "a store to shared memory 16 bytes on": (
        r"st\.shared\S* \[ %r\d+ \+ 0", _replace(r"\+ 0 \]", "+ 16 ]"),
    ),
    "a load of one element further": (
        r"ld\.global\.b(16|32)\s.*\[ %rd\d+ \+ 0 \]", _replace(r"\+ 0 \]", "+ 4 ]"),
    ),
}  # fmt: skip

# Kind -> how many may go unseen on a target, of two places a kernel. docs/kernels-triton.md says
# why these have no effect on these batches.
UNSEEN = {
    "no bar.sync": 1,
    "cp.async: waits for one group less": 1,
    "wgmma: no wait": 2,
    "wgmma: no fence of the proxy": 5,
    "wgmma: d0 and d1 exchanged": 1,
    "ldmatrix: two registers exchanged": 1,
    "< becomes <=": 12,
}


@dataclass(frozen=True)
class Check:
    """A batch whose kernels are broken."""

    case: Case
    dtype: torch.dtype
    p: float

    def __str__(self) -> str:
        return f"{self.case} {str(self.dtype).removeprefix('torch.')} p={self.p:g}"

    def verdict(self, target: str) -> str:
        """ "" where all is well, else "fault: ..." or "wrong: ..."."""
        operations = EVERY[target].operations
        try:
            found = self.case.run(operations, "cpu", self.dtype, dropout_of(self.p, "cpu"))
        except Fault as fault:
            return f"fault: {fault}"
        except AssertionError as error:
            return f"wrong: {error}"
        outcome = measure(self.case, self.dtype, self.p).compare(str(self.case), found)
        return f"wrong: {outcome.failures[0]}" if outcome.failures else ""

    def texts(self, target: str) -> dict[str, str]:
        """The PTX of each kernel that the batch launches."""
        seen: dict[str, str] = {}
        with changed(rewrite=lambda name, text: seen.setdefault(name, text)):
            verdict = self.verdict(target)
        if verdict:
            raise AssertionError(f"{self} on {target}, unbroken: {verdict}")
        return seen


# A row of NaN behind each sequence.
HEADS_OF_32 = AttentionCase(
    "heads of 32",
    (70, 1, 0, 33),
    heads=1,
    head_dim=32,
    starts=(1, 72, 0, 74),
    rows=108,
    dead=math.nan,
)
LONG = AttentionCase(
    "online", (300, 9), heads=1, head_dim=32, starts=(1, 302), rows=312, dead=math.nan
)
CHECKS = (
    Check(HEADS_OF_32, torch.bfloat16, 0.3),
    Check(replace(LONG, causal=True), torch.bfloat16, 0.3),
    Check(replace(BY_NAME["odd"], causal=True), torch.float32, 0.3),
    Check(RowCase("add_norm", 33, 64, mixed=True), torch.bfloat16, 0.3),
    Check(RowCase("bias_act", 33, 64, "gelu"), torch.float16, 0.3),
)


@dataclass(frozen=True)
class Mutant:
    kind: str
    check: Check
    kernel: str
    line: int
    text: str
    broken: str

    def verdict(self, target: str) -> str:
        with changed(rewrite=lambda name, text: self.broken if text == self.text else text):
            return self.check.verdict(target)

    def __str__(self) -> str:
        line = self.text.split("\n")[self.line].strip()
        return f"{self.kind}; {self.check}, {self.kernel}, PTX line {self.line + 1}: {line}"


def mutants(check: Check, target: str, kinds: Sequence[str], sites: int) -> Iterator[Mutant]:
    """At most so many places of each kind in each kernel of a batch, always the same."""
    for kernel, text in check.texts(target).items():
        lines = text.split("\n")
        for kind in kinds:
            pattern, change = MUTATIONS[kind]
            places = [i for i, line in enumerate(lines) if re.search(pattern, line)]
            chance = random.Random(f"{kernel} {kind}")
            for at in sorted(chance.sample(places, min(sites, len(places)))):
                broken = "\n".join([*lines[:at], change(lines[at]), *lines[at + 1 :]])
                if broken != text:
                    yield Mutant(kind, check, kernel, at, text, broken)


def count(
    target: str, checks: Sequence[Check], kinds: Sequence[str], sites: int
) -> tuple[dict[str, Counter[str]], list[Mutant]]:
    """For each kind how many mutants a fault or a wrong result shows; and those that nothing
    shows."""
    table: dict[str, Counter[str]] = {}
    unseen = []
    for check in checks:
        for mutant in mutants(check, target, kinds, sites):
            verdict = mutant.verdict(target)
            table.setdefault(mutant.kind, Counter())[verdict.partition(":")[0] or "unseen"] += 1
            if not verdict:
                unseen.append(mutant)
    return table, unseen


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", choices=("sm_80", "sm_90"), default="sm_80")
    parser.add_argument("--sites", type=int, default=2, help="of each kind in each kernel")
    parser.add_argument("--only", default="", help="a regular expression: kinds that match")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    kinds = [kind for kind in MUTATIONS if re.search(arguments.only, kind)]
    table, unseen = count(arguments.target, CHECKS, kinds, arguments.sites)
    columns = (f"broken, {arguments.target}", "mutants", "a fault", "a wrong result", "not seen")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for kind, found in table.items():
        numbers = (sum(found.values()), *(found[how] for how in ("fault", "wrong", "unseen")))
        print(f"| {kind} | {' | '.join(map(str, numbers))} |")
    print()
    for mutant in unseen:
        print(f"not seen: {mutant}")
    total = sum(sum(found.values()) for found in table.values())
    print(f"{total - len(unseen)} of {total} seen")
    wrong = [
        f"{kind}: {found['unseen']} not seen, at most {UNSEEN.get(kind, 0)} expected"
        for kind, found in table.items()
        if found["unseen"] > UNSEEN.get(kind, 0)
    ]
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
