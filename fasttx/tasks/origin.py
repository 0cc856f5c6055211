"""What an encoder starts from (`--init-from`): a run of fasttx, or a pretrained encoder of Hugging
Face's, in a folder or on its hub."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import nn

from fasttx.config import ENCODER_SHAPE, HEAD_SHAPE, ModelConfig
from fasttx.errors import CheckpointError, ConfigError, first_line
from fasttx.models.pretrained import INDEX, PICKLED, WHOLE, Pretrained, read_folder
from fasttx.tasks import read_config
from fasttx.text.corpora import hub_unreachable
from fasttx.text.pieces import AnyTokenizer, PieceTokenizer
from fasttx.training.checkpoint import fit_weights, load_encoder, load_state, load_tokenizer
from fasttx.training.folder import RunFolder, digest_of


class Origin(ABC):
    """model: the settings of its encoder."""

    model: ModelConfig
    place: Path  # of its settings, for messages

    def settings(self, model: ModelConfig) -> ModelConfig:
        """`model`, with the shape of this encoder, and no longer texts than that has learnt."""
        theirs = {name: getattr(self.model, name) for name in (*ENCODER_SHAPE, *HEAD_SHAPE)}
        if self.model.positions == "learned":
            theirs["max_len"] = min(model.max_len, self.model.max_len)
        return ModelConfig(**{**vars(model), **theirs})

    def check(self, model: ModelConfig) -> None:
        """Raises ConfigError for a model that cannot take this encoder."""
        for name in ENCODER_SHAPE:
            there, here = getattr(self.model, name), getattr(model, name)
            if there != here:
                raise ConfigError(
                    f"{name} is {here}, and {there} in {self.place}; expected the same encoder. "
                    f"Pass --{name.replace('_', '-')} {there}"
                )
        if model.positions == "learned" and model.max_len > self.model.max_len:
            raise ConfigError(
                f"max_len is {model.max_len}, and {self.place} has learnt {self.model.max_len} "
                f"positions; expected at most as many. Pass --max-len {self.model.max_len}"
            )

    @abstractmethod
    def tokenizer(self) -> AnyTokenizer:
        """Raises TokenizerError, CheckpointError."""

    @abstractmethod
    def sha256(self) -> str:
        """Of its weights, after a look that they can be read."""

    @abstractmethod
    def start(self, model: nn.Module, sha256: str | None) -> None:
        """Its weights into `model`; sha256: of those that are expected."""


class RunOrigin(Origin):
    """A run: all weights but the head's."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.place = folder, folder.config
        self.model = read_config(folder.config, "classification", "pretraining").train.model

    def tokenizer(self) -> AnyTokenizer:
        if not self.folder.best_model.exists():
            raise CheckpointError(
                f"{self.folder.best_model} does not exist: that run has not finished an epoch. Go "
                "on with it first, or start from another run"
            )
        return load_tokenizer(self.folder, self.model.vocab_size)

    def sha256(self) -> str:
        load_state(self.folder.best_model)
        return digest_of(self.folder.best_model)

    def start(self, model: nn.Module, sha256: str | None) -> None:
        load_encoder(model, self.folder.best_model, sha256)


class PretrainedOrigin(Origin):
    """A folder of Hugging Face's. A head's weights come along where the new head is the same: the
    first layer of a classifier's, all of a language model's. What names classes is always new."""

    def __init__(self, found: Pretrained) -> None:
        self.found, self.place, self.model = found, found.folder / "config.json", found.config

    def tokenizer(self) -> AnyTokenizer:
        path = self.found.folder / "tokenizer.json"
        tokenizer = PieceTokenizer.load(path)
        if len(tokenizer) > self.model.vocab_size:
            raise CheckpointError(
                f"{path} has ids up to {len(tokenizer) - 1:,}, and the embedding of {self.place} "
                f"{self.model.vocab_size:,} rows: they do not belong together. Expected the "
                "tokenizer of that encoder"
            )
        return tokenizer

    def sha256(self) -> str:
        self.found.state()
        digests = [digest_of(path) for path in self.found.files]
        return digests[0] if len(digests) == 1 else _sha256("".join(digests))

    def start(self, model: nn.Module, sha256: str | None) -> None:
        if sha256 is not None and self.sha256() != sha256:
            raise CheckpointError(
                f"{self.found.files[0]} is not the file that this run started from: it was "
                "replaced. Bring it back, or start a new run"
            )
        state, wanted = self.found.state(), model.state_dict()
        if "positions" in wanted:
            state["positions"] = state["positions"][: len(wanted["positions"])]
        state |= {f"head.{k[7:]}": state.pop(k) for k in [*state] if k.startswith("masked.")}
        classifies = "head.classify.weight" in wanted
        same = not classifies or _head(model) == _head(self.found)
        own = {
            name: x
            for name, x in wanted.items()
            if name.startswith("head.")
            and (
                not same or "classify" in name or name not in state or state[name].shape != x.shape
            )
        }
        theirs = {k: v for k, v in state.items() if not k.startswith("head.") or k in wanted}
        fit_weights(model, theirs | own, self.found.files[0])


def _head(of: Any) -> tuple[str, str]:
    return of.config.pooling, of.config.head_activation


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- by name --------------------------------------------------------------------------------------

_HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def is_on_hub(name: str) -> bool:
    """Whether this is no folder here, but may be a model of the hub."""
    return not Path(name).exists() and _HUB_NAME.fullmatch(name) is not None


def find_origin(name: str) -> Origin:
    """The run, or the pretrained encoder, of this folder or name. Raises FasttxError."""
    name = os.path.expanduser(name)
    if not is_pretrained(name):
        return RunOrigin(RunFolder(Path(name)))
    return PretrainedOrigin(read_folder(_from_hub(name) if is_on_hub(name) else Path(name)))


def is_pretrained(name: str) -> bool:
    """Whether this is a folder of Hugging Face's, by its config.json, or a name on its hub."""
    config = Path(os.path.expanduser(name)) / "config.json"
    return is_on_hub(name) or (config.exists() and b'"model_type"' in config.read_bytes())


@functools.lru_cache(maxsize=4)  # a run asks several times
def _from_hub(name: str) -> Path:
    """The folder of a model of the hub in the local cache, fetched where it is not there."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{name} is no folder here, and fetching it from the hub needs the package "
            "huggingface_hub, which is not installed: pip install 'fasttx[hf]'"
        ) from error
    unreachable = hub_unreachable()

    def fetch(*patterns: str) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=list(patterns), local_files_only=bool(unreachable)
            )
        )

    try:
        folder = fetch("config.json", "tokenizer.json", WHOLE, INDEX, "model-*.safetensors",
                       "1_Pooling/config.json")  # fmt: skip
        if not any((folder / weights).exists() for weights in (WHOLE, INDEX)):
            folder = fetch("config.json", PICKLED)
    except Exception as error:  # the hub and the network raise many kinds
        reason = first_line(error)
        if unreachable:
            reason = f"{unreachable}, and the local cache does not hold it"
        raise CheckpointError(
            f"{name} is no folder here, and could not be had from Hugging Face's hub: {reason}. "
            "Check the name, connect to the network once, or pass a folder"
        ) from error
    return folder
