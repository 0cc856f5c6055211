"""Masked-language-model pretraining: what is hidden, what is learned, and what is handed on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fasttx
import train
from fasttx.commands import cli
from fasttx.commands.pretrain import MaskedTrainer
from fasttx.config import ModelConfig, PretrainConfig, TrainConfig
from fasttx.errors import CheckpointError, DataError
from fasttx.models.classifier import TransformerClassifier
from fasttx.models.linear_cross_entropy import linear_cross_entropy
from fasttx.models.masked_lm import MaskedLanguageModel, mask_words
from fasttx.text import splits as data
from fasttx.text.packing import RaggedIds, pack
from fasttx.text.tokenizer import UNK_ID
from fasttx.training.checkpoint import RunConfig, RunFolder, load_encoder, load_state, save_state
from fasttx.training.distributed import Processes
from fasttx.training.trainer import Examples

MODEL = ModelConfig(
    vocab_size=50, d_model=32, num_heads=4, num_layers=2, d_ff=64, max_len=40,
    attn_backend="reference",
)  # fmt: skip
SIZES = (
    "--vocab-size 400 --d-model 32 --num-heads 2 --num-layers 1 --d-ff 64 --max-len 32 "
    "--attn-backend reference"
).split()
QUICK = [*SIZES, *"--dataset demo --train-samples 300 --epochs 2".split()]


def ragged(texts: int = 400, vocab: int = 50) -> RaggedIds:
    rng = np.random.default_rng(0)
    return RaggedIds.from_lists(
        [rng.integers(1, vocab, rng.integers(1, 40)).tolist() for _ in range(texts)]
    )


# --- what is hidden -------------------------------------------------------------------------------


def test_a_share_of_the_known_words_is_hidden_eight_in_ten_by_unk() -> None:
    ids = ragged(4000)
    shown, rows, words = mask_words(ids, 0.2, 50, (0, 1))
    known = (ids.values != UNK_ID).sum()
    assert len(rows) / known == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / known))
    assert np.array_equal(words, ids.values[rows])
    assert UNK_ID not in words
    assert np.array_equal(shown.offsets, ids.offsets)
    elsewhere = np.ones(len(ids.values), dtype=bool)
    elsewhere[rows] = False
    assert np.array_equal(shown.values[elsewhere], ids.values[elsewhere])
    n, stayed = len(rows), (shown.values[rows] == words).mean()
    assert (shown.values[rows] == UNK_ID).mean() == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / n))
    # One in ten stays, and a random word is the same one by chance in 1 of 48.
    assert stayed == pytest.approx(0.1 + 0.1 / 48, abs=4 * math.sqrt(0.09 / n))
    assert shown.values.min() >= UNK_ID
    assert shown.values.max() < 50


def test_masks_are_a_function_of_the_stream() -> None:
    ids = ragged()
    one, again, other = (mask_words(ids, 0.2, 50, s) for s in ((3, 1), (3, 1), (3, 2)))
    assert np.array_equal(one[0].values, again[0].values)
    assert not np.array_equal(one[1], other[1])


def test_a_text_without_known_words_has_nothing_to_hide() -> None:
    ids = RaggedIds.from_lists([[UNK_ID] * 5, []])
    shown, rows, words = mask_words(ids, 0.9, 50, (0,))
    assert len(rows) == len(words) == 0
    assert np.array_equal(shown.values, ids.values)


# --- the model ------------------------------------------------------------------------------------


def test_logits_are_the_head_on_the_rows_asked_for() -> None:
    torch.manual_seed(0)
    model = MaskedLanguageModel(MODEL).double().eval()
    batch = pack(ragged(8))
    rows = torch.tensor([5, 0, 17])
    inputs = batch.model_inputs()
    logits = model(**inputs, rows=rows)
    with torch.no_grad():
        n = model.encode(**inputs).n[rows]
        x = F.gelu(model.head.dense(n))
        x = F.layer_norm(x, (32,), model.head.norm.weight, model.head.norm.bias)
        expected = x @ model.embedding.T + model.head.bias
    torch.testing.assert_close(logits, expected)


def test_the_embedding_learns_from_both_its_ends() -> None:
    torch.manual_seed(0)
    model = MaskedLanguageModel(MODEL)
    rows = torch.tensor([1])
    logits = model(**pack(RaggedIds.from_lists([[3, 4, 5]])).model_inputs(), rows=rows)
    F.cross_entropy(logits, torch.tensor([7])).backward()
    gradient = model.embedding.grad
    assert gradient is not None
    touched = set(torch.nonzero(gradient.abs().sum(1)).flatten().tolist())
    assert touched == set(range(50))  # as an output, every word; 3, 4 and 5 as inputs too


def test_encoder_weights_move_between_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pretrained, classifier = MaskedLanguageModel(MODEL), TransformerClassifier.from_config(MODEL)
    save_state(tmp_path / "best_model.pt", pretrained.state_dict())
    head = {k: v.clone() for k, v in classifier.head.state_dict().items()}
    load_encoder(classifier, tmp_path / "best_model.pt")
    batch = pack(ragged(8)).model_inputs()
    torch.testing.assert_close(
        classifier.eval().encode(**batch).n, pretrained.eval().encode(**batch).n
    )
    for name, value in classifier.head.state_dict().items():
        assert torch.equal(value, head[name])


# --- the loss -------------------------------------------------------------------------------------


@pytest.fixture
def head_inputs() -> tuple[torch.Tensor, ...]:
    x = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(50, dtype=torch.float64, requires_grad=True)
    return x, weight, bias, torch.randint(50, (23,))


@pytest.mark.parametrize("chunk", [1, 50 * 7, 2**20])  # a row at a time, 7 and a rest, all at once
def test_linear_cross_entropy_is_torchs(monkeypatch, head_inputs, chunk: int) -> None:
    monkeypatch.setattr("fasttx.models.linear_cross_entropy.CPU_CHUNK", chunk)
    *inputs, labels = head_inputs
    loss, correct = linear_cross_entropy(*inputs, labels)
    logits = F.linear(*inputs)
    expected = F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert correct == (logits.argmax(1) == labels).sum()
    torch.testing.assert_close(
        torch.autograd.grad(3 * loss, inputs), torch.autograd.grad(3 * expected, inputs)
    )
    assert torch.autograd.gradcheck(lambda *i: linear_cross_entropy(*i, labels)[0], inputs)


def test_linear_cross_entropy_under_autocast(head_inputs) -> None:
    *inputs, labels = (t.detach().float() if t.is_floating_point() else t for t in head_inputs)
    for tensor in inputs:
        tensor.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(*inputs, labels)
    gradients = torch.autograd.grad(loss, inputs)
    expected = F.cross_entropy(F.linear(*inputs), labels, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.01, atol=0.0)
    for found, exact in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        assert found.dtype == torch.float32
        assert (found - exact).norm() < 0.02 * exact.norm()


def test_linear_cross_entropy_without_gradients_or_rows(head_inputs) -> None:
    *inputs, labels = head_inputs
    with torch.inference_mode():
        loss, _ = linear_cross_entropy(*inputs, labels)
    torch.testing.assert_close(loss, linear_cross_entropy(*inputs, labels)[0].detach())
    x, weight, bias = inputs
    loss, correct = linear_cross_entropy(x[:0], weight, bias, labels[:0])
    loss.backward()
    assert loss == correct == 0
    assert weight.grad is not None
    assert not weight.grad.any()


# --- the command ----------------------------------------------------------------------------------


def test_pretrain_then_fine_tune(tmp_path: Path) -> None:
    run, tuned = tmp_path / "pretrained", tmp_path / "tuned"
    settings = "--train-samples 4000 --epochs 4 --lr 0.005 --warmup-steps 20".split()
    assert cli.main(["pretrain", *QUICK, *settings, "--out", str(run)]) == 0
    results = json.loads((run / "results.json").read_text())
    # 400 words, of which the demo's grammar leaves few possible at a place: far below chance's 400.
    assert results["perplexity"] < 150
    assert results["masked_loss"] == pytest.approx(math.log(results["perplexity"]))
    assert "--init-from" in (run / "train.log").read_text(encoding="utf-8")

    # The sizes are those of the encoder, the recipe is the one for it.
    arguments = "--dataset demo --train-samples 300 --test-samples 50 --attn-backend sdpa".split()
    arguments += ["--init-from", str(run), "--out", str(tuned)]
    assert train.main(arguments) == 0
    assert (tuned / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    tuned_results = json.loads((tuned / "results.json").read_text())
    assert tuned_results["config"]["init_from"] == str(run)
    assert tuned_results["config"]["model"]["d_model"] == 32
    before, after = (load_state(f / "best_model.pt") for f in (run, tuned))
    moved = (after["embedding"] - before["embedding"]).norm() / before["embedding"].norm()
    assert 0 < moved < 0.5
    fasttx.load(tuned, device="cpu").predict(["fine"])


def test_an_unbroken_run_and_a_resumed_one_are_the_same(tmp_path: Path, monkeypatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main(["pretrain", *QUICK, "--out", str(whole)]) == 0

    step, calls = MaskedTrainer._step, iter(range(1000))

    def until_interrupted(self, *arguments):
        step(self, *arguments)
        self._stop = next(calls) == 6  # in the middle of the second epoch

    monkeypatch.setattr(MaskedTrainer, "_step", until_interrupted)
    assert cli.main(["pretrain", *QUICK, "--out", str(parts)]) == 130
    monkeypatch.setattr(MaskedTrainer, "_step", step)
    assert not (parts / "results.json").exists()
    assert cli.main(["pretrain", "--resume", str(parts)]) == 0
    one, other = (load_state(f / "best_model.pt") for f in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_runs_of_the_two_kinds_are_told_apart(tmp_path: Path, capsys) -> None:
    run = tmp_path / "pretrained"
    assert cli.main(["pretrain", *QUICK, "--epochs", "1", "--out", str(run)]) == 0
    with pytest.raises(CheckpointError, match=r"a run of pretraining.*--init-from"):
        fasttx.load(run)
    assert train.main(["--resume", str(run)]) == 2
    assert "fasttx pretrain --resume" in capsys.readouterr().err

    assert train.main([*QUICK, "--d-model", "64", "--init-from", str(run)]) == 2
    message = capsys.readouterr().err
    assert "d_model is 64, and 32 in" in message
    assert "--d-model 32" in message
    assert train.main([*QUICK, "--init-from", str(tmp_path / "none")]) == 2
    assert "is no fasttx run" in capsys.readouterr().err


def test_resume_on_other_texts_is_refused(tmp_path: Path, capsys) -> None:
    folder, run = tmp_path / "texts", tmp_path / "run"
    folder.mkdir()
    rows = [json.dumps({"text": f"number {i} of many", "label": i % 2}) for i in range(40)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    arguments = [*SIZES, "--epochs", "1", "--dataset", str(folder), "--out", str(run)]
    assert cli.main(["pretrain", *arguments]) == 0
    (run / "results.json").unlink()
    (folder / "train.jsonl").write_text("\n".join(rows[1:]))
    assert cli.main(["pretrain", "--resume", str(run)]) == 2
    assert "was made with other texts" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--resume", str(run), "--lr", "1"])
    assert "leave out --lr" in capsys.readouterr().err


def test_a_share_that_cannot_be_is_refused() -> None:
    with pytest.raises(fasttx.config.ConfigError, match="mask_share is 1"):
        PretrainConfig(mask_share=1.0)


def test_batches_come_in_few_sizes_where_shapes_are_kept(tmp_path: Path) -> None:
    """torch keeps a kernel for every shape of a bfloat16 product on a CPU."""
    examples = Examples(ragged(), np.zeros(400, dtype=np.int64))

    def sizes(precision: str) -> tuple[set[int], set[int]]:
        config = PretrainConfig(precision=precision, model=MODEL)
        run = RunConfig(config, "reference", "cpu", (), {})
        trainer = MaskedTrainer(
            MaskedLanguageModel(MODEL), run, RunFolder(tmp_path), torch.device("cpu"), Processes()
        )
        batches = [trainer.batch(examples, np.arange(i, i + 60), (0, i)) for i in range(0, 300, 20)]
        for batch in batches:
            assert batch.rows is not None and batch.labels is not None
            assert len(batch.rows) == len(batch.labels)
        return {len(b.input_ids) for b in batches}, {len(b.rows) for b in batches}  # type: ignore[arg-type]

    tokens, words = sizes("bf16")
    assert all(n % 128 == 0 for n in tokens)
    assert all(n % 32 == 0 and n for n in words)
    tokens, words = sizes("fp32")
    assert any(n % 128 for n in tokens)
    assert any(n % 32 for n in words)


# --- the texts ------------------------------------------------------------------------------------


def test_texts_are_those_of_train_and_the_unlabelled_ones(tmp_path: Path) -> None:
    def rows(words: list[str], **more) -> str:
        return "\n".join(json.dumps({"text": w, **more}) for w in words)

    (tmp_path / "train.jsonl").write_text(rows(["a", "b"], label=1))
    (tmp_path / "test.jsonl").write_text(rows(["secret"], label=1))
    (tmp_path / "validation.jsonl").write_text(rows(["also secret"], label=0))
    (tmp_path / "unsupervised.jsonl").write_text(rows(["c"]))  # has no column of labels
    (tmp_path / "unlabeled-00000-of-00001.jsonl").write_text(rows(["d"], label=-1))
    texts, notes = data.load_texts(str(tmp_path))
    assert sorted(texts) == ["a", "b", "c", "d"]
    assert any("2 texts" in note and "train" in note for note in notes)
    assert any("1 texts" in note and "unsupervised.jsonl" in note for note in notes)
    assert data.load_texts(str(tmp_path), unlabelled=False)[0] == ["a", "b"]


def test_texts_of_the_original_archive(tmp_path: Path) -> None:
    for name, text in (("pos/0_9", "good"), ("neg/0_1", "bad"), ("unsup/0_0", "either")):
        path = tmp_path / "train" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    texts, _ = data.load_texts(str(tmp_path))
    assert sorted(texts) == ["bad", "either", "good"]


def test_unlabelled_texts_alone(tmp_path: Path) -> None:
    """They are enough to pretrain on, and not to train on."""
    (tmp_path / "unsupervised.csv").write_text("text\na\nb\n")
    texts, notes = data.load_texts(str(tmp_path))
    assert texts == ["a", "b"]
    assert len(notes) == 1
    with pytest.raises(DataError, match="no train split.*leave out --no-unlabelled"):
        data.load_texts(str(tmp_path), unlabelled=False)
    with pytest.raises(DataError, match="has no train split"):
        data.load(TrainConfig(dataset=str(tmp_path)))


def test_the_column_of_labels_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,a,b\nfine,1,2\n")
    with pytest.raises(DataError, match="--label-column"):
        data.load_texts(str(tmp_path))
    assert data.load_texts(str(tmp_path), label_column="a")[0] == ["fine"]


def test_no_column_of_texts_is_named(tmp_path: Path) -> None:
    (tmp_path / "unsupervised.jsonl").write_text(json.dumps({"foo": "a", "bar": "b"}))
    with pytest.raises(DataError, match=r"'foo', 'bar'.*--text-column"):
        data.load_texts(str(tmp_path))


def test_windows_hold_every_word_once() -> None:
    ids = RaggedIds.from_lists([list(range(n)) for n in (5, 0, 6, 7, 12, 13)])
    pieces, owner = ids.windows(6)
    assert owner.tolist() == [0, 1, 2, 3, 3, 4, 4, 5, 5, 5]
    assert pieces.lengths.tolist() == [5, 0, 6, 3, 4, 6, 6, 4, 4, 5]
    assert np.array_equal(pieces.values, ids.values)
    assert pieces[3].tolist() == [0, 1, 2]
    assert pieces[4].tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("arguments", "dataset", "recipe"),
    [
        (["--init-from", "runs/words"], "imdb", "finetune"),
        (["--init-from", "runs/words"], "demo", "demo"),
        (["--init-from", "runs/words", "--recipe", "seed"], "imdb", "seed"),
        ([], "imdb", "full"),
    ],
)
def test_the_recipe_for_a_pretrained_encoder(
    arguments: list[str], dataset: str, recipe: str
) -> None:
    assert cli.train_options([*arguments, "--dataset", dataset]).recipe_for(dataset) == recipe
