"""Files and folders that are not what they should be: one clear error each, and right advice."""

# ruff: noqa: RUF001 - letters of other alphabets

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttx.config import TrainConfig
from fasttx.errors import DataError
from fasttx.text import disk
from fasttx.text import splits as data
from fasttx.text.splits import load, load_for_evaluation, resolve
from tests.datafiles import reviews, write, write_tree


def load_path(path: Path, **settings: Any) -> data.TextDataset:
    return load(TrainConfig(dataset=str(path), **settings))


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as raised:
        load_path(path)
    assert str(path) in str(raised.value)
    return str(raised.value)


# --- encodings ------------------------------------------------------------------------------------

ENCODED: dict[str, tuple[str, str, str]] = {
    "UTF-16": ("utf-16", "is UTF-16; expected UTF-8", "utf-16"),
    "UTF-16, big end first": ("utf-16-be-bom", "is UTF-16; expected UTF-8", "utf-16"),
    "UTF-16 without a mark": ("utf-16-le", "is UTF-16LE; expected UTF-8", "utf-16le"),
    "UTF-16BE without a mark": ("utf-16-be", "is UTF-16BE; expected UTF-8", "utf-16be"),
    "UTF-32": ("utf-32", "is UTF-32; expected UTF-8", "utf-32"),
    "latin-1": ("latin-1", "line 2: byte 0xe9 is not UTF-8; it looks like latin1", "latin1"),
    "Windows": ("cp1252", "line 2: byte 0xe9 is not UTF-8; it looks like cp1252", "cp1252"),
}  # fmt: skip


def encoded(case: str) -> tuple[str, bytes]:
    rows = "".join(f"un café très agréable {i},bien\nquelle déception {i},mal\n" for i in range(20))
    text = "text,label\n" + rows
    codec = ENCODED[case][0]
    if codec == "cp1252":
        text += "\u201coui\u201d \u2014 5\u20ac,bien\n"
    if codec == "utf-16-be-bom":
        return text, b"\xfe\xff" + text.encode("utf-16-be")
    return text, text.encode(codec)


@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
@pytest.mark.parametrize("case", ENCODED)
def test_the_advice_for_an_encoding_is_right(tmp_path: Path, case: str, suffix: str) -> None:
    """The command that the error names is run as it stands; then the file is read."""
    text, content = encoded(case)
    path = tmp_path / f"it's a file.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == "csv.gz" else content)
    message = refusal(path)
    _, said, name = ENCODED[case]
    assert said in message and f"iconv -f {name} -t utf-8" in message
    if shutil.which("iconv") is None or shutil.which("gunzip") is None:
        pytest.skip("iconv is not installed")
    command = message.partition("Convert it: ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert disk.file_text(path) == text
    found = load_path(path)
    assert found.label_names == ["bien", "mal"]


def test_an_encoding_that_is_not_known(tmp_path: Path) -> None:
    """Cyrillic in a code page of its own: a wrong guess would make wrong texts of it."""
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nпревосходный фильм,хорошо\n".encode("cp1251"))
    message = refusal(path)
    assert "has to be found out" in message and "iconv -f ENCODING -t utf-8" in message
    assert "Western" not in message


def test_a_damaged_line_is_no_other_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\n" + "très bien,bon\n".encode() * 20 + b"tr\xe8s,bon\n")
    message = refusal(path)
    assert "line 22: byte 0xe8 is not UTF-8; most of it is, so it is damaged there" in message
    assert "iconv" not in message


def test_a_tree_has_encodings_too(tmp_path: Path) -> None:
    write_tree(tmp_path / "train", reviews(20))
    bad = tmp_path / "train" / "good" / "x.txt"
    bad.write_bytes("film".encode("utf-16"))
    with pytest.raises(DataError, match=r"x\.txt is UTF-16; expected UTF-8. Convert it: iconv"):
        load_path(tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".csv.gz"])
def test_zeros_in_a_text(tmp_path: Path, suffix: str) -> None:
    rows = [*reviews(20), ("a\0b", "good")]
    split = load_for_evaluation(str(write(tmp_path / f"a{suffix}", rows)), ["bad", "good"])
    assert split.texts[-1] == "a\0b"


# --- files of another kind ------------------------------------------------------------------------

FOREIGN: dict[str, tuple[str, bytes, str]] = {
    "gzip under another name": ("a.csv", gzip.compress(b"text,label\na,b\n"), "end in .gz"),
    "gzip as parquet": ("a.parquet", gzip.compress(b"x" * 99), "compressed by gzip"),
    "no gzip": ("a.csv.gz", b"text,label\na,b\n", "cannot be unpacked as gzip"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b"x" * 999)[:-9], "cannot be unpacked .*complete"),
    "damaged gzip": ("a.json.gz", gzip.compress(b"x" * 999)[:12] + b"\xff" * 40, "be unpacked"),
    "empty gzip": ("a.csv.gz", gzip.compress(b""), "a.csv.gz is empty"),
    "nothing as gzip": ("a.csv.gz", b"", "a.csv.gz is empty|cannot be unpacked"),
    "compressed parquet": ("a.parquet.gz", b"PAR1", "unknown kind; expected .parquet, .csv"),
    "Excel": ("a.csv", b"PK\x03\x04" + b"\0" * 40, "an Excel workbook.*CSV UTF-8"),
    "old Excel": ("a.csv", b"\xd0\xcf\x11\xe0\xa1" + b"\0" * 40, "old Excel workbook"),
    "parquet as CSV": ("a.csv", b"PAR1" + b"\0" * 40, "end in .parquet"),
    "LFS pointer": (
        "a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"
    ),
    "LFS pointer as gzip": (
        "a.csv.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"
    ),
    "semicolons": (
        "a.csv", b"text;label\na;b\n", r"looks separated by semicolons \(;\): .*'text;label'"
    ),
    "semicolons and quotes": ("a.csv", b'"text";"label"\n"a, b";"c"\n', "separated by semicolons"),
    "tabs in csv": ("a.csv", b"text\tlabel\na\tb\n", "separated by tabs.*Name the file .tsv"),
    "commas in tsv": ("a.tsv", b"text,label\na,b\n", "separated by commas.*Name the file .csv"),
    "bars": ("a.csv", b"text|label\na|b\n", "separated by bars"),
    "header and blank lines": ("a.csv", b"text,label\n\n,\n\n", "holds no rows"),
    "blank": ("a.csv", b" \n\n", "a.csv is empty"),
    "only a mark": ("a.csv", b"\xef\xbb\xbf", "a.csv is empty"),
    "empty array": ("a.json", b"[]", "holds no rows"),
    "empty object": ("a.json", b"{}", "columns ; which of them holds the texts"),
    "object of columns": (
        "a.json", b'{"text": ["a", "b"], "label": [0, 1]}',
        r"one object of columns \('text', 'label'\); expected one object a line",
    ),
    "pandas' object of columns": (
        "a.json", b'{"text": {"0": "a"}, "label": {"0": 1}}', "one object of columns"
    ),
    "nested": (
        "a.json", b'{"version": 1, "data": [{"text": "a", "label": 1}]}',
        r"""rows under 'data'; expected .* jq -c '.\["data"\]\[\]' a.json""",
    ),
    "splits in one file": (
        "a.json", b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "under 'train', 'test'"
    ),
    "one object over lines": ("a.json", b'{"text": "a",\n"label": 1}', "over several lines"),
    "array in lines": ("a.jsonl", b'[{"text": "a"},\n{"text": "b"}]', "name the file .json"),
    "a key twice": (
        "a.jsonl", b'{"text": "a", "label": 1, "text": "b"}\n', "line 1: .*two values for 'text'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_no_such_file(tmp_path: Path, case: str) -> None:
    name, content, message = FOREIGN[case]
    (tmp_path / name).write_bytes(content)
    assert re.search(message, refusal(tmp_path / name), re.DOTALL)


def test_the_advice_for_json_is_right(tmp_path: Path) -> None:
    path, rows = tmp_path / "a.json", [{"text": f"t{i}", "label": i % 2} for i in range(20)]
    path.write_text(json.dumps({"data": rows}))
    command = refusal(path).partition("for instance: ")[2]
    if shutil.which("jq"):
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert len(load_path(tmp_path / "rows.jsonl").test.texts) == 2
    path.write_text(json.dumps({"text": [r["text"] for r in rows], "label": [0, 1] * 10}))
    code = refusal(path).partition("In pandas: ")[2]
    pandas = pytest.importorskip("pandas")
    frame = code.replace("'a.json'", repr(str(path))).replace(
        "'rows.jsonl'", repr(str(tmp_path / "columns.jsonl"))
    )
    eval(f"pandas.{frame}", {"pandas": pandas})
    assert len(load_path(tmp_path / "columns.jsonl").test.texts) == 2


def test_two_parquet_columns_of_one_name(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "two columns of one name: 'text', 'text'" in refusal(tmp_path / "a.parquet")


def test_parquet_columns_that_are_nested(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = {"text": [{"en": "a"}] * 4, "label": [0, 1] * 2, "my.text": ["a"] * 4}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    assert "the text (column 'text') is {'en': 'a'}" in refusal(tmp_path / "a.parquet")
    split = load_for_evaluation(tmp_path / "a.parquet", ["0", "1"], text_column="my.text")
    assert split.texts == ["a"] * 4


def test_sheets_that_were_wider_or_longer(tmp_path: Path) -> None:
    """Excel writes commas for cells that were used once."""
    path = tmp_path / "a.csv"
    body = "".join(f"t{i},{'ab'[i % 2]},,\r\n" for i in range(20))
    path.write_bytes(f"text,label,,\r\n{body}t20,a\r\n,,,\r\n,\r\n".encode())
    split = load_for_evaluation(path, ["a", "b"])
    assert split.texts == [f"t{i}" for i in range(21)]
    assert f"{path}: rows left out, for all their cells are empty: 2" in split.notes
    path.write_bytes(b"sep=,\r\ntext,label\r\nso,a\r\n\r\n,b\r\nwell,\r\n")
    assert "line 6: the label (column 'label') is missing" in refusal(path)
    path.write_bytes(f"text,label,,\r\n{body}well, yes,a,\r\n".encode())
    assert "line 22: 4 fields, and the header has 2" in refusal(path)


# --- folders and trees ----------------------------------------------------------------------------


def test_hidden_files_are_no_texts_and_no_labels(tmp_path: Path) -> None:
    for split, start in (("train", 0), ("test", 100)):
        root = write_tree(tmp_path / split, reviews(40, start=start))
        for folder in (".ipynb_checkpoints", "__MACOSX", ".git", "__MACOSX/good"):
            (root / folder).mkdir()
            (root / folder / "x.txt").write_text("not a review")
        for name in ("good/._00001.txt", "good/.DS_Store", "bad/.hidden.txt", "._bad"):
            (root / name).write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
        (root / "good" / "notes.md").write_text("not a review either")
    unsup = tmp_path / "train" / "unsup"
    unsup.mkdir()
    (unsup / "a.txt").write_text("a text")
    (unsup / "._a.txt").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "._train.csv").write_bytes(b"\x00\x05\x16\x07")
    found = load_path(tmp_path)
    assert found.label_names == ["bad", "good"]
    assert len(found.train.texts) + len(found.validation.texts) == len(found.test.texts) == 40
    texts = {*found.train.texts, *found.validation.texts, *found.test.texts}
    assert texts == {text for start in (0, 100) for text, _ in reviews(40, start=start)}
    said = "\n".join(found.notes)
    for name in (
        "._train.csv, __MACOSX, test/._bad, test/.git, test/.ipynb_checkpoints, test/__MACOSX",
        f"ignored in {tmp_path / 'train' / 'good'}: notes.md, .DS_Store, ._00001.txt",
        f"ignored in {tmp_path / 'test' / 'bad'}: .hidden.txt",
    ):
        assert name in said
    assert data.load_unlabelled(str(tmp_path))[0] == ["a text"]
    assert "a text" in data.load_texts(str(tmp_path))[0]


def test_a_hidden_file_is_not_the_only_file(tmp_path: Path) -> None:
    write(tmp_path / "reviews.csv", reviews(20))
    (tmp_path / "._reviews.csv").write_bytes(b"\x00\x05\x16\x07")
    assert len(load_path(tmp_path).test.texts) == 2


def test_a_label_of_hidden_files_alone_is_none(tmp_path: Path) -> None:
    write_tree(tmp_path / "train", reviews(20))
    (tmp_path / "train" / "neutral").mkdir()
    (tmp_path / "train" / "neutral" / "._1.txt").write_bytes(b"\x00\x05\x16\x07")
    found = load_path(tmp_path)
    assert found.label_names == ["bad", "good"]
    assert any("train/neutral" in note for note in found.notes)


@pytest.mark.parametrize("folder", ["data", "plain_text", "data/default", "aclImdb"])
def test_a_clone_of_the_hub(tmp_path: Path, folder: str) -> None:
    """Its files lie below the root, beside a card, Git's own folder, and what older ones have."""
    root = tmp_path / "clone"
    if folder == "aclImdb":
        write_tree(root / folder / "train", reviews(40))
        write_tree(root / folder / "test", reviews(20, start=100))
    else:
        for i in (0, 1):
            name = f"train-0000{i}-of-00002-0123456789abcdef.parquet"
            write(root / folder / name, reviews(20, start=20 * i))
        write(root / folder / "test-00000-of-00001.parquet", reviews(20, start=100))
    (root / "README.md").write_text("---\nlicense: mit\n---\n")
    (root / "dataset_infos.json").write_text("{}")
    (root / ".git").mkdir()
    (root / ".git" / "train.csv").write_text("text,label\na,b\n")
    found = load_path(root)
    assert found.name == "clone" and len(found.test.texts) == 20
    assert f"the dataset of {root} lies in {root / folder}" in found.notes
    assert len(load_for_evaluation(root, ["bad", "good"]).texts) == 20


def test_a_clone_with_several_configurations(tmp_path: Path) -> None:
    for config in ("easy", "hard"):
        write(tmp_path / config / "train-00000-of-00001.parquet", reviews(40))
    message = refusal(tmp_path)
    assert "holds several datasets: 'easy', 'hard'. Pass the folder of one of them" in message
    assert str(tmp_path / "easy") in message
    assert len(load_path(tmp_path / "hard").test.texts) == 4


def test_compressed_splits_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "train.csv.gz", reviews(40))
    write(tmp_path / "test.jsonl.gz", reviews(10, start=100))
    write(tmp_path / "unlabelled.json.gz", reviews(7, start=200))
    assert len(load_path(tmp_path).test.texts) == 10
    assert len(data.load_unlabelled(str(tmp_path))[0]) == 7
    write(tmp_path / "train.csv", reviews(40))
    assert "train split more than once: 'train.csv', 'train.csv.gz'" in refusal(tmp_path)


def test_nothing_but_a_tree_without_texts(tmp_path: Path) -> None:
    (tmp_path / "train" / "good").mkdir(parents=True)
    assert "holds no dataset" in refusal(tmp_path)


# --- what the operating system says ---------------------------------------------------------------


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "mine" / "train.csv", reviews(40))
    assert len(load_for_evaluation("~/mine", ["bad", "good"]).texts) == 40
    assert load(TrainConfig(dataset="~/mine")).name == "mine"
    monkeypatch.setenv("FASTTX_DATA", "~/mine")
    assert load(TrainConfig(dataset="auto")).name == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a" * 300, "name too long"),
        ("a\0b", "null"),
        ("~nobody-of-this-name/x", "home directory|no such file"),
        ("", "no such file or folder"),
        (" ", "no such file or folder"),
        ("\ud800", "no such file|cannot be looked up"),
    ],
)  # fmt: skip
def test_paths_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(DataError, match=f"(?i){message}"):
        resolve(name)


def test_links_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.csv").symlink_to(tmp_path / "gone.csv")
    with pytest.raises(DataError, match=r"train.csv is a link to '.*gone.csv', which does not ex"):
        load_path(tmp_path)
    (tmp_path / "train.csv").unlink()
    write_tree(tmp_path / "train", reviews(20))
    (tmp_path / "train" / "neutral").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"neutral is a link to"):
        load_path(tmp_path)
    (tmp_path / "train" / "neutral").unlink()
    (tmp_path / "train" / "good" / "x.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"x.txt cannot be read: No such file"):
        load_path(tmp_path)


def test_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "a.csv").symlink_to(tmp_path / "b.csv")
    (tmp_path / "b.csv").symlink_to(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"a.csv' cannot be looked up: Too many levels"):
        load_path(tmp_path / "a.csv")


def test_a_folder_under_the_name_of_a_file(tmp_path: Path) -> None:
    write_tree(tmp_path / "train", reviews(20))
    (tmp_path / "train" / "good" / "x.txt").mkdir()
    with pytest.raises(DataError, match=r"x.txt cannot be read: Is a directory"):
        load_path(tmp_path)
    assert "holds no dataset" in refusal(tmp_path / "train" / "good" / "x.txt")


def test_what_is_neither_file_nor_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.csv")
    assert "cannot be read: Not a directory" in refusal(tmp_path / "train.csv")
    assert "holds no dataset" in refusal(tmp_path)


ERRORS: list[Callable[[], OSError]] = [
    lambda: PermissionError(errno.EACCES, "Permission denied"),
    lambda: OSError(errno.EIO, "Input/output error"),
    lambda: FileNotFoundError(errno.ENOENT, "No such file or directory"),  # vanished meanwhile
]


@pytest.mark.parametrize("made", ERRORS)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json.gz", ".parquet"])
def test_a_file_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, made: Callable[[], OSError]
) -> None:
    path = write(tmp_path / f"a{suffix}", reviews(20))

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise made()

    monkeypatch.setattr(Path, "read_bytes", fails)
    monkeypatch.setattr(disk, "open", fails, raising=False)
    assert f"cannot be read: {made().strerror}" in refusal(path)


@pytest.mark.parametrize("made", ERRORS)
@pytest.mark.parametrize("where", ["", "train", "train/good"])
def test_a_folder_that_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, made: Callable[[], OSError]
) -> None:
    """Its texts would be missing without a word."""
    write_tree(tmp_path / "train", reviews(20))
    list_it = Path.iterdir

    def fails(self: Path) -> Any:
        if self == tmp_path / where:
            raise made()
        return list_it(self)

    monkeypatch.setattr(Path, "iterdir", fails)
    message = re.escape(f"{tmp_path / where} cannot be read: {made().strerror}")
    with pytest.raises(DataError, match=message):
        load_path(tmp_path)


def test_absurd_sizes(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", reviews(40))
    write(tmp_path / "test.csv", reviews(40))
    for settings in ({"train_samples": 10**9}, {"test_samples": 10**9}):
        with pytest.raises(DataError, match=r"is 1,000,000.*40"):
            load_path(tmp_path, **settings)
