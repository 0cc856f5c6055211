"""The question of one operation beside attention: at the model's shapes, on batches of reviews.

T tokens (rows) of a batch, d columns, V words.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from contest import Contest, Expected, OneOperation, backends, require
from limit import Limit, Work
from products import linear_products
from torch import Tensor
from workload import Setting, make_batches

from fasttx.ops.contract import Operations
from fasttx.ops.dropout import Dropout
from fasttx.ops.reference import ReferenceOperations
from fasttx.ops.registry import Backend
from fasttx.testing import RowCase
from fasttx.text.packing import PackedBatch

BATCH = 32
# What is timed of each operation; a linear layer's name is that in an encoder block.
TIMED = {
    "embed": ("embed",),
    "add_norm": ("add_norm",),
    "bias_act": ("bias_act",),
    "linear": ("qkv", "out", "up", "down"),
}


class TorchOperations(ReferenceOperations):
    """The peer: plain torch, with torch's own dropout. Its attention is not timed."""

    def drop(self, x: Tensor, dropout: Dropout) -> Tensor:
        return F.dropout(x, dropout.p) if dropout.p else x


@dataclass(frozen=True, eq=False)
class ModelCase(RowCase):
    """An operation of a model on the rows of a batch."""

    batch: PackedBatch | None = None
    words: int = 0  # embed: rows of the table
    outputs: int = 0  # linear: columns of what comes out

    def leaves(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        found = super().leaves(dtype)
        generator = torch.Generator().manual_seed(3)

        def draw(like: Tensor, *shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(like.dtype)

        if self.op == "embed":
            return {"table": draw(found["table"], self.words, self.columns)}
        if self.op == "linear":
            shapes = {"weight": (self.outputs, self.columns), "bias": (self.outputs,)}
            return found | {name: draw(found[name], *shape) for name, shape in shapes.items()}
        return found

    def fixed(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        if self.op != "embed":
            return {}
        ids, at = self.batch.input_ids.cpu(), self.batch.position_ids.cpu()
        generator = torch.Generator().manual_seed(4)
        positions = torch.randn(int(at.max()) + 1, self.columns, generator=generator).to(dtype)
        return {"ids": ids, "position_ids": at, "positions": positions}


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation on the rows of each input; what all its contestants share."""

    setting: Setting
    cases: list[ModelCase]  # of each input
    p: float
    backward: bool

    @functools.cache  # noqa: B019  (as long-lived as its contest)
    def expected(self, p: float) -> Expected:
        return Expected.of(self.cases[0], self.setting.dtype, p)


class OperationContestant(OneOperation):
    """An operation by a backend; None: by plain torch."""

    def __init__(self, name: str, work: Operation, backend: Backend | None) -> None:
        super().__init__(name, work, backend)
        self.backend = backend

    def prepare(self) -> None:
        work, setting = self.work, self.work.setting
        self.operations: Operations = TorchOperations()
        if self.backend is not None:
            head_dim = setting.config.d_model // setting.config.num_heads
            require(self.backend.unavailable_reasons(setting.device, setting.dtype, head_dim))
            self.operations = self.backend.operations
        self.inputs = []
        for i, case in enumerate(work.cases):
            leaves = {name: x.to(setting.device) for name, x in case.leaves(setting.dtype).items()}
            leaves = {name: x.requires_grad_(work.backward) for name, x in leaves.items()}
            fixed = {name: x.to(setting.device) for name, x in case.fixed(setting.dtype).items()}
            outs = case.call(self.operations, leaves | fixed, self._dropout(0.0, i))
            self.inputs.append((leaves, fixed, [torch.randn_like(out) for out in outs]))
        self.dropouts = [self._dropout(work.p, i) for i in range(len(work.cases))]

    def _dropout(self, p: float, seed: int) -> Dropout:
        return Dropout.of(p, torch.tensor(seed, device=self.work.setting.device))

    def outcome(self, p: float, seed: int) -> dict[str, Tensor]:
        setting, dropout = self.work.setting, self._dropout(p, seed)
        return self.work.cases[0].run(self.operations, setting.device, setting.dtype, dropout)

    def step(self, i: int) -> object:
        leaves, fixed, grads = self.inputs[i]
        with torch.set_grad_enabled(self.work.backward):
            outs = self.work.cases[i].call(self.operations, leaves | fixed, self.dropouts[i])
            if not self.work.backward:
                return outs
            return torch.autograd.grad(outs, tuple(leaves.values()), grads)


def operation_names() -> list[str]:
    return ["torch", *backends()]


def operation(
    timed: str, setting: Setting, batch_size: int, *, backward: bool = True, inputs: int = 3
) -> Contest:
    """What `TIMED` lists, on batches of reviews; forward, or with backward."""
    c, size = setting.config, setting.of(batch_size)
    op = next(name for name, all_timed in TIMED.items() if timed in all_timed)
    p = 0.0 if op == "linear" else c.dropout
    ids, what = setting.texts(inputs * size)
    batches = make_batches(ids, size, setting.device)
    shapes = {
        "qkv": (c.d_model, 3 * c.d_model), "out": (c.d_model, c.d_model),
        "up": (c.d_model, c.d_ff), "down": (c.d_ff, c.d_model), "bias_act": (c.d_ff, c.d_ff),
    }  # fmt: skip
    columns, outputs = shapes.get(timed, (c.d_model, c.d_model))
    half = setting.dtype != torch.float32
    cases = [
        ModelCase(
            op, len(batch.input_ids), columns, c.activation, mixed=half and op != "linear",
            batch=batch, words=c.vocab_size, outputs=outputs,
        )
        for batch in batches
    ]  # fmt: skip
    work = Operation(setting, cases, p, backward)
    limit = None
    if op == "linear":
        products = [linear_products(case.rows, columns, outputs, backward) for case in cases]
        limit = Limit([Work(p, 1, 0) for p in products], setting.device, setting.dtype)
    passes = "forward + backward" if backward else "forward"
    dtype = str(setting.dtype).removeprefix("torch.")
    name = f"linear ({timed})" if op == "linear" else op
    facts = {
        "level": op, "timed": timed, "batch": size, "lengths": what, "p": p, "backward": backward,
        "dtype": dtype, "tokens": sum(case.rows for case in cases) / inputs,
    }  # fmt: skip
    return Contest(
        f"{name}, {passes}, batch {size}, {what}, p = {p:g}, {dtype}, {columns} columns",
        setting.device, inputs, size,
        {n: OperationContestant(n, work, b) for n, b in {"torch": None, **backends()}.items()},
        limit, inputs, facts,
    )  # fmt: skip


def contests(op: str) -> dict[str, Callable[[Setting], Contest]]:
    """The contests of an operation, by what tells them apart."""
    found = {}
    for timed in TIMED[op]:
        for backward, precision in ((False, "fp32"), (True, "fp32"), (True, "bf16")):
            if op == "embed" and precision == "bf16":
                continue  # the table and the residual stream stay in float32
            passes = "forward+backward" if backward else "forward"
            name = f"batch{BATCH}-{timed}-{passes}-{precision}"
            found[name] = functools.partial(_contest, timed, precision, backward)
    return found


def _contest(timed: str, precision: str, backward: bool, setting: Setting) -> Contest:
    setting = replace(setting, precision=precision)
    return operation(timed, setting, BATCH, backward=backward)
