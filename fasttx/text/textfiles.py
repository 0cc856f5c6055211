"""Files and folders of labelled texts: parquet, csv, tsv, json lines, a folder for each label.

A format is one function from a path to a `Table`, and one line of READERS.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from fasttx.errors import DataError
from fasttx.text.tables import NUMBER, Label, Rows, Table, shown, some, table_rows, table_texts


def needs(package: str, why: str) -> str:
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


def _parquet_table(path: Path) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(needs("pyarrow", f"reading {path}")) from error

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
        """From the metadata that `datasets` writes into the schema."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
            if features[column]["_type"] == "ClassLabel":
                return [str(name) for name in features[column]["names"]]
        return None

    kinds = {f.name: is_text(f.type) for f in schema}
    return Table(str(path), kinds, read, class_names=class_names)


def _csv_rows(text: str, delimiter: str, quotes: bool = True) -> Iterator[tuple[int, list[str]]]:
    quoting: Literal[0, 3] = 0 if quotes else 3  # csv.QUOTE_MINIMAL, csv.QUOTE_NONE
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=quoting)
    end = 0
    for row in reader:
        if row:
            yield end + 1, row  # its first line: a quoted text may span several
        end = reader.line_num


def _csv_table(path: Path) -> Table:
    text, tabs = _file_text(path), path.suffix.lower() == ".tsv"
    delimiter = "\t" if tabs else ","
    limit = csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters a text
    try:
        rows = list(_csv_rows(text, delimiter))
    except csv.Error as error:
        if not tabs:
            line = _last_good_line(text, delimiter) + 1
            raise DataError(
                f"{path}, line {line}: {error}; put a text that holds commas or quotes into double "
                'quotes, and write "" for each quote inside'
            ) from error
        rows = list(_csv_rows(text, delimiter, quotes=False))  # many TSV files do not quote
    finally:
        csv.field_size_limit(limit)

    header = [name.strip() for name in rows[0][1]]
    if any(NUMBER.fullmatch(name) or len(name) > 100 for name in header):
        raise DataError(
            f"{path}: its first line is {shown(rows[0][1])}; expected the names of the columns, "
            "such as text" + delimiter.replace("\t", "<TAB>") + "label"
        )
    if len(set(header)) < len(header):
        raise DataError(f"{path} has two columns of one name: {some(header)}; rename one")
    del rows[0]
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(
                f"{path}, line {line}: {len(row)} fields, and the header has {len(header)} "
                f"({some(header)}); put a text that holds {'tabs' if tabs else 'commas'} into "
                "double quotes"
            )
    at = {name: i for i, name in enumerate(header)}
    return Table(
        str(path),
        dict.fromkeys(header, True),
        lambda column: [row[at[column]] or None for _, row in rows],  # "" is an empty cell
        lambda row: f"line {rows[row][0]}",
    )


def _last_good_line(text: str, delimiter: str) -> int:
    line = 0
    with contextlib.suppress(csv.Error):
        for line, _ in _csv_rows(text, delimiter):  # noqa: B007
            pass
    return line


def _json_table(path: Path) -> Table:
    """JSON lines; a .json file may hold one array of objects instead."""
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
                f"{path}, {place}: {shown(row)}; expected an object, such as "
                '{"text": "...", "label": 1}'
            )
        for column, value in row.items():
            kinds[column] = kinds.get(column, False) or isinstance(value, str)
    return Table(str(path), kinds, lambda c: [row.get(c) for _, row in rows], lambda i: rows[i][0])


READERS = {
    ".parquet": _parquet_table, ".csv": _csv_table, ".tsv": _csv_table, ".jsonl": _json_table,
    ".json": _json_table,
}  # fmt: skip


def file_rows(paths: list[Path], text_column: str | None, label_column: str | None) -> Rows:
    """Texts and labels of one file, or of all shards of one split. Raises DataError."""
    parts = [table_rows(READERS[p.suffix.lower()](p), text_column, label_column) for p in paths]
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
        first.notes,
    )


def file_texts(path: Path, text_column: str | None) -> list[str]:
    """The texts of a file whose labels are missing or not used. Raises DataError."""
    return table_texts(READERS[path.suffix.lower()](path), text_column)


def folder_texts(folder: Path) -> list[str]:
    """The *.txt files of one folder, in the order of their names."""
    return [_utf8(path, _file_bytes(path)) for path in sorted(folder.glob("*.txt"))]


def tree_labels(folder: Path) -> list[Path]:
    """The folders of `folder` that stand for a label: those that contain texts."""
    return sorted(
        d for d in folder.iterdir()
        if d.is_dir() and d.name != "unsup" and next(d.glob("*.txt"), None) is not None
    )  # fmt: skip


def tree_rows(folder: Path) -> Rows:
    """Texts and labels of <label>/*.txt; the name of a folder is the label of its texts."""
    texts: list[str] = []
    labels: list[Label] = []
    for label in tree_labels(folder):
        found = folder_texts(label)
        texts += found
        labels += [label.name] * len(found)
    return Rows(texts, labels, str(folder))
