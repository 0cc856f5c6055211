"""Which tokens of a text a model reads, in which batches, and the logits of texts from windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fasttx.text.packing import RaggedIds
from fasttx.text.tokenizer import UNK_ID


def by_length(ids: RaggedIds, batch_size: int) -> Iterator[np.ndarray]:
    """Index batches, longest texts first.

    A text's logits do not depend on its batch. Batches of equal lengths are fast on every device,
    and if memory does not suffice the first batch shows it.
    """
    order = np.argsort(-ids.lengths, kind="stable")
    return (order[i : i + batch_size] for i in range(0, len(order), batch_size))


def read(
    ids: RaggedIds, max_len: int, truncation: str, long_texts: str
) -> tuple[RaggedIds, np.ndarray | None]:
    """The token ids that a model predicts from, by TrainConfig's truncation and long_texts.

    The second value is (windows,) int64, the text of each window, or None where each text is one.
    """
    if long_texts == "windows" and not ids.fits(max_len):
        return ids.windows(max_len)
    return ids.truncate(max_len, truncation), None


def mean_of_windows(logits: Tensor, owner: np.ndarray | None) -> Tensor:
    """Mean logits: (windows, num_classes) -> (texts, num_classes); every text has a window."""
    if owner is None or not len(owner):
        return logits
    of = torch.from_numpy(owner)
    sums = logits.new_zeros(int(owner[-1]) + 1, logits.shape[1]).index_add_(0, of, logits)
    return sums / torch.bincount(of)[:, None]


def drop_words(ids: RaggedIds, p: float, stream: tuple[int, ...]) -> RaggedIds:
    """`ids` with each word replaced by <UNK> with probability p; a pure function of `stream`."""
    if p == 0.0:
        return ids
    lost = np.random.default_rng(stream).random(len(ids.values)) < p
    return replace(ids, values=np.where(lost, np.int32(UNK_ID), ids.values))
