"""What pytest-benchmark lacks: a contest's fixtures, the table side by side, a place for figures.

pytest-benchmark times each contestant by itself, which serves `--benchmark-compare`. After the last
test of a contest its contestants are timed once more, in turn (side_by_side.take_turns). From there
come the table at the end and the figures in the saved JSON.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import figures
import pytest
import side_by_side
from contest import Contest, Unavailable
from workload import Setting

from fasttx import device as devices

SECONDS = 10.0  # a contest's rounds side by side, three at least

reports = pytest.StashKey[list[str]]()
remarks = pytest.StashKey[list[str]]()


# ------------------------------------------------------------------------------- saving, comparing


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    config.stash[reports], config.stash[remarks] = [], []
    if option.benchmark_storage == "file://./.benchmarks":  # pytest-benchmark's default
        option.benchmark_storage = f"file://{figures.saved_runs_folder()}"
    if not option.benchmark_save and not option.benchmark_disable:
        option.benchmark_autosave = option.benchmark_autosave or "run"
    folder = Path(option.benchmark_storage.removeprefix("file://"))
    local = option.benchmark_storage.startswith("file://")
    if local and option.benchmark_compare is True and not any(folder.glob("*/[0-9]*_*.json")):
        # The first time there is nothing to be compared with; that is no fault.
        option.benchmark_compare, option.benchmark_compare_fail = [], []
        config.stash[remarks].append(
            f"No run of this machine was saved before in {folder}, so there is nothing to compare "
            "with. This run is saved; the next one is compared with it."
        )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    machine_info["fasttx"] = figures.environment(devices.pick())


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, machine_info: Any, compared_benchmark: Any
) -> None:
    """Say what else has changed since; pytest-benchmark's own warning holds the whole of both, and
    fails where the storage is not below the current folder."""
    then, now = compared_benchmark["machine_info"].get("fasttx", {}), machine_info["fasttx"]
    changed = [
        f"{key} {then.get(key)} then, {now[key]} now"
        for key in now
        if key != "load" and then.get(key) != now[key]
    ]
    if changed:
        config.stash[remarks].append(f"Not only the code has changed: {'; '.join(changed)}.")
    compared_benchmark["machine_info"] = machine_info


# ---------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def setting(pytestconfig: pytest.Config) -> Setting:
    """Full size where times are taken; small where pytest-benchmark is told not to."""
    if pytestconfig._benchmarksession.disabled:
        return Setting.small(devices.pick())
    return Setting(devices.pick(), os.environ.get("FASTTX_DATA"))


@pytest.fixture(scope="module")
def contest(
    request: pytest.FixtureRequest, setting: Setting, pytestconfig: pytest.Config
) -> Iterator[Contest]:
    """The contest that the test's parameter makes; at its end, its contestants side by side."""
    try:
        made = request.param(setting)
    except Unavailable as reason:
        pytest.skip(str(reason))
    yield made
    infos = made.infos
    if infos and not pytestconfig._benchmarksession.disabled:
        made.warmup = 1  # each has just run
        found = side_by_side.take_turns(made, {n: made.entered[n] for n in infos}, seconds=SECONDS)
        for result in found:
            infos[result.contestant].update(made.facts, **result.record())
        where = figures.environment(made.device)
        pytestconfig.stash[reports].append(figures.report(made, found, where))


@pytest.fixture
def compete(benchmark: Any, contest: Contest) -> Callable[[str], None]:
    """Verify a contestant, then let pytest-benchmark time its steps."""

    def compete(name: str) -> None:
        try:
            contestant = contest.enter(name)
        except Unavailable as reasons:
            pytest.skip(f"{name}: {reasons}")
        benchmark.group = contest.title
        turn = itertools.cycle(range(contest.inputs))

        def step() -> float:
            return side_by_side.timed(contestant.step, next(turn), contest.device)

        first = step()  # the warm-up, and how long it takes
        rounds = 1 if first > 5 else max(3, min(50, int(2 / first)))
        benchmark.pedantic(step, rounds=rounds)
        contest.infos[name] = benchmark.extra_info

    return compete


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for report in config.stash[reports]:
        terminalreporter.section("side by side")
        terminalreporter.write_line(report)
    for remark in config.stash[remarks]:
        terminalreporter.write_line(f"\n{remark}")
