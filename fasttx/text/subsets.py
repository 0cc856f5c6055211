"""Subsets of a labelled split: shuffled and stratified, or the first texts of the file."""

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


def _keep_rare(quotas: np.ndarray, left: np.ndarray, size: int, later: Sequence[int]) -> np.ndarray:
    """`quotas`, changed where a class would be missing here or in a `later` subset that has room
    for every class: each gets at least one text of it, while there are enough."""
    classes = len(quotas)
    low = np.minimum(left, int(size >= classes))
    high = np.maximum(low, left - sum(n >= classes for n in later))
    kept = np.clip(quotas, low, high)
    while (over := int(kept.sum()) - size) > 0 and (kept > low).any():
        most = np.argmax(kept - low)
        kept[most] -= min(over, int(kept[most] - low[most]))
    for room in (high, left):  # no class is kept for later at the price of a size
        while (under := size - int(kept.sum())) > 0 and (kept < room).any():
            most = np.argmax(room - kept)
            kept[most] += min(under, int(room[most] - kept[most]))
    return kept


def draw_stratified(
    labels: np.ndarray, sizes: Sequence[int], rng: np.random.Generator
) -> list[np.ndarray]:
    """Index arrays of disjoint subsets of these sizes, in shuffled order.

    Each has the class proportions of `labels`, to within one text a class, and at least one text of
    each class where there are enough (the first subsets come first). Raises ValueError if the sizes
    add up to more than there are.
    """
    if sum(sizes) > len(labels):
        raise ValueError(f"{sum(sizes)} rows asked for; there are {len(labels)}")
    pools = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    counts = np.array([len(pool) for pool in pools])
    drawn = []
    for i, size in enumerate(sizes):
        left = np.array([len(pool) for pool in pools])
        if sum(sizes[: i + 1]) == len(labels):
            quotas = left  # the subsets use up the split: the last one gets the rest
        else:
            quotas = np.minimum(_quotas(counts, size), left)
            quotas[np.argmax(left - quotas)] += size - quotas.sum()
            quotas = _keep_rare(quotas, left, size, sizes[i + 1 :])
        picked = np.concatenate([pool[:q] for pool, q in zip(pools, quotas, strict=True)])
        pools = [pool[q:] for pool, q in zip(pools, quotas, strict=True)]
        drawn.append(rng.permutation(picked))
    return drawn


def draw_first(labels: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """Index arrays of disjoint subsets of these sizes, one after the other from the first text."""
    if sum(sizes) > len(labels):
        raise ValueError(f"{sum(sizes)} rows asked for; there are {len(labels)}")
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
