"""The questions of whole models: the training step, and inference in bulk and text by text."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from contest import DTYPES, Contest, Unavailable, backends, check_dropout, check_same
from limit import Limit, Work
from peers import INFERENCE_PEERS, TRAINING_PEERS
from torch import Tensor, nn
from workload import make_batches, padded, slices

from fasttx import device as devices
from fasttx.config import ModelConfig
from fasttx.load import by_length
from fasttx.models.classifier import TransformerClassifier
from fasttx.ops.registry import Backend
from fasttx.text.packing import PackedBatch, RaggedIds

VERIFIED_TEXTS = 32  # at a time: what the reference stores grows with the batch


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
        if isinstance(self.make, type):
            self._prepare_peer(self.make)
        else:
            self._prepare_backend(self.make)
        self.model = self.model.to(self.work.device)

    def _prepare_peer(self, peer: Any) -> None:
        work = self.work
        if reasons := peer.unavailable_reasons(work.precision):
            raise Unavailable("; ".join(reasons))
        self.model: nn.Module = peer(work.config)
        if hasattr(peer, "copy_from"):
            self.expected = peer.comparable(work.reference)
            self.model.copy_from(self.expected)
        self.inputs = [[{"input_ids": padded(b)} for b in group] for group in work.inputs]

    def _prepare_backend(self, backend: Backend) -> None:
        work, c = self.work, self.work.config
        head_dim = c.d_model // c.num_heads
        if reasons := backend.unavailable_reasons(work.device, torch.float32, head_dim):
            raise Unavailable("; ".join(reasons))
        self.expected = work.reference
        config = dataclasses.replace(c, attn_backend=backend.name)
        self.model = TransformerClassifier.from_config(config)
        self.model.load_state_dict(self.expected.state_dict())
        self.inputs = [[b.model_inputs() for b in group] for group in work.inputs]

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
            wide = [self.expected(**b.model_inputs()) for b in slices(batch, VERIFIED_TEXTS)]
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


class SpecificationStep(TrainingStep):
    """The reference's step, which stores every attention weight several times over."""

    def prepare(self) -> None:
        size = len(self.work.inputs[0][0])
        if size > 2 * VERIFIED_TEXTS:
            raise Unavailable(
                f"batch {size}: the specification stores every attention weight several times and "
                f"is timed with up to {2 * VERIFIED_TEXTS} texts"
            )
        super().prepare()


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
    makers = {**peers, **backends()}
    texts = [[n for b in group for n in b.cu_seqlens.diff().tolist()] for group in inputs]
    ideal = [Work.of_model(config, n, kind.training) for n in texts]
    return Contest(
        f"{title}, {precision}", device, len(inputs), len(texts[0]),
        {name: kind(name, make, work) for name, make in makers.items()},
        Limit(ideal, device, DTYPES[precision]),
        facts={**facts, "precision": precision, "tokens": float(np.mean([sum(n) for n in texts]))},
    )  # fmt: skip


def training_names() -> list[str]:
    return [*TRAINING_PEERS, *backends()]


def training(
    ids: RaggedIds, batch_size: int, config: ModelConfig, device: torch.device, *,
    precision: str = "fp32", what: str,
) -> Contest:  # fmt: skip
    """A whole training step on batches of `batch_size` texts."""
    batches = [[b] for b in make_batches(ids, batch_size, device)]
    title = f"training step, batch {batch_size}, {what}, dropout {config.dropout_text} everywhere"
    facts = {"level": "training", "batch": batch_size, "lengths": what}
    contest = _model_contest(
        title, TrainingStep, TRAINING_PEERS, config, batches, device, precision, facts
    )
    step = contest.entrants["fasttx-reference"]
    contest.entrants[step.name] = SpecificationStep(step.name, step.make, step.work)
    return contest


def inference_names() -> list[str]:
    return [*INFERENCE_PEERS, *backends()]


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
