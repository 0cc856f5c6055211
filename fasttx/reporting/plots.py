"""The pictures of a report, drawn by matplotlib: SVG for the page, PNG for slides."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from fasttx.errors import PlotsError
from fasttx.reporting.escaping import escaped, printable
from fasttx.reporting.findings import LengthBins, Reliability, wilson
from fasttx.training.measures import ACCURACY, Measure
from fasttx.training.metrics import Metrics

# matplotlib's, which is imported when there is something to draw.
Axes: TypeAlias = Any
Figure: TypeAlias = Any

INK, GREY, GRID = "#37352f", "#6f6e69", "#e6e5e2"
BLUE, ORANGE = "#0b6e99", "#d9730d"
# In a page each colour is a CSS variable, so a picture fits light and dark mode.
VARIABLES = {INK: "--ink", GREY: "--grey", GRID: "--grid", BLUE: "--blue", ORANGE: "--orange"}

STYLE: Any = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.7, "font.size": 9,
    "font.family": "sans-serif", "axes.titlesize": 10, "axes.titlelocation": "left",
    "axes.edgecolor": GREY, "axes.labelcolor": INK, "axes.titlecolor": INK, "text.color": INK,
    "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "legend.frameon": False, "legend.fontsize": 8,
    "svg.hashsalt": "fasttx", "svg.fonttype": "none",  # text stays text: searched, read out loud
    "text.parse_math": False,  # a $ in a label or a text is a dollar
}  # fmt: skip

MOST_WORDS = 20  # in an attention map; more could not be read
MOST_LABELS = 200  # in a confusion matrix; more would be less than a pixel each
MOST_CELLS = 12  # a confusion matrix of more labels shows no counts


@dataclass(frozen=True)
class Picture:
    """svg: an element for an HTML page. png: the content of a file, on white."""

    svg: str
    png: bytes


def require_matplotlib() -> Any:
    """The package. Raises PlotsError where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise PlotsError(
            "pictures need the package matplotlib, which is not installed: "
            "pip install 'fasttx[report]'"
        ) from error
    return matplotlib


def picture(name: str, alt: str, draw: Callable[..., Figure], *data: Any) -> Picture:
    """`draw(*data)` in the common style. `name` keeps the ids of a page's pictures distinct.

    Raises PlotsError where matplotlib is missing.
    """
    mpl = require_matplotlib()
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # A page uses the reader's fonts. Only the PNG shows a box for a missing glyph.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = draw(*data)
        svg, png = io.BytesIO(), io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
        figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return Picture(inline(svg.getvalue().decode(), name, alt), png.getvalue())


def inline(svg: str, name: str, alt: str) -> str:
    """The <svg> element alone: full width, in the page's colours, with unique ids."""
    svg = svg[svg.index("<svg") :]
    for colour, variable in VARIABLES.items():
        svg = svg.replace(f": {colour}", f": var({variable})")
    referred = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))

    def identity(match: re.Match[str]) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in referred else ""

    svg = re.sub(r' id="([^"<>]+)"', identity, svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escaped(alt)}"', 1)


def _figure(width: float, height: float) -> Figure:
    from matplotlib import figure

    return figure.Figure(figsize=(width, height), layout="constrained")


def _shades(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as an image: blue, as opaque as the value."""
    image = np.empty((*values.shape, 4))
    image[..., :3] = [int(BLUE[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    image[..., 3] = values
    return image


def _percent_axis(axis: Any) -> None:
    axis.set_major_formatter(lambda share, _: f"{100 * share:.6g} %")


# --- the pictures ---------------------------------------------------------------------------------


def learning_curves(
    rows: Sequence[Mapping[str, Any]], steps_per_epoch: int, best: int, measure: Measure = ACCURACY
) -> Figure:
    """Loss and accuracy of the training split between log lines, and of validation by epoch; or
    what else is measured."""
    figure = _figure(9, 3.2)
    epochs = [row for row in rows if row["kind"] == "epoch"]
    between = [row for row in rows if row["kind"] == "train"]
    at = [row["epoch"] for row in epochs]
    curves = (
        ("loss", "loss", "Loss"),
        (measure.trained, measure.chosen, _capital(measure.chosen_title)),
    )
    same = measure.trained == measure.chosen
    for axes, (what, chosen, title) in zip(figure.subplots(1, 2), curves, strict=True):
        if between:
            places = [row["step"] / steps_per_epoch for row in between]
            axes.plot(places, [row[what] for row in between], color=GREY, alpha=0.55, lw=0.9,
                      label="training, between log lines")  # fmt: skip
        axes.plot(at, [row[f"train_{what}"] for row in epochs], "o--", color=ORANGE, lw=1.2,
                  markersize=4, label="training, mean of the epoch")  # fmt: skip
        axes.plot(at, [row[f"val_{chosen}"] for row in epochs], "o-", color=BLUE, lw=2,
                  markersize=5, label="validation")  # fmt: skip
        axes.axvline(best, color=GREY, lw=0.8, ls=":")
        axes.annotate("chosen", (best, 0), (-3, 3), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha="right", va="bottom", color=GREY,
                      fontsize=8)  # fmt: skip
        if what != "loss" and not same:
            title = f"{title}; in training: {measure.trained_title}"
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.set_xlim(0, at[-1] * 1.03)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if what != "loss" and measure.is_share:
            _percent_axis(axes.yaxis)
        else:
            axes.set_ylim(bottom=0)
        if what == "loss":
            axes.legend(loc="best")
    return figure


def _capital(title: str) -> str:
    return title[:1].upper() + title[1:]


def label_scores(names: Sequence[str], f1: np.ndarray, average_precision: np.ndarray) -> Figure:
    """F1 as a bar and average precision as a dot for each label (rows)."""
    figure = _figure(9, max(1.8, 0.7 + 0.28 * len(names)))
    axes = figure.subplots()
    places = np.arange(len(names))
    axes.barh(places, f1, 0.6, color=BLUE, alpha=0.45, label="F1 (probability at least 0.5)")
    axes.plot(average_precision, places, "o", color=ORANGE, markersize=5,
              label="average precision")  # fmt: skip
    axes.set_yticks(places, [shortened(name, 24) for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    _percent_axis(axes.xaxis)
    return figure


def predicted_against_true(predicted: np.ndarray, true: np.ndarray, name: str) -> Figure:
    """Left: a dot for each text; right: how often an error is how large."""
    figure = _figure(9, 3.8)
    left, right = figure.subplots(1, 2)
    both = np.concatenate([predicted, true])
    low, high = float(both.min()), float(both.max())
    left.plot([low, high], [low, high], color=GREY, lw=1, ls="--", label="predicted = true")
    alpha = float(np.clip(200 / max(len(true), 1), 0.05, 0.6))
    # Of very many texts an image: each dot would be an element of the page.
    left.plot(true, predicted, ".", color=BLUE, alpha=alpha, rasterized=len(true) > 2000)
    left.set_xlabel(f"true {shortened(name, 30)}")
    left.set_ylabel("predicted")
    left.legend(loc="upper left")
    right.hist(predicted - true, bins=40, color=BLUE, alpha=0.6)
    right.axvline(0, color=GREY, lw=1, ls="--")
    right.set_xlabel("predicted - true")
    right.set_ylabel("texts")
    return figure


def throughput(seconds: np.ndarray, rates: np.ndarray, mean: float) -> Figure:
    figure = _figure(9, 2.4)
    axes = figure.subplots()
    minutes = np.concatenate([[0.0], seconds]) / 60
    axes.stairs(rates, minutes, color=BLUE, lw=1.5, baseline=None)
    axes.axhline(mean, color=ORANGE, lw=1, ls="--")
    axes.annotate(f"mean {mean:,.1f}", (1, mean), (0, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", va="bottom", color=ORANGE)  # fmt: skip
    axes.set_ylim(0, 1.15 * max(mean, rates.max(initial=0.0)))
    axes.set_xlim(0, minutes[-1] or 1)
    axes.set_xlabel("minutes of training (evaluation not counted)")
    axes.set_ylabel("samples/s")
    return figure


def confusion(metrics: Metrics, names: Sequence[str]) -> Figure:
    """Rows: true label, columns: predicted; shade and percentage are shares of the row. Of many
    labels those with the most texts are shown."""
    shown = np.sort(np.argsort(-metrics.support, kind="stable")[:MOST_LABELS])
    names, classes = [names[i] for i in shown], len(shown)
    matrix, support = metrics.confusion_matrix[np.ix_(shown, shown)], metrics.support[shown]
    side = min(9.0, max(3.6, 1.4 + 0.75 * classes))
    figure = _figure(side + 0.8, side)
    axes = figure.subplots()
    share = matrix / np.maximum(support, 1)[:, None]
    axes.imshow(_shades(share), interpolation="none")
    if classes <= MOST_CELLS:
        for (i, j), count in np.ndenumerate(matrix):
            axes.text(j, i, f"{count:,}\n{100 * share[i, j]:.1f} %", ha="center", va="center",
                      color="white" if share[i, j] > 0.5 else INK, fontsize=8)  # fmt: skip
    short = [shortened(name, 18) for name in names]
    size = 9 if classes <= MOST_CELLS else max(3.0, 110 / classes)
    turned: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    crowded = classes > 4 or max(map(len, short)) > 10
    axes.set_xticks(range(classes), short, fontsize=size, **(turned if crowded else {}))
    axes.set_yticks(range(classes), short, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    _bare(axes)
    return figure


def _bare(axes: Axes) -> None:
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def shortened(text: str, most: int) -> str:
    text = printable(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def reliability_diagram(found: Reliability) -> Figure:
    figure = _figure(6, 4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    width = found.high - found.low
    middle = (found.low + found.high) / 2
    above.bar(middle, found.accuracy, width * 0.92, color=BLUE, alpha=0.45, label="accuracy")
    above.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", label="perfect calibration")
    above.plot(found.confidence, found.accuracy, "o", color=ORANGE, markersize=4,
               label="mean confidence of the bin")  # fmt: skip
    above.vlines(found.confidence, *wilson(found.accuracy * found.count, found.count),
                 color=ORANGE, lw=1)  # fmt: skip
    above.set_ylabel("accuracy")
    above.set_ylim(0, 1.02)
    above.legend(loc="upper left")
    below.bar(middle, found.count / found.count.sum(), width * 0.92, color=GREY, alpha=0.6)
    below.set_ylabel("texts")
    below.set_xlabel("confidence: the probability of the predicted label")
    below.set_xlim(0, 1)
    for axis in (above.yaxis, below.xaxis, below.yaxis):
        _percent_axis(axis)
    return figure


def accuracy_by_length(bins: LengthBins, limit: int, of: str = "what is read") -> Figure:
    """Accuracy by length, with 95 % Wilson intervals. limit: the number of words in `of`."""
    figure = _figure(9, 3.2)
    axes = figure.subplots()
    places = np.arange(len(bins.count))
    low, high = wilson(bins.right, bins.count)
    axes.vlines(places, low, high, color=BLUE, lw=1.5)
    axes.plot(places, bins.accuracy, "o-", color=BLUE, lw=1, markersize=6)
    mean = bins.right.sum() / bins.count.sum()
    axes.axhline(mean, color=GREY, lw=0.8, ls="--")
    axes.annotate("all texts", (1, mean), (-2, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", color=GREY, fontsize=8)  # fmt: skip
    cut = int(np.searchsorted(bins.longest, limit, side="right"))  # the first bin with longer ones
    if cut < len(places):
        axes.axvspan(cut - 0.5, places[-1] + 0.5, color=GREY, alpha=0.12, lw=0)
        axes.annotate(f"longer than {of}: {limit} words", (cut - 0.5, 1.02),
                      xycoords=("data", "axes fraction"), color=GREY, fontsize=8)  # fmt: skip
    labels = [
        (f"{a:,}" if a == b else f"{a:,}-{b:,}") + f"\nn = {n:,}"
        for a, b, n in zip(bins.shortest, bins.longest, bins.count, strict=True)
    ]
    axes.set_xticks(places, labels)
    axes.set_xlim(-0.5, places[-1] + 0.5)
    axes.set_xlabel("words of the text")
    axes.set_ylabel("accuracy")
    axes.grid(axis="x", visible=False)
    _percent_axis(axes.yaxis)
    return figure


def most_attended(attention: np.ndarray, most: int = MOST_WORDS) -> np.ndarray:
    """Indices, in the order of the text, of the words that receive most attention.

    attention (layers, heads, n, n) is averaged over layers, heads and queries.
    """
    received = attention.mean((0, 1, 2)) if attention.size else np.zeros(attention.shape[-1])
    return np.sort(np.argsort(-received, kind="stable")[:most])


def attention_maps(attention: np.ndarray, words: Sequence[str]) -> Figure:
    """A map for each head (columns) of each layer (rows): `attention` (layers, heads, n, n)."""
    kept = most_attended(attention)
    layers, heads = attention.shape[:2]
    labels = [shortened(words[k], 12) for k in kept]
    # All maps have one scale, to be comparable; the square root shows small weights.
    strongest = max(float(attention[..., kept[:, None], kept].max()), 1e-12)
    side = 0.9 + 0.065 * len(kept)  # inches
    size = min(7.0, 0.75 * 72 * side / len(kept))
    figure = _figure(1.0 + side * heads, 0.9 + (side + 0.12) * layers)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    grid = figure.subplots(layers, heads, squeeze=False)
    for (layer, head), axes in np.ndenumerate(grid):
        weights = attention[layer, head][np.ix_(kept, kept)]
        axes.imshow(_shades(np.sqrt(weights / strongest)), interpolation="none")
        _bare(axes)
        left, bottom = head == 0, layer == layers - 1
        axes.set_yticks(range(len(kept)) if left else [], labels if left else [], fontsize=size)
        axes.set_xticks(range(len(kept)) if bottom else [], labels if bottom else [],
                        fontsize=size, rotation=90)  # fmt: skip
        axes.tick_params(pad=1)
        for edge in axes.spines.values():
            edge.set(visible=True, color=GRID)
        axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=6, pad=2, color=GREY)
    return figure
