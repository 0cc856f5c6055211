"""What the backends are measured against, written without them: Philox, attention, and its cases.

T rows, B sequences, H heads, D head_dim. Attention is a loop over sequences that runs in any dtype:
in float64 it is the oracle, in the dtype under test it says which error is to be expected.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fasttx.ops.registry import BACKENDS, Backend

ONE = 65536
WEYL = (0x9E3779B9, 0xBB67AE85)

# ---------------------------------------------------------------------------- the shared generator


def philox(counter: Sequence[Any], key: Sequence[Any], rounds: int = 7) -> tuple[Any, ...]:
    """Philox4x32 on Python ints, or on np.uint64 arrays of 32-bit values (products fit both)."""
    integer = np.uint64 if isinstance(counter[0], np.ndarray) else int
    m0, m1, two32 = integer(0xD2511F53), integer(0xCD9E8D57), integer(2**32)
    c = list(counter)
    for r in range(rounds):
        k0, k1 = (integer((k + r * w) % 2**32) for k, w in zip(key, WEYL, strict=True))
        a, b = m0 * c[0], m1 * c[2]
        c = [(b // two32) ^ c[1] ^ k0, b % two32, (a // two32) ^ c[3] ^ k1, a % two32]
    return tuple(c)


def key_of(seed: int) -> tuple[int, int]:
    return seed % 2**32, (seed >> 32) % 2**32


def element_uniform(seed: int, element: int, counter: tuple[int, int, int]) -> int:
    """The 16-bit uniform of one element, from the words of the contract and nothing else."""
    words = philox((element // 8, *counter), key_of(seed))
    word = words[(element % 8) // 2]
    return word % ONE if element % 2 == 0 else word // ONE


def _uniforms(seed: int, shape: tuple[int, ...], elements: int) -> np.ndarray:
    blocks = -(-elements // 8)
    grid = np.indices((*shape, blocks)).astype(np.uint64)
    words = philox((grid[-1], *reversed(grid[:-1])), key_of(seed))
    halves = [half for w in words for half in (w % np.uint64(ONE), w // np.uint64(ONE))]
    return np.stack(halves, -1).reshape(*shape, blocks * 8)[..., :elements]


def attention_uniforms(
    seed: int, sequences: int, heads: int, queries: int, keys: int
) -> np.ndarray:
    """(sequences, heads, queries, keys) uint64 below 65536."""
    return _uniforms(seed, (sequences, heads, queries), keys)


def row_uniforms(seed: int, rows: int, columns: int) -> np.ndarray:
    """(rows, columns) uint64 below 65536."""
    return _uniforms(seed, (1, 1, rows), columns)[0, 0]


def multipliers(uniforms: np.ndarray, p: float) -> Tensor:
    """What dropout multiplies by: 0, or the inverse of the quantised keep probability; float64."""
    t = int(p * ONE + 0.5)
    scale = ONE / (ONE - t) if t < ONE else 0.0
    return torch.from_numpy((uniforms >= t) * scale)


# ------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """A batch: its lengths, and how its sequences lie in the rows."""

    name: str
    lens: tuple[int, ...]
    heads: int = 2
    head_dim: int = 16
    starts: tuple[int, ...] | None = None  # None: end to end
    rows: int | None = None  # None: up to the last end
    dead: float = 0.0  # what the rows outside every sequence hold
    strided: bool = False  # qkv is a view whose rows and heads lie apart
    scale: float | None = None
    spread: float = 1.0  # standard deviation of q and k
    slack: int = 0  # by how much max_seqlen is larger than need be

    @property
    def spans(self) -> list[tuple[int, int]]:
        if self.starts is not None:
            return list(zip(self.starts, self.lens, strict=True))
        return [(sum(self.lens[:i]), n) for i, n in enumerate(self.lens)]

    @property
    def total(self) -> int:
        ends = [s + n for s, n in self.spans]
        return max(ends, default=0) if self.rows is None else self.rows

    @property
    def max_seqlen(self) -> int:
        return max(self.lens, default=0) + self.slack

    def live(self) -> Tensor:
        """(T,) bool: the rows that belong to a sequence."""
        live = torch.zeros(self.total, dtype=torch.bool)
        for s, n in self.spans:
            assert not live[s : s + n].any(), f"{self.name}: sequences overlap"
            live[s : s + n] = True
        return live

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """qkv (T, 3, H, D) and a gradient of the output (T, H, D); NaN where nobody may look."""
        generator = torch.Generator().manual_seed(len(self.name) + 31 * self.total)
        shape = (self.total, 3, self.heads, self.head_dim)
        qkv = torch.randn(shape, generator=generator, dtype=torch.float64)
        qkv[:, :2] *= self.spread
        grad = torch.randn(shape[0], *shape[2:], generator=generator, dtype=torch.float64)
        dead = ~self.live()
        qkv[dead], grad[dead] = self.dead, self.dead
        return qkv.to(dtype), grad.to(dtype)

    def index(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """seq_starts and seq_lens, (B,) int32."""
        return tuple(
            torch.tensor([span[i] for span in self.spans], dtype=torch.int32, device=device)
            for i in range(2)
        )

    def __str__(self) -> str:
        return self.name


def strided(x: Tensor) -> Tensor:
    """The same values in a view with gaps of NaN in every dimension, dense in the last one only."""
    wide = x.new_full((*(2 * n for n in x.shape[:-1]), x.shape[-1] + 8), math.nan)
    view = wide[(*(slice(None, None, 2) for _ in x.shape[:-1]), slice(4, -4))]
    view.copy_(x)
    return view


NAN, INF = math.nan, math.inf
CASES = (
    Case("one", (1,), heads=1, head_dim=8),
    Case("odd", (17, 1, 0, 31, 2, 7)),
    Case("gaps", (7, 0, 33, 2), starts=(40, 47, 3, 52), rows=60, dead=NAN, head_dim=20),
    Case("infinite", (33, 31, 1), starts=(34, 1, 68), rows=71, dead=INF, head_dim=64),
    Case("tail", (9, 0, 5), rows=32, dead=-INF, head_dim=8, slack=3),
    Case("long", (255, 256, 300), heads=1, head_dim=32),
    Case("wide", (17, 65), head_dim=128, heads=3),
    Case("strided", (31, 2, 16), strided=True, head_dim=32),
    Case("gapped views", (31, 8), starts=(40, 1), rows=80, dead=NAN, strided=True, head_dim=20),
    Case("scaled", (17, 33), scale=0.3),
    Case("unscaled", (7, 15), scale=1.0),
    Case("slack", (7, 3), slack=70),
    Case("peaked", (33, 17), spread=30.0, head_dim=32),
    Case("alike", (33, 64), spread=1e-3),
)
EMPTY_CASES = (
    Case("no sequence", ()),
    Case("no sequence, dead rows", (), rows=5, dead=NAN),
    Case("no sequence, room", (), rows=3, slack=4),
    Case("no row", (0, 0)),
    Case("no row, room", (0, 0), slack=9),
    Case("empty sequences", (0, 0, 0), starts=(0, 3, 1), rows=4, dead=NAN),
)
BY_NAME = {case.name: case for case in (*CASES, *EMPTY_CASES)}

# ---------------------------------------------------------------------------------------- backends


# Under Triton's interpreter its kernels take tensors of the CPU, and there the tests find them.
# It computes products of bfloat16 wrongly (triton-lang/triton#11584), so these are left out.
if os.environ.get("TRITON_INTERPRET") == "1":
    BACKENDS["triton"] = dataclasses.replace(
        BACKENDS["triton"], devices=("cpu",), dtypes=(torch.float32, torch.float16)
    )
# Not in the table, but tested as if they were: what `mps` chooses between, the Metal kernels by
# emulation. The fixture unlisted_backends lets tests ask for them by name.
UNLISTED = (
    Backend(
        "metal", "tests.metal.adapter", "the Metal kernels, emulated", ("cpu",),
        (torch.float32, torch.float16, torch.bfloat16), "shared",
    ),
    Backend(
        "lean", "fasttx.ops.mps.lean", "what mps falls back to", (),
        BACKENDS["reference"].dtypes, "shared",
    ),
)  # fmt: skip


def _devices() -> list[str]:
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def _targets() -> list[Any]:
    """(backend, device): each backend wherever it may run, at least on its first device."""
    targets = []
    for backend in (*BACKENDS.values(), *UNLISTED):
        wanted = backend.devices or tuple(_devices())
        here = [device for device in wanted if device in _devices()] or wanted[:1]
        targets += [pytest.param(backend, d, id=f"{backend.name}-{d}") for d in here]
    return targets


TARGETS = _targets()


def over_backends(*p: float, dropout: str | None = None) -> Any:
    """Parametrise over the backends whose dropout is of this kind ("shared", "torch"; None: all),
    each on each of its devices. With dropout probabilities `p`, over these too, and there only
    backends whose masks are shared see other than 0."""
    targets = [t for t in TARGETS if dropout in (None, t.values[0].dropout)]
    if not p:
        return pytest.mark.parametrize(("backend", "device"), targets)
    return pytest.mark.parametrize(
        ("backend", "device", "p"),
        [
            pytest.param(*t.values, probability, id=f"{t.id}-{probability:g}")
            for t in targets
            for probability in p
            if probability == 0 or t.values[0].dropout == "shared"
        ],
    )


def adapter_of(
    backend: Backend, device: str, dtype: torch.dtype = torch.float32, head_dim: int = 16
) -> Any:
    """The adapter, or a skip that gives the backend's own reasons."""
    if device == "mps" and dtype == torch.float64:
        pytest.skip("torch has no float64 on mps")
    reasons = backend.unavailable_reasons(device, dtype, head_dim)
    if reasons:
        pytest.skip(f"{backend.name} on {device}: " + "; ".join(reasons))
    return backend.adapter()


# ------------------------------------------------------------------------------------- the measure


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    case: Case,
    *,
    causal: bool = False,
    factors: Sequence[Tensor] | None = None,
) -> Tensor:
    """softmax(q k^T scale) v, one sequence after another. q, k, v (T, H, D) -> (T, H, D).

    factors: for each sequence what its weights (H, n, n) are multiplied by: dropout.
    """
    out = torch.zeros_like(q)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    for i, (s, n) in enumerate(case.spans):
        if not n:
            continue
        q_, k_, v_ = (x[s : s + n].transpose(0, 1) for x in (q, k, v))
        scores = (q_ @ k_.transpose(1, 2)) * scale
        if causal:
            later = torch.ones(n, n, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        weights = scores.softmax(-1)
        if factors is not None:
            weights = weights * factors[i].to(weights.dtype)
        out[s : s + n] = (weights @ v_).transpose(0, 1)
    return out


def shared_factors(case: Case, p: float, seed: int) -> list[Tensor]:
    """The dropout of each sequence by the shared generator, drawn here."""
    longest = max(case.lens, default=0)
    uniforms = attention_uniforms(seed, len(case.lens), case.heads, longest, longest)
    return [multipliers(u[:, :n, :n], p) for u, n in zip(uniforms, case.lens, strict=True)]


def attention_measure(case: Case, dtype: torch.dtype, **options: Any) -> Measure:
    """out, dq, dk, dv of a case; the options are those of `attend`."""
    qkv, grad = case.inputs(dtype)

    def compute(wide: torch.dtype) -> dict[str, Tensor]:
        q, k, v = qkv.to(wide).unbind(1)
        outcome = run(lambda *x: attend(*x, case, **options), grad.to(wide), q, k, v)
        return dict(zip(("out", "dq", "dk", "dv"), outcome, strict=True))

    # Softmax makes a relative error in a weight of an absolute one in a score.
    return Measure.of(compute, dtype, condition=max(1.0, case.spread**2))


def run(function: Callable[..., Tensor], grad: Tensor, *leaves: Tensor) -> list[Tensor]:
    """The output of function(*leaves) and the gradient of each leaf, on the CPU."""
    leaves = tuple(x.detach().requires_grad_() for x in leaves)
    out = function(*leaves)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, leaves, grad))]


@dataclass(frozen=True)
class Measure:
    """Exact values by name (float64), and how far off each may be."""

    exact: dict[str, Tensor]
    allowed: dict[str, float]

    @classmethod
    def of(
        cls,
        compute: Callable[[torch.dtype], dict[str, Tensor]],
        dtype: torch.dtype,
        condition: float = 1.0,
    ) -> Measure:
        """From a plain computation that runs in float64 and in the dtype under test.

        condition: by how much the function magnifies the roundings of its inputs.
        """
        exact, plain = compute(torch.float64), compute(dtype)
        size = max((largest(x) for x in exact.values()), default=0.0)
        roundings = ROUNDINGS[dtype] * torch.finfo(dtype).eps * size * condition
        factor = {
            name: (GRAD_FACTOR if name.startswith("d") else OUT_FACTOR)[dtype] for name in exact
        }
        errors = {name: largest(plain[name].double() - x) for name, x in exact.items()}
        return cls(exact, {name: factor[name] * e + roundings for name, e in errors.items()})

    def check(self, what: str, **actual: Tensor) -> None:
        """These values against their exact ones; the names of gradients begin with d."""
        for name, x in actual.items():
            assert x.shape == self.exact[name].shape, f"{what}: {name} has shape {tuple(x.shape)}"
            assert x.isfinite().all(), f"{what}: {name} is not finite"
            error = largest(x.double() - self.exact[name])
            assert error <= self.allowed[name], (
                f"{what}: {name} is {error:.3g} off, {self.allowed[name]:.3g} allowed "
                f"(its largest value is {largest(self.exact[name]):.3g})"
            )


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


# How much of plain torch's own error in that dtype a backend may have ...
OUT_FACTOR = {torch.float64: 1.0, torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}
GRAD_FACTOR = {torch.float64: 1.0, torch.float32: 4.0, torch.bfloat16: 3.0, torch.float16: 3.0}
# ... beside so many roundings of the largest value.
ROUNDINGS = {torch.float64: 8.0, torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0}

POISONED = [
    pytest.mark.usefixtures("poisoned_memory", "unlisted_backends"),
    pytest.mark.filterwarnings("ignore:.*deterministic"),  # the fixture's mode, on CUDA
]
