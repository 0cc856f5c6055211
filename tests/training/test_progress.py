"""Log lines where they cannot be written, and what they cannot do to a terminal."""

from __future__ import annotations

import errno
import io
import logging
import sys
from pathlib import Path

import pytest

from fasttx.training.progress import console, log_file

log = logging.getLogger("fasttx")


def test_lines_cannot_steer_a_terminal(tmp_path: Path, capsys) -> None:
    with log_file(tmp_path / "train.log"), console():
        log.info("3 \x1b[2J, 4 \u202e\nnaïve")
    expected = "3 \\x1b[2J, 4 \\u202e\nnaïve\n"
    assert capsys.readouterr().out == expected
    assert (tmp_path / "train.log").read_text(encoding="utf-8").endswith(expected)


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_training_goes_on_where_a_line_cannot_be_written(capsys, monkeypatch) -> None:
    """It is said once, at its end, and nothing comes from `logging` itself."""
    monkeypatch.setattr(sys, "stdout", Full())
    done = []

    def training() -> None:
        with console():
            log.info("one")
            log.info("two")
            done.append(True)

    with pytest.raises(OSError, match="No space left on device: 'standard output'"):
        training()
    assert done and capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_under_train_log(capsys) -> None:
    with pytest.raises(OSError, match="/dev/full"), log_file(Path("/dev/full")), console():
        log.info("one")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("one\n", "")


def test_another_error_is_not_hidden_by_it(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", Full())

    def training() -> None:
        with console():
            log.info("one")
            raise KeyError

    with pytest.raises(KeyError):
        training()
