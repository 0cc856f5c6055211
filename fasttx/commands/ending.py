"""How every command line ends: with a status, and with one line for whatever a person can mend."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator

from fasttx import terminal
from fasttx.errors import BackendUnavailableError, FasttxError, Interrupted, MetalError

FAILED, REFUSED, INTERRUPTED = 1, 2, 130

# What to do about an OSError, by its number. Names that a system lacks are left out.
_REMEDIES = {
    getattr(errno, name): remedy
    for name, remedy in {
        "ENOSPC": "Make room there, or choose another place",
        "EDQUOT": "Your quota there is used up: make room, or choose another place",
        "EFBIG": "The file system, or `ulimit -f`, allows no file of that size: choose another "
        "place, or raise the limit",
        "EROFS": "Choose a place that can be written",
        "EACCES": "Change its permissions, or choose another place",
        "EPERM": "Change its permissions, or choose another place",
        "ENOENT": "Check the name; a folder of that path may be missing, or was removed meanwhile",
        "ENOTDIR": "A part of that path is a file where a folder is expected: check the name",
        "EISDIR": "Expected the name of a file",
        "EEXIST": "Choose another name, or move away what is there",
        "ENAMETOOLONG": "Choose a shorter name",
        "ELOOP": "Its symbolic links go round in a circle: mend them, or choose another name",
        "EMFILE": "Raise the limit of open files (`ulimit -n`)",
        "ENFILE": "Too many files are open on this machine: close some programs",
        "EIO": "The device cannot be read or written: check it, and save what it holds",
        "EBUSY": "Another program uses it: wait for that one, or choose another place",
        "ESTALE": "The network file system has lost it: connect it again",
        "EINVAL": "Expected another kind of file or name",
        "EBADF": "The stream is closed: give it somewhere to go",
    }.items()
    if hasattr(errno, name)
}

# What torch, CUDA, Metal and the C++ library say when memory does not suffice.
_OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory",
    "ALLOC_FAILED", "bad_alloc", "Invalid buffer size", "Storage size calculation overflowed",
    "numel: integer multiplication overflow",
)  # fmt: skip


def exit_status(
    program: str, command: Callable[[], int | None], accepts: Collection[str] = ()
) -> int:
    """What `command` returns, or the status that its exception stands for, once that is shown.

    accepts: the flags of this command line, so that no advice names another one. SystemExit, which
    is how argparse ends and how SIGTERM does, passes.
    """
    started()
    with terminal.robust_streams(), _sigterm_unwinds():
        if sys.stdout is None:
            terminal.complain(
                f"{program}: error: standard output is closed; expected somewhere to write to. "
                "Send it to a file or to /dev/null"
            )
            return REFUSED
        try:
            try:
                status = command() or 0
            except SystemExit:
                terminal.flush_output()
                raise
            terminal.flush_output()
            return status
        except KeyboardInterrupt:
            status = INTERRUPTED
            terminal.complain(f"{program}: interrupted")
            # A second one, while Python takes itself apart, should not print a traceback.
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
        except Exception as error:
            status = _told(program, error, accepts)
        with contextlib.suppress(OSError):  # half of an answer is an answer
            terminal.flush_output()
        return status


def _told(program: str, error: Exception, accepts: Collection[str]) -> int:
    """Show an exception; the status that it stands for."""
    if isinstance(error, Interrupted):  # the trainer has said so
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):  # `fasttx predict ... | head`
        return FAILED
    if isinstance(error, BackendUnavailableError | MetalError):
        line = str(error)  # a list of reasons, one a line
    elif isinstance(error, FasttxError):
        line = terminal.one_line(error)  # a file's name may hold line breaks
    elif _is_out_of_memory(error):
        line = _memory_sentence(error, accepts)
    elif isinstance(error, OSError):
        line = os_error_sentence(error)
    else:
        terminal.complain("".join(traceback.format_exception(error)).rstrip())
        terminal.complain(
            f"{program}: this is a defect of fasttx. Please report it, with the lines above and "
            "what `fasttx doctor` prints"
        )
        return FAILED
    terminal.complain(f"{program}: error: {line}")
    return REFUSED


def os_error_sentence(error: OSError) -> str:
    """The file, what the system says of it, and what to do."""
    if error.errno is None:  # not from the system: from a library that borrows the class
        said = terminal.one_line(str(error)) or "the system reports an error"
        return f"{type(error).__name__}: {said}"
    named = [name for name in (error.filename, error.filename2) if name is not None]
    where = " -> ".join(terminal.one_line(_shown(name)) for name in named)
    said = error.strerror or f"error {error.errno}"
    remedy = _REMEDIES.get(error.errno, "Check it, or choose another place")
    return f"{where or 'a file or stream'}: {said}. {remedy}"


def _shown(name: object) -> str:
    if isinstance(name, bytes):
        return name.decode("utf-8", "replace")
    return "a standard stream" if isinstance(name, int) else str(name)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    known = isinstance(error, RuntimeError) and any(said in str(error) for said in _OUT_OF_MEMORY)
    return known or isinstance(error, MemoryError)


def _memory_sentence(error: Exception, accepts: Collection[str]) -> str:
    said = " ".join(str(error).split())
    said = f" ({said[:200]}{'...' if len(said) > 200 else ''})" if said else ""
    flags = [flag for flag in ("--batch-size", "--max-len") if flag in accepts]
    if not flags:
        return f"the memory does not suffice{said}. Free some, or take fewer or shorter texts"
    more = ", or a smaller model" if "--d-model" in accepts else ""
    return f"the memory does not suffice{said}. Choose a smaller {' or '.join(flags)}{more}"


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """SIGTERM ends with status 143 and without a word, once temporary files are gone. (While a run
    is trained, the trainer takes the signal.)"""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        former = signal.getsignal(signal.SIGTERM)
        if former is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread: signals are somebody else's
        former = None
    try:
        yield
    finally:
        if former is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, former)


# --- Ctrl-C before there is a command -------------------------------------------------------------


def quiet_start(program: str) -> None:
    """Until `started`, Ctrl-C ends the process at once, with one line.

    torch takes seconds to import, and an exception amid an import may come out as another one, or
    not at all. Nothing is open yet that would have to be closed.
    """

    def end(number: int, frame: object) -> None:
        terminal.complain(f"{program}: interrupted")
        os._exit(INTERRUPTED)

    with contextlib.suppress(ValueError):  # not the main thread
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            _quiet.append(end)
            signal.signal(signal.SIGINT, end)


def started() -> None:
    """From now on Ctrl-C is an exception again."""
    with contextlib.suppress(ValueError):
        if _quiet and signal.getsignal(signal.SIGINT) is _quiet.pop():
            signal.signal(signal.SIGINT, signal.default_int_handler)


_quiet: list[Callable[[int, object], None]] = []
