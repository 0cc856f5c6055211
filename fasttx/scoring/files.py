"""Tables that are read a chunk at a time, and written the same way: csv, tsv, jsonl, parquet, txt.

All but parquet may end in .gz. Columns stay as they are: of csv every cell is text, of json lines
each row is the object that it was. A format is a reader and a writer, and one line of FORMATS.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from fasttx.errors import DataError
from fasttx.text.cells import some
from fasttx.text.disk import reason
from fasttx.text.tables import TEXT_NAMES, refuse_twice
from fasttx.text.textfiles import needs

CHUNK_ROWS, CHUNK_CHARACTERS = 8192, 4_000_000


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows that follow one another: their texts, and all of them (dictionaries, or a pyarrow
    Table).

    share: how much of the file lies before their end, 0 to 1.
    """

    texts: list[Any]
    rows: Any
    share: float


class Reader(ABC):
    """columns: names, in order. Iterating gives the chunks, the same ones each time."""

    columns: list[str]

    @abstractmethod
    def chunks(self, column: str) -> Iterator[Chunk]: ...


def format_of(path: Path) -> str:
    """One of FORMATS. Raises DataError."""
    name = path.name.lower().removesuffix(".gz")
    found = next((kind for kind in FORMATS if name.endswith(kind)), None)
    if found is None or (found == ".parquet" and path.name.lower().endswith(".gz")):
        raise DataError(
            f"{path} is of an unknown kind; expected a name that ends in {', '.join(FORMATS)}, all "
            "but parquet also with .gz"
        )
    return found


def text_column(reader: Reader, path: Path, asked: str | None) -> str:
    """The column of texts. Raises DataError where it is missing, or not clear."""
    columns = reader.columns
    refuse_twice(str(path), columns)
    if asked is not None and asked in columns:
        return asked
    shown = f"{path} has the columns {some(columns, 30)}"
    if asked is not None:
        raise DataError(f"{shown}; --text-column is {asked!r}, which is none of them")
    known = [c for name in TEXT_NAMES for c in columns if c.lower() == name]
    if known or len(columns) == 1:
        return (known or columns)[0]
    raise DataError(f"{shown}; which of them holds the texts? Name it with --text-column")


# --- text files -----------------------------------------------------------------------------------


class _Lines(Reader):
    """A file of UTF-8, whose position in the compressed bytes is known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = max(1, path.stat().st_size)
        self.columns = self._columns()

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[TextIO, BinaryIO]]:
        """The text, and the file on the disk below it."""
        with open(self._path, "rb") as raw:
            is_packed = self._path.name.lower().endswith(".gz")
            unpacked = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if is_packed else raw
            with io.TextIOWrapper(unpacked, encoding="utf-8-sig", newline=self._newline) as text:
                yield text, raw

    _newline = "\n"  # nothing else ends a line: a JSON string may hold U+2028

    @abstractmethod
    def _columns(self) -> list[str]: ...

    @abstractmethod
    def _rows(self, text: TextIO) -> Iterator[dict[str, Any]]: ...

    def chunks(self, column: str) -> Iterator[Chunk]:
        rows: list[dict[str, Any]] = []
        characters = 0
        with self._open() as (text, raw), self._told():
            for row in self._rows(text):
                rows.append(row)
                value = row.get(column)
                characters += len(value) if isinstance(value, str) else 0
                if len(rows) >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
                    yield Chunk([r.get(column) for r in rows], rows, raw.tell() / self._size)
                    rows, characters = [], 0
        if rows:
            yield Chunk([r.get(column) for r in rows], rows, 1.0)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What is wrong with the file, as one DataError."""
        try:
            yield
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._path} is not UTF-8 ({error.reason}); convert it, for instance with iconv"
            ) from error
        except (EOFError, gzip.BadGzipFile) as error:
            raise DataError(
                f"{self._path} cannot be unpacked ({reason(error)}); is it complete?"
            ) from error


class _Csv(_Lines):
    _newline = ""
    _delimiter = ","

    def _cells(self, text: TextIO) -> Iterator[tuple[int, list[str]]]:
        """(last line, cells) of each row that has any."""
        reader = csv.reader(text, delimiter=self._delimiter, strict=True)
        limit = csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters a text
        try:
            for row in reader:
                if row:
                    yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{self._path}, line {reader.line_num}: {error}") from error
        finally:
            csv.field_size_limit(limit)

    def _columns(self) -> list[str]:
        with self._open() as (text, _), self._told():
            for _, header in self._cells(text):
                return [name.strip() for name in header]
        raise DataError(f"{self._path} is empty; expected a line with the names of the columns")

    def _rows(self, text: TextIO) -> Iterator[dict[str, Any]]:
        cells = self._cells(text)
        next(cells)
        for line, row in cells:
            if len(row) != len(self.columns):
                raise DataError(
                    f"{self._path}, line {line}: {len(row)} fields, and the header has "
                    f"{len(self.columns)} ({some(self.columns)}); put a text that holds a "
                    "separator into double quotes"
                )
            yield dict(zip(self.columns, row, strict=True))


class _Tsv(_Csv):
    _delimiter = "\t"


class _JsonLines(_Lines):
    def _columns(self) -> list[str]:
        """Of the first rows: later ones may have more."""
        found: dict[str, None] = {}
        with self._open() as (text, _), self._told():
            for _, row in zip(range(100), self._rows(text), strict=False):
                found |= dict.fromkeys(row)
        if not found:
            raise DataError(f"{self._path} holds no rows; expected one object a line")
        return list(found)

    def _rows(self, text: TextIO) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self._path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{self._path}, line {number}: no object; expected one a line")
            yield row


class _Text(_Lines):
    """One text a line; the column is called text."""

    def _columns(self) -> list[str]:
        return ["text"]

    def _rows(self, text: TextIO) -> Iterator[dict[str, Any]]:
        for line in text:
            yield {"text": line.removesuffix("\n").removesuffix("\r")}


# --- parquet --------------------------------------------------------------------------------------


def _pyarrow(path: Path) -> tuple[Any, Any]:
    """pyarrow and its parquet, for what is at `path`."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(needs("pyarrow", f"reading or writing {path}")) from error
    return pa, pq


class _Parquet(Reader):
    def __init__(self, path: Path) -> None:
        _, pq = _pyarrow(path)
        try:
            self._file = pq.ParquetFile(path)
        except Exception as error:  # a damaged file raises many kinds
            raise DataError(f"{path} cannot be read as parquet ({reason(error)})") from error
        self.columns = list(self._file.schema_arrow.names)
        self._path = path

    def chunks(self, column: str) -> Iterator[Chunk]:
        pa, _ = _pyarrow(self._path)
        total, done = max(1, self._file.metadata.num_rows), 0
        batches = self._file.iter_batches(batch_size=CHUNK_ROWS)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                raise DataError(f"{self._path} cannot be read ({reason(error)})") from error
            table = pa.Table.from_batches([batch])
            done += len(table)
            yield Chunk(table.column(column).to_pylist(), table, done / total)


# --- writing --------------------------------------------------------------------------------------

Added = dict[str, Any]  # columns, as NumPy arrays or lists


def _dicts(rows: Any) -> list[dict[str, Any]]:
    return rows if isinstance(rows, list) else rows.to_pylist()


def _with(rows: Any, added: Added) -> list[dict[str, Any]]:
    columns = {name: _plain(values) for name, values in added.items()}
    return [
        {**row, **dict(zip(columns, values, strict=True))}
        for row, values in zip(_dicts(rows), zip(*columns.values(), strict=True), strict=True)
    ]


def _plain(values: Any) -> list[Any]:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _packed(path: Path, content: str) -> bytes:
    data = content.encode("utf-8", "surrogatepass")
    # Without the time, so that equal rows are equal files. Members of gzip may follow one another.
    return gzip.compress(data, mtime=0) if path.name.lower().endswith(".gz") else data


def _csv_part(
    path: Path, columns: Sequence[str], rows: Any, added: Added, first: bool, delimiter: str = ","
) -> bytes:
    out = io.StringIO(newline="")
    names = [*columns, *added]
    writer = csv.DictWriter(out, names, "", delimiter=delimiter, lineterminator="\n")
    if first:
        writer.writeheader()
    try:
        writer.writerows(_with(rows, added))
    except ValueError as error:  # json lines, of which each may have fields of its own
        raise DataError(
            f"{path}: {error}; the first rows have {some(columns, 30)}. Let --out end in .jsonl"
        ) from error
    return _packed(path, out.getvalue())


def _json_part(path: Path, columns: Sequence[str], rows: Any, added: Added, first: bool) -> bytes:
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in _with(rows, added))
    return _packed(path, "".join(lines))


def _text_part(path: Path, columns: Sequence[str], rows: Any, added: Added, first: bool) -> bytes:
    """Tab-separated predictions alone: a line a text."""
    lines = zip(*map(_plain, added.values()), strict=True)
    return _packed(path, "".join("\t".join(map(str, line)) + "\n" for line in lines))


def _parquet_part(
    path: Path, columns: Sequence[str], rows: Any, added: Added, first: bool
) -> bytes:
    pa, pq = _pyarrow(path)
    table = pa.Table.from_pylist(rows) if isinstance(rows, list) else rows
    for name, values in added.items():
        table = table.append_column(name, pa.array(_plain(values)))
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def check_output(path: Path) -> None:
    """Raises DataError where its format is unknown, or needs a package that is not installed."""
    if format_of(path) == ".parquet":
        _pyarrow(path)


def part_of(path: Path, columns: Sequence[str], rows: Any, added: Added, first: bool) -> bytes:
    """The bytes of some rows with their added columns, in the format of `path`."""
    return FORMATS[format_of(path)].part(path, columns, rows, added, first)


def join(path: Path, parts: Sequence[Path], out: BinaryIO) -> None:
    """The parts, one after the other, as one file of that format."""
    if format_of(path) != ".parquet":
        for part in parts:
            with part.open("rb") as f:
                while block := f.read(1 << 20):
                    out.write(block)
        return
    pa, pq = _pyarrow(path)
    schema = pa.unify_schemas([pq.read_schema(part) for part in parts])
    with pq.ParquetWriter(out, schema) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part).cast(schema))


@dataclass(frozen=True)
class Format:
    reader: Callable[[Path], Reader]
    part: Callable[..., bytes]


def _tsv_part(path: Path, columns: Sequence[str], rows: Any, added: Added, first: bool) -> bytes:
    return _csv_part(path, columns, rows, added, first, "\t")


FORMATS = {
    ".parquet": Format(_Parquet, _parquet_part),
    ".csv": Format(_Csv, _csv_part),
    ".tsv": Format(_Tsv, _tsv_part),
    ".jsonl": Format(_JsonLines, _json_part),
    ".txt": Format(_Text, _text_part),
}


def open_table(path: Path) -> Reader:
    """Raises DataError, and OSError where there is no such file."""
    os.stat(path)
    return FORMATS[format_of(path)].reader(path)
