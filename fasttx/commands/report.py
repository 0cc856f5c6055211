"""`fasttx report RUN`: all that a finished run has to show, on one HTML page, and as PNGs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fasttx.commands import flags
from fasttx.reporting import html_report, page
from fasttx.reporting.finished import open_run


def _report(args: argparse.Namespace) -> None:
    out = args.out or args.run / "report.html"
    if args.out:
        page.check_folder(out)  # before minutes of work
    html, pictures = html_report.build(open_run(args.run, args.device))
    folder = page.write(out, html, pictures)
    print(f"{out}: open it in a browser; its {len(pictures)} pictures: {folder}/*.png")


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "report", help="one HTML page of a finished run: curves, confusion, calibration, mistakes"
    )
    flags.add_run(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page (default: RUN/report.html); PNGs go beside it",
    )
    flags.add_device(parser)
    parser.set_defaults(run_command=_report)
