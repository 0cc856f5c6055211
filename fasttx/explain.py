"""`fasttx explain RUN "text"`: one text's label, and what its words had to do with it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from fasttx import classifier, html_report, page, plots
from fasttx.attributions import Explanation, explain
from fasttx.data import DataError
from fasttx.findings import percent

# 256-colour backgrounds under black: from faint to full, for and against the label.
_FOR = (195, 153, 117, 75)
_AGAINST = (230, 223, 216, 209)


def coloured(found: Explanation) -> str:
    """The words for a terminal: blue speaks for the label, orange against it."""
    scale = max(float(abs(found.attributions).max(initial=0.0)), 1e-12)
    pieces = []
    for i, (word, value) in enumerate(zip(found.words, found.attributions.tolist(), strict=True)):
        if found.words_left_out and i == found.left_out_at:
            pieces.append(_left_out(found))
        shown, level = page.printable(word), int(abs(value) / scale * (len(_FOR) + 0.999))
        if level:
            colour = (_FOR if value > 0 else _AGAINST)[level - 1]
            shown = f"\x1b[30;48;5;{colour}m{shown}\x1b[0m"
        pieces.append(shown)
    if found.words_left_out and found.left_out_at == len(found.words):
        pieces.append(_left_out(found))
    return " ".join(pieces)


def _left_out(found: Explanation) -> str:
    return f"[{found.words_left_out} words not read]"


def plain(found: Explanation) -> str:
    """A line a word, the strongest first: `word +0.12`, a repeated word added up."""
    ranked = sorted(
        (pair for side in found.ranked() for pair in side), key=lambda pair: -abs(pair[1])
    )
    return "\n".join(f"{page.printable(word)} {value:+.2f}" for word, value in ranked)


def terminal(found: Explanation, colours: bool) -> str:
    head = f"{page.printable(found.label)}  {percent(found.probability, 2)}"
    foot = (
        f"margin over {page.printable(found.rival)} {found.margin:+.2f}: as many unknown words "
        f"{found.baseline_margin:+.2f}, these words {found.attributions.sum():+.2f} (logits)"
    )
    body = coloured(found) if colours else plain(found)
    return "\n\n".join(part for part in (head, body, foot) if part)


def html(found: Explanation, run: str) -> str:
    """One page: the shaded text, every word's number, the attention maps."""
    heading = f"{found.label}, {percent(found.probability, 2)} sure"
    maps = html_report.attention(plots.picture, "attention", "This text", found)
    ranked = sorted(
        (pair for side in found.ranked() for pair in side), key=lambda pair: -abs(pair[1])
    )
    rows = [[word, f"{value:+.3f}"] for word, value in ranked]
    body = [
        f'<p class="kicker">{page.escaped(f"fasttx, run {run}")}</p>',
        f"<h1>{page.escaped(heading)}</h1>",
        html_report.article(found, f"{len(found.words)} words"),
        page.paragraph(page.ATTRIBUTION_NOTE),
        f"<details><summary>{len(rows)} words by what they add</summary>",
        page.table(("word", "logits"), rows),
        "</details>",
    ]
    if maps:
        layers, heads = found.attention.shape[:2]
        title = f"Where {layers} layers of {heads} heads look"
        note = page.paragraph(page.ATTENTION_NOTE)
        body.append(page.section("attention", "Attention maps", title, note, maps))
    return page.document(heading, "\n".join(body))


def _explain(args: argparse.Namespace) -> None:
    # sdpa runs everywhere, and has gradients everywhere.
    model = classifier.load(args.run, device=args.device, attn_backend="sdpa")
    if len(model.label_names) < 2:
        raise DataError(f"{args.run} knows one label only: there is no decision to explain")
    found = explain(model, args.text)
    print(terminal(found, sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    if args.html:
        html_report.write(Path(args.html), html(found, Path(args.run).resolve().name), {})
        print(f"\n{args.html}: open it in a browser")


def add_command(commands: Any) -> None:
    """`fasttx explain`, among the subparsers `commands`."""
    parser = commands.add_parser(
        "explain", help="which words of a text spoke for its label, and where attention looked"
    )
    parser.add_argument("run", metavar="RUN", help="a run folder that train.py wrote")
    parser.add_argument("text", help="the text")
    parser.add_argument("--html", metavar="FILE", help="write a page with attention maps as well")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.set_defaults(run_command=_explain)
