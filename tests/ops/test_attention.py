"""Every attention backend against float64, over the registry: to be listed there is to be tested.

The cases, the oracle and the tolerances are in `equivalence.py`.
T rows, B sequences, H heads, D head_dim, L padded length.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttx.errors import BackendUnavailableError, ConfigError
from fasttx.ops import dropout, scaled_dot_product_attention
from fasttx.ops.registry import Backend
from tests import equivalence
from tests.equivalence import CASES, EMPTY_CASES, Case, Measure, adapter_of, over_backends

pytestmark = equivalence.POISONED

SEED = 0x1234567_89ABCDEF
ENTRIES = ("attention", "attention_qkv")
over_causal = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
over_entries = pytest.mark.parametrize("entry", ENTRIES)


def over_cases(*names: str) -> Any:
    cases = [equivalence.BY_NAME[name] for name in names] or CASES
    return pytest.mark.parametrize("case", cases, ids=str)


def seed_on(device: str, seed: int = SEED) -> Tensor:
    return torch.tensor(seed, dtype=torch.int64, device=device)


def compute(
    adapter: Any, entry: str, case: Case, device: str, dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """out, dq, dk, dv of a case, after the checks that need no oracle."""
    qkv, grad = (x.to(device) for x in case.inputs(dtype))
    if case.strided:
        qkv, grad = equivalence.strided(qkv), equivalence.strided(grad)
    leaves = [qkv]
    if entry == "attention_qkv":
        leaves = [x if case.strided else x.contiguous() for x in qkv.unbind(1)]
    before = [x.clone() for x in leaves]
    starts, lens = case.index(device)
    options = {"max_seqlen": case.max_seqlen, "scale": case.scale, **options}
    out, *gradients = equivalence.run(
        lambda *x: getattr(adapter, entry)(*x, starts, lens, **options), grad, *leaves
    )
    for x, y in zip(leaves, before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg="an input changed")
    if entry == "attention":
        gradients = gradients[0].unbind(1)
    values = dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True))
    dead = ~case.live()
    for name, x in values.items():
        assert x.dtype == dtype
        assert x.shape == (case.total, case.heads, case.head_dim)
        assert (x[dead] == 0).all(), f"{name} is not 0 in a row outside every sequence"
    return values


@functools.cache
def measure(
    case: Case, dtype: torch.dtype, causal: bool = False, p: float = 0.0, seed: int = SEED
) -> Measure:
    factors = equivalence.shared_factors(case, p, seed) if p else None
    return equivalence.attention_measure(case, dtype, causal=causal, factors=factors)


def check(
    backend: Backend, device: str, case: Case, dtype: torch.dtype, causal: bool, p: float = 0.0
) -> None:
    adapter = adapter_of(backend, device, dtype, case.head_dim)
    options = {"causal": causal, "dropout_p": p, "seed": seed_on(device) if p else None}
    for entry in ENTRIES:
        values = compute(adapter, entry, case, device, dtype, **options)
        measure(case, dtype, causal, p).check(f"{backend.name}, {entry}, {case}", **values)


def test_unwritten_memory_is_poisoned():
    """Else a backend that forgets a row would find zeros there, most of the time."""
    x = torch.zeros(1000)
    for fresh in (torch.empty(1000), torch.empty_like(x), x.new_empty(1000)):
        assert fresh.isnan().all()


# ---------------------------------------------------------------------- outputs and all gradients


@over_causal
@over_cases()
@over_backends()
def test_float32(backend, device, case, causal):
    check(backend, device, case, torch.float32, causal)


@over_causal
@over_cases()
@over_backends(dropout="shared")
def test_float32_with_dropout(backend, device, case, causal):
    check(backend, device, case, torch.float32, causal, 0.1)


@pytest.mark.parametrize("p", [2**-16, 0.5, 0.9, 1 - 2**-16])
@over_cases("odd", "gapped views")
@over_backends(dropout="shared")
def test_other_dropout_probabilities(backend, device, case, p):
    check(backend, device, case, torch.float32, p == 0.5, p)


@over_cases("one", "odd", "gaps", "infinite", "strided", "peaked", "scaled", "tail")
@over_backends(0.0, 0.1)
def test_float64(backend, device, case, p):
    check(backend, device, case, torch.float64, case.name in ("odd", "infinite"), p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@over_cases("one", "odd", "gaps", "infinite", "gapped views", "wide", "long")
@over_backends(0.0, 0.1)
def test_half_precision(backend, device, case, dtype, p):
    check(backend, device, case, dtype, case.name in ("odd", "infinite"), p)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@over_causal
@over_entries
@pytest.mark.parametrize("case", EMPTY_CASES, ids=str)
@over_backends()
def test_nothing_to_attend_to(backend, device, case, entry, causal, p):
    adapter = adapter_of(backend, device)
    values = compute(
        adapter, entry, case, device, torch.float32,
        causal=causal, dropout_p=p, seed=seed_on(device),
    )  # fmt: skip
    assert all((x == 0).all() for x in values.values())


@over_entries
@over_backends()
def test_a_dropout_of_one_leaves_zeros(backend, device, entry):
    adapter = adapter_of(backend, device)
    case = equivalence.BY_NAME["odd"]
    values = compute(
        adapter, entry, case, device, torch.float32, dropout_p=1.0, seed=seed_on(device)
    )
    assert all((x == 0).all() for x in values.values())


@over_entries
@over_backends(dropout="shared")
def test_a_probability_that_rounds_to_zero_is_no_dropout(backend, device, entry):
    case = equivalence.BY_NAME["odd"]
    adapter = adapter_of(backend, device)
    values = compute(adapter, entry, case, device, torch.float32, dropout_p=2**-18, seed=None)
    measure(case, torch.float32).check(backend.name, **values)


# -------------------------------------------------------------------- what autograd may ask for


@over_backends()
def test_gradients_with_strides_of_zero(backend, device):
    """`out.sum()` sends an expanded scalar back, `out.transpose()` a transposed gradient."""
    adapter = adapter_of(backend, device)
    case = equivalence.BY_NAME["odd"]
    qkv = case.inputs(torch.float32)[0].to(device).requires_grad_()
    starts, lens = case.index(device)
    out = adapter.attention(qkv, starts, lens, max_seqlen=case.max_seqlen)

    def gradient(grad: Tensor) -> Tensor:
        return torch.autograd.grad(out, qkv, grad, retain_graph=True)[0]

    expanded = torch.ones((), device=device).expand(out.shape)
    torch.testing.assert_close(gradient(expanded), gradient(expanded.contiguous()))
    transposed = torch.randn(out.shape[::-1], device=device).permute(2, 1, 0)
    torch.testing.assert_close(gradient(transposed), gradient(transposed.contiguous()))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
@over_backends()
def test_gradients_of_some_inputs_only(backend, device, wanted):
    adapter = adapter_of(backend, device)
    case = equivalence.BY_NAME["odd"]
    qkv, grad = (x.to(device) for x in case.inputs(torch.float32))
    leaves = [x.contiguous().requires_grad_(i in wanted) for i, x in enumerate(qkv.unbind(1))]
    out = adapter.attention_qkv(*leaves, *case.index(device), max_seqlen=case.max_seqlen)
    out.backward(grad)
    assert [x.grad is not None for x in leaves] == [i in wanted for i in range(3)]
    gradients = {f"d{'qkv'[i]}": leaves[i].grad.cpu() for i in wanted}
    measure(case, torch.float32).check(backend.name, **gradients)


@over_entries
@over_backends()
def test_without_gradients(backend, device, entry):
    adapter = adapter_of(backend, device)
    case = equivalence.BY_NAME["odd"]
    qkv = case.inputs(torch.float32)[0].to(device)
    leaves = [qkv] if entry == "attention" else qkv.unbind(1)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = getattr(adapter, entry)(*leaves, *case.index(device), max_seqlen=case.max_seqlen)
        assert not out.requires_grad
        measure(case, torch.float32).check(backend.name, out=out.cpu())


@over_causal
@over_backends(0.0, 0.4)
def test_gradcheck(backend, device, causal, p):
    adapter = adapter_of(backend, device, torch.float64, 4)
    case = Case("gradcheck", (2, 0, 1, 3), starts=(5, 4, 7, 1), rows=8, head_dim=4)
    qkv = case.inputs(torch.float64)[0].to(device).requires_grad_()
    starts, lens = case.index(device)

    def attention(qkv: Tensor) -> Tensor:
        return adapter.attention(
            qkv, starts, lens, max_seqlen=5, causal=causal, dropout_p=p, seed=seed_on(device)
        )

    assert torch.autograd.gradcheck(attention, (qkv,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@over_backends()
def test_under_autocast(backend, device, dtype):
    """Autocast hands attention low precision in, and must not lower what happens inside."""
    adapter = adapter_of(backend, device, dtype)
    case = equivalence.BY_NAME["odd"]
    with torch.autocast(device, dtype=dtype):
        values = compute(adapter, "attention", case, device, dtype, causal=True)
    measure(case, dtype, True).check(backend.name, **values)


# ------------------------------------------------------------------------------- shared dropout


def attend_at(
    adapter: Any, device: str, qkv: Tensor, spans: list[tuple[int, int]], **options: Any
) -> Tensor:
    starts, lens = torch.tensor(spans, dtype=torch.int32, device=device).unbind(1)
    options = {"max_seqlen": int(lens.max()), "dropout_p": 0.4, "seed": seed_on(device), **options}
    return adapter.attention(qkv.to(device), starts, lens, **options).cpu()


@over_backends(dropout="shared")
def test_masks_do_not_depend_on_packing(backend, device):
    """A sequence alone, among others, elsewhere in the rows, under a larger max_seqlen."""
    adapter = adapter_of(backend, device)
    mine = torch.randn(17, 3, 2, 16)
    others = torch.randn(64, 3, 2, 16)

    def place(at: int, spans: list[tuple[int, int]], **options: Any) -> Tensor:
        qkv = others.clone()
        qkv[at : at + 17] = mine
        return attend_at(adapter, device, qkv, spans, **options)[at : at + 17]

    alone = place(0, [(0, 0), (0, 0), (0, 17)])
    assert alone.abs().sum() > 0
    for packed in (
        place(20, [(0, 11), (11, 9), (20, 17)]),
        place(3, [(40, 24), (20, 1), (3, 17)], max_seqlen=64),
        place(47, [(0, 0), (1, 46), (47, 17), (0, 1)]),
    ):
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)


@over_backends(dropout="shared")
def test_masks_differ_between_sequences_heads_and_seeds(backend, device):
    adapter = adapter_of(backend, device)
    one = torch.randn(16, 3, 1, 16).expand(-1, -1, 2, -1)
    qkv = torch.cat([one, one])
    out = attend_at(adapter, device, qkv, [(0, 16), (16, 16)])
    assert not torch.allclose(out[:16], out[16:])
    assert not torch.allclose(out[:, 0], out[:, 1])
    other = attend_at(adapter, device, qkv, [(0, 16), (16, 16)], seed=seed_on(device, SEED + 1))
    assert not torch.allclose(out, other)


@over_backends(dropout="shared")
def test_same_seed_same_bits(backend, device):
    torch.use_deterministic_algorithms(False)  # as in a run; the fixture restores the mode
    case = equivalence.BY_NAME["long"]
    adapter = adapter_of(backend, device)
    options = {"dropout_p": 0.1, "seed": seed_on(device)}
    first, second = (
        compute(adapter, "attention", case, device, torch.float32, **options) for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs between two runs"


@over_entries
@pytest.mark.parametrize("seed", [None, 7, torch.tensor(7.0), torch.tensor([7])], ids=repr)
@over_backends(dropout="shared")
def test_dropout_needs_a_seed(backend, device, entry, seed):
    adapter = adapter_of(backend, device)
    case = equivalence.BY_NAME["odd"]
    with pytest.raises(TypeError, match="seed is"):
        compute(adapter, entry, case, device, torch.float32, dropout_p=0.1, seed=seed)


@over_entries
@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
@over_backends()
def test_no_probability(backend, device, entry, p):
    adapter = adapter_of(backend, device)
    case = equivalence.BY_NAME["odd"]
    with pytest.raises(ValueError, match="dropout_p"):
        compute(adapter, entry, case, device, torch.float32, dropout_p=p, seed=seed_on(device))


# ------------------------------------------------------------------------------ torch's dropout
# Where v is the identity the output is the dropped weights, and so shows the mask.

IDENTITY = Case("identity", (33, 64, 0, 17), starts=(70, 3, 0, 110), rows=130, head_dim=64)


def dropped_weights(
    adapter: Any, entry: str, device: str, p: float, causal: bool
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """For each sequence its weights (H, n, n) in float64 and what dropout made of them; and the
    outcome of the same draw with another v."""
    qkv, grad = IDENTITY.inputs(torch.float32)
    for s, n in IDENTITY.spans:
        qkv[s : s + n, 2] = torch.eye(n, 64)[:, None]
    q, k, v = qkv.double().unbind(1)
    torch.manual_seed(3)
    starts, lens = IDENTITY.index(device)
    leaves = [qkv.to(device)] if entry == "attention" else [x.to(device) for x in qkv.unbind(1)]
    out, *gradients = equivalence.run(
        lambda *x: getattr(adapter, entry)(
            *x, starts, lens, max_seqlen=64, dropout_p=p, causal=causal
        ),
        grad.to(device), *leaves,
    )  # fmt: skip
    if entry == "attention":
        gradients = gradients[0].unbind(1)
    exact = equivalence.attend(q, k, v, IDENTITY, causal=causal)

    def by_sequence(x: Tensor) -> list[Tensor]:
        return [x[s : s + n].double().transpose(0, 1) for s, n in IDENTITY.spans]

    values = dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True))
    return by_sequence(exact), by_sequence(out), {"qkv": qkv, "grad": grad, **values}


def check_torch_dropout(adapter: Any, entry: str, device: str, causal: bool) -> None:
    p = 0.3
    weights, dropped, values = dropped_weights(adapter, entry, device, p, causal)
    factors, kept, total = [], 0.0, 0
    for w, d, n in zip(weights, dropped, IDENTITY.lens, strict=True):
        assert (d[..., n:] == 0).all()
        visible = w[..., :n] > 0
        factor = torch.where(visible, d[..., :n] / w[..., :n], 0.0)
        keep = factor > 0.5 / (1 - p)
        # 2e-5 is how far the quantised keep probability may be from 1 - p
        torch.testing.assert_close(factor, keep.double() / (1 - p), rtol=1e-4, atol=1e-6)
        factors.append(keep.double() / (1 - p))
        kept, total = kept + keep.sum().item(), total + visible.sum().item()
    assert abs(kept / total - (1 - p)) < 5 * math.sqrt(p * (1 - p) / total)
    flat = torch.cat([(f > 0).double().flatten() for f in factors])
    assert flat.unique().numel() == 2
    # The gradients are those of the very mask that the output showed.
    qkv = values["qkv"].double()
    _, dq, dk, dv = equivalence.run(
        lambda *x: equivalence.attend(*x, IDENTITY, causal=causal, factors=factors),
        values["grad"].double(), *qkv.unbind(1),
    )  # fmt: skip
    for name, exact in (("dq", dq), ("dk", dk), ("dv", dv)):
        torch.testing.assert_close(values[name].double(), exact, rtol=1e-4, atol=1e-4)


@over_causal
@over_entries
@over_backends(dropout="torch")
def test_torch_dropout(backend, device, entry, causal):
    check_torch_dropout(adapter_of(backend, device, head_dim=64), entry, device, causal)


@over_backends(dropout="torch")
def test_torch_dropout_in_the_mean(backend, device):
    """Over many draws: unbiased, each weight dropped as often as it should be, all independent."""
    adapter = adapter_of(backend, device, head_dim=16)
    p, draws = 0.25, 4000
    q = torch.zeros(16, draws, 16)  # all weights 1 / 16, one draw a head
    v = torch.eye(16)[:, None].expand(16, draws, 16)
    spans = (torch.tensor([s], dtype=torch.int32, device=device) for s in (0, 16))
    q, v = q.to(device), v.to(device)
    out = adapter.attention_qkv(q, q, v, *spans, max_seqlen=16, dropout_p=p).cpu().double() * 16
    kept = (out > 0).double()
    deviation = math.sqrt(p * (1 - p) / draws)
    assert (kept.mean(1) - (1 - p)).abs().max() < 5 * deviation  # each of the 256 weights
    assert (out.mean(1) - 1).abs().max() < 5 * deviation / (1 - p) + 1e-4
    centred = (kept - kept.mean(1, keepdim=True)).transpose(0, 1).flatten(1)
    correlation = centred.T @ centred / (draws * p * (1 - p))
    correlation.fill_diagonal_(0.0)
    assert correlation.abs().max() < 5.5 / math.sqrt(draws)  # 32640 pairs


@over_backends(dropout="torch")
def test_torch_dropout_follows_torch_s_generator(backend, device):
    adapter = adapter_of(backend, device)
    case = equivalence.BY_NAME["odd"]
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values = compute(adapter, "attention", case, device, torch.float32, dropout_p=0.5)
        draws.append(values["out"])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# ------------------------------------------------- sdpa's other path: of GPUs, and when compiling


@pytest.fixture
def sdpa_padded(monkeypatch) -> Any:
    from fasttx.ops import sdpa

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(sdpa, "_one_by_one", None)
    return sdpa


@over_causal
@over_cases()
def test_sdpa_padded(sdpa_padded, case, causal):
    for entry in ENTRIES:
        values = compute(sdpa_padded, entry, case, "cpu", torch.float32, causal=causal)
        measure(case, torch.float32, causal).check(f"sdpa padded, {entry}, {case}", **values)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@over_causal
@pytest.mark.parametrize("case", EMPTY_CASES, ids=str)
def test_sdpa_padded_with_nothing_to_attend_to(sdpa_padded, case, causal, p):
    options = {"causal": causal, "dropout_p": p}
    values = compute(sdpa_padded, "attention", case, "cpu", torch.float32, **options)
    assert all((x == 0).all() for x in values.values())


@over_causal
def test_sdpa_padded_dropout(sdpa_padded, causal):
    check_torch_dropout(sdpa_padded, "attention", "cpu", causal)


# ------------------------------------------------------------- fasttx.scaled_dot_product_attention


def padded_inputs(device: str, batch: int = 3, length: int = 9) -> list[Tensor]:
    return [torch.randn(batch, 2, length, 16, device=device) for _ in range(3)]


PADDINGS = {
    "none": None,
    "full": [[1] * 9] * 3,
    "right": [[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8],
    "left": [[1] * 9, [0] * 5 + [1] * 4, [0] * 8 + [1]],
    "both": [[0] * 2 + [1] * 5 + [0] * 2, [0] * 4 + [1] * 5, [1] * 7 + [0] * 2],
    "an empty row": [[1] * 9, [0] * 9, [0] * 3 + [1] * 6],
}


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32], ids=str)
@over_causal
@pytest.mark.parametrize("padding", PADDINGS)
@over_backends()
def test_convenience_equals_torch(backend, device, padding, causal, kind):
    adapter_of(backend, device)
    q, k, v = (x.requires_grad_() for x in padded_inputs(device))
    mask = PADDINGS[padding]
    mask = None if mask is None else torch.tensor(mask, device=device).to(kind)
    real = torch.ones(3, 9, device=device).bool() if mask is None else mask.bool()
    allowed = real[:, None, None, :].expand(3, 2, 9, 9)
    if causal:
        allowed = allowed & torch.ones(9, 9, device=device).bool().tril()
    grad = torch.randn(3, 2, 9, 16, device=device) * real[:, None, :, None]

    out = scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=0.2, backend=backend.name
    )
    assert out.shape == q.shape
    assert (out.transpose(1, 2)[~real] == 0).all()
    # Rows of padding: torch may look at anything there, and is not asked.
    allowed = allowed | ~real[:, None, :, None]
    expected = F.scaled_dot_product_attention(q, k, v, allowed, scale=0.2)
    expected = expected * real[:, None, :, None]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(out, (q, k, v), grad),
        torch.autograd.grad(expected, (q, k, v), grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@over_backends()
def test_convenience_dropout_draws_from_torch_s_generator(backend, device):
    adapter_of(backend, device)
    q, k, v = padded_inputs(device)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(scaled_dot_product_attention(q, k, v, dropout_p=0.5, backend=backend.name))
        outs.append(scaled_dot_product_attention(q, k, v, dropout_p=0.5, backend=backend.name))
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[4])


def test_convenience_dropout_is_the_shared_generator_s():
    """On the reference, with the seed it draws: sequence b is row b of the batch."""
    q, k, v = padded_inputs("cpu")
    mask = torch.tensor(PADDINGS["left"])
    torch.manual_seed(5)
    out = scaled_dot_product_attention(q, k, v, mask, dropout_p=0.5, backend="reference")
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    keep = dropout.attention_keep(seed, 3, 2, 9, 9, dropout.threshold(0.5)).double()
    for b, row in enumerate(mask):
        n = int(row.sum())
        q_, k_, v_ = (x[b, :, 9 - n :].double() for x in (q, k, v))
        weights = (q_ @ k_.transpose(1, 2) / 4).softmax(-1) * keep[b, :, :n, :n] * 2
        torch.testing.assert_close(out[b, :, 9 - n :].double(), weights @ v_, rtol=1e-5, atol=1e-6)


def test_convenience_without_dropout_leaves_torch_s_generator_alone():
    state = torch.get_rng_state()
    scaled_dot_product_attention(*padded_inputs("cpu"), backend="reference")
    torch.manual_seed(0)
    inputs = padded_inputs("cpu")
    state = torch.get_rng_state()
    scaled_dot_product_attention(*inputs, backend="reference")
    assert torch.equal(torch.get_rng_state(), state)


@over_backends()
def test_convenience_of_nothing(backend, device):
    adapter_of(backend, device)
    for batch, length in ((0, 9), (2, 0), (0, 0)):
        q, k, v = padded_inputs(device, batch, length)
        mask = torch.ones(batch, length, device=device)
        for m in (None, mask):
            out = scaled_dot_product_attention(q, k, v, m, backend=backend.name)
            assert out.shape == q.shape


def test_convenience_takes_any_strides():
    q, k, v = (x.transpose(2, 3) for x in padded_inputs("cpu"))
    assert q.shape == (3, 2, 16, 9)
    out = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("row", [[1, 0] + [1] * 7, [0, 1, 0, 0, 0, 0, 0, 0, 1]])
def test_convenience_refuses_holes(row):
    mask = torch.tensor([[1] * 9, row, [0] * 9])
    with pytest.raises(ValueError, match=r"row 1 has a hole.*together"):
        scaled_dot_product_attention(*padded_inputs("cpu"), mask)


def test_convenience_shape_errors():
    q, k, v = padded_inputs("cpu")
    with pytest.raises(ValueError, match=r"\(3, 2, 8, 16\).*expected three equal \(B, H, L, D\)"):
        scaled_dot_product_attention(q, k[:, :, 1:], v)
    with pytest.raises(ValueError, match="expected three equal"):
        scaled_dot_product_attention(q[0], k[0], v[0])
    for shape in ((3, 8), (9,), (3, 1, 1, 9), (9, 3)):
        with pytest.raises(ValueError, match=r"attention_mask has shape .*expected \(3, 9\)"):
            scaled_dot_product_attention(q, k, v, torch.ones(shape))


@pytest.mark.parametrize("p", [-0.5, 1.5, math.nan])
def test_convenience_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match="dropout_p"):
        scaled_dot_product_attention(*padded_inputs("cpu"), dropout_p=p)


def test_convenience_backend_by_name(monkeypatch):
    with pytest.raises(ConfigError, match=r"unknown attention backend 'fused'.*reference"):
        scaled_dot_product_attention(*padded_inputs("cpu"), backend="fused")
    monkeypatch.setattr(Backend, "unavailable_reasons", lambda *args: ["it is broken"])
    with pytest.raises(BackendUnavailableError, match="it is broken"):
        scaled_dot_product_attention(*padded_inputs("cpu"), backend="sdpa")
