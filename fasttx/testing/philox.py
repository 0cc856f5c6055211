"""The generator of `fasttx.ops.dropout`, Philox4x32-7, written a second time with NumPy.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ONE = 65536
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Sequence[Any], key: Sequence[int], rounds: int = 7) -> tuple[Any, ...]:
    """Four words of Python ints, or of np.uint64 arrays of 32-bit values (products fit both)."""
    integer: Any = np.uint64 if isinstance(counter[0], np.ndarray) else int
    m0, m1, two32 = integer(0xD2511F53), integer(0xCD9E8D57), integer(2**32)
    c = list(counter)
    for r in range(rounds):
        k0, k1 = (integer((k + r * w) % 2**32) for k, w in zip(key, WEYL, strict=True))
        a, b = m0 * c[0], m1 * c[2]
        c = [(b // two32) ^ c[1] ^ k0, b % two32, (a // two32) ^ c[3] ^ k1, a % two32]
    return tuple(c)


def key_of(seed: int) -> tuple[int, int]:
    """The low and the high half of a 64-bit seed."""
    return seed % 2**32, (seed >> 32) % 2**32


def element_uniform(seed: int, element: int, counter: tuple[int, int, int]) -> int:
    """The 16-bit uniform of one element; counter: its row, head and sequence."""
    word: int = philox((element // 8, *counter), key_of(seed))[(element % 8) // 2]
    return word % ONE if element % 2 == 0 else word // ONE


def _uniforms(seed: int, shape: tuple[int, ...], elements: int) -> np.ndarray:
    blocks = -(-elements // 8)
    grid = np.indices((*shape, blocks)).astype(np.uint64)
    words = philox((grid[-1], *reversed(grid[:-1])), key_of(seed))
    halves = [half for w in words for half in (w % np.uint64(ONE), w // np.uint64(ONE))]
    return np.stack(halves, -1).reshape(*shape, blocks * 8)[..., :elements]


def attention_uniforms(
    seed: int, sequences: int, heads: int, queries: int, keys: int
) -> np.ndarray:
    """(sequences, heads, queries, keys) uint64 below 65536."""
    return _uniforms(seed, (sequences, heads, queries), keys)


def row_uniforms(seed: int, rows: int, columns: int) -> np.ndarray:
    """(rows, columns) uint64 below 65536."""
    return _uniforms(seed, (1, 1, rows), columns)[0, 0]


def multipliers(uniforms: np.ndarray, p: float) -> Tensor:
    """What dropout multiplies by: 0, or the inverse of the quantised keep probability; float64."""
    t = int(p * ONE + 0.5)
    scale = ONE / (ONE - t) if t < ONE else 0.0
    return torch.from_numpy((uniforms >= t) * scale)
