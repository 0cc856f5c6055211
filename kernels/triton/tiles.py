"""Which tile each attention kernel runs with: a static table, no measuring at run time.

Autotuning would pick differently from run to run, which changes rounding, and cannot run while a
CUDA graph is captured. `python -m fasttx.kernels.triton.tune` measures the candidates on a GPU and
prints this table anew; `docs/kernels-triton.md` says why each entry is what it is.
"""

from typing import NamedTuple

HEAD_DIMS = (16, 32, 64, 128)  # others are padded to the next inside the kernel


class Tile(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys. whole: BLOCK_N covers every key of a sequence."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    whole: bool


# (bits of the dtype, padded head_dim) -> whole rows: (up to this max_seqlen, queries, warps), ...;
# and the tile beyond: queries, keys, warps, stages. A warp is 32 threads here; where it is 64 (AMD)
# a kernel gets half as many.
_Entry = tuple[tuple[tuple[int, int, int], ...], tuple[int, int, int, int]]
_FORWARD: dict[tuple[int, int], _Entry] = {
    (16, 16): (((256, 64, 4),), (64, 64, 4, 2)),
    (16, 32): (((256, 64, 4),), (64, 64, 4, 2)),
    (16, 64): (((128, 64, 4),), (64, 64, 4, 2)),
    (16, 128): (((128, 64, 4),), (64, 64, 4, 2)),
    (32, 16): (((64, 32, 4),), (32, 64, 4, 1)),
    (32, 32): (((64, 32, 4),), (32, 64, 4, 1)),
    (32, 64): (((64, 32, 4),), (32, 32, 4, 1)),
    (32, 128): (((32, 32, 8),), (16, 32, 8, 1)),
}
_BACKWARD: dict[tuple[int, int], _Entry] = {
    (16, 16): (((128, 64, 8), (256, 32, 8)), (64, 64, 4, 1)),
    (16, 32): (((128, 64, 8), (256, 32, 8)), (64, 64, 4, 1)),
    (16, 64): (((64, 32, 4), (128, 32, 8)), (32, 64, 4, 1)),
    (16, 128): (((64, 64, 8),), (64, 64, 8, 1)),
    (32, 16): (((64, 32, 4),), (32, 32, 4, 1)),
    (32, 32): (((64, 32, 4),), (32, 32, 4, 1)),
    (32, 64): (((32, 32, 4),), (32, 32, 4, 1)),
    (32, 128): (((32, 32, 8),), (16, 32, 8, 1)),
}
SMALLEST = 16  # the least that a matrix product takes along each dimension


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """The smallest of HEAD_DIMS that holds head_dim."""
    return max(SMALLEST, power_of_two(head_dim))


def tile(way: str, bits: int, head_dim: int, max_seqlen: int, warp_size: int = 32) -> Tile:
    """The tile of "forward" or "backward" for a dtype of so many bits."""
    chosen = _tile(way, bits, head_dim, max_seqlen)
    return chosen._replace(num_warps=max(1, chosen.num_warps * 32 // warp_size))


def _tile(way: str, bits: int, head_dim: int, max_seqlen: int) -> Tile:
    table = _FORWARD if way == "forward" else _BACKWARD
    short, beyond = table[bits, padded_head_dim(head_dim)]
    for longest, block_m, num_warps in short:
        if max_seqlen <= longest:
            block_n = max(SMALLEST, power_of_two(max_seqlen))
            # Too little for eight warps, in 16 bits; with fewer than four registers spill. Products
            # of float32 keep their operands in registers, and there eight hold what four spill.
            if block_n < 64 and bits == 16:
                num_warps = 4
            return Tile(min(block_m, block_n), block_n, num_warps, 1, whole=True)
    return Tile(*beyond, whole=False)
