"""The questions of whole models: the training step, and inference in bulk."""

from __future__ import annotations

import copy
import dataclasses
import functools
from contextlib import AbstractContextManager
from typing import Any

import native
import numpy as np
import torch
import torch.nn.functional as F
from contest import (
    Contest,
    Contestant,
    Expected,
    backends,
    check_dropout,
    mask_note,
    require,
    verified_texts,
)
from engine_peers import ENGINES
from limit import Limit, Work
from model_peers import PEERS, Peer
from torch import Tensor, nn
from workload import Setting, first_texts, make_batches, padded

from fasttx import device as devices
from fasttx.models.classifier import TransformerClassifier
from fasttx.ops.registry import Backend
from fasttx.text.packing import PackedBatch
from fasttx.text.reading import by_length

SPECIFICATION_TEXTS = 64  # a step of it stores every attention weight several times over


@dataclasses.dataclass(frozen=True)
class Model:
    """What the contestants of a model contest share: the reference, and each input's batches."""

    setting: Setting
    inputs: list[list[PackedBatch]]
    training: bool

    def build(self, backend: str) -> TransformerClassifier:
        config = dataclasses.replace(self.setting.config, attn_backend=backend)
        return TransformerClassifier.from_config(config).to(self.setting.device).eval()

    @functools.cached_property
    def reference(self) -> TransformerClassifier:
        torch.manual_seed(0)
        model = self.build("reference")
        with torch.no_grad():
            for x in model.parameters():
                if x.dim() == 1:  # biases and norms: as they begin, some could be left out unseen
                    x.add_(torch.randn_like(x), alpha=0.1)
        return model

    @functools.cached_property
    def first(self) -> PackedBatch:
        """The first texts of a batch that is timed, the last one of input 0."""
        batch = self.inputs[0][-1]
        return first_texts(batch, verified_texts(batch.cu_seqlens.diff().tolist()))

    def expected_of(self, model: TransformerClassifier, tolerance: float | None = None) -> Expected:
        """The outcome of this model on the first texts: exact on the CPU, and as it is run.

        tolerance: how far an outcome may be off, relative to its length, instead.
        """
        exact_model = copy.deepcopy(model).to("cpu", torch.float64)
        with torch.set_grad_enabled(self.training):
            exact = exact_model(**self.first.to("cpu").model_inputs())
        wanted = self.outcome(exact_model, exact)
        if tolerance is not None:
            return Expected.within(wanted, tolerance)
        with torch.set_grad_enabled(self.training):
            plain = self.logits(model, self.first.model_inputs())
        return Expected(wanted, self.outcome(model, plain), self.setting.dtype)

    @functools.cached_property
    def expected(self) -> Expected:
        return self.expected_of(self.reference)

    def logits(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        with self.autocast():
            return model(**inputs).float()

    def autocast(self) -> AbstractContextManager[Any]:
        return devices.autocast(self.setting.device, self.setting.precision)

    def outcome(self, model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
        """Logits of the first texts; in training also gradients of the last and the first matrix.

        No text depends on the others, so it does not matter that `logits` may be of a whole batch.
        """
        logits = logits[: len(self.first)]
        found = {"logits": logits.detach().cpu()}
        if self.training:
            F.cross_entropy(logits, self.first.labels.to(logits.device)).backward()
            found["dhead"] = model.head.dense.weight.grad.cpu()
            found["dembedding"] = model.embedding.grad.cpu()
            model.zero_grad(set_to_none=True)
        return found


class _Contestant:
    """A whole model, built from the reference's weights where it computes the same function.

    A step is forward, loss, backward and Adam with dropout, or the logits of all batches.
    """

    model: nn.Module
    inputs: list[list[dict[str, Any]]]
    expected: Expected | None
    precision: str | None = None  # of its own

    def __init__(self, name: str, work: Model, note: str) -> None:
        self.name, self.work, self.note = name, work, note
        self.step = self._train if work.training else self._answer

    def prepare(self) -> None:
        raise NotImplementedError

    def verify(self) -> None:
        work, inputs = self.work, self.inputs[0][-1]
        self.model.eval()
        logits = work.logits(self.model, inputs) if work.training else self._answer(0)[-1]
        assert logits.isfinite().all(), f"{self.name}: logits are not finite"
        if self.expected is not None:
            self.expected.check(self.name, work.outcome(self.model, logits))
        else:
            self._verify_size(logits)
        if work.training:
            self.model.train()
            self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4, fused=True)
            if work.setting.config.dropout:
                with torch.no_grad():
                    once, again = (work.logits(self.model, inputs) for _ in range(2))
                check_dropout(self.name, logits.detach(), once, again)

    def _verify_size(self, logits: Tensor) -> None:
        """Another function cannot be compared: its size, and that every weight takes part."""
        mine = sum(x.numel() for x in self.model.parameters())
        theirs = sum(x.numel() for x in self.work.reference.parameters())
        assert abs(mine / theirs - 1) < 0.2, f"{self.name} has {mine} parameters, fasttx {theirs}"
        if self.work.training:
            logits.sum().backward()
            idle = [n for n, x in self.model.named_parameters() if x.grad is None]
            assert not idle, f"{self.name}: no gradient for {', '.join(idle)}"
            self.model.zero_grad(set_to_none=True)

    def _train(self, i: int) -> None:
        (batch,), (inputs,) = self.work.inputs[i], self.inputs[i]
        F.cross_entropy(self.work.logits(self.model, inputs), batch.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _answer(self, i: int) -> list[Tensor]:
        with torch.inference_mode():
            return [self.work.logits(self.model, inputs) for inputs in self.inputs[i]]


class PeerModel(_Contestant):
    def __init__(self, name: str, work: Model, peer: type[Peer]) -> None:
        super().__init__(name, work, peer.note)
        self.peer, self.precision = peer, peer.precision

    def prepare(self) -> None:
        work = self.work
        require(self.peer.unavailable_reasons(work.setting))
        self.model = self.peer(work.setting.config).to(work.setting.device)
        self.expected = None
        comparable = self.peer.comparable(work.reference)
        if comparable is not None:
            self.model.copy_from(comparable)
            same = comparable is work.reference and self.peer.tolerance is None
            self.expected = (
                work.expected if same else work.expected_of(comparable, self.peer.tolerance)
            )
        self.inputs = [[{"input_ids": padded(b)} for b in group] for group in work.inputs]

    def _answer(self, i: int) -> list[Tensor]:
        batches = [inputs["input_ids"] for inputs in self.inputs[i]]
        with torch.inference_mode(), self.work.autocast():
            return [logits.float() for logits in self.model.answer_all(batches)]


class BackendModel(_Contestant):
    def __init__(self, name: str, work: Model, backend: Backend) -> None:
        p = work.setting.config.dropout if work.training else 0.0
        super().__init__(name, work, mask_note(backend, p))
        self.backend = backend

    def prepare(self) -> None:
        work, config, texts = self.work, self.work.setting.config, len(self.work.inputs[0][0])
        head_dim = config.d_model // config.num_heads
        require(self.backend.unavailable_reasons(work.setting.device, torch.float32, head_dim))
        if work.training and self.backend.name == "reference" and texts > SPECIFICATION_TEXTS:
            reason = f"batch {texts}: the specification is timed with up to {SPECIFICATION_TEXTS}"
            require([f"{reason} texts, since it stores every attention weight several times"])
        self.model = work.build(self.backend.name)
        self.model.load_state_dict(work.reference.state_dict())
        self.expected = work.expected
        self.inputs = [[b.model_inputs() for b in group] for group in work.inputs]


class NativeModel(_Contestant):
    """The encoder that answers in one call, in a precision of its own."""

    def __init__(self, name: str, work: Model, precision: str) -> None:
        super().__init__(name, work, "")
        self.precision = precision

    def prepare(self) -> None:
        work, precision = self.work, self.precision
        require([] if work.setting.device.type == "cpu" else ["it is for the CPU"])
        model = work.build("cpu")
        model.load_state_dict(work.reference.state_dict())
        self.model = native.NativeEncoder(model, precision)
        self.expected = work.expected_of(work.reference, native.TOLERANCES[precision])
        self.inputs = [[native.inputs(b) for b in group] for group in work.inputs]

    def _answer(self, i: int) -> list[Tensor]:
        return [self.model(**inputs) for inputs in self.inputs[i]]


def native_names() -> dict[str, str]:
    """Contestants and their precisions."""
    return {f"fasttx-native-{precision}": precision for precision in native.TOLERANCES}


def entrants(work: Model) -> dict[str, Contestant]:
    """All who may take part: peers, engines, backends, the native encoder."""
    found: dict[str, Contestant] = {
        name: PeerModel(name, work, peer)
        for name, peer in {**PEERS, **ENGINES}.items()
        if not (work.training and peer.inference_only)
    }
    found |= {name: BackendModel(name, work, backend) for name, backend in backends().items()}
    if not work.training:
        found |= {name: NativeModel(name, work, p) for name, p in native_names().items()}
    return found


def training_names() -> list[str]:
    theirs = [name for name, peer in PEERS.items() if not peer.inference_only]
    return [*theirs, *backends()]


def inference_names() -> list[str]:
    return [*PEERS, *ENGINES, *backends(), *native_names()]


def _contest(
    title: str, setting: Setting, inputs: list[list[PackedBatch]], facts: dict[str, Any]
) -> Contest:
    devices.set_precision(setting.device, setting.precision)
    training = facts["level"] == "training"
    work = Model(setting, inputs, training)
    texts = [[n for b in group for n in b.cu_seqlens.diff().tolist()] for group in inputs]
    ideal = [Work.of_model(setting.config, n, training) for n in texts]
    tokens = float(np.mean([sum(n) for n in texts]))
    return Contest(
        f"{title}, {setting.precision}",
        setting.device,
        len(inputs),
        len(texts[0]),
        entrants(work),
        Limit(ideal, setting.device, setting.dtype),
        facts={**facts, "precision": setting.precision, "tokens": tokens},
    )


def training(setting: Setting, batch_size: int, *, inputs: int = 4) -> Contest:
    """A whole training step on batches of `batch_size` texts."""
    size = setting.of(batch_size)
    ids, what = setting.texts(inputs * size)
    batches = [[b] for b in make_batches(ids, size, setting.device)]
    dropout = setting.config.dropout_text
    title = f"training step, batch {size}, {what}, dropout {dropout} everywhere"
    return _contest(title, setting, batches, {"level": "training", "batch": size, "lengths": what})


def bulk(setting: Setting, batch_size: int, *, inputs: int = 4) -> Contest:
    """Throughput: texts in batches of like length, as `fasttx.load` predicts them."""
    size, texts = setting.of(batch_size), setting.of(4 * batch_size)
    ids, what = setting.texts(inputs * texts)
    batches = []
    for start in range(0, len(ids), texts):
        group = ids.select(np.arange(start, start + texts))
        order = np.concatenate(list(by_length(group, size)))
        batches.append(make_batches(group.select(order), size, setting.device))
    title = f"inference, {texts} texts in batches of {size} sorted by length, {what}"
    return _contest(title, setting, batches, {"level": "inference", "batch": size, "lengths": what})
