"""Splits whose texts all have the same label, on which nothing can be measured, are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fasttx.errors import DataError
from fasttx.text.cells import shown

_FEW = 10  # texts of a split which say nothing about all


def check_classes(
    splits: Mapping[str, np.ndarray],
    pools: Mapping[str, np.ndarray],
    names: Sequence[str],
    order: str,
) -> None:
    """Raise DataError for a split with one class. pools: what the splits were drawn from."""
    for which, found in splits.items():
        count, present = len(found), np.unique(found)
        # A tenth of few texts may be a single text, which has one label however it is drawn.
        if len(present) > 1 or (which == "validation" and count == 1):
            continue
        name = names[present[0]]
        if len(np.unique(pools[which])) == 1:
            why, remedy = "The data it comes from has no other label", "Use data that has several"
        elif order == "file":
            why = "Its rows were taken in the file's order, and the file is sorted by label"
            remedy = "Draw the subset shuffled (--subset-order shuffled)"
        else:
            counts = np.bincount(pools[which], minlength=len(names)).tolist()
            rare = ", ".join(
                f"{n!r} ({k:,} rows)" for n, k in zip(names, counts, strict=True) if k and n != name
            )
            why = f"It is too small for the rarer labels, or they are too few to share: {rare}"
            remedy = "Take more rows, or add some with these labels"
        raise DataError(
            f"the {which} split ({count:,} rows) has only the label {name!r}: a model that always "
            f"answers {name!r} scores 100 % on it, so accuracy would mean nothing. {why}. "
            f"{remedy}, or pass --allow-single-class to go on all the same"
        )


def check_varied(splits: Mapping[str, np.ndarray]) -> None:
    """Raise DataError for a split whose texts all have the same labels, or the same number. A few
    texts may have that by chance, but not those of train."""
    for which, found in splits.items():
        few = which != "train" and len(found) < _FEW
        if not few and (found == found[0]).all():
            raise DataError(
                f"all {len(found):,} texts of the {which} split have the same label "
                f"({shown(found[0].tolist())}): a model that always gives it scores best, "
                "so what is measured would mean nothing. Use data that has several, or pass "
                "--allow-single-class to go on all the same"
            )
