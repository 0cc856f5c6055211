"""Pretrained encoders of the BERT family: Hugging Face's folders, as fasttx' own weights.

A folder holds config.json, the weights (model.safetensors, whole or in parts, or pytorch_model.bin)
and tokenizer.json. A text here is one segment, so the row of its token type is part of every
position.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttx.config import ModelConfig
from fasttx.errors import CheckpointError, ConfigError, first_line

# --- the families ---------------------------------------------------------------------------------

_BERT_BLOCK = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "out": ("attention.output.dense",),
    "norm1": ("attention.output.LayerNorm",),
    "up": ("intermediate.dense",),
    "down": ("output.dense",),
    "norm2": ("output.LayerNorm",),
}
_BERT_SETTINGS = {
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "d_ff": "intermediate_size",
    "activation": "hidden_act",
}


@dataclass(frozen=True)
class Family:
    """How a `model_type` of transformers names its settings and weights.

    dense, classify: the classifier's head, dense in the order of preference. masked: dense layer,
    norm and bias of the language model's head. block: the parts of our block, and what is stacked
    to make them. skips_padding: positions begin behind the padding id.
    """

    head_activation: str
    dense: tuple[str, ...]
    classify: str
    masked: tuple[str, str, str]
    layers: str = "encoder.layer"
    block: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _BERT_BLOCK)
    settings: Mapping[str, str] = field(default_factory=lambda: _BERT_SETTINGS)
    pad_id: int = 0
    skips_padding: bool = False


_BERT = Family(
    head_activation="tanh",
    dense=("pooler.dense",),
    classify="classifier",
    masked=(
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.bias",
    ),
)
_ROBERTA = Family(
    head_activation="tanh",
    dense=("classifier.dense", "pooler.dense"),
    classify="classifier.out_proj",
    masked=("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    pad_id=1,
    skips_padding=True,
)
_ELECTRA = Family(
    head_activation="gelu",
    dense=("classifier.dense",),
    classify="classifier.out_proj",
    masked=(
        "generator_predictions.dense",
        "generator_predictions.LayerNorm",
        "generator_lm_head.bias",
    ),
)
_DISTILBERT = Family(
    head_activation="relu",
    dense=("pre_classifier",),
    classify="classifier",
    masked=("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
    layers="transformer.layer",
    block={
        "qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "out": ("attention.out_lin",),
        "norm1": ("sa_layer_norm",),
        "up": ("ffn.lin1",),
        "down": ("ffn.lin2",),
        "norm2": ("output_layer_norm",),
    },
    settings={
        "d_model": "dim",
        "num_heads": "n_heads",
        "num_layers": "n_layers",
        "d_ff": "hidden_dim",
        "activation": "activation",
    },
)
# MiniLM is a BERT.
FAMILIES = {
    "bert": _BERT,
    "distilbert": _DISTILBERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": _ELECTRA,
}

# Why others are not, where the reason is known.
_OTHERS = {
    "albert": "its layers share one set of weights",
    "deberta": "its attention has terms of relative positions",
    "deberta-v2": "its attention has terms of relative positions",
    "modernbert": "it has rotary positions, gated MLPs and local attention",
    "mpnet": "its attention has a relative position bias",
    "nomic_bert": "it has rotary positions and gated MLPs",
    "roberta-prelayernorm": "its blocks are others than RoBERTa's",
    "xlm-roberta-xl": "its blocks are others than XLM-RoBERTa's",
    "xlnet": "its attention has terms of relative positions",
}
_ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "relu": "relu"}

WORDS, POSITIONS = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
_TYPES = "embeddings.token_type_embeddings.weight"
WHOLE, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


# --- a folder -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A folder that can be converted: the settings of its model, the names of its classes if it
    classifies, and the files of its weights."""

    folder: Path
    family: Family
    config: ModelConfig
    label_names: tuple[str, ...]
    files: tuple[Path, ...]

    def state(self) -> dict[str, Tensor]:
        """The encoder's weights, float32, by the names of `Encoder`. Beside them, where the
        checkpoint has them, those of two heads: `head.dense` and `head.classify` of
        `ClassifierHead`, and `masked.dense`, `masked.norm` and `masked.bias` of `MaskedHead`.

        Raises CheckpointError, naming the file, for what is damaged or missing.
        """
        theirs = _Weights(self)
        state = dict(theirs.encoder())
        for name in self.family.dense:
            if self.config.pooling == "cls" and theirs.has(name):
                state |= theirs.layer("head.dense", name)
                break
        if theirs.has(self.family.classify):
            state |= theirs.layer("head.classify", self.family.classify)
        dense, norm, bias = self.family.masked
        if theirs.has(dense):
            state |= theirs.layer("masked.dense", dense) | theirs.layer("masked.norm", norm)
            state["masked.bias"] = theirs.get(bias)
        return state


def read_folder(folder: Path) -> Pretrained:
    """A folder of Hugging Face's, whose weights are not read yet.

    Raises CheckpointError for a folder that lacks something, and ConfigError, with the reason, for
    a model that is not converted.
    """
    values = _read_json(folder / "config.json")
    kind = values.get("model_type")
    if kind not in FAMILIES:
        reason = _OTHERS.get(str(kind))
        because = f": {reason}" if reason else ""
        raise ConfigError(
            f"{folder} holds a model of the type {kind!r}, which is not converted{because}. "
            f"Expected one of {', '.join(FAMILIES)}. Some others can have fasttx' attention where "
            "they are: import fasttx.hf"
        )
    family = FAMILIES[kind]
    names = values.get("id2label") or {}
    names = tuple(str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0])))
    config = _model_config(folder, values, family, max(1, len(names) or 2))
    return Pretrained(folder, family, config, names, weight_files(folder))


def _model_config(
    folder: Path, values: Mapping[str, Any], family: Family, classes: int
) -> ModelConfig:
    path = folder / "config.json"
    found = {ours: values.get(theirs) for ours, theirs in family.settings.items()}
    found |= {"vocab_size": values.get("vocab_size")}
    rows = values.get("max_position_embeddings")
    names = {**family.settings, "vocab_size": "vocab_size"}
    missing = [names[ours] for ours, value in found.items() if value is None]
    if missing or not isinstance(rows, int):
        lacking = ", ".join(missing) or "max_position_embeddings"
        raise CheckpointError(f"{path} lacks {lacking}; expected the settings of the model")
    for name, wanted in _PLAIN.items():
        if values.get(name, wanted) not in (wanted, None):
            raise ConfigError(
                f"{path}: {name} is {values[name]!r}, which is not converted; expected {wanted!r}. "
                "Train such a model with transformers itself"
            )
    activation = str(found["activation"])
    if activation not in _ACTIVATIONS:
        raise ConfigError(
            f"{path}: {family.settings['activation']} is {activation!r}, which is not converted; "
            f"expected {' or '.join(_ACTIVATIONS)}. Train such a model with transformers itself"
        )
    pad = values.get("pad_token_id")
    pad = family.pad_id if pad is None else pad
    width, d_model = values.get("embedding_size"), found["d_model"]
    try:
        return ModelConfig(
            **found | {"activation": _ACTIVATIONS[activation]},  # type: ignore[arg-type]
            num_classes=classes,
            max_len=rows - (pad + 1 if family.skips_padding else 0),
            norm_first=False,
            positions="learned",
            embedding_norm=True,
            embedding_size=None if width == d_model else width,
            norm_eps=float(values.get("layer_norm_eps", 1e-12)),
            pad_id=pad,
            pooling=_pooling(folder),
            head_activation=family.head_activation if _pooling(folder) == "cls" else "gelu",
        )
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


# What a model that is converted has, where its config.json says anything of it.
_PLAIN = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}


def _pooling(folder: Path) -> str:
    """`mean` where sentence-transformers has trained it so, else the first row, as transformers'
    classifiers."""
    path = folder / "1_Pooling" / "config.json"
    mean = path.exists() and _read_json(path).get("pooling_mode_mean_tokens") is True
    return "mean" if mean else "cls"


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold the weights. Raises CheckpointError where there are none."""
    for name in (WHOLE, INDEX, PICKLED):
        if (folder / name).exists():
            break
    else:
        raise CheckpointError(
            f"{folder} holds no weights; expected {WHOLE}, {INDEX} or {PICKLED}. In Python "
            "`model.save_pretrained(folder)` of transformers writes the first"
        )
    if name != INDEX:
        return (folder / name,)
    parts = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise CheckpointError(f"{folder / INDEX} names no files of weights; download it again")
    paths = tuple(folder / str(part) for part in sorted(set(parts.values())))
    missing = [path.name for path in paths if path.parent != folder or not path.exists()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:3])}, which {INDEX} names")
    return paths


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist; expected a run of fasttx, or a folder that transformers' "
            "`save_pretrained` wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): fetch it anew") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no settings; expected a JSON object")
    return values


# --- weights --------------------------------------------------------------------------------------


class _Weights:
    """The tensors of a checkpoint by their names in the bare encoder: what a head puts before them
    (`bert.`) is taken off, and names of the first BERT (gamma, beta) are today's."""

    def __init__(self, of: Pretrained) -> None:
        self._of = of
        tensors: dict[str, Tensor] = {}
        for path in of.files:
            tensors |= _tensors(path)
        tensors = {_renamed(name): x for name, x in tensors.items()}
        prefix = next((n.removesuffix(WORDS) for n in tensors if n.endswith(WORDS)), "")
        self._tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}

    def has(self, layer: str) -> bool:
        return f"{layer}.weight" in self._tensors

    def get(self, name: str) -> Tensor:
        x = self._tensors.get(name)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise CheckpointError(
                f"{self._of.files[0]} lacks the weight {name}; expected those of the model that "
                f"{self._of.folder / 'config.json'} describes"
            )
        return x.float()

    def layer(self, ours: str, *theirs: str) -> dict[str, Tensor]:
        """Weight and bias of a layer, or of several that are stacked."""
        kinds = ("weight", "bias")
        return {f"{ours}.{k}": torch.cat([self.get(f"{t}.{k}") for t in theirs]) for k in kinds}

    def encoder(self) -> Iterator[tuple[str, Tensor]]:
        config, family = self._of.config, self._of.family
        yield "embedding", self.get(WORDS)
        positions = self.get(POSITIONS)[-config.max_len :]
        if _TYPES in self._tensors:
            positions = positions + self.get(_TYPES)[0]
        yield "positions", positions
        yield from self.layer("embedding_norm", "embeddings.LayerNorm").items()
        if config.embedding_size is not None:
            yield from self.layer("embedding_projection", "embeddings_project").items()
        for i in range(config.num_layers):
            for ours, theirs in family.block.items():
                names = (f"{family.layers}.{i}.{name}" for name in theirs)
                yield from self.layer(f"blocks.{i}.{ours}", *names).items()


def _renamed(name: str) -> str:
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix != ".safetensors":
            # Pickles may run code of their own; this loader reads tensors only.
            found = torch.load(path, map_location="cpu", weights_only=True)
        else:
            found = load_safetensors()(path)
    except ConfigError:
        raise
    except Exception as error:  # bad bytes make the readers raise many kinds
        raise CheckpointError(
            f"{path} cannot be read as weights ({first_line(error)}): fetch it anew"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}; expected named tensors")
    return found


def load_safetensors() -> Any:
    """The function `safetensors.torch.load_file`. Raises ConfigError where it is missing."""
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ConfigError(
            "reading pretrained weights needs the package safetensors, which is not installed: "
            "pip install 'fasttx[hf]'"
        ) from error
    return load_file
