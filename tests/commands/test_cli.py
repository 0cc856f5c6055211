"""The `fasttx` command: its table of commands, and where options may stand."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from fasttx.commands import cli, flags

ROOT = Path(__file__).resolve().parents[2]


def test_a_small_question_imports_nothing_optional() -> None:
    code = (
        "import sys\nfrom fasttx.commands import cli\n"
        "assert cli.main(['backends', '--device', 'cpu']) == 0\n"
        "assert not {'matplotlib', 'sklearn', 'datasets', 'pyarrow'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_table_is_what_the_commands_say() -> None:
    """And every command is in it."""
    found = {}

    class Commands:
        def add_parser(self, name, *, help, **options):
            found[name] = help
            return flags.Parser(name, **options)

    for name in cli.COMMANDS:
        importlib.import_module(f"fasttx.commands.{name}").add_command(Commands())
    assert found == cli.COMMANDS
    modules = (ROOT / "fasttx" / "commands").glob("*.py")
    assert set(cli.COMMANDS) == {p.stem for p in modules if "def add_command" in p.read_text()}


# --- where options may stand ----------------------------------------------------------------------


def parsed(*argv: str) -> argparse.Namespace:
    return cli.command_parser(argv[0]).parse_args(argv)


@pytest.mark.parametrize(
    "argv",
    [
        "predict --json --batch-size 3 RUN a b",
        "predict RUN --json a --batch-size=3 b",
        "predict RUN a b --batch-size 3 --json",
        "predict --batch 3 RUN a --js b",  # shortened
        "predict RUN --json --batch-size 3 -- a b",
        "predict RUN a --json --batch-size 3 -- b",
    ],
)
def test_options_may_stand_anywhere(argv: str) -> None:
    args = parsed(*argv.split())
    assert (str(args.run), args.text, args.json, args.batch_size) == ("RUN", ["a", "b"], True, 3)


def test_an_option_that_is_given_several_times() -> None:
    args = parsed(*"ensemble RUN --linear nb RUN2 --linear nbsvm --json RUN3".split())
    assert [str(run) for run in args.run] == ["RUN", "RUN2", "RUN3"]
    assert args.linear == ["nb", "nbsvm"] and args.json


def test_texts_that_look_like_options() -> None:
    args = parsed("predict", "RUN", "-5", "--json", "-a film -", "-", "-- no --", "-horrible film")
    assert args.text == ["-5", "-a film -", "-", "-- no --", "-horrible film"] and args.json
    assert parsed("predict", "RUN", "--file", "-").file == "-"
    assert parsed("predict", "RUN", "--", "--json", "-h").text == ["--json", "-h"]
    assert parsed("explain", "RUN", "--device", "cpu", "a text").text == "a text"


def refused(*argv: str, capsys) -> str:
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "fasttx: error: the following arguments are required: COMMAND (see --help)"),
        (["predict"], "fasttx predict: error: the following arguments are required: RUN"),
        (["predict", "R", "--jsn", "x"], "unrecognized arguments: --jsn; what begins with a dash"),
        (["predict", "R", "--file"], "argument --file: expected one argument"),
        (["predict", "R", "--file", "--json"], "argument --file: expected one argument"),
        (["predict", "R", "--batch-size", "0"], "--batch-size is 0; expected at least 1 text"),
        (["predict", "R", "--batch-size", "-3"], "--batch-size is -3; expected at least 1 text"),
        (["evaluate", "R", "--batch-size", "1000000000000"], "and at most 1,000,000"),
        (["ensemble", "R", "--batch-size", "9" * 5000], "--batch-size is 99999"),
        (["ensemble", "R", "--batch-size", "2.5"], "--batch-size is 2.5; expected at least 1"),
        (["predict", ""], "argument RUN: is ''" , ),
        (["report", "R", "--out", "a\0b"], "--out is 'a\\x00b'; expected the name of a file"),
        (["nonsense\x1b[2J"], "invalid choice: 'nonsense\\x1b[2J'"),
        (["doctor", "\x1b[31m"], "unrecognized arguments: \\x1b[31m"),
        (["backends", "\udcff\u202e"], "unrecognized arguments: \\udcff\\u202e"),
    ],
)  # fmt: skip
def test_an_error_is_one_line(argv: list[str], message: str, capsys) -> None:
    line = refused(*argv, capsys=capsys)
    assert message.replace("argument RUN: is", "RUN is") in line


@pytest.mark.parametrize("name", ["--out", "--resume", "--init-from", "--pseudo-labels"])
def test_home_is_expanded_in_every_path(name: str, monkeypatch, tmp_path: Path) -> None:
    from fasttx.commands.train import options

    monkeypatch.setenv("HOME", str(tmp_path))
    asked = options([f"{name}=~/x"])
    values = {"out": asked.out, "resume": asked.resume, **asked.settings}
    assert str(values[name[2:].replace("-", "_")]) == str(tmp_path / "x")


def test_home_is_expanded_in_the_commands(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for argv in (
        ["predict", "~/x", "--file=~/x"],
        ["evaluate", "~/x"],
        ["report", "~/x", "--out=~/x"],
        ["explain", "~/x", "text", "--html=~/x"],
        ["ensemble", "~/x", "--out=~/x"],
        ["baseline", "nb", "--out=~/x"],
        ["baseline", "lstm", "--out=~/x", "--resume=~/x"],
        ["pretrain", "--out=~/x", "--resume=~/x"],
    ):
        args = parsed(*argv)
        for name in ("run", "out", "resume", "html", "file"):
            value = getattr(args, name, None)
            for path in value if isinstance(value, list) else [value]:
                assert path is None or str(path) == str(tmp_path / "x"), (argv, name)
