"""Folders, bytes and UTF-8 text from the disk. Whatever is wrong with them is one DataError."""

from __future__ import annotations

import errno
import gzip
import os
import shlex
import stat
import zlib
from collections.abc import Callable
from pathlib import Path

from fasttx.errors import DataError

# What stands in for a file that is not there, or another format under a wrong name.
_MAGIC = (
    (b"version https://git-lfs.github.com/", "a Git LFS pointer instead of the file: git lfs pull"),
    (
        b"PK\x03\x04",
        "a zip archive or an Excel workbook: unpack it, or save the sheet as CSV UTF-8",
    ),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook: save the sheet as CSV UTF-8"),
    (b"PAR1", "a parquet file: let its name end in .parquet"),
    (b"\x1f\x8b", "compressed by gzip: let its name end in .gz"),
)
_BOMS = (  # the longer ones first: UTF-32's begins like UTF-16's
    (b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
)  # fmt: skip
_ASCII = bytes(range(128))
_NO_LETTERS = bytes(b for b in range(256) if b > 127 or not chr(b).isalpha())


def reason(error: Exception) -> str:
    """What an exception says, in one line."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(said).split())


def located(path: str | Path) -> Path | None:
    """The absolute path of what exists, `~` understood; None where nothing is there.

    Raises DataError for a path that cannot be looked up.
    """
    try:
        found = Path(path).expanduser()
        found.stat()
        return Path(os.path.abspath(found))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~nobody
        if getattr(error, "errno", None) in (errno.ENOENT, errno.ENOTDIR):
            return None
        shown = str(path) if len(str(path)) < 200 else f"{str(path)[:200]}..."
        raise DataError(f"{shown!r} cannot be looked up: {reason(error)}") from error


def is_folder(path: Path) -> bool:
    return _is(path, stat.S_ISDIR)


def is_file(path: Path) -> bool:
    return _is(path, stat.S_ISREG)


def _is(path: Path, kind: Callable[[int], bool]) -> bool:
    """False for a link to nothing. (Path.is_file would hide a permission that is missing.)"""
    try:
        return kind(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from error


def refuse_dangling(path: Path) -> None:
    """Raise DataError for a link to what does not exist."""
    try:
        if path.is_symlink() and not os.path.exists(path):
            raise DataError(
                f"{path} is a link to {os.readlink(path)!r}, which does not exist; "
                "mend or remove the link"
            )
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from error


def is_hidden(name: str) -> bool:
    """Of what a system leaves behind: .DS_Store, ._review.txt, .ipynb_checkpoints, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def listed(folder: Path) -> tuple[list[Path], list[Path]]:
    """What a folder holds, by name: what counts, and what is hidden. Raises DataError."""
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {reason(error)}") from error
    return (
        [p for p in found if not is_hidden(p.name)],
        [p for p in found if is_hidden(p.name)],
    )


def head_of(path: Path) -> bytes:
    """A file's first bytes. Raises DataError."""
    try:
        with open(path, "rb") as f:
            return f.read(64)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from error


def bytes_of(path: Path) -> bytes:
    """A file's bytes; those of a .gz file unpacked. Raises DataError."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from error
    if path.suffix.lower() != ".gz":
        return data
    refuse_foreign(path, data, _MAGIC[:1])
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be unpacked as gzip ({reason(error)}); is the file complete?"
        ) from error


def refuse_foreign(path: Path, data: bytes, kinds: tuple[tuple[bytes, str], ...] = _MAGIC) -> None:
    """Raise DataError for a file that is of another kind than its name says."""
    for magic, what in kinds:
        if data.startswith(magic):
            raise DataError(f"{path} is {what}")


def utf8(path: Path, data: bytes) -> str:
    """The text of `data`. Raises DataError that says how to convert what is not UTF-8."""
    name = _wide_encoding(data)
    if name is not None:
        raise DataError(f"{path} is {name.upper()}; expected UTF-8. {_conversion(path, name)}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8; "
            + _what_else(path, data)
        ) from error


def file_text(path: Path) -> str:
    """The text of a file that holds some. Raises DataError."""
    data = bytes_of(path)
    refuse_foreign(path, data)
    text = utf8(path, data)
    if not text.strip():
        raise DataError(f"{path} is empty; expected texts with labels")
    return text


def _wide_encoding(data: bytes) -> str | None:
    """UTF-16 or UTF-32, by its mark or by its many zeros: plain letters have one each."""
    for mark, name in _BOMS:
        if data.startswith(mark):
            return name
    head = data[:4096]
    zeros = {"utf-16be": head[::2].count(0), "utf-16le": head[1::2].count(0)}
    few, many = sorted(zeros.values())
    if len(head) >= 4 and many > 0.2 * len(head) and few < 0.1 * many:
        return max(zeros, key=zeros.__getitem__)
    return None


def _what_else(path: Path, data: bytes) -> str:
    """What a file is that is not UTF-8, and what to do."""
    shown = data.decode("utf-8", "replace")
    lost = shown.count("\ufffd")
    if len(shown) - len(shown.encode("ascii", "ignore")) > 2 * lost:
        return "most of it is, so it is damaged there, or put together from several files; mend it"
    high = len(data.translate(None, _ASCII))
    letters = len(data.translate(None, _NO_LETTERS))
    western = high <= letters and not set(data) & {0x81, 0x8D, 0x8F, 0x90, 0x9D}
    if not western:
        unknown = _conversion(path, "ENCODING")
        return f"its encoding has to be found out (file -i may tell). Then: {unknown}"
    name = "cp1252" if any(0x80 <= byte < 0xA0 for byte in data) else "latin1"
    return f"it looks like {name} (Western European). {_conversion(path, name)}"


def _conversion(path: Path, encoding: str) -> str:
    """A command for the shell that puts the file into UTF-8, in its place."""
    old, new = shlex.quote(str(path)), shlex.quote(f"{path}.utf8")
    iconv = f"iconv -f {encoding} -t utf-8"
    if path.suffix.lower() == ".gz":
        return f"Convert it: gunzip -c {old} | {iconv} | gzip > {new} && mv {new} {old}"
    return f"Convert it: {iconv} {old} > {new} && mv {new} {old}"
