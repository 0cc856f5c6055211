"""What a program writes to its standard streams: nothing in it can steer a terminal, and every
stream can take it.

Texts, labels, file names and error messages hold whatever a file or a command line held.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

STANDARD_OUTPUT = "standard output"  # its name in messages

# Characters of the categories below that change nothing but the glyphs beside them: the joiners of
# emoji and of Indic and Arabic scripts, and the soft hyphen.
_HARMLESS = "\u00ad\u200c\u200d"
# Control, format (bidirectional overrides among them), surrogate, line and paragraph separator.
_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")


def steers(character: str) -> bool:
    """Whether a terminal may take this character for a command, or may not be able to show it."""
    return unicodedata.category(character) in _STEERING and character not in _HARMLESS


def visible(text: object, stay: str = "\n\t") -> str:
    """`text` with an escape such as \\x1b in place of each control character, bidirectional
    override and lone surrogate, but for those that `stay`."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c in stay or not steers(c) else _escape(c) for c in text)


def one_line(text: object) -> str:
    """`visible`, with line breaks and tabs escaped too."""
    return visible(text, "")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def decoded(argument: str) -> str:
    """A command-line argument as text: undecodable bytes, which Python hands over as lone
    surrogates, become U+FFFD."""
    if argument.isascii():
        return argument
    return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in argument)


def json_line(values: Any, ascii_only: bool = False) -> str:
    """JSON in one line, for any reader and any terminal.

    A number that is not finite is null, since JSON has none; what could steer a terminal, and lone
    surrogates, are escaped.
    """
    text = json.dumps(_finite(values), ensure_ascii=ascii_only, allow_nan=False)
    if text.isprintable():
        return text
    return "".join(_json_escape(c) if steers(c) else c for c in text)


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def _finite(values: Any) -> Any:
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return values


def say(text: object, *, flush: bool = False) -> None:
    """Print to standard output. Raises OSError, which names the stream, where that is broken."""
    _print(visible(text), flush)


def say_json(values: Any, *, flush: bool = False) -> None:
    """Print `json_line` to standard output, in ASCII where that is not UTF-8; raises as `say`."""
    _print(json_line(values, not _is_utf8(sys.stdout)), flush)


def say_coloured(text: str) -> None:
    """Print a text whose parts have been made `visible` before they were coloured."""
    _print(text, False)


def _print(text: str, flush: bool) -> None:
    try:
        print(text, flush=flush)
    except OSError as error:
        error.filename = STANDARD_OUTPUT
        raise


def complain(text: object) -> None:
    """Print to standard error; nothing happens where that cannot be written."""
    with contextlib.suppress(OSError, ValueError):
        print(visible(text), file=sys.stderr, flush=True)


def _is_utf8(stream: Any) -> bool:
    try:
        return codecs.lookup(stream.encoding).name == "utf-8"
    except (AttributeError, LookupError, TypeError):
        return False


# --- the streams themselves -----------------------------------------------------------------------


@contextlib.contextmanager
def robust_streams() -> Iterator[None]:
    """Standard output and error take every character: what their encoding lacks is escaped.

    A descriptor 0, 1 or 2 that was closed is taken by the null device, so that no file that is
    opened later, a checkpoint say, becomes a standard stream of some library.
    """
    _reserve_descriptors()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (for good)
    former = [(s, s.errors) for s in (sys.stdout, sys.stderr) if hasattr(s, "reconfigure")]
    try:
        for stream, _ in former:
            stream.reconfigure(errors="backslashreplace")
        yield
    finally:
        for stream, errors in former:
            with contextlib.suppress(OSError, ValueError):  # it may be closed by now, or broken
                stream.reconfigure(errors=errors)


def _reserve_descriptors() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one


def flush_output() -> None:
    """Flush standard output. Where that fails, what it still holds is dropped: Python would try
    again when it exits, and complain of an ignored exception. Raises OSError."""
    try:
        sys.stdout.flush()
    except ValueError:  # it is closed
        return
    except OSError as error:
        _drop(sys.stdout)
        error.filename = STANDARD_OUTPUT
        raise


def _drop(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        number, nowhere = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, number)
        finally:
            os.close(nowhere)
