"""What a label is, the same in every format, and which class of a saved model a number means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import train
from fasttx.commands import cli
from fasttx.config import TrainConfig
from fasttx.errors import DataError
from fasttx.text import splits as data
from fasttx.text.splits import load, load_for_evaluation
from tests.datafiles import SAVED, SUFFIXES, Rows, reviews, write, write_tree

FORMATS = (*SUFFIXES, SAVED)
BIG = 2**53


def load_path(path: Path, **settings: Any) -> data.TextDataset:
    return load(TrainConfig(dataset=str(path), **settings))


def outcome(path: Path) -> Any:
    """What training finds in a file: names and the label of each text, or the refusal."""
    try:
        found = load_path(path, allow_single_class=True)
    except DataError as error:
        return str(error)
    splits = (found.train, found.validation, found.test)
    pairs = [
        (text, found.label_names[label])
        for split in splits
        for text, label in zip(split.texts, split.labels.tolist(), strict=True)
    ]
    return found.label_names, sorted(pairs), found.label_numbers


# --- one answer for all formats -------------------------------------------------------------------

# As written, what each of them is called, and the numbers that are recorded.
TAKEN: dict[str, tuple[tuple[Any, ...], tuple[str, ...], list[int] | None]] = {
    "words": (("b", "a"), ("b", "a"), None),
    "numbers": ((2, 0), ("2", "0"), [0, 2]),
    "numerals": (("2", "0"), ("2", "0"), [0, 2]),
    "numbers with a point": ((2.0, 0.0), ("2", "0"), [0, 2]),
    "numerals with a point": (("2.0", "0"), ("2", "0"), [0, 2]),
    "numerals with an exponent": (("2e0", "1E1"), ("2", "10"), [2, 10]),
    "signs": (("+1", "-1"), ("1", "-1"), [-1, 1]),
    "ten after nine": (("10", "9"), ("10", "9"), [9, 10]),
    "large": ((BIG + 1, -BIG - 1), (str(BIG + 1), str(-BIG - 1)), [-BIG - 1, BIG + 1]),
    "zeros in front": (("01", "02"), ("01", "02"), None),
    "a word among numerals": (("1", "2.0", "none"), ("1", "2", "none"), None),
    "truth values": ((True, False), ("True", "False"), None),
    "space around": ((" a", "b "), ("a", "b"), None),
    "space inside": (("very good", "bad"), ("very good", "bad"), None),
    "no plain letters": (("élan", "好"), ("élan", "好"), None),
    "dates and codes": (("2020-01-01", "1_000", "1.2.3"), ("2020-01-01", "1_000", "1.2.3"), None),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "half a star": (3.5, "is 3.5, which is no integer; expected an integer or a word"),
    "half a star in words": ("3.5", "is 3.5, which is no integer; expected an integer or a word"),
    "small": ("1e-3", "is 0.001, which is no integer"),
    "not a number": (float("nan"), r"is missing \(nan\)"),
    "NaN": ("NaN", r"is missing \(nan\)"),
    "infinity": (float("inf"), "is inf; expected"),
    "-Infinity": ("-Infinity", "is -inf; expected"),
    "a float too large": (2.0**60, r"is 1\.15292e\+18; expected"),
    "missing": (None, "is missing"),
    "blank": (" \t ", "is missing"),
    "empty": ("", "is missing"),
}
ALIKE = {
    "capitals": ("Negative", "negative"),
    "space inside": ("so  so", "so so"),
    "space around": ("good", "good "),
    "Unicode forms": ("caf\u00e9", "cafe\u0301"),
    "wide letters": ("good", "\uff47ood"),
    "sharp s": ("STRASSE", "straße"),
    "no width": ("good", "go\u200bod"),
    "the end of a file of DOS": ("good", "good\x1a"),
    "zeros in front": ("01", "1"),
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("case", TAKEN)
def test_labels_taken(tmp_path: Path, case: str, suffix: str) -> None:
    labels, called, numbers = TAKEN[case]
    rows = reviews(24, labels)
    names, pairs, recorded = outcome(write(tmp_path / f"a{suffix}", rows))
    assert names == ([str(n) for n in numbers] if numbers else sorted(called))
    assert recorded == numbers
    meant = dict(zip(map(repr, labels), called, strict=True))
    assert pairs == sorted((text, meant[repr(label)]) for text, label in rows)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("case", REFUSED)
def test_labels_refused(tmp_path: Path, case: str, suffix: str) -> None:
    label, message = REFUSED[case]
    other: Any = 1.0 if isinstance(label, float) else "4"
    rows: Rows = [("a", other), ("b", other), ("c", label), ("d", other)]
    path = write(tmp_path / f"a{suffix}", rows)
    for read in (load_path, lambda p: load_for_evaluation(p, ["1", "4"])):
        with pytest.raises(
            DataError, match=rf"(line|row) \d: the label \(column 'label'\) {message}"
        ):
            read(path)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("case", ALIKE)
def test_labels_that_look_alike(tmp_path: Path, case: str, suffix: str) -> None:
    """Within a split, and across splits."""
    one, other = ALIKE[case]
    path = write(tmp_path / f"a{suffix}", reviews(20, (one, other, "x")))
    with pytest.raises(DataError, match="differ only in capitals, white space, leading") as raised:
        load_path(path)
    shown = {repr(x) for x in (one, other)} | {x for x in (one, other) if x == "1"}
    assert sum(x in str(raised.value) for x in shown) >= 2
    if suffix != SAVED:
        write(tmp_path / "two" / f"train{suffix}", reviews(20, (one, "x")))
        write(tmp_path / "two" / f"test{suffix}", reviews(20, (other, "x")))
        with pytest.raises(DataError, match=r"train.* and .*test.*: the labels .* differ only"):
            load_path(tmp_path / "two")


def test_folders_that_look_alike(tmp_path: Path) -> None:
    write_tree(tmp_path / "train", reviews(20, ("Pos", "neg")))
    write_tree(tmp_path / "test", reviews(20, ("pos", "neg")))
    with pytest.raises(DataError, match="'Pos' and 'pos' differ only"):
        load_path(tmp_path)


def test_folders_are_labels_as_cells_are(tmp_path: Path) -> None:
    found = load_path(write_tree(tmp_path / "a" / "train", reviews(40, ("10", "9"))).parent)
    assert found.label_names == ["9", "10"] and found.label_numbers == [9, 10]
    write_tree(tmp_path / "b" / "train", reviews(40, ("3.5", "4")))
    with pytest.raises(DataError, match=r"3.5: the name of the folder .* is 3.5, which is no int"):
        load_path(tmp_path / "b")


def test_a_label_that_cannot_be_seen(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="of which nothing is to be seen"):
        load_path(write(tmp_path / "a.csv", reviews(20, ("\u200b", "x"))))


@pytest.mark.parametrize("suffix", FORMATS)
def test_empty_texts(tmp_path: Path, suffix: str) -> None:
    """A text without words is one, and is counted; a text that is missing is none."""
    rows = reviews(20)
    rows[3:5] = [("", "good"), (" \n ", "bad")]
    path = write(tmp_path / f"a{suffix}", rows)
    found = load_path(path)
    texts = [*found.train.texts, *found.validation.texts, *found.test.texts]
    assert sorted(texts) == sorted(text for text, _ in rows)
    (note,) = (note for note in found.notes if "blank" in note)
    assert "2 of 20 texts are empty or blank, the first in " in note
    assert note.endswith(("line 5", "line 4", "row 4"))
    assert found.duplicates["exact"]["train"] == 0
    assert note in load_for_evaluation(str(path), ["bad", "good"]).notes


@pytest.mark.parametrize("suffix", [s for s in FORMATS if "sv" not in s])
def test_missing_texts(tmp_path: Path, suffix: str) -> None:
    rows: Rows = reviews(20)
    rows[3] = (None, "good")
    with pytest.raises(DataError, match=r"(row|line) 4: the text \(column 'text'\) is missing"):
        load_path(write(tmp_path / f"a{suffix}", rows))


@pytest.mark.parametrize("label", [[0, 1], [1], {"a": 1}], ids=str)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", SAVED])
def test_lists_are_no_labels(tmp_path: Path, suffix: str, label: Any) -> None:
    path = write(tmp_path / f"a{suffix}", [(f"t{i}", label) for i in range(20)])
    with pytest.raises(
        DataError, match=r"the label \(column 'label'\) is [\[{].*an integer or a w"
    ):
        load_path(path)


@pytest.mark.parametrize("suffix", [".parquet", SAVED])
def test_bytes_are_neither_texts_nor_labels(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", [(f"t{i}", b"a") for i in range(20)])
    with pytest.raises(DataError, match=r"the label \(column 'label'\) is b'a'; expected"):
        load_path(path)
    path = write(tmp_path / f"b{suffix}", [(b"t", "a")] * 20)
    with pytest.raises(DataError, match=r"the text \(column 'text'\) is b't'; mend"):
        load_path(path)


def test_numbers_of_parquet_that_python_has_not(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from decimal import Decimal

    texts = [f"{i}" for i in range(40)]
    for kind, values in (
        (pa.int8(), [1, 2] * 20), (pa.uint64(), [1, 2] * 20), (pa.float32(), [1.0, 2.0] * 20),
        (pa.decimal128(5, 2), [Decimal("1.00"), Decimal("2.00")] * 20),
        (pa.dictionary(pa.int8(), pa.string()), ["1", "2"] * 20),
    ):  # fmt: skip
        table = pa.table({"text": texts, "label": pa.array(values, kind)})
        pq.write_table(table, tmp_path / "a.parquet")
        assert load_path(tmp_path / "a.parquet").label_numbers == [1, 2]
    half = pa.array([Decimal("1.50")] * 40, pa.decimal128(5, 2))
    pq.write_table(pa.table({"text": texts, "label": half}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="is 1.5, which is no integer"):
        load_path(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_label_is_no_text(tmp_path: Path, suffix: str) -> None:
    """A model that reads the label has nothing to learn."""
    path = write(tmp_path / f"a{suffix}", reviews(20))
    columns = {"text_column": "label", "label_column": "label"}
    for read in (
        lambda: load_path(path, **columns),
        lambda: load_for_evaluation(path, ["bad", "good"], **columns),
        lambda: data.load_texts(str(path), **columns),
    ):
        with pytest.raises(DataError, match="--text-column and --label-column are both 'label'"):
            read()


# --- the classes of a saved model -----------------------------------------------------------------


def rows_of(path: Path, *labels: Any) -> str:
    return str(write(path / "a.csv", [(f"t{i}", label) for i, label in enumerate(labels)]))


@pytest.mark.parametrize("labels", [(0, 1, 2), (1, 2), (1,)])
def test_numbers_that_nobody_knows_are_refused(tmp_path: Path, labels: tuple[int, ...]) -> None:
    """1 is no "neutral" because that comes second in the alphabet."""
    names = ["negative", "neutral", "positive"]
    with pytest.raises(DataError, match="which number stands for which class is not known. Write"):
        load_for_evaluation(rows_of(tmp_path, *labels), names)


def test_numbers_that_the_run_recorded(tmp_path: Path) -> None:
    names = ["negative", "neutral", "positive"]
    path = rows_of(tmp_path, 1, 2, 1)
    split = load_for_evaluation(path, names, label_numbers=[0, 1, 2])
    assert split.labels.tolist() == [1, 2, 1]
    assert split.notes[-1] == (
        "labels: 1 is 'neutral', 2 is 'positive', as the model's training data numbers them"
    )
    split = load_for_evaluation(path, names, label_numbers=[1, 2, 3])
    assert split.labels.tolist() == [0, 1, 0]
    with pytest.raises(DataError, match="not trained on: 1; it knows 'negative'"):
        load_for_evaluation(path, names, label_numbers=[0, 2, 4])


def test_imdb_numbers_are_a_convention(tmp_path: Path) -> None:
    path = rows_of(tmp_path, 1, 0)
    split = load_for_evaluation(path, ["negative", "positive"])
    assert split.labels.tolist() == [1, 0]
    assert split.notes[-1] == "labels: 0 is 'negative', 1 is 'positive', as IMDB numbers them"
    # By name, not by place; and what the run recorded comes first.
    assert load_for_evaluation(path, ["positive", "negative"]).labels.tolist() == [0, 1]
    recorded = load_for_evaluation(path, ["negative", "positive"], label_numbers=[1, 0])
    assert recorded.labels.tolist() == [0, 1]
    with pytest.raises(DataError, match="not trained on: 2; it knows"):
        load_for_evaluation(rows_of(tmp_path, 1, 2), ["negative", "positive"])


def class_labels(path: Path, names: list[str], labels: list[int], kind: str) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    columns = {"text": [f"t{i}" for i in range(len(labels))], "label": labels}
    made = datasets.Dataset.from_dict(columns, features=features)
    if kind == "saved":
        made.save_to_disk(str(path / "saved"))
        return str(path / "saved")
    made.to_parquet(str(path / "a.parquet"))
    return str(path / "a.parquet")


def test_names_in_the_file_that_look_alike(tmp_path: Path) -> None:
    path = class_labels(tmp_path, ["Yes", "no", "yes"], [0, 1] * 20, "parquet")
    with pytest.raises(DataError, match="the labels 'Yes' and 'yes' differ only"):
        load_path(Path(path))


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_names_in_the_file_are_what_counts(tmp_path: Path, kind: str) -> None:
    path = class_labels(tmp_path, ["neg", "neu", "pos"], [0, 2, 2], kind)
    # Its "neu" occurs in no row, so that it need not be known.
    assert load_for_evaluation(path, ["positive", "negative"]).labels.tolist() == [1, 0, 0]
    for numbers in (None, [0, 1, 2]):  # the place in a list is no name
        with pytest.raises(DataError, match="not trained on: 'neg', 'pos'; it knows 'bad', 'so'"):
            load_for_evaluation(path, ["bad", "so", "good"], label_numbers=numbers)
    with pytest.raises(DataError, match="not trained on: 'neg', 'pos'; it knows '0', '1', '2'"):
        load_for_evaluation(path, ["0", "1", "2"])


def test_training_records_its_numbers(tmp_path: Path) -> None:
    words = load_path(write(tmp_path / "words.csv", reviews(20)))
    assert words.label_numbers is None and words.describe()["label_numbers"] is None
    stars = load_path(write(tmp_path / "stars.csv", reviews(20, (1, 5))))
    assert stars.describe()["label_numbers"] == [1, 5]
    named = load_path(Path(class_labels(tmp_path, ["no", "yes"], [0, 1] * 20, "parquet")))
    assert named.describe()["label_numbers"] == [0, 1]
    assert json.loads(json.dumps(named.describe())) == named.describe()
    write(tmp_path / "imdb" / "train.csv", reviews(20, (0, 1)))
    imdb = load_path(tmp_path / "imdb")
    assert imdb.label_names == ["negative", "positive"] and imdb.label_numbers == [0, 1]
    assert "labels: 0 is 'negative', 1 is 'positive', as IMDB numbers them" in imdb.notes


def test_a_run_knows_the_names_of_its_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other names for the same numbers are another dataset, though its fingerprint is the same."""
    tiny = (
        "--epochs 1 --batch-size 16 --vocab-size 60 --d-model 16 --num-heads 2 --num-layers 1 "
        "--d-ff 16 --max-len 16 --attn-backend reference --device cpu"
    )
    rows = [(f"t{i}", "bad good".split()[i % 2]) for i in range(60)]
    path, out = write(tmp_path / "a.csv", rows), tmp_path / "run"
    assert train.main(["--dataset", str(path), *tiny.split(), "--out", str(out)]) == 0
    assert cli.main(["evaluate", str(out)]) == 0
    write(path, [(text, {"bad": "fine", "good": "poor"}[label]) for text, label in rows])
    capsys.readouterr()
    assert cli.main(["evaluate", str(out)]) == 2
    assert "was made with the classes bad, good; " in (said := capsys.readouterr().err)
    assert "now calls them fine, poor. Bring the names back" in said
    # Its numbers are recorded nowhere, for they were words.
    numbers = write(tmp_path / "b.csv", [("x", 0), ("y", 1)])
    assert cli.main(["evaluate", str(out), "--dataset", str(numbers)]) == 2
    assert "which number stands for which class is not known" in capsys.readouterr().err
