"""The question of one text: how long does its answer take, hot, after idling, beside a neighbour?

An engine's threads spin on for a while after a call, and would take time from whoever comes next.
So every contestant has a process of its own, which sleeps while the others are asked. The processes
take turns: some calls of each, round after round, at each length and in each condition.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import model_level
import numpy as np
import text_level
import torch
from contest import Contestant, Unavailable
from figures import align, caption
from workload import Setting, make_batches

from fasttx import device as devices
from fasttx.text.packing import RaggedIds

TOKENS = (1, 16, 64, 230)
HOT = "hot"  # one call after another
IDLE = "after idling"  # 20 to 50 ms before each call
BUSY = "beside a busy neighbour"  # one call after another, while a process spins on one core
CONDITIONS = (HOT, IDLE, BUSY)
CALLS = {HOT: 20, IDLE: 10, BUSY: 20}  # of a contestant in its turn, after some untimed ones
WARMUP = 5
NAMES = {"latency": model_level.inference_names, "text-latency": text_level.names}  # by level
SETTLE = 0.05  # seconds before a turn, in which the threads of the last one fall asleep


@dataclass(frozen=True)
class Latency:
    """A contestant's time for one text of so many tokens."""

    contestant: str
    condition: str
    tokens: int
    p50_ms: float
    p99_ms: float
    calls: int
    note: str


def lengths(setting: Setting) -> list[int]:
    return sorted({min(n, setting.config.max_len) for n in TOKENS})


def _entrants(setting: Setting, level: str) -> dict[str, Contestant]:
    """For one text of each length, the longest first: the first input is the one to be verified."""
    counts = lengths(setting)[::-1]
    if level == "text-latency":
        return text_level.entrants(text_level.Texts.one_by_one(setting, counts))
    rng = np.random.default_rng(0)
    drawn = [rng.integers(2, setting.config.vocab_size, n).tolist() for n in counts]
    batches = make_batches(RaggedIds.from_lists(drawn), 1, setting.device)
    return model_level.entrants(model_level.Model(setting, [[b] for b in batches], training=False))


def _serve(pipe: Any, setting: Setting, level: str, name: str, threads: int) -> None:
    """In a process of its own: enter the contest, then answer (input, calls, pause?) by seconds."""
    torch.set_num_threads(threads)
    contestant = _entrants(setting, level)[name]
    try:
        contestant.prepare()
        contestant.verify()
    except (Unavailable, AssertionError) as reason:
        pipe.send(reason)
        return
    pipe.send(contestant.note)
    rng = random.Random(0)
    with contextlib.suppress(EOFError):
        while True:
            i, calls, pause = pipe.recv()
            times = []
            for call in range(-WARMUP, calls):
                if pause and call >= 0:
                    time.sleep(rng.uniform(0.02, 0.05))
                start = time.perf_counter()
                contestant.step(i)
                devices.synchronize(setting.device)
                times.append(time.perf_counter() - start)
            pipe.send(times[WARMUP:])


class Processes:
    """The contestants that take part, each waiting in its process."""

    def __init__(self, setting: Setting, level: str, names: Sequence[str], threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # not fork: threads would be missing
        self.pipes: dict[str, Any] = {}
        self.notes: dict[str, str] = {}
        self._all = []
        for name in names:  # one by one: they build and verify at full speed
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, setting, level, name, threads))
            process.daemon = True
            process.start()
            there.close()
            self._all.append((process, here))
            try:
                answer = here.recv()
            except EOFError:  # a library failed, and has said so on standard error
                answer = Unavailable("its process ended before it answered")
            if isinstance(answer, Unavailable):
                print(f"{name} does not run here: {answer}")
            elif isinstance(answer, AssertionError):
                self.close()
                raise answer
            else:
                self.pipes[name], self.notes[name] = here, answer

    def seconds(self, name: str, i: int, condition: str) -> list[float]:
        pipe = self.pipes[name]
        pipe.send((i, CALLS[condition], condition == IDLE))
        return pipe.recv()

    def close(self) -> None:
        for process, pipe in self._all:
            pipe.close()
            process.join()


@contextlib.contextmanager
def _neighbour(condition: str) -> Iterator[None]:
    if condition != BUSY:
        yield
        return
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(0.2)
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


def measure(
    setting: Setting,
    level: str,
    names: Sequence[str],
    threads: int,
    *,
    rounds: int | None,
    seconds: float,
) -> list[Latency]:
    """rounds: by default as many as fit into `seconds`, but at least 3."""
    processes = Processes(setting, level, names or NAMES[level](), threads)
    places = list(enumerate(reversed(lengths(setting))))
    times: dict[tuple[str, str, int], list[float]] = {
        (name, condition, n): []
        for name in processes.pipes for condition in CONDITIONS for _, n in places
    }  # fmt: skip
    end, done = time.perf_counter() + seconds, 0
    try:
        while done < (rounds or 3) or (not rounds and time.perf_counter() < end):
            for condition in CONDITIONS:
                with _neighbour(condition):
                    for i, tokens in places:
                        for name in processes.pipes:
                            time.sleep(SETTLE)
                            found = processes.seconds(name, i, condition)
                            times[name, condition, tokens] += found
            done += 1
    finally:
        processes.close()
    return [
        Latency(
            name, condition, tokens, *(1e3 * float(np.percentile(s, q)) for q in (50, 99)), len(s),
            processes.notes[name],
        )
        for (name, condition, tokens), s in times.items()
    ]  # fmt: skip


def report(
    setting: Setting, level: str, found: Sequence[Latency], where: dict[str, Any], markdown: bool
) -> str:
    """A table for each condition: milliseconds, p50 and p99, by the number of tokens."""
    parts = [f"{title(setting, level)}\n{caption(where)}"]
    for condition in CONDITIONS:
        rows: dict[str, list[Latency]] = {}
        for x in sorted(found, key=lambda x: x.tokens):
            if x.condition == condition:
                rows.setdefault(x.contestant, []).append(x)
        tokens = [str(n) for n in lengths(setting)]
        calls = {x.calls for row in rows.values() for x in row}
        lines = [("contestant", *tokens, "")]
        for name, row in rows.items():
            lines.append((name, *(f"{x.p50_ms:.2f} / {x.p99_ms:.2f}" for x in row), row[0].note))
        if not any(line[-1] for line in lines):
            lines = [line[:-1] for line in lines]
        counted = ", ".join(map(str, calls))
        parts.append(f"{condition}, by tokens, n = {counted}:\n\n{align(lines, markdown)}")
    return "\n\n".join(parts)


def title(setting: Setting, level: str) -> str:
    question = {
        "latency": f"latency of one text, ids to logits, {setting.precision}",
        "text-latency": "latency of one text, text in, label out",
    }[level]
    return f"{question}, each contestant in a process of its own, ms, p50 / p99"


def records(found: Sequence[Latency]) -> list[dict[str, Any]]:
    return [asdict(x) for x in found]
