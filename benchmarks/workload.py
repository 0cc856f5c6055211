"""Where contests run and on which texts: real reviews where they are at hand, else drawn ones."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fasttx.config import ModelConfig
from fasttx.text.packing import PackedBatch, RaggedIds, pack
from fasttx.text.tokenizer import Tokenizer

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
SIZES = ("d_model", "num_heads", "num_layers", "d_ff", "max_len")
TINY = ModelConfig(vocab_size=100, d_model=32, num_heads=2, num_layers=2, d_ff=64, max_len=16)
SAMPLE = 2000  # reviews that the vocabulary is taken from


@dataclass(frozen=True)
class Setting:
    """The device, the texts and the sizes of a contest.

    data: a parquet file of reviews, or the folder of train.parquet; None: texts are drawn.
    divisor: makes batches and drawn texts smaller, to see that everything runs. words: only the
    reviews' lengths count, in white-space words.
    """

    device: torch.device
    data: str | None = None
    config: ModelConfig = ModelConfig()  # noqa: RUF009  (it is frozen)
    precision: str = "fp32"
    divisor: int = 1
    words: bool = False

    @classmethod
    def small(cls, device: torch.device) -> Setting:
        return cls(device, config=TINY, divisor=16)

    @property
    def dtype(self) -> torch.dtype:
        """What models multiply in."""
        return DTYPES[self.precision]

    def of(self, size: int) -> int:
        return size if self.divisor == 1 else max(2, size // self.divisor)

    def texts(self, count: int) -> tuple[RaggedIds, str]:
        """`count` random training reviews as token ids cut to max_len, and what they are."""
        config = self.config
        if self.data and not self.words:
            tokenizer = _tokenizer(self.data, config.vocab_size)
            ids = tokenizer.encode_batch(reviews(self.data, count))
            return ids.truncate(config.max_len), self._what("real reviews")
        rng = np.random.default_rng(0)
        if self.data:
            lengths = np.array([len(text.split()) for text in reviews(self.data, count)])
            what = "real lengths in white-space words"
        else:
            # Maas et al.'s reviews: median 174 words, 5 % under 64, 5 % over 598.
            lengths = np.exp(rng.normal(np.log(200), 0.68, count)).astype(int).clip(8)
            lengths, what = lengths // self.divisor, "drawn lengths (no $FASTTX_DATA)"
        lengths = lengths.clip(1, config.max_len)
        drawn = [rng.integers(2, config.vocab_size, n).tolist() for n in lengths]
        return RaggedIds.from_lists(drawn), self._what(what)

    def raw_texts(self, count: int) -> tuple[list[str], Tokenizer, str]:
        """`count` random training reviews, a tokenizer for them, and what they are."""
        if self.data:
            tokenizer = _tokenizer(self.data, self.config.vocab_size)
            return reviews(self.data, count), tokenizer, self._what("real reviews")
        ids, what = self.texts(count)
        texts = [" ".join(f"w{i}" for i in text.tolist()) for text in ids]
        return texts, Tokenizer.train(texts, self.config.vocab_size), what

    def _what(self, texts: str) -> str:
        """What the texts are, and the sizes of the models that are not the default ones."""
        if self.config == TINY:
            return texts
        usual = ModelConfig()
        sizes = {name: getattr(self.config, name) for name in SIZES}
        other = [f"{name} {n}" for name, n in sizes.items() if n != getattr(usual, name)]
        return ", ".join([texts, *other])


@functools.cache
def _all_reviews(data: str) -> list[str]:
    import pyarrow.parquet as pq

    path = Path(data)
    path = path if path.is_file() else path / "train.parquet"
    return pq.read_table(path, columns=["text"])["text"].to_pylist()


def reviews(data: str, count: int) -> list[str]:
    """`count` random training reviews."""
    texts = _all_reviews(data)
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:count]]


@functools.cache
def _tokenizer(data: str, vocab_size: int) -> Tokenizer:
    return Tokenizer.train(reviews(data, SAMPLE), vocab_size)


def make_batches(ids: RaggedIds, batch_size: int, device: torch.device) -> list[PackedBatch]:
    labels = np.random.default_rng(1).integers(0, 2, len(ids))
    return [
        pack(ids.select(np.arange(i, i + batch_size)), labels[i : i + batch_size]).to(device)
        for i in range(0, len(ids), batch_size)
    ]


def padded(batch: PackedBatch) -> Tensor:
    """input_ids (B, L), padded on the right with 0 to the longest text of the batch."""
    ids = batch.input_ids.new_zeros(len(batch), batch.max_seqlen)
    for text, (start, end) in enumerate(itertools.pairwise(batch.cu_seqlens.tolist())):
        ids[text, : end - start] = batch.input_ids[start:end]
    return ids


def first_texts(batch: PackedBatch, count: int) -> PackedBatch:
    """The first `count` texts of a batch."""
    cu_seqlens = batch.cu_seqlens[: count + 1]
    rows = int(cu_seqlens[-1])
    return PackedBatch(
        batch.input_ids[:rows],
        batch.position_ids[:rows],
        cu_seqlens,
        batch.max_seqlen,
        batch.labels[:count],
    )
