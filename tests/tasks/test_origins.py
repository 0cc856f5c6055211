"""The files of a run belong together, and one process at a time writes them, whatever the task."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import fasttx
import train
from fasttx.commands import cli
from fasttx.commands.train import options
from fasttx.errors import CheckpointError, FasttxError
from fasttx.text.tokenizer import PAD, UNK, Tokenizer
from fasttx.training import run as runs
from fasttx.training.distributed import Processes
from fasttx.training.folder import RunFolder
from tests.faults import SIZES, write_reviews


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs on one dataset, of the classes bad and good, and a pretrained encoder."""
    place = tmp_path_factory.mktemp("origins")
    data = write_reviews(place / "data", 60)
    sizes = [*SIZES, "--epochs", "1", "--dataset", str(data)]
    for name, seed in (("one", "1"), ("two", "2")):
        assert train.main([*sizes, "--seed", seed, "--out", str(place / name)]) == 0
    assert cli.main(["pretrain", *sizes, "--out", str(place / "words")]) == 0
    return place


@pytest.fixture
def one(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "one", tmp_path / "one"))


@pytest.mark.parametrize(
    "name", ["best_model.pt", "tokenizer.json", "config.json", "manifest.json", "last.ckpt"]
)
def test_a_file_of_another_run_is_refused(
    one: Path, place: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (one / "results.json").unlink()
    shutil.copy(place / "two" / name, one / name)
    if name == "tokenizer.json":  # the same words would be the same file
        (one / name).write_text((one / name).read_text().replace("dull", "bull"))
    assert train.main(["--resume", str(one)]) == 2
    said = capsys.readouterr().err
    assert "the file that this run wrote" in said and said.count("\n") == 1
    if name != "last.ckpt":
        with pytest.raises(FasttxError, match="the file that this run wrote"):
            fasttx.load(one, device="cpu")


def test_a_run_without_its_manifest_can_be_accepted(
    one: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (one / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"has lost its manifest\.json.*verify \S+ --accept"):
        fasttx.load(one, device="cpu")
    assert cli.main(["verify", str(one), "--accept"]) == 0
    fasttx.load(one, device="cpu")


def test_more_words_than_the_embedding_has_are_refused(one: Path) -> None:
    Tokenizer([PAD, UNK, *(f"word{i}" for i in range(300))]).save(one / "tokenizer.json")
    RunFolder(one).seal()  # so that only the numbers tell, as in a run without a manifest
    with pytest.raises(CheckpointError, match=r"302 words, and the run's embedding has 200 rows"):
        fasttx.load(one, device="cpu")


def test_an_encoder_that_was_replaced_under_way_is_refused(place: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(place / "words", tmp_path / "words"))
    asked = options([*SIZES, "--dataset", str(place / "data"), "--init-from", str(source),
                     "--out", str(tmp_path / "run")])  # fmt: skip
    run = train.open_run(asked, Processes())
    assert run is not None
    shutil.rmtree(source)
    shutil.copytree(place / "two", source)
    with pytest.raises(CheckpointError, match="is not the file that this run started from"):
        runs.train(run)


def test_a_damaged_encoder_leaves_no_folder(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(place / "words", tmp_path / "words"))
    weights = bytearray((source / "best_model.pt").read_bytes())
    weights[len(weights) // 2] ^= 4
    (source / "best_model.pt").write_bytes(weights)
    arguments = [*SIZES, "--dataset", str(place / "data"), "--init-from", str(source)]
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert "best_model.pt is damaged" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("program", ["train", "pretrain", "lstm", "ensemble", "baseline"])
def test_a_folder_that_another_process_makes_is_in_use(
    place: Path, tmp_path: Path, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    held = RunFolder(out)
    held.create()
    data = ["--dataset", str(place / "data")]
    argv = {
        "train": [*SIZES, *data],
        "pretrain": ["pretrain", *SIZES, *data],
        "lstm": ["baseline", "lstm", *data],
        "ensemble": ["ensemble", str(place / "one"), str(place / "two")],
        "baseline": ["baseline", "nb", *data],
    }[program]
    main = train.main if program == "train" else cli.main
    assert main([*argv, "--out", str(out)]) == 2
    assert f"{out} is in use by process" in capsys.readouterr().err
    held.close()


@pytest.mark.parametrize("name", ["one", "words"])
def test_a_run_that_another_process_goes_on_with_is_in_use(
    place: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(place / name, tmp_path / name))
    (run / "results.json").unlink()
    held = RunFolder(run)
    held.open()
    command = ["--resume", str(run)]
    status = train.main(command) if name == "one" else cli.main(["pretrain", *command])
    assert status == 2 and "is in use by process" in capsys.readouterr().err
    held.close()
    assert (train.main(command) if name == "one" else cli.main(["pretrain", *command])) == 0
