"""Figures from what `pytest benchmarks/` saved: python benchmarks/plots.py [saved.json ...]

Without arguments, from the newest runs of this machine. Each figure is written to docs/ as SVG and
PNG, with the hardware and the commands below it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from figures import caption, saved_runs_folder
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "pytest benchmarks/ && python benchmarks/plots.py"
OURS = ("#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5")
PEERS = ("#5f5e5b", "#8a8985", "#a8a6a1", "#c2c0bb", "#77756f", "#b5b3ad", "#98968f")
MARKERS = "osD^vPX"
LIMIT = "#b3261e"

Figures = dict[str, dict[str, Any]]  # of a contest, by contestant


def contests(paths: list[Path]) -> tuple[list[Figures], dict[str, Any]]:
    """Each contest as it was last run, contestants together, and where the last run was."""
    newest: dict[str, Figures] = {}
    where: dict[str, Any] = {}
    for path in paths:
        saved = json.loads(path.read_text(encoding="utf-8"))
        where = saved["machine_info"]["fasttx"]
        found: dict[str, Figures] = {}
        for benchmark in saved["benchmarks"]:
            info = benchmark["extra_info"]
            if "contestant" in info and not info["artefact"]:
                found.setdefault(benchmark["group"], {})[info["contestant"]] = info
        newest.update(found)
    return list(newest.values()), where


def chosen(found: list[Figures], **wanted: Any) -> list[Figures]:
    """The contests whose facts are these."""
    return [c for c in found if wanted.items() <= next(iter(c.values())).items()]


class Style:
    """One colour a contestant: fasttx's backends in colours, peers in greys."""

    def __init__(self, names: list[str]) -> None:
        ours = [name for name in names if name.startswith("fasttx-")]
        peers = [name for name in names if name not in ours]
        self.colour = {name: OURS[i % len(OURS)] for i, name in enumerate(ours)}
        self.colour |= {name: PEERS[i % len(PEERS)] for i, name in enumerate(peers)}
        self.marker = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate([*ours, *peers])}


def samples_by_contestant(axes: Axes, found: list[Figures]) -> bool:
    contests = chosen(found, level="training", batch=32)
    if not contests:
        return False
    rows = sorted(contests[0].values(), key=lambda row: row["samples_per_second"])
    names = [row["contestant"] for row in rows]
    values = [row["samples_per_second"] for row in rows]
    colours = Style(names).colour
    bars = axes.barh(names, values, color=[colours[name] for name in names], height=0.7)
    axes.bar_label(bars, [f" {value:,.1f}" for value in values], fontsize=9)
    limit = 32e3 / rows[0]["ideal_ms"]
    axes.axvline(limit, color=LIMIT, linestyle="--", linewidth=1)
    axes.text(
        limit, -0.9, f"the products alone: {limit:,.0f} ", color=LIMIT, ha="right", fontsize=9
    )
    axes.set_ylim(-1.2, len(rows) - 0.5)
    axes.set_xlabel("samples/s")
    axes.set_title(f"A training step, batch 32, {rows[0]['lengths']}, dropout everywhere")
    axes.grid(axis="y", visible=False)
    return True


def _by_length(found: list[Figures]) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """Of each contestant, (length, figures) of attention on texts of one length."""
    lines: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for contest in chosen(found, level="attention", backward=True, p=0.1, dtype="float32"):
        for name, row in contest.items():
            length, _, rest = row["lengths"].partition(" ")
            if rest == "tokens each":
                lines.setdefault(name, []).append((int(length), row))
    return {name: sorted(line, key=lambda x: x[0]) for name, line in lines.items()}


def _lines(axes: Axes, found: list[Figures], value: Callable[[dict[str, Any]], float],
           ideal: Callable[[dict[str, Any]], float]) -> bool:  # fmt: skip
    lines = _by_length(found)
    if not lines:
        return False
    style = Style(list(lines))
    for name, line in lines.items():
        lengths, values = [n for n, _ in line], [value(row) for _, row in line]
        ours = name.startswith("fasttx-")
        axes.plot(lengths, values, color=style.colour[name], marker=style.marker[name],
                  markersize=5, linewidth=2 if ours else 1.2, label=name)  # fmt: skip
    longest = max(lines.values(), key=len)
    limits = [ideal(row) for _, row in longest]
    lengths = [n for n, _ in longest]
    axes.plot(lengths, limits, color=LIMIT, linestyle="--", linewidth=1, label="limit")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set_xlabel("tokens a text (8,192 tokens a batch)")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return True


def throughput_by_length(axes: Axes, found: list[Figures]) -> bool:
    axes.set_title("Attention, forward + backward, dropout 0.1, fp32: throughput")
    axes.set_ylabel("tokens/s")
    return _lines(axes, found, lambda r: 1e3 * r["tokens"] / r["ms"],
                  lambda r: 1e3 * r["tokens"] / r["ideal_ms"])  # fmt: skip


def time_by_length(axes: Axes, found: list[Figures]) -> bool:
    axes.set_title("Attention, forward + backward, dropout 0.1, fp32: time")
    axes.set_ylabel("ms a batch")
    return _lines(axes, found, lambda r: r["ms"], lambda r: r["ideal_ms"])


FIGURES = {
    "samples-per-second": samples_by_contestant,
    "attention-throughput": throughput_by_length,
    "attention-time": time_by_length,
}


def draw(name: str, found: list[Figures], where: dict[str, Any], folder: Path) -> Figure | None:
    """One figure as SVG and PNG; None where nothing was saved for it."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if not FIGURES[name](axes, found):
        plt.close(figure)
        return None
    text = f"{caption(where)}\n{COMMAND}"
    figure.supxlabel(text, fontsize=7, color="#5f5e5b", x=0.01, ha="left")
    for suffix in ("svg", "png"):
        # No date in the file: equal figures give equal bytes.
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        figure.savefig(folder / f"{name}.{suffix}", dpi=160, metadata=metadata)
    plt.close(figure)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("saved", nargs="*", type=Path, help="default: all runs of this machine")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    paths = arguments.saved or sorted(saved_runs_folder().glob("*/[0-9]*_*.json"))
    if not paths:
        sys.exit(f"no saved run in {saved_runs_folder()}: run `pytest benchmarks/` first")
    mpl.rcParams.update({
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": "#e6e5e2", "grid.linewidth": 0.7, "font.size": 9,
        "axes.titlesize": 11, "axes.titlelocation": "left", "svg.hashsalt": "fasttx",
    })  # fmt: skip
    found, where = contests(paths)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        drawn = draw(name, found, where, arguments.folder)
        print(f"{name}: " + (f"{arguments.folder / name}.svg, .png" if drawn else "not measured"))


if __name__ == "__main__":
    main()
