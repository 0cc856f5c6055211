"""Texts and labels are untrusted input: they are made harmless before they are shown."""

from __future__ import annotations

import html

_STAY = " \n\t\u00a0\u200c\u200d"


def printable(text: str) -> str:
    """Replace control characters, escape sequences, lone surrogates and bidirectional overrides by
    U+FFFD; joiners and spaces stay."""
    return "".join(c if c.isprintable() or c in _STAY else "\ufffd" for c in text)


def escaped(text: object) -> str:
    """Escape for HTML content and quoted attributes; no line breaks before a percent sign."""
    return html.escape(printable(str(text)), quote=True).replace(" %", "&nbsp;%")
