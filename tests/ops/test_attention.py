"""Attention of every backend against float64, forward and backward; and torch's own dropout.

The cases, their definition and the tolerances are those of `fasttx.testing`.
T rows, B sequences, H heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttx import testing
from fasttx.ops.contract import Operations, Spans
from fasttx.ops.dropout import Dropout
from fasttx.testing import AttentionCase, dropout_of, measure
from fasttx.testing.attention import BY_NAME, CASES, EMPTY_CASES, attend
from tests import backends
from tests.backends import HALVES, INTERPRETED, check, over_backends

pytestmark = backends.POISONED

PACKED_AND_APART = (True, False)
ODD = BY_NAME["odd"]
# Triton's interpreter takes minutes over these; `test_float32_with_dropout` has them once each, and
# test_triton_kernels has many sequences.
SLOW = ("wide", "long", "33 sequences", "40 sequences", "300 sequences") if INTERPRETED else ()
SLOW_ONCE = ("wide-full", "long-causal") if INTERPRETED else ()
over_causal = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
over_entries = pytest.mark.parametrize("packed", PACKED_AND_APART, ids=["packed", "apart"])


def over_cases(
    *names: str, causal: tuple[str, ...] | None = None, but: tuple[str, ...] = ()
) -> pytest.MarkDecorator:
    """Parametrise by `case`: each full and causal, or only those named by `causal` so. The slow
    ones are left out, but for those named by `but`."""
    chosen = []
    for case in [BY_NAME[name] for name in names] or CASES:
        for is_causal in (False, True):
            name = f"{case.name}-{'causal' if is_causal else 'full'}"
            wanted = causal is None or is_causal == (case.name in causal)
            if wanted and (case.name not in SLOW or name in but):
                chosen.append(pytest.param(replace(case, causal=is_causal), id=name))
    return pytest.mark.parametrize("case", chosen)


def call(operations: Operations, qkv: Tensor, packed: bool, *options: Any, **more: Any) -> Tensor:
    if packed:
        return operations.attention(qkv, *options, **more)
    return operations.attention_qkv(*qkv.unbind(1), *options, **more)


def test_unwritten_memory_is_poisoned():
    """Else a backend that forgets a row would find zeros there, most of the time."""
    x = torch.zeros(1000)
    for fresh in (torch.empty(1000), torch.empty_like(x), x.new_empty(1000)):
        assert fresh.isnan().all()


# ---------------------------------------------------------------------- outputs and all gradients


@over_cases()
@over_backends()
def test_float32(target, case):
    check(target, case, torch.float32)


@over_cases(but=SLOW_ONCE)
@over_backends(dropout="shared")
def test_float32_with_dropout(target, case):
    check(target, case, torch.float32, 0.1)


@pytest.mark.parametrize("p", [2**-16, 0.5, 0.9, 1 - 2**-16])
@over_cases("odd", "gapped views", causal=())
@over_backends(dropout="shared")
def test_other_dropout_probabilities(target, case, p):
    check(target, replace(case, causal=p == 0.5), torch.float32, p)


@over_cases(
    "one", "odd", "gaps", "infinite", "strided", "peaked", "scaled", "tail",
    causal=("odd", "infinite"),
)  # fmt: skip
@over_backends(torch.float64, p=(0.0, 0.1))
def test_float64(target, dtype, case, p):
    check(target, case, dtype, p)


@over_cases(
    "one", "odd", "gaps", "infinite", "gapped views", "wide", "long", causal=("odd", "infinite")
)
@over_backends(*HALVES, p=(0.0, 0.1))
def test_half_precision(target, dtype, case, p):
    check(target, case, dtype, p)


@pytest.mark.parametrize("case", EMPTY_CASES, ids=str)
@over_backends()
def test_nothing_to_attend_to(target, case):
    for p in (0.0, 0.3, 1.0):
        for causal in (False, True):
            for packed in PACKED_AND_APART:
                values = replace(case, causal=causal).run(
                    target.operations, target.device, torch.float32,
                    dropout_of(p, target.device), packed=packed,
                )  # fmt: skip
                assert not any(x.any() for x in values.values()), (p, causal, packed)


@over_backends()
def test_a_dropout_of_one_leaves_zeros(target):
    check(target, ODD, torch.float32, 1.0)


# -------------------------------------------------------------------- what autograd may ask for


@over_backends()
def test_gradients_with_strides_of_zero(target):
    """`out.sum()` sends an expanded scalar back, `out.transpose()` a transposed gradient."""
    device = target.device
    qkv = ODD.inputs(torch.float32)[0].to(device).requires_grad_()
    out = target.operations.attention(qkv, ODD.spans(device))

    def gradient(grad: Tensor) -> Tensor:
        return torch.autograd.grad(out, qkv, grad, retain_graph=True)[0]

    expanded = torch.ones((), device=device).expand(out.shape)
    torch.testing.assert_close(gradient(expanded), gradient(expanded.contiguous()))
    transposed = torch.randn(out.shape[::-1], device=device).permute(2, 1, 0)
    torch.testing.assert_close(gradient(transposed), gradient(transposed.contiguous()))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
@over_backends()
def test_gradients_of_some_inputs_only(target, wanted):
    qkv, grad = (x.to(target.device) for x in ODD.inputs(torch.float32))
    leaves = [x.contiguous().requires_grad_(i in wanted) for i, x in enumerate(qkv.unbind(1))]
    target.operations.attention_qkv(*leaves, ODD.spans(target.device)).backward(grad)
    assert [x.grad is not None for x in leaves] == [i in wanted for i in range(3)]
    gradients = {f"d{'qkv'[i]}": leaves[i].grad for i in wanted}
    assert not measure(ODD, torch.float32).compare(str(target), gradients).failures


@over_entries
@over_backends()
def test_without_gradients(target, packed):
    qkv, spans = ODD.inputs(torch.float32)[0].to(target.device), ODD.spans(target.device)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = call(target.operations, qkv, packed, spans)
        assert not out.requires_grad
        assert not measure(ODD, torch.float32).compare(str(target), {"out": out}).failures


@over_causal
@over_backends(torch.float64, p=(0.0, 0.4))
def test_gradcheck(target, dtype, causal, p):
    case = AttentionCase("gradcheck", (2, 0, 1, 3), starts=(5, 4, 7, 1), rows=8, head_dim=4)
    qkv = case.inputs(dtype)[0].to(target.device).requires_grad_()
    spans, dropout = case.spans(target.device)._replace(max_seqlen=5), dropout_of(p, target.device)

    def attention(qkv: Tensor) -> Tensor:
        return target.operations.attention(qkv, spans, dropout, causal=causal)

    assert torch.autograd.gradcheck(attention, (qkv,))


@over_backends(*HALVES)
def test_under_autocast(target, dtype):
    """Autocast hands attention low precision in, and must not lower what happens inside."""
    case = replace(ODD, causal=True)
    with torch.autocast(target.device, dtype=dtype):
        values = case.run(target.operations, target.device, dtype)
    assert not measure(case, dtype).compare(str(target), values).failures


@over_entries
@over_backends()
def test_forward_mode_derivatives_are_right_or_refused(target, packed):
    """Never left out: torch takes what it does not know for a constant. The reference has them."""
    device = target.device
    x, spans = ODD.inputs(torch.float32)[0].to(device), ODD.spans(device)
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(device)

    def attention(x: Tensor) -> Tensor:
        return call(target.operations, x, packed, spans)

    def by_jvp() -> Tensor:
        return torch.func.jvp(attention, (x,), (tangent,))[1]

    def by_dual_numbers() -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            return torch.autograd.forward_ad.unpack_dual(attention(dual)).tangent

    exact = torch.func.jvp(
        lambda x: attend(*x.unbind(1), ODD), (x.cpu().double(),), (tangent.cpu().double(),)
    )[1]
    for derive in (by_jvp, by_dual_numbers):
        if target.name == "reference":
            torch.testing.assert_close(derive().cpu().double(), exact, rtol=1e-4, atol=1e-4)
            continue
        with pytest.raises((NotImplementedError, RuntimeError)) as refusal:
            derive()
        if target.name in ("cpu", "triton", "metal"):
            assert "no forward-mode derivatives" in str(refusal.value)
            assert "reference" in str(refusal.value)


# ------------------------------------------------------------------------------- shared dropout


def attend_at(
    target: backends.Target, qkv: Tensor, pairs: list[tuple[int, int]], max_seqlen: int = 64,
    seed: int = testing.checking.SEED,
) -> Tensor:  # fmt: skip
    starts, lens = torch.tensor(pairs, dtype=torch.int32, device=target.device).unbind(1)
    spans = Spans.of(starts, lens, max_seqlen, len(qkv))
    dropout = dropout_of(0.4, target.device, seed)
    return target.operations.attention(qkv.to(target.device), spans, dropout).cpu()


@over_backends(dropout="shared")
def test_masks_do_not_depend_on_packing(target):
    """A sequence alone, among others, elsewhere in the rows, under a larger max_seqlen."""
    mine = torch.randn(17, 3, 2, 16)
    others = torch.randn(64, 3, 2, 16)

    def place(at: int, pairs: list[tuple[int, int]], max_seqlen: int) -> Tensor:
        qkv = others.clone()
        qkv[at : at + 17] = mine
        return attend_at(target, qkv, pairs, max_seqlen)[at : at + 17]

    alone = place(0, [(0, 0), (0, 0), (0, 17)], 17)
    assert alone.abs().sum() > 0
    for packed in (
        place(20, [(0, 11), (11, 9), (20, 17)], 17),
        place(3, [(40, 24), (20, 1), (3, 17)], 64),
        place(47, [(0, 0), (1, 46), (47, 17), (0, 1)], 46),
    ):
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)


@over_backends(dropout="shared")
def test_masks_differ_between_sequences_heads_and_seeds(target):
    one = torch.randn(16, 3, 1, 16).expand(-1, -1, 2, -1)
    qkv, pairs = torch.cat([one, one]), [(0, 16), (16, 16)]
    out = attend_at(target, qkv, pairs)
    assert not torch.allclose(out[:16], out[16:])
    assert not torch.allclose(out[:, 0], out[:, 1])
    assert not torch.allclose(out, attend_at(target, qkv, pairs, seed=1))


@over_backends(dropout="shared")
def test_same_seed_same_bits(target):
    torch.use_deterministic_algorithms(False)  # as in a run; the fixture restores the mode
    dropout = dropout_of(0.1, target.device)
    first, second = (
        BY_NAME["alike" if INTERPRETED else "long"].run(
            target.operations, target.device, torch.float32, dropout
        )
        for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs between two runs"


@over_backends(dropout="shared")
def test_a_probability_that_rounds_to_zero_is_no_dropout(target):
    values = ODD.run(target.operations, target.device, torch.float32, Dropout.of(2**-18, None))
    assert not measure(ODD, torch.float32).compare(str(target), values).failures
