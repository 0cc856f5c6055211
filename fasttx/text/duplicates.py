"""Texts that occur more than once, within a split and across splits: counts, and what they mean.

A model that has learnt a test text by heart need not understand it. Lee et al., "Deduplicating
Training Data Makes Language Models Better", ACL 2022.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

ALARMING = 0.01  # share of the test texts that also occur in train

# "test": texts of test that repeat an earlier one. "train/test": texts of test that occur in train.
Counts = dict[str, int]


def count(splits: Mapping[str, Sequence[str]]) -> dict[str, Counts]:
    """`exact`: letter by letter; `folded`: but for capitals and white space. Blank texts are left
    out: they have a line of their own. Texts are compared by 64 bits of a hash, since they need not
    fit into memory: two of a million differ and have the same with a probability below 1e-7."""
    return {"exact": _counts(splits, str), "folded": _counts(splits, _folded)}


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _counts(splits: Mapping[str, Sequence[str]], form: Callable[[str], str]) -> Counts:
    keys = {name: _hashes(map(form, filter(_has_words, split))) for name, split in splits.items()}
    distinct = {name: np.unique(found) for name, found in keys.items()}
    within = {name: len(found) - len(distinct[name]) for name, found in keys.items()}
    across = {
        f"{a}/{b}": int(np.isin(keys[b], distinct[a]).sum()) for a, b in combinations(splits, 2)
    }
    return within | across


def _has_words(text: str) -> bool:
    return bool(text) and not text.isspace()


def _hashes(texts: Iterable[str]) -> np.ndarray:
    """(n,) uint64."""
    return np.fromiter(map(_hash, texts), np.uint64)


def _hash(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


# --- for people -----------------------------------------------------------------------------------


def duplicates_text(described: Mapping[str, Any]) -> str | None:
    """One line about a described dataset (config.json); None if no text occurs twice, or where an
    older version counted none."""
    counts = described.get("duplicates")
    if not counts:
        return None
    said = []
    for where, folded in counts["folded"].items():
        a, _, b = where.partition("/")
        if folded:
            what = f"{folded:,} texts of {b} are in {a}" if b else f"{folded:,} in {a} are repeated"
            exact = counts["exact"][where]
            but = "" if exact == folded else f" ({exact:,} letter by letter)"
            said.append(what.replace("_", " ") + but)
    if not said:
        return None
    return f"duplicates, but for capitals and white space: {'; '.join(said)}"


def overlap_warning(described: Mapping[str, Any]) -> str | None:
    """Why accuracy on the test split may say little; None if hardly a test text is in train."""
    counts, texts = described.get("duplicates"), described.get("test_samples")
    if not counts or not texts:
        return None
    shared = counts["folded"]["train/test"]
    if shared < ALARMING * texts:
        return None
    return (
        f"TEST TEXTS IN TRAIN ({shared:,} of {texts:,}, {shared / texts:.1%}): the model has seen "
        "them with their labels, so that it can know them by heart, and its accuracy on them says "
        "little about new texts. Remove them from one of the two splits for an honest figure."
    )
