"""Drawing subsets of a labelled split: shuffled and stratified, or the first rows as they lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def _quotas(counts: np.ndarray, size: int) -> np.ndarray:
    """How many of each class a subset of `size` takes: proportional, by largest remainder."""
    exact = counts * (size / counts.sum())
    quotas = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(-(exact - quotas), kind="stable")
    quotas[by_remainder[: size - quotas.sum()]] += 1
    return quotas


def draw_stratified(
    labels: np.ndarray, sizes: Sequence[int], rng: np.random.Generator
) -> list[np.ndarray]:
    """Disjoint subsets of these sizes, each with the class proportions of `labels` (to within one
    row a class), in shuffled order. Index arrays. Raises ValueError if they ask for too many rows.
    """
    if sum(sizes) > len(labels):
        raise ValueError(f"{sum(sizes)} rows asked for; there are {len(labels)}")
    pools = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    counts = np.array([len(pool) for pool in pools])
    drawn = []
    for i, size in enumerate(sizes):
        left = np.array([len(pool) for pool in pools])
        if sum(sizes[: i + 1]) == len(labels):
            quotas = left  # the last of a whole split: all that is left
        else:
            quotas = np.minimum(_quotas(counts, size), left)
            quotas[np.argmax(left - quotas)] += size - quotas.sum()
        picked = np.concatenate([pool[:q] for pool, q in zip(pools, quotas, strict=True)])
        pools = [pool[q:] for pool, q in zip(pools, quotas, strict=True)]
        drawn.append(rng.permutation(picked))
    return drawn


def draw_first(labels: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """Disjoint subsets of these sizes, taken one after the other from the first row on."""
    if sum(sizes) > len(labels):
        raise ValueError(f"{sum(sizes)} rows asked for; there are {len(labels)}")
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
