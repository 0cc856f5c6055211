"""What lies beside an exported model: the tokenizer's ids, what it cannot say, the example."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import fasttx
from fasttx.export import beside
from fasttx.load import TextClassifier
from fasttx.text.pieces import PieceTokenizer

tokenizers = pytest.importorskip("tokenizers")
RUN = Path(__file__).resolve().parents[1] / "data" / "runs" / "classification-finished"
TEXTS = [
    "a wonderful film", "<PAD> it <UNK> dull, don't [SEP] <s>", "", "  ", "bore film dull " * 30,
    "👍🏽 <br/> \u2019", "goodness, what a film: the finest story; believable and good " * 3,
]  # fmt: skip


@pytest.fixture(scope="module")
def words() -> TextClassifier:
    return fasttx.load(RUN, device="cpu")


def pieces(folder: Path, kind: str, **changes: object) -> TextClassifier:
    folders = pytest.importorskip("tests.pretrained_folders")
    folders.write_tokenizer(folder, kind)
    tokenizer = PieceTokenizer.load(folder / "tokenizer.json")
    model = fasttx.TransformerClassifier(
        len(tokenizer), 2, 8, 1, 1, 8, 16, attn_backend="reference",
        pad_id=1 if "roberta" in kind else 0,
    ).eval()  # fmt: skip
    reading = {"truncation": "head", "long_texts": "cut"} | changes
    return TextClassifier(model, tokenizer, ("a", "b"), device=torch.device("cpu"), **reading)


def padded_ids(classifier: TextClassifier, texts: list[str]) -> list[list[int]]:
    """What a reader of the exported tokenizer.json gets, padding taken off."""
    theirs = tokenizers.Tokenizer.from_str(beside.tokenizer_json(classifier))
    encoded = theirs.encode_batch(texts)
    assert len({len(e.ids) for e in encoded}) == 1
    pad = classifier.model.config.pad_id
    for e in encoded:
        assert all(i == pad for i, m in zip(e.ids, e.attention_mask, strict=True) if not m)
    return [[i for i, m in zip(e.ids, e.attention_mask, strict=True) if m] for e in encoded]


@pytest.mark.parametrize("truncation", ["head", "tail"])
def test_words_are_read_and_cut_as_by_the_run(words, truncation):
    classifier = dataclasses.replace(words, truncation=truncation)
    assert padded_ids(classifier, TEXTS) == [ids.tolist() for ids in classifier.encode(TEXTS)]
    assert beside.notes(classifier, beside.tokenizer_json(classifier)) == []


@pytest.mark.parametrize("truncation", ["head", "tail"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_pieces_are_read_and_cut_as_by_the_run(tmp_path, kind, truncation):
    classifier = pieces(tmp_path, kind, truncation=truncation)
    assert padded_ids(classifier, TEXTS) == [ids.tolist() for ids in classifier.encode(TEXTS)]
    assert beside.notes(classifier, beside.tokenizer_json(classifier)) == []


def test_what_a_tokenizer_json_cannot_say_is_noted(words, tmp_path):
    """Both ends of a text; windows; Unigram's vocabulary, which holds the special tokens."""
    both = dataclasses.replace(words, truncation="head+tail", long_texts="windows")
    first, second = beside.notes(both, beside.tokenizer_json(both))
    assert "the beginning and the end" in first and "more than 16 tokens" in first
    assert "windows" in second
    fits = [text for text in TEXTS if len(text) < 60]
    assert padded_ids(both, fits) == [ids.tolist() for ids in both.encode(fits)]
    unigram = pieces(tmp_path, "xlm-roberta")
    (note,) = beside.notes(unigram, beside.tokenizer_json(unigram))
    assert "that somebody typed" in note
    fits = [text for text in TEXTS if "<s>" not in text]
    assert padded_ids(unigram, fits) == [ids.tolist() for ids in unigram.encode(fits)]


@pytest.mark.parametrize("form", ["onnx", "torch-export", "aoti"])
@pytest.mark.parametrize(
    "problem", ["single_label_classification", "multi_label_classification", "regression"]
)
def test_the_example_is_at_most_15_lines(form, problem):
    source = beside.example_py(form, problem)
    assert len(source.splitlines()) <= 15
    compile(source, "example.py", "exec")
    assert "fasttx" not in source and ("torch" in source) == (form != "onnx")
