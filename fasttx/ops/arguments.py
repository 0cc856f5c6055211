"""What arguments are checked for, in one place for all backends, models and entries.

Types and shapes are checked on every device. Values are checked where they are `readable`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

ROW_NUMBERS = (torch.int32, torch.int64)  # what kernels and torch's operators index with
_INTEGERS = (*ROW_NUMBERS, torch.uint8, torch.int8, torch.int16)


def readable(x: Tensor) -> bool:
    """Whether to check the values of x: on the CPU only, since elsewhere the host would wait for
    the device; not under torch.compile or torch.vmap, and not those of a tensor without data."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and type(x) is Tensor
        and not torch._C._functorch.is_batchedtensor(x)
    )


def check_integers(name: str, x: Any) -> None:
    """Raises TypeError for what is no tensor of integers: a bool would be read as a mask."""
    if not isinstance(x, Tensor) or x.dtype not in _INTEGERS:
        raise TypeError(f"{name} is {kind(x)}; expected integers, for instance int64")


def row_numbers(name: str, x: Tensor, rows: int, of: str) -> Tensor:
    """x, numbers of the rows of a table that has so many, as int32 or int64.

    `of` names the table in the message. Raises TypeError, and IndexError for values outside (a
    negative one does not count from the end) where they can be checked (`readable`).
    """
    check_integers(name, x)
    if x.numel() and readable(x):
        low, high = (int(bound) for bound in x.aminmax())
        if low < 0 or high >= rows:
            flat = x.flatten()
            row = int(((flat < 0) | (flat >= rows)).nonzero()[0])
            raise IndexError(
                f"{name} holds {int(flat[row])} in row {row}; expected 0 to {rows - 1}, a row of "
                f"{of}"
            )
    return x if x.dtype in ROW_NUMBERS else x.long()


def real_tokens(mask: Any, shape: tuple[int, ...], *, wait: bool = False) -> Tensor:
    """An attention_mask of bool or 0/1 as bool, True where a token is real (not padding).

    Raises TypeError, and ValueError for another shape; for values other than 0 and 1, such as those
    of an additive mask, where they can be checked (`readable`), or everywhere if `wait`.
    """
    if not isinstance(mask, Tensor) or mask.is_complex() or mask.is_quantized:
        raise TypeError(f"attention_mask is {kind(mask)}; expected bool, or 0 and 1")
    if mask.shape != shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; expected {tuple(shape)}: one bool or "
            "0/1 a token, 1 = real token"
        )
    if mask.dtype == torch.bool:
        return mask
    real: Tensor = mask.bool()
    if (wait or readable(mask)) and not (right := mask == real).all():
        raise ValueError(
            f"attention_mask holds {mask[~right][0].item()}; expected bool, or 0 (padding) and 1 "
            "(a real token). `mask == 0` makes one of an additive mask (0 and -inf)"
        )
    return real


def check_floats(names: str, *tensors: Tensor) -> None:
    """Raises TypeError where one of these is not floating."""
    for x in tensors:
        if not x.is_floating_point():
            raise TypeError(f"{names}: got {kind(x)}; expected floating tensors")


def check_finite(name: str, value: float) -> None:
    """Raises TypeError for what is no number, ValueError for NaN and infinities."""
    if torch.compiler.is_compiling() or (type(value) is float and math.isfinite(value)):
        return
    if not isinstance(value, int | float | torch.SymFloat):
        raise TypeError(f"{name} is {value!r}; expected a number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; expected a finite number")


def kind(x: Any) -> str:
    """For a message: dtype and shape of a tensor, or else the type."""
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
