"""The dropout generator that every backend shares: Philox4x32-7, addressed by position.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11.
A 128-bit block is a pure function of a 64-bit key (the site's seed) and a 128-bit counter (where
the element stands), so a mask depends on no tile size, packing or device, and can be drawn again in
the backward pass instead of being stored. One block serves eight neighbours, 16 bits each.

All words are uint32 values held in int64 tensors: plain torch has no unsigned multiplication.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

ROUNDS = 7  # the fewest that pass BigCrush (SC'11, table 2)
LANES = 8  # 16-bit uniforms in a block
ONE = 1 << 16  # the threshold at which everything is dropped

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Word = TypeVar("Word", Tensor, int)


def philox4x32(
    counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word], rounds: int = ROUNDS
) -> tuple[Word, Word, Word, Word]:
    """Four random words a counter: uint32 values in int64 tensors that broadcast, or ints."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(rounds):
        if i:
            k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
        # The products wrap around in int64, which leaves all their 64 bits right.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
    return c0, c1, c2, c3


def split_seed(seed: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high half of a () int64 seed, as a Philox key."""
    return seed & _MASK, (seed >> 32) & _MASK


def threshold(p: float) -> int:
    """An element is kept where its 16-bit uniform is >= this. Raises ValueError outside [0, 1]."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p is {p!r}; expected a probability between 0 and 1")
    return math.floor(p * ONE + 0.5)


def keep_scale(t: int) -> float:
    """What a kept element is multiplied by: the inverse of the exact, quantised probability."""
    return ONE / (ONE - t) if t < ONE else 0.0


def uniforms16(words: tuple[Tensor, Tensor, Tensor, Tensor], count: int) -> Tensor:
    """The first `count` 16-bit uniforms of words (..., blocks) -> (..., count).

    Element k takes word (k % 8) // 2 of block k // 8: the low half where k is even, else the high.
    """
    lanes = [half for w in words for half in (w & 0xFFFF, w >> 16)]
    return torch.stack(torch.broadcast_tensors(*lanes), -1).flatten(-2)[..., :count]


def _blocks(count: int, device: torch.device) -> Tensor:
    return torch.arange(-(-count // LANES), device=device)


def attention_keep(
    seed: Tensor, sequences: int, heads: int, queries: int, keys: int, t: int,
    *, first_query: int = 0, first_key: int = 0,
) -> Tensor:  # fmt: skip
    """(sequences, heads, queries, keys) bool. counter = (key // 8, query, head, sequence).

    first_query, first_key: of a part of the whole mask; first_key is a multiple of 8.
    """
    device = seed.device
    counter = (
        _blocks(keys, device) + first_key // LANES,
        torch.arange(first_query, first_query + queries, device=device)[:, None],
        torch.arange(heads, device=device)[:, None, None],
        torch.arange(sequences, device=device)[:, None, None, None],
    )
    return uniforms16(philox4x32(counter, split_seed(seed)), keys) >= t


def row_keep(seed: Tensor, rows: int, columns: int, t: int) -> Tensor:
    """(rows, columns) bool, for every site but attention. counter = (column // 8, row, 0, 0)."""
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    row = torch.arange(rows, device=seed.device)[:, None]
    counter = (_blocks(columns, seed.device), row, zero, zero)
    return uniforms16(philox4x32(counter, split_seed(seed)), columns) >= t


class Dropout(NamedTuple):
    """A dropout site: an element is kept where its 16-bit uniform is at least `threshold`.

    seed: () int64 tensor on the device; None where nothing is dropped. p: the probability that was
    asked for, which torch's own masks need.
    """

    threshold: int
    seed: Tensor | None
    p: float

    @classmethod
    def of(cls, p: float, seed: Tensor | None) -> Dropout:
        """Raises ValueError for a p outside [0, 1], TypeError for a missing or wrong seed."""
        t = threshold(p)
        return cls(t, require_seed(seed) if t else None, p)


NO_DROPOUT = Dropout(0, None, 0.0)


def row_dropout(x: Tensor, dropout: Dropout) -> Tensor:
    """Dropout of x (rows, columns) by the shared generator."""
    t = dropout.threshold
    if t == 0:
        return x
    rows, columns = x.shape
    keep = row_keep(require_seed(dropout.seed), rows, columns, t)
    return torch.where(keep, x * keep_scale(t), 0.0)


def require_seed(seed: Tensor | None) -> Tensor:
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.dim():
        got = f"{seed.dtype} {tuple(seed.shape)}" if isinstance(seed, Tensor) else repr(seed)
        raise TypeError(
            f"seed is {got}; dropout needs a () int64 tensor on the input's device, for instance "
            "torch.tensor(1, device=x.device) (an int would be frozen by CUDA graphs)"
        )
    return seed


def forward_seed(run_seed: int, micro_step: int, rank: int = 0) -> int:
    """The seed of one forward pass, as a signed 64-bit int; `micro_step` counts all of a run's.

    Words 0 and 1 of Philox(key = run_seed, counter = (micro_step low, high, rank, 0)).
    """
    counter = (micro_step & _MASK, micro_step >> 32, rank, 0)
    low, high, _, _ = philox4x32(counter, (run_seed & _MASK, (run_seed >> 32) & _MASK))
    seed = low | (high << 32)
    return seed - (1 << 64) if seed >> 63 else seed


def site_seeds(seed: Tensor, sites: int) -> Tensor:
    """(sites,) int64: one seed per dropout site of a forward pass, in one vectorised call.

    Words 0 and 1 of Philox(key = forward seed, counter = (site, 0, 0, 1)).
    """
    key = split_seed(require_seed(seed))
    site = torch.arange(sites, device=seed.device)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    low, high, _, _ = philox4x32((site, zero, zero, zero + 1), key)
    return low | (high << 32)
