"""What an error message advises can be done: the flags that it names are those of its command."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
from pathlib import Path

import pytest

import train
from fasttx.commands import cli, flags
from fasttx.commands.train import options
from fasttx.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "tests" / "data" / "runs"
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
# Of other programs: pip, xcode-select, torchrun.
FOREIGN = {"--force-reinstall", "--no-deps", "--install", "--nproc-per-node"}


def leaves(parser: argparse.ArgumentParser, name: str) -> dict[str, frozenset[str]]:
    """The flags of each command, by its name: `fasttx baseline nb`."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parts = (leaves(p, f"{name} {k}") for k, p in action.choices.items())
            return {k: v for part in parts for k, v in part.items()}
    return {name: frozenset(parser._option_string_actions)}


@pytest.fixture(scope="module")
def known() -> dict[str, frozenset[str]]:
    found = leaves(cli.command_parser(*cli.COMMANDS), "fasttx")
    return found | {"train.py": options([]).accepts}


def unknown_flags(message: str, command: str, known: dict[str, frozenset[str]]) -> set[str]:
    """Flags in `message` that neither `command` takes nor the command that stands before them."""
    wrong = set()
    for found in FLAG.finditer(message):
        before = re.split(r"[.;:] |\n", message[: found.start()])[-1]
        named = [name for name in known if name in before]
        owner = max(named, key=lambda name: before.rindex(name), default=command)
        if found[0] not in known[owner] | FOREIGN:
            wrong.add(f"{found[0]} of {owner}")
    return wrong


def test_every_flag_that_a_text_names_exists(known) -> None:
    every = frozenset.union(*known.values()) | FOREIGN | {"--flag"}
    for path in [*(ROOT / "fasttx").rglob("*.py"), ROOT / "train.py"]:
        if path.name in ("page.py", "plots.py", "explain.py"):  # their dashes are CSS variables
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                missing = set(FLAG.findall(node.value)) - every
                assert not missing, f"{path}, line {node.lineno}: no command has {missing}"


def test_a_flag_that_is_advised_wrongly_is_found(known) -> None:
    message = "it exists. Go on by --resume x, or choose another --out"
    assert unknown_flags(message, "fasttx ensemble", known) == {"--resume of fasttx ensemble"}
    message = "it exists. Go on: python train.py --resume x; or choose another --out"
    assert not unknown_flags(message, "fasttx ensemble", known)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, a folder that is taken, and datasets with faults."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("classification-half", "classification-finished", "pretraining-finished"):
        shutil.copytree(RUNS / name, folder / name)
    (folder / "bare").mkdir()
    shutil.copy(RUNS / "classification-half" / "config.json", folder / "bare")
    (folder / "taken").mkdir()
    (folder / "taken" / "results.json").write_text("{}")
    rows = [f"text {i},{'ab'[i >= 50]}" for i in range(100)]
    (folder / "sorted").mkdir()
    for split in ("train", "test"):
        (folder / "sorted" / f"{split}.csv").write_text("\n".join(["text,label", *rows]))
    (folder / "columns.csv").write_text("one,two,three\nx,y,1\nu,v,0\n")
    return folder


DEMO = "--dataset demo --train-samples 20 --test-samples 20"
WRONG = [
    "fasttx baseline nb --dataset {sorted} --train-samples 9 --test-samples 9 --subset-order file",
    "fasttx baseline nb --dataset {sorted} --train-samples 99",
    "fasttx baseline nb --dataset {columns.csv}",
    "fasttx baseline nb --dataset {no}",
    "fasttx baseline nb --out {taken} " + DEMO,
    "fasttx baseline lstm --out {taken} " + DEMO,
    "fasttx baseline lstm --device tpu " + DEMO,
    "fasttx baseline lstm --resume {classification-half}",
    "fasttx predict {bare} text",
    "fasttx predict {pretraining-finished} text",
    "fasttx predict {no} text",
    "fasttx predict {classification-finished} text --device cuda:99",
    "fasttx predict {classification-finished} --attn-backend no text",
    "fasttx evaluate {classification-finished} --dataset {columns.csv}",
    "fasttx explain {pretraining-finished} text",
    "fasttx report {classification-half}",
    "fasttx report {classification-finished} --out {taken}",
    "fasttx ensemble {classification-finished} --out {taken}",
    "fasttx ensemble {classification-finished} --pseudo-labels",
    "fasttx ensemble {classification-finished} --ngrams 2",
    "fasttx ensemble {bare}",
    "fasttx pretrain --out {taken} " + "--dataset demo --train-samples 20",
    "fasttx pretrain --dataset {sorted} --train-samples 999",
    "fasttx pretrain --resume {classification-half}",
    "fasttx pretrain --dataset {columns.csv}",
    "train.py --out {taken} " + DEMO,
    "train.py --dataset {sorted} --train-samples 9 --subset-order file",
    "train.py --dataset {sorted} --train-samples 99",
    "train.py --init-from {pretraining-finished} --num-layers 9 " + DEMO,
    "train.py --init-from {bare} " + DEMO,
    "train.py --pseudo-labels {taken} " + DEMO,
    "train.py --resume {pretraining-finished}",
    "train.py --precision tf32 --device cpu " + DEMO,
    "train.py --weight-decay 0.1 --optimizer adam " + DEMO,
]


@pytest.mark.parametrize("line", WRONG)
def test_what_is_advised_can_be_done(line: str, place: Path, known, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [str(place / w[1:-1]) if w.startswith("{") else w for w in line.split()]
    main = train.main if words[0] == "train.py" else cli.main
    try:
        status = main(words[1:])
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr().err
    assert status == 2 and "Traceback" not in said, said
    command = max((name for name in known if line.startswith(name)), key=len)
    assert not unknown_flags(said.replace(str(place), ""), command, known), said
    assert not [p for p in tmp_path.rglob("*") if p.is_file()], "nothing is left behind"


@pytest.mark.parametrize("name", TASKS)
def test_what_tames_a_training_can_be_set(name: str, known) -> None:
    task = TASKS[name].load()
    assert not unknown_flags(task.tamer, task.command.removeprefix("python "), known)


@pytest.mark.parametrize("line", ["ensemble", "evaluate", "train.py --resume"])
def test_a_run_whose_data_has_changed(line: str, place: Path, known, tmp_path, capsys) -> None:
    """Flags of the data were for the run that was made, not for what is done with it."""
    run = Path(shutil.copytree(place / "classification-half", tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    for dataset, reason in (
        (place / "sorted", "train_samples is 640"),
        (place / "columns.csv", "has the columns 'one', 'two', 'three'"),
        (place / "no", "there is no such file or folder"),
    ):
        config["train"] |= {"dataset": str(dataset), "train_samples": 640}
        (run / "config.json").write_text(json.dumps(config))
        main = train.main if line.startswith("train") else cli.main
        assert main([*line.removeprefix("train.py ").split(), str(run)]) == 2
        said = capsys.readouterr().err
        assert "needs its data and its device as they were: " in said
        assert reason in said and "--" not in said.replace(str(tmp_path), "")


def test_the_memory_advice_names_flags_of_each_command(known) -> None:
    from fasttx.commands.ending import _memory_sentence

    for command, accepted in known.items():
        assert not unknown_flags(_memory_sentence(MemoryError(), accepted), command, known)


def test_settings_that_are_paths_are_settings() -> None:
    assert set(flags.PATHS) <= set(TASKS["pretraining"].settings.__dataclass_fields__)
