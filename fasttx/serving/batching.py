"""Texts that wait for the same model become one packed batch.

A batch is closed when it holds enough tokens, or when nobody else came for a few milliseconds.
What arrives while the model computes waits for the next one. Nothing is padded, so a batch costs
what its tokens cost, whatever their lengths.

One thread a model tokenizes and computes. The event loop hands texts over and takes answers; it
never waits for the model.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fasttx.load import TextClassifier
from fasttx.serving.limits import Limits, Refused
from fasttx.serving.metrics import Metrics
from fasttx.terminal import decoded
from fasttx.text.packing import RaggedIds
from fasttx.text.reading import mean_of_windows
from fasttx.training.problems import AnyPrediction

log = logging.getLogger("fasttx.serving")


@dataclass(frozen=True)
class Answer:
    """Of one text: what the model says, and what was read of it."""

    prediction: AnyPrediction
    tokens: int
    truncated: bool
    waited: float  # seconds in the queue
    batch: int  # texts in its batch


@dataclass(eq=False)
class _Request:
    texts: Sequence[str]
    arrived: float
    future: asyncio.Future[list[Answer]]
    answers: list[Answer | None]
    left: int
    failed: bool = False


@dataclass(eq=False)
class _Item:
    """One text of a request; `ids` are its windows, once `reader` has tokenized it."""

    request: _Request
    index: int
    characters: int
    reader: TextClassifier | None = None
    ids: RaggedIds | None = None
    read: int = 0  # tokens, special ones among them
    is_cut: bool = False
    waited: float = field(default=0.0)


def most_tokens(device: torch.device) -> int:
    """How many tokens a batch holds at most, by default.

    On a CPU a batch of more than about 64 tokens a thread takes longer in proportion, so a larger
    one adds only the wait for it. An accelerator has to be filled.
    """
    return 128 * torch.get_num_threads() if device.type == "cpu" else 4096


class Batcher:
    """The queue of one model and the thread that empties it. `classifier` may be exchanged: one
    batch is tokenized, computed and named by one classifier."""

    def __init__(
        self, name: str, classifier: TextClassifier, limits: Limits, metrics: Metrics
    ) -> None:
        self.name, self.classifier, self.limits = name, classifier, limits
        self._metrics = metrics
        self._queue: deque[_Item] = deque()
        self._characters = 0
        self._changed = threading.Condition()
        self._held: _Item | None = None  # did not fit the last batch
        self._ending = False
        self._busy = False
        self._last_arrival = -1.0
        self._gap = 1.0  # between the last two arrivals
        self._seconds_a_text = 0.005  # of late: for Retry-After
        self._thread = threading.Thread(target=self._run, name=f"model {name}", daemon=True)
        self._thread.start()

    # --- the event loop's side --------------------------------------------------------------------

    async def submit(self, texts: Sequence[str]) -> list[Answer]:
        """One answer a text. Raises Refused where the queue is full, or the wait was too long."""
        if not texts:
            return []
        now = time.monotonic()
        characters = [len(text) for text in texts]
        future: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()
        request = _Request(texts, now, future, [None] * len(texts), len(texts))
        with self._changed:
            self._refuse_if_full(len(texts), sum(characters))
            self._gap = now - self._last_arrival
            self._last_arrival = now
            self._queue.extend(_Item(request, i, n) for i, n in enumerate(characters))
            self._characters += sum(characters)
            self._changed.notify()
        return await future

    def _refuse_if_full(self, texts: int, characters: int) -> None:
        waiting, limits = len(self._queue), self.limits
        full = None
        if waiting + texts > limits.queue_texts:
            full = f"{waiting:,} texts are waiting; at most {limits.queue_texts:,} may"
        elif self._characters + characters > limits.queue_characters:
            full = f"{self._characters:,} characters are waiting; at most "
            full += f"{limits.queue_characters:,} may"
        if full:
            wait = waiting * self._seconds_a_text
            raise Refused(429, f"too many requests: {full}. Send this one again later", wait)

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is being computed."""
        with self._changed:
            return not (self._queue or self._held or self._busy)

    def close(self) -> None:
        """What waits is answered; then the thread ends."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()

    # --- the model's thread -----------------------------------------------------------------------

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                classifier, batch = self._next_batch()
                if not batch:
                    break
                self._compute(classifier, batch)
                with self._changed:
                    self._busy = False

    def _next_batch(self) -> tuple[TextClassifier, list[_Item]]:
        """The texts to compute next, and by whom; no text at the end."""
        batch: list[_Item] = []
        tokens, closing = 0, None
        classifier = self.classifier
        most = self.limits.batch_tokens or most_tokens(classifier.device)
        while tokens < most:
            item = self._next_item(closing)
            if item is None:
                break
            if not batch:  # the wait for the first text may have been long
                classifier = self.classifier
            if not self._tokenize(classifier, item):
                continue
            if batch and tokens + item.read > most:
                self._held = item
                break
            batch.append(item)
            tokens += item.read
            if closing is None:
                closing = item.request.arrived + self.limits.batch_wait_ms / 1e3
        return classifier, batch

    def _next_item(self, closing: float | None) -> _Item | None:
        """The next text; None where none comes until `closing`, or at the end."""
        if self._held is not None:
            item, self._held = self._held, None
            return item
        with self._changed:
            while not self._queue:
                if self._ending:
                    return None
                if closing is None:
                    self._changed.wait()
                    continue
                left = closing - time.monotonic()
                # Who comes alone would wait for nobody.
                if left <= 0 or self._gap * 1e3 > self.limits.batch_wait_ms:
                    return None
                self._changed.wait(left)
            self._busy = True
            item = self._queue.popleft()
            self._characters -= item.characters
            self._metrics.waiting.labels(self.name).set(len(self._queue))
            return item

    def _tokenize(self, classifier: TextClassifier, item: _Item) -> bool:
        """Whether it is to be computed: its client may be gone, or have waited too long."""
        request = item.request
        if item.reader is classifier:
            return True
        if request.failed or request.future.cancelled():
            return False
        item.waited = time.monotonic() - request.arrived
        if item.waited > self.limits.queue_seconds:
            message = (
                f"this request waited {item.waited:.1f} s; at most {self.limits.queue_seconds:g} s "
                "are allowed. Send it again later"
            )
            self._fail([request], Refused(429, message, self.waiting * self._seconds_a_text))
            return False
        try:
            ids = classifier.tokenizer.encode_batch([decoded(request.texts[item.index])])
            item.ids, _ = classifier.read(ids)
            item.is_cut = len(classifier.cut(ids).values) < len(ids.values)
        except Exception:
            log.exception("model %s: a text could not be tokenized", self.name)
            self._fail([request], _FAILURE)
            return False
        item.reader, item.read = classifier, int(item.ids.lengths.sum())
        return True

    def _compute(self, classifier: TextClassifier, batch: list[_Item]) -> None:
        begin = time.monotonic()
        try:
            answers = _answers(classifier, batch)
        except Exception:
            log.exception("model %s: a batch of %d texts failed", self.name, len(batch))
            self._metrics.failed_batches.labels(self.name).inc()
            self._fail([item.request for item in batch], _FAILURE)
            return
        seconds = time.monotonic() - begin
        self._seconds_a_text += 0.1 * (seconds / len(batch) - self._seconds_a_text)
        self._count(batch, seconds)
        done: dict[_Request, list[tuple[int, Answer | None]]] = {}
        for item, answer in zip(batch, answers, strict=True):
            done.setdefault(item.request, []).append((item.index, answer))
        self._in_loop(batch[0].request, _deliver, done)

    def _count(self, batch: list[_Item], seconds: float) -> None:
        metrics, name = self._metrics, self.name
        metrics.texts.labels(name).inc(len(batch))
        metrics.tokens.labels(name).inc(sum(item.read for item in batch))
        metrics.batch_texts.labels(name).observe(len(batch))
        metrics.batch_seconds.labels(name).observe(seconds)
        metrics.queue_seconds.labels(name).observe(max(item.waited for item in batch))
        if cut := sum(item.is_cut for item in batch):
            metrics.truncated.labels(name).inc(cut)

    def _fail(self, requests: Sequence[_Request], error: Refused) -> None:
        for request in requests:
            request.failed = True
        self._in_loop(requests[0], _refuse, requests, error)

    def _in_loop(self, request: _Request, function: Callable[..., None], *arguments: Any) -> None:
        try:
            request.future.get_loop().call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has ended, and nobody waits any more
            log.debug("model %s: an answer came too late", self.name)


def _answers(classifier: TextClassifier, batch: list[_Item]) -> list[Answer | None]:
    """None for a text whose answer is not finite."""
    parts, owners = [], []
    for text, item in enumerate(batch):
        assert item.ids is not None
        parts.append(item.ids)
        owners.append(np.full(len(item.ids), text))
    logits = classifier.window_logits(RaggedIds.concatenate(parts))
    rows = mean_of_windows(logits, np.concatenate(owners)).double()
    scores = classifier.problem.scores(rows).tolist()
    finite = rows.isfinite().all(-1).tolist()

    def answer(item: _Item, row: list[float]) -> Answer:
        said = classifier.problem.prediction(classifier.label_names, row)
        return Answer(said, item.read, item.is_cut, item.waited, len(batch))

    return [
        answer(item, row) if is_finite else None
        for item, row, is_finite in zip(batch, scores, finite, strict=True)
    ]


_FAILURE = Refused(500, "the model failed on this request; the server's log says why")


def _deliver(done: dict[_Request, list[tuple[int, Answer | None]]]) -> None:
    for request, answers in done.items():
        for index, answer in answers:
            request.answers[index] = answer
            request.left -= 1
            request.failed |= answer is None
        if request.failed:
            _refuse([request], _FAILURE)
        elif not request.left and not request.future.done():
            request.future.set_result([a for a in request.answers if a is not None])


def _refuse(requests: Sequence[_Request], error: Refused) -> None:
    for request in requests:
        if not request.future.done():
            request.future.set_exception(error)
