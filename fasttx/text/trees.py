"""Trees of labelled texts: a folder for each label, a .txt file for each text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasttx.errors import DataError
from fasttx.text.cells import CELLS, why_no_label
from fasttx.text.disk import bytes_of, is_folder, listed, refuse_dangling, utf8
from fasttx.text.tables import Rows, blank_note

UNLABELLED = "unsup"  # of the original IMDB archive


def text_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The texts of one folder by name, and what else it holds. Raises DataError."""
    counted, hidden = listed(folder)
    texts = [p for p in counted if p.suffix.lower() == ".txt"]
    return texts, [p for p in counted if p.suffix.lower() != ".txt"] + hidden


def folder_texts(folder: Path) -> list[str]:
    """The *.txt files of one folder, in the order of their names."""
    return [utf8(path, bytes_of(path)) for path in text_files(folder)[0]]


def tree_labels(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders of `folder` that stand for a label, those that contain texts; and what else it
    holds, but for the folder of unlabelled texts. Raises DataError."""
    counted, others = listed(folder)
    labels: list[Path] = []
    for path in counted:
        refuse_dangling(path)
        if path.name == UNLABELLED and holds_texts(path):
            continue
        (labels if holds_texts(path) else others).append(path)
    return labels, sorted(others)


def holds_texts(folder: Path) -> bool:
    return is_folder(folder) and bool(text_files(folder)[0])


def tree_rows(folder: Path, problem_type: str) -> Rows:
    """Texts and labels of <label>/*.txt; the name of a folder is the label of its texts."""
    paths: list[Path] = []
    cell = CELLS[problem_type]
    labels: list[Any] = []
    notes: list[str] = []
    for label in tree_labels(folder)[0]:
        name = cell.read(label.name)
        if name is None:
            raise DataError(
                f"{label}: the name of the folder is the label of its texts, and it is "
                f"{why_no_label(label.name)}; expected {cell.expected(label.name)}"
            )
        found, others = text_files(label)
        paths += found
        labels += [name] * len(found)
        notes += ignored_note(label, others)
    texts = [utf8(path, bytes_of(path)) for path in paths]
    notes += blank_note(texts, str(folder), lambda row: str(paths[row]))
    return Rows(texts, labels, str(folder), notes=notes)


def ignored_note(folder: Path, paths: Sequence[Path | str]) -> list[str]:
    names = [str(getattr(path, "name", path)) for path in paths]
    if not names:
        return []
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return [f"ignored in {folder}: {', '.join(names[:10])}{more}"]
