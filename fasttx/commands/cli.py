"""The `fasttx` command: its parser, and how every command line ends."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence

from fasttx.commands import (
    backends,
    baseline,
    doctor,
    ensemble,
    evaluate,
    explain,
    flags,
    predict,
    pretrain,
    report,
    verify,
)
from fasttx.errors import FasttxError
from fasttx.training.trainer import Interrupted
from fasttx.version import __version__

# In the order of `fasttx --help`; each has `add_command`.
COMMANDS = (
    backends,
    doctor,
    predict,
    pretrain,
    evaluate,
    report,
    explain,
    baseline,
    ensemble,
    verify,
)


def command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fasttx",
        description="Fast Transformer text classifiers. Training: python train.py --help",
        formatter_class=flags.Formatter,
    )
    parser.add_argument("--version", action="version", version=f"fasttx {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = command_parser().parse_args(argv)
    return exit_status("fasttx", lambda: args.run_command(args))


def exit_status(program: str, command: Callable[[], int | None]) -> int:
    """What `command` returns, or the status that its exception stands for, once that is shown."""
    try:
        return command() or 0
    except FasttxError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except Interrupted:
        return 130
    except BrokenPipeError:  # `fasttx predict ... | head`
        sys.stderr.close()
        return 1
    except Exception:
        traceback.print_exc()
        print(
            f"{program}: this is a defect of fasttx. Please report it, with the lines above and "
            "what `fasttx doctor` prints",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
