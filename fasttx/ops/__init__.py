"""Attention on interchangeable backends: the table is in `registry`, the meaning in `reference`."""

from fasttx.errors import BackendUnavailableError
from fasttx.ops.functional import scaled_dot_product_attention
from fasttx.ops.registry import BACKENDS, Backend, resolve

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendUnavailableError",
    "resolve",
    "scaled_dot_product_attention",
]
