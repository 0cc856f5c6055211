"""Texts that occur more than once, within a split and across splits: counts, and what they mean.

A model that has learnt a test text by heart need not understand it. Lee et al., "Deduplicating
Training Data Makes Language Models Better", ACL 2022.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

ALARMING = 0.01  # share of the test texts that also occur in train

# "test": texts of test that repeat an earlier one. "train/test": texts of test that occur in train.
Counts = dict[str, int]


def count(splits: Mapping[str, Sequence[str]]) -> dict[str, Counts]:
    """`exact`: letter by letter; `folded`: but for capitals and white space. Blank texts are left
    out: they have a line of their own."""
    texts = {name: [t for t in split if t and not t.isspace()] for name, split in splits.items()}
    return {"exact": _counts(texts, lambda text: text), "folded": _counts(texts, _folded)}


def _folded(text: str) -> bytes:
    text = " ".join(text.casefold().split())
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _counts(splits: Mapping[str, Sequence[str]], key: Callable[[str], Hashable]) -> Counts:
    keys = {name: [key(text) for text in texts] for name, texts in splits.items()}
    distinct = {name: set(found) for name, found in keys.items()}
    within = {name: len(found) - len(distinct[name]) for name, found in keys.items()}
    across = {
        f"{a}/{b}": sum(found in distinct[a] for found in keys[b])
        for a, b in combinations(splits, 2)
    }
    return within | across


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
