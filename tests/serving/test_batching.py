"""The queue and its thread, with a model that says when it is asked and what it was given."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fasttx.config import SINGLE_LABEL
from fasttx.text.packing import RaggedIds
from fasttx.text.reading import read
from fasttx.text.tokenizer import SpecialTokens
from fasttx.training.problems import PROBLEMS
from tests.serving import services  # noqa: F401 - skips where the packages are missing

from fasttx.serving import batching  # isort: skip
from fasttx.serving.batching import Batcher
from fasttx.serving.limits import Limits, Refused
from fasttx.serving.metrics import Metrics


class Model:
    """A text is as many ids as it has words: their numbers. Its logits are their sum and 0."""

    max_len = 8
    device = torch.device("cpu")
    problem = PROBLEMS[SINGLE_LABEL]
    label_names = ("a", "b")

    def __init__(self, long_texts: str = "cut") -> None:
        self.long_texts = long_texts
        self.batches: list[list[int]] = []
        self.free = threading.Event()
        self.free.set()
        self.tokenizer = SimpleNamespace(
            encode_batch=lambda texts: RaggedIds.from_lists(
                [list(map(int, t.split())) for t in texts]
            )
        )

    def read(self, ids: RaggedIds) -> tuple[RaggedIds, np.ndarray | None]:
        return read(ids, self.max_len, "head", self.long_texts, SpecialTokens())

    def cut(self, ids: RaggedIds) -> RaggedIds:
        return self.read(ids)[0]

    def window_logits(self, ids: RaggedIds) -> torch.Tensor:
        self.batches.append(ids.lengths.tolist())
        assert self.free.wait(20)
        if 13 in ids.values:
            raise RuntimeError("13")
        sums = [float(ids[i].sum()) for i in range(len(ids))]
        sums = [float("nan") if s == 666 else s for s in sums]
        return torch.tensor([[s, 0.0] for s in sums])


def run(model: Model, work: Any, **limits: Any) -> Any:
    """work(batcher) in an event loop."""
    batcher = Batcher("m", model, Limits(**limits), Metrics())  # type: ignore[arg-type]

    async def main() -> Any:
        return await asyncio.wait_for(work(batcher), 20)

    try:
        return asyncio.run(main())
    finally:
        model.free.set()
        batcher.close()


def margins(answers: list[Any]) -> list[float]:
    found = [list(a.prediction.probabilities.values()) for a in answers]
    return [float(np.log(p[0] / p[1])) for p in found]


def test_answers_in_the_order_of_the_texts():
    model = Model()

    async def work(batcher):
        return await batcher.submit(["1 2", "5", ""])

    answers = run(model, work)
    assert margins(answers) == pytest.approx([3, 5, 0])
    assert [a.tokens for a in answers] == [2, 1, 0]
    assert not any(a.truncated for a in answers)
    assert model.batches == [[2, 1, 0]]


def test_no_texts_are_no_answers():
    async def work(batcher):
        return await batcher.submit([])

    assert run(Model(), work) == []


def test_what_arrives_while_the_model_computes_is_one_batch():
    model = Model()
    model.free.clear()

    async def work(batcher):
        first = asyncio.ensure_future(batcher.submit(["1"]))
        while not model.batches:
            await asyncio.sleep(0.001)
        others = [asyncio.ensure_future(batcher.submit([str(i)])) for i in range(2, 6)]
        await asyncio.sleep(0.05)
        model.free.set()
        return await asyncio.gather(first, *others)

    answers = run(model, work)
    assert [margins(a)[0] for a in answers] == pytest.approx([1, 2, 3, 4, 5])
    assert model.batches == [[1], [1, 1, 1, 1]]
    assert [a[0].batch for a in answers] == [1, 4, 4, 4, 4]


def test_requests_in_quick_succession_wait_for_one_another():
    model = Model()

    async def work(batcher):
        async def later(delay: float, text: str) -> Any:
            await asyncio.sleep(delay)
            return await batcher.submit([text])

        await asyncio.gather(later(0, "1"), later(0.001, "2"), later(0.02, "3"), later(0.04, "4"))

    run(model, work, batch_wait_ms=500.0)
    assert len(model.batches) <= 2  # the first may have gone alone: nobody had come before it
    assert sum(map(len, model.batches)) == 4


def test_who_comes_alone_does_not_wait():
    async def work(batcher):
        await batcher.submit(["1"])
        begin = time.monotonic()
        await asyncio.sleep(0.7)
        await batcher.submit(["1"])
        return time.monotonic() - begin

    assert run(Model(), work, batch_wait_ms=600.0) < 1.25


def test_a_batch_holds_so_many_tokens():
    model = Model()

    async def work(batcher):
        return await batcher.submit(["1 1 1"] * 5 + ["1 1 1 1 1 1 1"])

    answers = run(model, work, batch_tokens=7)
    assert margins(answers) == pytest.approx([3] * 5 + [7])
    assert model.batches == [[3, 3], [3, 3], [3], [7]]


def test_a_batch_on_a_cpu_holds_what_its_threads_compute_at_once(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert batching.most_tokens(torch.device("cpu")) == 384
    assert batching.most_tokens(torch.device("meta")) == 4096
    monkeypatch.setattr(batching, "most_tokens", lambda device: 7)
    model = Model()

    async def work(batcher):
        return await batcher.submit(["1 1 1", "2 2 2", "3 3"])

    run(model, work)
    assert model.batches == [[3, 3], [2]]


def test_a_text_is_read_computed_and_named_by_one_model():
    """The models are exchanged while one computes, and has read the next text already."""
    old, new = Model(), Model()
    new.label_names = ("good", "bad")
    new.tokenizer.encode_batch = lambda texts: RaggedIds.from_lists([[5]] * len(texts))
    old.free.clear()

    async def work(batcher):
        asked = asyncio.create_task(batcher.submit(["1 1", "2 2"]))
        while not old.batches:
            await asyncio.sleep(0.001)
        batcher.classifier = new
        old.free.set()
        return await asked

    first, second = run(old, work, batch_tokens=3)
    assert old.batches == [[2]] and new.batches == [[1]]
    assert first.prediction.label == "a" and margins([first]) == pytest.approx([2.0])
    assert second.prediction.label == "good" and margins([second]) == pytest.approx([5.0])
    assert second.tokens == 1


def test_long_texts_are_cut_or_read_in_windows():
    text = " ".join(["1"] * 12)

    async def work(batcher):
        return await batcher.submit([text, "3"])

    cut, short = run(Model(), work)
    assert (cut.tokens, cut.truncated, short.truncated) == (8, True, False)
    assert margins([cut, short]) == pytest.approx([8, 3])
    windows, short = run(Model("windows"), work)
    assert (windows.tokens, windows.truncated) == (12, False)
    assert margins([windows, short]) == pytest.approx([6, 3])  # the mean of two windows of six


def test_a_batch_that_fails_is_answered_and_the_next_one_computed():
    async def work(batcher):
        results = await asyncio.gather(
            batcher.submit(["13"]), batcher.submit(["1"]), return_exceptions=True
        )
        return results, await batcher.submit(["2"])

    (first, second), after = run(Model(), work, batch_tokens=1)
    assert isinstance(first, Refused) and first.status == 500 and "13" not in first.message
    assert margins(second) == pytest.approx([1])
    assert margins(after) == pytest.approx([2])


def test_an_answer_that_is_not_finite_is_the_fault_of_its_text_alone():
    async def work(batcher):
        return await asyncio.gather(
            batcher.submit(["666"]), batcher.submit(["1"]), return_exceptions=True
        )

    bad, good = run(Model(), work)
    assert isinstance(bad, Refused) and bad.status == 500
    assert margins(good) == pytest.approx([1])


def test_a_text_that_cannot_be_tokenized_fails_alone():
    async def work(batcher):
        return await asyncio.gather(
            batcher.submit(["x", "1"]), batcher.submit(["1"]), return_exceptions=True
        )

    bad, good = run(Model(), work)
    assert isinstance(bad, Refused) and bad.status == 500
    assert margins(good) == pytest.approx([1])


@pytest.mark.parametrize(
    ("limits", "match"),
    [({"queue_texts": 3}, "at most 3 may"), ({"queue_characters": 5}, "characters are waiting")],
)
def test_a_full_queue_refuses(limits, match):
    model = Model()
    model.free.clear()

    async def work(batcher):
        waiting = [asyncio.ensure_future(batcher.submit(["1"]))]
        while not model.batches:
            await asyncio.sleep(0.001)
        waiting += [asyncio.ensure_future(batcher.submit(["2"])) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Refused, match=match) as refused:
            await batcher.submit(["3 3"])
        model.free.set()
        await asyncio.gather(*waiting)
        assert margins(await batcher.submit(["4"])) == pytest.approx([4])
        return refused.value

    error = run(model, work, **limits)
    assert error.status == 429 and error.retry_after >= 1


def test_a_text_does_not_wait_for_ever():
    model = Model()
    model.free.clear()

    async def work(batcher):
        first = asyncio.ensure_future(batcher.submit(["1"]))
        while not model.batches:
            await asyncio.sleep(0.001)
        second = asyncio.ensure_future(batcher.submit(["2"]))
        await asyncio.sleep(0.1)
        model.free.set()
        with pytest.raises(Refused, match="waited 0.1 s; at most 0.05 s") as refused:
            await second
        assert margins(await first) == pytest.approx([1])
        return refused.value

    assert run(model, work, queue_seconds=0.05).status == 429
    assert model.batches == [[1]]


def test_a_client_that_left_is_not_computed():
    model = Model()
    model.free.clear()

    async def work(batcher):
        first = asyncio.ensure_future(batcher.submit(["1"]))
        while not model.batches:
            await asyncio.sleep(0.001)
        gone = asyncio.ensure_future(batcher.submit(["2"]))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0)
        model.free.set()
        await first
        return await batcher.submit(["3"])

    assert margins(run(model, work)) == pytest.approx([3])
    assert model.batches == [[1], [1]]


def test_what_waits_is_answered_at_the_end():
    model = Model()

    async def work(batcher):
        waiting = [asyncio.ensure_future(batcher.submit([str(i)])) for i in range(12)]
        await asyncio.sleep(0)
        await asyncio.to_thread(batcher.close)
        assert batcher.idle
        return await asyncio.gather(*waiting)

    answers = run(model, work, batch_tokens=3)
    assert [margins(a)[0] for a in answers] == pytest.approx(list(range(12)))


def test_limits_that_nothing_can_keep_are_refused():
    from fasttx.errors import ConfigError

    for name, value in (("texts", 0), ("queue_seconds", 0.0), ("batch_wait_ms", float("inf"))):
        with pytest.raises(ConfigError, match=name):
            Limits(**{name: value})
    Limits(batch_wait_ms=0.0)
