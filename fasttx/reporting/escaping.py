"""Texts and labels are hostile input: what becomes of them before they are shown."""

from __future__ import annotations

import html

_STAY = " \n\t\u00a0\u200c\u200d"


def printable(text: str) -> str:
    """What cannot be printed or would turn the text around (control characters, escape sequences,
    lone surrogates, bidirectional overrides) becomes U+FFFD; joiners and spaces stay."""
    return "".join(c if c.isprintable() or c in _STAY else "\ufffd" for c in text)


def escaped(text: object) -> str:
    """For HTML, in content and in quoted attributes; a percent sign stays with its number."""
    return html.escape(printable(str(text)), quote=True).replace(" %", "&nbsp;%")
