"""One line of JSON for each request; without its text, unless that is asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from fasttx import terminal
from fasttx.serving.metrics import Metrics


class RequestLog:
    """Lines go to `path`, or to standard error. A disk that is full loses lines, no requests."""

    def __init__(self, metrics: Metrics, path: Path | None = None, texts: bool = False) -> None:
        self._metrics, self._path, self._with_texts = metrics, path, texts
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        if path is not None:  # an OSError here ends the start
            self._file = path.open("a", encoding="utf-8")

    def add_texts(self, line: dict[str, Any], texts: Sequence[str]) -> None:
        if self._with_texts:
            line["text"] = list(texts)

    def write(self, line: dict[str, Any]) -> None:
        now = time.time()
        stamp = (
            time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1e3) % 1000:03}Z"
        )
        text = terminal.json_line({"time": stamp, **line}, ascii_only=True)
        try:
            with self._lock:
                if self._file is None:
                    terminal.complain(text)
                else:
                    self._file.write(text + "\n")
                    self._file.flush()
        except (OSError, ValueError):
            self._metrics.lost_lines.inc()

    def reopen(self) -> None:
        """After the file was moved away (logrotate)."""
        if self._path is None:
            return
        with self._lock:
            try:
                renewed = self._path.open("a", encoding="utf-8")
            except OSError:
                return  # the old one goes on
            if self._file is not None:
                self._file.close()
            self._file = renewed
