"""The training, validation and test split of a run, drawn from a dataset."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fasttx.config import SINGLE_LABEL, TrainConfig
from fasttx.errors import DataError
from fasttx.text import duplicates
from fasttx.text.corpora import Source, read_corpus, resolve, version
from fasttx.text.folders import Corpus
from fasttx.text.stored import StoredTexts
from fasttx.text.subsets import draw_first, draw_stratified
from fasttx.text.tables import Columns, blank_note
from fasttx.text.targets import TARGETS

__all__ = [
    "Source",
    "Split",
    "TextDataset",
    "load",
    "load_for_evaluation",
    "load_texts",
    "load_unlabelled",
    "resolve",
    "texts_fingerprint",
    "version",
]

# Each draw has a random stream of its own, so that none depends on the size of another.
_TRAIN_STREAM, _TEST_STREAM, _HELD_OUT_STREAM, _VALIDATION_STREAM = range(4)


@dataclass(frozen=True, eq=False)
class Split:
    """n texts, and their labels: (n,) int64, indices into the dataset's `label_names`; of other
    problems than single-label ones as `fasttx.text.targets` has them.

    notes: lines to show, where a split was read by itself.
    """

    texts: Sequence[str]
    labels: np.ndarray
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class TextDataset:
    """The splits of a run. notes: lines to show. fingerprint: a SHA-256 of all texts and labels, by
    which a resumed run recognises its data. label_numbers: for each class the number that the files
    write, None where they write words. more: what only some datasets are described by."""

    name: str
    label_names: list[str]
    train: Split
    validation: Split
    test: Split
    notes: list[str]
    fingerprint: str
    label_numbers: list[int] | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    problem_type: str = SINGLE_LABEL

    def count_duplicates(self, **more: Sequence[str]) -> dict[str, duplicates.Counts]:
        """How many texts occur twice, and in several splits: `fasttx.text.duplicates.count`."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return duplicates.count({name: split.texts for name, split in splits.items()} | more)

    @functools.cached_property
    def duplicates(self) -> dict[str, duplicates.Counts]:
        """`count_duplicates`, counted when first asked for."""
        return self.count_duplicates()

    def describe(self) -> dict[str, Any]:
        """The description of the data in config.json and results.json."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            "name": self.name,
            **self.more,
            "train_samples": len(self.train.texts),
            "val_samples": len(self.validation.texts),
            "test_samples": len(self.test.texts),
            **TARGETS[self.problem_type].described(
                {name: split.labels for name, split in splits.items()}, self.label_names
            ),
            "label_numbers": self.label_numbers,
            "duplicates": self.duplicates,
            "fingerprint": self.fingerprint,
        }


# --- loading --------------------------------------------------------------------------------------


def load(config: TrainConfig) -> TextDataset:
    """The training, validation and test split of `config`, the same for the same settings.

    If the dataset has no validation split, it is drawn from train: `train_samples` // 10 more texts
    (at least 1), or a tenth of train. If it has no test split, its validation split is the test
    split, or a tenth of train is held out. Raises DataError.
    """
    source = resolve(config.dataset)
    columns = Columns(config.text_column, config.label_column, config.problem_type)
    corpus, target = read_corpus(source.name, columns), TARGETS[config.problem_type]
    if "train" not in corpus.splits:
        raise DataError(
            f"{corpus.where} has no train split; {corpus.held}. Expected train.parquet, .csv, "
            ".tsv or .jsonl, or a folder train with a folder for each label"
        )
    rows = {name: read() for name, read in corpus.splits.items()}
    label_names, codes, numbers, label_notes = target.numbered(rows, corpus.name)
    given = {name: Split(r.texts, codes[name]) for name, r in rows.items()}
    notes = [*source.notes, *corpus.notes]
    if corpus.unlabelled and config.pseudo_labels is None:
        notes.append(_unread(corpus))
    for note in [*label_notes, *(note for r in rows.values() for note in r.notes)]:
        if note not in notes:
            notes.append(note)

    train, validation, test = (given.get(name) for name in ("train", "validation", "test"))
    assert train is not None
    if test is None and validation is not None:
        notes.append(f"{corpus.where} has no test split: its validation split is the test split")
        test, validation = validation, None
    whole = train
    if test is None:
        rng = np.random.default_rng([config.seed_of_splits, _HELD_OUT_STREAM])
        sizes = _tenth(len(train.labels), corpus.where)
        # In the order of the file, which `subset_order` may ask for.
        kept, held_out = map(np.sort, draw_stratified(target.strata(train.labels), sizes, rng))
        notes.append(f"{corpus.where} has no test split: {sizes[1]:,} of its rows are held out")
        train, test = _take(train, kept), _take(train, held_out)

    pools = {"train": whole, "validation": validation or whole, "test": given.get("test", whole)}
    if validation is None:
        sizes = _train_sizes(config, len(train.labels), rows["train"].where)
        train, validation = _draw(train, sizes, config, _TRAIN_STREAM)
    elif n := config.train_samples:
        check_enough("train_samples", n, len(train.labels), rows["train"].where)
        (train,) = _draw(train, (n,), config, _TRAIN_STREAM)
        size = min(max(1, n // 10), len(validation.labels))
        (validation,) = _draw(validation, (size,), config, _VALIDATION_STREAM)
    if n := config.test_samples:
        check_enough("test_samples", n, len(test.labels), f"the test split of {corpus.where}")
        if n < len(test.labels):
            (test,) = _draw(test, (n,), config, _TEST_STREAM)

    splits = {"train": train, "validation": validation, "test": test}
    if not config.allow_single_class:
        found, drawn_from = (
            {name: split.labels for name, split in parts.items()} for parts in (splits, pools)
        )
        target.check(found, drawn_from, label_names, config.subset_order)
    fingerprint = _fingerprint(splits.values())
    return TextDataset(
        corpus.name, label_names, train, validation, test, notes, fingerprint, numbers,
        version(source.name), config.problem_type,
    )  # fmt: skip


def _unread(corpus: Corpus) -> str:
    where = ", ".join(corpus.unlabelled)
    return (
        f"texts without labels, which a classifier is not trained on: {where} (fasttx pretrain "
        "reads them, and fasttx ensemble --pseudo-labels labels them)"
    )


def load_texts(
    name: str,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    unlabelled: bool = True,
    problem_type: str = SINGLE_LABEL,
) -> tuple[list[str], list[str]]:
    """The texts to pretrain on, and notes on where they come from. Raises DataError.

    These are train's and, if `unlabelled`, those without labels; never those of a validation or
    test split of the dataset. name: as `resolve` gives it.
    """
    corpus = read_corpus(name, Columns(text_column, label_column, problem_type))
    reads: dict[str, Callable[[], Sequence[str]]] = {**corpus.unlabelled} if unlabelled else {}
    if train := corpus.splits.get("train"):
        reads = {f"{corpus.where} (train)": lambda: train().texts, **reads}
    texts, notes = _read_all(reads)
    if not texts:
        if unlabelled:
            raise DataError(
                f"{corpus.where} has neither a train split nor texts without labels; {corpus.held}"
            )
        raise DataError(
            f"{corpus.where} has no train split, and its unlabelled texts were not asked for; "
            "leave out --no-unlabelled, or add a train split"
        )
    return texts, [*corpus.notes, *notes]


def load_unlabelled(name: str, text_column: str | None = None) -> tuple[list[str], list[str]]:
    """The texts of a dataset without labels, and notes on where they come from. Raises DataError
    if it has none."""
    corpus = read_corpus(name, Columns(text_column))
    texts, notes = _read_all(corpus.unlabelled)
    if not texts:
        raise DataError(
            f"{corpus.where} has no unlabelled texts; expected a file such as unsupervised.parquet "
            "or unlabelled.csv beside those of train and test, or a folder train/unsup"
        )
    return texts, notes


def _read_all(reads: Mapping[str, Callable[[], Sequence[str]]]) -> tuple[list[str], list[str]]:
    texts, notes = list[str](), list[str]()
    for where, read in reads.items():
        found = read()
        texts += found
        notes.append(f"{len(found):,} texts of {where}")
        notes += blank_note(found, where, lambda row: f"text {row + 1}")
    return texts, notes


def load_for_evaluation(
    path_or_name: str | Path,
    label_names: Sequence[str],
    *,
    label_numbers: Sequence[int] | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    split: str = "test",
    problem_type: str = SINGLE_LABEL,
) -> Split:
    """One split, its labels as those of a saved model: indices into its `label_names`, or what
    another `problem_type` has.

    If there is no test split, this is validation, or the only split; a single file is one split.
    label_numbers: those of the dataset that the model was trained on, from its config.json; where
    they are not known, numbers are no names of classes (see `labels.numbered_as_saved`). Raises
    DataError, also for a label that the model does not know.
    """
    columns = Columns(text_column, label_column, problem_type)
    corpus, target = read_corpus(resolve(str(path_or_name)).name, columns), TARGETS[problem_type]
    order = [split, "validation"] if split == "test" else [split]
    found = [name for name in order if name in corpus.splits]
    if not found and len(corpus.splits) == 1:
        found = list(corpus.splits)
    if not found:
        raise DataError(f"{corpus.where} has no {split} split; {corpus.held}")
    rows = corpus.splits[found[0]]()
    numbers, notes = target.numbered_as_saved(rows, label_names, label_numbers)
    return Split(rows.texts, numbers, [*corpus.notes, *rows.notes, *notes])


def texts_fingerprint(texts: Sequence[str]) -> str:
    """SHA-256 of these texts in this order."""
    return _fingerprint([Split(list(texts), np.zeros(0, dtype=np.int64))])


def _fingerprint(splits: Iterable[Split]) -> str:
    digest = hashlib.sha256()
    for split in splits:
        for text in split.texts:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        kind = "<i8" if np.issubdtype(split.labels.dtype, np.integer) else "<f4"
        digest.update(split.labels.astype(kind).tobytes())
    return digest.hexdigest()


# --- subsets --------------------------------------------------------------------------------------


def _take(split: Split, rows: np.ndarray) -> Split:
    texts = split.texts
    if isinstance(texts, StoredTexts):
        return Split(texts.take(rows), split.labels[rows])
    return Split([texts[i] for i in rows.tolist()], split.labels[rows])


def _draw(split: Split, sizes: Sequence[int], config: TrainConfig, stream: int) -> list[Split]:
    if config.subset_order == "file":
        subsets = draw_first(split.labels, sizes)
    else:
        rng = np.random.default_rng([config.seed_of_splits, stream])
        strata = TARGETS[config.problem_type].strata(split.labels)
        subsets = draw_stratified(strata, sizes, rng)
    return [_take(split, rows) for rows in subsets]


def _tenth(count: int, where: str) -> tuple[int, int]:
    if count < 2:
        raise DataError(f"{where} leaves {count} row to train on: none can be held out of it")
    tenth = max(1, count // 10)
    return count - tenth, tenth


def _train_sizes(config: TrainConfig, count: int, where: str) -> tuple[int, int]:
    """The sizes of the training and of the validation split. Raises DataError."""
    if config.train_samples is None:
        return _tenth(count, where)
    asked, more = config.train_samples, max(1, config.train_samples // 10)
    if asked + more > count:
        all_but_a_tenth, tenth = _tenth(count, where)
        most = max(n for n in range(count * 9 // 10, count) if n + max(1, n // 10) <= count)
        raise DataError(
            f"train_samples is {asked:,}: with {more:,} more for validation that is "
            f"{asked + more:,} rows, and {where} has {count:,}; expected at most {most:,}. Without "
            f"--train-samples {all_but_a_tenth:,} are trained on, and {tenth:,} are validation"
        )
    return asked, more


def check_enough(setting: str, asked: int, count: int, where: str) -> None:
    if asked > count:
        raise DataError(f"{setting} is {asked:,}; {where} has {count:,} rows, ask for at most that")
