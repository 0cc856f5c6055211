"""A trained model with its tokenizer and label names: text in, label and probability (or number)
out."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fasttx import device as devices
from fasttx.config import SINGLE_LABEL
from fasttx.errors import CheckpointError, ConfigError, NotFiniteError, TokenizerError
from fasttx.models.classifier import TransformerClassifier
from fasttx.native import PRECISIONS, NativeClassifier
from fasttx.tasks import read_config
from fasttx.text.packing import RaggedIds
from fasttx.text.pieces import AnyTokenizer
from fasttx.text.reading import cut, mean_of_windows, read
from fasttx.training.checkpoint import load_tokenizer, load_weights
from fasttx.training.folder import RunFolder
from fasttx.training.inference import predict_logits
from fasttx.training.problems import PROBLEMS, AnyPrediction, Problem


@dataclass(frozen=True)
class TextClassifier:
    """What `fasttx.load` returns: `model`, `tokenizer`, and `predict`.

    On the CPU `predict` and `logits` go through `native`, one call of the library, wherever it
    applies to the model as it is then; elsewhere through the model.
    """

    model: TransformerClassifier
    tokenizer: AnyTokenizer
    label_names: tuple[str, ...]
    truncation: str
    long_texts: str
    device: torch.device
    precision: str = "fp32"
    problem_type: str = SINGLE_LABEL
    native: NativeClassifier = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "native", NativeClassifier(self.model, self.precision))

    def encode(self, texts: Sequence[str]) -> RaggedIds:
        """Token ids as the model was trained on them, truncation and special tokens included: one
        sequence a text."""
        ids, longest = self.tokenizer.encode_batch(texts), self.model.config.max_len
        return read(ids, longest, self.truncation, "cut", self.tokenizer.special)[0]

    def read(self, ids: RaggedIds) -> tuple[RaggedIds, np.ndarray | None]:
        """The ids that the model is measured on: see `fasttx.text.reading.read`."""
        longest, special = self.model.config.max_len, self.tokenizer.special
        return read(ids, longest, self.truncation, self.long_texts, special)

    def cut(self, ids: RaggedIds) -> RaggedIds:
        """`read`, without the special tokens around each sequence."""
        longest, special = self.model.config.max_len, self.tokenizer.special
        return cut(ids, longest, self.truncation, self.long_texts, special)[0]

    def logits(self, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """(texts, num_classes) fp32 on the CPU, finite. Raises NotFiniteError for a model that
        answers otherwise, and ConfigError for a batch size that is none."""
        whole = hasattr(batch_size, "__index__") and not isinstance(batch_size, bool)
        if not whole or batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size!r}; expected at least 1 text at a time")
        ids = self.tokenizer.encode_batch(texts)
        windows, owner = self.read(ids)
        logits = self.window_logits(windows, batch_size=batch_size)
        return checked_finite(mean_of_windows(logits, owner), texts)

    def window_logits(self, ids: RaggedIds, *, batch_size: int | None = None) -> Tensor:
        """(windows, num_classes) fp32 on the CPU, of what `read` returns; by default in one batch.
        They need not be finite."""
        batch_size = max(1, len(ids)) if batch_size is None else batch_size
        logits = self.native.logits(ids, batch_size=batch_size)
        if logits is not None:
            return logits
        if self.precision == "int8":  # which torch's products do not have
            self.native.require()
        return predict_logits(
            self.model, ids, self.device, batch_size=batch_size, precision=self.precision
        )

    @property
    def problem(self) -> Problem:
        """What the model's answers mean."""
        return PROBLEMS[self.problem_type]

    def predict(self, texts: Sequence[str], *, batch_size: int = 64) -> list[AnyPrediction]:
        """One answer a text, in order: a Prediction; of a multi-label model a MultiLabelPrediction;
        of a regression a NumberPrediction. Raises TypeError for a bare string."""
        if isinstance(texts, str):
            raise TypeError("texts is a str; expected a list of texts: predict([text])")
        if not len(texts):
            return []
        scores = self.problem.scores(self.logits(texts, batch_size=batch_size))
        return [self.problem.prediction(self.label_names, row) for row in scores.tolist()]


def checked_finite(logits: Tensor, texts: Sequence[str]) -> Tensor:
    """`logits` (texts, num_classes); raises NotFiniteError where a text's answer is not finite."""
    if math.isfinite(logits.sum().item()):  # as no sum of something else is
        return logits
    bad = (~logits.isfinite().all(-1)).nonzero().flatten().tolist()
    if bad:
        text = texts[bad[0]]
        shown = repr(text if len(text) <= 60 else text[:57] + "...")
        raise NotFiniteError(
            f"the model's answers to {len(bad):,} of {len(texts):,} texts are not finite; the "
            f"first is text {bad[0] + 1}, {shown}: {logits[bad[0]].tolist()[:5]}. Its weights are "
            "damaged or its training diverged: train again, or use another run"
        )
    return logits


def load(
    run: str | Path, *, device: str = "auto", attn_backend: str | None = None,
    precision: str = "fp32",
) -> TextClassifier:  # fmt: skip
    """The best model of a run folder, ready to predict.

    `attn_backend` overrides the run's own choice (which `auto` makes again, for this machine).
    `precision` is how its products are computed: fp32; bf16, which on a CPU without bfloat16
    products is torch's autocast; int8, by backend `cpu` only.
    Raises CheckpointError, naming the file, for what is missing, damaged or does not fit.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    folder = RunFolder(Path(os.path.expanduser(run)))
    if not folder.path.is_dir():
        raise CheckpointError(f"{folder.path} is not a folder; expected one that train.py wrote")
    config = read_config(folder.config, "classification")
    model_config = config.train.model
    if attn_backend is not None:
        model_config = replace(model_config, attn_backend=attn_backend)
    if not folder.best_model.exists():
        raise CheckpointError(
            f"{folder.best_model} does not exist: the run has not finished an epoch. "
            f"Go on with it: python train.py --resume {folder.path}"
        )
    try:
        tokenizer = load_tokenizer(folder, model_config.vocab_size)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from error
    if len(config.label_names) != model_config.num_classes:
        raise CheckpointError(
            f"{folder.config} names {len(config.label_names)} labels, and its model has "
            f"{model_config.num_classes} classes; expected one name for each"
        )
    model = TransformerClassifier.from_config(model_config)
    load_weights(model, folder.best_model)
    where = devices.pick(device)
    classifier = TextClassifier(
        model.to(where).eval(),
        tokenizer,
        config.label_names,
        config.train.truncation,
        config.train.long_texts,
        where,
        precision,
        config.train.problem_type,
    )
    if precision == "int8":
        classifier.native.require()
    return classifier
