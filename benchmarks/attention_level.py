"""The question of attention alone: one layer of it, forward or with backward."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from contest import Contest, Unavailable, backends, check_dropout, check_same
from limit import Limit, Work
from peers import ATTENTION_PEERS, AttentionPeer, Batch
from torch import Tensor

from fasttx.config import ModelConfig
from fasttx.ops import reference
from fasttx.ops.registry import Backend


@dataclasses.dataclass(frozen=True)
class Attention:
    """One layer's attention on packed rows; what all its contestants share."""

    cu_seqlens: list[Tensor]  # of each input
    lengths: list[list[int]]
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    p: float
    backward: bool

    @property
    def head_dim(self) -> int:
        return self.config.d_model // self.config.num_heads

    @functools.cached_property
    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """qkv (T, 3, H, D) and the output's gradient (T, H, D) of each input, never zeros."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        heads = (self.config.num_heads, self.head_dim)
        return [(draw(sum(n), 3, *heads), draw(sum(n), *heads)) for n in self.lengths]

    @functools.cached_property
    def expected(self) -> list[Tensor]:
        """The reference's outcome on input 0, without dropout, in fp32 on its own fp32 inputs."""
        qkv, grad = (x.float() for x in self.rows[0])
        return self.outcome(functools.partial(self.call, reference.attention, 0, p=0.0), qkv, grad)

    @functools.cached_property
    def spans(self) -> list[dict[str, Any]]:
        """Where the texts of each input lie, as a backend takes it."""
        return [
            {"seq_starts": cu[:-1], "seq_lens": cu.diff(), "max_seqlen": max(n)}
            for cu, n in zip(self.cu_seqlens, self.lengths, strict=True)
        ]

    def call(self, attention: Any, i: int, qkv: Tensor, *, p: float, seed: int = 0) -> Tensor:
        at = torch.tensor(seed, device=self.device) if p else None
        return attention(qkv, **self.spans[i], dropout_p=p, seed=at)

    def outcome(self, attend: Any, qkv: Tensor, grad: Tensor) -> list[Tensor]:
        """The output, and with backward the gradient of qkv."""
        qkv = qkv.detach().requires_grad_(self.backward)
        out = attend(qkv)
        gradients = torch.autograd.grad(out, qkv, grad) if self.backward else ()
        return [x.detach() for x in (out, *gradients)]


class BackendAttention:
    """A backend's attention, on qkv read in place."""

    def __init__(self, name: str, backend: Backend, work: Attention) -> None:
        self.name, self.backend, self.work = name, backend, work
        self.note = "torch's own dropout masks" if backend.dropout == "torch" and work.p else ""

    def prepare(self) -> None:
        work = self.work
        reasons = self.backend.unavailable_reasons(work.device, work.dtype, work.head_dim)
        if reasons:
            raise Unavailable("; ".join(reasons))
        self.attention = self.backend.adapter().attention
        self.inputs = [(q.clone().requires_grad_(work.backward), g) for q, g in work.rows]
        self.seeds = [torch.tensor(i, device=work.device) for i in range(len(work.rows))]

    def verify(self) -> None:
        work, (qkv, grad) = self.work, self.work.rows[0]
        attend = functools.partial(work.call, self.attention, 0)
        plain = work.outcome(functools.partial(attend, p=0.0), qkv, grad)
        for what, mine, theirs in zip(("out", "dqkv"), plain, work.expected, strict=False):
            check_same(self.name, what, mine, theirs, work.dtype)
        if not work.p:
            return
        dropped = [work.outcome(functools.partial(attend, p=work.p, seed=s), qkv, grad)
                   for s in (1, 2)]  # fmt: skip
        check_dropout(self.name, plain[0], dropped[0][0], dropped[1][0])
        if self.backend.dropout == "shared":
            masked = functools.partial(work.call, reference.attention, 0, p=work.p, seed=1)
            expected = work.outcome(masked, qkv.float(), grad.float())
            for what, mine, theirs in zip(("out", "dqkv"), dropped[0], expected, strict=False):
                check_same(self.name, f"{what} with dropout", mine, theirs, work.dtype)

    def step(self, i: int) -> object:
        work, (qkv, grad) = self.work, self.inputs[i]
        seed = self.seeds[i] if work.p else None
        with torch.set_grad_enabled(work.backward):
            out = self.attention(qkv, **work.spans[i], dropout_p=work.p, seed=seed)
            return torch.autograd.grad(out, qkv, grad) if work.backward else out


class PeerAttention:
    """A peer's attention, on inputs in the form that suits it."""

    def __init__(self, name: str, peer: AttentionPeer, work: Attention) -> None:
        self.name, self.peer, self.work, self.note = name, peer, work, peer.note

    def prepare(self) -> None:
        work = self.work
        reasons = self.peer.unavailable(work.device, work.dtype, work.p, work.backward)
        if reasons:
            raise Unavailable("; ".join(reasons))
        self.batches, self.grads = [], []
        for (qkv, grad), cu, lengths in zip(work.rows, work.cu_seqlens, work.lengths, strict=True):
            longest = max(lengths)
            real = torch.arange(longest, device=work.device) < cu.diff()[:, None]
            packed = qkv.clone().requires_grad_(work.backward and not self.peer.padded)
            rows = qkv.new_zeros(3, *real.shape, *qkv.shape[2:])
            rows[:, real] = qkv.transpose(0, 1)
            rows = rows.transpose(2, 3).contiguous()
            rows.requires_grad_(work.backward and self.peer.padded)
            self.batches.append(Batch(packed, cu, longest, rows, real))
            if self.peer.padded:
                wide = grad.new_zeros(*real.shape, *grad.shape[1:])
                wide[real] = grad
                grad = wide.transpose(1, 2)
            self.grads.append(grad)

    def _run(self, i: int, p: float) -> tuple[Tensor, ...]:
        batch = self.batches[i]
        with torch.set_grad_enabled(self.work.backward):
            out = self.peer.attend(batch, p)
            if not self.work.backward:
                return (out,)
            leaf = batch.padded if self.peer.padded else batch.packed
            return (out, *torch.autograd.grad(out, leaf, self.grads[i]))

    def verify(self) -> None:
        real = self.batches[0].real
        plain = [x.detach() for x in self._run(0, 0.0)]
        packed = plain
        if self.peer.padded:
            packed = [x.transpose(-3, -2)[..., real, :, :] for x in plain]
            packed[1:] = [x.transpose(0, 1) for x in packed[1:]]
        for what, mine, theirs in zip(("out", "dqkv"), packed, self.work.expected, strict=False):
            check_same(self.name, what, mine, theirs, self.work.dtype)
        if self.work.p and not self.note:
            once, again = (self._run(0, self.work.p)[0].detach() for _ in range(2))
            check_dropout(self.name, plain[0], once, again)

    def step(self, i: int) -> object:
        return self._run(i, self.work.p)


def attention_names() -> list[str]:
    return [*ATTENTION_PEERS, *backends()]


def attention(
    lengths: Sequence[Sequence[int]], config: ModelConfig, device: torch.device, *,
    dtype: torch.dtype = torch.float32, p: float = 0.1, backward: bool = True, what: str,
) -> Contest:  # fmt: skip
    """One layer's attention on each input's texts of these lengths; forward, or with backward."""
    work = Attention(
        [torch.tensor([0, *np.cumsum(n)], dtype=torch.int32, device=device) for n in lengths],
        [list(n) for n in lengths], config, device, dtype, p, backward,
    )  # fmt: skip
    entrants: dict[str, Any] = {
        name: PeerAttention(name, peer, work) for name, peer in ATTENTION_PEERS.items()
    }
    for name, backend in backends().items():
        entrants[name] = BackendAttention(name, backend, work)
    itemsize = torch.empty((), dtype=dtype).element_size()
    ideal = [Work.of_attention(config, n, backward, itemsize) for n in work.lengths]
    passes = "forward + backward" if backward else "forward"
    return Contest(
        f"attention, {passes}, {len(lengths[0])} texts, {what}, p = {p:g}, "
        f"{str(dtype).removeprefix('torch.')}, {config.num_heads} heads of {work.head_dim}",
        device, len(lengths), len(lengths[0]), entrants, Limit(ideal, device, dtype),
        warmup=len(lengths),
        facts={"level": "attention", "texts": len(lengths[0]), "lengths": what, "p": p,
               "tokens": float(np.mean([sum(n) for n in lengths])), "backward": backward,
               "dtype": str(dtype).removeprefix("torch.")},
    )  # fmt: skip
