"""What compiled code calls without looking into it.

A module of its own, for the compiler alone to import: `torch.compiler.disable` imports the
compiler, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable
def call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
