"""The questions: attention alone, the training step, and inference in bulk and one text at a time.

Each function here gives a Contest between the backends of the registry and the peers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from contest import Contest, Unavailable, check_dropout, check_same
from limit import Limit, Work
from peers import ATTENTION_PEERS, INFERENCE_PEERS, TRAINING_PEERS, AttentionPeer, Batch
from torch import Tensor, nn
from workload import make_batches, padded, slices

from fasttx import device as devices
from fasttx.attention import reference
from fasttx.attention.registry import BACKENDS, Backend, BackendUnavailableError
from fasttx.classifier import by_length
from fasttx.config import ModelConfig
from fasttx.model import TransformerClassifier
from fasttx.packing import PackedBatch, RaggedIds

DTYPES = {"fp32": torch.float32, "tf32": torch.float32} | {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
VERIFIED_TEXTS = 32  # at a time: what the reference stores grows with the batch


def backend_names() -> dict[str, Backend]:
    return {f"fasttx-{name}": backend for name, backend in BACKENDS.items()}


# -------------------------------------------------------------------------------- attention alone


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

    def call(self, attention: Any, i: int, qkv: Tensor, *, p: float, seed: int = 0) -> Tensor:
        cu = self.cu_seqlens[i]
        at = torch.tensor(seed, device=self.device) if p else None
        return attention(
            qkv, cu[:-1], cu.diff(), max_seqlen=max(self.lengths[i]), dropout_p=p, seed=at
        )

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
        cu = work.cu_seqlens[i]
        with torch.set_grad_enabled(work.backward):
            out = self.attention(
                qkv, cu[:-1], cu.diff(), max_seqlen=max(work.lengths[i]), dropout_p=work.p,
                seed=self.seeds[i] if work.p else None,
            )  # fmt: skip
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
    return [*ATTENTION_PEERS, *backend_names()]


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
    for name, backend in backend_names().items():
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


# ----------------------------------------------------------------------------------- whole models


@dataclasses.dataclass(frozen=True)
class Model:
    """What the contestants of a model contest share: the reference, and each input's batches."""

    config: ModelConfig
    inputs: list[list[PackedBatch]]
    device: torch.device
    precision: str

    @functools.cached_property
    def reference(self) -> TransformerClassifier:
        torch.manual_seed(0)
        config = dataclasses.replace(self.config, attn_backend="reference")
        return TransformerClassifier.from_config(config).to(self.device).eval()


class ModelContestant:
    """A whole model, built from the reference's weights and held to its logits (and gradients).

    Subclasses say what a step is.
    """

    training = False

    def __init__(self, name: str, make: Any, work: Model) -> None:
        self.name, self.make, self.work = name, make, work
        peer = isinstance(make, type)
        self.note = make.note if peer else ""
        if not peer and make.dropout == "torch" and self.training and work.config.dropout:
            self.note = "torch's own dropout masks"

    def prepare(self) -> None:
        work = self.work
        if isinstance(self.make, type):
            reasons = self.make.unavailable_reasons()
            if reasons:
                raise Unavailable("; ".join(reasons))
            self.model: nn.Module = self.make(work.config)
            if hasattr(self.make, "copy_from"):
                self.expected = self.make.comparable(work.reference)
                self.model.copy_from(self.expected)
            self.inputs = [[{"input_ids": padded(b)} for b in group] for group in work.inputs]
        else:
            config = dataclasses.replace(work.config, attn_backend=self.make.name)
            self.expected = work.reference
            model = TransformerClassifier.from_config(config)
            model.load_state_dict(self.expected.state_dict())
            self.model = model.to(work.device)
            try:
                _ = model.backend  # resolved for this device
            except BackendUnavailableError as error:
                reasons = [line[4:] for line in str(error).splitlines() if line.startswith("  - ")]
                raise Unavailable("; ".join(reasons)) from error
            self.inputs = [[b.model_inputs() for b in group] for group in work.inputs]
        self.model = self.model.to(work.device)

    def _logits(self, inputs: dict[str, Any]) -> Tensor:
        with devices.autocast(self.work.device, self.work.precision):
            return self.model(**inputs).float()

    def verify(self) -> None:
        dtype = DTYPES[self.work.precision]
        batch, inputs = self.work.inputs[0][0], self.inputs[0][0]
        self.model.eval()
        if not hasattr(self, "expected"):
            return self._verify_sane(batch, inputs)
        with torch.set_grad_enabled(self.training):
            logits = self._logits(inputs)
            mine = _outcome(self.model, logits, batch.labels, self.training)
            wide = [_reference_logits(self.expected, b) for b in slices(batch, VERIFIED_TEXTS)]
            theirs = _outcome(self.expected, torch.cat(wide), batch.labels, self.training)
        for what, a, b in zip(("logits", "head gradient", "embedding gradient"), mine, theirs,
                              strict=False):  # fmt: skip
            check_same(self.name, what, a, b, dtype)
        return self._verify_dropout(logits, inputs)

    def _verify_sane(self, batch: PackedBatch, inputs: dict[str, Any]) -> None:
        """Another function cannot be compared: its size, and that every weight takes part."""
        mine = sum(x.numel() for x in self.model.parameters())
        theirs = sum(x.numel() for x in self.work.reference.parameters())
        assert abs(mine / theirs - 1) < 0.2, f"{self.name} has {mine} parameters, fasttx {theirs}"
        logits = self._logits(inputs)
        assert logits.isfinite().all(), f"{self.name}: logits are not finite"
        if self.training:
            F.cross_entropy(logits, batch.labels).backward()
            idle = [n for n, x in self.model.named_parameters() if x.grad is None]
            assert not idle, f"{self.name}: no gradient for {', '.join(idle)}"
            self.model.zero_grad(set_to_none=True)
        self._verify_dropout(logits, inputs)

    def _verify_dropout(self, logits: Tensor, inputs: dict[str, Any]) -> None:
        if self.training and self.work.config.dropout:
            self.model.train()
            with torch.no_grad():
                check_dropout(self.name, logits.detach(), *(self._logits(inputs) for _ in range(2)))

    def step(self, i: int) -> object:
        raise NotImplementedError


def _reference_logits(model: TransformerClassifier, batch: PackedBatch) -> Tensor:
    return model(**batch.model_inputs())


def _outcome(model: nn.Module, logits: Tensor, labels: Tensor, backward: bool) -> list[Tensor]:
    """Logits, and with backward the gradients of the first and of the last large matrix."""
    if not backward:
        return [logits]
    F.cross_entropy(logits, labels).backward()
    head = model.head.dense if hasattr(model.head, "dense") else model.head[0]
    table = model.embedding if isinstance(model.embedding, Tensor) else model.embedding.weight
    found = [logits.detach(), head.weight.grad.clone(), table.grad.clone()]
    model.zero_grad(set_to_none=True)
    return found


class TrainingStep(ModelContestant):
    """Forward, loss, backward and Adam, dropout on."""

    training = True

    def verify(self) -> None:
        super().verify()
        self.model.train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4, fused=True)

    def step(self, i: int) -> object:
        (batch,), (inputs,) = self.work.inputs[i], self.inputs[i]
        F.cross_entropy(self._logits(inputs), batch.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return None


class Inference(ModelContestant):
    """Logits of every batch of an input."""

    def step(self, i: int) -> object:
        with torch.inference_mode():
            return [self._logits(inputs) for inputs in self.inputs[i]]


def _model_contest(
    title: str, kind: type[ModelContestant], peers: dict[str, Any], config: ModelConfig,
    inputs: list[list[PackedBatch]], device: torch.device, precision: str, facts: dict[str, Any],
) -> Contest:  # fmt: skip
    devices.set_precision(device, precision)
    work = Model(config, inputs, device, precision)
    makers = {**peers, **backend_names()}
    texts = [[n for b in group for n in b.cu_seqlens.diff().tolist()] for group in inputs]
    ideal = [Work.of_model(config, n, kind.training) for n in texts]
    return Contest(
        f"{title}, {precision}", device, len(inputs), len(texts[0]),
        {name: kind(name, make, work) for name, make in makers.items()},
        Limit(ideal, device, DTYPES[precision]),
        facts={**facts, "precision": precision, "tokens": float(np.mean([sum(n) for n in texts]))},
    )  # fmt: skip


def training_names() -> list[str]:
    return [*TRAINING_PEERS, *backend_names()]


def training(
    ids: RaggedIds, batch_size: int, config: ModelConfig, device: torch.device, *,
    precision: str = "fp32", what: str,
) -> Contest:  # fmt: skip
    """A whole training step on batches of `batch_size` texts."""
    batches = [[b] for b in make_batches(ids, batch_size, device)]
    title = f"training step, batch {batch_size}, {what}, dropout {config.dropout_text} everywhere"
    facts = {"level": "training", "batch": batch_size, "lengths": what}
    return _model_contest(
        title, TrainingStep, TRAINING_PEERS, config, batches, device, precision, facts
    )


def inference_names() -> list[str]:
    return [*INFERENCE_PEERS, *backend_names()]


def bulk(
    ids: RaggedIds, batch_size: int, config: ModelConfig, device: torch.device, *, texts: int,
    precision: str = "fp32", what: str,
) -> Contest:  # fmt: skip
    """Throughput: `texts` texts a step, in batches of like length, as `fasttx.load` predicts."""
    inputs = []
    for start in range(0, len(ids), texts):
        group = ids.select(np.arange(start, start + texts))
        order = np.concatenate(list(by_length(group, batch_size)))
        inputs.append(make_batches(group.select(order), batch_size, device))
    title = f"inference, {texts} texts in batches of {batch_size} sorted by length, {what}"
    facts = {"level": "inference", "batch": batch_size, "lengths": what}
    return _model_contest(
        title, Inference, INFERENCE_PEERS, config, inputs, device, precision, facts
    )


def latency(
    ids: RaggedIds, config: ModelConfig, device: torch.device, *, precision: str = "fp32",
    what: str,
) -> Contest:  # fmt: skip
    """One text at a time: tokens to logits."""
    batches = [[b] for b in make_batches(ids, 1, device)]
    title = f"latency of one text, {what}"
    facts = {"level": "latency", "batch": 1, "lengths": what}
    return _model_contest(
        title, Inference, INFERENCE_PEERS, config, batches, device, precision, facts
    )
