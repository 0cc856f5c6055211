"""Texts that stay on disk are the same texts, and so are their ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fasttx.config import TrainConfig
from fasttx.text import corpora, splits, stored
from fasttx.text.packing import RaggedIds
from fasttx.text.reading import read
from fasttx.text.stored import StoredTexts, encode_stored
from fasttx.text.tokenizer import Tokenizer
from tests.datafiles import SAVED, write

datasets = pytest.importorskip("datasets")
TEXTS = [" ".join(["word", "naïve", f"w{i % 9}"][: i % 4]) + " x" * (i % 13) for i in range(60)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpora, "STORED_FROM", 0)
    monkeypatch.setattr(stored, "BLOCK", 7)
    monkeypatch.setenv("FASTTX_CACHE", str(tmp_path / "cache"))


def on_disk() -> StoredTexts:
    return StoredTexts(datasets.Dataset.from_dict({"text": TEXTS}), "text")


def test_they_are_a_sequence() -> None:
    texts = on_disk()
    assert (len(texts), list(texts), texts[3], texts[-1]) == (60, TEXTS, TEXTS[3], TEXTS[-1])
    assert texts[5:20] == TEXTS[5:20]
    some = texts.take(np.array([9, 2, 9])).take(np.array([2, 1]))
    assert list(some) == [TEXTS[9], TEXTS[2]]
    with pytest.raises(IndexError):
        texts[60]


def test_a_saved_dataset_gives_the_same_splits(tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / f"a{SAVED}", [(t, i % 3) for i, t in enumerate(TEXTS)])
    config = TrainConfig(dataset=str(path), train_samples=40)
    found = splits.load(config)
    assert all(
        isinstance(s.texts, StoredTexts) for s in (found.train, found.validation, found.test)
    )
    monkeypatch.setattr(corpora, "STORED_FROM", 1 << 40)
    wanted = splits.load(config)
    assert isinstance(wanted.train.texts, list)
    assert found.describe() == wanted.describe() and found.notes == wanted.notes
    assert found.duplicates["exact"]["train"] > 0
    assert list(found.train.texts) == wanted.train.texts


@pytest.mark.parametrize("max_len", [4, 40])
@pytest.mark.parametrize("long_texts", ["cut", "windows"])
def test_their_ids_are_those_of_a_list(max_len: int, long_texts: str) -> None:
    tokenizer = Tokenizer.train(TEXTS)

    def reading(ids: RaggedIds) -> tuple[RaggedIds, np.ndarray | None]:
        return read(ids, max_len, "tail", long_texts, tokenizer.special)

    ids, owner = encode_stored(tokenizer, on_disk(), reading)
    wanted, wanted_owner = reading(tokenizer.encode_batch(TEXTS))
    assert isinstance(ids.values.base, np.memmap)
    lists = [[r[i].tolist() for i in range(len(r))] for r in (ids, wanted)]
    assert lists[0] == lists[1]
    assert (owner is None) == (wanted_owner is None)
    if owner is not None:
        np.testing.assert_array_equal(owner, wanted_owner)
    picked = ids.select(np.array([5, 1]))
    assert picked[0].tolist() == wanted[5].tolist()
