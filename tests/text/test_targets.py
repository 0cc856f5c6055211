"""Labels of several classes a text, and numbers: every format gives the same arrays; bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttx.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL, TrainConfig
from fasttx.errors import ConfigError, DataError
from fasttx.text.splits import load, load_for_evaluation
from tests.datafiles import SAVED, SUFFIXES, write, write_tree

TOPICS = ("food", "music", "sport", "travel")
COUNT = 60


def texts_and_labels(problem: str) -> list[tuple[str, Any]]:
    """Made here, not drawn: four classes; none to three of them; quarters from -3 on."""
    if problem == SINGLE_LABEL:
        return [(f"text {i}", TOPICS[i % 4]) for i in range(COUNT)]
    if problem == MULTI_LABEL:
        sets = [[t for k, t in enumerate(TOPICS) if i >> k & 1] for i in range(15)]
        return [(f"text {i}", sets[i % 15]) for i in range(COUNT)]
    return [(f"text {i}", -3 + i / 4) for i in range(COUNT)]


def config(path: Path, problem: str, **settings: Any) -> TrainConfig:
    return TrainConfig(dataset=str(path), problem_type=problem, **settings)


def as_file(path: Path, problem: str) -> Path:
    rows = texts_and_labels(problem)
    if problem == MULTI_LABEL and path.name.startswith(("a.csv", "a.tsv")):
        rows = [(text, "|".join(labels)) for text, labels in rows]
    return write(path, rows)


@pytest.mark.parametrize("problem", [SINGLE_LABEL, MULTI_LABEL, REGRESSION])
@pytest.mark.parametrize("suffix", [*SUFFIXES, SAVED])
def test_every_format_gives_the_same_splits(tmp_path: Path, suffix: str, problem: str) -> None:
    found = load(config(as_file(tmp_path / f"a{suffix}", problem), problem))
    wanted = dict(texts_and_labels(problem))
    names = list(TOPICS) if problem != REGRESSION else ["label"]
    assert found.label_names == names
    sizes = [len(s.texts) for s in (found.train, found.validation, found.test)]
    assert sizes == [49, 5, 6]
    for split in (found.train, found.validation, found.test):
        for text, label in zip(split.texts, split.labels.tolist(), strict=True):
            if problem == SINGLE_LABEL:
                assert names[label] == wanted[text]
            elif problem == MULTI_LABEL:
                assert [n for n, has in zip(names, label, strict=True) if has] == wanted[text]
            else:
                assert label == [wanted[text]]
    other = load(config(as_file(tmp_path / "b" / "a.jsonl", problem), problem))
    assert found.fingerprint == other.fingerprint


@pytest.mark.parametrize("problem", [SINGLE_LABEL, REGRESSION])
def test_a_tree_gives_them_too(tmp_path: Path, problem: str) -> None:
    rows = [(text, str(label)) for text, label in texts_and_labels(problem)]
    write_tree(tmp_path / "train", rows)
    found = load(config(tmp_path, problem, train_samples=40))
    assert found.label_names == (list(TOPICS) if problem == SINGLE_LABEL else ["label"])
    wanted = dict(texts_and_labels(problem))
    if problem == REGRESSION:
        assert found.train.labels[:, 0].tolist() == [wanted[t] for t in found.train.texts]


# --- several labels -------------------------------------------------------------------------------


def multi(tmp_path: Path, labels: list[Any], **settings: Any) -> Any:
    rows = [(f"text {i}", value) for i, value in enumerate(labels)]
    return load(config(write(tmp_path / "a.jsonl", rows), MULTI_LABEL, **settings))


def of(found: Any) -> dict[str, list[float]]:
    splits = (found.train, found.validation, found.test)
    return {t: row for s in splits for t, row in zip(s.texts, s.labels.tolist(), strict=True)}


def test_vectors_of_zeros_and_ones_are_labels_by_place(tmp_path: Path) -> None:
    vectors = [[1, 0, 0], [0.0, 1.0, 1.0], [False, False, True], [0, 0, 0]] * 5
    found = multi(tmp_path, vectors)
    assert found.label_names == ["0", "1", "2"]
    assert of(found) == {f"text {i}": list(map(float, v)) for i, v in enumerate(vectors)}


def test_lists_of_numbers_are_numbers_of_labels(tmp_path: Path) -> None:
    lists = [[0], [1, 7], [7], [], [1, 1]] * 4
    found = multi(tmp_path, lists)
    assert (found.label_names, found.label_numbers) == (["0", "1", "7"], [0, 1, 7])
    for text, row in of(found).items():
        wanted = set(lists[int(text[5:])])
        assert {(0, 1, 7)[i] for i, has in enumerate(row) if has} == wanted


def test_labels_alone_and_labels_between_bars_are_the_same(tmp_path: Path) -> None:
    found = multi(tmp_path, ["a", "a|b", "", "b | c", ["a", "c"]] * 4)
    assert found.label_names == ["a", "b", "c"]
    rows = of(found)
    assert [rows[f"text {i}"] for i in range(5)] == [
        [1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 1]
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_columns_of_flags(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"t {i}", "warm": i % 2, "wet": int(i % 3 == 0), "id": i} for i in range(30)]
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        lines = [",".join(map(str, row.values())) for row in rows]
        path.write_text("\n".join(["text,warm,wet,id", *lines]))
    elif suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
    found = load(config(path, MULTI_LABEL, label_column="warm,wet"))
    assert found.label_names == ["warm", "wet"]
    assert of(found) == {row["text"]: [float(row["warm"]), float(row["wet"])] for row in rows}
    assert "the labels in 'warm', 'wet'" in found.notes[0]
    again = load_for_evaluation(
        path, ["wet", "warm"], label_column="warm,wet", problem_type=MULTI_LABEL
    )
    assert again.labels[:3].tolist() == [[1, 0], [0, 1], [0, 0]]


def test_names_of_datasets_hold_in_lists_and_vectors(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = ["sport", "art", "tax"]
    feature = datasets.Sequence(datasets.ClassLabel(names=names))
    features = datasets.Features({"text": datasets.Value("string"), "topics": feature})
    texts, lists = [f"t {i}" for i in range(20)], [[0, 2], [1], [], [2]] * 5
    table = datasets.Dataset.from_dict({"text": texts, "topics": lists}, features=features)
    table.save_to_disk(str(tmp_path / "saved"))
    table.to_parquet(str(tmp_path / "a.parquet"))
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        found = load(config(path, MULTI_LABEL, label_column="topics"))
        assert found.label_names == names
        assert of(found)["t 0"] == [1, 0, 1] and of(found)["t 2"] == [0, 0, 0]


@pytest.mark.parametrize("feature", ["word", [], ["word"], None, {"feature": []}])
def test_features_that_nobody_knows_name_no_labels(tmp_path: Path, feature: object) -> None:
    """What a parquet file says of its columns may be of another version, or changed by hand."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    said = json.dumps({"info": {"features": {"label": feature}}})
    table = pa.table({"text": [f"t {i}" for i in range(20)], "label": [0, 1] * 10})
    pq.write_table(table.replace_schema_metadata({"huggingface": said}), tmp_path / "a.parquet")
    assert load(config(tmp_path / "a.parquet", SINGLE_LABEL)).label_names == ["0", "1"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"problem_type": REGRESSION}, "one of two classes; expected problem_type single_label"),
        ({"problem_type": MULTI_LABEL}, "one of two classes; expected problem_type single_label"),
        ({"label_column": "a,b"}, "label_column is 'a,b', and the demo corpus has no columns"),
        ({"text_column": "a"}, "text_column is 'a', and the demo corpus has no columns"),
    ],
)
def test_what_the_demo_corpus_has_not_is_refused(settings: dict[str, str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        load(TrainConfig(dataset="demo", **settings))


def test_evaluation_matches_labels_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("x", ["c", "a"]), ("y", []), ("z", ["b"])])
    split = load_for_evaluation(path, ["a", "b", "c"], problem_type=MULTI_LABEL)
    assert split.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    with pytest.raises(DataError, match="labels that the model was not trained on: 'c'"):
        load_for_evaluation(path, ["a", "b"], problem_type=MULTI_LABEL)
    empty = write(tmp_path / "b.jsonl", [("x", []), ("y", [])])
    found = load_for_evaluation(empty, ["a", "b"], problem_type=MULTI_LABEL)
    assert found.labels.tolist() == [[0, 0], [0, 0]]
    vectors = write(tmp_path / "c.jsonl", [("x", [1, 0]), ("y", [0, 1])])
    found = load_for_evaluation(vectors, ["b", "a"], problem_type=MULTI_LABEL)
    assert found.labels.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "is missing"), ("[1, 0]", "is '[1, 0]'"), ("a||b", "is 'a||b'"), ([0.5], "[0.5]"),
        ({"a": 1}, "{'a': 1}"), ([["a"]], "[['a']]"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_labels(tmp_path: Path, value: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        multi(tmp_path, [["a"], value, ["b"]])
    for part in (str(tmp_path / "a.jsonl"), "line 2", said, "a text such as a|b"):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", ["2", "yes", "", "nan"])
def test_what_is_no_flag(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"text,a,b\none,0,1\ntwo,{value},0\n")
    with pytest.raises(DataError, match=r"line 3: the label 'a' .* expected 0 or 1"):
        load(config(path, MULTI_LABEL, label_column="a,b"))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([[]] * 20, "no text of .* has a label"),
        ([["a"], ["A"]] * 10, "differ only in capitals"),
        ([["a", "b"]] * 20, "have the same label"),
    ],
)
def test_labels_that_cannot_be_told_apart(tmp_path: Path, labels: list[Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        multi(tmp_path, labels)


def test_a_label_of_the_test_split_that_train_has_not(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [(f"t {i}", [["a"], ["b"]][i % 2]) for i in range(20)])
    write(tmp_path / "test.jsonl", [("x", ["a", "c"])])
    with pytest.raises(DataError, match="has labels that .* has not: 'c'"):
        load(config(tmp_path, MULTI_LABEL))


# --- numbers --------------------------------------------------------------------------------------


def test_numbers_as_files_write_them(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    numbers = ["1", "-2.5", "+3", "1e-3", " 4 ", "0", "7.25", ".5", "1e3", "12"]
    path.write_text("text,mark\n" + "".join(f"t {i},{x}\n" for i, x in enumerate(numbers)))
    found = load(config(path, REGRESSION, label_column="mark"))
    assert found.label_names == ["mark"] and found.train.labels.dtype == np.float32
    rows = of(found)
    assert [rows[f"t {i}"][0] for i in range(10)] == [np.float32(float(x)) for x in numbers]
    described = found.describe()
    assert "label_counts" not in described
    train = found.train.labels.astype(np.float64)
    assert described["label_range"]["train"] == {
        "min": train.min(), "mean": pytest.approx(train.mean()), "max": train.max(),
        "deviation": pytest.approx(train.std()),
    }  # fmt: skip
    assert any("they spread by" in note for note in found.notes)


@pytest.mark.parametrize("value", [None, "many", float("nan"), float("inf"), True, [1.0], 1e39, ""])
def test_what_is_no_number(tmp_path: Path, value: Any) -> None:
    rows = [("a", 1.5), ("b", value), ("c", 2)]
    with pytest.raises(DataError, match=r"line 2: the label .*; expected a finite number"):
        load(config(write(tmp_path / "a.jsonl", rows), REGRESSION))


def test_one_number_for_all_texts_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [(f"t {i}", 2.5) for i in range(20)])
    with pytest.raises(DataError, match=r"have the same label \(\[2.5\]\)"):
        load(config(path, REGRESSION))
    assert len(load(config(path, REGRESSION, allow_single_class=True)).train.labels) == 17


@pytest.mark.parametrize("held_out", [2, 12])
def test_few_texts_may_have_the_same_number_by_chance(tmp_path: Path, held_out: int) -> None:
    write(tmp_path / "train.jsonl", [(f"t {i}", i) for i in range(20)])
    write(tmp_path / "test.jsonl", [(f"u {i}", 2.5) for i in range(held_out)])
    if held_out == 2:
        assert load(config(tmp_path, REGRESSION)).test.labels.tolist() == [[2.5], [2.5]]
        return
    with pytest.raises(DataError, match="all 12 texts of the test split"):
        load(config(tmp_path, REGRESSION))


# --- one kind taken for another -------------------------------------------------------------------


@pytest.mark.parametrize(("value", "flag"), [(3.5, REGRESSION), (["a", "b"], MULTI_LABEL)])
def test_the_error_names_the_kind_that_fits(tmp_path: Path, value: Any, flag: str) -> None:
    path = write(tmp_path / "a.jsonl", [("one", "a"), ("two", value)])
    with pytest.raises(DataError, match=f"line 2: .*--problem-type {flag}"):
        load(config(path, SINGLE_LABEL))


@pytest.mark.parametrize("problem", [SINGLE_LABEL, REGRESSION])
def test_several_columns_are_for_several_labels(tmp_path: Path, problem: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,a,b\none,0,1\ntwo,1,0\n")
    with pytest.raises(DataError, match=f"read with --problem-type {MULTI_LABEL} only"):
        load(config(path, problem, label_column="a,b"))


@pytest.mark.parametrize("problem", [MULTI_LABEL, REGRESSION])
def test_settings_of_single_labels_are_refused(problem: str) -> None:
    with pytest.raises(ConfigError, match="label_smoothing is 0.1 with problem_type"):
        TrainConfig(problem_type=problem, label_smoothing=0.1)
    with pytest.raises(ConfigError, match="pseudo_labels is 'x' with problem_type"):
        TrainConfig(problem_type=problem, pseudo_labels="x")
