"""Measures tiles on a GPU and prints the entries of tiles.py anew.

    python -m fasttx.kernels.triton.tune [--dtype bf16] [--head-dim 32] [--rows 65536]

For each length the candidates of both ways run on full sequences with dropout; the fastest is
printed, with the time of the table's own choice beside it. Times are medians of
triton.testing.do_bench, which clears the L2 cache between runs. A person edits tiles.py: a table
that changed by itself would change the bits of every result.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import triton
from fasttx.kernels.triton import attention, tiles

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LENGTHS = (32, 64, 128, 256, 512, 1024)


def candidates(max_seqlen: int) -> Iterator[tiles.Tile]:
    """Whole rows where they may fit, and tiles of several sizes."""
    width = max(tiles.SMALLEST, tiles.power_of_two(max_seqlen))
    for block_m, warps in itertools.product((16, 32, 64, 128), (4, 8)):
        if width <= 512:
            yield tiles.Tile(block_m, width, warps, 1, whole=True)
        for block_n, stages in itertools.product((32, 64, 128), (1, 2, 3)):
            yield tiles.Tile(block_m, block_n, warps, stages, whole=False)


def measure(
    way: str, tile: tiles.Tile, dtype: torch.dtype, head_dim: int, max_seqlen: int, rows: int,
    device: str, timer: Callable[[Callable[[], object]], float],
) -> float:  # fmt: skip
    """What `timer` says of one pass (forward, backward) with this tile, in milliseconds.

    inf where it does not fit the device.
    """
    sequences = max(1, rows // max_seqlen)
    lens = torch.full((sequences,), max_seqlen, dtype=torch.int32, device=device)
    starts = max_seqlen * torch.arange(sequences, dtype=torch.int32, device=device)
    qkv = torch.randn(sequences * max_seqlen, 3, 8, head_dim, device=device, dtype=dtype)
    q, k, v = qkv.unbind(1)
    dq, dk, dv = torch.empty_like(qkv).unbind(1)
    out, dout = torch.empty(q.shape, device=device, dtype=dtype), torch.randn_like(q)
    lse = torch.empty(q.shape[1::-1], device=device)
    seed = torch.tensor(1, device=device)
    options = (starts, lens, max_seqlen, 6554, seed, False, head_dim**-0.5)
    attention.forward(q, k, v, out, lse, *options)

    def run() -> None:
        if way == "forward":
            attention.forward(q, k, v, out, lse, *options)
        else:
            attention.backward(dout, q, k, v, out, lse, dq, dk, dv, *options)

    try:
        with mock.patch.object(tiles, "tile", return_value=tile):
            return timer(run)
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--head-dim", type=int, choices=tiles.HEAD_DIMS, default=32)
    parser.add_argument("--rows", type=int, default=65536, help="tokens of the batch")
    arguments = parser.parse_args()
    dtype, head_dim = DTYPES[arguments.dtype], arguments.head_dim

    def timer(function: Callable[[], object]) -> float:
        return triton.testing.do_bench(function, return_mode="median")

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    for way, length in itertools.product(("forward", "backward"), LENGTHS):
        where = (dtype, head_dim, length, arguments.rows, "cuda", timer)
        now = tiles.tile(way, dtype.itemsize * 8, head_dim, length)
        times = {tile: measure(way, tile, *where) for tile in {*candidates(length), now}}
        best = min(times, key=lambda tile: times[tile])
        print(f"{way} {length}: {best} {times[best]:.4f} ms; now {now} {times[now]:.4f} ms")


if __name__ == "__main__":
    main()
