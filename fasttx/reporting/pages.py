"""What a page of a run is made of: sections, links to them, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fasttx.reporting import explain, page, plots
from fasttx.reporting.attributions import Explanation
from fasttx.reporting.escaping import escaped
from fasttx.reporting.finished import FinishedRun

MISTAKES = 8
MOST_WINDOWS = 20  # of a mistake that is explained: more would take minutes each
LONGEST_NAME = 60  # characters of a label

Tile = tuple[str, str, str]  # name, value, small print


@dataclass
class Pages:
    """The sections of a page, and its pictures by name; filled section by section."""

    sections: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    pictures: dict[str, plots.Picture] = field(default_factory=dict)

    def add(self, anchor: str, kicker: str, heading: str, *content: str) -> None:
        self.sections.append(page.section(anchor, kicker, heading, *content))
        self.links.append(f'<a href="#{anchor}">{escaped(kicker)}</a>')

    def draw(self, name: str, alt: str, draw: Callable[..., Any], *data: Any) -> plots.Picture:
        self.pictures[name] = plots.picture(name, alt, draw, *data)
        return self.pictures[name]


# --- what the kinds of problem share --------------------------------------------------------------


def named(run: FinishedRun) -> list[str]:
    """The names of the labels, short enough for a table."""
    return [plots.shortened(name, LONGEST_NAME) for name in run.names]


def explainable(run: FinishedRun, lengths: np.ndarray) -> np.ndarray:
    """(n,) bool: the texts that are not read in very many windows."""
    train = run.config.train
    most = MOST_WINDOWS * train.model.max_len
    return (lengths <= most) | (train.long_texts != "windows")


def attention_section(
    out: Pages, run: FinishedRun, chosen: Sequence[tuple[str, str, Explanation]]
) -> None:
    """The attention maps of texts: a key, what it is, and its explanation each."""
    maps = [
        explain.attention(out.draw, f"attention-{key}", what, found) for key, what, found in chosen
    ]
    if not any(maps):
        return
    size = run.config.train.model
    heading = f"Where {size.num_layers} layers of {size.num_heads} heads look, in two texts"
    if len(maps) == 1:
        heading = heading.replace("two texts", "one text")
    out.add("attention", "Attention maps", heading, page.paragraph(explain.ATTENTION_NOTE), *maps)
