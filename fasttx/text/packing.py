"""Text without padding: ragged token ids, packed batches, and the way from padded to packed.

Shapes: B sequences, T rows (tokens of the whole batch), L padded length, N tokens in a corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttx.ops.arguments import real_tokens

TRUNCATIONS = ("head", "tail", "head+tail")


@dataclass(frozen=True)
class RaggedIds:
    """Token ids of many texts in one flat array: text i is `values[offsets[i]:offsets[i + 1]]`.

    values (N,) int32, offsets (texts + 1,) int64.
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_lists(cls, sequences: Sequence[Sequence[int]]) -> RaggedIds:
        offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
        np.cumsum([len(s) for s in sequences], out=offsets[1:])
        values = np.fromiter((i for s in sequences for i in s), np.int32, count=int(offsets[-1]))
        return cls(values, offsets)

    @classmethod
    def concatenate(cls, parts: Sequence[RaggedIds]) -> RaggedIds:
        """The texts of all parts, one after the other."""
        lengths = np.concatenate([part.lengths for part in parts])
        offsets = np.append(np.zeros(1, dtype=np.int64), np.cumsum(lengths))
        values = [part.values[part.offsets[0] : part.offsets[-1]] for part in parts]
        return cls(np.concatenate(values), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        i = range(len(self))[i]
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """(texts,) int64."""
        return np.diff(self.offsets)

    def fits(self, max_len: int) -> bool:
        """Whether these are all of the values, and no text has more than `max_len`."""
        all_of_them = self.offsets[0] == 0 and self.offsets[-1] == len(self.values)
        return bool(all_of_them and self.lengths.max(initial=0) <= max_len)

    def _gather(self, starts: np.ndarray, lengths: np.ndarray) -> RaggedIds:
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        # row r of text i comes from starts[i] + (r - offsets[i])
        rows = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return RaggedIds(self.values[rows], offsets)

    def select(self, indices: np.ndarray) -> RaggedIds:
        """The texts with these indices, in their order."""
        indices = np.arange(len(self))[np.asarray(indices, dtype=np.int64)]
        return self._gather(self.offsets[indices], self.lengths[indices])

    def truncate(self, max_len: int, how: str = "head") -> RaggedIds:
        """Cut every text to at most `max_len` tokens: its head, its tail, or half of each."""
        if how not in TRUNCATIONS:
            raise ValueError(f"truncation {how!r}; expected one of {', '.join(TRUNCATIONS)}")
        if self.fits(max_len):
            return self
        lengths = np.minimum(self.lengths, max_len)
        if how == "head":
            return self._gather(self.offsets[:-1], lengths)
        if how == "tail":
            return self._gather(self.offsets[1:] - lengths, lengths)
        head = np.minimum(lengths, np.where(self.lengths > max_len, max_len // 2, max_len))
        pieces = np.stack([self.offsets[:-1], self.offsets[1:] - (lengths - head)], 1).ravel()
        halves = self._gather(pieces, np.stack([head, lengths - head], 1).ravel())
        return RaggedIds(halves.values, halves.offsets[::2].copy())

    def framed(self, before: Sequence[int], after: Sequence[int]) -> RaggedIds:
        """Every sequence between `before` and `after`."""
        if not before and not after:
            return self
        lengths = self.lengths + (len(before) + len(after))
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        starts, ends = offsets[:-1], offsets[1:]
        values = np.empty(offsets[-1], dtype=self.values.dtype)
        inside = np.ones(len(values), dtype=bool)
        for i, token in enumerate(before):
            values[starts + i], inside[starts + i] = token, False
        for i, token in enumerate(after):
            at = ends - (len(after) - i)
            values[at], inside[at] = token, False
        values[inside] = self.values[self.offsets[0] : self.offsets[-1]]
        return RaggedIds(values, offsets)

    def windows(self, max_len: int) -> tuple[RaggedIds, np.ndarray]:
        """Cut every text into the fewest windows of at most `max_len` tokens.

        The windows of a text differ by at most one token in length. The second value is the text
        of each window, (windows,) int64.
        """
        pieces = np.maximum(1, -(-self.lengths // max_len))
        owner = np.repeat(np.arange(len(self)), pieces)
        k = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        start = self.offsets[owner] + self.lengths[owner] * k // pieces[owner]
        offsets = np.append(start, self.offsets[-1:])
        return RaggedIds(self.values, offsets), owner


@dataclass(frozen=True)
class PackedBatch:
    """B texts end to end in T rows; rows past `cu_seqlens[-1]` belong to no text (a dead tail).

    input_ids (T,) int64, position_ids (T,) int32, cu_seqlens (B + 1,) int32. max_seqlen is an upper
    bound on the lengths; it affects speed only. labels are (B,) int64, or (B, C) float32, the
    probability of each class, or None. Where `rows` (M,) int64 is set, the labels (M,) belong to
    these rows, not to the texts.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labels: Tensor | None = None
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """For DataLoader and for asynchronous copies to a GPU."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        changed: dict[str, Any] = {
            k: change(v) for k, v in vars(self).items() if torch.is_tensor(v)
        }
        return replace(self, **changed)

    def model_inputs(self) -> dict[str, Tensor | int]:
        """The arguments of the model's forward."""
        rows: dict[str, Tensor | int] = {} if self.rows is None else {"rows": self.rows}
        return rows | {
            "input_ids": self.input_ids,
            "cu_seqlens": self.cu_seqlens,
            "position_ids": self.position_ids,
            "max_seqlen": self.max_seqlen,
        }


def pack(
    ids: RaggedIds, labels: np.ndarray | None = None, *, token_multiple: int = 1
) -> PackedBatch:
    """The batch of `ids`, end to end. labels: (B,) integers, or (B, C) probabilities.

    T is rounded up to a multiple of `token_multiple` with a dead tail of <PAD>, for devices that
    compile or cache one program for each shape.
    """
    starts, lengths = ids.offsets[:-1], ids.lengths
    total = int(ids.offsets[-1])
    rows = -(-total // token_multiple) * token_multiple
    input_ids = np.zeros(rows, dtype=np.int64)
    input_ids[:total] = ids.values
    position_ids = np.zeros(rows, dtype=np.int32)
    position_ids[:total] = np.arange(total) - np.repeat(starts, lengths)
    if labels is not None:
        soft = np.issubdtype(np.asarray(labels).dtype, np.floating)
        labels = np.asarray(labels, dtype=np.float32 if soft else np.int64)
    return PackedBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        torch.from_numpy(ids.offsets.astype(np.int32)),
        int(lengths.max(initial=0)),
        None if labels is None else torch.from_numpy(labels),
    )


def unpad(
    input_ids: Tensor, attention_mask: Tensor | None = None, pad_id: int = 0
) -> tuple[Tensor, Tensor]:
    """Pack the real tokens of a padded batch: input_ids (B, L) -> (T,), and cu_seqlens (B + 1,).

    attention_mask (B, L) bool or 0/1, 1 = real token; None means `input_ids != pad_id`. Padding may
    be on either side or in between. Under torch.compile the shape is fixed: T = B * L, and the
    padding becomes a dead tail. Raises TypeError and ValueError for other masks, additive ones
    among them: their values are read on the CPU only, since elsewhere that would wait for the
    device.
    """
    shape = tuple(input_ids.shape)
    mask = input_ids != pad_id if attention_mask is None else real_tokens(attention_mask, shape)
    cu_seqlens = mask.new_zeros(len(mask) + 1, dtype=torch.int32)
    cu_seqlens[1:] = mask.sum(1).cumsum(0)
    flat = mask.flatten()
    if torch.compiler.is_compiling():
        order = (~flat).to(torch.uint8).argsort(stable=True)
        return input_ids.flatten()[order], cu_seqlens
    return input_ids.flatten()[flat], cu_seqlens


def sequence_ids(cu_seqlens: Tensor, rows: int) -> Tensor:
    """(rows,) int64: the sequence of each row; B in the dead tail."""
    row = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)


def positions(cu_seqlens: Tensor, rows: int) -> Tensor:
    """(rows,) int32: the position of each row in its sequence; 0 in the dead tail."""
    sequence = sequence_ids(cu_seqlens, rows)
    row = torch.arange(rows, device=cu_seqlens.device, dtype=torch.int32)
    dead = sequence == len(cu_seqlens) - 1
    return (row - cu_seqlens[sequence]).masked_fill(dead, 0)


def shuffled_batches(count: int, batch_size: int, *, seed: int, epoch: int) -> Iterable[np.ndarray]:
    """Index arrays of one epoch: a pure function of (seed, epoch), so a resume needs no state."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return (order[i : i + batch_size] for i in range(0, count, batch_size))
