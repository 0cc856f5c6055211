"""Converted encoders against transformers' own: hidden states, logits, gradients; and folders that
cannot be converted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttx.errors import CheckpointError, ConfigError
from fasttx.models.classifier import TransformerClassifier
from fasttx.models.masked_lm import MaskedLanguageModel
from fasttx.models.pretrained import read_folder
from tests.backends import over_backends
from tests.pretrained_folders import FAMILIES, change_config, minilm, transformers, write

over_families = pytest.mark.parametrize("kind", FAMILIES)


def a_batch(vocabulary: int, length: int = 20) -> tuple[Tensor, Tensor]:
    """Ids (3, L) without special ones, and a mask that leaves texts of three lengths."""
    ids = torch.randint(5, vocabulary, (3, length), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([[length], [length // 2], [1]])
    return ids, (torch.arange(length) < lengths).long()


def classifier_of(folder: Path, backend: str = "reference") -> TransformerClassifier:
    found = read_folder(folder)
    model = TransformerClassifier.from_config(replace(found.config, attn_backend=backend)).eval()
    state = {k: v for k, v in found.state().items() if not k.startswith("masked.")}
    model.load_state_dict(state)
    return model


def rows(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[mask.bool()]


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@over_families
def test_logits_and_gradients_are_transformers_own(kind, tmp_path):
    theirs = write(tmp_path, kind)
    ours = classifier_of(tmp_path, "cpu")
    ids, mask = a_batch(theirs.config.vocab_size)
    if kind in ("roberta", "xlm-roberta"):  # whose model takes positions from ids
        ids[mask == 0] = 1
    expected, logits = theirs(input_ids=ids, attention_mask=mask).logits, ours(ids, mask)
    assert expected.abs().max() > 0.1
    assert_equal(logits, expected)
    assert logits.shape == (3, 3)

    weight = torch.linspace(-1, 1, 9).view(3, 3)
    (expected * weight).sum().backward()
    (logits * weight).sum().backward()
    their_gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    # Under the names of weights: the conversion is applied to the gradients too.
    found = read_folder(tmp_path)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(their_gradients.get(name, torch.zeros_like(p)))
            if "token_type" in name:  # positions have the gradients of both
                p.zero_()
    theirs.save_pretrained(tmp_path)
    wanted = {k: v for k, v in found.state().items() if not k.startswith("masked.")}
    gradients = {n: p.grad for n, p in ours.named_parameters()}
    assert wanted.keys() == gradients.keys()
    for name, g in gradients.items():
        scale = max(1.0, float(wanted[name].abs().max()))
        torch.testing.assert_close(g / scale, wanted[name] / scale, rtol=1e-5, atol=1e-5, msg=name)


@over_families
def test_hidden_states_are_transformers_own(kind, tmp_path):
    theirs = write(tmp_path, kind, head="none")
    found = read_folder(tmp_path)
    ours = TransformerClassifier.from_config(replace(found.config, attn_backend="cpu")).eval()
    missing, unexpected = ours.load_state_dict(found.state(), strict=False)
    assert not unexpected
    assert all(name.startswith("head.") for name in missing)
    ids, mask = a_batch(theirs.config.vocab_size)
    if kind in ("roberta", "xlm-roberta"):
        ids[mask == 0] = 1
    expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    assert_equal(ours.encode(ids, mask).n, rows(expected, mask))


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra"])
def test_words_are_named_as_transformers_does(kind, tmp_path):
    theirs = write(tmp_path, kind, head="masked")
    found = read_folder(tmp_path)
    ours = MaskedLanguageModel(replace(found.config, attn_backend="reference")).eval()
    state = {k.replace("masked.", "head."): v for k, v in found.state().items()}
    ours.load_state_dict({k: v for k, v in state.items() if k in ours.state_dict()})
    ids, mask = a_batch(theirs.config.vocab_size)
    if kind == "roberta":
        ids[mask == 0] = 1
    lengths = mask.sum(1)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    packed = ids[mask.bool()]
    logits = ours(packed, rows=torch.arange(len(packed)), cu_seqlens=cu_seqlens)
    expected = theirs(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits, rows(expected, mask), rtol=1e-5, atol=3e-5)


@pytest.mark.usefixtures("unlisted_backends")
@over_backends(dropout="shared")
def test_dropout_is_equal_between_backends(target, tmp_path):
    write(tmp_path, "electra")
    ids, mask = a_batch(40)
    seed, logits = torch.tensor(7), []
    for name, device in (("reference", "cpu"), (target.name, target.device)):
        model = classifier_of(tmp_path, name).to(device).train()
        logits.append(model(ids.to(device), mask.to(device), seed=seed.to(device)).cpu())
    torch.testing.assert_close(*logits, rtol=1e-4, atol=3e-5)
    assert not torch.allclose(logits[0], classifier_of(tmp_path)(ids, mask), atol=1e-2)


def test_the_real_minilm():
    folder = minilm()
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    found = read_folder(folder)
    assert found.config.pooling == "mean"  # by sentence-transformers' 1_Pooling
    ours = TransformerClassifier.from_config(replace(found.config, attn_backend="cpu")).eval()
    ours.load_state_dict(found.state(), strict=False)
    ids, mask = a_batch(30_000, 40)
    expected = rows(theirs(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
    hidden = ours.encode(ids, mask).n
    assert_equal(hidden, expected)
    weight = torch.linspace(-1, 1, hidden.shape[1])
    (hidden * weight).mean().backward()
    (expected * weight).mean().backward()
    assert_equal(ours.embedding.grad, theirs.embeddings.word_embeddings.weight.grad)
    up = theirs.encoder.layer[0].intermediate.dense
    assert_equal(ours.blocks[0].up.weight.grad, up.weight.grad)


# ------------------------------------------------------------------------------ other ways to write


def test_other_files_of_weights(tmp_path):
    """In parts, and pickled, under the names of the first BERT."""
    from safetensors.torch import load_file

    write(tmp_path)
    state = read_folder(tmp_path).state()
    whole = tmp_path / "model.safetensors"
    tensors = load_file(whole)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    assert len(read_folder(tmp_path / "parts").files) > 2
    whole.unlink()
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in tensors.items()}
    torch.save(old, tmp_path / "pytorch_model.bin")
    for folder in (tmp_path / "parts", tmp_path):
        found = read_folder(folder).state()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[k], state[k]) for k in state)


def test_half_precision_becomes_float32(tmp_path):
    write(tmp_path).half().save_pretrained(tmp_path)
    assert {x.dtype for x in read_folder(tmp_path).state().values()} == {torch.float32}


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model_type": "deberta-v2"}, ConfigError, r"'deberta-v2'.*terms of relative positions"),
        ({"model_type": "mpnet"}, ConfigError, r"'mpnet'.*relative position bias"),
        ({"model_type": "modernbert"}, ConfigError, r"'modernbert'.*rotary positions"),
        ({"model_type": "gpt2"}, ConfigError, r"'gpt2', which is not converted\. Expected one of"),
        ({"hidden_act": "gelu_new"}, ConfigError, "hidden_act is 'gelu_new'.*expected gelu"),
        ({"is_decoder": True}, ConfigError, "is_decoder is True"),
        ({"position_embedding_type": "relative_key"}, ConfigError, "'relative_key'.*'absolute'"),
        ({"num_attention_heads": None}, CheckpointError, "lacks num_attention_heads"),
        ({"num_attention_heads": 5}, CheckpointError, "is damaged.*num_heads is 5"),
        ({"hidden_size": "x"}, CheckpointError, "is damaged.*d_model is 'x'"),
    ],
)
def test_a_model_that_is_not_converted(changes: dict[str, Any], kind, message, tmp_path):
    write(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(kind, match=message):
        read_folder(tmp_path)


def test_a_folder_without_weights(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights; expected model\.safetensors"):
        read_folder(tmp_path)


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_pickles_run_no_code(tmp_path, monkeypatch):
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    torch.save({"x": _Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read as weights"):
        read_folder(tmp_path).state()
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file(name, tmp_path):
    write(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read.*fetch it anew"):
        read_folder(tmp_path).state()


def test_missing_weights(tmp_path):
    write(tmp_path)
    change_config(tmp_path, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"lacks the weight encoder\.layer\.2"):
        read_folder(tmp_path).state()
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors"}})
    )
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-1\.safetensors, which"):
        read_folder(tmp_path)


def test_without_safetensors(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ConfigError, match=r"needs the package safetensors.*fasttx\[hf\]"):
        read_folder(tmp_path).state()
