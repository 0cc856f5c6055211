"""Token embeddings to start from, out of the texts themselves: PPMI and a truncated SVD.

Levy, Goldberg and Dagan (2015), "Improving Distributional Similarity with Lessons Learned from Word
Embeddings": positive pointwise mutual information of words and their neighbours, nearer ones
counting more, neighbours' frequencies smoothed, factorised, with the root of the singular values.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fasttx.packing import RaggedIds

WINDOW = 5  # neighbours on each side; the k-th of them counts (6 - k) / 5
SMOOTHING = 0.75
CONTEXTS = 4096  # the words that count as neighbours: ids are in the order of their frequency


def cooccurrence(ids: RaggedIds, vocab_size: int, contexts: int) -> Tensor:
    """(vocab_size, contexts) fp32: how often each of the first `contexts` words, <PAD> excepted,
    stands near each word, in the same text."""
    words = ids.values.astype(np.int64)
    text = np.repeat(np.arange(len(ids)), ids.lengths)
    counts = np.zeros(vocab_size * contexts, dtype=np.float32)
    for k in range(1, WINDOW + 1):
        together = text[k:] == text[:-k]
        left, right = words[:-k][together], words[k:][together]
        for word, near in ((left, right), (right, left)):
            pairs = (word * contexts + near)[(near < contexts) & (near > 0)]
            found = np.bincount(pairs, minlength=len(counts))
            counts += found * np.float32((WINDOW + 1 - k) / WINDOW)
    return torch.from_numpy(counts).view(vocab_size, contexts)


def word_vectors(ids: RaggedIds, vocab_size: int, size: int, seed: int = 0) -> Tensor:
    """(vocab_size, size) fp32 of root mean square 1, for words that have neighbours; 0 for others.

    About half a gigabyte and a minute for 10,000 words and IMDB's 25,000 training reviews.
    """
    counts = cooccurrence(ids, vocab_size, min(CONTEXTS, vocab_size))
    word, near = counts.sum(1, keepdim=True), counts.sum(0) ** SMOOTHING
    # log of P(near | word) / P(near); a pair never seen has no information, not minus infinity
    ppmi = (counts / (word * (near / near.sum()))).log_().nan_to_num_(0.0, 0.0, 0.0).clamp_(min=0)
    rank = min(size, *ppmi.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, _ = torch.svd_lowrank(ppmi, q=min(rank + 64, *ppmi.shape), niter=3)
    vectors = torch.zeros(vocab_size, size)
    vectors[:, :rank] = u[:, :rank] * s[:rank].sqrt()
    present = vectors.abs().amax(1) > 0
    if present.any():
        vectors /= vectors[present].square().mean().sqrt()
    return vectors
