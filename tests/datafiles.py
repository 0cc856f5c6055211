"""Rows of texts and labels, written in every format that fasttx reads."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

Rows = list[tuple[Any, Any]]

SUFFIXES = (
    ".parquet", ".csv", ".tsv", ".jsonl", ".json", ".csv.gz", ".tsv.gz", ".jsonl.gz", ".json.gz",
)  # fmt: skip
SAVED = ".saved"  # a folder that datasets' save_to_disk writes


def reviews(count: int, labels: tuple[Any, ...] = ("bad", "good"), start: int = 0) -> Rows:
    """Each text occurs once, and says its label: `17 good`."""
    pairs = [(i, labels[i % len(labels)]) for i in range(start, start + count)]
    return [(f"{i} {label}", label) for i, label in pairs]


def write(path: Path, rows: Rows, columns: tuple[str, str] = ("text", "label")) -> Path:
    """`rows` in the format that the name of `path` asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffixes[-2] if path.suffix == ".gz" else path.suffix
    texts, labels = ([row[i] for row in rows] for i in (0, 1))
    if kind == SAVED:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({columns[0]: texts, columns[1]: labels}).save_to_disk(str(path))
        return path
    if kind == ".parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({columns[0]: texts, columns[1]: labels}), path)
        return path
    if kind in (".csv", ".tsv"):
        out = io.StringIO(newline="")
        rows_out = csv.writer(out, delimiter="\t" if kind == ".tsv" else ",")
        rows_out.writerows([columns, *rows])
        text = out.getvalue()
    else:
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
        text = f"[{','.join(lines)}]" if kind == ".json" else "\n".join(lines) + "\n"
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_tree(folder: Path, rows: Rows) -> Path:
    for i, (text, label) in enumerate(rows):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{i:05d}.txt").write_text(text, encoding="utf-8")
    return folder
