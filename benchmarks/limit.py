"""What the machine can do at best: products counted, and the rate at which it multiplies, measured.

Counted is what the model cannot do without: the products of its linear layers, and attention's own.
A multiplication with its addition is two FLOPs. Norms, activations, dropout, the softmax, the
optimiser and everything that moves data are left out, so the limit cannot be reached.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import products
import torch
from products import Operands, Product, linear_products

from fasttx import device as devices
from fasttx.config import ModelConfig


def product_flops(products: Sequence[Product]) -> int:
    return sum(p.flops for p in products)


def block_products(config: ModelConfig, tokens: int, backward: bool) -> list[Product]:
    """The products of one block's four linear layers on `tokens` rows."""
    d, f = config.d_model, config.d_ff
    layers = ((d, 3 * d), (d, d), (d, f), (f, d))
    return [p for i, o in layers for p in linear_products(tokens, i, o, backward)]


def head_flops(config: ModelConfig, texts: int, backward: bool) -> int:
    d = config.d_model
    layers = ((d, d), (d, config.num_classes))
    return sum(product_flops(linear_products(texts, i, o, backward)) for i, o in layers)


def attention_flops(lengths: Sequence[int], num_heads: int, head_dim: int, backward: bool) -> int:
    """Of one layer's attention: q k^T and its product with v, and four products backward.

    4 n^2 H D for a sequence of n forward, 12 n^2 H D with backward. A kernel that computes the
    scores again in its backward instead of storing them (all fused ones do) does 14; the two more
    are its own affair, so its share of the limit is at most 6 / 7.
    """
    return (12 if backward else 4) * sum(n * n for n in lengths) * num_heads * head_dim


def attention_bytes(
    tokens: int, num_heads: int, head_dim: int, itemsize: int, backward: bool
) -> int:
    """What one layer's attention must read and write: q, k, v and the output; backward, those
    again, the output's gradient and three gradients (the log-sum-exp is small beside them)."""
    tensors = 4 + (4 + 1 + 3 if backward else 0)
    return tensors * tokens * num_heads * head_dim * itemsize


def model_flops(config: ModelConfig, lengths: Sequence[int], backward: bool) -> int:
    """Of a forward pass of the classifier on texts of these lengths, packed; or with backward."""
    heads, d = config.num_heads, config.d_model
    block = product_flops(block_products(config, sum(lengths), backward))
    block += attention_flops(lengths, heads, d // heads, backward)
    return config.num_layers * block + head_flops(config, len(lengths), backward)


@dataclass(frozen=True)
class Work:
    """One input: products that are timed and count `repeats` times, and FLOPs at their rate."""

    products: list[Product]
    repeats: int
    flops: int
    bytes: int = 0  # what those FLOPs must move at least

    @classmethod
    def of_model(cls, config: ModelConfig, lengths: Sequence[int], backward: bool) -> Work:
        """One block's products stand for all blocks'; attention's and the head's at their rate."""
        products = block_products(config, sum(lengths), backward)
        timed = config.num_layers * product_flops(products)
        return cls(products, config.num_layers, model_flops(config, lengths, backward) - timed)

    @classmethod
    def of_attention(
        cls, config: ModelConfig, lengths: Sequence[int], backward: bool, itemsize: int
    ) -> Work:
        """One layer's attention, at the rate of the block's products."""
        heads, tokens = config.num_heads, sum(lengths)
        shape = (heads, config.d_model // heads)
        return cls(
            block_products(config, tokens, backward),
            0,
            attention_flops(lengths, *shape, backward),
            attention_bytes(tokens, *shape, itemsize, backward),
        )


class Limit:
    """The ideal time of each input, measured between the contestants' turns.

    Linear layers: their products at the very shapes, layouts and dtype, each by the library that
    was fastest at it when all of them were tried. Attention: its FLOPs at the rate those reach. On
    CUDA it has to move its bytes as well, at the bandwidth of a copy: whichever takes longer
    counts.
    """

    def __init__(self, work: Sequence[Work], device: torch.device, dtype: torch.dtype) -> None:
        self.work = list(work)
        # For each product of an input its own operands, as large as the largest input needs.
        alike = list(zip(*(w.products for w in self.work), strict=True))
        self._operands = [Operands(each, device, dtype) for each in alike]
        self.known = products.libraries(device, dtype)
        self._fastest = [self._choice(*each) for each in zip(alike, self._operands, strict=True)]
        self.bandwidth = copy_bandwidth(device) if device.type == "cuda" else None
        self.rates: list[float] = []

    def _choice(self, alike: Sequence[Product], operands: Operands) -> str:
        if len(self.known) == 1:  # torch's, which the others are compared with
            return next(iter(self.known))
        products.verify(alike[0], operands, self.known)
        times = products.seconds(alike[0], operands, self.known, turns=3)
        return min(times, key=times.__getitem__)

    @property
    def fastest(self) -> str:
        """Who multiplies, with the number of products where there are several."""
        counts = Counter(self._fastest).most_common()
        if len(counts) == 1:
            return counts[0][0]
        return ", ".join(f"{name} {n}" for name, n in counts)

    def seconds(self, i: int) -> float:
        """The ideal time of input i, measured now."""
        work = self.work[i % len(self.work)]
        elapsed = 0.0
        for product, operands, name in zip(
            work.products, self._operands, self._fastest, strict=True
        ):
            only = {name: self.known[name]}
            elapsed += products.seconds(product, operands, only, turns=1)[name]
        time.sleep(products.PAUSE)  # a library's threads do not disturb who comes next
        rate = product_flops(work.products) / elapsed
        self.rates.append(rate)
        other = work.flops / rate
        if self.bandwidth:
            other = max(other, work.bytes / self.bandwidth)
        return elapsed * work.repeats + other


def copy_bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Bytes a second of a copy, reading and writing counted; `size` bytes, beyond every cache."""
    a = torch.randn(size // 4, device=device)
    b = torch.empty_like(a)
    times = []
    for _ in range(10):
        devices.synchronize(device)
        start = time.perf_counter()
        b.copy_(a)
        devices.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size / sorted(times)[len(times) // 2]
