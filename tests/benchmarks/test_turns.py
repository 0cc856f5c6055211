"""How contestants take turns, and what is made of their times. Nothing here asserts a time."""

from __future__ import annotations

import math
import os

import contest as contests
import figures
import pytest
import side_by_side
import torch

CPU = torch.device("cpu")


class Recorder:
    """A contestant that writes down its steps."""

    note = ""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def prepare(self):
        self.log.append((self.name, "prepare"))

    def verify(self):
        self.log.append((self.name, "verify"))

    def step(self, i):
        self.log.append((self.name, i))


class RecordedLimit:
    rates, bandwidth = (), None

    def __init__(self, log):
        self.log = log

    def seconds(self, i):
        self.log.append(("limit", i))
        return 1e-3


def test_all_take_turns_on_the_same_input():
    log = []
    entrants = {name: Recorder(name, log) for name in ("peer", "fasttx-a", "fasttx-b")}
    made = contests.Contest("q", CPU, 3, 1, entrants, RecordedLimit(log))
    entered = side_by_side.enter_all(made, [])
    assert log == [(n, w) for n in entrants for w in ("prepare", "verify")]
    log.clear()
    found = side_by_side.take_turns(made, entered, rounds=5)
    turns = log[-20:]
    assert turns == [(n, r % 3) for r in range(5) for n in (*entrants, "limit")]
    assert [result.contestant for result in found] == [*entrants]
    assert {result.rounds for result in found} == {5}
    assert side_by_side.take_turns(made, entered, seconds=0.0)[0].rounds == 3  # time or not
    assert side_by_side.take_turns(made, entered, seconds=60.0)[0].rounds == 30  # enough


def test_figures_come_from_medians():
    made = contests.Contest("q", CPU, 1, 32, {n: Recorder(n, []) for n in ("fasttx-a", "peer")})
    times = {"fasttx-a": [0.1, 0.2, 9.0], "peer": [0.4, 0.3, 0.5]}
    nothing = dict.fromkeys(times, math.nan)
    ours, peer = figures.results(made, times, [0.05, 0.01, 0.06], nothing, nothing)
    assert ours.samples_per_second == pytest.approx(160)
    assert (ours.ratio, peer.ratio) == (pytest.approx(2), 1)
    assert ours.ms == pytest.approx(200)
    assert ours.limit_share == pytest.approx(0.25)
    assert ours.record()["peak_memory_mb"] is None
    alone = figures.results(made, {"fasttx-a": [0.1, 0.2]}, [0.1, 0.1], nothing, nothing)
    assert math.isnan(alone[0].ratio)  # no peer ran: nothing to be compared with
    assert "nan" not in figures.table(alone)


@pytest.mark.parametrize(
    ("milliseconds", "load", "artefact"),
    [
        ([8.0, 16.01, 7.99, 24.0], 9.0, True),
        ([31.99, 32.0, 32.02, 31.0], 9.0, True),
        ([8.0, 16.01, 7.99, 24.0], 0.0, False),  # nobody else was there
        ([8.4, 15.1, 9.3, 12.5], 9.0, False),
        ([0.01, 0.02, 0.01, 0.01], 9.0, False),  # near the multiple zero
        ([800.0, 1600.0, 800.0], 9.0, False),  # long: some multiple is always near
        ([8.0, 8.0], 9.0, False),
    ],
)
def test_time_slices_are_not_work(milliseconds, load, artefact):
    assert figures.scheduler_artefact([ms / 1e3 for ms in milliseconds], load) == artefact


def test_an_artefact_is_said_and_not_reported(monkeypatch):
    monkeypatch.setattr(figures, "load_average", lambda: 99.0)
    made = contests.Contest("q", CPU, 1, 1, {"peer": Recorder("peer", [])})
    nothing = {"peer": math.nan}
    found = figures.results(made, {"peer": [0.008, 0.016, 0.008]}, [math.nan], nothing, nothing)
    assert "scheduling, not work" in figures.table(found)
    assert "125.0" not in figures.table(found)


def test_the_table_in_markdown():
    made = contests.Contest("q", CPU, 1, 8, {n: Recorder(n, []) for n in ("peer", "fasttx-a")})
    some = {"peer": 3.0, "fasttx-a": 1.0}
    nothing = dict.fromkeys(some, math.nan)
    times = {"peer": [0.2, 0.2], "fasttx-a": [0.1, 0.1]}
    found = figures.results(made, times, [0.05, 0.05], some, nothing)
    lines = figures.table(found, markdown=True).splitlines()
    assert lines[0] == "| contestant | samples/s | ratio | ms (quartiles) | limit | MB |"
    assert lines[3] == "| fasttx-a | 80.0 | 2.00x | 100.0 (100.0-100.0) | 50 % | 1 |"


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux counts the peak")
def test_peak_memory_sees_what_a_step_needs_and_gives_back():
    size = 64
    assert side_by_side.peak_memory_mb(lambda: None, CPU) < size / 4
    peak = side_by_side.peak_memory_mb(lambda: torch.ones(size, 2**18).sum(), CPU)
    assert 0.9 * size < peak < 1.5 * size
