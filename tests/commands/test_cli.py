"""How a command line ends, and what it costs to ask it for little."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fasttx.commands import cli
from fasttx.errors import DataError
from fasttx.training.trainer import Interrupted

ROOT = Path(__file__).resolve().parents[2]


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (lambda: None, 0),
        (lambda: 1, 1),
        (raising(DataError("no text")), 2),
        (raising(Interrupted()), 130),
    ],
)
def test_a_command_ends_with_a_status(command, status: int, capsys) -> None:
    assert cli.exit_status("fasttx", command) == status
    said = capsys.readouterr()
    assert said.err == ("fasttx: error: no text\n" if status == 2 else "")
    assert said.out == ""


def test_a_defect_shows_where_it_is_and_asks_for_a_report(capsys) -> None:
    assert cli.exit_status("train.py", raising(IndexError("list index out of range"))) == 1
    *lines, last = capsys.readouterr().err.splitlines()
    assert "Traceback" in lines[0]
    assert lines[-1] == "IndexError: list index out of range"
    assert last.startswith("train.py: this is a defect of fasttx. Please report it")
    assert "fasttx doctor" in last


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
