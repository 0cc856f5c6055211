"""Launches attention. T rows, B sequences, H heads, D head_dim."""

import math
from typing import Any

import torch
import triton
from fasttx.kernels.triton import tiles
from fasttx.kernels.triton.attention_backward import attention_backward
from fasttx.kernels.triton.attention_forward import attention_forward
from fasttx.kernels.triton.device import DEAD_ROWS
from fasttx.kernels.triton.launch import LAUNCH, dot_precision, keep_scale
from torch import Tensor

LOG2_E = math.log2(math.e)
WARP_SIZE = 32 if torch.version.hip is None else 64


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, lens: Tensor,
    max_seqlen: int, threshold: int, seed: Tensor | None, causal: bool, scale: float,
) -> None:  # fmt: skip
    tile = tiles.tile("forward", 8 * q.element_size(), q.shape[2], max_seqlen, WARP_SIZE)
    blocks = triton.cdiv(max_seqlen, tile.block_m)
    _launch(
        attention_forward, blocks, tile, (q, k, v, out), lse, starts, lens, max_seqlen, threshold,
        seed, causal, scale * LOG2_E,
    )  # fmt: skip


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor,
    dv: Tensor, starts: Tensor, lens: Tensor, max_seqlen: int, threshold: int, seed: Tensor | None,
    causal: bool, scale: float,
) -> None:  # fmt: skip
    tile = tiles.tile("backward", 8 * q.element_size(), q.shape[2], max_seqlen, WARP_SIZE)
    blocks = triton.cdiv(max_seqlen, tile.block_n)
    if not tile.whole:
        blocks += triton.cdiv(max_seqlen, tile.block_m)
    _launch(
        attention_backward, blocks, tile, (q, k, v, out, dout, dq, dk, dv), lse, starts, lens,
        max_seqlen, threshold, seed, causal, scale * LOG2_E, scale,
    )  # fmt: skip


def _launch(
    kernel: Any, blocks: int, tile: tiles.Tile, tensors: tuple[Tensor, ...], lse: Tensor,
    starts: Tensor, lens: Tensor, max_seqlen: int, threshold: int, seed: Tensor | None,
    causal: bool, *scales: float,
) -> None:  # fmt: skip
    """So many blocks for each head of each sequence, then those that look for dead rows."""
    rows, heads, head_dim = tensors[0].shape
    programs = blocks * heads * len(lens) + triton.cdiv(rows, DEAD_ROWS.value)
    strides = [n for x in tensors for n in x.stride()[:2]]
    with torch.cuda.device_of(lse):
        kernel[(programs,)](
            *tensors, *strides, lse, starts, lens, len(lens), heads, rows, max_seqlen, threshold,
            seed, keep_scale(threshold), *scales,
            D=head_dim, BLOCK_D=tiles.padded_head_dim(head_dim), BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n, WHOLE=tile.whole, CAUSAL=causal, DROPOUT=threshold > 0,
            PRECISION=dot_precision(tensors[0].dtype), num_warps=tile.num_warps,
            num_stages=tile.num_stages, **LAUNCH,
        )  # fmt: skip
