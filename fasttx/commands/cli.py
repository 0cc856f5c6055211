"""The `fasttx` command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fasttx.commands import ending, flags
from fasttx.commands.ending import exit_status
from fasttx.version import __version__

# In the order of `fasttx --help`. Each is a module of this room, which has `add_command`, and is
# imported when it is asked for: most of them import torch.
COMMANDS = {
    "backends": "which attention backends run here",
    "doctor": "check and time every backend here; what a bug report should hold",
    "predict": "label texts with a trained run",
    "pretrain": "learn from texts without labels; for train.py --init-from",
    "evaluate": "measure a trained run on labelled texts",
    "report": "one HTML page of a finished run: curves, confusion, calibration, mistakes",
    "explain": "which words of a text spoke for its label, and where attention looked",
    "baseline": "fit and measure a simpler model on the splits of train.py",
    "ensemble": "several classifiers as one; and what they say of unlabelled texts",
    "export": "a run as ONNX, torch.export, AOTInductor or safetensors",
    "serve": "answer HTTP requests with a trained run",
    "verify": "whether the files of a run are those that it wrote (exit status 2 if not)",
}


def command_parser(*wanted: str) -> flags.Parser:
    """The parser of the command line; of the commands that are not `wanted` only their names."""
    parser = flags.Parser(
        "fasttx",
        description="Fast Transformer text classifiers. Training: python train.py --help",
    )
    parser.add_argument("--version", action="version", version=f"fasttx {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        if name in wanted:
            importlib.import_module(f"fasttx.commands.{name}").add_command(commands)
        else:
            commands.add_parser(name, help=summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    accepts: set[str] = set()

    def command() -> int | None:
        ending.quiet_start("fasttx")
        parser = command_parser(*[name for name in given if name in COMMANDS][:1])
        ending.started()
        args = parser.parse_args(given)
        if not getattr(args, "resume", None):  # beside which no other flag may stand
            accepts.update(args.accepts)
        return args.run_command(args)

    return exit_status("fasttx", command, accepts)


if __name__ == "__main__":
    sys.exit(main())
