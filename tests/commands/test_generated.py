"""Command lines and inputs that nobody would think of: each ends with a status and no traceback.

Nothing is trained or served here: what would begin a training ends where its settings are complete.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fasttx
import train
from fasttx.commands import cli, doctor, report
from fasttx.errors import DataError
from fasttx.serving import server
from fasttx.tasks import read_config
from fasttx.text import corpora
from fasttx.training import run as runs

RUN = Path(__file__).resolve().parents[1] / "data" / "runs" / "classification-finished"

# More in a soak: FASTTX_EXAMPLES=10000.
MANY = settings(
    max_examples=int(os.environ.get("FASTTX_EXAMPLES", "50")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to work in, and no training, no service, no network, no home."""

    def refuse(*args: Any, **options: Any) -> Any:
        raise DataError("no further, this is a test")

    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(RUN, folder / "run")
    (folder / "file.csv").write_text("text,label\nx,0\ny,1\n")
    (folder / "folder").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("FASTTX_CACHE", str(folder / "cache"))
        patch.delenv("FASTTX_DATA", raising=False)
        patch.setattr(runs, "create", refuse)
        patch.setattr(runs, "resume", refuse)
        patch.setattr(runs, "load_dataset", refuse)
        patch.setattr(report, "open_run", refuse)
        patch.setattr(doctor, "examine", refuse)
        # What would serve until a signal ends where it listens and has its models.
        patch.setattr(server.Server, "run", lambda self, sockets: None)
        patch.setattr(server.Workers, "run", lambda self: 0)
        patch.setattr(corpora, "hub_imdb", lambda: (_ for _ in ()).throw(corpora.Unavailable("no")))
        patch.setattr(
            corpora.demo, "corpus", lambda **_: (["x y"] * 40, [0, 1] * 20, ["x"] * 9, [0] * 9)
        )
        yield folder


def ending(main: Any, argv: list[str], stdin: bytes = b"") -> tuple[int, str, str]:
    """Status, standard output and standard error of a command line in this process."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(argv)
            except SystemExit as end:
                status = end.code or 0
    out.flush()
    err.flush()
    said = out.buffer.getvalue().decode("utf-8"), err.buffer.getvalue().decode("utf-8")
    assert "Traceback" not in said[1] and "defect" not in said[1], (argv, said[1])
    assert not set("\x1b\r\x07\x9b\u202e") & set("".join(said)), (argv, said)
    assert status in (0, 2), (argv, status, said)
    assert bool(status) <= bool(said[1]), "what went wrong is said"
    return status, *said


VALUES = st.sampled_from(
    "0 1 -3 2.5 1e999 nan -inf 1000000000000 9223372036854775808 run run/config.json file.csv "
    "folder missing missing/below file.csv/below ~ ~nobody/x cpu cuda cuda:99 tpu auto demo imdb "
    "head cosine fp32 nb all - -- = --x".split()
) | st.text(st.characters(exclude_characters="/"), max_size=6)


def parsers(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[Any]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from parsers(below, (*words, name))
            return
    yield words, parser


COMMANDS = dict(parsers(cli.command_parser(*cli.COMMANDS)))


@st.composite
def command_lines(draw: Any, words: tuple[str, ...], flags: list[str]) -> list[str]:
    """Known flags with values or without, positional arguments between them, or none."""
    option = st.sampled_from(flags)
    pair = st.tuples(option, VALUES).map(list)
    piece = st.one_of(pair, option.map(lambda o: [o]), VALUES.map(lambda v: [v]),
                      pair.map("=".join).map(lambda o: [o]))  # fmt: skip
    pieces = draw(st.lists(piece, max_size=5))
    first = [["run"]] if words[:1] not in ((), ("baseline",)) and draw(st.booleans()) else []
    return [*words, *(w for piece in draw(st.permutations([*first, *pieces])) for w in piece)]


@MANY
@given(st.data())
def test_any_command_line_ends_with_a_status(data: st.DataObject) -> None:
    words = data.draw(st.sampled_from(sorted(COMMANDS)))
    names = sorted(set(COMMANDS[words]._option_string_actions) - {"-h"})
    argv = data.draw(command_lines(words, names))
    ending(cli.main, argv, b"one\n\xff\n")


@MANY
@given(st.data())
def test_any_command_line_of_train_py_ends_with_a_status(data: st.DataObject) -> None:
    names = sorted(train.options([]).accepts - {"-h"})
    ending(train.main, data.draw(command_lines((), names)))


# --- inputs ---------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(), max_size=60) | st.sampled_from(["", "\n", "\x1b[2J", "\ud800"])


@MANY
@given(st.lists(TEXTS, max_size=5), st.binary(max_size=60), st.booleans())
def test_any_text_has_a_result(texts: list[str], lines: bytes, as_json: bool) -> None:
    """One for each argument and each line."""
    texts = [text.replace("\0", "") for text in texts]
    lines = lines.replace(b"\xfe\xff", b"").replace(b"\xff\xfe", b"")
    argv = ["predict", "run", "--device", "cpu", "--file", "-", *["--json"] * as_json, "--", *texts]
    status, out, _ = ending(cli.main, argv, lines)
    assert status == 0
    count = len(texts) + lines.count(b"\n") + (not lines.endswith(b"\n") and bool(lines))
    assert out.count("\n") == count
    for row in out.split("\n")[:-1]:
        if as_json:
            found = json.loads(row, parse_constant=lambda name: pytest.fail(name))
            assert abs(sum(found["probabilities"].values()) - 1) < 1e-6


@MANY
@given(st.lists(TEXTS, min_size=1, max_size=4), st.integers(1, 5))
def test_any_text_is_predicted_as_it_is_alone(texts: list[str], batch_size: int) -> None:
    model = fasttx.load("run", device="cpu", attn_backend="reference")
    together = model.logits(texts, batch_size=batch_size)
    for row, text in zip(together, texts, strict=True):
        assert row.allclose(model.logits([text])[0], atol=1e-5)


# --- config.json as a hand leaves it --------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value, outer ones too."""
    if path:
        yield path
    if isinstance(values, dict | list):
        keys = values if isinstance(values, dict) else range(len(values))
        for key in keys:
            yield from places(values[key], (*path, key))


def changed(values: Any, data: st.DataObject, count: int) -> Any:
    """A copy with `count` values replaced or removed, at any depth."""
    values = json.loads(json.dumps(values))
    for _ in range(count):
        *way, last = data.draw(st.sampled_from(sorted(places(values), key=str)))
        inner = values
        for key in way:
            inner = inner[key]
        if isinstance(inner, dict) and data.draw(st.booleans()):
            del inner[last]
        else:
            inner[last] = data.draw(JSON)
    return values


@MANY
@given(st.data(), st.integers(1, 3))
def test_any_config_json_is_read_or_refused(data: st.DataObject, count: int) -> None:
    original = (RUN / "config.json").read_text(encoding="utf-8")
    path = Path("run/config.json")
    values = changed(json.loads(original), data, count)
    path.write_text(json.dumps(values), encoding="utf-8")
    try:
        with contextlib.suppress(fasttx.FasttxError):
            read_config(path)
        ending(cli.main, ["predict", "run", "--device", "cpu", "a text"])
    finally:
        path.write_text(original, encoding="utf-8")


@MANY
@given(st.data(), st.integers(1, 3))
def test_any_results_json_is_read_or_refused(data: st.DataObject, count: int) -> None:
    from fasttx.reporting import finished

    values = json.loads((RUN / "results.json").read_text(encoding="utf-8"))
    config = read_config(RUN / "config.json")
    values = changed(values, data, count)
    with contextlib.suppress(fasttx.FasttxError):
        finished._check_results(RUN / "results.json", values, config)
