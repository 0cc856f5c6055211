"""`fasttx explain RUN "text"`: one text's label, and what its words had to do with it."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from fasttx import terminal
from fasttx.commands import flags
from fasttx.config import MULTI_LABEL, SINGLE_LABEL
from fasttx.errors import ConfigError, DataError
from fasttx.load import TextClassifier, load
from fasttx.reporting import explain, page
from fasttx.reporting.attributions import explain as attribute


def _explain(args: argparse.Namespace) -> None:
    if args.html:
        page.check_place(args.html)
    # sdpa runs everywhere, and has gradients everywhere.
    model = load(args.run, device=args.device, attn_backend="sdpa")
    if len(model.label_names) < 2 and model.problem_type == SINGLE_LABEL:
        raise DataError(f"{args.run} knows one label only: there is no decision to explain")
    found = attribute(model, terminal.decoded(args.text), _label(model, args.label))
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    terminal.say_coloured(explain.terminal(found, colours))
    if args.html:
        page.write(args.html, explain.html(found, args.run.resolve().name), {})
        terminal.say(f"\n{args.html}: open it in a browser")


def _label(model: TextClassifier, name: str | None) -> int | None:
    """The number of the label that --label names. Raises ConfigError."""
    if name is None:
        return None
    if model.problem_type != MULTI_LABEL:
        raise ConfigError(
            f"--label is {name!r}, and the run is one of {model.problem_type}, of which the answer "
            f"is explained; leave it out: it is for {MULTI_LABEL}"
        )
    if name not in model.label_names:
        raise ConfigError(f"--label is {name!r}; expected one of {', '.join(model.label_names)}")
    return model.label_names.index(name)


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "explain", help="which words of a text spoke for its label, and where attention looked"
    )
    flags.add_run(parser)
    parser.add_argument("text", help="the text")
    parser.add_argument(
        "--html", type=flags.path, metavar="FILE", help="write a page with attention maps as well"
    )
    parser.add_argument(
        "--label", metavar="NAME", help="of a multi-label run: this label (default: the likeliest)"
    )
    flags.add_device(parser)
    parser.set_defaults(run_command=_explain)
