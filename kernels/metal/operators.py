"""How functions that launch kernels become operators of torch: `torch.ops.fasttx_metal.*`.

`torch.library.Library` is used directly: `custom_op` costs about twice as much a call. An operator
has an implementation, a fake one (for torch.compile and export: shapes only) and a derivative that
is itself an operator, so that a compiled graph sees nothing of what happens inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fasttx_metal", "DEF")

Function = Callable[..., Any]


def operator(schema: str, fake: Function) -> Callable[[Function], Any]:
    """Registers a function under `schema`, and gives the operator in its place.

    For every device: `shaders.compiler` says where kernels can run.
    """

    def register(function: Function) -> Any:
        name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fasttx_metal::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.fasttx_metal, name).default

    return register


def derivative(name: str, setup_context: Function, backward: Function) -> None:
    """The gradients of operator `name`, for which `backward` calls the operator `name`_backward."""
    torch.library.register_autograd(
        f"fasttx_metal::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )
    # Without this torch only warns, and leaves the missing terms out of a second derivative.
    torch.library.register_autograd(
        f"fasttx_metal::{name}_backward", _no_second_derivative, lib=LIBRARY
    )


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    raise NotImplementedError(
        "the Metal kernels of the mps backend have no second derivative (create_graph=True); "
        "use attn_backend='reference'"
    )


def dense(x: Tensor) -> Tensor:
    """x, or a copy where its last dimension has gaps: the kernels take any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def keep_scale(threshold: int) -> float:
    """What a kept element is multiplied by, for a threshold of 0 ... 65536."""
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0
