"""A run as a model of transformers: the same bits, in AutoModel, pipeline and Trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fasttx
from fasttx.errors import CheckpointError, ConfigError
from tests.hf.models import transformers

import fasttx.hf  # isort: skip
from fasttx.hf import FasttxConfig, FasttxForSequenceClassification, PackingCollator

pytestmark = pytest.mark.xdist_group("transformers")

RUN = Path(__file__).resolve().parents[1] / "data" / "runs" / "classification-finished"
TEXTS = [
    "a wonderful film",
    "<PAD> it <UNK> dull, don't [SEP]",
    "",
    "bore " * 30,
    "👍🏽 <br/> \u2019",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return fasttx.hf.save_run(RUN, tmp_path_factory.mktemp("hub") / "imdb")


@pytest.fixture(scope="module")
def ours():
    return fasttx.load(RUN)


def test_the_round_trip_keeps_every_bit(folder, ours, tmp_path):
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder)
    assert type(model) is FasttxForSequenceClassification
    model.save_pretrained(tmp_path)
    for again in (model, auto.from_pretrained(tmp_path)):
        found = again.classifier.state_dict()
        assert found.keys() == ours.model.state_dict().keys()
        for name, weight in ours.model.state_dict().items():
            assert torch.equal(found[name], weight)
        assert torch.equal(again.classifier.positions, ours.model.positions)
    assert model.config.id2label == dict(enumerate(ours.label_names))
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_the_tokenizer_reads_every_text_as_ours(folder, ours):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        wanted = ours.encode([text])[0].tolist()
        assert theirs(text, truncation=True)["input_ids"] == wanted
    assert theirs.pad_token_id == 0 and theirs.model_max_length == ours.model.config.max_len


def test_a_pipeline_says_what_the_library_says(folder, ours):
    classify = transformers.pipeline("text-classification", str(folder), truncation=True)
    for found, wanted in zip(classify(TEXTS, batch_size=3), ours.predict(TEXTS), strict=True):
        assert found["label"] == wanted.label
        assert found["score"] == pytest.approx(wanted.probability, abs=1e-5)
    with pytest.raises(ConfigError, match="truncation=True"):
        transformers.pipeline("text-classification", str(folder))("word " * 500)


def test_packed_and_padded_batches_are_equal(folder):
    model = FasttxForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    features = [{"input_ids": tokenizer(t, truncation=True)["input_ids"], "label": i % 2}
                for i, t in enumerate(TEXTS)]  # fmt: skip
    packed = PackingCollator(model.config)(features)
    assert packed["input_ids"].shape[0] == 1 and packed["labels"].tolist() == [0, 1, 0, 1, 0]
    assert next(iter(packed)) == "labels"
    padded = tokenizer(TEXTS, truncation=True, padding=True, return_tensors="pt")
    wanted = model(**padded, labels=packed["labels"])
    found = model(**packed)
    torch.testing.assert_close(found.logits, wanted.logits)
    torch.testing.assert_close(found.loss, F.cross_entropy(wanted.logits, packed["labels"]))
    assert torch.equal(model(**packed, return_dict=False)[1], found.logits)


def test_trainer_learns_from_packed_batches(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"input_ids": (rng.integers(2, 30, rng.integers(1, 9)) + 30 * (i % 2)).tolist(),
         "label": i % 2}
        for i in range(120)
    ]  # fmt: skip
    sizes = {"vocab_size": 64, "d_model": 32, "num_heads": 2, "num_layers": 1, "d_ff": 32,
             "max_len": 8, "dropout": 0.0}  # fmt: skip
    torch.manual_seed(0)
    model = FasttxForSequenceClassification(FasttxConfig(sizes))
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=16, per_device_eval_batch_size=16, max_steps=60,
        learning_rate=5e-3, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, data_collator=PackingCollator(model.config), train_dataset=rows,
        eval_dataset=rows[:50],
        compute_metrics=lambda p: {
            "accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean()),
            "texts": len(p.label_ids),
        },
    )  # fmt: skip
    trainer.train()
    measured = trainer.evaluate()
    assert measured["eval_texts"] == 50
    assert measured["eval_accuracy"] > 0.9


@pytest.mark.parametrize(
    ("kind", "labels", "loss"),
    [
        ("regression", [[0.5], [-1.0]], F.mse_loss),
        ("multi_label_classification", [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]],
         F.binary_cross_entropy_with_logits),
    ],
)  # fmt: skip
def test_other_kinds_of_labels(kind, labels, loss):
    sizes = {"vocab_size": 20, "d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 16}
    config = FasttxConfig(sizes, problem_type=kind, num_labels=len(labels[0]))
    model = FasttxForSequenceClassification(config).eval()
    rows = [{"input_ids": [2, 3], "labels": x} for x in labels]
    packed = PackingCollator(config)(rows)
    found = model(**packed)
    torch.testing.assert_close(found.loss, loss(found.logits, torch.tensor(labels)))


def test_other_classes_get_a_layer_of_their_own(folder):
    model = FasttxForSequenceClassification.from_pretrained(
        folder, num_labels=5, ignore_mismatched_sizes=True
    )
    whole = FasttxForSequenceClassification.from_pretrained(folder)
    assert model.classifier.head.classify.weight.shape[0] == 5
    assert model.classifier.head.classify.weight.abs().max() < 1
    assert torch.equal(model.classifier.embedding, whole.classifier.embedding)
    assert model(torch.tensor([[2, 3]])).logits.shape == (1, 5)


def test_the_model_card_has_what_was_measured(folder):
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert results.keys() == {"accuracy", "f1"}
    assert f"{results['accuracy']:.2%}" in card.text and "pipeline(" in card.text


def test_a_folder_that_holds_something_is_refused(folder):
    with pytest.raises(CheckpointError, match="expected a new or an empty folder"):
        fasttx.hf.save_run(RUN, folder)


def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        fasttx.hf.save_run(RUN, tmp_path / "out")
    assert not list(tmp_path.iterdir())
