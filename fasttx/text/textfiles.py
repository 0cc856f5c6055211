"""Files of labelled texts: parquet, csv, tsv, json lines; all but parquet also as .gz.

A format is one function from a path to a `Table`, and one line of READERS.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fasttx.errors import DataError
from fasttx.text.csvfiles import csv_table
from fasttx.text.disk import head_of, reason, refuse_foreign
from fasttx.text.jsonfiles import json_table
from fasttx.text.tables import Columns, Rows, Table, refuse_twice, table_rows, table_texts


def needs(package: str, why: str) -> str:
    return f"{why} needs the package {package}, which is not installed: pip install 'fasttx[train]'"


def _parquet_table(path: Path) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(needs("pyarrow", f"reading {path}")) from error

    def damaged(error: Exception) -> DataError:
        return DataError(
            f"{path} cannot be read as parquet ({reason(error)}); is the file complete?"
        )

    head = head_of(path)
    if not head:
        raise DataError(f"{path} is empty; expected texts with labels")
    if not head.startswith(b"PAR1"):
        refuse_foreign(path, head)
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except Exception as error:  # a damaged file raises many kinds
        raise damaged(error) from error
    refuse_twice(str(path), schema.names)

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

    def read(column: str) -> list[Any]:
        try:
            values: list[Any] = file.read(columns=[column]).column(column).to_pylist()
        except Exception as error:
            raise damaged(error) from error
        return values

    def class_names(column: str) -> list[str] | None:
        """From the metadata that `datasets` writes into the schema."""
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]
            feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
            if feature["_type"] == "ClassLabel":
                return [str(name) for name in feature["names"]]
        return None

    kinds = {f.name: is_text(f.type) for f in schema}
    return Table(str(path), kinds, read, class_names=class_names)


READERS: dict[str, Callable[[Path], Table]] = {
    ".parquet": _parquet_table,
    ".csv": csv_table,
    ".tsv": functools.partial(csv_table, delimiter="\t"),
    ".jsonl": functools.partial(json_table, lines=True),
    ".json": json_table,
}
KINDS = (*READERS, *(f"{kind}.gz" for kind in READERS if kind != ".parquet"))  # packed by itself


def kind_of(path: Path) -> str | None:
    """How the name of a file of a known kind ends: one of KINDS."""
    return next((kind for kind in KINDS if path.name.lower().endswith(kind)), None)


def _table(path: Path) -> Table:
    kind = kind_of(path)
    assert kind is not None
    return READERS[kind.removesuffix(".gz")](path)


def file_rows(paths: list[Path], columns: Columns) -> Rows:
    """Texts and labels of one file, or of all shards of one split. Raises DataError."""
    parts = [table_rows(_table(p), columns) for p in paths]
    first = parts[0]
    if len(parts) == 1:
        return first
    for other in parts[1:]:
        if other.label_names != first.label_names:
            raise DataError(
                f"{other.where} names its labels {other.label_names}, {first.where} "
                f"{first.label_names}; expected the same names in the same order"
            )
    return Rows(
        [text for part in parts for text in part.texts],
        [label for part in parts for label in part.labels],
        f"{first.where} and {len(parts) - 1} more",
        first.label_names,
        list(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def file_texts(path: Path, text_column: str | None) -> Sequence[str]:
    """The texts of a file whose labels are missing or not used. Raises DataError."""
    return table_texts(_table(path), text_column)
