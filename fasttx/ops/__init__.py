"""The operations that a model runs on, on interchangeable backends.

`contract` says what they are, `reference` and `plain` what they compute, `registry` who has them.
"""

from fasttx.ops.functional import scaled_dot_product_attention
from fasttx.ops.registry import BACKENDS, Backend, resolve

__all__ = ["BACKENDS", "Backend", "resolve", "scaled_dot_product_attention"]
