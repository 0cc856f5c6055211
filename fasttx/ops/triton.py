"""Attention and row operations by fused Triton kernels, for NVIDIA GPUs (and AMD's, as Triton can).

The kernels are in `kernels/triton/`. T rows, B sequences, H heads, D head_dim.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util

import torch
from torch import Tensor

from fasttx.ops import dropout
from fasttx.ops.rows import LAYER_NORM_EPS, RowOps

OLDEST = (3, 4)  # of Triton: what torch 2.8 brings
LARGEST_HEAD_DIM = 128


def unavailable_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    reasons = _of_triton()
    if device.type == "cuda" and not reasons:
        reasons = _of_device(device)
    if not 0 < head_dim <= LARGEST_HEAD_DIM:
        reasons.append(
            f"head_dim {head_dim}: takes 1 to {LARGEST_HEAD_DIM}; use more heads, or backend sdpa"
        )
    return reasons


@functools.cache
def _of_triton() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        why = "Triton is not installed: on Linux torch's CUDA builds bring it; else "
        return [why + "pip install 'fasttx[triton]'"]
    version = importlib.metadata.version("triton")
    if tuple(int(n) for n in version.split(".")[:2]) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return [f"Triton {version} is too old: needs {wanted}; pip install -U torch triton"]
    return []


def _of_device(device: torch.device) -> list[str]:
    if not torch.cuda.is_available():
        why = "no CUDA device: torch sees none; on a machine with one, install a CUDA build of "
        return [why + "torch (https://pytorch.org/get-started)"]
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            has = "{} has compute capability {}.{}"
            why = has.format(torch.cuda.get_device_name(device), *capability)
            return [f"{why}: needs 8.0 (Ampere) or newer; use backend sdpa"]
    return []


def _dropout(p: float, seed: Tensor | None) -> tuple[int, Tensor | None]:
    """The threshold and the seed that the operators take; raises as the specification does."""
    t = dropout.threshold(p)
    return t, dropout.require_seed(seed) if t else None


def attention(
    qkv: Tensor,
    seq_starts: Tensor,
    seq_lens: Tensor,
    *,
    max_seqlen: int,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`attention_qkv` of packed projections qkv (T, 3, H, D), read in place."""
    from fasttx.kernels.triton.attention import attention as operator

    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return operator(
        qkv, seq_starts, seq_lens, max_seqlen, *_dropout(dropout_p, seed), causal, scale
    )[0]


def attention_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_starts: Tensor,
    seq_lens: Tensor,
    *,
    max_seqlen: int,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention inside each sequence. q, k, v (T, H, D), seq_starts and seq_lens (B,) int32
    -> (T, H, D), all of one dtype of float32, bfloat16, float16; D up to 128.

    Any strides, best with D contiguous. Rows outside every sequence come out 0, and so do their
    gradients, whatever they hold. seed: () int64 tensor, needed where dropout_p > 0. Products of
    float32 are exact to float32 unless torch.set_float32_matmul_precision allows TF32.
    Raises ValueError and TypeError for shapes, dtypes and probabilities that cannot be.
    """
    from fasttx.kernels.triton.attention import attention_qkv as operator

    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return operator(
        q, k, v, seq_starts, seq_lens, max_seqlen, *_dropout(dropout_p, seed), causal, scale
    )[0]


def _embed(
    ids: Tensor, position_ids: Tensor, table: Tensor, pe: Tensor, p: float, seed: Tensor | None
) -> Tensor:
    from fasttx.kernels.triton.embed import embed

    return embed(ids, position_ids, table, pe, *_dropout(p, seed))


def _add_norm(
    h: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    from fasttx.kernels.triton.add_norm import add_norm

    return add_norm(h, y, bias, gamma, beta, *_dropout(p, seed), LAYER_NORM_EPS)[:2]


def _bias_act(
    u: Tensor, bias: Tensor, p: float, seed: Tensor | None, activation: str = "relu"
) -> Tensor:
    from fasttx.kernels.triton.bias_act import bias_act

    return bias_act(u, bias, *_dropout(p, seed), activation == "gelu")


rowops = RowOps(_embed, _add_norm, _bias_act)
