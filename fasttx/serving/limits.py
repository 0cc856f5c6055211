"""What one request and all requests together may take, and how the rest is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from fasttx.config import setting
from fasttx.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Raises ConfigError for a limit that nothing could keep."""

    batch_tokens: int | None = setting(
        None,
        "tokens in one batch (default: on a CPU 128 a thread, elsewhere 4,096)",
        group="batching",
    )
    batch_wait_ms: float = setting(
        2.0, "how long a text waits for others, while texts arrive this fast", group="batching"
    )
    queue_texts: int = setting(1024, "texts that may wait; more: 429", group="limits")
    queue_characters: int = setting(
        10_000_000, "characters that may wait; more: 429", group="limits"
    )
    queue_seconds: float = setting(5.0, "how long a text may wait; longer: 429", group="limits")
    body_bytes: int = setting(1_000_000, "bytes of a request; more: 413", group="limits")
    read_seconds: float = setting(
        10.0, "how long a request may take to arrive; longer: 408", group="limits"
    )
    texts: int = setting(128, "texts of a request; more: 422", group="limits")
    characters: int = setting(100_000, "characters of a text; more: 422", group="limits")

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None and f.default is None:
                continue
            least = 0 if f.name == "batch_wait_ms" else 1e-3 if isinstance(f.default, float) else 1
            if not (least <= value < math.inf):
                raise ConfigError(f"{f.name} is {value!r}; expected at least {least:g}")


class Refused(Exception):
    """An answer other than 200: its status, what is wrong and what to do, and for how long."""

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        # Whole seconds, as HTTP has it.
        self.retry_after = None if retry_after is None else max(1, math.ceil(retry_after))
