"""Which tokens of a text a model reads, in which batches, and the logits of texts from windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fasttx.errors import ConfigError
from fasttx.text.packing import RaggedIds
from fasttx.text.tokenizer import WORDS_ONLY, SpecialTokens


def by_length(ids: RaggedIds, batch_size: int) -> Iterator[np.ndarray]:
    """Index batches, longest texts first.

    A text's logits do not depend on its batch. Batches of equal lengths are fast on every device,
    and if memory does not suffice the first batch shows it.
    """
    order = np.argsort(-ids.lengths, kind="stable")
    return (order[i : i + batch_size] for i in range(0, len(order), batch_size))


def cut(
    ids: RaggedIds, max_len: int, truncation: str, long_texts: str, special: SpecialTokens
) -> tuple[RaggedIds, np.ndarray | None]:
    """The words of each text that a model predicts from, by TrainConfig's truncation and
    long_texts. With the special tokens around them they are at most max_len tokens.

    The second value is (windows,) int64, the text of each window, or None where each text is one.
    """
    room = max_len - len(special.before) - len(special.after)
    if room < 1:
        raise ConfigError(
            f"max_len is {max_len}; expected room for a word beside {max_len - room} special tokens"
        )
    if long_texts == "windows" and not ids.fits(room):
        return ids.windows(room)
    return ids.truncate(room, truncation), None


def read(
    ids: RaggedIds, max_len: int, truncation: str, long_texts: str, special: SpecialTokens
) -> tuple[RaggedIds, np.ndarray | None]:
    """`cut`, with the special tokens around each sequence."""
    pieces, owner = cut(ids, max_len, truncation, long_texts, special)
    return pieces.framed(special.before, special.after), owner


def mean_of_windows(logits: Tensor, owner: np.ndarray | None) -> Tensor:
    """Mean logits: (windows, num_classes) -> (texts, num_classes); every text has a window."""
    if owner is None or not len(owner):
        return logits
    of = torch.from_numpy(owner)
    sums = logits.new_zeros(int(owner[-1]) + 1, logits.shape[1]).index_add_(0, of, logits)
    return sums / torch.bincount(of)[:, None]


def drop_words(
    ids: RaggedIds, p: float, stream: tuple[int, ...], special: SpecialTokens = WORDS_ONLY
) -> RaggedIds:
    """`ids` with each word replaced by what stands for some word (<UNK>, [MASK]) with probability
    p; a pure function of `stream`."""
    if p == 0.0:
        return ids
    lost = np.random.default_rng(stream).random(len(ids.values)) < p
    lost &= ~np.isin(ids.values, special.reserved)
    return replace(ids, values=np.where(lost, np.int32(special.mask), ids.values))
