"""Flags that several command lines share, and those made from a configuration's settings."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fasttx import terminal
from fasttx.config import ModelConfig

# More texts at a time than this is a slip of the keyboard.
MOST_AT_A_TIME = 1_000_000
MOST_PROCESSES = 1024


class Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)


class RawEpilog(Formatter, argparse.RawDescriptionHelpFormatter):
    pass


class Parser(argparse.ArgumentParser):
    """Options may stand anywhere, between the other arguments too, and an error is one line.

    What it finds has the attribute `accepts`: all flags of the command, such as --json.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": Formatter, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which stops to look for further arguments once an option stands between.

        (Its own `parse_intermixed_args` knows no subcommands.)
        """
        if self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        given = list(sys.argv[1:] if args is None else args)
        found, unknown = super().parse_known_args(self._options_first(given), namespace)
        if unknown := [argument for argument in unknown if argument != "--"]:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{_hint(unknown)}")
        found.accepts = frozenset(self._option_string_actions)
        return found, unknown

    def _options_first(self, args: list[str]) -> list[str]:
        options: list[str] = []
        others: list[str] = []
        while args:
            argument = args.pop(0)
            if argument == "--":
                others += args
                break
            if not _is_option(argument):
                others.append(argument)
                continue
            options.append(argument)
            takes_one = "=" not in argument and self._takes_a_value(argument)
            if takes_one and args and not _is_option(args[0]) and args[0] != "--":
                options.append(args.pop(0))
        return [*options, "--", *others] if others else options

    def _takes_a_value(self, option: str) -> bool:
        """Options may be shortened, as long as it is clear which one is meant."""
        actions = self._option_string_actions
        names = [option] if option in actions else [n for n in actions if n.startswith(option)]
        return len({id(actions[n]) for n in names}) == 1 and actions[names[0]].nargs != 0

    def _print_message(self, message: str, file: Any = None) -> None:
        """The help, and the version. (argparse's own is silent where it cannot write.)"""
        if message:
            terminal.say(message.rstrip("\n"))

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): is ", r"\1 is ", message)
        message = message if len(message) <= 1000 else message[:1000] + "..."
        terminal.complain(f"{self.prog}: error: {terminal.one_line(message)} (see --help)")
        raise SystemExit(2)


def _is_option(argument: str) -> bool:
    """As argparse has it: no number, and no text that begins with a dash and has spaces."""
    return (
        argument.startswith("-")
        and len(argument) > 1
        and argument != "--"
        and not re.fullmatch(r"-\d+|-\d*\.\d+", argument)
        and (" " not in argument or (argument.startswith("--") and "=" in argument.split(" ")[0]))
    )


def _hint(unknown: Sequence[str]) -> str:
    dashed = any(argument.startswith("-") for argument in unknown)
    return "; what begins with a dash and is no option goes behind --" if dashed else ""


# --- what the text of an argument is read as ------------------------------------------------------


def path(text: str) -> Path:
    """A path; ~ is the home folder, also where no shell has seen to it (--out=~/x)."""
    return Path(path_text(text))


def path_text(text: str) -> str:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"is {text!r}; expected the name of a file or folder")
    return os.path.expanduser(text)


def _number(text: str, most: int, what: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= most:
        raise argparse.ArgumentTypeError(
            f"is {text[:40]}; expected at least 1 {what}, and at most {most:,}"
        )
    return number


def at_a_time(text: str) -> int:
    """A number of texts."""
    return _number(text, MOST_AT_A_TIME, "text at a time")


def processes(text: str) -> int:
    return _number(text, MOST_PROCESSES, "process")


def threads(text: str) -> int:
    return _number(text, MOST_PROCESSES, "thread")


def _kind(hint: Any) -> Any:
    """The type a flag's text is read as: the hint, less its `| None`."""
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None))
    return hint


# Settings whose values are paths.
PATHS = ("init_from", "pseudo_labels")


def add_settings(parser: argparse.ArgumentParser, cls: type, without: Collection[str] = ()) -> None:
    """A flag for each setting of a configuration, in its group."""
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if "group" in f.metadata and f.name not in without:
            title = f.metadata["group"]
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            add_setting(groups[title], cls, f.name, f.metadata["choices"])


def add_setting(parser: Any, cls: type, name: str, choices: Sequence[str] = ()) -> None:
    """The flag of one setting; not given, it leaves no value. The configuration checks the value,
    so that `choices` are for the help text."""
    kind = _kind(typing.get_type_hints(cls)[name])
    (text,) = (f.metadata["help"] for f in dataclasses.fields(cls) if f.name == name)
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif choices:
        options |= {"type": kind, "choices": choices}
    else:
        read_as = path_text if name in PATHS else kind
        options |= {"type": read_as, "metavar": {str: "NAME", int: "N", float: "X"}[kind]}
    parser.add_argument("--" + name.replace("_", "-"), **options)


def split(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the run, and those of its model."""
    of_model = {f.name for f in dataclasses.fields(ModelConfig)}
    return (
        {k: v for k, v in values.items() if k not in of_model},
        {k: v for k, v in values.items() if k in of_model},
    )


def refuse_beside_resume(
    parser: argparse.ArgumentParser, resume: Path | None, given: Mapping[str, Any]
) -> None:
    """End with a usage error where --resume stands beside other settings."""
    names = [name for name, value in given.items() if value is not None]
    if resume and names:
        parser.error(
            f"--resume takes its settings from {resume}/config.json; leave out "
            + ", ".join("--" + name.replace("_", "-") for name in names)
        )


# --- one flag, one help text ----------------------------------------------------------------------


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=path, help="a run folder that train.py wrote")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


def add_json(parser: argparse.ArgumentParser, text: str = "JSON instead of text") -> None:
    parser.add_argument("--json", action="store_true", help=text)


def add_inference(parser: argparse.ArgumentParser, whose: str = "the run's") -> None:
    """How trained runs are asked."""
    parser.add_argument(
        "--batch-size",
        type=at_a_time,
        default=64,
        metavar="N",
        help="texts at a time (default: 64)",
    )
    add_device(parser)
    parser.add_argument("--attn-backend", help=f"instead of {whose} own choice")
    add_json(parser)


def add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "bf16", "int8"),
        help="how products are computed; int8 on the CPU only (default: fp32)",
    )


def add_out(parser: Any) -> None:
    parser.add_argument(
        "--out", type=path, metavar="DIR", help="new run folder (default: runs/...)"
    )


def add_log_to(parser: Any) -> None:
    parser.add_argument(
        "--log-to",
        action="append",
        default=[],
        metavar="NAME",
        help="tensorboard, wandb, trackio or mlflow, beside metrics.jsonl; may be repeated",
    )


def add_resume(parser: Any) -> None:
    parser.add_argument(
        "--resume", type=path, metavar="RUN", help="go on with this run; takes no other settings"
    )
