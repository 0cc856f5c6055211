"""Flags that several command lines share, and those made from a configuration's settings."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fasttx.config import ModelConfig


class Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)


class RawEpilog(Formatter, argparse.RawDescriptionHelpFormatter):
    pass


def _kind(hint: Any) -> Any:
    """The type a flag's text is read as: the hint, less its `| None`."""
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None))
    return hint


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
        options |= {"type": kind, "metavar": {str: "NAME", int: "N", float: "X"}[kind]}
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
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder that train.py wrote")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


def add_json(parser: argparse.ArgumentParser, text: str = "JSON instead of text") -> None:
    parser.add_argument("--json", action="store_true", help=text)


def add_inference(parser: argparse.ArgumentParser, whose: str = "the run's") -> None:
    """How trained runs are asked."""
    parser.add_argument("--batch-size", type=int, default=64, help="texts at a time (default: 64)")
    add_device(parser)
    parser.add_argument("--attn-backend", help=f"instead of {whose} own choice")
    add_json(parser)


def add_out(parser: Any) -> None:
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="new run folder (default: runs/...)"
    )


def add_resume(parser: Any) -> None:
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with this run; takes no other settings"
    )
