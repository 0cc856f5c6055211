"""A trained model with its tokenizer and label names: text in, label and probability out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fasttx import device as devices
from fasttx.errors import CheckpointError, TokenizerError
from fasttx.models.classifier import TransformerClassifier
from fasttx.text.packing import RaggedIds, pack
from fasttx.text.tokenizer import Tokenizer
from fasttx.training.checkpoint import CLASSIFICATION, RunConfig, RunFolder, load_weights


def by_length(ids: RaggedIds, batch_size: int) -> Iterator[np.ndarray]:
    """Index batches, longest texts first: a text's company does not change its logits, equal
    lengths side by side suit every device, and if memory does not suffice it fails early.
    """
    order = np.argsort(-ids.lengths, kind="stable")
    return (order[i : i + batch_size] for i in range(0, len(order), batch_size))


@torch.inference_mode()
def predict_logits(
    model: nn.Module, ids: RaggedIds, device: torch.device, *, batch_size: int = 64,
    precision: str = "fp32",
) -> Tensor:  # fmt: skip
    """Logits (texts, num_classes) fp32 on the CPU, in the order of `ids`; leaves eval mode on."""
    model.eval()
    rows: list[tuple[np.ndarray, Tensor]] = []
    for indices in by_length(ids, batch_size):
        multiple = devices.token_multiple(device, precision)
        batch = pack(ids.select(indices), token_multiple=multiple).to(device)
        with devices.autocast(device, precision):
            rows.append((indices, model(**batch.model_inputs()).float()))
    if not rows:
        return torch.empty(0, 0)
    order = torch.from_numpy(np.concatenate([indices for indices, _ in rows]))
    logits = torch.cat([r for _, r in rows]).cpu()  # one wait for the device, at the end
    return torch.empty_like(logits).index_copy_(0, order, logits)


def read(
    ids: RaggedIds, max_len: int, truncation: str, long_texts: str
) -> tuple[RaggedIds, np.ndarray | None]:
    """What the model reads of texts that it predicts, as TrainConfig has it: the ids, and of
    windows the text (windows,) that each belongs to."""
    if long_texts == "windows":
        return ids.windows(max_len)
    return ids.truncate(max_len, truncation), None


def mean_of_windows(logits: Tensor, owner: np.ndarray | None) -> Tensor:
    """(windows, num_classes) -> (texts, num_classes); every text has a window."""
    if owner is None or not len(owner):
        return logits
    of = torch.from_numpy(owner)
    sums = logits.new_zeros(int(owner[-1]) + 1, logits.shape[1]).index_add_(0, of, logits)
    return sums / torch.bincount(of)[:, None]


@dataclass(frozen=True)
class Prediction:
    """The likeliest label of a text, its probability, and those of all labels."""

    label: str
    probability: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class TextClassifier:
    """What `fasttx.load` gives: `model`, `tokenizer`, and `predict`."""

    model: TransformerClassifier
    tokenizer: Tokenizer
    label_names: tuple[str, ...]
    truncation: str
    long_texts: str
    device: torch.device

    def encode(self, texts: Sequence[str]) -> RaggedIds:
        """Token ids as the model was trained on them, truncation included: one sequence a text."""
        ids = self.tokenizer.encode_batch(texts)
        return ids.truncate(self.model.config.max_len, self.truncation)

    def read(self, ids: RaggedIds) -> tuple[RaggedIds, np.ndarray | None]:
        """What the model reads of the whole texts `ids`: see the function `read`."""
        return read(ids, self.model.config.max_len, self.truncation, self.long_texts)

    def logits(self, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """(texts, num_classes) fp32 on the CPU."""
        ids = self.tokenizer.encode_batch(texts)
        windows, owner = self.read(ids)
        logits = predict_logits(self.model, windows, self.device, batch_size=batch_size)
        return mean_of_windows(logits, owner)

    def predict(self, texts: Sequence[str], *, batch_size: int = 64) -> list[Prediction]:
        """One Prediction a text, in order. Raises TypeError for a bare string."""
        if isinstance(texts, str):
            raise TypeError("texts is a str; expected a list of texts: predict([text])")
        if not len(texts):
            return []
        probabilities = self.logits(texts, batch_size=batch_size).double().softmax(-1)
        best = probabilities.argmax(-1).tolist()
        return [
            Prediction(self.label_names[i], row[i], dict(zip(self.label_names, row, strict=True)))
            for i, row in zip(best, probabilities.tolist(), strict=True)
        ]


def load(
    run: str | Path, *, device: str = "auto", attn_backend: str | None = None
) -> TextClassifier:
    """The best model of a run folder, ready to predict.

    `attn_backend` overrides the run's own choice (which `auto` makes again, for this machine).
    Raises CheckpointError, naming the file, for what is missing, damaged or does not fit.
    """
    folder = RunFolder(Path(run))
    if not folder.path.is_dir():
        raise CheckpointError(f"{folder.path} is not a folder; expected one that train.py wrote")
    config = RunConfig.load(folder.config, CLASSIFICATION)
    model_config = config.train.model
    if attn_backend is not None:
        model_config = replace(model_config, attn_backend=attn_backend)
    if not folder.best_model.exists():
        raise CheckpointError(
            f"{folder.best_model} does not exist: the run has not finished an epoch. "
            f"Go on with it: python train.py --resume {folder.path}"
        )
    try:
        tokenizer = Tokenizer.load(folder.tokenizer)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from error
    model = TransformerClassifier.from_config(model_config)
    load_weights(model, folder.best_model)
    where = devices.pick(device)
    return TextClassifier(
        model.to(where).eval(),
        tokenizer,
        config.label_names,
        config.train.truncation,
        config.train.long_texts,
        where,
    )
