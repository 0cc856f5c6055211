"""How the kernels become operators of torch: `torch.ops.fasttx_triton.*`.

`torch.library.Library` is used directly: `custom_op` costs about twice as much a call. An operator
has an implementation, a fake one (for torch.compile and export: shapes only) and a derivative that
is itself an operator, so that a compiled graph sees nothing of what happens inside.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

LIBRARY = torch.library.Library("fasttx_triton", "DEF")
# Under TRITON_INTERPRET=1 the kernels run as numpy on tensors of the CPU.
INTERPRETED = triton.knobs.runtime.interpret
DEVICES = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)

# Said aloud, because what Triton does by default changes between its versions.
LAUNCH = {"enable_fp_fusion": True}

Function = Callable[..., Any]


def operator(schema: str, fake: Function) -> Callable[[Function], Any]:
    """Registers a function under `schema`, and gives the operator in its place."""

    def register(function: Function) -> Any:
        name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in DEVICES:
            LIBRARY.impl(name, function, key)
        torch.library.register_fake(f"fasttx_triton::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.fasttx_triton, name).default

    return register


def derivative(name: str, setup_context: Function, backward: Function) -> None:
    """The gradients of operator `name`, for which `backward` calls the operator `name`_backward."""
    torch.library.register_autograd(
        f"fasttx_triton::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )
    # Without this torch only warns, and leaves the missing terms out of a second derivative.
    torch.library.register_autograd(
        f"fasttx_triton::{name}_backward", _no_second_derivative, lib=LIBRARY
    )


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    raise NotImplementedError(
        "the triton backend has no second derivative (create_graph=True); "
        "use attn_backend='reference'"
    )


def dense(x: Tensor) -> Tensor:
    """x, or a copy where its last dimension has gaps: the kernels take any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def keep_scale(threshold: int) -> float:
    """What a kept element is multiplied by, for a threshold of 0 ... 65536."""
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact to float32, unless torch.set_float32_matmul_precision allows
    TF32 for torch's own."""
    allowed = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"
