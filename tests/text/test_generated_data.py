"""Generated data files, sound and broken, of every format: they load, or they are refused.

FASTTX_EXAMPLES (default 50) is how many of each kind are tried.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttx.config import TrainConfig
from fasttx.errors import FasttxError
from fasttx.text import splits as data
from fasttx.text.splits import load, load_for_evaluation
from tests.datafiles import SUFFIXES, write

generated = settings(
    derandomize=True, database=None, deadline=None,
    max_examples=int(os.environ.get("FASTTX_EXAMPLES", "50")),
)  # fmt: skip

# What the readers must not be led astray by stands beside any character.
TEXTS = st.text(max_size=20) | st.sampled_from(
    ["", " ", "a,b", 'say "so"', '"', "a\nb", "a\r\nb", "a\tb", "\0", "\ufeffa", "\u2028", "{",
     "[1]", "=1+1", "\U0001f468\u200d\U0001f469", "\ud800"]
)  # fmt: skip
LABELS = (
    st.text(max_size=8)
    | st.integers(-3, 3)
    | st.integers()
    | st.floats()
    | st.booleans()
    | st.none()
    | st.sampled_from(["0", "1", "01", "1.0", "3.5", "nan", "1e-3", "1e400", "pos", "Pos", " pos"])
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["text", "label", "data", ""]) | st.text(max_size=4), inner
        )
    ),
    max_leaves=12,
)
ROWS = st.lists(st.tuples(TEXTS, st.sampled_from(["a", "b"]) | LABELS), max_size=30)
PLAIN_ROWS = st.lists(st.tuples(TEXTS, st.sampled_from([0, 1])), min_size=1, max_size=30)


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp())
    try:
        yield path
    finally:
        shutil.rmtree(path)


def answers(path: Path, **settings: Any) -> data.TextDataset | None:
    """What loads must be whole; what does not must be refused in words. Nothing else is raised."""
    found = None
    with contextlib.suppress(FasttxError):
        found = load(TrainConfig(dataset=str(path), allow_single_class=True, **settings))
    if found is not None:
        for split in (found.train, found.validation, found.test):
            assert all(isinstance(text, str) for text in split.texts)
            assert len(split.texts) == len(split.labels)
        names = found.label_names
        assert set(found.train.labels.tolist()) <= set(range(len(names)))
        assert len({" ".join(name.split()).casefold() for name in names}) == len(names)
        found.describe()
    with contextlib.suppress(FasttxError):
        load_for_evaluation(path, ["negative", "positive"], **settings)
    with contextlib.suppress(FasttxError):
        data.load_texts(str(path))
    return found


@pytest.mark.parametrize("suffix", SUFFIXES)
@generated
@given(rows=ROWS)
def test_rows(suffix: str, rows: list[tuple[str, Any]]) -> None:
    with folder() as root:
        try:
            path = write(root / f"a{suffix}", rows)
        except (UnicodeEncodeError, TypeError, ValueError, OverflowError, ArithmeticError):
            return  # this format cannot hold them
        except Exception as error:
            if type(error).__module__.startswith("pyarrow"):
                return
            raise
        answers(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@generated
@given(rows=PLAIN_ROWS)
def test_texts_come_back_as_they_were_written(suffix: str, rows: list[tuple[str, int]]) -> None:
    with folder() as root:
        try:
            path = write(root / f"a{suffix}", rows)
        except (UnicodeEncodeError, ValueError):
            return  # a lone surrogate has no UTF-8
        split = load_for_evaluation(path, ["0", "1"])
        assert split.texts == [text for text, _ in rows]
        assert split.labels.tolist() == [label for _, label in rows]


@pytest.mark.parametrize("suffix", SUFFIXES)
@generated
@given(
    content=st.binary(max_size=200), start=st.sampled_from([b"", b"text,label\n", b"PAR1", b"{"])
)
def test_bytes(suffix: str, content: bytes, start: bytes) -> None:
    with folder() as root:
        (root / f"a{suffix}").write_bytes(start + content)
        answers(root / f"a{suffix}")
        if suffix.endswith(".gz"):
            (root / f"a{suffix}").write_bytes(gzip.compress(start + content))
            answers(root / f"a{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
@generated
@given(where=st.floats(0, 1, exclude_max=True), by=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_file(suffix: str, where: float, by: int, cut: bool) -> None:
    rows = [(f"{i} review, \u201cso\u201d", i % 2) for i in range(30)]
    with folder() as root:
        path = write(root / f"a{suffix}", rows)
        content = bytearray(path.read_bytes())
        at = int(where * len(content))
        content[at] ^= by
        path.write_bytes(content[:at] if cut else content)
        answers(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@generated
@given(values=st.lists(JSON, min_size=1, max_size=4), lines=st.booleans())
def test_json_of_any_shape(suffix: str, values: list[Any], lines: bool) -> None:
    text = "\n".join(map(json.dumps, values)) if lines else json.dumps(values[0], indent=1)
    with folder() as root:
        (root / f"a{suffix}").write_text(text, encoding="utf-8")
        answers(root / f"a{suffix}")


NAMES = st.sampled_from(
    ["train", "test", "data", "train.csv", "test.csv", "dev.jsonl", "train.csv.gz", "pos", "neg",
     "unsup", "a.txt", "._a.txt", ".git", "__MACOSX", "unlabelled.csv", "state.json", "all.csv",
     "train-00000-of-00002.csv", "train-00001-of-00002.csv", "README.md"]
)  # fmt: skip
CONTENTS = st.sampled_from(
    [
        b"",
        b"text,label\na,0\nb,1\nc,0\nd,1\n",
        b'{"text": "a", "label": 1}\n',
        b"a text",
        b"\xff\xfe",
    ]
)


@generated
@given(tree=st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=3), CONTENTS), max_size=10))
def test_folders(tree: list[tuple[list[str], bytes]]) -> None:
    with folder() as root:
        for parts, content in tree:
            path = root.joinpath(*parts)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            except OSError:
                continue  # a file is there already where this needs a folder, or the reverse
        answers(root)


@generated
@given(name=st.text(max_size=300))
def test_names_of_datasets(name: str) -> None:
    if name.strip() in ("", ".", "/", "imdb", "auto") or name.startswith("/"):
        return
    with folder() as root:
        answers(root / "x" / name.replace("/", "_"))
