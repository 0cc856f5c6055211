"""Files are written whole or not at all: to a temporary name in the same folder, then renamed.

`cache_folder` is for files that can be computed again.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

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
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends, and vanishes when the block raises.

    A reader sees the old file or the new one, even after a kill or a power cut. A symbolic link
    stays a link; the file that it points to is replaced. Raises OSError (FileNotFoundError if the
    folder does not exist).
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
            os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):  # the folder may be gone; what went wrong is raised
            temporary.unlink(missing_ok=True)
        raise


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
                path.unlink()


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, without changing line ends."""
    with atomic_write(path) as f:
        f.write(text.encode("utf-8"))


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write `obj` as JSON, indented by 2, non-ASCII characters unescaped."""
    write_text_atomic(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")
