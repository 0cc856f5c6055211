"""Tables of JSON objects: one a line, or in one array."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fasttx.errors import DataError
from fasttx.text.cells import shown, some
from fasttx.text.disk import file_text
from fasttx.text.tables import Table


def json_table(path: Path, lines: bool = False) -> Table:
    """One object a line; unless only `lines` are expected, also an array. Raises DataError."""
    text = file_text(path)
    _check_shape(path, text, lines)
    rows: list[tuple[str, Any]] = []

    def parse(piece: str, place: str) -> Any:
        try:
            return json.loads(piece, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}, {place}: not JSON ({error}); expected one object a line, such as "
                '{"text": "...", "label": 1}'
            ) from error

    if not lines and text.lstrip().startswith("["):
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
    if not rows:
        raise DataError(f"{path} holds no rows; expected at least one text")
    return Table(str(path), kinds, lambda c: [row.get(c) for _, row in rows], lambda i: rows[i][0])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; ValueError where a key has two values, of which json would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"two values for {twice!r}")
    return found


def _check_shape(path: Path, text: str, lines: bool) -> None:
    """Raise DataError for a file that is one array or one object where it should not be."""
    if not text.lstrip().startswith(("{", "[") if lines else "{"):
        return
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return  # several lines, each an object; or no JSON
    if isinstance(whole, list):
        if len(whole) > 1 or "\n" in text.strip():
            raise DataError(f"{path} holds one array, not an object a line; name the file .json")
        return
    wanted = "expected one object a line, or in a .json file an array of objects"
    within = [k for k, v in whole.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
    if within:
        take = f"jq -c '.[{json.dumps(within[0])}][]' {path.name} > rows.jsonl"
        raise DataError(
            f"{path} holds one object, with the rows under {some(within)}; {wanted}. Take them "
            f"out, for instance: {take}"
        )
    if whole and all(isinstance(value, (list, dict)) for value in whole.values()):
        raise DataError(
            f"{path} holds one object of columns ({some(list(whole))}); {wanted}. In pandas: "
            f"read_json({path.name!r}).to_json('rows.jsonl', orient='records', lines=True)"
        )
    if "\n" in text.strip():
        raise DataError(f"{path} holds one object over several lines; {wanted}")
