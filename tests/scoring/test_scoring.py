"""Files in, the same files with predictions out: every format, killed and resumed, in processes."""

from __future__ import annotations

import csv
import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fasttx
from fasttx.commands import cli
from fasttx.errors import CheckpointError, DataError
from fasttx.scoring import Scorer, files, job

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "tests" / "data" / "runs" / "classification-finished"
TEXTS = [
    "a wonderful film", "", "dull, dull\nand dull", 'she said "no"', "  ", "\u2028 line", "0",
    "👍 <br/>", "word " * 700,
]  # fmt: skip
ROWS = [{"id": f"{i:03}", "text": text, "stars": str(i % 5)} for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def expected():
    return fasttx.load(RUN).predict(TEXTS)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(files, "CHUNK_ROWS", 2)


def write(path: Path, rows: list[dict] = ROWS) -> Path:
    kind = files.format_of(path)
    opened = gzip.open if path.suffix == ".gz" else open
    if kind == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
        return path
    with opened(path, "wt", encoding="utf-8", newline="") as f:
        if kind == ".jsonl":
            f.writelines(json.dumps(row) + "\n" for row in rows)
        elif kind == ".txt":
            f.writelines(row["text"].replace("\n", " ") + "\n" for row in rows)
        else:
            delimiter = "\t" if kind == ".tsv" else ","
            writer = csv.DictWriter(f, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(path: Path) -> list[dict]:
    kind = files.format_of(path)
    if kind == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as f:
        if kind == ".jsonl":
            return [json.loads(line) for line in f.read().split("\n") if line]
        return list(csv.DictReader(f, delimiter="\t" if kind == ".tsv" else ","))


def score(source: Path, out: Path, **options) -> job.Done:
    return job.run(job.Job(source, out, Scorer(RUN), **options))


KINDS = ["csv", "csv.gz", "tsv", "tsv.gz", "jsonl", "jsonl.gz", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format(tmp_path, kind, expected, small_chunks):
    """Columns and order stay; each row has its result, an empty text too."""
    source, out = write(tmp_path / f"in.{kind}"), tmp_path / f"out.{kind}"
    done = score(source, out)
    assert (done.rows, done.resumed) == (len(ROWS), 0)
    found = read(out)
    assert [{k: row[k] for k in ROWS[0]} for row in found] == ROWS
    assert [row["predicted_label"] for row in found] == [p.label for p in expected]
    probabilities = [float(row["predicted_probability"]) for row in found]
    assert probabilities == pytest.approx([p.probability for p in expected], abs=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([source.name, out.name])


@pytest.mark.parametrize(("first", "second"), [("csv", "parquet"), ("parquet", "jsonl"),
                                               ("jsonl", "csv"), ("csv.gz", "tsv")])  # fmt: skip
def test_from_one_format_to_another(tmp_path, first, second, expected, small_chunks):
    source, out = write(tmp_path / f"in.{first}"), tmp_path / f"out.{second}"
    score(source, out)
    found = read(out)
    assert [{k: row[k] for k in ROWS[0]} for row in found] == ROWS
    assert [row["predicted_label"] for row in found] == [p.label for p in expected]


def test_lines_of_text(tmp_path, small_chunks):
    texts = [text.replace("\n", " ") for text in TEXTS]
    out = tmp_path / "out.txt"
    score(write(tmp_path / "in.txt"), out)
    found = [line.split("\t") for line in out.read_text(encoding="utf-8").split("\n")[:-1]]
    wanted = fasttx.load(RUN).predict(texts)
    assert [label for label, _ in found] == [p.label for p in wanted]


def test_other_types_of_columns_stay(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table(
        {"text": ["a", None, "b"], "n": pa.array([1, None, 3], pa.int16()), "x": [[1.5], [], None]}
    )
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pyarrow.parquet.write_table(table, source)
    score(source, out)
    found = pyarrow.parquet.read_table(out)
    assert found.select(table.column_names).equals(table)
    assert found.column("predicted_probability").null_count == 0
    rows = [{"text": None, "deep": {"a": [1, None]}}, {"text": "b", "more": True}]
    score(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    found = read(tmp_path / "out.jsonl")
    assert [{k: row[k] for k in wanted} for row, wanted in zip(found, rows, strict=True)] == rows


def test_all_probabilities_and_a_named_column(tmp_path, capsys, expected):
    rows = [{"title": "x", "body of it": row["text"]} for row in ROWS]
    source, out = write(tmp_path / "in.csv", rows), tmp_path / "out.csv"
    arguments = ["predict", str(RUN), "--file", str(source), "--out", str(out)]
    assert cli.main([*arguments, "--text-column", "body of it", "--all-probabilities"]) == 0
    assert f"{out}: {len(ROWS)} rows" in capsys.readouterr().out
    for row, p in zip(read(out), expected, strict=True):
        found = {name: float(row[f"probability_{name}"]) for name in p.probabilities}
        assert found == pytest.approx(p.probabilities, abs=1e-6)
        assert row["predicted_label"] == p.label


def test_several_processes_write_the_same_file(tmp_path, small_chunks):
    source = write(tmp_path / "in.jsonl")
    score(source, tmp_path / "one.jsonl")
    score(source, tmp_path / "two.jsonl", workers=2)
    one, two = (read(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    assert [row["text"] for row in one] == [row["text"] for row in two] == TEXTS
    for a, b in zip(one, two, strict=True):
        assert a["predicted_probability"] == pytest.approx(b["predicted_probability"], abs=1e-6)


def test_what_was_finished_is_not_scored_again(tmp_path, monkeypatch, small_chunks):
    source, out = write(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    whole = Scorer.score
    scored: list[int] = []

    def failing(self, texts):
        scored.append(len(texts))
        if len(scored) == 4:
            raise KeyboardInterrupt
        return whole(self, texts)

    monkeypatch.setattr(Scorer, "score", failing)
    with pytest.raises(KeyboardInterrupt):
        score(source, out)
    assert not out.exists()
    done = score(source, out)
    assert (done.rows, done.resumed) == (len(ROWS), 6)
    assert scored == [2, 2, 2, 2, 2, 1]
    score(source, tmp_path / "again.jsonl")
    assert out.read_bytes() == (tmp_path / "again.jsonl").read_bytes()


def test_parts_of_another_job_are_refused(tmp_path, monkeypatch, small_chunks):
    source, out = write(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(files, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            score(source, out)
    write(source, ROWS[1:])
    with pytest.raises(
        CheckpointError, match=r"out.jsonl.parts holds parts of another job \(another size"
    ):
        score(source, out)


class Dying(Scorer):
    def score(self, texts):
        os._exit(9)


def test_a_worker_that_dies(tmp_path):
    source, out = write(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    with pytest.raises(CheckpointError, match="a worker died.*same command again"):
        job.run(job.Job(source, out, Dying(RUN), workers=2))
    assert not out.exists()
    assert score(source, out).rows == len(ROWS)


SLOWLY = """
import sys, time
from fasttx.scoring import files, scorer
from fasttx.commands import cli
files.CHUNK_ROWS = 20
whole = scorer.Scorer.score
def slow(self, texts):
    time.sleep(0.2)
    return whole(self, texts)
scorer.Scorer.score = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_a_kill_loses_nothing_and_doubles_nothing(tmp_path, monkeypatch):
    rows = [{"n": i, "text": f"film number {i} {'good ' * (i % 9)}"} for i in range(400)]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    arguments = ["predict", str(RUN), "--file", str(source), "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, *arguments], env=env, cwd=ROOT)
    parts = tmp_path / "out.jsonl.parts"
    end = time.monotonic() + 60
    while len(list(parts.glob("part-*"))) < 3:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    monkeypatch.setattr(files, "CHUNK_ROWS", 20)
    done = score(source, out)
    assert done.rows == 400 and 60 <= done.resumed < 400
    assert [row["n"] for row in read(out)] == list(range(400))
    assert not parts.exists()


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.xlsx", b"", "unknown kind"),
        ("a.parquet.gz", b"", "unknown kind"),
        ("a.parquet", b"PAR1", "cannot be read as parquet"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"text\n", "holds no rows"),
        ("a.csv", b"text,b\nx\n", "line 2: 1 fields, and the header has 2"),
        ("a.csv", b'text\n"x\n', "line 2: unexpected end of data"),
        ("a.csv", b"text\n\xff\n", "is not UTF-8"),
        ("a.csv", b"a,b\n1,2\n", "which of them holds the texts"),
        ("a.csv", b"text,text\n1,2\n", "two columns of one name"),
        ("a.csv", b"text,predicted_label\n1,2\n", "has a column 'predicted_label'"),
        ("a.jsonl", b"{]\n", "line 1: not JSON"),
        ("a.jsonl", b"[1]\n", "line 1: no object"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl", b'{"text": 1}\n', "row 1 of the batch is int '1', no text"),
        ("a.csv.gz", b"text\nx\n", "cannot be unpacked"),
        ("a.csv.gz", gzip.compress(b"text\nx\n", mtime=0)[:-9], "cannot be unpacked"),
    ],
)
def test_files_that_cannot_be_scored(tmp_path, name, content, match):
    source = tmp_path / name
    source.write_bytes(content)
    with pytest.raises(DataError, match=match):
        score(source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch):
    source, parquet = write(tmp_path / "in.csv"), write(tmp_path / "in.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for one, out in ((source, "out.parquet"), (parquet, "out.csv")):
        with pytest.raises(DataError, match=r"parquet needs the package pyarrow.*pip install"):
            score(one, tmp_path / out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.csv", "in.parquet"]


def test_bad_requests(tmp_path, capsys):
    source = write(tmp_path / "in.csv")
    with pytest.raises(DataError, match="the file that is read"):
        score(source, source)
    with pytest.raises(DataError, match="'nix', which is none of them"):
        score(source, tmp_path / "out.csv", column="nix")
    with pytest.raises(DataError, match="unknown kind"):
        score(source, tmp_path / "out.xml")
    with pytest.raises(FileNotFoundError):
        score(tmp_path / "nix.csv", tmp_path / "out.csv")
    rows = [{"text": "a"}] * 100 + [{"text": "a", "late": 1}]
    with pytest.raises(DataError, match="'late'.*Let --out end in .jsonl"):
        score(write(tmp_path / "late.jsonl", rows), tmp_path / "late.csv")
    assert cli.main(["predict", str(RUN), "text", "--out", str(tmp_path / "x.csv")]) == 2
    assert "--out takes the table that --file names" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ as a function


def test_a_scorer_of_batches(expected):
    scorer = pickle.loads(pickle.dumps(Scorer(RUN)))
    for batch in ({"text": TEXTS, "n": [*range(9)]}, {"text": np.array(TEXTS, dtype=object)}):
        found = scorer(batch)
        assert list(found["predicted_label"]) == [p.label for p in expected]
        assert found.keys() == {*batch, "predicted_label", "predicted_probability"}
    assert len(scorer({"text": []})["predicted_label"]) == 0
    assert len(scorer({"text": [None, float("nan")]})["predicted_label"]) == 2
    with pytest.raises(DataError, match="expected 'text'"):
        scorer({"body": TEXTS})


def test_a_map_of_datasets(expected):
    datasets = pytest.importorskip("datasets")
    found = datasets.Dataset.from_dict({"text": TEXTS}).map(Scorer(RUN), batched=True, batch_size=4)
    assert found["predicted_label"][:] == [p.label for p in expected]
