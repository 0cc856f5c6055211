"""Figures from what `pytest benchmarks/` saved: python benchmarks/plots.py [saved.json ...]

Without arguments it draws what this machine saved last. Each figure is written to docs/ as SVG and
PNG, with the hardware and the commands below it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from attention_peers import ATTENTION_PEERS
from contest import backends
from figures import caption, saved_runs_folder
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from model_peers import PEERS

from fasttx.reporting.plots import GREY, STYLE

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "pytest benchmarks/ && python benchmarks/plots.py"
COLOURS = ("#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5")  # of fasttx's backends
GREYS = ("#5f5e5b", "#8a8985", "#a8a6a1", "#c2c0bb", "#77756f", "#b5b3ad", "#98968f")  # of peers
MARKERS = "osD^vPX*"
LIMIT = "#b3261e"


@dataclass(frozen=True)
class Measured:
    """A contest as it was last timed: the figures of each contestant, and where that was."""

    results: dict[str, dict[str, Any]]
    where: dict[str, Any]

    def are(self, **facts: Any) -> bool:
        return facts.items() <= next(iter(self.results.values())).items()


def contests(paths: list[Path]) -> list[Measured]:
    newest: dict[str, Measured] = {}
    for path in paths:
        saved = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, Measured] = {}
        for benchmark in saved["benchmarks"]:
            info = benchmark["extra_info"]
            if "contestant" in info and not info["artefact"]:
                one = found.setdefault(
                    benchmark["group"], Measured({}, saved["machine_info"]["fasttx"])
                )
                one.results[info["contestant"]] = info
        newest.update(found)
    return list(newest.values())


def style(name: str) -> dict[str, Any]:
    """A contestant looks the same in all figures: backends in colours, peers in greys."""
    ours = name.startswith("fasttx-")
    names = [*backends()] if ours else [*ATTENTION_PEERS, *PEERS]
    i = names.index(name) if name in names else len(names)
    colours = COLOURS if ours else GREYS
    return {
        "color": colours[i % len(colours)],
        "marker": MARKERS[i % len(MARKERS)],
        "linewidth": 2 if ours else 1.2,
    }


def samples_by_contestant(axes: Axes, found: list[Measured]) -> list[Measured]:
    drawn = [m for m in found if m.are(level="training", batch=32)][-1:]
    for measured in drawn:
        results = sorted(measured.results.values(), key=lambda result: result["samples_per_second"])
        names = [result["contestant"] for result in results]
        values = [result["samples_per_second"] for result in results]
        colours = [style(n)["color"] if n.startswith("fasttx-") else GREYS[3] for n in names]
        bars = axes.barh(names, values, color=colours, height=0.7)
        numbers = axes.bar_label(bars, [f"{v:,.1f}" for v in values], fontsize=9, padding=3)
        for number, result in zip(numbers, results, strict=True):
            # Beside the number, wherever that ends: a bar may be shorter than its note.
            axes.annotate(result["note"], (1, 0.5), (6, 0), number, textcoords="offset points",
                          fontsize=6.5, va="center", color=GREY)  # fmt: skip
        limit = 32e3 / results[0]["ideal_ms"]
        axes.axvline(limit, color=LIMIT, linestyle="--", linewidth=1)
        axes.text(limit, -0.9, f"its products alone: {limit:,.0f} ", color=LIMIT, ha="right")
        axes.set_ylim(-1.2, len(results) - 0.5)
        axes.set_xlabel("samples/s")
        axes.set_title(f"A training step, batch 32, {results[0]['lengths']}, dropout everywhere")
        axes.grid(axis="y", visible=False)
    return drawn


def _by_length(
    axes: Axes, found: list[Measured], value: Callable[[float, float], float]
) -> list[Measured]:
    """Attention on texts of one length each: value(ms, tokens) of every contestant, and limit."""
    lengths: dict[int, Measured] = {}
    for measured in found:
        if measured.are(level="attention", backward=True, p=0.1, dtype="float32"):
            length, _, rest = next(iter(measured.results.values()))["lengths"].partition(" ")
            if rest == "tokens each":
                lengths[int(length)] = measured
    lines: dict[str, list[tuple[int, float]]] = {}
    for length, measured in sorted(lengths.items()):
        for name, result in measured.results.items():
            lines.setdefault(name, []).append((length, value(result["ms"], result["tokens"])))
        lines.setdefault("limit", []).append((length, value(result["ideal_ms"], result["tokens"])))
    for name, line in sorted(lines.items(), key=lambda item: -item[1][-1][1]):
        look = style(name) if name != "limit" else {"color": LIMIT, "ls": "--", "linewidth": 1}
        axes.plot(*zip(*line, strict=True), label=name, markersize=5, **look)
    if lengths:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        # Powers of ten would need math text, which the style switches off.
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xticks(sorted(lengths), [str(n) for n in sorted(lengths)])
        axes.set_xlabel("tokens a text (8,192 tokens a batch)")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return list(lengths.values())


def throughput_by_length(axes: Axes, found: list[Measured]) -> list[Measured]:
    axes.set_title("Attention, forward + backward, dropout 0.1, fp32: throughput")
    axes.set_ylabel("tokens/s")
    return _by_length(axes, found, lambda ms, tokens: 1e3 * tokens / ms)


def time_by_length(axes: Axes, found: list[Measured]) -> list[Measured]:
    axes.set_title("Attention, forward + backward, dropout 0.1, fp32: time")
    axes.set_ylabel("ms a batch")
    return _by_length(axes, found, lambda ms, tokens: ms)


FIGURES = {
    "samples-per-second": samples_by_contestant,
    "attention-throughput": throughput_by_length,
    "attention-time": time_by_length,
}


def draw(name: str, found: list[Measured], folder: Path) -> bool:
    """One figure as SVG and PNG; False where nothing was saved for it."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    drawn = FIGURES[name](axes, found)
    if drawn:
        rounds = sorted({result["rounds"] for m in drawn for result in m.results.values()})
        n = "-".join(str(r) for r in dict.fromkeys((rounds[0], rounds[-1])))
        text = f"{caption(drawn[-1].where)}, n = {n}\n{COMMAND}"
        save(figure, folder / name, text)
    plt.close(figure)
    return bool(drawn)


def save(figure: Figure, path: Path, text: str) -> None:
    """As SVG and PNG, with the text below. Equal figures give equal bytes: no date is in them."""
    figure.supxlabel(text, fontsize=7, color=GREY, x=0.01, ha="left")
    for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        figure.savefig(path.with_name(f"{path.name}.{suffix}"), dpi=160, metadata=metadata)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("saved", nargs="*", type=Path, help="default: all that this machine saved")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    paths = arguments.saved or sorted(saved_runs_folder().glob("*/[0-9]*_*.json"))
    if not paths:
        sys.exit(f"no saved run in {saved_runs_folder()}: run `pytest benchmarks/` first")
    mpl.rcParams.update(STYLE)
    found = contests(paths)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        drawn = draw(name, found, arguments.folder)
        print(f"{name}: " + (f"{arguments.folder / name}.svg, .png" if drawn else "not measured"))


if __name__ == "__main__":
    main()
