"""`fasttx verify`: whether the files of a run are those that it wrote."""

from __future__ import annotations

import argparse
from typing import Any

from fasttx import terminal
from fasttx.commands import flags
from fasttx.errors import CheckpointError
from fasttx.training.folder import Manifest, RunFolder, problem_of


def _verify(args: argparse.Namespace) -> int:
    folder = RunFolder(args.run)
    files, manifest = folder.files(), Manifest(folder.path)
    if not files:
        raise CheckpointError(f"{folder.path} holds no file of a fasttx run")
    if args.accept:
        folder.seal()
        terminal.say(f"{manifest.path}: {len(files)} files entered as they are now")
        return 0
    if not manifest.exists():
        raise CheckpointError(
            f"{folder.path} has no manifest.json to compare its files with, as runs of earlier "
            f"versions have none. To enter its files as they are now: fasttx verify {folder.path} "
            "--accept"
        )
    entries = manifest.entries()
    problems = {path.name: problem_of(path, path.read_bytes(), entries) for path in files}
    problems |= {name: "is missing" for name in entries if name not in problems}
    # What a run appends to is entered when it ends.
    if not folder.results.exists() and folder.metrics.name not in entries:
        problems.pop(folder.metrics.name, None)
    for name, problem in sorted(problems.items()):
        terminal.say(f"{name:22}  {problem or 'as it was written'}")
    return 2 if any(problems.values()) else 0


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "verify", help="whether the files of a run are those that it wrote (exit status 2 if not)"
    )
    flags.add_run(parser)
    parser.add_argument(
        "--accept",
        action="store_true",
        help="enter the files as they are now, after you changed one on purpose",
    )
    parser.set_defaults(run_command=_verify)
