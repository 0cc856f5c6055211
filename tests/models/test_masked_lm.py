"""The masked language model: what is hidden, what it computes, and its loss."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fasttx.config import ModelConfig
from fasttx.models.classifier import TransformerClassifier
from fasttx.models.linear_cross_entropy import linear_cross_entropy
from fasttx.models.masked_lm import MaskedLanguageModel, mask_words
from fasttx.text.packing import RaggedIds, pack
from fasttx.text.tokenizer import UNK_ID
from fasttx.training.checkpoint import load_encoder

MODEL = ModelConfig(
    vocab_size=50, d_model=32, num_heads=4, num_layers=2, d_ff=64, max_len=40,
    attn_backend="reference",
)  # fmt: skip


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
    torch.save(pretrained.state_dict(), tmp_path / "best_model.pt")
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
