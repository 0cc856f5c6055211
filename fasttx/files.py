"""Files are written whole or not at all: to a temporary name in the same folder, then renamed.

`Lock` keeps two processes out of a folder; `cache_folder` holds files that can be computed again.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import logging
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fasttx.errors import InUseError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger("fasttx")

# A killed process leaves its temporary file behind; no process still writes one this old.
_ABANDONED_SECONDS = 3600


def cache_folder() -> Path:
    """$FASTTX_CACHE, else $XDG_CACHE_HOME/fasttx, else ~/.cache/fasttx. It need not exist yet.

    Raises RuntimeError where there is no home folder.
    """
    own, xdg = os.environ.get("FASTTX_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(xdg) if xdg else Path.home() / ".cache") / "fasttx"


@contextlib.contextmanager
def atomic_write(
    path: str | Path, announce: Callable[[Path], None] = lambda temporary: None
) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends, and vanishes when the block raises.

    A reader sees the old file or the new one, even after a kill or a power cut. A symbolic link
    stays a link; the file that it points to is replaced. `announce` is called with the finished
    temporary file before it takes its name. Raises OSError (FileNotFoundError if the folder does
    not exist).
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {path}: the folder {target.parent} does not exist; create it first"
        )
    _remove_abandoned(target)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Not tempfile: its files are readable by their owner only, and so would `path` be.
        with naming(path, temporary):
            with open(temporary, "xb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            announce(temporary)
            os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):  # the folder may be gone; what went wrong is raised
            temporary.unlink(missing_ok=True)
        raise
    _sync(target.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder that becomes `path` when the block ends, and vanishes when the block raises.

    `path` is a new folder or an empty one, and what it lies in is made. Raises OSError, which names
    `path` where it would name the temporary folder.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        for name in temporary.rglob("*"):
            if name.is_file():
                _sync(name)
        if target.exists():  # which not every system replaces
            target.rmdir()
        os.replace(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and str(error.filename or temporary).startswith(
            str(temporary)
        ):
            error.filename, error.filename2 = str(path), None
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    """What a file holds, and renames in a folder in their order, survive a power cut. (Windows
    cannot open folders.)"""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def naming(path: str | Path, temporary: str | Path = "") -> Iterator[None]:
    """An OSError names `path`, where it names no file (a write that fails does not), or the
    `temporary` one, which nobody has heard of."""
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename) == str(temporary):
            error.filename, error.filename2 = str(path), None
        raise


def _remove_abandoned(target: Path) -> None:
    with contextlib.suppress(OSError):  # another process may be removing them too
        for path in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, without changing line ends."""
    with atomic_write(path) as f:
        f.write(text.encode("utf-8"))


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write `obj` as JSON (see `json_text`)."""
    write_text_atomic(path, json_text(obj))


def json_text(obj: Any) -> str:
    """JSON, indented by 2, non-ASCII characters unescaped. Raises ValueError for NaN and infinity,
    which JSON does not have."""
    return json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


class Lock:
    """A file that one process at a time holds. It is let go when the process ends, however it ends.

    Raises InUseError where another process (or another Lock of this one) holds it, and OSError
    where the file cannot be made. On a file system without locks it only warns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        while self._file is None:
            file = open(path, "a+b")  # noqa: SIM115  (open for as long as it is held)
            try:
                _take(file)
            except OSError as error:
                file.seek(0)
                holder = file.read(200).decode("utf-8", "replace").strip() or "another process"
                file.close()
                if error.errno in _NO_LOCKS:
                    log.warning(
                        "%s: this file system has no locks; keep other processes out", path.parent
                    )
                    return
                raise InUseError(
                    f"{path.parent} is in use by {holder}; expected one process a folder. Wait "
                    "for that one to end, or choose another folder"
                ) from error
            if _is_named(file, path):
                self._file = file
            else:
                file.close()  # its holder has removed it meanwhile
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
        file.flush()

    def release(self) -> None:
        """Let go; any number of times."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # Windows cannot remove a file that is open
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


# Answers of file systems that have no locks, not of a lock that is held.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}


def _take(file: BinaryIO) -> None:
    if sys.platform == "win32":
        file.seek(1 << 30)  # a byte that is never written: the holder's name stays readable
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_named(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
