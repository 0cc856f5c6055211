"""Runs that start from a pretrained encoder: everything that works on a run works on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import fasttx
import train
from fasttx.commands import cli
from fasttx.commands.train import options
from fasttx.errors import CheckpointError, FasttxError, TokenizerError
from fasttx.reporting.attributions import explain
from fasttx.tasks import origin
from fasttx.tasks.origin import PretrainedOrigin, find_origin, is_pretrained
from fasttx.text.pieces import PieceTokenizer
from tests.faults import write_reviews
from tests.pretrained_folders import TEXTS, tokenizers, write, write_tokenizer

QUICK = ["--epochs", "1", "--batch-size", "16", "--max-len", "12", "--attn-backend", "reference"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT, texts, and a finished run from the one on the other."""
    place = tmp_path_factory.mktemp("pretrained")
    write(place / "bert", "bert")
    data = write_reviews(place / "data", 60)
    arguments = [*QUICK, "--dataset", str(data), "--word-dropout", "0.1"]
    arguments += ["--init-from", str(place / "bert"), "--out", str(place / "run")]
    assert train.main(arguments) == 0
    return place


def test_the_run_is_complete(place: Path) -> None:
    config = json.loads((place / "run" / "config.json").read_text())
    assert config["recipe"] == "finetune-bert"
    model = config["train"]["model"]
    assert (model["norm_first"], model["positions"], model["pooling"]) == (False, "learned", "cls")
    assert (model["max_len"], model["dropout"]) == (12, 0.1)
    shutil.rmtree(place / "gone", ignore_errors=True)
    shutil.copytree(place / "run", place / "gone")  # it needs the encoder's folder no longer
    classifier = fasttx.load(place / "gone", device="cpu")
    assert isinstance(classifier.tokenizer, PieceTokenizer)
    texts = [*TEXTS, "", "good " * 40, "\ud800 [SEP] film"]
    assert [p.label for p in classifier.predict(texts)] == [
        p.label for p in classifier.predict(texts, batch_size=1)
    ]


def test_the_first_step_starts_from_the_encoder(place: Path) -> None:
    """All weights but those that name classes; the pooler is the head's first layer."""
    arguments = [*QUICK, "--dataset", str(place / "data"), "--init-from", str(place / "bert")]
    asked = options(arguments)
    config = asked.config("finetune-bert")
    found = find_origin(str(place / "bert"))
    assert isinstance(found, PretrainedOrigin)
    torch.manual_seed(1)
    model = fasttx.TransformerClassifier.from_config(config.model)
    fresh = model.head.classify.weight.clone()
    found.start(model, found.sha256())
    state = found.found.state()
    assert torch.equal(model.blocks[1].up.weight, state["blocks.1.up.weight"])
    assert torch.equal(model.positions, state["positions"][:12])
    assert torch.equal(model.head.dense.weight, state["head.dense.weight"])
    assert torch.equal(model.head.classify.weight, fresh)
    other = options([*arguments, "--pooling", "mean"]).config("finetune-bert").model
    model = fasttx.TransformerClassifier.from_config(other)
    found.start(model, None)  # another head reads other rows: it is new
    assert not torch.equal(model.head.dense.weight, state["head.dense.weight"])
    with pytest.raises(CheckpointError, match="not the file that this run started from"):
        found.start(model, "0" * 64)


def test_the_commands(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(place / "run")
    commands = [
        ["evaluate", run, "--device", "cpu"],
        ["predict", run, TEXTS[0], "--json"],
        ["explain", run, "unbelievable film"],
        ["verify", run],
    ]
    for command in commands:
        assert cli.main(command) == 0, command
    said = capsys.readouterr().out
    assert "unbelievable" in said  # a word of several pieces


def test_pretraining_goes_on_and_is_started_from(place: Path, tmp_path: Path) -> None:
    words, tuned = tmp_path / "words", tmp_path / "tuned"
    data = [*QUICK, "--dataset", str(place / "data")]
    first = ["--init-from", str(place / "bert"), "--out", str(words)]
    assert cli.main(["pretrain", *data, *first]) == 0
    config = json.loads((words / "config.json").read_text())["train"]
    assert (config["lr"], config["model"]["pad_id"]) == (5e-5, 0)
    then = ["--max-len", "10", "--init-from", str(words), "--out", str(tuned)]
    assert train.main([*data, *then]) == 0
    classifier = fasttx.load(tuned, device="cpu")
    assert classifier.model.config.pooling == "cls"
    assert isinstance(classifier.tokenizer, PieceTokenizer)


def test_a_run_that_stopped_goes_on(place: Path, tmp_path: Path) -> None:
    """From before its first checkpoint: with the encoder as it was, and to the same bits."""
    run = Path(shutil.copytree(place / "run", tmp_path / "run"))
    before = torch.load(run / "best_model.pt", weights_only=True)
    kept = ("config.json", "tokenizer.json", "manifest.json")
    for path in run.iterdir():
        if path.name not in kept:
            path.unlink()
    assert cli.main(["verify", str(run), "--accept"]) == 0
    assert train.main(["--resume", str(run)]) == 0
    after = torch.load(run / "best_model.pt", weights_only=True)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_attributions_are_of_words(place: Path) -> None:
    classifier = fasttx.load(place / "run", device="cpu", attn_backend="sdpa")
    found = explain(classifier, "unbelievable film")
    assert found.words == ("unbelievable", "film")
    assert len(found.attributions) == 2 == len(found.known)
    assert abs(found.gap) < 0.05
    assert found.attention.shape == (2, 4, 2, 2)
    assert found.words_left_out == 0
    long = explain(classifier, "unbelievable " * 30)
    assert long.words_left_out > 0
    assert len(long.words) + long.words_left_out == 30
    assert explain(classifier, "").words == ()


# -------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_ids_are_those_of_tokenizers(kind: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, kind)
    ours = PieceTokenizer.load(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    ids = ours.encode_batch(TEXTS)
    framed = ids.framed(ours.special.before, ours.special.after)
    assert [framed[i].tolist() for i in range(3)] == [theirs.encode(t).ids for t in TEXTS]
    assert len(ours.special.before) == len(ours.special.after) == 1
    assert theirs.id_to_token(ours.special.mask).strip("[]<>").lower() == "mask"
    words, of = ours.words(TEXTS[1])
    assert len(of) == len(ids[1])
    assert "".join(words) == TEXTS[1].replace(" ", "")
    again = PieceTokenizer(json.dumps(ours.to_dict()))
    assert again.encode(TEXTS[2]) == ours.encode(TEXTS[2])
    typed = ours.encode(theirs.id_to_token(ours.special.mask))
    assert ours.special.mask not in typed  # no text is read as a special token


@pytest.mark.parametrize(("missing", "name"), [("[PAD]", "padding"), ("[UNK]", "unknown")])
def test_a_tokenizer_without_a_needed_token(missing: str, name: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != missing]
    if missing == "[UNK]":
        content["model"]["vocab"].pop(missing)
    with pytest.raises(TokenizerError, match=f"has no {name} token"):
        PieceTokenizer(json.dumps(content))


# --------------------------------------------------------------------------------------- bad input


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def _larger_vocabulary(folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"more{i}" for i in range(9)])
    tokenizer.save(str(folder / "tokenizer.json"))


def _another_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "deberta"}))


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_tokenizer, "tokenizer.json does not exist"),
        (_damaged_tokenizer, "is no tokenizer.json, or damaged"),
        (_larger_vocabulary, "do not belong together"),
        (_another_architecture, "'deberta', which is not converted"),
        (_without_weights, "holds no weights"),
    ],
)
def test_bad_folders_end_with_one_line(change, message, place, tmp_path, capsys) -> None:
    folder = Path(shutil.copytree(place / "bert", tmp_path / "bert"))
    change(folder)
    out = tmp_path / "out"
    arguments = [*QUICK, "--dataset", str(place / "data"), "--init-from", str(folder)]
    assert train.main([*arguments, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (out / "config.json").exists()


def test_more_tokens_than_positions(place: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--dataset", str(place / "data"), "--init-from", str(place / "bert")]
    assert train.main([*arguments, "--max-len", "41", "--out", str(tmp_path / "o")]) == 2
    assert "has learnt 40 positions" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(origin, "hub_unreachable", lambda: "https://hub did not answer within 3 s")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert is_pretrained("nobody/no-such-encoder")
    with pytest.raises(FasttxError, match=r"no folder here, and could not be had.*within 3 s"):
        find_origin("nobody/no-such-encoder")
    assert not is_pretrained(str(tmp_path / "none"))


def test_framed_sequences() -> None:
    from fasttx.text.packing import RaggedIds

    ids = RaggedIds.from_lists([[5, 6], [], [7]])
    framed = ids.framed((1,), (2, 3))
    assert [framed[i].tolist() for i in range(3)] == [[1, 5, 6, 2, 3], [1, 2, 3], [1, 7, 2, 3]]
    assert ids.framed((), ()) is ids
    part = RaggedIds(ids.values, np.array([1, 2, 3]))
    assert part.framed((9,), ())[1].tolist() == [9, 7]


def test_it_is_a_model_of_transformers(place: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import fasttx.hf

    folder = fasttx.hf.save_run(place / "run", tmp_path / "saved")
    ours = fasttx.load(place / "run", device="cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS, "", "a [SEP] film", "[PAD] [MASK]"]
    for text in texts:
        short = " ".join(text.split()[:2])
        assert tokenizer(short)["input_ids"] == ours.encode([short])[0].tolist()
    classify = transformers.pipeline("text-classification", str(folder), truncation=True)
    shorter = [" ".join(text.split()[:2]) for text in texts]
    for found, wanted in zip(classify(shorter), ours.predict(shorter), strict=True):
        assert found["label"] == wanted.label
        assert found["score"] == pytest.approx(wanted.probability, abs=1e-5)
