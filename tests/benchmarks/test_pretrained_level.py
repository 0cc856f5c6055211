"""Contests on a pretrained encoder: all have its weights, and who computes otherwise is out."""

from __future__ import annotations

from dataclasses import replace

import contest as contests
import pretrained_level
import pytest
import torch
from workload import Setting

from tests import pretrained_folders

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("bert")
    pretrained_folders.write(place, "bert", max_position_embeddings=16)
    return str(place)


def made(folder, level="finetune"):
    setting = Setting(CPU, config=pretrained_level.config_of(folder, 16), divisor=16)
    return pretrained_level.contest(level, setting, folder, 32)


def enter(contest, name):
    """None where it cannot take part here."""
    try:
        return contest.enter(name)
    except contests.Unavailable:
        return None


def test_all_fine_tune_the_same_model(folder):
    contest = made(folder)
    assert [name for name in contest.entrants if not name.startswith("fasttx-")] == [
        "transformers", "transformers-grouped", "transformers+attention",
        "transformers+accelerate", "transformers+both",
    ]  # fmt: skip
    ran = {name: enter(contest, name) for name in contest.entrants}
    assert ran["transformers"] and ran["fasttx-reference"]
    for name, contestant in ran.items():
        if contestant is None:
            continue
        before = [p.detach().clone() for p in contestant.model.parameters()]
        contestant.step(0)
        changed = [
            not torch.equal(a, b)
            for a, b in zip(before, contestant.model.parameters(), strict=True)
        ]
        assert sum(changed) >= 0.9 * len(changed), name


def test_batches_of_like_length_hold_the_texts_of_all(folder):
    work = made(folder).entrants["transformers"].work

    def texts(batches):
        found = []
        for batch in batches:
            found += [t.tolist() for t in batch.input_ids.split(batch.cu_seqlens.diff().tolist())]
        return found

    grouped, mixed = texts(work.grouped), texts(work.mixed)
    assert grouped != mixed and sorted(grouped) == sorted(mixed)
    assert [len(text) for text in grouped] == sorted(len(text) for text in grouped)
    assert len(work.grouped) == len(work.mixed) == pretrained_level.BATCHES


@pytest.mark.parametrize("level", ["finetune", "classify"])
@pytest.mark.parametrize("name", ["eps", "weights"])
def test_another_model_is_not_timed(folder, monkeypatch, level, name):
    ours = pretrained_level.Encoder.ours

    def wrong(self, backend):
        model = ours(self, backend)
        if name == "eps":
            model.config = replace(model.config, norm_eps=1e-2)
            for norm in (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)):
                norm.eps = 1e-2
        else:
            model.blocks[1].qkv.weight.data[0] += 0.1
        return model

    who = "fasttx-reference" if level == "finetune" else "fasttx-native-fp32"
    contest = made(folder, level)
    if who == "fasttx-native-fp32" and enter(made(folder, level), who) is None:
        pytest.skip("no native encoder here")
    monkeypatch.setattr(pretrained_level.Encoder, "ours", wrong)
    with pytest.raises(AssertionError, match="off"):
        contest.enter(who)


def test_all_classify_alike(folder):
    contest = made(folder, "classify")
    shapes = [(len(batch), 2) for batch in contest.entrants["transformers"].work.grouped]
    for name in contest.entrants:
        contestant = enter(contest, name)
        if contestant is not None:
            assert [tuple(logits.shape) for logits in contestant.step(0)] == shapes, name
    assert "transformers" in contest.entered


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setattr(
        pretrained_level, "missing", lambda *names: [f"{names[0]} is not installed"]
    )
    with pytest.raises(contests.Unavailable, match="transformers is not installed"):
        made(folder)
