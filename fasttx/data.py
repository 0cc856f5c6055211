"""Labelled texts: from files, the Hugging Face hub or the built-in corpus to a run's splits."""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import re
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fasttx import demo
from fasttx.config import TrainConfig
from fasttx.subsets import draw_first, draw_stratified

Label = int | str

ENVIRONMENT = "FASTTX_DATA"
HUB_NAME = "stanfordnlp/imdb"
HUB_SECONDS = 3.0  # an unreachable hub otherwise takes datasets minutes to give up on

SPLITS = {
    "train": "train", "training": "train", "test": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_SPLIT_FILE = re.compile(
    rf"({'|'.join(SPLITS)})(?:-(\d+)-of-(\d+))?\.(parquet|csv|tsv|jsonl|json)", re.IGNORECASE
)
TEXT_NAMES = (
    "text", "review", "sentence", "content", "body", "document", "comment", "message", "tweet",
    "utterance", "question", "headline", "description", "title",
)  # fmt: skip
LABEL_NAMES = (
    "label", "labels", "sentiment", "class", "target", "category", "polarity", "stars", "rating",
    "score", "intent", "topic",
)  # fmt: skip
ROW_NUMBERS = ("", "id", "idx", "index", "unnamed: 0", "__index_level_0__")
PLAIN_NAMES = {"neg": "negative", "pos": "positive"}

# One stream of random numbers for each draw, so that none depends on the size of another.
_TRAIN_STREAM, _TEST_STREAM, _HELD_OUT_STREAM, _VALIDATION_STREAM = range(4)


class DataError(ValueError):
    """A dataset cannot be used; the message names the place, and what to do."""


@dataclass(frozen=True, eq=False)
class Split:
    """n texts, and their labels: (n,) int64, indices into the dataset's `label_names`."""

    texts: list[str]
    labels: np.ndarray

    def label_counts(self, label_names: Sequence[str]) -> dict[str, int]:
        counts = np.bincount(self.labels, minlength=len(label_names)).tolist()
        return dict(zip(label_names, counts, strict=True))


@dataclass(frozen=True, eq=False)
class TextDataset:
    """The splits of a run. `notes` are lines to show; `fingerprint` is a SHA-256 of all texts and
    labels, by which a resumed run knows its data."""

    name: str
    label_names: list[str]
    train: Split
    validation: Split
    test: Split
    notes: list[str]
    fingerprint: str


@dataclass(frozen=True)
class Source:
    """What a --dataset comes down to: `imdb`, `demo`, or an absolute path. `notes`: why."""

    name: str
    notes: tuple[str, ...] = ()


# --- the ways in ----------------------------------------------------------------------------------


def resolve(dataset: str) -> Source:
    """Settle `auto`, and check that a path exists. Raises DataError.

    `auto` is $FASTTX_DATA where that is set, else IMDB where it is cached or the hub can be
    reached, else the built-in corpus.
    """
    if dataset in ("imdb", "demo"):
        return Source(dataset)
    if dataset != "auto":
        path = Path(dataset).expanduser()
        if not path.exists():
            raise DataError(
                f"dataset is {dataset!r}: there is no such file or folder; expected auto, imdb, "
                "demo, or the path of a folder or file"
            )
        return Source(os.path.abspath(path))
    if named := os.environ.get(ENVIRONMENT):
        path = Path(named).expanduser()
        if not path.exists():
            raise DataError(
                f"{ENVIRONMENT} is {named!r}: there is no such file or folder; set it to the "
                "folder or file with the dataset, or unset it"
            )
        return Source(os.path.abspath(path), (f"dataset auto: {named}, named by {ENVIRONMENT}",))
    try:
        _hub_imdb()
    except _Unavailable as reason:
        return Source("demo", _unmissable(str(reason)))
    return Source("imdb", (f"dataset auto: {HUB_NAME}",))


def load(config: TrainConfig) -> TextDataset:
    """The training, validation and test split of `config`, the same for the same settings.

    Validation is drawn from train unless the dataset brings one: `train_samples` // 10 more rows
    (at least 1), or a tenth of train. Without a test split a given validation split serves as
    test, else a tenth is held out. Raises DataError.
    """
    source = resolve(config.dataset)
    corpus = _read(source.name, config.text_column, config.label_column)
    if "train" not in corpus.splits:
        raise DataError(
            f"{corpus.where} has no train split; it has {', '.join(corpus.splits)}. Expected "
            "train.parquet, .csv, .tsv or .jsonl, or a folder train with a folder for each label"
        )
    rows = {name: read() for name, read in corpus.splits.items()}
    label_names, given = _labelled(rows, corpus.name)
    notes = [*source.notes, *corpus.notes]
    notes += [note for r in rows.values() for note in r.notes if note not in notes]

    train, validation, test = (given.get(name) for name in ("train", "validation", "test"))
    assert train is not None
    if test is None and validation is not None:
        notes.append(f"{corpus.where} has no test split: its validation split is the test split")
        test, validation = validation, None
    if test is None:
        rng = np.random.default_rng([config.seed, _HELD_OUT_STREAM])
        sizes = _tenth(len(train.labels), corpus.where)
        # As they lay, for those who asked for the order of the file.
        kept, held_out = map(np.sort, draw_stratified(train.labels, sizes, rng))
        notes.append(f"{corpus.where} has no test split: {sizes[1]:,} of its rows are held out")
        train, test = _take(train, kept), _take(train, held_out)

    pools = {"train": train, "validation": validation or train, "test": test}
    if validation is None:
        sizes = _train_sizes(config, len(train.labels), rows["train"].where)
        train, validation = _draw(train, sizes, config, _TRAIN_STREAM)
    elif n := config.train_samples:
        _check_enough("train_samples", n, len(train.labels), rows["train"].where)
        (train,) = _draw(train, (n,), config, _TRAIN_STREAM)
        size = min(max(1, n // 10), len(validation.labels))
        (validation,) = _draw(validation, (size,), config, _VALIDATION_STREAM)
    if n := config.test_samples:
        _check_enough("test_samples", n, len(test.labels), f"the test split of {corpus.where}")
        if n < len(test.labels):
            (test,) = _draw(test, (n,), config, _TEST_STREAM)

    splits = {"train": train, "validation": validation, "test": test}
    if not config.allow_single_class:
        _check_classes(splits, pools, label_names, config.subset_order)
    fingerprint = _fingerprint(splits.values())
    return TextDataset(corpus.name, label_names, train, validation, test, notes, fingerprint)


def load_for_evaluation(
    path_or_name: str | Path,
    label_names: Sequence[str],
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    split: str = "test",
) -> Split:
    """All of one split, its labels as indices into a saved model's `label_names`.

    Where there is no test split: validation, else the only one; of a single file all rows.
    Raises DataError, also for a label that the model does not know.
    """
    corpus = _read(resolve(str(path_or_name)).name, text_column, label_column)
    order = [split, "validation"] if split == "test" else [split]
    found = [name for name in order if name in corpus.splits]
    if not found and len(corpus.splits) == 1:
        found = list(corpus.splits)
    if not found:
        raise DataError(f"{corpus.where} has no {split} split; it has {', '.join(corpus.splits)}")
    rows = corpus.splits[found[0]]()
    return Split(rows.texts, _as_saved(rows, label_names))


def _unmissable(reason: str) -> tuple[str, ...]:
    text = (
        f"IMDB could not be had ({reason}): training on the built-in DEMO corpus; its accuracy "
        "says nothing about IMDB. To train on your own copy, set FASTTX_DATA to its folder."
    )
    return ("*" * 96, *(f"*  {line:90}  *" for line in textwrap.wrap(text, 90)), "*" * 96)


def _fingerprint(splits: Iterable[Split]) -> str:
    digest = hashlib.sha256()
    for split in splits:
        for text in split.texts:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        digest.update(split.labels.astype("<i8").tobytes())
    return digest.hexdigest()


# --- subsets --------------------------------------------------------------------------------------


def _take(split: Split, rows: np.ndarray) -> Split:
    return Split([split.texts[i] for i in rows.tolist()], split.labels[rows])


def _draw(split: Split, sizes: Sequence[int], config: TrainConfig, stream: int) -> list[Split]:
    if config.subset_order == "file":
        subsets = draw_first(split.labels, sizes)
    else:
        rng = np.random.default_rng([config.seed, stream])
        subsets = draw_stratified(split.labels, sizes, rng)
    return [_take(split, rows) for rows in subsets]


def _tenth(count: int, where: str) -> tuple[int, int]:
    if count < 2:
        raise DataError(f"{where} leaves {count} row to train on: none can be held out of it")
    tenth = max(1, count // 10)
    return count - tenth, tenth


def _train_sizes(config: TrainConfig, count: int, where: str) -> tuple[int, int]:
    """Rows to train on, and rows for validation."""
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


def _check_enough(setting: str, asked: int, count: int, where: str) -> None:
    if asked > count:
        raise DataError(f"{setting} is {asked:,}; {where} has {count:,} rows, ask for at most that")


def _check_classes(
    splits: dict[str, Split], pools: dict[str, Split], names: list[str], order: str
) -> None:
    """A split with a single class is refused; `pools` are what the splits were drawn from."""
    for which, split in splits.items():
        count, present = len(split.labels), np.unique(split.labels)
        # A tenth of a few rows may be one row, which has one label however it is drawn.
        if len(present) > 1 or (which == "validation" and count == 1):
            continue
        if len(np.unique(pools[which].labels)) == 1:
            why, remedy = "The data it comes from has no other label", "Use data that has several"
        elif order == "file":
            why = "Its rows were taken in the file's order, and the file is sorted by label"
            remedy = "Draw the subset shuffled (--subset-order shuffled)"
        else:
            why, remedy = "It is too small for the rarer labels", "Take more rows"
        name = names[present[0]]
        raise DataError(
            f"the {which} split ({count:,} rows) has only the label {name!r}: a model that always "
            f"answers {name!r} scores 100 % on it, so accuracy would mean nothing. {why}. "
            f"{remedy}, or pass --allow-single-class to go on all the same"
        )


# --- labels ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Rows:
    """One split as it was read, its labels as they were written."""

    texts: list[str]
    labels: list[Label]
    where: str
    label_names: list[str] | None = None  # of integer labels, where the file gives them
    notes: list[str] = field(default_factory=list)


_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,17})(?:\.0+)?")


def _numbered(labels: list[Label]) -> list[Label]:
    """All of one type: integers if every label is, or is written as, one; else strings."""
    kinds = {type(label) for label in labels}
    if kinds == {str} and all(_NUMBER.fullmatch(str(label)) for label in set(labels)):
        return [int(str(label).partition(".")[0]) for label in labels]
    return labels if len(kinds) == 1 else [str(label) for label in labels]


def _plain(names: Sequence[str]) -> list[str]:
    """IMDB's own short names, written out."""
    return [PLAIN_NAMES[n] for n in names] if sorted(names) == ["neg", "pos"] else list(names)


def _check_labelled(values: set[Label], where: str) -> None:
    if values == {-1}:
        raise DataError(
            f"every label of {where} is -1, which stands for unlabelled; expected labelled rows"
        )


def _labelled(rows: dict[str, _Rows], name: str) -> tuple[list[str], dict[str, Split]]:
    """The names of the labels, which are those of train, and the splits in terms of them."""
    joined = _numbered([label for r in rows.values() for label in r.labels])
    labels, start = {}, 0
    for split, r in rows.items():
        labels[split] = joined[start : start + len(r.labels)]
        _check_labelled(set(labels[split]), r.where)
        start += len(r.labels)

    train = rows["train"]
    codes, label_names = _codes(labels["train"], train, name)
    for split, r in rows.items():
        if r.label_names and train.label_names and r.label_names != train.label_names:
            raise DataError(
                f"{r.where} names its labels {r.label_names}, {train.where} {train.label_names}; "
                "expected the same names in the same order"
            )
        if unknown := sorted(set(labels[split]) - codes.keys()):
            raise DataError(
                f"{r.where} has labels that {train.where} has not: {_some(unknown)}; that has "
                f"{_some(list(codes))}. Remove those rows, or train on every label"
            )
    return label_names, {
        split: Split(r.texts, np.array([codes[v] for v in labels[split]], dtype=np.int64))
        for split, r in rows.items()
    }


def _codes(labels: list[Label], train: _Rows, name: str) -> tuple[dict[Label, int], list[str]]:
    """Label as written -> class number, and the names of the classes."""
    values = sorted(set(labels))  # all integers or all strings
    names = train.label_names
    if name == "imdb" and set(values) <= {0, 1}:
        names = demo.LABEL_NAMES
    if names and isinstance(values[0], int):
        if outside := [v for v in values if v not in range(len(names))]:
            raise DataError(
                f"{train.where} has the label {_some(outside)}, and names for 0 to "
                f"{len(names) - 1} (-1 stands for unlabelled). Remove or relabel those rows"
            )
        return {number: number for number in range(len(names))}, _plain(names)
    if len(values) == len(labels) >= 10:
        raise DataError(
            f"{train.where} has another label in every row ({_some(values)}): that is no column "
            "of labels; name the right one with --label-column"
        )
    return {v: i for i, v in enumerate(values)}, _plain([str(v) for v in values])


def _as_saved(rows: _Rows, label_names: Sequence[str]) -> np.ndarray:
    """Labels as class numbers of a saved model: by name, else integers by number."""
    number = {name: i for i, name in enumerate(label_names)}
    numeric = any(_NUMBER.fullmatch(name) for name in label_names)
    own = _plain(rows.label_names or [])
    by_name = bool(own) and set(own) <= number.keys()

    def find(label: Label) -> int | None:
        if isinstance(label, int) and by_name:
            return number[own[label]] if 0 <= label < len(own) else None
        if isinstance(label, str) or numeric:
            return number.get(str(label), number.get(PLAIN_NAMES.get(str(label), "")))
        return label if 0 <= label < len(number) else None

    labels = _numbered(rows.labels)
    _check_labelled(set(labels), rows.where)
    codes = {label: find(label) for label in set(labels)}
    if unknown := sorted(label for label, code in codes.items() if code is None):
        raise DataError(
            f"{rows.where} has labels that the model was not trained on: {_some(unknown)}; it "
            f"knows {_some(list(label_names))}. Relabel or remove those rows"
        )
    return np.array([codes[label] for label in labels], dtype=np.int64)


def _some(values: Sequence[Any], limit: int = 10) -> str:
    shown = ", ".join(repr(v) for v in values[:limit])
    return shown if len(values) <= limit else f"{shown} and {len(values) - limit:,} more"


# --- tables: from columns to rows -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Table:
    """Columns of one file. `kinds` says of each whether it is text; `place(i)` where row i lies."""

    where: str
    kinds: dict[str, bool]
    read: Callable[[str], list[Any]]
    place: Callable[[int], str] = lambda row: f"row {row + 1}"
    class_names: Callable[[str], list[str] | None] = lambda column: None


def _find_columns(
    table: _Table, text_column: str | None, label_column: str | None
) -> tuple[str, str]:
    columns = table.kinds
    shown = f"{table.where} has the columns {_some(list(columns), 30)}"
    for flag, name in (("--text-column", text_column), ("--label-column", label_column)):
        if name is not None and name not in columns:
            raise DataError(f"{shown}; {flag} is {name!r}, which is none of them")

    free = [c for c in columns if c.lower() not in ROW_NUMBERS]
    free = [c for c in free if c not in (text_column, label_column)]

    def known(names: tuple[str, ...]) -> str | None:
        return next((c for name in names for c in free if c.lower() == name), None)

    def only(candidates: list[str]) -> str | None:
        return candidates[0] if len(candidates) == 1 else None

    label = label_column or known(LABEL_NAMES)
    text = text_column or known(TEXT_NAMES)
    text = text or only([c for c in free if c != label and columns[c]])
    label = label or only([c for c in free if c != text])
    for flag, found, what in (
        ("--text-column", text, "texts"), ("--label-column", label, "labels")
    ):  # fmt: skip
        if found is None:
            raise DataError(f"{shown}; which of them holds the {what}? Name it with {flag}")
    assert text is not None and label is not None
    return text, label


def _label(value: Any) -> Label | None:
    """A label as integer or string; None for what is neither."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return value.strip() or None
    return value if isinstance(value, int) else None


def _table_rows(table: _Table, text_column: str | None, label_column: str | None) -> _Rows:
    text, label = _find_columns(table, text_column, label_column)
    texts, raw = table.read(text), table.read(label)
    if not texts:
        raise DataError(f"{table.where} holds no rows; expected at least one text with its label")
    for row, value in enumerate(texts):
        if not isinstance(value, str):
            raise DataError(
                f"{table.where}, {table.place(row)}: the text (column {text!r}) is "
                f"{_shown(value)}; mend or remove that row, or name another --text-column"
            )
    labels: list[Label] = []
    for row, value in enumerate(raw):
        found = _label(value)
        if found is None:
            raise DataError(
                f"{table.where}, {table.place(row)}: the label (column {label!r}) is "
                f"{_shown(value)}; expected an integer or a word. Mend or remove that row, or name "
                "another --label-column"
            )
        labels.append(found)
    usual = (text, label) == ("text", "label")
    notes = [] if usual else [f"columns: the texts are in {text!r}, the labels in {label!r}"]
    return _Rows(texts, labels, table.where, table.class_names(label), notes)


def _shown(value: Any) -> str:
    if value is None or value == "" or value != value:
        return "missing"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


# --- files ----------------------------------------------------------------------------------------


def _needs(package: str, why: str) -> str:
    return f"{why} needs the package {package}, which is not installed: pip install 'fasttx[train]'"


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _utf8(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8; convert the file, "
            "for instance with: iconv -f latin1 -t utf-8"
        ) from error


def _file_text(path: Path) -> str:
    text = _utf8(path, _file_bytes(path))
    if not text.strip():
        raise DataError(f"{path} is empty; expected texts with labels")
    return text


def _parquet_table(path: Path) -> _Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(_needs("pyarrow", f"reading {path}")) from error

    def damaged(error: Exception) -> DataError:
        return DataError(f"{path} cannot be read as parquet ({error}); is the file complete?")

    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty; expected texts with labels")
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise damaged(error) from error

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

    def read(column: str) -> list[Any]:
        try:
            values: list[Any] = file.read(columns=[column]).column(column).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise damaged(error) from error
        return values

    def class_names(column: str) -> list[str] | None:
        """From what `datasets` writes beside the schema."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
            if features[column]["_type"] == "ClassLabel":
                return [str(name) for name in features[column]["names"]]
        return None

    kinds = {f.name: is_text(f.type) for f in schema}
    return _Table(str(path), kinds, read, class_names=class_names)


def _csv_rows(text: str, delimiter: str, quotes: bool = True) -> Iterator[tuple[int, list[str]]]:
    quoting: Literal[0, 3] = 0 if quotes else 3  # csv.QUOTE_MINIMAL, csv.QUOTE_NONE
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=quoting)
    end = 0
    for row in reader:
        if row:
            yield end + 1, row  # the line it begins on: a quoted text may go on for several
        end = reader.line_num


def _csv_table(path: Path) -> _Table:
    text, tabs = _file_text(path), path.suffix.lower() == ".tsv"
    delimiter = "\t" if tabs else ","
    limit = csv.field_size_limit(2**31 - 1)  # csv's own is 131,072 characters a text
    try:
        rows = list(_csv_rows(text, delimiter))
    except csv.Error as error:
        if not tabs:
            line = _last_good_line(text, delimiter) + 1
            raise DataError(
                f"{path}, line {line}: {error}; put a text that holds commas or quotes into double "
                'quotes, and write "" for each quote inside'
            ) from error
        rows = list(_csv_rows(text, delimiter, quotes=False))  # many TSV files never quote
    finally:
        csv.field_size_limit(limit)

    header = [name.strip() for name in rows[0][1]]
    if any(_NUMBER.fullmatch(name) or len(name) > 100 for name in header):
        raise DataError(
            f"{path}: its first line is {_shown(rows[0][1])}; expected the names of the columns, "
            "such as text" + delimiter.replace("\t", "<TAB>") + "label"
        )
    if len(set(header)) < len(header):
        raise DataError(f"{path} has two columns of one name: {_some(header)}; rename one")
    del rows[0]
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(
                f"{path}, line {line}: {len(row)} fields, and the header has {len(header)} "
                f"({_some(header)}); put a text that holds {'tabs' if tabs else 'commas'} into "
                "double quotes"
            )
    at = {name: i for i, name in enumerate(header)}
    return _Table(
        str(path),
        dict.fromkeys(header, True),
        lambda column: [row[at[column]] or None for _, row in rows],  # "" is a cell left out
        lambda row: f"line {rows[row][0]}",
    )


def _last_good_line(text: str, delimiter: str) -> int:
    line = 0
    with contextlib.suppress(csv.Error):
        for line, _ in _csv_rows(text, delimiter):  # noqa: B007
            pass
    return line


def _json_table(path: Path) -> _Table:
    """JSON lines, or in a .json file one array of objects."""
    text = _file_text(path)
    rows: list[tuple[str, Any]] = []

    def parse(piece: str, place: str) -> Any:
        try:
            return json.loads(piece)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}, {place}: not JSON ({error}); expected one object a line, such as "
                '{"text": "...", "label": 1}'
            ) from error

    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        rows = [(f"row {i + 1}", row) for i, row in enumerate(parse(text, "as one array"))]
    else:  # not splitlines(): a JSON string may hold U+2028
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                rows.append((f"line {number}", parse(line, f"line {number}")))

    kinds: dict[str, bool] = {}
    for place, row in rows:
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, {place}: {_shown(row)}; expected an object, such as "
                '{"text": "...", "label": 1}'
            )
        for column, value in row.items():
            kinds[column] = kinds.get(column, False) or isinstance(value, str)
    return _Table(str(path), kinds, lambda c: [row.get(c) for _, row in rows], lambda i: rows[i][0])


_READERS = {
    ".parquet": _parquet_table, ".csv": _csv_table, ".tsv": _csv_table, ".jsonl": _json_table,
    ".json": _json_table,
}  # fmt: skip


def _file_rows(paths: list[Path], text_column: str | None, label_column: str | None) -> _Rows:
    """The rows of one file, or of the shards of one split end to end."""
    parts = [_table_rows(_READERS[p.suffix.lower()](p), text_column, label_column) for p in paths]
    first = parts[0]
    if len(parts) == 1:
        return first
    for other in parts[1:]:
        if other.label_names != first.label_names:
            raise DataError(
                f"{other.where} names its labels {other.label_names}, {first.where} "
                f"{first.label_names}; expected the same names in the same order"
            )
    return _Rows(
        [text for part in parts for text in part.texts],
        [label for part in parts for label in part.labels],
        f"{first.where} and {len(parts) - 1} more",
        first.label_names,
        first.notes,
    )


def _tree_labels(folder: Path) -> list[Path]:
    """The folders of `folder` that stand for a label: those with texts in them."""
    return sorted(
        d for d in folder.iterdir()
        if d.is_dir() and d.name != "unsup" and next(d.glob("*.txt"), None) is not None
    )  # fmt: skip


def _tree_rows(folder: Path) -> _Rows:
    """<label>/*.txt: the folder's name is the label."""
    texts: list[str] = []
    labels: list[Label] = []
    for label in _tree_labels(folder):
        files = sorted(label.glob("*.txt"))
        texts += [_utf8(path, _file_bytes(path)) for path in files]
        labels += [label.name] * len(files)
    return _Rows(texts, labels, str(folder))


# --- corpora: what a name or path holds -----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Corpus:
    """Splits that can be read: an evaluation reads one of them, a run all."""

    name: str
    where: str
    splits: dict[str, Callable[[], _Rows]]
    notes: list[str] = field(default_factory=list)


def _read(name: str, text_column: str | None, label_column: str | None) -> _Corpus:
    """`name` as `resolve` gives it."""
    if name == "demo":
        return _demo_corpus()
    if name == "imdb":
        try:
            found = _hub_imdb()
        except _Unavailable as error:
            raise DataError(
                f"IMDB could not be had: {error}. Connect to the network once, or pass the folder "
                "of a copy (--dataset PATH), or use the built-in corpus (--dataset demo)"
            ) from error
        return _datasets_corpus("imdb", HUB_NAME, found, text_column, label_column)
    path = Path(name)
    if path.is_file():
        if path.suffix.lower() not in _READERS:
            raise DataError(
                f"{path} is of an unknown kind; expected {', '.join(_READERS)}, or a folder"
            )
        splits = {"train": lambda: _file_rows([path], text_column, label_column)}
        return _Corpus(path.stem, str(path), splits)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        found = _saved_splits(path)
        return _datasets_corpus(_folder_name(path), str(path), found, text_column, label_column)
    return _folder_corpus(path, text_column, label_column)


def _folder_name(folder: Path) -> str:
    return "imdb" if folder.name.lower() in ("imdb", "aclimdb") else folder.name or "root"


def _demo_corpus() -> _Corpus:
    train_texts, train_labels, test_texts, test_labels = demo.corpus()
    where, names = "the demo corpus", demo.LABEL_NAMES
    train = _Rows(train_texts, [*train_labels], where, names)
    test = _Rows(test_texts, [*test_labels], where, names)
    return _Corpus("demo", where, {"train": lambda: train, "test": lambda: test})


def _folder_corpus(folder: Path, text_column: str | None, label_column: str | None) -> _Corpus:
    try:
        entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error
    trees: dict[str, list[Path]] = {}
    files: dict[str, list[Path]] = {}
    ignored: list[str] = []
    for entry in entries:
        match = _SPLIT_FILE.fullmatch(entry.name)
        split = SPLITS.get(entry.name.lower())
        if match and entry.is_file():
            files.setdefault(SPLITS[match[1].lower()], []).append(entry)
        elif split and entry.is_dir() and (labels := _tree_labels(entry)):
            trees.setdefault(split, []).append(entry)
            beside = sorted(p for p in entry.iterdir() if p not in labels and p.name[0] != ".")
            ignored += [f"{entry.name}/{p.name}" for p in beside]
        else:
            ignored.append(entry.name)

    if not files and not trees:
        single = [p for p in entries if p.is_file() and p.suffix.lower() in _READERS]
        if len(single) != 1:
            raise DataError(
                f"{folder} holds no dataset; expected train and test as .parquet, .csv, .tsv or "
                ".jsonl, folders train and test with a folder of .txt files for each label, or "
                "what datasets' save_to_disk writes. It holds "
                + (_some([p.name for p in entries]) if entries else "nothing")
            )
        files["train"] = single
        ignored.remove(single[0].name)

    splits: dict[str, Callable[[], _Rows]] = {}
    for split in dict.fromkeys(SPLITS.values()):
        found, tree = files.get(split, []), trees.get(split, [])
        if found or tree:
            _check_one_file(folder, split, found, tree)
        if found:
            splits[split] = functools.partial(_file_rows, found, text_column, label_column)
        elif tree:
            splits[split] = functools.partial(_tree_rows, tree[0])
    notes = [f"ignored in {folder}: {', '.join(ignored)}"] if ignored else []
    return _Corpus(_folder_name(folder), str(folder), splits, notes)


def _check_one_file(folder: Path, split: str, files: list[Path], trees: list[Path]) -> None:
    """One file or tree, or all shards of one set."""
    matches = [m for p in files if (m := _SPLIT_FILE.fullmatch(p.name))]
    sets = {(m[1], m[3], m[4]) for m in matches}
    shards = [int(m[2]) for m in matches if m[2]]
    if len(sets) + len(trees) > 1 or (files and not shards and len(files) > 1):
        raise DataError(
            f"{folder} has the {split} split more than once: "
            f"{_some([p.name for p in (*files, *trees)])}. Keep one of them, or pass a single file"
        )
    if shards:
        expected = int(matches[0][3])
        if missing := sorted(set(range(expected)) - set(shards)):
            raise DataError(
                f"{folder}: of the {expected} shards of {split}, these are missing (counted from "
                f"0): {_some(missing)}; bring them back"
            )


# --- Hugging Face datasets ------------------------------------------------------------------------


class _Unavailable(Exception):
    """IMDB cannot be had from the hub or its cache; the message is the reason."""


@functools.lru_cache(maxsize=1)  # `auto` looks whether it is there, then a run reads it
def _hub_imdb() -> dict[str, Any]:
    """The splits of stanfordnlp/imdb. Raises _Unavailable."""
    try:
        import datasets
    except ImportError as error:
        raise _Unavailable(_needs("datasets", "downloading it")) from error
    unreachable = _hub_unreachable()
    with _offline() if unreachable else contextlib.nullcontext():
        try:
            found = datasets.load_dataset(HUB_NAME)
        except Exception as error:  # whatever datasets, the hub or the network come up with
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if unreachable:
                reason = f"{unreachable}, and the local cache does not hold it"
            raise _Unavailable(reason) from error
    return {"train": found["train"], "test": found["test"]}


def _hub_unreachable() -> str | None:
    """Why the hub cannot be reached, after at most HUB_SECONDS; None if it can."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    url, answer = constants.ENDPOINT, []

    def ask() -> None:
        try:
            status = get_session().head(url, timeout=HUB_SECONDS).status_code
            answer.append(None if status < 400 else f"{url} answers with status {status}")
        except Exception as error:  # no network has many names
            answer.append(f"{url} cannot be reached ({type(error).__name__})")

    # A thread, since a timeout does not bound the look-up of the name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answer[0] if answer else f"{url} did not answer within {HUB_SECONDS:g} s"


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """datasets uses its cache only. Its environment variables are read at import: too early."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _saved_splits(folder: Path) -> dict[str, Any]:
    """What save_to_disk wrote: a DatasetDict, or one Dataset, as train."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(_needs("datasets", f"reading {folder}")) from error
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # of a damaged folder, any
        raise DataError(
            f"{folder} cannot be read as a folder of datasets' save_to_disk: {error}"
        ) from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _datasets_corpus(
    name: str, where: str, found: dict[str, Any], text_column: str | None, label_column: str | None
) -> _Corpus:
    def rows(split: str) -> _Rows:
        table = _dataset_table(found[split], f"{where} ({split})")
        return _table_rows(table, text_column, label_column)

    known: dict[str, Callable[[], _Rows]] = {
        SPLITS[k]: functools.partial(rows, k) for k in found if k in SPLITS
    }
    ignored = [k for k in found if k not in SPLITS]
    if not known:
        raise DataError(f"{where} has the splits {_some(ignored)}; expected train and test")
    notes = [f"ignored in {where}: {', '.join(ignored)}"] if ignored else []
    return _Corpus(name, where, known, notes)


def _dataset_table(dataset: Any, where: str) -> _Table:
    features = dataset.features

    def class_names(column: str) -> list[str] | None:
        names = getattr(features[column], "names", None)
        return list(names) if names else None

    def read(column: str) -> list[Any]:
        values: list[Any] = dataset.select_columns([column]).with_format(None)[:][column]
        return values

    kinds = {c: getattr(f, "dtype", "") in ("string", "large_string") for c, f in features.items()}
    return _Table(where, kinds, read, class_names=class_names)
