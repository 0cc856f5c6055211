"""Flags of a command line, made from a configuration's settings."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
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
    """A flag for each setting of a configuration; one that is not given leaves no value."""
    hints = typing.get_type_hints(cls)
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if "group" not in f.metadata or f.name in without:
            continue
        title = f.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        flag, kind = "--" + f.name.replace("_", "-"), _kind(hints[f.name])
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f.metadata["help"]}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            metavar = {str: "NAME", int: "N", float: "X"}[kind]
            options |= {"type": kind, "metavar": metavar}
            if f.metadata["choices"]:
                options |= {"choices": f.metadata["choices"], "metavar": None}
        groups[title].add_argument(flag, **options)


def split(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the run, and those of its model."""
    of_model = {f.name for f in dataclasses.fields(ModelConfig)}
    return (
        {k: v for k, v in values.items() if k not in of_model},
        {k: v for k, v in values.items() if k in of_model},
    )


def refuse_beside_resume(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> None:
    """End with a usage error where --resume stands beside other settings."""
    resume = values["resume"]
    given = [k for k, v in values.items() if k != "resume" and v is not None]
    if resume and given:
        parser.error(
            f"--resume takes its settings from {resume}/config.json; leave out "
            + ", ".join("--" + name.replace("_", "-") for name in given)
        )
