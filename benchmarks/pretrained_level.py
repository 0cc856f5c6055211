"""The questions of who starts from a pretrained encoder: fine-tuning it, and classifying with it.

All contestants have the weights of one folder of Hugging Face's (--pretrained), with a new head,
and one set of texts. B texts, L padded length.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_peers
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
from limit import Limit, Work
from model_peers import missing
from torch import Tensor, nn
from workload import Setting, first_texts, make_batches, padded, reviews

from fasttx import device as devices
from fasttx.config import ModelConfig
from fasttx.models.classifier import TransformerClassifier
from fasttx.models.pretrained import read_folder
from fasttx.ops.registry import Backend
from fasttx.text.packing import PackedBatch, RaggedIds
from fasttx.text.pieces import PieceTokenizer
from fasttx.text.reading import read

BATCHES = 2  # of a step: an epoch in small
_DROPOUTS = (  # as the families name them
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout",
    "dropout", "attention_dropout", "seq_classif_dropout",
)  # fmt: skip
POOL = 50  # batches that transformers' Trainer sorts by length at a time (train_sampling_strategy)


class Encoder:
    """What the contestants share: a model of transformers' with a new head, the texts in batches as
    they come and in batches of like length, and what the first texts come to.

    training: dropout is on, and outcomes have gradients.
    """

    def __init__(self, setting: Setting, folder: str, batch_size: int, *, training: bool) -> None:
        require(missing("transformers", "transformers") + missing("tokenizers", "tokenizers"))
        self.setting, self.folder, self.training = setting, folder, training
        devices.set_precision(setting.device, setting.precision)
        size = setting.of(batch_size)
        ids, self.what = _texts(setting, folder, POOL * size)
        # The same texts for all: batches of like length from the whole pool, and these shuffled.
        order = np.argsort(ids.lengths, kind="stable").reshape(POOL, size)
        chosen = order[[int((i + 0.5) / BATCHES * POOL) for i in range(BATCHES)]].ravel()
        shuffled = np.random.default_rng(0).permutation(chosen)
        self.grouped = make_batches(ids.select(chosen), size, setting.device)
        self.mixed = make_batches(ids.select(shuffled), size, setting.device)

    def theirs(self, attention: str = "sdpa") -> Any:
        """BertForSequenceClassification or its like, in eval mode; the same weights each time."""
        from transformers import AutoConfig, AutoModelForSequenceClassification
        from transformers.utils import logging

        config = AutoConfig.from_pretrained(self.folder, num_labels=2)
        for name in _DROPOUTS:
            if hasattr(config, name):
                setattr(config, name, self.setting.config.dropout)
        shown = logging.get_verbosity()
        logging.set_verbosity_error()  # the head is new, as it should be
        logging.disable_progress_bar()
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            self.folder, config=config, attn_implementation=attention, ignore_mismatched_sizes=True
        )
        logging.set_verbosity(shown)
        return model.to(self.setting.device).eval()

    def ours(self, backend: str) -> TransformerClassifier:
        """The same model as fasttx has it, by way of a folder."""
        with tempfile.TemporaryDirectory() as folder:
            self.theirs().save_pretrained(folder)
            found = read_folder(Path(folder))
            state = found.state()
        max_len, p = self.setting.config.max_len, self.setting.config.dropout
        config = dataclasses.replace(
            found.config, num_classes=2, max_len=max_len, dropout=p, attn_backend=backend
        )
        model = TransformerClassifier.from_config(config)
        state["positions"] = state["positions"][:max_len]
        model.load_state_dict(state)
        return model.to(self.setting.device).eval()

    @functools.cached_property
    def first(self) -> PackedBatch:
        """The first texts of a batch that is timed; no text's answer depends on the others."""
        batch = self.mixed[0]
        return first_texts(batch, verified_texts(batch.cu_seqlens.diff().tolist()))

    @functools.cached_property
    def expected(self) -> Expected:
        """Of transformers' own model, in float64 and as it is run."""
        model = Theirs.of(self)
        exact = copy.deepcopy(model).double()
        return Expected(self.outcome(exact), self.outcome(model), self.setting.dtype)

    def outcome(self, model: _Model) -> dict[str, Tensor]:
        """Logits of the first texts; in training also gradients of the last and first matrix."""
        double = next(model.parameters()).dtype == torch.float64
        with torch.set_grad_enabled(self.training):
            logits = self.logits(model, self.first, autocast=not double)
        found = {"logits": logits.detach().double()}
        if self.training:
            F.cross_entropy(logits, self.first.labels).backward()
            for name, weight in model.watched().items():
                assert weight.grad is not None, f"{name} has no gradient"
                found[f"d{name}"] = weight.grad.double()
            model.zero_grad(set_to_none=True)
        return found

    def logits(self, model: nn.Module, batch: PackedBatch, autocast: bool = True) -> Tensor:
        setting = self.setting
        if not autocast:
            return model(batch)
        with devices.autocast(setting.device, setting.precision):
            return model(batch).float()


def _texts(setting: Setting, folder: str, count: int) -> tuple[RaggedIds, str]:
    """Reviews as that encoder's tokenizer reads them, cut to max_len; drawn ones without data."""
    if not setting.data:
        return setting.texts(count)
    tokenizer = PieceTokenizer.load(Path(folder) / "tokenizer.json")
    ids = tokenizer.encode_batch(reviews(setting.data, count))
    ids, _ = read(ids, setting.config.max_len, "head", "cut", tokenizer.special)
    return ids, f"real reviews, at most {setting.config.max_len} tokens"


class _Model(nn.Module):
    """A packed batch in, logits (B, 2) out."""

    def watched(self) -> dict[str, Tensor]:
        """The weights whose gradients are compared."""
        raise NotImplementedError


class Theirs(_Model):
    """A model of transformers' on the batch padded to its longest text."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def of(cls, work: Encoder, attention: str = "sdpa") -> Theirs:
        return cls(work.theirs(attention))

    def forward(self, batch: PackedBatch) -> Tensor:
        ids = padded(batch)
        lengths = batch.cu_seqlens.diff()[:, None]
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths
        return self.model(input_ids=ids, attention_mask=mask.long()).logits

    def watched(self) -> dict[str, Tensor]:
        head = self.model.classifier
        last = head if isinstance(head, nn.Linear) else head.out_proj
        return {"embedding": self.model.get_input_embeddings().weight, "head": last.weight}


class Ours(_Model):
    def __init__(self, model: TransformerClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.model(**batch.model_inputs())

    def watched(self) -> dict[str, Tensor]:
        return {"embedding": self.model.embedding, "head": self.model.head.classify.weight}


# ------------------------------------------------------------------------------------- fine-tuning


class FineTuning:
    """A step: BATCHES times forward, loss, backward and AdamW, with dropout."""

    def __init__(
        self, name: str, work: Encoder, build: Callable[[], _Model], note: str, *,
        grouped: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.work, self.build, self.note = name, work, build, note
        self.batches = work.grouped if grouped else work.mixed

    def prepare(self) -> None:
        self.model = self.build()

    def verify(self) -> None:
        work, model = self.work, self.model
        outcome = work.outcome(model)
        work.expected.check(self.name, outcome)
        model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), 3e-5, fused=True)
        with torch.no_grad():
            once, again = (work.logits(model, work.first).double() for _ in range(2))
        check_dropout(self.name, outcome["logits"], once, again)
        self._train(work.first)  # the optimiser's state is no part of a step's memory

    def step(self, i: int) -> None:
        for batch in self.batches:
            self._train(batch)

    def _train(self, batch: PackedBatch) -> None:
        F.cross_entropy(self.work.logits(self.model, batch), batch.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _with_parts(work: Encoder, attention: str, accelerated: bool) -> Theirs:
    """transformers' model with fasttx' attention, other layers, or both."""
    import fasttx.hf

    model = Theirs.of(work, attention)
    if accelerated:
        fasttx.hf.accelerate(model.model)
    return model


def _own(work: Encoder, backend: Backend) -> Ours:
    config = work.setting.config
    head_dim = config.d_model // config.num_heads
    require(backend.unavailable_reasons(work.setting.device, torch.float32, head_dim))
    return Ours(work.ours(backend.name))


def fine_tuners(work: Encoder) -> dict[str, Contestant]:
    theirs = functools.partial(Theirs.of, work)
    parts = functools.partial(_with_parts, work)
    entries: list[tuple[str, Callable[[], _Model], str]] = [
        ("transformers", theirs, "padded to a batch's longest text"),
        ("transformers-grouped", theirs, "batches of like length"),
        ("transformers+attention", lambda: parts("fasttx", False), 'attn_implementation="fasttx"'),
        ("transformers+accelerate", lambda: parts("sdpa", True), "fasttx.hf.accelerate"),
        ("transformers+both", lambda: parts("fasttx", True), "both of them"),
    ]
    for name, backend in backends().items():
        note = mask_note(backend, work.setting.config.dropout)
        entries.append((name, functools.partial(_own, work, backend), note))
    return {
        name: FineTuning(name, work, build, note, grouped=name.endswith("grouped"))
        for name, build, note in entries
    }


# --------------------------------------------------------------------------------------- inference


class Answering:
    """A step: the logits of BATCHES batches of like length."""

    def __init__(
        self, name: str, work: Encoder, build: Callable[[], _Model], note: str = "",
        tolerance: float = 1e-4, precision: str | None = None,
    ) -> None:  # fmt: skip
        self.name, self.work, self.build, self.note = name, work, build, note
        self.tolerance, self.precision = tolerance, precision

    def prepare(self) -> None:
        self.model = self.build()

    def verify(self) -> None:
        work = self.work
        exact = work.outcome(Theirs.of(work).double())
        with torch.inference_mode():
            found = {"logits": work.logits(self.model, work.first).double()}
        Expected.within(exact, self.tolerance).check(self.name, found)

    def step(self, i: int) -> list[Tensor]:
        with torch.inference_mode():
            return [self.work.logits(self.model, batch) for batch in self.work.grouped]


class _Native(_Model):
    def __init__(self, model: TransformerClassifier, precision: str) -> None:
        super().__init__()
        self.encoder = native.NativeEncoder(model, precision)

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.encoder(**native.inputs(batch))


class _Engine(_Model):
    """One of `engine_peers`, started with transformers' model."""

    def __init__(self, engine: Any, model: nn.Module) -> None:
        super().__init__()
        with torch.no_grad():
            self.answer = engine.start(_PaddedIds(model))

    def forward(self, batch: PackedBatch) -> Tensor:
        return torch.from_numpy(self.answer(padded(batch).numpy()))


class _PaddedIds(nn.Module):
    """input_ids (B, L) alone, as the engines' peers take it; padding is 0."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        mask = (input_ids != 0).long()
        return self.model(input_ids=input_ids, attention_mask=mask).logits


def onnx_graph(model: _PaddedIds) -> Any:
    """Its graph in ONNX Runtime's fused operators, as that engine's own optimiser makes it.

    Of the newer export (dynamo=True, torch 2.13) it makes no Attention; of this one it does.
    """
    import onnx
    from onnxruntime.transformers import optimizer

    config = model.model.config
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this export is the older one; constants of a trace
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            model, (torch.ones(2, 3, dtype=torch.int64),), path, dynamo=False, opset_version=17,
            input_names=["input_ids"], output_names=["logits"],
            dynamic_axes={"input_ids": {0: "B", 1: "L"}, "logits": {0: "B"}},
        )  # fmt: skip
        fused = optimizer.optimize_model(
            str(path), "bert", config.num_attention_heads, config.hidden_size, opt_level=0
        ).model
    kinds = {node.op_type for node in fused.graph.node}
    assert {"Attention", "SkipLayerNormalization"} <= kinds, f"not fused: {sorted(kinds)}"
    if all(opset.domain != "com.microsoft" for opset in fused.opset_import):
        fused.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return fused


class _OnnxRuntime(engine_peers.OnnxRuntime):
    fused = staticmethod(onnx_graph)


class _OnnxRuntimeInt8(engine_peers.OnnxRuntimeInt8):
    fused = staticmethod(onnx_graph)


# How far logits in 8 bits may be off, relative to their length: those of a new head are small.
INT8 = 0.3

_ENGINES = {
    "onnxruntime-fp32": _OnnxRuntime,
    "onnxruntime-int8": _OnnxRuntimeInt8,
    "openvino-fp32": engine_peers.OpenVino,
}


def _engine(work: Encoder, peer: Any) -> _Engine:
    require(peer.unavailable_reasons(work.setting))
    attention = "eager" if issubclass(peer, engine_peers.OnnxRuntime) else "sdpa"
    model = work.theirs(attention)
    require([] if model.config.pad_token_id == 0 else ["its padding id is not 0"])
    return _Engine(peer(work.setting.config), model)


def _native(work: Encoder, precision: str) -> _Native:
    require([] if work.setting.device.type == "cpu" else ["it is for the CPU"])
    return _Native(work.ours("cpu"), precision)


def classifiers(work: Encoder) -> dict[str, Contestant]:
    name = "transformers"
    found: dict[str, Contestant] = {name: Answering(name, work, functools.partial(Theirs.of, work))}
    for name, peer in _ENGINES.items():
        build: Callable[[], _Model] = functools.partial(_engine, work, peer)
        tolerance = INT8 if peer.precision == "int8" else peer.tolerance
        found[name] = Answering(name, work, build, peer.note, tolerance, peer.precision)
    for precision, tolerance in native.TOLERANCES.items():
        name, build = f"fasttx-native-{precision}", functools.partial(_native, work, precision)
        tolerance = INT8 if precision == "int8" else max(tolerance, 1e-4)
        found[name] = Answering(name, work, build, "", tolerance, precision)
    return found


# ---------------------------------------------------------------------------------------- contests


def contest(level: str, setting: Setting, folder: str, batch_size: int) -> Contest:
    """level: "finetune" or "classify". setting.config: the sizes of that encoder."""
    training = level == "finetune"
    work = Encoder(setting, folder, batch_size, training=training)
    lengths = [n for batch in work.mixed for n in batch.cu_seqlens.diff().tolist()]
    place = Path(folder).resolve()
    name = place.parent.name if place.name == "model" else place.name
    did = "fine-tuning" if training else "classifying with"
    p = f", dropout {setting.config.dropout_text} everywhere" if training else ""
    size = len(work.mixed[0])
    return Contest(
        f"{did} {name}, {len(lengths)} texts in batches of {size}, {work.what}{p}, "
        f"{setting.precision}",
        setting.device,
        1,
        len(lengths),
        fine_tuners(work) if training else classifiers(work),
        Limit([Work.of_model(setting.config, lengths, training)], setting.device, setting.dtype),
        warmup=1,
        facts={"level": level, "batch": size, "lengths": work.what, "pretrained": name,
               "precision": setting.precision, "tokens": sum(lengths) / BATCHES},
    )  # fmt: skip


def config_of(folder: str, max_len: int) -> ModelConfig:
    """The sizes of that encoder; no texts longer than it has positions for."""
    found = read_folder(Path(folder)).config
    return dataclasses.replace(found, num_classes=2, max_len=min(max_len, found.max_len))
