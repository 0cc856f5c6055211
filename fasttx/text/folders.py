"""What a folder holds: which of its files and folders are which split of a dataset."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fasttx.errors import DataError
from fasttx.text.cells import some
from fasttx.text.disk import is_file, is_folder, listed, refuse_dangling
from fasttx.text.tables import Columns, Rows
from fasttx.text.textfiles import KINDS, file_rows, file_texts, kind_of
from fasttx.text.trees import (
    UNLABELLED,
    folder_texts,
    holds_texts,
    ignored_note,
    tree_labels,
    tree_rows,
)

SPLITS = {
    "train": "train", "training": "train", "test": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
UNLABELLED_SPLITS = ("unsupervised", "unlabelled", "unlabeled")
_DEEP = 2  # a clone from the hub has its files in data/, or in a folder for each configuration
_NO_DATA = ("dataset_infos.json",)  # what older datasets on the hub have beside their data


def _file_names(splits: Iterable[str]) -> re.Pattern[str]:
    """Of train.csv, train-00000-of-00002.csv and train-00000-of-00002-0123456789abcdef.csv; groups:
    split, shard, shards, suffix."""
    suffixes = "|".join(map(re.escape, KINDS))
    return re.compile(
        rf"({'|'.join(splits)})(?:-(\d+)-of-(\d+)(?:-[0-9a-f]+)?)?({suffixes})", re.IGNORECASE
    )


_SPLIT_FILE, _UNLABELLED_FILE = _file_names(SPLITS), _file_names(UNLABELLED_SPLITS)


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

    @property
    def held(self) -> str:
        """What there is of it, for messages."""
        found = [*self.splits, *(["texts without labels"] if self.unlabelled else [])]
        return "it has " + (" and ".join(found) if found else "no split at all")


@dataclass(frozen=True, eq=False)
class _Held:
    """What a folder holds: files and trees by split, files and folders of texts without labels,
    and the rest."""

    files: dict[str, list[Path]] = field(default_factory=dict)
    trees: dict[str, list[Path]] = field(default_factory=dict)
    unlabelled: list[Path] = field(default_factory=list)
    rest: list[Path] = field(default_factory=list)  # of the folder itself
    beside: list[str] = field(default_factory=list)  # in its trees

    def __bool__(self) -> bool:
        return bool(self.files or self.trees or self.unlabelled)


def _look(folder: Path) -> _Held:
    held = _Held()
    entries, hidden = listed(folder)
    for entry in entries:
        match, split = _SPLIT_FILE.fullmatch(entry.name), SPLITS.get(entry.name.lower())
        without = _UNLABELLED_FILE.fullmatch(entry.name)
        if match or without or split:
            refuse_dangling(entry)
        if match and is_file(entry):
            held.files.setdefault(SPLITS[match[1].lower()], []).append(entry)
        elif without and is_file(entry):
            held.unlabelled.append(entry)
        elif split and is_folder(entry):
            labels, others = tree_labels(entry)
            unlabelled = entry / UNLABELLED
            if holds_texts(unlabelled):
                (held.unlabelled if split == "train" else others).append(unlabelled)
            if labels:
                held.trees.setdefault(split, []).append(entry)
                held.beside.extend(f"{entry.name}/{p.name}" for p in others)
            elif unlabelled not in held.unlabelled:
                held.rest.append(entry)
        else:
            held.rest.append(entry)
    held.rest.extend(hidden)
    return held


def folder_corpus(folder: Path, columns: Columns) -> Corpus:
    """The dataset that a folder holds, or the only one below it. Raises DataError."""
    root, held, notes = folder, _look(folder), []
    if not held:
        inside = _datasets_below(folder, _DEEP)
        if len(inside) > 1:
            found = [str(p.relative_to(folder)) for p in inside]
            raise DataError(
                f"{folder} holds several datasets: {some(found)}. Pass the folder of one of them, "
                f"for instance {inside[0]}"
            )
        if inside:
            folder, held = inside[0], _look(inside[0])
            notes.append(f"the dataset of {root} lies in {folder}")
    if not held:
        _take_the_only_file(folder, held)

    splits: dict[str, Callable[[], Rows]] = {}
    for split in dict.fromkeys(SPLITS.values()):
        files, tree = held.files.get(split, []), held.trees.get(split, [])
        if files or tree:
            _check_one_file(folder, split, files, tree)
        if files:
            splits[split] = functools.partial(file_rows, files, columns)
        elif tree:
            splits[split] = functools.partial(tree_rows, tree[0], columns.problem_type)
    unlabelled: dict[str, Callable[[], list[str]]] = {
        str(p): functools.partial(file_texts, p, columns.text)
        if is_file(p)
        else functools.partial(folder_texts, p)
        for p in held.unlabelled
    }
    rest = sorted([*(p.name for p in held.rest), *held.beside])
    notes += ignored_note(folder, rest)
    return Corpus(name_of(root), str(folder), splits, notes, unlabelled)


def name_of(folder: Path) -> str:
    return "imdb" if folder.name.lower() in ("imdb", "aclimdb") else folder.name or "root"


def _datasets_below(folder: Path, depth: int) -> list[Path]:
    found = []
    for path in listed(folder)[0]:
        if path.name.lower() not in SPLITS and is_folder(path):
            if _look(path):
                found.append(path)
            elif depth > 1:
                found += _datasets_below(path, depth - 1)
    return found


def _take_the_only_file(folder: Path, held: _Held) -> None:
    """The only file of a known kind is the training split, whatever its name."""
    entries = listed(folder)[0]
    single = [p for p in entries if kind_of(p) and p.name not in _NO_DATA]
    for path in single:
        refuse_dangling(path)
    single = [p for p in single if is_file(p)]
    if len(single) != 1:
        raise DataError(
            f"{folder} holds no dataset; expected train and test as {', '.join(KINDS)}, "
            "folders train and test with a folder of .txt files for each label, or "
            "what datasets' save_to_disk writes. It holds "
            + (some([p.name for p in entries]) if entries else "nothing")
        )
    held.files["train"] = single
    held.rest.remove(single[0])


def _check_one_file(folder: Path, split: str, files: list[Path], trees: list[Path]) -> None:
    """Raise DataError unless a split is one file, one tree, or all shards of one set."""
    matches = [m for p in files if (m := _SPLIT_FILE.fullmatch(p.name))]
    sets = {(m[1], m[3], m[4]) for m in matches}
    shards = [int(m[2]) for m in matches if m[2]]
    several = len(files) > len(set(shards)) if shards else len(files) > 1
    if len(sets) + len(trees) > 1 or several:
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
