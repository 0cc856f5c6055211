"""Tables of commas or tabs (csv, tsv), as programs and spreadsheets write them."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fasttx.errors import DataError
from fasttx.text.cells import NUMBER, shown, some
from fasttx.text.disk import file_text
from fasttx.text.tables import Table, refuse_twice


def _csv_rows(text: str, delimiter: str, quotes: bool = True) -> Iterator[tuple[int, list[str]]]:
    quoting: Literal[0, 3] = 0 if quotes else 3  # csv.QUOTE_MINIMAL, csv.QUOTE_NONE
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=quoting)
    end = 0
    for row in reader:
        if row:
            yield end + 1, row  # its first line: a quoted text may span several
        end = reader.line_num


def csv_table(path: Path, delimiter: str = ",") -> Table:
    """Raises DataError."""
    text, tabs = file_text(path), delimiter == "\t"
    first, _, rest = text.partition("\n")
    if first.strip(' \r"').lower() == f"sep={delimiter}":  # for Excel
        text = f"\n{rest}"
    _check_delimiter(path, text.lstrip("\r\n").partition("\n")[0], delimiter)
    # The csv module of Python 3.10 refuses zeros: they are taken out while it reads.
    unused = (c for c in map(chr, range(0xE000, 0xF900)) if c not in text)
    zero = next(unused, "") if "\0" in text else ""
    text = text.replace("\0", zero) if zero else text
    rows: list[tuple[int, list[str]]] = []
    limit = csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters a text
    try:
        rows = list(_csv_rows(text, delimiter))
    except csv.Error as error:
        with contextlib.suppress(csv.Error):  # many TSV files do not quote
            rows = list(_csv_rows(text, delimiter, quotes=False)) if tabs else []
        if not rows:
            line = _last_good_line(text, delimiter) + 1
            raise DataError(
                f"{path}, line {line}: {error}; put a text that holds commas or quotes into double "
                'quotes, and write "" for each quote inside'
            ) from error
    finally:
        csv.field_size_limit(limit)

    if zero:
        rows = [(line, [cell.replace(zero, "\0") for cell in row]) for line, row in rows]
    header = [name.strip() for name in rows[0][1]]
    while len(header) > 1 and not header[-1]:
        del header[-1]  # a sheet was wider once
    if any(NUMBER.fullmatch(name) or len(name) > 100 for name in header):
        raise DataError(
            f"{path}: its first line is {shown(rows[0][1])}; expected the names of the columns, "
            "such as text" + delimiter.replace("\t", "<TAB>") + "label"
        )
    refuse_twice(str(path), header)
    del rows[0]
    wide, rows = rows, []
    for line, row in wide:
        if len(header) > 1 and not any(row):
            continue  # a blank line of a sheet: nothing but commas
        rows.append((line, row[: len(header)]))
        if len(row) < len(header) or any(row[len(header) :]):
            raise DataError(
                f"{path}, line {line}: {len(row)} fields, and the header has {len(header)} "
                f"({some(header)}); put a text that holds {'tabs' if tabs else 'commas'} into "
                "double quotes"
            )
    at, n = {name: i for i, name in enumerate(header)}, len(wide) - len(rows)
    return Table(
        str(path),
        dict.fromkeys(header, True),
        lambda column: [row[at[column]] for _, row in rows],
        lambda row: f"line {rows[row][0]}",
        notes=[f"{path}: rows left out, for all their cells are empty: {n:,}"] if n else [],
    )


def _check_delimiter(path: Path, header: str, delimiter: str) -> None:
    """Raise DataError for a header that something else separates."""
    if delimiter in header:
        return
    others = {
        "\t": ("tabs", "Name the file .tsv"), ";": ("semicolons (;)", "Save it anew with commas"),
        "|": ("bars (|)", "Save it anew with commas"), ",": ("commas", "Name the file .csv"),
    }  # fmt: skip
    for other, (name, advice) in others.items():
        if other in header:
            expected = "tabs" if delimiter == "\t" else "commas"
            raise DataError(
                f"{path} looks separated by {name}: its first line is {shown(header.strip())}; "
                f"expected {expected}. {advice}"
            )


def _last_good_line(text: str, delimiter: str) -> int:
    line = 0
    with contextlib.suppress(csv.Error):
        for line, _ in _csv_rows(text, delimiter):  # noqa: B007
            pass
    return line
