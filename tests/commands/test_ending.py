"""How a command line ends: one line and a status for whatever a person can mend."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fasttx.commands import cli, ending
from fasttx.errors import BackendUnavailableError, DataError, Interrupted
from fasttx.files import write_text_atomic

ROOT = Path(__file__).resolve().parents[2]


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


def ended(error: BaseException, capsys, accepts=()) -> tuple[int, list[str]]:
    status = ending.exit_status("fasttx", raising(error), accepts)
    return status, capsys.readouterr().err.splitlines()


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


@pytest.mark.parametrize(
    "name",
    "ENOSPC EROFS EACCES EPERM ENOENT ENOTDIR EISDIR EEXIST ENAMETOOLONG ELOOP EMFILE EIO EDQUOT "
    "EFBIG EBUSY ESTALE EXDEV ENODEV".split(),
)
def test_an_error_of_the_system_names_the_file_and_what_to_do(name: str, capsys) -> None:
    number = getattr(errno, name)
    error = OSError(number, os.strerror(number), "/some/where\x1b[2J")
    status, (line,) = ended(error, capsys)
    assert status == 2
    assert line.startswith(f"fasttx: error: /some/where\\x1b[2J: {os.strerror(number)}. ")
    assert line.rsplit(". ", 1)[1], "what to do"


def test_a_name_with_line_breaks_is_one_line(capsys) -> None:
    error = DataError("a\nb\x1b[2J\r is no folder")
    assert ended(error, capsys) == (2, ["fasttx: error: a\\nb\\x1b[2J\\r is no folder"])
    error = BackendUnavailableError("mps cannot run:\n  - no device")
    assert ended(error, capsys) == (2, ["fasttx: error: mps cannot run:", "  - no device"])


def test_errors_that_borrow_the_class_are_one_line_too(capsys) -> None:
    assert ended(OSError("the hub\nis gone"), capsys) == (
        2, ["fasttx: error: OSError: the hub\\nis gone"],
    )  # fmt: skip


def within(folder: Path, how: str) -> Path:
    """A path in `folder` that cannot be written."""
    if how == "below a file":
        (folder / "file").touch()
        return folder / "file" / "x.json"
    if how == "a folder":
        (folder / "taken").mkdir()
        return folder / "taken"
    if how == "too long":
        return folder / ("x" * 300)
    if how == "circle":
        (folder / "link").symlink_to(folder / "link")
        return folder / "link" / "x.json"
    return folder / "gone" / "x.json"


@pytest.mark.parametrize("how", ["below a file", "a folder", "too long", "circle", "gone"])
def test_what_cannot_be_written_is_named(how: str, tmp_path: Path, capsys) -> None:
    path = within(tmp_path, how)
    status = ending.exit_status("fasttx", lambda: write_text_atomic(path, "x"))
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and path.name in line, line
    assert ".tmp" not in line, "the name that the user gave, not that of the temporary file"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate "
                     "memory: you tried to allocate 17179869184 bytes. Error code 12"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore lines."),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)  # fmt: skip
def test_too_little_memory_is_one_line_with_flags_that_exist(error: Exception, capsys) -> None:
    status, (line,) = ended(error, capsys, {"--batch-size", "--json"})
    assert status == 2 and "memory does not suffice" in line
    assert line.endswith("Choose a smaller --batch-size")
    _, (line,) = ended(error, capsys)
    assert "--" not in line


def test_ctrl_c_is_one_line(capsys) -> None:
    assert ended(KeyboardInterrupt(), capsys) == (130, ["fasttx: interrupted"])


def test_a_second_ctrl_c_while_python_exits() -> None:
    code = (
        "import atexit, os, signal, sys\nfrom fasttx.commands.ending import exit_status\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"  # the last to be called
        "def command():\n    raise KeyboardInterrupt\n"
        "sys.exit(exit_status('fasttx', command))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "fasttx: interrupted\n")


def test_sigterm_ends_quietly_and_cleans_up(capsys) -> None:
    cleaned = []

    def command() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 5)  # until the handler has run
        finally:
            cleaned.append(True)

    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        ending.exit_status("fasttx", command)
    assert end.value.code == 143 and cleaned
    assert capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGTERM) is former


# --- broken streams, as processes: they are what Python finds at its start and at its end ---------

SAY = (
    "import sys\nfrom fasttx import terminal\nfrom fasttx.commands.ending import exit_status\n"
    "def command():\n    for line in {lines}:\n        terminal.say(line)\n"
    "sys.exit(exit_status('fasttx', command))\n"
)


def shell(redirection: str, lines: object = "['a']", **environment: str):
    return subprocess.run(
        ["/bin/sh", "-c", f'"$0" -c "$1" {redirection}', sys.executable, SAY.format(lines=lines)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True, timeout=60,
    )  # fmt: skip


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("lines", ["['a']", "['a' * 1000] * 100"], ids=["at its end", "amid"])
def test_a_full_disk_behind_standard_output(lines) -> None:
    done = shell("> /dev/full", lines)
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("fasttx: error: standard output: No space left on device. ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_the_help(unbuffered: str) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fasttx", "--help"], stdout=full, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}, timeout=60,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(b"fasttx: error: standard output: No space left on device. ")


@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        (">&-", 2, "fasttx: error: standard output is closed; expected somewhere to write to. "),
        ("2>&-", 0, ""),
        ("<&-", 0, ""),
        ("<&- 2>&-", 0, ""),
        ("2>/dev/full", 0, ""),
        (">/dev/null <&-", 0, ""),
    ],
)
def test_closed_streams(redirection: str, status: int, said: str) -> None:
    done = shell(redirection)
    assert done.returncode == status
    assert done.stderr.decode().startswith(said) and b"Traceback" not in done.stderr
    assert (said != "") == bool(done.stderr)


def test_a_reader_that_leaves_is_no_error() -> None:
    done = shell("| head -1 > /dev/null", "['a' * 1000] * 10_000")
    assert done.stderr == b""


def test_a_terminal_that_lacks_characters() -> None:
    for encoding in ("ascii", "latin-1", "utf-8"):
        done = shell("", ["naïve 日本 \ud800 \x1b[2J\x9b"], PYTHONIOENCODING=encoding)
        assert done.returncode == 0 and done.stderr == b""
        said = done.stdout.decode(encoding)
        assert said.isascii() == (encoding == "ascii")
        assert "\\ud800 \\x1b[2J\\x9b" in said


def test_help_and_shell_errors_do_not_wait_for_torch() -> None:
    code = (
        "import sys\nfrom fasttx.commands import cli\n"
        "for line in ('--help', '--version', 'nonsense', ''):\n"
        "    try:\n        cli.main(line.split())\n    except SystemExit:\n        pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_ctrl_c_while_torch_is_imported() -> None:
    code = (
        "import os, signal, sys, types\nfrom fasttx.commands import cli\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Slow())\n"
        # A shell's background jobs ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "cli.main(['predict', 'RUN', 'text'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, "fasttx: interrupted\n")
