"""The question of attention alone: one layer of it, forward or with backward.

B texts, T tokens (rows), H heads, D head_dim, L padded length.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from attention_peers import ATTENTION_PEERS, AttentionPeer, Batch, Wanted
from contest import Contest, Expected, OneOperation, backends, require, verified_texts
from limit import Limit, Work
from torch import Tensor
from workload import Setting

from fasttx.ops.contract import Spans
from fasttx.ops.dropout import Dropout
from fasttx.ops.registry import Backend
from fasttx.testing import AttentionCase

SLACK = 128
Outcome = tuple[Tensor, ...]  # the output (T, H, D); with backward also the gradient of qkv


@dataclass(frozen=True, eq=False)
class Attention:
    """One layer's attention on packed texts; what all its contestants share."""

    setting: Setting
    lengths: list[list[int]]  # of each input's texts
    p: float
    backward: bool

    @property
    def head_dim(self) -> int:
        return self.setting.config.d_model // self.setting.config.num_heads

    @functools.cached_property
    def inputs(self) -> list[tuple[Tensor, Tensor]]:
        """qkv (T, 3, H, D) and the output's gradient (T, H, D) of each input, never zeros."""
        generator = torch.Generator().manual_seed(0)
        heads = (self.setting.config.num_heads, self.head_dim)

        def draw(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator)
            return x.to(self.setting.device, self.setting.dtype)

        return [(draw(sum(n), 3, *heads), draw(sum(n), *heads)) for n in self.lengths]

    @functools.cached_property
    def cu_seqlens(self) -> list[Tensor]:
        """(B + 1,) int32 of each input."""
        bounds = [torch.tensor([0, *np.cumsum(n)], dtype=torch.int32) for n in self.lengths]
        return [cu.to(self.setting.device) for cu in bounds]

    @functools.cached_property
    def first(self) -> FirstTexts:
        lens = self.lengths[0][: verified_texts(self.lengths[0])]
        shape = (self.setting.config.num_heads, self.head_dim)
        return FirstTexts("first texts", tuple(lens), *shape, given=self.inputs[0])

    @functools.cache  # noqa: B019  (as long-lived as its contest)
    def expected(self, p: float) -> Expected:
        return Expected.of(self.first, self.setting.dtype, p)


@dataclass(frozen=True, eq=False)
class FirstTexts(AttentionCase):
    """The first texts of an input. No text depends on the others, so a contestant computes all."""

    given: tuple[Tensor, Tensor] = ()

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        qkv, grad = (x[: self.total].to("cpu", dtype) for x in self.given)
        return qkv, grad

    def of(self, outcome: Outcome) -> dict[str, Tensor]:
        """Their part of an outcome, by the names of `define`."""
        out, *dqkv = (x.detach()[: self.total] for x in outcome)
        values = (out, *(x for packed in dqkv for x in packed.unbind(1)))
        return dict(zip(("out", "dq", "dk", "dv"), values, strict=False))


class _Contestant(OneOperation):
    """Subclasses say how an outcome is computed, and how it is brought into the packed form."""

    def compute(self, i: int, p: float, seed: int) -> Outcome:
        raise NotImplementedError

    def packed(self, outcome: Outcome) -> Outcome:
        return outcome

    def outcome(self, p: float, seed: int) -> dict[str, Tensor]:
        return self.work.first.of(self.packed(self.compute(0, p, seed)))

    def step(self, i: int) -> object:
        return self.compute(i, self.work.p, i)


class BackendAttention(_Contestant):
    """A backend's attention, on qkv read in place."""

    def __init__(self, name: str, work: Attention, backend: Backend) -> None:
        super().__init__(name, work, backend)
        self.backend = backend

    def prepare(self) -> None:
        work, setting = self.work, self.work.setting
        reasons = self.backend.unavailable_reasons(setting.device, setting.dtype, work.head_dim)
        require(reasons)
        self.attention = self.backend.operations.attention
        self.inputs = [(qkv.clone().requires_grad_(work.backward), g) for qkv, g in work.inputs]
        self.spans = [
            Spans.from_cu_seqlens(cu, max(n), sum(n))
            for cu, n in zip(work.cu_seqlens, work.lengths, strict=True)
        ]
        count = max(3, len(work.inputs))
        self.seeds = [torch.tensor(i, device=setting.device) for i in range(count)]

    def compute(self, i: int, p: float, seed: int) -> Outcome:
        qkv, grad = self.inputs[i]
        with torch.set_grad_enabled(self.work.backward):
            out = self.attention(qkv, self.spans[i], Dropout.of(p, self.seeds[seed]))
            return (out, *torch.autograd.grad(out, qkv, grad)) if self.work.backward else (out,)


class PeerAttention(_Contestant):
    """A peer's attention, on inputs in the form that suits it."""

    def __init__(self, name: str, work: Attention, peer: AttentionPeer) -> None:
        super().__init__(name, work, None, peer.note)
        self.peer = peer

    def prepare(self) -> None:
        work, padded = self.work, self.peer.padded
        setting = work.setting
        wanted = Wanted(setting.device, setting.dtype, work.p, work.backward)
        require(self.peer.unavailable(wanted))
        self.batches, self.grads = [], []
        for (qkv, grad), cu, lengths in zip(
            work.inputs, work.cu_seqlens, work.lengths, strict=True
        ):
            longest = max(lengths)
            real = torch.arange(longest, device=setting.device) < cu.diff()[:, None]
            # FlexAttention reads past the last row on the CPU (torch 2.13): zeros lie there.
            packed = F.pad(qkv, (0, 0, 0, 0, 0, 0, 0, SLACK))[: len(qkv)]
            packed = packed.detach().requires_grad_(work.backward and not padded)
            wide = qkv.new_zeros(3, *real.shape, *qkv.shape[2:])
            wide[:, real] = qkv.transpose(0, 1)
            wide = wide.transpose(2, 3).contiguous().requires_grad_(work.backward and padded)
            self.batches.append(Batch(packed, cu, longest, wide, real))
            if padded:
                packed_grad, grad = grad, grad.new_zeros(*real.shape, *grad.shape[1:])
                grad[real] = packed_grad
                grad = grad.transpose(1, 2)
            self.grads.append(grad)

    def compute(self, i: int, p: float, seed: int) -> Outcome:
        batch = self.batches[i]
        with torch.set_grad_enabled(self.work.backward):
            out = self.peer.attend(batch, p)
            if not self.work.backward:
                return (out,)
            leaf = batch.padded if self.peer.padded else batch.packed
            return (out, *torch.autograd.grad(out, leaf, self.grads[i]))

    def packed(self, outcome: Outcome) -> Outcome:
        if not self.peer.padded:
            return outcome
        real = self.batches[0].real
        out, *dqkv = (x.transpose(-3, -2)[..., real, :, :] for x in outcome)
        return (out, *(x.transpose(0, 1) for x in dqkv))


def attention_names() -> list[str]:
    return [*ATTENTION_PEERS, *backends()]


def attention(
    setting: Setting, lengths: Sequence[Sequence[int]], what: str, *, p: float = 0.1,
    backward: bool = True,
) -> Contest:  # fmt: skip
    """One layer's attention on each input's texts of these lengths; forward, or with backward."""
    work = Attention(setting, [list(n) for n in lengths], p, backward)
    peers = {name: PeerAttention(name, work, peer) for name, peer in ATTENTION_PEERS.items()}
    ours = {name: BackendAttention(name, work, backend) for name, backend in backends().items()}
    ideal = [
        Work.of_attention(setting.config, n, backward, setting.dtype.itemsize) for n in work.lengths
    ]
    passes = "forward + backward" if backward else "forward"
    dtype = str(setting.dtype).removeprefix("torch.")
    facts = {
        "level": "attention", "texts": len(lengths[0]), "lengths": what, "p": p,
        "tokens": float(np.mean([sum(n) for n in lengths])), "backward": backward, "dtype": dtype,
    }  # fmt: skip
    return Contest(
        f"attention, {passes}, {len(lengths[0])} texts, {what}, p = {p:g}, {dtype}, "
        f"{setting.config.num_heads} heads of {work.head_dim}",
        setting.device, len(lengths), len(lengths[0]), {**peers, **ours},
        Limit(ideal, setting.device, setting.dtype), len(lengths), facts,
    )  # fmt: skip


def on_reviews(setting: Setting, batch_size: int, *, inputs: int = 3, **options: Any) -> Contest:
    """The same on batches of reviews."""
    size = setting.of(batch_size)
    ids, what = setting.texts(inputs * size)
    return attention(setting, ids.lengths.reshape(inputs, size).tolist(), what, **options)
