"""Every way a dataset comes in, what it is split into, and what is said of a broken one."""

from __future__ import annotations

import builtins
import contextlib
import csv
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttx.config import TrainConfig
from fasttx.errors import DataError
from fasttx.text import corpora
from fasttx.text import splits as data
from fasttx.text.splits import load, load_for_evaluation, resolve
from tests.datafiles import SUFFIXES, Rows, reviews, write, write_tree


def load_path(path: Path, **settings: Any) -> data.TextDataset:
    return load(TrainConfig(dataset=str(path), **settings))


def fits(dataset: data.TextDataset) -> None:
    """Every text still has the label that it says."""
    for split in (dataset.train, dataset.validation, dataset.test):
        assert split.labels.dtype == np.int64 and split.labels.shape == (len(split.texts),)
        for text, label in zip(split.texts, split.labels.tolist(), strict=True):
            assert text.endswith(" " + dataset.label_names[label])


def same(a: data.Split, b: data.Split) -> bool:
    return a.texts == b.texts and a.labels.tolist() == b.labels.tolist()


def label_counts(split: data.Split, names: list[str]) -> dict[str, int]:
    counts = np.bincount(split.labels, minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [suffix[1:] for suffix in SUFFIXES])
@pytest.mark.parametrize("labels", [("bad", "good"), (0, 1)], ids=["words", "numbers"])
def test_formats(tmp_path: Path, kind: str, labels: tuple[Any, ...]) -> None:
    folder = tmp_path / "mine"
    write(folder / f"train.{kind}", reviews(40, labels))
    write(folder / f"test.{kind}", reviews(10, labels, 100))
    found = load_path(folder)
    assert found.name == "mine" and found.label_names == [str(label) for label in labels]
    assert [len(s.texts) for s in (found.train, found.validation, found.test)] == [36, 4, 10]
    assert found.test.texts == [text for text, _ in reviews(10, labels, 100)]
    assert not set(found.train.texts) & set(found.validation.texts)
    assert found.notes == []
    fits(found)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "json", "tsv.gz"])
def test_single_file_is_split(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"all.{kind}", reviews(100, ("bad", "good", "so-so", "good")))
    found = load_path(path)
    assert found.name == "all" and found.label_names == ["bad", "good", "so-so"]
    assert [len(s.texts) for s in (found.train, found.validation, found.test)] == [81, 9, 10]
    counts = label_counts(found.test, found.label_names)
    assert counts["good"] == 5 and set(counts.values()) <= {2, 3, 5}
    texts = [*found.train.texts, *found.validation.texts, *found.test.texts]
    assert sorted(texts) == sorted(
        text for text, _ in reviews(100, ("bad", "good", "so-so", "good"))
    )
    assert "10 of its rows are held out" in " ".join(found.notes)
    fits(found)


def test_only_file_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "reviews.csv", reviews(50))
    assert len(load_path(tmp_path).test.texts) == 5


def test_sharded_parquet(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"train-0000{i}-of-00003.parquet", reviews(20, start=20 * i))
    write(tmp_path / "test-00000-of-00001.parquet", reviews(10, start=100))
    found = load_path(tmp_path)
    assert len(found.train.texts) == 54
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match=r"3 shards of train.* missing .*: 1; bring them back"):
        load_path(tmp_path)


def test_tree(tmp_path: Path) -> None:
    root = tmp_path / "aclImdb"
    write_tree(root / "train", reviews(60, ("neg", "pos")))
    write_tree(root / "test", reviews(20, ("neg", "pos"), 100))
    write_tree(root / "train", [("not labelled", "unsup")])
    (root / "train" / "labeledBow.feat").write_text("0 9:1\n")
    (root / "README").write_text("Large Movie Review Dataset")
    (root / ".hidden").write_text("")
    found = load_path(root)
    assert found.name == "imdb" and found.label_names == ["negative", "positive"]
    said = [note for note in found.notes if note.startswith("ignored")]
    assert said == [f"ignored in {root}: .hidden, README, train/labeledBow.feat"]
    assert f"is not trained on: {root / 'train' / 'unsup'} (fasttx pretrain" in " ".join(
        found.notes
    )
    assert label_counts(found.train, found.label_names) == {"negative": 27, "positive": 27}
    assert found.test.texts[0] == "100 neg" and found.test.labels.tolist() == [0] * 10 + [1] * 10


def test_tree_of_any_labels(tmp_path: Path) -> None:
    labels = ("sport", "arts", "law")
    write_tree(tmp_path / "train", reviews(60, labels))
    write_tree(tmp_path / "validation", reviews(12, labels, 100))
    write_tree(tmp_path / "test", reviews(30, labels, 200))
    found = load_path(tmp_path)
    assert found.label_names == ["arts", "law", "sport"]
    fits(found)


@pytest.mark.parametrize("several", [True, False])
def test_save_to_disk(tmp_path: Path, several: bool) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"review": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )

    def made(rows: Rows) -> Any:
        columns = {
            "review": [t for t, _ in rows],
            "label": [int(label == "yes") for _, label in rows],
        }
        return datasets.Dataset.from_dict(columns, features=features)

    train, test = reviews(40, ("yes", "no")), reviews(10, ("yes", "no"), 100)
    if several:
        splits = {"train": made(train), "test": made(test), "unsupervised": made(test)}
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    else:
        made(train).save_to_disk(str(tmp_path / "saved"))
    found = load_path(tmp_path / "saved")
    assert found.name == "saved" and found.label_names == ["no", "yes"]
    assert len(found.test.texts) == (10 if several else 4)
    assert any("the texts are in 'review'" in note for note in found.notes)
    assert any("unsupervised" in note for note in found.notes) == several
    fits(found)


def test_class_names_in_parquet(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    columns = {"text": [f"{i} {'no yes'.split()[i % 2]}" for i in range(40)], "label": [0, 1] * 20}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "a.parquet"))
    found = load_path(tmp_path / "a.parquet")
    assert found.label_names == ["no", "yes"]
    fits(found)
    # A model that learned them in another order is asked by name, not by number.
    split = load_for_evaluation(str(tmp_path / "a.parquet"), ["yes", "no"])
    assert split.labels.tolist() == [1, 0] * 20


def test_other_files_are_named_and_ignored(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", reviews(40))
    write(tmp_path / "test.csv", reviews(10))
    write(tmp_path / "unsupervised.parquet", [("x", -1)])
    (tmp_path / "train.log").write_text("what is this")
    (tmp_path / "test").mkdir()
    ignored, unread = load_path(tmp_path).notes
    assert ignored == f"ignored in {tmp_path}: test, train.log"
    assert unread.startswith("texts without labels, which a classifier is not trained on: ")
    assert f"{tmp_path / 'unsupervised.parquet'} (fasttx pretrain reads them" in unread


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    """A byte-order mark, CRLF, quoted commas, quotes and line breaks, and a very long text."""
    long = "so " * 100_000 + "long"
    rows = ['"a, ""quoted""\r\ntext",good', "", "plain, bad".replace(", ", ","), f"{long},good"]
    body = "\r\n".join(["text, label", *rows, *(f"t{i},bad" for i in range(6))])
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + body.encode())
    limit = csv.field_size_limit()
    split = load_for_evaluation(str(tmp_path / "a.csv"), ["bad", "good"])
    assert split.texts[:3] == ['a, "quoted"\r\ntext', "plain", long]
    assert split.labels.tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 0]
    assert csv.field_size_limit() == limit


def test_tsv_without_quoting(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('sentence\tlabel\n"Great" film\t1\na 3" disc\t0\n')
    split = load_for_evaluation(str(tmp_path / "a.tsv"), ["0", "1"])
    assert split.texts == ['"Great" film', 'a 3" disc'] and split.labels.tolist() == [1, 0]


def test_jsonl_with_any_unicode(tmp_path: Path) -> None:
    rows = [("line\u2028separator", 1), ("\U0001f600 \ud800", 0)]
    split = load_for_evaluation(str(write(tmp_path / "a.jsonl", rows)), ["0", "1"])
    assert split.texts == [text for text, _ in rows]
    assert data._fingerprint([split])  # a lone surrogate has no UTF-8, and must not stop a run


# --- columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns",
    [("text", "label"), ("Review", "Sentiment"), ("content", "stars"), ("words", "label"),
     ("text", "y"), ("body", "class")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_columns_are_found(tmp_path: Path, columns: tuple[str, str], kind: str) -> None:
    found = load_path(write(tmp_path / f"a.{kind}", reviews(40), columns))
    fits(found)
    said = any(f"texts are in {columns[0]!r}" in note for note in found.notes)
    assert said == (columns != ("text", "label"))


def test_columns_beside_others(tmp_path: Path) -> None:
    rows = [{"id": i, "title": "t", "text": f"{i} {i % 2}", "label": i % 2} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fits(load_path(tmp_path / "a.jsonl"))


def test_columns_by_name(tmp_path: Path) -> None:
    rows = [{"text": "no", "label": 3, "mine": f"{i} {i % 2}", "own": i % 2} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fits(load_path(tmp_path / "a.jsonl", text_column="mine", label_column="own"))
    with pytest.raises(DataError, match=r"'text', 'label', 'mine', 'own'; --text-column is 'body'"):
        load_path(tmp_path / "a.jsonl", text_column="body")


def test_columns_that_cannot_be_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("one,two,three\na,b,c\n")
    with pytest.raises(DataError, match=r"'one', 'two', 'three'.*Name it with --text-column"):
        load_path(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("id,text\n1,b\n")
    with pytest.raises(DataError, match=r"'id', 'text'.*Name it with --label-column"):
        load_path(tmp_path / "a.csv")


def test_csv_without_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("I loved it,1\nI hated it,0\n")
    with pytest.raises(DataError, match="expected the names of the columns"):
        load_path(tmp_path / "a.csv")


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ((1, 2, 3, 4, 5), ["1", "2", "3", "4", "5"]),
        ((-1, 0, 1), ["-1", "0", "1"]),
        ((10, 9), ["9", "10"]),
        ((0.0, 1.0), ["0", "1"]),
        ((True, False), ["False", "True"]),
        (("b", "a", "C"), ["C", "a", "b"]),
        (("10", "9"), ["9", "10"]),
        (("1", "2", "none"), ["1", "2", "none"]),
        (("01", "02"), ["01", "02"]),
        (("pos", "neg"), ["negative", "positive"]),
        (tuple(range(12)), [str(i) for i in range(12)]),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_label_names(tmp_path: Path, labels: tuple[Any, ...], names: list[str], kind: str) -> None:
    rows = reviews(240, labels)
    path = write(tmp_path / f"a.{kind}", rows)
    found = load_path(path)
    assert found.label_names == names
    written = {"pos": "positive", "neg": "negative", "0.0": "0", "1.0": "1"}
    number = {text: names.index(written.get(str(label), str(label))) for text, label in rows}
    for split in (found.train, found.validation, found.test):
        assert split.labels.tolist() == [number[text] for text in split.texts]
    # And a model with these names finds them again.
    again = load_for_evaluation(str(path), names, label_numbers=found.label_numbers)
    assert again.labels.tolist() == list(number.values())


def test_float_labels_of_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "a,1.0\nb,0.0\n" * 10)
    assert load_path(tmp_path / "a.csv").label_names == ["0", "1"]


@pytest.mark.parametrize("folder", ["imdb", "IMDB", "aclImdb"])
def test_a_folder_called_imdb(tmp_path: Path, folder: str) -> None:
    for split in ("train", "test"):
        write(tmp_path / folder / f"{split}.parquet", reviews(40, (0, 1)))
    found = load_path(tmp_path / folder)
    assert found.name == "imdb" and found.label_names == ["negative", "positive"]


def test_labels_unknown_to_train(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", reviews(40))
    write(tmp_path / "test.csv", reviews(12, ("bad", "good", "awful")))
    with pytest.raises(DataError, match=r"test.csv has labels that .*train.csv has not: 'awful'"):
        load_path(tmp_path)


def test_unlabelled(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", reviews(40, (0, 1) if split == "train" else (-1,)))
    with pytest.raises(DataError, match=r"every label of .*test.parquet is -1"):
        load_path(tmp_path)
    with pytest.raises(DataError, match=r"every label of .*test.parquet is -1"):
        load_for_evaluation(str(tmp_path), ["0", "1"])


def test_column_of_identifiers_is_no_label(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", [(f"t{i}", f"user{i}") for i in range(20)], ("text", "user"))
    with pytest.raises(DataError, match="another label in every row.*--label-column"):
        load_path(tmp_path / "a.csv")


# --- broken files ---------------------------------------------------------------------------------


def broken_parquet(path: Path) -> None:
    write(path, reviews(100))
    path.write_bytes(path.read_bytes()[:500])


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "empty csv": ("a.csv", lambda p: p.write_bytes(b""), "a.csv is empty"),
    "empty jsonl": ("a.jsonl", lambda p: p.write_bytes(b"\n\n"), "a.jsonl is empty"),
    "empty parquet": ("a.parquet", lambda p: p.write_bytes(b""), "a.parquet is empty"),
    "header only": ("a.csv", lambda p: p.write_bytes(b"text,label\n"), "holds no rows"),
    "cut parquet": ("a.parquet", broken_parquet, "a.parquet cannot be read as parquet"),
    "foreign parquet": (
        "a.parquet", lambda p: p.write_bytes(b"x" * 99), "a.parquet cannot be read as parquet"
    ),
    "too many fields": (
        "a.csv", lambda p: p.write_bytes(b"text,label\na,0\nwell, yes,1\n"),
        r"a.csv, line 3: 3 fields, and the header has 2 .*double quotes",
    ),
    "open quote": (
        "a.csv", lambda p: p.write_bytes(b'text,label\na,0\n"b,1\nc,0\n'), "a.csv, line 3:"
    ),
    "quote inside": (
        "a.csv", lambda p: p.write_bytes(b'text,label\na,0\n"b" c,1\n'), "a.csv, line 3:"
    ),
    "two columns of one name": (
        "a.csv", lambda p: p.write_bytes(b"text,text\na,0\n"), "two columns of one name"
    ),
    "no label in csv": (
        "a.csv", lambda p: p.write_bytes(b"text,label\na,0\nb,\n"),
        r"a.csv, line 3: the label \(column 'label'\) is missing",
    ),
    "label after an empty text": (
        "a.csv", lambda p: p.write_bytes(b'text,label\n"a\n\nb",0\n,1\nc,\n'),
        r"a.csv, line 6: the label \(column 'label'\) is missing",
    ),
    "latin-1": (
        "a.csv", lambda p: p.write_bytes(b"text,label\na,0\ncaf\xe9,1\n"),
        "a.csv, line 3: byte 0xe9 is not UTF-8",
    ),
    "bad json": (
        "a.jsonl", lambda p: p.write_bytes(b'{"text": "a", "label": 0}\n{"text": \n'),
        "a.jsonl, line 2: not JSON",
    ),
    "deep json": ("a.jsonl", lambda p: p.write_bytes(b"[" * 200_000), "a.jsonl, line 1: not JSON"),
    "json that is no object": (
        "a.jsonl", lambda p: p.write_bytes(b'{"text": "a", "label": 0}\n[1]\n'),
        r"a.jsonl, line 2: \[1\]; expected an object",
    ),
    "no label in json": (
        "a.jsonl", lambda p: p.write_bytes(b'{"text": "a", "label": 0}\n\n{"text": "b"}\n'),
        "a.jsonl, line 3: the label .* is missing",
    ),
    "NaN in json": (
        "a.jsonl", lambda p: p.write_bytes(b'{"text": "a", "label": NaN}\n'), "label .* is missing"
    ),
    "text that is a number": (
        "a.jsonl", lambda p: p.write_bytes(b'{"text": 5, "label": 0}\n'), "line 1: the text .* is 5"
    ),
    "two labels": (
        "a.jsonl", lambda p: p.write_bytes(b'{"text": "a", "label": [0, 1]}\n'),
        r"the label .* is \[0, 1\]; expected an integer or a word",
    ),
    "label between": (
        "a.jsonl", lambda p: p.write_bytes(b'{"text": "a", "label": 2.5}\n'), "label .* is 2.5"
    ),
    "unknown kind": ("a.xlsx", lambda p: p.write_bytes(b"PK"), "a.xlsx is of an unknown kind"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("evaluation", [False, True], ids=["load", "evaluate"])
def test_broken_files(tmp_path: Path, case: str, evaluation: bool) -> None:
    name, make, message = BROKEN[case]
    make(tmp_path / name)
    read = (lambda path: load_for_evaluation(path, ["0", "1"])) if evaluation else load_path
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_missing_values_of_parquet(tmp_path: Path) -> None:
    rows: Rows = reviews(10)
    rows[6] = (None, "bad")
    with pytest.raises(DataError, match=r"a.parquet, row 7: the text .* is missing"):
        load_path(write(tmp_path / "a.parquet", rows))
    rows[6] = ("x", None)
    with pytest.raises(DataError, match=r"a.parquet, row 7: the label .* is missing"):
        load_path(write(tmp_path / "a.parquet", rows))


def test_text_file_of_a_tree_that_is_not_utf8(tmp_path: Path) -> None:
    write_tree(tmp_path / "train", reviews(10))
    (tmp_path / "train" / "bad" / "x.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"x.txt, line 1: byte 0xe9"):
        load_path(tmp_path)


def test_missing_path() -> None:
    with pytest.raises(DataError, match=r"'no/such/path'.*expected auto, imdb, demo, or the path"):
        resolve("no/such/path")


def test_folder_without_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no dataset.*It holds nothing"):
        load_path(tmp_path)
    (tmp_path / "notes.md").write_text("hm")
    with pytest.raises(DataError, match="holds no dataset.*It holds 'notes.md'"):
        load_path(tmp_path)


def test_folder_without_train(tmp_path: Path) -> None:
    write(tmp_path / "test.csv", reviews(10))
    with pytest.raises(DataError, match="has no train split; it has test. Expected train"):
        load_path(tmp_path)


def test_split_there_twice(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", reviews(10))
    write(tmp_path / "train.parquet", reviews(10))
    with pytest.raises(DataError, match="more than once: 'train.csv', 'train.parquet'"):
        load_path(tmp_path)
    (tmp_path / "train.parquet").unlink()
    write_tree(tmp_path / "train", reviews(10))
    with pytest.raises(DataError, match="more than once: 'train.csv', 'train'"):
        load_path(tmp_path)


def test_damaged_save_to_disk(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a folder of datasets' save_to_disk"):
        load_path(tmp_path)


# --- splits and subsets ---------------------------------------------------------------------------


def test_given_validation_is_used(tmp_path: Path) -> None:
    for split, count in (("train", 40), ("valid", 14), ("test", 10)):
        write(tmp_path / f"{split}.csv", reviews(count))
    found = load_path(tmp_path)
    assert [len(s.texts) for s in (found.train, found.validation, found.test)] == [40, 14, 10]
    found = load_path(tmp_path, train_samples=30, test_samples=4)
    assert [len(s.texts) for s in (found.train, found.validation, found.test)] == [30, 3, 4]
    with pytest.raises(DataError, match=r"train_samples is 41; .*train.csv has 40 rows"):
        load_path(tmp_path, train_samples=41)


def test_validation_serves_as_test(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", reviews(40))
    write(tmp_path / "dev.csv", reviews(14, start=100))
    found = load_path(tmp_path)
    assert [len(s.texts) for s in (found.train, found.validation, found.test)] == [36, 4, 14]
    assert any("validation split is the test split" in note for note in found.notes)


@pytest.mark.parametrize("weights", [(1, 1), (7, 2, 1), (1, 1, 1, 1, 1, 1, 1), (97, 3)])
@pytest.mark.parametrize("asked", [100, 333, 500, None])
def test_stratified(tmp_path: Path, weights: tuple[int, ...], asked: int | None) -> None:
    labels = tuple(str(i) for i, w in enumerate(weights) for _ in range(w))
    write(tmp_path / "train.jsonl", sorted(reviews(800, labels), key=lambda row: str(row[1])))
    write(tmp_path / "test.jsonl", sorted(reviews(400, labels), key=lambda row: str(row[1])))
    samples = {"train_samples": asked, "test_samples": asked and asked // 2}
    found = load_path(tmp_path, **samples, allow_single_class=True)
    sizes = (asked, asked // 10, asked // 2) if asked else (720, 80, 400)
    of_train = np.bincount([int(label) for _, label in reviews(800, labels)]) / 800
    of_test = np.bincount([int(label) for _, label in reviews(400, labels)]) / 400
    for split, size, shares in zip(
        (found.train, found.validation, found.test),
        sizes,
        (of_train, of_train, of_test),
        strict=True,
    ):
        counts = np.bincount(split.labels, minlength=len(weights))
        assert counts.sum() == size
        assert np.abs(counts - size * shares).max() <= 1
    assert not set(found.train.texts) & set(found.validation.texts)
    assert (np.diff(found.train.labels) < 0).any(), "the order is shuffled"
    fits(found)


def test_subsets_are_a_function_of_the_seed(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", reviews(200))
    write(tmp_path / "test.csv", reviews(100, start=500))
    a, b, c = (load_path(tmp_path, train_samples=50, test_samples=20, seed=s) for s in (1, 1, 2))
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert same(a.train, b.train) and same(a.test, b.test) and not same(a.test, c.test)
    # The test subset does not hang on how much is trained on.
    assert same(a.test, load_path(tmp_path, train_samples=60, test_samples=20, seed=1).test)
    shared = load_path(tmp_path, train_samples=50, test_samples=20, seed=2, split_seed=1)
    assert shared.fingerprint == a.fingerprint


def test_held_out_test_of_a_single_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", reviews(200))
    a, b, c = (load_path(path, seed=seed) for seed in (1, 1, 2))
    assert same(a.test, b.test) and not same(a.test, c.test)
    assert same(a.test, load_path(path, seed=1, train_samples=30).test)
    assert load_path(path, seed=2, split_seed=1).fingerprint == a.fingerprint


def test_fingerprint_sees_texts_and_labels(tmp_path: Path) -> None:
    rows = reviews(40)
    first = load_path(write(tmp_path / "a.csv", rows)).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert first == load_path(write(tmp_path / "b.parquet", rows)).fingerprint
    rows[0], rows[1] = (rows[0][0], rows[1][1]), (rows[1][0], rows[0][1])
    assert first != load_path(write(tmp_path / "a.csv", rows)).fingerprint


def test_order_of_the_file(tmp_path: Path) -> None:
    train, test = reviews(100), reviews(50, start=100)
    write(tmp_path / "train.csv", train)
    write(tmp_path / "test.csv", test)
    found = load_path(tmp_path, subset_order="file", train_samples=40, test_samples=10)
    assert found.train.texts == [text for text, _ in train[:40]]
    assert found.validation.texts == [text for text, _ in train[40:44]]
    assert found.test.texts == [text for text, _ in test[:10]]
    whole = load_path(tmp_path, subset_order="file")
    assert whole.train.texts + whole.validation.texts == [text for text, _ in train]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_samples": 95}, "is 95: with 9 more .* 104 rows, .* has 100; expected at most 91"),
        ({"train_samples": 101}, "expected at most 91"),
        ({"test_samples": 51}, r"test_samples is 51; the test split of .* has 50 rows"),
    ],
)  # fmt: skip
def test_more_than_there_is(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    write(tmp_path / "train.csv", reviews(100))
    write(tmp_path / "test.csv", reviews(50))
    assert len(load_path(tmp_path, train_samples=91).train.texts) == 91
    with pytest.raises(DataError, match=message):
        load_path(tmp_path, **settings)


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_rows_to_split(tmp_path: Path, count: int) -> None:
    with pytest.raises(DataError, match="leaves 1 row"):
        load_path(write(tmp_path / "a.csv", reviews(count)))


def sorted_by_label(folder: Path) -> Path:
    for split in ("train", "test"):
        write(folder / f"{split}.csv", sorted(reviews(200), key=lambda row: row[1]))
    return folder


def test_single_class_is_refused(tmp_path: Path) -> None:
    """Where a file is sorted by label, a constant answer scores 100 % on its first rows."""
    sorted_by_label(tmp_path)
    settings: dict[str, Any] = {"subset_order": "file", "train_samples": 50, "test_samples": 20}
    with pytest.raises(DataError, match=r"train split \(50 rows\) has only the label 'bad'") as e:
        load_path(tmp_path, **settings)
    assert "sorted by label" in str(e.value) and "--allow-single-class" in str(e.value)
    assert "--subset-order shuffled" in str(e.value) and "100 %" in str(e.value)

    allowed = load_path(tmp_path, **settings, allow_single_class=True)
    assert label_counts(allowed.train, allowed.label_names) == {"bad": 50, "good": 0}
    shuffled = load_path(tmp_path, train_samples=50, test_samples=20)
    assert label_counts(shuffled.train, shuffled.label_names) == {"bad": 25, "good": 25}


def test_single_class_in_the_data_itself(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", reviews(40))
    write(tmp_path / "test.csv", reviews(10, ("good",)))
    with pytest.raises(DataError, match="test split .* only the label 'good'.*no other label"):
        load_path(tmp_path)
    assert len(load_path(tmp_path, allow_single_class=True).test.texts) == 10


def test_single_class_by_a_small_draw(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", reviews(100, ("a",) * 99 + ("b",)))
    write(tmp_path / "test.csv", reviews(40, ("a", "b")))
    with pytest.raises(DataError, match=r"validation split \(2 rows\).*share: 'b' \(1 rows\).*add"):
        load_path(tmp_path, train_samples=20)


@pytest.mark.parametrize("rare", [3, 5, 20])
@pytest.mark.parametrize("count", [40, 100, 101])
def test_a_rare_label_is_in_every_split(tmp_path: Path, count: int, rare: int) -> None:
    rows = reviews(count, ("common",))
    rows[:rare] = reviews(rare, ("rare",))
    found = load_path(write(tmp_path / "a.csv", rows))
    for split in (found.train, found.validation, found.test):
        assert label_counts(split, found.label_names)["rare"] > 0
    sizes = [len(s.texts) for s in (found.train, found.validation, found.test)]
    tenth = count // 10
    assert sizes == [count - tenth - (count - tenth) // 10, (count - tenth) // 10, tenth]
    fits(found)


@pytest.mark.parametrize("rare", [1, 2])
def test_a_label_too_rare_to_share_is_named(tmp_path: Path, rare: int) -> None:
    rows = reviews(100, ("common",))
    rows[:rare] = reviews(rare, ("rare",))
    with pytest.raises(DataError, match=r"too few to share: 'rare' \(\d rows\).*add some with"):
        load_path(write(tmp_path / "a.csv", rows))


def test_validation_of_one_row_is_no_reason_to_refuse(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", reviews(20))
    write(tmp_path / "test.csv", reviews(20))
    assert len(load_path(tmp_path, train_samples=8).validation.texts) == 1


# --- evaluation of a saved model ------------------------------------------------------------------


def test_evaluation_takes_the_test_split(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", reviews(10))
    names = ["bad", "good"]
    assert len(load_for_evaluation(str(tmp_path), names).texts) == 10
    write(tmp_path / "validation.csv", reviews(12))
    assert len(load_for_evaluation(str(tmp_path), names).texts) == 12
    write(tmp_path / "test.csv", reviews(14))
    assert len(load_for_evaluation(str(tmp_path), names).texts) == 14
    assert len(load_for_evaluation(str(tmp_path), names, split="train").texts) == 10
    (tmp_path / "validation.csv").unlink()
    with pytest.raises(DataError, match="has no validation split; it has train and test"):
        load_for_evaluation(str(tmp_path), names, split="validation")


def test_evaluation_reads_only_what_it_measures(tmp_path: Path) -> None:
    write(tmp_path / "test.csv", reviews(14))
    (tmp_path / "train.csv").write_bytes(b"")
    assert len(load_for_evaluation(str(tmp_path), ["bad", "good"]).texts) == 14


@pytest.mark.parametrize(
    ("written", "names", "expected"),
    [
        (("good", "bad"), ["bad", "good"], [1, 0]),
        ((1, 0), ["negative", "positive"], [1, 0]),
        (("pos", "neg"), ["negative", "positive"], [1, 0]),
        ((5, 1), ["1", "3", "5"], [2, 0]),
        ((1, 0), ["0", "1"], [1, 0]),
        ((2, 1), ["1", "2", "none"], [1, 0]),
    ],
)
def test_evaluation_labels(
    tmp_path: Path, written: tuple[Any, Any], names: list[str], expected: list[int]
) -> None:
    path = write(tmp_path / "a.jsonl", [("x", written[0]), ("y", written[1])])
    assert load_for_evaluation(str(path), names).labels.tolist() == expected
    path = write(tmp_path / "a.csv", [("x", written[0]), ("y", written[1])])
    assert load_for_evaluation(str(path), names).labels.tolist() == expected


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("awful", ["bad", "good"]),
        (2, ["negative", "positive"]),
        (-1, ["negative", "positive"]),
        (0, ["1", "2"]),
    ],
)
def test_evaluation_of_unknown_labels(tmp_path: Path, written: Any, names: list[str]) -> None:
    path = write(tmp_path / "a.jsonl", [("x", written), ("y", 1 if written != "awful" else "bad")])
    message = f"not trained on: {written!r}; it knows {names[0]!r}, {names[1]!r}"
    with pytest.raises(DataError, match=re.escape(message)):
        load_for_evaluation(str(path), names)


# --- auto, the hub, and what is not installed -----------------------------------------------------


@pytest.fixture
def no_hub_cache() -> Iterator[None]:
    corpora.hub_imdb.cache_clear()
    yield
    corpora.hub_imdb.cache_clear()


def hub_answers(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    def asked() -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(corpora, "hub_imdb", asked)


def test_auto_takes_the_named_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "own" / "train.csv", reviews(40))
    monkeypatch.setenv("FASTTX_DATA", str(tmp_path / "own"))
    hub_answers(monkeypatch, AssertionError("FASTTX_DATA is set: the hub is not asked"))
    source = resolve("auto")
    assert source.name == str(tmp_path / "own") and "FASTTX_DATA" in source.notes[0]
    found = load(TrainConfig(dataset="auto"))
    assert found.name == "own" and source.notes[0] in found.notes
    assert len(load_for_evaluation("auto", ["bad", "good"]).texts) == 40


def test_auto_with_a_wrong_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTTX_DATA", "/no/such/folder")
    with pytest.raises(DataError, match="FASTTX_DATA is '/no/such/folder'.*unset it"):
        resolve("auto")


def test_auto_takes_imdb_next(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.delenv("FASTTX_DATA", raising=False)
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    columns = {"text": [f"{i}" for i in range(40)], "label": [0] * 20 + [1] * 20}
    made = datasets.Dataset.from_dict(columns, features=features)
    hub_answers(monkeypatch, {"train": made, "test": made})
    assert resolve("auto").name == "imdb"
    found = load(TrainConfig(dataset="auto"))
    assert found.name == "imdb" and found.label_names == ["negative", "positive"]
    assert label_counts(found.train, found.label_names) == {"negative": 18, "positive": 18}
    assert len(load_for_evaluation("imdb", found.label_names).texts) == 40


def test_auto_falls_to_demo_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTTX_DATA", "")
    hub_answers(monkeypatch, corpora.Unavailable("the moon is in the way"))
    source = resolve("auto")
    assert source.name == "demo"
    said = " ".join(line.strip("* ") for line in source.notes)
    assert "IMDB could not be had (the moon is in the way)" in said
    assert "DEMO corpus" in said and "says nothing about IMDB" in said
    assert source.notes[0] == source.notes[-1] == "*" * 96
    assert {len(line) for line in source.notes} == {96}


def test_imdb_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_answers(monkeypatch, corpora.Unavailable("the moon is in the way"))
    assert resolve("imdb") == data.Source("imdb")
    with pytest.raises(DataError, match=r"the moon is in the way.*--dataset PATH.*--dataset demo"):
        load(TrainConfig(dataset="imdb"))


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    real = builtins.__import__

    def guarded(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in packages:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)


def test_without_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub_cache: None
) -> None:
    monkeypatch.delenv("FASTTX_DATA", raising=False)
    write(tmp_path / "a.csv", reviews(40))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    write(tmp_path / "a.parquet", reviews(40))
    without(monkeypatch, "datasets", "pyarrow")
    assert resolve("auto").name == "demo"
    assert "pip install 'fasttx[train]'" in " ".join(x.strip("* ") for x in resolve("auto").notes)
    for dataset in ("imdb", tmp_path / "saved", tmp_path / "a.parquet"):
        with pytest.raises(DataError, match=re.escape("pip install 'fasttx[train]'")):
            load(TrainConfig(dataset=str(dataset)))
    assert len(load_path(tmp_path / "a.csv").train.texts) == 33  # needs neither


class Hub:
    """Stands in for the hub: datasets.load_dataset, and whether the hub can be reached."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, unreachable: str | None, has: bool) -> None:
        datasets = pytest.importorskip("datasets")
        constants = pytest.importorskip("huggingface_hub.constants")
        self.offline: list[bool] = []

        def load_dataset(name: str) -> dict[str, str]:
            assert name == "stanfordnlp/imdb"
            self.offline.append(constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE)
            if not has:
                raise ConnectionError("Couldn't reach it\non the hub")
            return {"train": "a", "test": "b", "unsupervised": "c"}

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(corpora, "hub_unreachable", lambda: unreachable)


def test_hub_is_used_where_it_can_be_reached(
    monkeypatch: pytest.MonkeyPatch, no_hub_cache: None
) -> None:
    hub = Hub(monkeypatch, unreachable=None, has=True)
    expected = {"train": "a", "test": "b", "unsupervised": "c"}
    assert corpora.hub_imdb() == expected == corpora.hub_imdb()
    assert hub.offline == [False]


def test_hub_fails_half_way(monkeypatch: pytest.MonkeyPatch, no_hub_cache: None) -> None:
    Hub(monkeypatch, unreachable=None, has=False)
    with pytest.raises(corpora.Unavailable, match="^ConnectionError: Couldn't reach it$"):
        corpora.hub_imdb()


def test_cache_is_used_where_the_hub_is_out_of_reach(
    monkeypatch: pytest.MonkeyPatch, no_hub_cache: None
) -> None:
    hub = Hub(monkeypatch, unreachable="no network", has=True)
    assert corpora.hub_imdb() == {"train": "a", "test": "b", "unsupervised": "c"}
    assert hub.offline == [True]
    from huggingface_hub import constants

    assert not constants.HF_HUB_OFFLINE, "offline for this call only"


def test_neither_hub_nor_cache(monkeypatch: pytest.MonkeyPatch, no_hub_cache: None) -> None:
    Hub(monkeypatch, unreachable="no network", has=False)
    with pytest.raises(corpora.Unavailable, match="no network, and the local cache does not"):
        corpora.hub_imdb()


def url(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("behaviour", ["silent", "refused", "offline"])
def test_reachability_has_a_limit(monkeypatch: pytest.MonkeyPatch, behaviour: str) -> None:
    """A hub that takes the connection and never answers costs seconds, not minutes."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(corpora, "HUB_SECONDS", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", behaviour == "offline")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        monkeypatch.setattr(constants, "ENDPOINT", url(server))
        if behaviour == "refused":
            server.close()
        start = time.perf_counter()
        reason = corpora.hub_unreachable()
        assert time.perf_counter() - start < 10
    expected = {"silent": "did not answer|cannot be reached", "refused": "cannot be reached",
                "offline": "HF_HUB_OFFLINE is set"}  # fmt: skip
    assert reason and re.search(expected[behaviour], reason)


@pytest.mark.parametrize("status", [200, 503])
def test_a_hub_that_answers(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        monkeypatch.setattr(constants, "ENDPOINT", url(server))

        def answer() -> None:
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                connection.recv(4096)
                head = f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                connection.sendall(head.encode())
                connection.close()

        threading.Thread(target=answer, daemon=True).start()
        reason = corpora.hub_unreachable()
    assert (reason is None) == (status == 200)
    assert status == 200 or "status 503" in str(reason)


# --- the built-in corpus, and the real reviews ----------------------------------------------------


def test_demo() -> None:
    found = load(TrainConfig(dataset="demo"))
    assert found.name == "demo" and found.label_names == ["negative", "positive"]
    counts = label_counts(found.train, found.label_names)
    assert counts["negative"] == counts["positive"]
    assert len(found.train.texts) == 9 * len(found.validation.texts)
    small = load(TrainConfig(dataset="demo", train_samples=100, test_samples=50))
    assert [len(s.texts) for s in (small.train, small.validation, small.test)] == [100, 10, 50]
    assert len(load_for_evaluation("demo", found.label_names).texts) == len(found.test.texts)


def test_real_reviews(imdb: Path) -> None:
    found = load_path(imdb)
    assert found.name == "imdb" and found.label_names == ["negative", "positive"]
    halves = [
        label_counts(split, found.label_names)
        for split in (found.train, found.validation, found.test)
    ]
    assert halves == [{"negative": n, "positive": n} for n in (11_250, 1_250, 12_500)]


def test_real_reviews_are_sorted_by_label(imdb: Path) -> None:
    settings: dict[str, Any] = {"train_samples": 5000, "test_samples": 1000}
    with pytest.raises(
        DataError, match=r"train split \(5,000 rows\) has only the label 'negative'"
    ):
        load_path(imdb, subset_order="file", **settings)
    found = load_path(imdb, **settings)
    assert label_counts(found.train, found.label_names) == {"negative": 2500, "positive": 2500}
    assert label_counts(found.test, found.label_names) == {"negative": 500, "positive": 500}


# --- texts alone ----------------------------------------------------------------------------------


def test_texts_are_those_of_train_and_the_unlabelled_ones(tmp_path: Path) -> None:
    def rows(words: list[str], **more) -> str:
        return "\n".join(json.dumps({"text": w, **more}) for w in words)

    (tmp_path / "train.jsonl").write_text(rows(["a", "b"], label=1))
    (tmp_path / "test.jsonl").write_text(rows(["secret"], label=1))
    (tmp_path / "validation.jsonl").write_text(rows(["also secret"], label=0))
    (tmp_path / "unsupervised.jsonl").write_text(rows(["c"]))  # has no column of labels
    (tmp_path / "unlabeled-00000-of-00001.jsonl").write_text(rows(["d"], label=-1))
    texts, notes = data.load_texts(str(tmp_path))
    assert sorted(texts) == ["a", "b", "c", "d"]
    assert any("2 texts" in note and "train" in note for note in notes)
    assert any("1 texts" in note and "unsupervised.jsonl" in note for note in notes)
    assert data.load_texts(str(tmp_path), unlabelled=False)[0] == ["a", "b"]


def test_texts_of_the_original_archive(tmp_path: Path) -> None:
    for name, text in (("pos/0_9", "good"), ("neg/0_1", "bad"), ("unsup/0_0", "either")):
        path = tmp_path / "train" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    texts, _ = data.load_texts(str(tmp_path))
    assert sorted(texts) == ["bad", "either", "good"]


def test_unlabelled_texts_alone(tmp_path: Path) -> None:
    """They are enough to pretrain on, and not to train on."""
    (tmp_path / "unsupervised.csv").write_text("text\na\nb\n")
    texts, notes = data.load_texts(str(tmp_path))
    assert texts == ["a", "b"]
    assert len(notes) == 1
    with pytest.raises(DataError, match="no train split.*leave out --no-unlabelled"):
        data.load_texts(str(tmp_path), unlabelled=False)
    with pytest.raises(DataError, match="has no train split; it has texts without labels. Exp"):
        data.load(TrainConfig(dataset=str(tmp_path)))


def test_the_column_of_labels_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,a,b\nfine,1,2\n")
    with pytest.raises(DataError, match="--label-column"):
        data.load_texts(str(tmp_path))
    assert data.load_texts(str(tmp_path), label_column="a")[0] == ["fine"]


def test_no_column_of_texts_is_named(tmp_path: Path) -> None:
    (tmp_path / "unsupervised.jsonl").write_text(json.dumps({"foo": "a", "bar": "b"}))
    with pytest.raises(DataError, match=r"'foo', 'bar'.*--text-column"):
        data.load_texts(str(tmp_path))
