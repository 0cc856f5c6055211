"""train.py and the `fasttx` command, used as a user would: as processes, on files."""

from __future__ import annotations

import csv
import importlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fasttx
from fasttx.commands.train import options
from fasttx.config import RECIPES
from fasttx.errors import CheckpointError, FasttxError
from fasttx.ops import registry
from fasttx.training.folder import RunFolder
from tests import forks

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--d-model", "16", "--num-heads", "2", "--num-layers", "1", "--d-ff", "32", "--max-len", "32",
    "--vocab-size", "60", "--batch-size", "8", "--lr", "3e-3", "--optimizer", "adam",
    "--weight-decay", "0", "--schedule", "constant", "--warmup-steps", "0", "--word-dropout", "0",
    "--dropout", "0.1", "--epochs", "4", "--device", "cpu", "--log-every", "3",
]  # fmt: skip
CLOCK = {"seconds", "samples_per_second", "peak_memory_mb", "history", "time_to_accuracy"}


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.csv and test.csv, whose labels are words and easy to learn."""
    folder = tmp_path_factory.mktemp("data") / "little"
    folder.mkdir()
    rng = random.Random(0)
    for name, count in (("train", 400), ("test", 80)):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as f:
            rows = csv.writer(f)
            rows.writerow(["text", "label"])
            for i in range(count):
                words = [f"w{rng.randrange(40)}" for _ in range(rng.randrange(3, 20))]
                words.insert(rng.randrange(len(words)), ("awful", "great")[i % 2])
                rows.writerow([" ".join(words), ("bad", "good")[i % 2]])
    return folder


def environment(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("FASTTX_DATA", "WORLD_SIZE")}
    return kept | {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **extra
    }  # fmt: skip


def train(
    *arguments: object, cwd: Path, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    command = [*launcher, str(ROOT / "train.py"), *map(str, arguments)]
    return forks.run(command, cwd, environment(), timeout=300)


def command(*arguments: object, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess:
    asked = ["-m", "fasttx", *map(str, arguments)]
    return forks.run(asked, cwd, environment(), input=stdin, timeout=120)


@pytest.fixture(scope="module")
def run(reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("run") / "a"
    done = train("--dataset", reviews, "--out", folder, *SMALL, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_run_folder(run: Path) -> None:
    assert {p.name for p in run.iterdir()} == {
        "config.json", "tokenizer.json", "best_model.pt", "metrics.jsonl", "results.json",
        "train.log", "last.ckpt", "test_predictions.npz", "manifest.json",
    }  # fmt: skip
    found = results(run)
    assert found["test_accuracy"] > 0.9
    assert found["attn_backend"] == registry.resolve_name("auto", "cpu", torch.float32, 8)
    assert found["dataset"]["name"] == "little"
    assert found["dataset"]["label_counts"] == {
        "train": {"bad": 180, "good": 180},
        "validation": {"bad": 20, "good": 20},
        "test": {"bad": 40, "good": 40},
    }
    for key in ("test_loss", "confusion_matrix", "val_accuracy", "best_epoch", "samples_per_second",
                "seconds", "peak_memory_mb", "parameters", "device", "precision", "seed",
                "versions", "hardware"):  # fmt: skip
        assert found[key] not in (None, {}, []), key
    assert sum(map(sum, found["confusion_matrix"])) == 80
    assert found["parameters"] == sum(p.numel() for p in fasttx.load(run).model.parameters())
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [e["epoch"] for e in epochs if e["kind"] == "epoch"] == [1, 2, 3, 4]
    assert "180 bad, 180 good" in (run / "train.log").read_text()


def test_what_is_suggested_is_right(run: Path) -> None:
    """The text is of the validation split, and the shell takes the line as it is printed."""
    text = results(run)["example"]
    prediction = fasttx.load(run, device="cpu").predict([text])[0]
    assert prediction.label == ("good" if "great" in text else "bad")
    assert f"try: fasttx predict {run} {shlex.quote(text)}\n" in (run / "train.log").read_text()
    dataset = json.loads((run / "config.json").read_text())["train"]["dataset"]
    assert text in (Path(dataset) / "train.csv").read_text()


def test_best_model_is_a_plain_state_dict(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())["train"]["model"]
    model = fasttx.TransformerClassifier(**config)
    model.load_state_dict(torch.load(run / "best_model.pt", weights_only=True))
    torch.load(run / "last.ckpt", weights_only=True)


def test_predict(run: Path, tmp_path: Path) -> None:
    classifier = fasttx.load(run, device="cpu")
    good, bad = classifier.predict(["w1 great w2", "w3 awful"])
    assert (good.label, bad.label) == ("good", "bad")
    assert sum(good.probabilities.values()) == pytest.approx(1.0)
    assert good.probability == max(good.probabilities.values())
    assert classifier.predict([]) == []
    assert len(classifier.predict(["", "nothing known here"])) == 2
    with pytest.raises(TypeError, match="list of texts"):
        classifier.predict("great")
    alone = classifier.predict(["w1 great w2"])[0]
    assert alone.probability == pytest.approx(good.probability, abs=1e-6)

    shown = command("predict", run, "w1 great w2", "--json", cwd=tmp_path)
    row = json.loads(shown.stdout)
    assert row["label"] == "good" and row["text"] == "w1 great w2"
    (tmp_path / "texts.txt").write_text("w3 awful\n\nw1 great\n")
    shown = command("predict", run, "--file", "texts.txt", cwd=tmp_path)
    lines = [line.split()[0] for line in shown.stdout.splitlines()]
    assert (lines[0], len(lines), lines[2]) == ("bad", 3, "good"), "blank lines are texts too"
    shown = command("predict", run, cwd=tmp_path, stdin="great\nawful\n")
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["good", "bad"]


def test_evaluate_repeats_the_test_accuracy(run: Path, reviews: Path, tmp_path: Path) -> None:
    shown = command("evaluate", run, "--dataset", reviews, "--json", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    again, found = json.loads(shown.stdout), results(run)
    assert again["accuracy"] == found["test_accuracy"]
    assert again["loss"] == pytest.approx(found["test_loss"], rel=1e-5)
    assert again["confusion_matrix"] == found["confusion_matrix"]


def test_evaluate_repeats_the_validation_accuracy(run: Path, tmp_path: Path) -> None:
    """Without a dataset it is the run's own validation split; how texts are read can be changed."""
    shown = command("evaluate", run, "--json", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    best = max(results(run)["history"], key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    again = json.loads(shown.stdout)
    assert again["loss"] == pytest.approx(best["val_loss"], rel=1e-5)
    assert again["accuracy"] == best["val_accuracy"]


def test_evaluate_reads_texts_another_way(reviews: Path, tmp_path: Path) -> None:
    short = ["--max-len", "8", "--epochs", "1"]
    done = train("--dataset", reviews, "--out", "r", *SMALL, *short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = {
        json.loads(command("evaluate", "r", "--json", *how, cwd=tmp_path).stdout)["loss"]
        for how in ([], ["--long-texts", "cut"], ["--truncation", "head"], ["--truncation", "tail"])
    }
    assert len(losses) == 4, "windows, head+tail, head, tail"


def test_long_texts_in_windows(reviews: Path, tmp_path: Path) -> None:
    """All of a text counts; what training measured, evaluate and predict measure too."""
    windows = ["--max-len", "8", "--long-texts", "windows", "--epochs", "1"]
    done = train("--dataset", reviews, "--out", "w", *SMALL, *windows, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = command("evaluate", "w", "--dataset", reviews, "--json", cwd=tmp_path)
    assert json.loads(shown.stdout)["loss"] == pytest.approx(
        results(tmp_path / "w")["test_loss"], rel=1e-5
    )
    classifier = fasttx.load(tmp_path / "w", device="cpu")
    parts = ["w1 w2 w3 w4 w5 w6", "w7 great w8 w9 w10 w11", "w12 awful w13 w14 w15 w16 w17"]
    together = classifier.logits([" ".join(parts), "", parts[1]])
    expected = classifier.logits(parts).mean(0)
    torch.testing.assert_close(together[0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together[2], classifier.logits([parts[1]])[0], rtol=1e-5, atol=1e-6)


def test_backends(tmp_path: Path) -> None:
    shown = command("backends", "--device", "cpu", cwd=tmp_path)
    for name in registry.BACKENDS:
        assert name in shown.stdout
    assert "auto on cpu" in shown.stdout


def test_ctrl_c_says_how_to_resume(reviews: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--dataset", str(reviews), "--out", "c", *SMALL,
         "--epochs", "1000"],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "c" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume c" in out
    assert (tmp_path / "c" / "last.ckpt").exists()


def test_resume_refuses_other_data_and_other_flags(run: Path, tmp_path: Path) -> None:
    other = train("--resume", run, "--epochs", "9", cwd=tmp_path)
    assert other.returncode == 2 and "--epochs" in other.stderr
    missing = train("--resume", tmp_path / "nothing", cwd=tmp_path)
    assert missing.returncode == 2 and "nothing" in missing.stderr


def test_an_existing_folder_is_never_overwritten(run: Path, reviews: Path, tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    done = train("--dataset", reviews, "--out", run, *SMALL, cwd=tmp_path)
    assert done.returncode == 2 and "--resume" in done.stderr
    assert before == {p.name: p.read_bytes() for p in run.iterdir()}


def test_single_class_is_refused_or_explained(reviews: Path, tmp_path: Path) -> None:
    """The 100 % of a file that is sorted by label, and what the report says of it."""
    folder = tmp_path / "sorted"
    folder.mkdir()
    for name in ("train", "test"):
        head, *rows = (reviews / f"{name}.csv").read_text().splitlines()
        rows.sort(key=lambda row: row.rsplit(",", 1)[1])
        (folder / f"{name}.csv").write_text("\n".join([head, *rows]) + "\n")
    first = ["--dataset", folder, "--subset-order", "file", "--train-samples", 100,
             "--test-samples", 30, *SMALL]  # fmt: skip
    refused = train(*first, "--out", "d", cwd=tmp_path)
    assert refused.returncode == 2 and "--allow-single-class" in refused.stderr
    assert not (tmp_path / "d").exists()
    allowed = train(*first, "--out", "d", "--allow-single-class", cwd=tmp_path)
    assert allowed.returncode == 0, allowed.stderr
    found = results(tmp_path / "d")
    assert found["test_accuracy"] == 1.0
    assert "artefact" in found["warning"] and "artefact" in allowed.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attn-backend", "flash9"], "unknown attention backend 'flash9'"),
        (["--d-model", "30", "--num-heads", "4"], "d_model is 30"),
        (["--dropout", "1.5"], "dropout is 1.5"),
        (["--epochs", "0"], "epochs is 0"),
        (["--weight-decay", "0.1"], "weight_decay is 0.1 with optimizer adam"),
        (["--precision", "tf32"], "tf32"),
        (["--device", "tpu"], "tpu"),
        (["--dataset", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_bad_settings_are_one_clear_line(
    reviews: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    base = ["--dataset", reviews] if "--dataset" not in arguments else []
    done = train(*base, *SMALL, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def damage(folder: Path, name: str, how: str) -> None:
    path = folder / name
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes(b"something else altogether")


@pytest.mark.parametrize("name", ["best_model.pt", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["missing", "cut", "foreign"])
def test_damaged_runs_are_named(run: Path, tmp_path: Path, name: str, how: str) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    damage(copy, name, how)
    with pytest.raises(FasttxError, match=name):
        fasttx.load(copy)


def test_mismatched_model(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    torch.save(
        fasttx.TransformerClassifier(d_model=8, num_heads=2).state_dict(), copy / "best_model.pt"
    )
    RunFolder(copy).seal()
    with pytest.raises(CheckpointError, match=r"best_model\.pt does not fit"):
        fasttx.load(copy)


# --- several processes ----------------------------------------------------------------------------

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", "0.1"), ("adam", "3e-3")])
def test_two_processes_equal_one(reviews: Path, tmp_path: Path, optimizer: str, lr: str) -> None:
    """Without dropout, the same batches give the same run: weights under SGD, losses under Adam
    (whose first steps divide by tiny second moments, so rounding shows in the weights)."""
    same = ["--dataset", reviews, *SMALL, "--dropout", "0", "--batch-size", "15", "--optimizer",
            optimizer, "--lr", lr, "--epochs", "2", "--grad-accumulation", "2", "--max-len", "8",
            "--long-texts", "windows"]  # fmt: skip
    one = train(*same, "--out", "one", cwd=tmp_path)
    two = train(*same, "--out", "two", cwd=tmp_path, launcher=TORCHRUN)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    a, b = (results(tmp_path / name) for name in ("one", "two"))
    for row_a, row_b in zip(a["history"], b["history"], strict=True):
        assert row_a["train_loss"] == pytest.approx(row_b["train_loss"], abs=1e-5)
        assert row_a["val_loss"] == pytest.approx(row_b["val_loss"], abs=1e-5)
    assert a["confusion_matrix"] == b["confusion_matrix"]
    if optimizer == "sgd":
        weights = [
            torch.load(tmp_path / n / "best_model.pt", weights_only=True) for n in ("one", "two")
        ]
        for name, w in weights[0].items():
            torch.testing.assert_close(w, weights[1][name], rtol=0, atol=1e-6)


def test_torch_compile_flag(reviews: Path, tmp_path: Path) -> None:
    import shutil

    if not shutil.which("g++") and not shutil.which("c++"):
        pytest.skip("torch.compile on the CPU needs a C++ compiler")
    done = train(
        "--dataset", reviews, "--out", "e", *SMALL, "--compile", "--epochs", "1", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "e")["history"][0]["train_loss"] < 0.8


@pytest.mark.parametrize(
    ("arguments", "source", "recipe"),
    [
        ([], "demo", "demo"),
        ([], "imdb", "full"),
        (["--recipe", "seed"], "imdb", "seed"),
        (["--recipe", "seed"], "demo", "demo"),  # auto had to fall back, and so does its recipe
        (["--recipe", "seed", "--dataset", "demo"], "demo", "seed"),  # asked for
        (["--dataset", "demo"], "demo", "demo"),
        (["--init-from", "/runs/words"], "imdb", "finetune"),
        (["--init-from", "/runs/words"], "demo", "demo"),
        (["--init-from", "/runs/words", "--recipe", "seed"], "imdb", "seed"),
    ],
)
def test_the_recipe_fits_the_dataset(arguments: list[str], source: str, recipe: str) -> None:
    assert options(arguments).recipe_for(source) == recipe


def test_train_py_takes_the_recipe_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    import train as script

    trained = importlib.import_module("fasttx.train")  # whose name a function has too
    seen = []
    monkeypatch.setattr(trained.data, "resolve", lambda name: trained.data.Source("demo"))
    monkeypatch.setattr(trained.runs, "create", lambda task, config, *more: seen.append(config))
    assert script.main(["--recipe", "seed", "--epochs", "9"]) == 0
    assert seen == [replace(RECIPES["demo"], epochs=9)]
