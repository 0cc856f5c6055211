"""Datasets by name or path: files, IMDB through `datasets`, the demo corpus."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasttx.errors import DataError
from fasttx.text import demo
from fasttx.text.tables import Rows, Table, some, table_rows, table_texts
from fasttx.text.textfiles import (
    READERS,
    file_rows,
    file_texts,
    folder_texts,
    needs,
    tree_labels,
    tree_rows,
)  # fmt: skip

ENVIRONMENT = "FASTTX_DATA"
HUB_NAME = "stanfordnlp/imdb"
HUB_SECONDS = 3.0  # `datasets` itself waits minutes for a hub that cannot be reached

SPLITS = {
    "train": "train", "training": "train", "test": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
UNLABELLED = ("unsupervised", "unlabelled", "unlabeled")


def _file_names(splits: Iterable[str]) -> re.Pattern[str]:
    """Of train.csv and train-00000-of-00002.csv; groups: split, shard, shards, suffix."""
    suffixes = "|".join(map(re.escape, READERS))
    return re.compile(rf"({'|'.join(splits)})(?:-(\d+)-of-(\d+))?({suffixes})", re.IGNORECASE)


_SPLIT_FILE, _UNLABELLED_FILE = _file_names(SPLITS), _file_names(UNLABELLED)


@dataclass(frozen=True)
class Source:
    """A resolved --dataset: `imdb`, `demo`, or an absolute path. `notes`: why, for people."""

    name: str
    notes: tuple[str, ...] = ()


def resolve(dataset: str) -> Source:
    """Choose for `auto`, and check that a path exists. Raises DataError.

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
        hub_imdb()
    except Unavailable as reason:
        return Source("demo", _unmissable(str(reason)))
    return Source("imdb", (f"dataset auto: {HUB_NAME}",))


def _unmissable(reason: str) -> tuple[str, ...]:
    text = (
        f"IMDB could not be had ({reason}): training on the built-in DEMO corpus; its accuracy "
        "says nothing about IMDB. To train on your own copy, set FASTTX_DATA to its folder."
    )
    return ("*" * 96, *(f"*  {line:90}  *" for line in textwrap.wrap(text, 90)), "*" * 96)


@dataclass(frozen=True, eq=False)
class Corpus:
    """The splits of a dataset, each read when it is called: an evaluation needs only one.

    unlabelled: texts without labels, by where they are. notes: lines to show.
    """

    name: str
    where: str
    splits: dict[str, Callable[[], Rows]]
    notes: list[str] = field(default_factory=list)
    unlabelled: dict[str, Callable[[], list[str]]] = field(default_factory=dict)


def read_corpus(name: str, text_column: str | None, label_column: str | None) -> Corpus:
    """The dataset of a resolved `name`. Raises DataError."""
    if name == "demo":
        return _demo_corpus()
    if name == "imdb":
        try:
            found = hub_imdb()
        except Unavailable as error:
            raise DataError(
                f"IMDB could not be had: {error}. Connect to the network once, or pass the folder "
                "of a copy (--dataset PATH), or use the built-in corpus (--dataset demo)"
            ) from error
        return _datasets_corpus("imdb", HUB_NAME, found, text_column, label_column)
    path = Path(name)
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise DataError(
                f"{path} is of an unknown kind; expected {', '.join(READERS)}, or a folder"
            )
        splits = {"train": lambda: file_rows([path], text_column, label_column)}
        return Corpus(path.stem, str(path), splits)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        found = _saved_splits(path)
        return _datasets_corpus(_folder_name(path), str(path), found, text_column, label_column)
    return _folder_corpus(path, text_column, label_column)


def _folder_name(folder: Path) -> str:
    return "imdb" if folder.name.lower() in ("imdb", "aclimdb") else folder.name or "root"


def _demo_corpus() -> Corpus:
    train_texts, train_labels, test_texts, test_labels = demo.corpus()
    where, names = "the demo corpus", demo.LABEL_NAMES
    train = Rows(train_texts, [*train_labels], where, names)
    test = Rows(test_texts, [*test_labels], where, names)
    return Corpus("demo", where, {"train": lambda: train, "test": lambda: test})


def _folder_corpus(folder: Path, text_column: str | None, label_column: str | None) -> Corpus:
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
        elif split and entry.is_dir() and (labels := tree_labels(entry)):
            trees.setdefault(split, []).append(entry)
            beside = sorted(p for p in entry.iterdir() if p not in labels and p.name[0] != ".")
            ignored += [f"{entry.name}/{p.name}" for p in beside]
        else:
            ignored.append(entry.name)

    unlabelled = _unlabelled(entries, text_column)
    if not files and not trees and not unlabelled:
        single = [p for p in entries if p.is_file() and p.suffix.lower() in READERS]
        if len(single) != 1:
            raise DataError(
                f"{folder} holds no dataset; expected train and test as {', '.join(READERS)}, "
                "folders train and test with a folder of .txt files for each label, or "
                "what datasets' save_to_disk writes. It holds "
                + (some([p.name for p in entries]) if entries else "nothing")
            )
        files["train"] = single
        ignored.remove(single[0].name)

    splits: dict[str, Callable[[], Rows]] = {}
    for split in dict.fromkeys(SPLITS.values()):
        found, tree = files.get(split, []), trees.get(split, [])
        if found or tree:
            _check_one_file(folder, split, found, tree)
        if found:
            splits[split] = functools.partial(file_rows, found, text_column, label_column)
        elif tree:
            splits[split] = functools.partial(tree_rows, tree[0])
    notes = [f"ignored in {folder}: {', '.join(ignored)}"] if ignored else []
    return Corpus(_folder_name(folder), str(folder), splits, notes, unlabelled)


def _unlabelled(entries: list[Path], text_column: str | None) -> dict[str, Callable[[], list[str]]]:
    """Files such as unsupervised.parquet, and the folder train/unsup of the original archive."""
    found: dict[str, Callable[[], list[str]]] = {}
    for entry in entries:
        tree = entry / "unsup"
        if entry.is_file() and _UNLABELLED_FILE.fullmatch(entry.name):
            found[str(entry)] = functools.partial(file_texts, entry, text_column)
        elif SPLITS.get(entry.name.lower()) == "train" and next(tree.glob("*.txt"), None):
            found[str(tree)] = functools.partial(folder_texts, tree)
    return found


def _check_one_file(folder: Path, split: str, files: list[Path], trees: list[Path]) -> None:
    """Raise DataError unless a split is one file, one tree, or all shards of one set."""
    matches = [m for p in files if (m := _SPLIT_FILE.fullmatch(p.name))]
    sets = {(m[1], m[3], m[4]) for m in matches}
    shards = [int(m[2]) for m in matches if m[2]]
    if len(sets) + len(trees) > 1 or (files and not shards and len(files) > 1):
        raise DataError(
            f"{folder} has the {split} split more than once: "
            f"{some([p.name for p in (*files, *trees)])}. Keep one of them, or pass a single file"
        )
    if shards:
        expected = int(matches[0][3])
        if missing := sorted(set(range(expected)) - set(shards)):
            raise DataError(
                f"{folder}: of the {expected} shards of {split}, these are missing (counted from "
                f"0): {some(missing)}; bring them back"
            )


# --- Hugging Face datasets ------------------------------------------------------------------------


class Unavailable(Exception):
    """IMDB cannot be had from the hub or its cache; the message is the reason."""


@functools.lru_cache(maxsize=1)  # `auto` asks whether it is there, then a run reads it
def hub_imdb() -> dict[str, Any]:
    """The splits of stanfordnlp/imdb. Raises Unavailable."""
    try:
        import datasets
    except ImportError as error:
        raise Unavailable(needs("datasets", "downloading it")) from error
    unreachable = hub_unreachable()
    with _offline() if unreachable else contextlib.nullcontext():
        try:
            found = datasets.load_dataset(HUB_NAME)
        except Exception as error:  # datasets, the hub and the network raise many kinds
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if unreachable:
                reason = f"{unreachable}, and the local cache does not hold it"
            raise Unavailable(reason) from error
    return {k: found[k] for k in ("train", "test", *UNLABELLED) if k in found}


def hub_unreachable() -> str | None:
    """Why the hub cannot be reached, after at most HUB_SECONDS; None if it can."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    url, answer = constants.ENDPOINT, []

    def ask() -> None:
        try:
            status = get_session().head(url, timeout=HUB_SECONDS).status_code
            answer.append(None if status < 400 else f"{url} answers with status {status}")
        except Exception as error:  # a missing network raises many kinds
            answer.append(f"{url} cannot be reached ({type(error).__name__})")

    # In a thread, since the timeout does not limit the DNS look-up.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answer[0] if answer else f"{url} did not answer within {HUB_SECONDS:g} s"


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let datasets use its cache only. It reads its environment variables at import: too early."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _saved_splits(folder: Path) -> dict[str, Any]:
    """The splits that save_to_disk wrote; a single Dataset is the split train."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(needs("datasets", f"reading {folder}")) from error
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged folder raises many kinds
        raise DataError(
            f"{folder} cannot be read as a folder of datasets' save_to_disk: {error}"
        ) from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _datasets_corpus(
    name: str, where: str, found: dict[str, Any], text_column: str | None, label_column: str | None
) -> Corpus:
    def rows(split: str) -> Rows:
        table = _dataset_table(found[split], f"{where} ({split})")
        return table_rows(table, text_column, label_column)

    known: dict[str, Callable[[], Rows]] = {
        SPLITS[k]: functools.partial(rows, k) for k in found if k in SPLITS
    }
    unlabelled: dict[str, Callable[[], list[str]]] = {
        f"{where} ({k})": functools.partial(
            lambda k: table_texts(_dataset_table(found[k], f"{where} ({k})"), text_column), k
        )
        for k in found
        if k in UNLABELLED
    }
    ignored = [k for k in found if k not in SPLITS]
    if not known:
        raise DataError(f"{where} has the splits {some(ignored)}; expected train and test")
    notes = [f"ignored in {where}: {', '.join(ignored)}"] if ignored else []
    return Corpus(name, where, known, notes, unlabelled)


def _dataset_table(dataset: Any, where: str) -> Table:
    features = dataset.features

    def class_names(column: str) -> list[str] | None:
        names = getattr(features[column], "names", None)
        return list(names) if names else None

    def read(column: str) -> list[Any]:
        values: list[Any] = dataset.select_columns([column]).with_format(None)[:][column]
        return values

    kinds = {c: getattr(f, "dtype", "") in ("string", "large_string") for c, f in features.items()}
    return Table(where, kinds, read, class_names=class_names)
