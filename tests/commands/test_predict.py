"""`fasttx predict` on a run of tests/data: what counts as a text, what reaches the terminal."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fasttx
from fasttx.commands import cli
from fasttx.errors import CheckpointError, ConfigError, NotFiniteError
from fasttx.ops.registry import BACKENDS

RUN = Path(__file__).resolve().parents[1] / "data" / "runs" / "classification-finished"


def rows(capsys: pytest.CaptureFixture[str], *argv: object) -> list[dict[str, Any]]:
    assert cli.main(["predict", str(RUN), "--device", "cpu", "--json", *map(str, argv)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]


class Stdin:
    """Standard input of these bytes, as Python opens it."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a", ["a"]),
        (b"a\n\nb\n", ["a", "", "b"]),
        (b"a\r\n \r\nb", ["a", " ", "b"]),
        ("a\u2028b\x0bc\x0cd\x85e\rf\n".encode(), ["a\u2028b\x0bc\x0cd\x85e\rf"]),
        (b"\xef\xbb\xbfa\n", ["a"]),
    ],
)
def test_a_result_for_each_line(content: bytes, texts, tmp_path, capsys, monkeypatch) -> None:
    """They end at newlines only, in files and on standard input alike."""
    (tmp_path / "texts").write_bytes(content)
    assert [row["text"] for row in rows(capsys, "--file", tmp_path / "texts")] == texts
    monkeypatch.setattr(sys, "stdin", Stdin(content))
    assert [row["text"] for row in rows(capsys)] == texts
    monkeypatch.setattr(sys, "stdin", Stdin(content))
    assert [row["text"] for row in rows(capsys, "--file", "-")] == texts
    monkeypatch.setattr(sys, "stdin", Stdin(content))
    assert [row["text"] for row in rows(capsys, "given", "--file", "-")] == ["given", *texts]


def test_bytes_that_are_not_utf8(tmp_path, capsys) -> None:
    (tmp_path / "texts").write_bytes(b"caf\xe9\ngood \xef\xbf\xbd\n\xff\xfe\n")
    argv = ["predict", str(RUN), "--file", str(tmp_path / "texts"), "--json", "an \udcff argument"]
    assert cli.main(argv) == 0
    said = capsys.readouterr()
    assert [json.loads(line)["text"] for line in said.out.splitlines()] == [
        "an \ufffd argument", "caf\ufffd", "good \ufffd", "\ufffd\ufffd",
    ]  # fmt: skip
    assert said.err == (
        f"note: 2 of 3 lines of {tmp_path / 'texts'} are not UTF-8; what cannot be decoded is read "
        "as U+FFFD\n"
    )


def test_utf16_is_refused_with_the_right_advice(tmp_path, capsys) -> None:
    (tmp_path / "texts").write_bytes("a film\n".encode("utf-16"))
    assert cli.main(["predict", str(RUN), "--file", str(tmp_path / "texts")]) == 2
    assert "is UTF-16; expected UTF-8. Convert it, for instance" in capsys.readouterr().err


HOSTILE = "a \x1b[2J\x07\r\x9b31m \u202egood\u2066 \x7f \ud800 film\u2028\u200d 👩\u200d🚀"


def test_nothing_in_a_text_steers_the_terminal(capsys) -> None:
    assert cli.main(["predict", str(RUN), HOSTILE, HOSTILE + "\n\t" + "x" * 200]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(
        "a \\x1b[2J\\x07\\r\\x9b31m \\u202egood\\u2066 \\x7f \ufffd film\\u2028\u200d 👩\u200d🚀"
    )
    assert second.isprintable() or "\u200d" in second
    assert cli.main(["predict", str(RUN), HOSTILE, "--json"]) == 0
    said = capsys.readouterr().out
    assert not set("\x1b\x07\r\x9b\u202e\u2066\x7f\u2028") & set(said)
    assert json.loads(said)["text"] == HOSTILE.replace("\ud800", "\ufffd")


def test_json_is_ascii_where_the_stream_is_not_utf8(capsys, monkeypatch) -> None:
    for encoding in ("ascii", "latin-1", "cp1252"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main(["predict", str(RUN), "naïve 日本 😀", "--json"]) == 0
        found = stream.buffer.getvalue()  # type: ignore[attr-defined]
        assert found.isascii() and json.loads(found)["text"] == "naïve 日本 😀"


@pytest.mark.parametrize("how", ["missing", "folder", "below a file"])
def test_a_file_that_cannot_be_read_is_one_line(how: str, tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    path = {"missing": tmp_path / "no", "folder": tmp_path, "below a file": tmp_path / "file" / "x"}
    assert cli.main(["predict", str(RUN), "--file", str(path[how])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fasttx: error: {path[how]}: ")


def test_without_standard_input(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["predict", str(RUN)]) == 2
    assert "standard input is closed; give texts" in capsys.readouterr().err
    assert cli.main(["predict", str(RUN), "a text"]) == 0


# --- answers that are none ------------------------------------------------------------------------


def test_an_answer_that_is_not_finite_is_an_error(capsys, monkeypatch) -> None:
    def unsound(self, *args: Any, **inputs: Any) -> torch.Tensor:
        return torch.tensor([[0.0, 1.0], [0.0, float("nan")]])

    monkeypatch.setattr(fasttx.TransformerClassifier, "forward", unsound)
    with pytest.raises(NotFiniteError, match=r"1 of 2 texts are not finite; the first is text"):
        fasttx.load(RUN, device="cpu").predict(["one", "another"])
    assert cli.main(["predict", str(RUN), "one", "another", "--json"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "not finite" in said.err and len(said.err.splitlines()) == 1


@pytest.mark.parametrize("batch_size", [0, -3, 2.5, True, None])
def test_a_batch_size_that_is_none(batch_size: Any) -> None:
    with pytest.raises(ConfigError, match="batch_size is"):
        fasttx.load(RUN, device="cpu").predict(["a"], batch_size=batch_size)


# --- precisions -----------------------------------------------------------------------------------

TEXTS = ["a good film", "", "bad, bad acting " * 40]
needs_the_library = pytest.mark.skipif(
    bool(BACKENDS["cpu"].unavailable_reasons("cpu", torch.float32, 32)),
    reason="the C++ library was not built",
)


@needs_the_library
@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-5), ("bf16", 0.02), ("int8", 0.02)])
def test_every_precision_on_the_cpu(precision: str, error: float) -> None:
    expected = fasttx.load(RUN, device="cpu", attn_backend="reference").logits(TEXTS)
    classifier = fasttx.load(RUN, device="cpu", attn_backend="cpu", precision=precision)
    logits = classifier.logits(TEXTS)
    assert (logits - expected).abs().max() < error
    applies = not classifier.native.unavailable_reasons()
    assert applies or precision == "bf16"  # by autocast where the processor has no such products
    if applies:
        assert torch.equal(classifier.logits(TEXTS, batch_size=1), logits)


@needs_the_library
def test_the_flag_for_precision(capsys) -> None:
    found = [
        rows(capsys, "--precision", p, "--attn-backend", "cpu", *TEXTS) for p in ("fp32", "int8")
    ]
    for exact, quantised in zip(*found, strict=True):
        assert quantised["probability"] == pytest.approx(exact["probability"], abs=0.01)
    assert found[0] != found[1]


def test_int8_elsewhere_is_refused(capsys) -> None:
    argv = ["predict", str(RUN), "--precision", "int8", "--attn-backend", "reference", "a"]
    assert cli.main(argv) == 2
    assert "precision int8 cannot be had here" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="precision is 'int4'; expected one of fp32, bf16, int8"):
        fasttx.load(RUN, precision="int4")


@needs_the_library
def test_int8_never_becomes_another_precision() -> None:
    classifier = fasttx.load(RUN, device="cpu", attn_backend="cpu", precision="int8")
    classifier.model.train()
    with pytest.raises(ConfigError, match=r"precision int8 cannot be had.*\n.*model\.eval"):
        classifier.predict(TEXTS)
    classifier.model.eval()
    with torch.autocast("cpu"), pytest.raises(ConfigError, match="leave autocast"):
        classifier.predict(TEXTS)
    assert len(classifier.predict(TEXTS)) == len(TEXTS)


@needs_the_library
def test_a_hook_is_honoured() -> None:
    classifier = fasttx.load(RUN, device="cpu", attn_backend="cpu")
    before, seen = classifier.logits(TEXTS), []
    classifier.model.head.register_forward_hook(lambda *_: seen.append(1))
    assert torch.allclose(classifier.logits(TEXTS), before, atol=1e-5) and seen


def copied(tmp_path: Path, **changes: Any) -> Path:
    folder = Path(shutil.copytree(RUN, tmp_path / "run"))
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_a_tokenizer_with_more_words_than_the_model(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    size = json.loads((folder / "config.json").read_text())["train"]["model"]["vocab_size"]
    words |= {f"more{i}": len(words) + i for i in range(size + 1 - len(words))}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=f"has {size + 1} words, .* embedding has {size}"):
        fasttx.load(folder)


@pytest.mark.parametrize("names", [["one"], ["a", "b", "c"], ["a", "a"], [1, 2], "ab", None, []])
def test_label_names_that_do_not_fit(tmp_path: Path, names: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config.json .*label"):
        fasttx.load(copied(tmp_path, label_names=names))
