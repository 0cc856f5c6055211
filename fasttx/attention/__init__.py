"""Attention on interchangeable backends: the table is in `registry`, the meaning in `reference`."""

from fasttx.attention.convenience import scaled_dot_product_attention
from fasttx.attention.registry import BACKENDS, Backend, BackendUnavailableError, resolve

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendUnavailableError",
    "resolve",
    "scaled_dot_product_attention",
]
