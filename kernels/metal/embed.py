"""Launches embed. T rows, d columns, V words."""

from __future__ import annotations

from fasttx.kernels.metal.rows import by_columns
from fasttx.kernels.metal.shaders import launch
from torch import Tensor

FILES = ("philox", "rows", "embed")


def forward(
    ids: Tensor, position_ids: Tensor, table: Tensor, positions: Tensor, out: Tensor,
    threshold: int, seed: Tensor | None, scale: float,
) -> None:  # fmt: skip
    rows, columns = out.shape
    launch(
        "embed_forward", FILES, (ids, position_ids, table, positions, out), threshold, seed,
        [rows, columns], [scale], by_columns(columns, rows),
        table_type=table.dtype, positions_type=positions.dtype, element_type=out.dtype,
    )  # fmt: skip


def backward(
    dout: Tensor, ids: Tensor, dtable: Tensor, threshold: int, seed: Tensor | None, scale: float
) -> None:
    dtable.zero_()
    ids, order = ids.int().sort(stable=True)
    rows, columns = dout.shape
    launch(
        "embed_backward", FILES, (ids, order, dout, dtable), threshold, seed,
        [rows, columns], [scale], by_columns(columns, rows),
        table_type=dtable.dtype, positions_type=dout.dtype, element_type=dout.dtype,
    )  # fmt: skip
