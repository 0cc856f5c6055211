"""HTML pages in one file: no script, no external resource, light and dark, wide and narrow.

This module escapes all text that it is given; `content`, `body` and pictures are HTML already.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from fasttx.errors import CheckpointError
from fasttx.files import atomic_write, write_text_atomic
from fasttx.reporting.escaping import escaped
from fasttx.reporting.plots import Picture

CSS = """\
:root { color-scheme: light dark;
  --ink: #37352f; --grey: #6f6e69; --grid: #e6e5e2; --ground: #ffffff; --card: #f7f6f3;
  --blue: #0b6e99; --orange: #d9730d; --alarm: #b3261e; --for: 11 110 153; --against: 217 115 13; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6e4df; --grey: #a09e98; --grid: #3a3936; --ground: #191918; --card: #232321;
  --blue: #4fa8d1; --orange: #f09a4a; --alarm: #ff8a80; --for: 60 150 195;
  --against: 230 130 50; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 0 0 .5rem; }
h1, h2, h3, p, td, th, summary { overflow-wrap: break-word; }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
section { margin-top: 2.8rem; }
.kicker { color: var(--grey); font-size: .82rem; margin: 0 0 .1rem; }
.note, footer { color: var(--grey); font-size: .88rem; max-width: 46rem; }
.alarm { border: 2px solid var(--alarm); border-radius: .5rem; padding: .8rem 1rem;
  margin: 1.2rem 0; }
.alarm strong { color: var(--alarm); }
nav { font-size: .88rem; margin-top: 1.2rem; } nav a { margin-right: .9rem; }
nav a { color: var(--blue); display: inline-block; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem;
  margin: 1.4rem 0 0; padding: 0; }
.tiles div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.tiles dt { color: var(--grey); font-size: .8rem; }
.tiles dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
.tiles small { display: block; font-size: .76rem; font-weight: 400; color: var(--grey); }
.scroll { overflow-x: auto; }
figure { margin: .5rem 0; }
figure.wide { width: min(100vw - 2.5rem, 110rem); margin-left: 50%; transform: translateX(-50%); }
figure.wide .scroll > div { margin: 0 auto; }
figure svg { display: block; width: 100%; height: auto; }
figure text { font-family: inherit !important; }
figure image { image-rendering: pixelated; }
figcaption { color: var(--grey); font-size: .88rem; max-width: 46rem; margin-top: .4rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1.4rem .25rem 0; border-bottom: 1px solid var(--grid);
  vertical-align: top; }
th { color: var(--grey); font-weight: 500; }
td.number, th.number { text-align: right; white-space: nowrap; }
article { background: var(--card); border-radius: .5rem; padding: .9rem 1rem; margin: .8rem 0; }
article p { margin: .3rem 0; } article h3 { margin: 0; }
.text { margin: .4rem 0; line-height: 1.75; }
.text span { border-radius: .2rem; padding: .08em .1em; }
.unknown { text-decoration: underline dotted var(--grey); text-underline-offset: .2em; }
.cut { color: var(--grey); font-style: italic; }
.for { background: rgb(var(--for) / var(--a)); }
.against { background: rgb(var(--against) / var(--a)); }
details summary { cursor: pointer; color: var(--blue); margin: .6rem 0; }
@media (max-width: 40rem) { body { padding: 1.2rem .9rem 3rem; } h1 { font-size: 1.35rem; } }
@media print { details > * { display: block; } }
"""


def document(title: str, body: str) -> str:
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
img-src data:">
<title>{escaped(title)}</title>
<style>
{CSS}</style>
</head>
<body>
{body}
</body>
</html>
"""


def section(anchor: str, kicker: str, heading: str, *content: str) -> str:
    """`heading` states the finding and is escaped here; `content` is HTML."""
    inside = "\n".join(content)
    return (
        f'<section id="{anchor}">\n<p class="kicker">{escaped(kicker)}</p>\n'
        f"<h2>{escaped(heading)}</h2>\n{inside}\n</section>"
    )


def paragraph(text: str, kind: str = "note") -> str:
    return f'<p class="{kind}">{escaped(text)}</p>'


def alarm(text: str) -> str:
    return f'<div class="alarm" role="alert"><strong>Warning.</strong> {escaped(text)}</div>'


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """A tile for each (name, value, small print)."""
    cells = (
        f"<div><dt>{escaped(name)}</dt>"
        f"<dd>{escaped(value)}<small>{escaped(small)}</small></dd></div>"
        for name, value, small in figures
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """The first column is text; the others are right-aligned numbers, or text too."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ["", *([' class="number"'] if numbers else [""]) * (len(cells) - 1)]
        inside = "".join(
            f"<{tag}{kind}>{escaped(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True)
        )
        return f"<tr>{inside}</tr>"

    top = f"<thead>{line(head, 'th')}</thead>" if head else ""
    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def figure(
    drawn: Picture, caption: str = "", least: str = "34rem", most: str = "62rem", wide: bool = False
) -> str:  # fmt: skip
    """A picture as wide as the page, or, if `wide`, as the window; at most `most`. Below `least` it
    scrolls."""
    kind = ' class="wide"' if wide else ""
    below = f"<figcaption>{escaped(caption)}</figcaption>" if caption else ""
    return (
        f'<figure{kind}><div class="scroll"><div style="min-width: {least}; max-width: {most}">'
        f"{drawn.svg}</div></div>{below}</figure>"
    )


def check_place(out: Path, pictures: bool = False) -> None:
    """Raise CheckpointError where a page, and its pictures, could not be written to `out`: before
    minutes of work."""

    def refuse(why: str) -> NoReturn:
        raise CheckpointError(f"cannot write {out}: {why}")

    folder = out.parent
    if not folder.is_dir():
        there = next(p for p in (folder, *folder.parents) if p.exists() or p.is_symlink())
        if there.is_dir():
            refuse(f"the folder {folder} does not exist; create it first")
        refuse(f"{there} is no folder; expected one. Choose another name")
    if out.is_dir():
        refuse("it is a folder; expected the name of a file in it, such as report.html")
    if not os.access(folder, os.W_OK | os.X_OK):
        refuse(f"the folder {folder} may not be written; change its permissions, or choose another")
    beside = _picture_folder(out)
    if pictures and (beside.exists() or beside.is_symlink()) and not beside.is_dir():
        refuse(f"its pictures go to the folder {beside}, which is a file. Choose another name")


def _picture_folder(out: Path) -> Path:
    return out.with_suffix("") if out.suffix else out.with_name(f"{out.name}-pictures")


def write(out: Path, html: str, pictures: Mapping[str, Picture]) -> Path | None:
    """Write the page to `out`, and its pictures to a folder of that name, which is returned."""
    write_text_atomic(out, html)
    if not pictures:
        return None
    folder = _picture_folder(out)
    folder.mkdir(exist_ok=True)
    for name, drawn in pictures.items():
        with atomic_write(folder / f"{name}.png") as f:
            f.write(drawn.png)
    return folder
