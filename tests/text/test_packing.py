"""Ragged ids, packed batches, and the way from padded to packed, against slow loops.

B sequences, T rows, L padded length.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasttx import PackedBatch, TransformerClassifier, pack
from fasttx.text.packing import (
    TRUNCATIONS,
    RaggedIds,
    positions,
    sequence_ids,
    shuffled_batches,
    unpad,
)
from tests import backends

pytestmark = backends.POISONED

TEXTS = [
    [],
    [[]],
    [[], []],
    [[5]],
    [[5, 6, 7], [], [8], [9, 2, 3, 4, 5, 6], []],
    [list(range(i, 2 * i)) for i in (7, 0, 1, 12, 3)],
]
over_texts = pytest.mark.parametrize("texts", TEXTS, ids=lambda t: f"lens {[len(x) for x in t]}")


def as_lists(ids: RaggedIds) -> list[list[int]]:
    assert ids.values.dtype == np.int32
    assert ids.offsets.dtype == np.int64
    assert ids.offsets[0] == 0
    assert ids.offsets[-1] == len(ids.values)
    return [ids[i].tolist() for i in range(len(ids))]


# -------------------------------------------------------------------------------------- RaggedIds


@over_texts
def test_ragged_round_trip(texts):
    ids = RaggedIds.from_lists(texts)
    assert len(ids) == len(texts)
    assert as_lists(ids) == texts
    assert ids.lengths.tolist() == [len(t) for t in texts]


def test_ragged_indices_are_those_of_a_list():
    ids = RaggedIds.from_lists(TEXTS[4])
    assert ids[-2].tolist() == TEXTS[4][-2]
    assert ids[np.int64(3)].tolist() == TEXTS[4][3]
    for i in (5, -6):
        with pytest.raises(IndexError):
            ids[i]


@over_texts
def test_select(texts):
    ids = RaggedIds.from_lists(texts)
    n = len(texts)
    for chosen in ([], list(range(n)), list(range(n))[::-1], [n - 1] * 3 if n else []):
        assert as_lists(ids.select(np.array(chosen, dtype=np.int64))) == [texts[i] for i in chosen]


def test_concatenate() -> None:
    parts = [[[1, 2], [], [3]], [], [[4, 5, 6]]]
    ragged = [RaggedIds.from_lists(p) for p in parts]
    ragged[0] = ragged[0].windows(1)[0].select(np.array([0, 1, 2, 3]))
    # windows() gives offsets that need not start at 0, and values that need not be all of them
    ragged[2] = RaggedIds(np.array([9, 4, 5, 6, 9], dtype=np.int32), np.array([1, 4]))
    whole = RaggedIds.concatenate(ragged)
    assert [w.tolist() for w in map(whole.__getitem__, range(len(whole)))] == [
        [1], [2], [], [3], [4, 5, 6],
    ]  # fmt: skip
    assert whole.values.dtype == np.int32
    assert whole.offsets.dtype == np.int64


def test_select_counts_negative_indices_from_the_end():
    """Or refuses them, but never takes another text."""
    texts = [[5, 6, 7], [1], [8], [9, 2]]
    ids = RaggedIds.from_lists(texts)
    for i in (-1, -2, -3, -4):
        try:
            (chosen,) = as_lists(ids.select(np.array([i])))
        except IndexError:
            continue
        assert chosen == texts[i]


def test_select_refuses_indices_past_the_end():
    ids = RaggedIds.from_lists(TEXTS[4])
    with pytest.raises(IndexError):
        ids.select(np.array([0, 5]))


def truncated(text: list[int], max_len: int, how: str) -> list[int]:
    if len(text) <= max_len:
        return text
    if how == "head":
        return text[:max_len]
    if how == "tail":
        return text[len(text) - max_len :]
    head = max_len // 2
    return text[:head] + text[len(text) - (max_len - head) :]


@pytest.mark.parametrize("how", TRUNCATIONS)
@pytest.mark.parametrize("max_len", [0, 1, 2, 3, 5, 6, 100])
@over_texts
def test_truncate(texts, max_len, how):
    ids = RaggedIds.from_lists(texts)
    assert as_lists(ids.truncate(max_len, how)) == [truncated(t, max_len, how) for t in texts]
    assert as_lists(ids) == texts


def test_truncate_lists_the_known_ways():
    with pytest.raises(ValueError, match=r"'middle'; expected one of head, tail, head\+tail"):
        RaggedIds.from_lists(TEXTS[4]).truncate(3, "middle")


# ------------------------------------------------------------------------------------------- pack


@pytest.mark.parametrize("multiple", [1, 2, 8, 64])
@over_texts
def test_pack(texts, multiple):
    labels = np.arange(len(texts), dtype=np.int32)
    batch = pack(RaggedIds.from_lists(texts), labels, token_multiple=multiple)
    total = sum(len(t) for t in texts)
    rows = len(batch.input_ids)
    assert rows % multiple == 0
    assert total <= rows < total + multiple
    flat = [i for t in texts for i in t]
    assert batch.input_ids.tolist() == flat + [0] * (rows - total)
    places = [i for t in texts for i in range(len(t))]
    assert batch.position_ids.tolist() == places + [0] * (rows - total)
    assert batch.cu_seqlens.tolist() == [sum(map(len, texts[:i])) for i in range(len(texts) + 1)]
    assert batch.max_seqlen == max(map(len, texts), default=0)
    assert type(batch.max_seqlen) is int
    assert batch.labels.tolist() == labels.tolist()
    assert len(batch) == len(texts)
    dtypes = (batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.labels)
    assert [x.dtype for x in dtypes] == [torch.int64, torch.int32, torch.int32, torch.int64]


def test_pack_without_labels():
    batch = pack(RaggedIds.from_lists([[1]]))
    assert batch.labels is None
    assert batch.to("cpu").labels is None


def test_batches_move_whole():
    batch = pack(RaggedIds.from_lists([[1, 2], [3]]), np.array([0, 1]))
    there = batch.to("meta")
    assert isinstance(there, PackedBatch)
    for name in ("input_ids", "position_ids", "cu_seqlens", "labels"):
        assert getattr(there, name).device.type == "meta"
        assert getattr(there, name).dtype == getattr(batch, name).dtype
    assert there.max_seqlen == batch.max_seqlen
    assert batch.input_ids.device.type == "cpu"


def test_model_inputs_are_what_the_model_takes():
    torch.manual_seed(0)
    model = TransformerClassifier(
        20, d_model=16, num_heads=2, num_layers=1, d_ff=8, max_len=8, attn_backend="reference"
    ).eval()
    texts = [[5, 6, 7], [], [8]]
    batch = pack(RaggedIds.from_lists(texts), token_multiple=8)
    padded = torch.tensor([t + [0] * (3 - len(t)) for t in texts])
    torch.testing.assert_close(model(**batch.model_inputs()), model(padded))


# -------------------------------------------------------------------------- positions and sequences


@pytest.mark.parametrize("tail", [0, 1, 9])
@pytest.mark.parametrize(
    "lens", [[], [0], [0, 0], [3], [2, 0, 0, 4, 1], [0, 5], [5, 0], [0, 1, 0, 1, 0]]
)
def test_positions_and_sequence_ids(lens, tail):
    cu_seqlens = torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32)
    rows = sum(lens) + tail
    mine = sequence_ids(cu_seqlens, rows)
    assert mine.dtype == torch.int64
    assert mine.tolist() == [i for i, n in enumerate(lens) for _ in range(n)] + [len(lens)] * tail
    place = positions(cu_seqlens, rows)
    assert place.dtype == torch.int32
    assert place.tolist() == [i for n in lens for i in range(n)] + [0] * tail


# ------------------------------------------------------------------------------------------ unpad


def random_mask(batch: int, length: int) -> torch.Tensor:
    return torch.rand(batch, length) < torch.rand(batch, 1)


MASKS = {
    "right": torch.arange(7) < torch.tensor([[7], [3], [0], [1]]),
    "left": torch.arange(7) >= torch.tensor([[0], [3], [7], [6]]),
    "holes": torch.tensor([[1, 0, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0, 1]]),
    "nothing": torch.zeros(3, 7),
    "everything": torch.ones(2, 7),
    "no row": torch.ones(0, 7),
    "no column": torch.ones(3, 0),
}


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_unpad(name, kind):
    mask = MASKS[name]
    ids = torch.randint(0, 100, mask.shape)
    packed, cu_seqlens = unpad(ids, mask.to(kind))
    expected = [
        [i for i, real in zip(row, keep, strict=True) if real]
        for row, keep in zip(ids.tolist(), mask.tolist(), strict=True)
    ]
    assert packed.dtype == torch.int64
    assert cu_seqlens.dtype == torch.int32
    assert packed.tolist() == [i for row in expected for i in row]
    assert cu_seqlens.tolist() == [0, *np.cumsum([len(row) for row in expected])]


def test_unpad_without_a_mask_drops_zeros():
    packed, cu_seqlens = unpad(torch.tensor([[3, 4, 0], [0, 0, 5], [0, 0, 0], [6, 0, 7]]))
    assert packed.tolist() == [3, 4, 5, 6, 7]
    assert cu_seqlens.tolist() == [0, 2, 3, 3, 5]


def test_unpad_keeps_a_zero_that_the_mask_calls_real():
    packed, cu_seqlens = unpad(torch.tensor([[3, 0, 4]]), torch.tensor([[1, 1, 0]]))
    assert packed.tolist() == [3, 0]
    assert cu_seqlens.tolist() == [0, 2]


@pytest.mark.parametrize("name", MASKS)
def test_unpad_when_compiling_has_a_dead_tail(monkeypatch, name):
    """The real tokens come first, in the same order; T = B * L whatever the mask."""
    mask = MASKS[name]
    ids = torch.randint(1, 100, mask.shape)
    packed, cu_seqlens = unpad(ids, mask)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    fixed, fixed_cu_seqlens = unpad(ids, mask)
    assert len(fixed) == mask.numel()
    assert torch.equal(fixed[: len(packed)], packed)
    assert torch.equal(fixed_cu_seqlens, cu_seqlens)


def test_unpad_compiled():
    compiled = torch.compile(unpad, backend="eager", fullgraph=True)
    ids = torch.randint(1, 100, (4, 7))
    for mask in (random_mask(4, 7), random_mask(4, 7)):
        packed, cu_seqlens = unpad(ids, mask)
        fixed, fixed_cu_seqlens = compiled(ids, mask)
        assert fixed.shape == (28,)
        assert torch.equal(fixed[: len(packed)], packed)
        assert torch.equal(fixed_cu_seqlens, cu_seqlens)


# ---------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("count", "size"), [(10, 3), (9, 3), (2, 5), (1, 1), (0, 4)])
def test_every_text_once_an_epoch(count, size):
    batches = list(shuffled_batches(count, size, seed=1, epoch=2))
    assert [len(b) for b in batches[:-1]] == [size] * (len(batches) - 1)
    assert sorted(i for b in batches for i in b.tolist()) == list(range(count))


def test_batches_are_a_function_of_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(list(shuffled_batches(50, 8, seed=seed, epoch=epoch))).tolist()

    first = order(1, 2)
    np.random.default_rng(0).random(3)
    assert order(1, 2) == first
    others = [order(1, 3), order(2, 2), order(2, 1), order(1, 0)]
    assert first not in others
    assert len({tuple(o) for o in others}) == 4
    assert first != list(range(50))


def test_windows_hold_every_word_once() -> None:
    ids = RaggedIds.from_lists([list(range(n)) for n in (5, 0, 6, 7, 12, 13)])
    pieces, owner = ids.windows(6)
    assert owner.tolist() == [0, 1, 2, 3, 3, 4, 4, 5, 5, 5]
    assert pieces.lengths.tolist() == [5, 0, 6, 3, 4, 6, 6, 4, 4, 5]
    assert np.array_equal(pieces.values, ids.values)
    assert pieces[3].tolist() == [0, 1, 2]
    assert pieces[4].tolist() == [3, 4, 5, 6]
