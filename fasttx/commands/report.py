"""`fasttx report RUN`: all that a finished run has to show, on one HTML page, and as PNGs."""

from __future__ import annotations

import argparse
from typing import Any

from fasttx import terminal
from fasttx.commands import flags
from fasttx.reporting import html_report, page, plots
from fasttx.reporting.finished import open_run


def _report(args: argparse.Namespace) -> None:
    out = args.out or args.run / "report.html"
    plots.require_matplotlib()
    if args.out or args.run.is_dir():
        page.check_place(out, pictures=True)
    html, pictures = html_report.build(open_run(args.run, args.device))
    folder = page.write(out, html, pictures)
    terminal.say(f"{out}: open it in a browser; its {len(pictures)} pictures: {folder}/*.png")


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "report", help="one HTML page of a finished run: curves, confusion, calibration, mistakes"
    )
    flags.add_run(parser)
    parser.add_argument(
        "--out",
        type=flags.path,
        metavar="FILE",
        help="the page (default: RUN/report.html); PNGs go beside it",
    )
    flags.add_device(parser)
    parser.set_defaults(run_command=_report)
