"""Launches embed. T rows, d columns, V words."""

from __future__ import annotations

from fasttx.kernels.cpu.library import addresses, call, dropout
from torch import Tensor


def forward(
    ids: Tensor, position_ids: Tensor, table: Tensor, positions: Tensor, out: Tensor,
    threshold: int, seed: Tensor | None, scale: float,
) -> None:  # fmt: skip
    wrong = call(
        "embed_forward", *addresses(ids, position_ids, table, positions, out), *out.shape,
        len(table), len(positions), scale, *dropout(threshold, seed),
    )  # fmt: skip
    if wrong:
        raise IndexError(
            f"row {wrong - 1} has an id outside the embedding table or a position outside the "
            "position table; expected both to be row numbers of their tables"
        )


def backward(
    dout: Tensor, ids: Tensor, dtable: Tensor, threshold: int, seed: Tensor | None, scale: float
) -> None:
    call(
        "embed_backward", *addresses(ids, dout, dtable), *dout.shape, len(dtable), scale,
        *dropout(threshold, seed),
    )  # fmt: skip
