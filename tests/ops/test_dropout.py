"""The shared generator: known answers, its layout in words, and its statistics."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from fasttx.ops import dropout
from fasttx.ops.dropout import NO_DROPOUT, Dropout
from fasttx.testing import RowCase, dropout_of, philox
from tests.backends import over_backends

ZEROS, ONES = ((0,) * 4, (0,) * 2), ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2)
PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
KNOWN_ANSWERS = [  # Random123, kat_vectors: rounds, (counter, key), words
    (7, ZEROS, "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, ONES, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, PI, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, ZEROS, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, ONES, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEEDS = (0, 1, -1, 0x299F31D0A4093822, -(2**63), 2**63 - 1, 2**31, 2**32)


def seed_tensor(seed: int) -> torch.Tensor:
    return torch.tensor(seed, dtype=torch.int64)


def as_tensors(words):
    return tuple(torch.tensor(w, dtype=torch.int64) for w in words)


@pytest.mark.parametrize("form", ["ints", "tensors"])
@pytest.mark.parametrize(("rounds", "block", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(rounds, block, words, form):
    counter, key = block if form == "ints" else map(as_tensors, block)
    answer = dropout.philox4x32(counter, key, rounds)
    assert " ".join(f"{int(w):08x}" for w in answer) == words
    assert " ".join(f"{w:08x}" for w in philox.philox(*block, rounds)) == words


def test_philox_has_seven_rounds_unless_told():
    assert dropout.ROUNDS == 7
    assert dropout.philox4x32(*PI) == dropout.philox4x32(*PI, 7)


def test_philox_equals_python_ints_on_random_counters():
    draw = random.Random(1)
    blocks = [[draw.getrandbits(32) for _ in range(6)] for _ in range(500)]
    columns = [torch.tensor(c) for c in zip(*blocks, strict=True)]
    words = torch.stack(dropout.philox4x32(tuple(columns[:4]), tuple(columns[4:])), 1)
    assert words.tolist() == [list(philox.philox(b[:4], b[4:])) for b in blocks]


@pytest.mark.parametrize("seed", SEEDS)
def test_split_seed_is_low_then_high(seed):
    low, high = dropout.split_seed(seed_tensor(seed))
    assert (int(low), int(high)) == philox.key_of(seed)


# -------------------------------------------------------------------------------------- the layout


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_mask_element_by_element(seed):
    sequences, heads, queries, keys = 3, 2, 5, 21
    t = 20_000
    keep = dropout.attention_keep(seed_tensor(seed), sequences, heads, queries, keys, t)
    assert keep.shape == (sequences, heads, queries, keys)
    assert keep.dtype == torch.bool
    for b, h, q, k in np.ndindex(*keep.shape):
        assert keep[b, h, q, k] == (philox.element_uniform(seed, k, (q, h, b)) >= t)


@pytest.mark.parametrize("seed", SEEDS)
def test_row_mask_element_by_element(seed):
    t = 20_000
    keep = dropout.row_keep(seed_tensor(seed), 7, 19, t)
    assert keep.shape == (7, 19)
    assert keep.dtype == torch.bool
    for row, column in np.ndindex(*keep.shape):
        uniform = philox.element_uniform(seed, column, (row, 0, 0))
        assert keep[row, column] == (uniform >= t)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 70, 70), (1, 2, 3, 300), (4, 1, 257, 8)])
def test_attention_mask_of_larger_shapes(shape):
    """Against the vectorised generator of the oracle, which the other tests use too."""
    for seed in (-3, 12345678987654321):
        uniforms = torch.from_numpy(philox.attention_uniforms(seed, *shape).astype(np.int64))
        for t in (1, 6554, 32768, 65535):
            assert torch.equal(dropout.attention_keep(seed_tensor(seed), *shape, t), uniforms >= t)


def test_attention_and_row_masks_of_one_seed_differ():
    """Row sites are (column // 8, row, 0, 0): sequence 0, head 0. Only the site seed parts them."""
    seeds = dropout.site_seeds(seed_tensor(5), 2)
    attention = dropout.attention_keep(seeds[0], 1, 1, 64, 64, 32768)[0, 0]
    rows = dropout.row_keep(seeds[1], 64, 64, 32768)
    assert abs((attention == rows).double().mean() - 0.5) < 0.05


@pytest.mark.parametrize("count", range(18))
def test_uniforms_take_low_halves_first(count):
    blocks = -(-count // 8)
    words = tuple(
        torch.tensor([(8 * b + 2 * w) | (8 * b + 2 * w + 1) << 16 for b in range(blocks)])
        for w in range(4)
    )
    words = tuple(w.to(torch.int64) for w in words)
    assert dropout.uniforms16(words, count).tolist() == list(range(count))


@pytest.mark.parametrize("seed", SEEDS)
def test_site_seeds(seed):
    seeds = dropout.site_seeds(seed_tensor(seed), 19)
    assert seeds.dtype == torch.int64
    expected = []
    for site in range(19):
        low, high, _, _ = philox.philox((site, 0, 0, 1), philox.key_of(seed))
        expected.append(int(np.uint64(low | high << 32).astype(np.int64)))
    assert seeds.tolist() == expected
    assert len(set(expected)) == 19


@pytest.mark.parametrize("run_seed", [0, 1, 2**40 + 7])
@pytest.mark.parametrize("step", [0, 1, 2**32 - 1, 2**32, 2**40 + 3])
@pytest.mark.parametrize("rank", [0, 3])
def test_forward_seed(run_seed, step, rank):
    counter = (step % 2**32, step >> 32, rank, 0)
    low, high, _, _ = philox.philox(counter, philox.key_of(run_seed))
    seed = dropout.forward_seed(run_seed, step, rank)
    assert seed == int(np.uint64(low | high << 32).astype(np.int64))
    torch.tensor(seed, dtype=torch.int64)  # fits


def test_forward_seeds_do_not_repeat():
    seeds = {dropout.forward_seed(r, s, k) for r in range(4) for s in range(200) for k in range(4)}
    assert len(seeds) == 4 * 200 * 4


# -------------------------------------------------------------------------- thresholds and scaling


@pytest.mark.parametrize(
    ("p", "t"),
    [
        (0.0, 0), (0.0 + 2**-18, 0), (2**-17, 1), (2**-16, 1), (0.1, 6554), (0.25, 16384),
        (0.5, 32768), (0.9, 58982), (1 - 2**-16, 65535), (1 - 2**-18, 65536), (1.0, 65536),
        (0, 0), (1, 65536),
    ],
)  # fmt: skip
def test_threshold(p, t):
    assert dropout.threshold(p) == t
    assert isinstance(dropout.threshold(p), int)


@pytest.mark.parametrize("p", [-1e-9, 1.0000001, -1, 2, math.inf, -math.inf, math.nan])
def test_threshold_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match=r"dropout_p is .*between 0 and 1"):
        dropout.threshold(p)


@pytest.mark.parametrize("t", [0, 1, 6554, 32768, 65535])
def test_keep_scale_undoes_the_exact_probability(t):
    """Over the 65536 values that a uniform takes, the mean of what it multiplies by is 1."""
    kept = sum(u >= t for u in range(65536))
    assert dropout.keep_scale(t) == 65536 / kept


def test_keep_scale_of_nothing_kept_is_finite():
    assert dropout.keep_scale(dropout.ONE) == 0.0


@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 0.999, 1 - 2**-16])
def test_exact_keep_probability(monkeypatch, p):
    """Fed with every 16-bit value once, the masks keep exactly 65536 - t of them."""
    every = torch.arange(65536).view(8192, 1, 8)
    words = tuple(every[..., 2 * w] | every[..., 2 * w + 1] << 16 for w in range(4))
    monkeypatch.setattr(dropout, "philox4x32", lambda counter, key: words)
    t = dropout.threshold(p)
    seed = seed_tensor(0)
    assert dropout.row_keep(seed, 8192, 8, t).sum() == 65536 - t
    assert dropout.attention_keep(seed, 1, 1, 8192, 8, t).sum() == 65536 - t
    assert torch.equal(dropout.row_keep(seed, 8192, 8, t).flatten(), torch.arange(65536) >= t)


WRONG_SEEDS = [None, 3, torch.tensor(3.0), torch.tensor([3]), torch.tensor(3).int()]


@pytest.mark.parametrize("seed", WRONG_SEEDS, ids=repr)
def test_a_seed_that_is_no_int64_scalar_is_refused(seed):
    with pytest.raises(TypeError, match=r"seed is .* int64 tensor"):
        Dropout.of(0.5, seed)
    with pytest.raises(TypeError, match=r"seed is .* int64 tensor"):
        dropout.site_seeds(seed, 2)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.inf, math.nan])
def test_a_site_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match=r"dropout_p is .*between 0 and 1"):
        Dropout.of(p, seed_tensor(1))


@pytest.mark.parametrize("p", [0.0, 0, 2**-18])
def test_a_site_that_drops_nothing_needs_no_seed(p):
    assert Dropout.of(p, None)[:2] == NO_DROPOUT[:2]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("op", ["embed", "add_norm", "bias_act"])
@over_backends(dropout="shared")
def test_masks_do_not_depend_on_the_number_of_rows(target, op):
    case, device = RowCase(op, 40, 24), target.device
    inputs = {**case.leaves(torch.float32), **case.fixed(torch.float32)}
    inputs = {name: x.to(device) for name, x in inputs.items()}

    def of_first(rows: int) -> torch.Tensor:
        """The first output, of the first rows of what has rows."""
        some = {"h", "y", "u", "ids", "position_ids"}
        cut = {name: x[:rows] if name in some else x for name, x in inputs.items()}
        return case.call(target.operations, cut, dropout_of(0.5, device))[0]

    for rows in (1, 7, 8, 33):
        torch.testing.assert_close(of_first(rows), of_first(40)[:rows])


# ---------------------------------------------------------------------------------- the statistics
# Seeds are fixed, so these cannot flicker; the bounds are those of a test at 5 standard deviations.

BOUND = 5.0


def uniforms(seed: int) -> torch.Tensor:
    """(2**18,) 16-bit values: one attention mask's worth."""
    block = (torch.arange(64), torch.arange(512)[:, None], seed_tensor(0), seed_tensor(0))
    words = dropout.philox4x32(block, dropout.split_seed(seed_tensor(seed)))
    return dropout.uniforms16(words, 512).flatten()


@pytest.mark.parametrize("seed", [0, 1, -5])
@pytest.mark.parametrize("shift", [0, 8], ids=["low byte", "high byte"])
def test_uniformity_chi_square(seed, shift):
    counts = torch.bincount((uniforms(seed) >> shift) & 255, minlength=256).double()
    expected = counts.sum() / 256
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    z = (chi2 - 255) / math.sqrt(2 * 255)
    assert abs(z) < BOUND


@pytest.mark.parametrize("lane", range(8))
def test_every_lane_is_uniform(lane):
    values = uniforms(7)[lane::8]
    counts = torch.bincount(values >> 10, minlength=64).double()
    expected = counts.sum() / 64
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - 63) / math.sqrt(2 * 63) < BOUND


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_share_of_kept_elements(p):
    t = dropout.threshold(p)
    keep = dropout.attention_keep(seed_tensor(11), 2, 4, 128, 256, t).double()
    probability = 1 - t / 65536
    deviation = math.sqrt(probability * (1 - probability) / keep.numel())
    assert abs(keep.mean().item() - probability) < BOUND * deviation


def signs(seed: int, sequences: int = 2, heads: int = 4) -> torch.Tensor:
    keep = dropout.attention_keep(seed_tensor(seed), sequences, heads, 64, 128, dropout.ONE // 2)
    return keep.double() * 2 - 1


def check_uncorrelated(a: torch.Tensor, b: torch.Tensor) -> None:
    z = (a * b).sum().item() / math.sqrt(a.numel())
    assert abs(z) < BOUND, f"correlated: z = {z:.1f}"


@pytest.mark.parametrize("dim", range(4), ids=["sequences", "heads", "queries", "keys"])
@pytest.mark.parametrize("lag", [1, 2, 3])
def test_neighbours_are_uncorrelated(dim, lag):
    s = signs(3, sequences=5, heads=5)
    n = s.shape[dim]
    check_uncorrelated(s.narrow(dim, 0, n - lag), s.narrow(dim, lag, n - lag))


@pytest.mark.parametrize("lag", [7, 8, 16])
def test_keys_of_neighbouring_blocks_are_uncorrelated(lag):
    s = signs(4)
    check_uncorrelated(s[..., :-lag], s[..., lag:])


@pytest.mark.parametrize(("dim", "other"), [(0, 1), (1, 2), (2, 3)])
def test_exchanged_coordinates_are_uncorrelated(dim, other):
    """A counter that mixed up two of its words would be symmetric in them."""
    n = 20
    s = dropout.attention_keep(seed_tensor(9), n, n, n, n, dropout.ONE // 2).double() * 2 - 1
    swapped = s.transpose(dim, other)
    shape = [n if d in (dim, other) else 1 for d in range(4)]
    pairs = torch.ones(n, n, dtype=torch.bool).triu(1).view(shape).expand_as(s)
    check_uncorrelated(s[pairs], swapped[pairs])


@pytest.mark.parametrize(
    ("one", "other"),
    [(0, 1), (1, 2), (1, -1), (5, 5 + 2**32), (0, -(2**63))],
)
def test_neighbouring_seeds_are_uncorrelated(one, other):
    check_uncorrelated(signs(one), signs(other))


def test_sites_steps_ranks_and_runs_are_uncorrelated():
    step = {
        "this": dropout.forward_seed(0, 0), "next step": dropout.forward_seed(0, 1),
        "next rank": dropout.forward_seed(0, 0, 1), "next run": dropout.forward_seed(1, 0),
    }  # fmt: skip
    sites = {name: dropout.site_seeds(seed_tensor(s), 3).tolist() for name, s in step.items()}
    here = sites["this"]
    others = [here[1], here[2], sites["next step"][0], sites["next rank"][0], sites["next run"][0]]
    for other in others:
        check_uncorrelated(signs(here[0]), signs(other))


def test_row_masks_are_uncorrelated():
    keep = dropout.row_keep(seed_tensor(2), 512, 256, dropout.ONE // 2)
    s = keep.double() * 2 - 1
    check_uncorrelated(s[1:], s[:-1])
    for lag in (1, 2, 8):
        check_uncorrelated(s[:, lag:], s[:, :-lag])
    other = dropout.row_keep(seed_tensor(3), 512, 256, dropout.ONE // 2).double() * 2 - 1
    check_uncorrelated(s, other)
