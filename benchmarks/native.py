"""The native encoder as a contestant: how it is reached stands here, and only here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from contest import require
from torch import Tensor, nn

from fasttx.load import TextClassifier
from fasttx.models.classifier import TransformerClassifier
from fasttx.native import NativeClassifier
from fasttx.text.packing import PackedBatch, RaggedIds
from fasttx.text.tokenizer import Tokenizer

TOLERANCES = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.1}  # of the logits' length


class NativeEncoder(nn.Module):
    """A classifier's logits (B, num_classes) of token ids, by one call of the CPU library.

    model: of backend `cpu`, in eval mode. Raises Unavailable.
    """

    def __init__(self, model: TransformerClassifier, precision: str) -> None:
        super().__init__()
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
    found = TextClassifier(model, tokenizer, tuple(labels), "head", "cut", device, precision)
    if precision != "fp32":  # which the model answers in where the encoder does not apply
        require(found.native.unavailable_reasons())
    return found
