"""Texts that stay on disk, where they are too many for memory: a column of a `datasets` Dataset;
and the token ids that are made from it, in a file without a name that goes with the process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from fasttx.files import cache_folder
from fasttx.text.packing import RaggedIds
from fasttx.text.pieces import AnyTokenizer

STORED_FROM = 1 << 30  # bytes of a dataset: texts of a smaller one are read at once
BLOCK = 1000  # texts that are read together

Read = Callable[[RaggedIds], tuple[RaggedIds, np.ndarray | None]]


class StoredTexts(Sequence[str]):
    """The texts of one column of a `datasets.Dataset`, read a block at a time. rows (n,) int64:
    which of them, and in which order."""

    def __init__(self, dataset: Any, column: str, rows: np.ndarray | None = None) -> None:
        self._dataset, self._column = dataset, column
        self._rows = np.arange(len(dataset)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return self._read(self._rows[i])
        return self._read(self._rows[[i]])[0]

    def __iter__(self) -> Iterator[str]:
        for block in self.blocks():
            yield from block

    def blocks(self) -> Iterator[list[str]]:
        for at in range(0, len(self), BLOCK):
            yield self[at : at + BLOCK]

    def take(self, rows: np.ndarray) -> StoredTexts:
        return StoredTexts(self._dataset, self._column, self._rows[rows])

    def _read(self, rows: np.ndarray) -> list[str]:
        found: list[str] = self._dataset[rows.tolist()][self._column]
        return found


def encode_stored(
    tokenizer: AnyTokenizer, texts: StoredTexts, read: Read
) -> tuple[RaggedIds, np.ndarray | None]:
    """`read` of the ids of all texts, as of a list of them; the ids are a memory-mapped file in
    fasttx's cache folder."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    lengths, owners, cut = [np.zeros(1, np.int64)], [np.zeros(0, np.int64)], False
    done = 0
    with tempfile.TemporaryFile(dir=folder) as f:
        for block in texts.blocks():
            ids, owner = read(tokenizer.encode_batch(block))
            f.write(ids.values[ids.offsets[0] : ids.offsets[-1]].astype(np.int32).tobytes())
            lengths.append(ids.lengths)
            cut = cut or owner is not None
            owners.append(done + (np.arange(len(block)) if owner is None else owner))
            done += len(block)
        f.flush()
        offsets = np.cumsum(np.concatenate(lengths))
        values = np.zeros(0, np.int32)
        if offsets[-1]:  # the mapping outlives the file's name and the open file
            values = np.asarray(np.memmap(f, np.int32, "r", shape=(int(offsets[-1]),)))
    return RaggedIds(values, offsets), np.concatenate(owners) if cut else None
