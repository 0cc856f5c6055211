"""The native encoder as a contestant: how it is reached stands here, and only here."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from contest import require
from torch import Tensor, nn

from fasttx.load import TextClassifier
from fasttx.models.classifier import TransformerClassifier
from fasttx.text.packing import PackedBatch, RaggedIds
from fasttx.text.tokenizer import Tokenizer

TOLERANCES = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.1}  # of the logits' length


class NativeEncoder(nn.Module):
    """A classifier's logits (B, num_classes) of token ids, by one call of the CPU library.

    model: of backend `cpu`, in eval mode. Raises Unavailable.
    """

    def __init__(self, model: TransformerClassifier, precision: str) -> None:
        super().__init__()
        if importlib.util.find_spec("fasttx.native") is None:
            require(["this fasttx has no native encoder"])
        from fasttx.native import NativeClassifier

        self.precision = precision
        self.native = NativeClassifier(model, precision)
        require(self.native.unavailable_reasons())

    def forward(self, ids: RaggedIds) -> Tensor:
        logits = self.native.logits(ids, batch_size=len(ids))
        assert logits is not None
        return logits


def inputs(batch: PackedBatch) -> dict[str, RaggedIds]:
    """What `NativeEncoder` takes."""
    values, offsets = batch.input_ids.to(torch.int32), batch.cu_seqlens.to(torch.int64)
    return {"ids": RaggedIds(values.numpy(), offsets.numpy())}


def predictor(
    model: TransformerClassifier, tokenizer: Tokenizer, labels: Sequence[str], precision: str
) -> TextClassifier:
    """What `fasttx.load(RUN, precision=precision)` returns. Raises Unavailable."""
    device = model.embedding.device
    given = (model, tokenizer, tuple(labels), "head", "cut", device)
    if precision == "fp32":  # by the native encoder where it applies, else by the model
        return TextClassifier(*given)
    NativeEncoder(model, precision)
    return TextClassifier(*given, precision)
