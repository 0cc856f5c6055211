"""The masked language model: the encoder with a head that names hidden words.

Devlin et al. (2019), 3.1. A hidden word becomes <UNK>, not a token of its own: it stands for "some
word" in texts already, and word dropout uses it the same way when the encoder is fine-tuned. In a
pretrained encoder of Hugging Face's both are its [MASK].
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from fasttx.config import ModelConfig
from fasttx.models.encoder import Encoder
from fasttx.models.layers import product_and_bias
from fasttx.models.linear_cross_entropy import linear_cross_entropy
from fasttx.models.module import room_for
from fasttx.ops.arguments import row_numbers
from fasttx.ops.contract import Operations
from fasttx.ops.dropout import NO_DROPOUT
from fasttx.text.packing import RaggedIds
from fasttx.text.tokenizer import WORDS_ONLY, SpecialTokens


class MaskedHead(nn.Module):
    """Linear(d, e) - GELU - LayerNorm on rows (M, d), then the product with the token embedding
    (shared with the encoder: Press and Wolf, 2017) and a bias for each word, both outside: where
    the words are known, they are one operation with the loss."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.embedding_width)
        self.norm = nn.LayerNorm(config.embedding_width, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, ops: Operations) -> Tensor:
        """The rows (M, e) of which the product with the embedding is taken."""
        x, bias = product_and_bias(ops, self.dense, x)
        normed: Tensor = self.norm(ops.bias_act(x, bias, NO_DROPOUT, "gelu"))
        return normed


class MaskedLanguageModel(Encoder):
    """`TransformerClassifier`'s encoder, weight names included, under a `MaskedHead`."""

    def __init__(self, config: ModelConfig) -> None:
        with room_for(config):
            super().__init__(config)
            self.head = MaskedHead(config)
            self.reset_parameters()

    def forward(
        self, input_ids: Tensor, *, rows: Tensor, cu_seqlens: Tensor,
        position_ids: Tensor | None = None, max_seqlen: int | None = None,
        seed: Tensor | None = None, labels: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Logits (M, vocab_size) for the rows (M,) int64 of packed input_ids (T,); with labels
        (M,) int64, the words that stand there, their summed loss and how many are named right.

        Raises TypeError, ValueError and IndexError for inputs that cannot be; the values of those
        on another device than the CPU are not read."""
        encoded = self.encode(
            input_ids, cu_seqlens=cu_seqlens, position_ids=position_ids, max_seqlen=max_seqlen,
            seed=seed,
        )  # fmt: skip
        rows = row_numbers("rows", rows, len(encoded.n), "the packed batch")
        if rows.dim() != 1:
            raise ValueError(f"rows has shape {tuple(rows.shape)}; expected (M,)")
        x = self.head(encoded.n[rows], self._ops)
        if labels is None:
            return self._ops.linear(x, self.embedding, self.head.bias)
        return linear_cross_entropy(x, self.embedding, self.head.bias, labels, self._ops.linear)


def mask_words(
    ids: RaggedIds,
    share: float,
    vocab_size: int,
    stream: tuple[int, ...],
    special: SpecialTokens = WORDS_ONLY,
) -> tuple[RaggedIds, np.ndarray, np.ndarray]:
    """Hide a share of the words: `ids` to feed, rows (M,) int64 that are to be named, and the words
    (M,) int64 that stood there. Of ten chosen, eight become <UNK> (or [MASK]), one a random word,
    one stays.

    Words outside the vocabulary and special tokens are never chosen: they are no words to name. A
    pure function of `stream`.
    """
    rng = np.random.default_rng(stream)
    chosen = (rng.random(len(ids.values)) < share) & ~np.isin(ids.values, special.reserved)
    rows = np.flatnonzero(chosen)
    words = ids.values[rows].astype(np.int64)
    fate = rng.random(len(rows))
    first = special.first_word
    others = rng.integers(first, max(vocab_size, first + 1), len(rows))
    shown = np.where(fate < 0.8, special.mask, np.where(fate < 0.9, others, words))
    values = ids.values.copy()
    values[rows] = shown
    return replace(ids, values=values), rows, words
