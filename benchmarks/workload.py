"""The texts that are timed: real review lengths where the reviews are at hand, else drawn ones."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fasttx.config import ModelConfig
from fasttx.text.packing import PackedBatch, RaggedIds, pack


@dataclass(frozen=True)
class Scale:
    """How large the work is: `FULL` to time it, `SMALL` to see that it runs."""

    config: ModelConfig
    divisor: int  # of batch sizes and lengths

    def of(self, size: int) -> int:
        return max(2, size // self.divisor)


FULL = Scale(ModelConfig(), 1)
SMALL = Scale(
    ModelConfig(vocab_size=100, d_model=32, num_heads=2, num_layers=2, d_ff=64, max_len=16), 16
)


def reviews(data: str, count: int) -> list[str]:
    """`count` random training reviews. data: a parquet file, or the folder of train.parquet."""
    import pyarrow.parquet as pq

    path = Path(data)
    path = path if path.is_file() else path / "train.parquet"
    texts = pq.read_table(path, columns=["text"])["text"].to_pylist()
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:count]]


def review_ids(
    data: str | None, count: int, config: ModelConfig, words: bool = False
) -> tuple[RaggedIds, str]:
    """`count` random training reviews as token ids cut to max_len, and where they come from.

    words: only their lengths, counted in white-space words; the tokens are drawn.
    """
    rng = np.random.default_rng(0)
    if data and not words:
        from fasttx.text.tokenizer import Tokenizer

        texts = reviews(data, max(count, 2000))
        ids = Tokenizer.train(texts, config.vocab_size).encode_batch(texts[:count])
        return ids.truncate(config.max_len), "real reviews"
    if data:
        lengths = np.array([len(text.split()) for text in reviews(data, count)])
        origin = "real lengths in white-space words"
    else:
        # Maas et al.'s reviews: median 174 words, 5 % under 64, 5 % over 598.
        lengths = np.exp(rng.normal(np.log(200), 0.68, count)).astype(int).clip(8)
        origin = "drawn lengths (no $FASTTX_DATA)"
    lengths = lengths.clip(1, config.max_len)
    drawn = [rng.integers(2, config.vocab_size, n).tolist() for n in lengths]
    return RaggedIds.from_lists(drawn), origin


def make_batches(ids: RaggedIds, batch_size: int, device: torch.device) -> list[PackedBatch]:
    labels = np.random.default_rng(1).integers(0, 2, len(ids))
    return [
        pack(ids.select(np.arange(i, i + batch_size)), labels[i : i + batch_size]).to(device)
        for i in range(0, len(ids), batch_size)
    ]


def padded(batch: PackedBatch) -> Tensor:
    """input_ids (B, L), padded on the right with 0 to the longest text of the batch."""
    ids = batch.input_ids.new_zeros(len(batch), batch.max_seqlen)
    for row, (start, end) in enumerate(itertools.pairwise(batch.cu_seqlens.tolist())):
        ids[row, : end - start] = batch.input_ids[start:end]
    return ids


def slices(batch: PackedBatch, size: int) -> list[PackedBatch]:
    """The same texts in batches of at most `size`."""
    bounds = batch.cu_seqlens.tolist()
    values, offsets = batch.input_ids.cpu().numpy(), np.array(bounds, dtype=np.int64)
    ids = RaggedIds(values.astype(np.int32), offsets)
    labels = batch.labels.cpu().numpy()
    return [
        pack(ids.select(np.arange(i, min(i + size, len(batch)))), labels[i : i + size]).to(
            batch.input_ids.device
        )
        for i in range(0, len(batch), size)
    ]
