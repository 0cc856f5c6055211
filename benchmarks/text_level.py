"""The question of a user: texts in, labels out, the tokenizer's time included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import native
import numpy as np
import torch
from contest import Contest, Contestant, Expected, require, verified_texts
from engine_peers import ENGINES
from model_level import Model
from model_peers import PEERS, Peer
from torch import Tensor
from workload import Setting, make_batches, padded

from fasttx import device as devices
from fasttx.text.reading import by_length
from fasttx.text.tokenizer import Tokenizer

# A peer has fasttx' tokenizer in front. Others of model_peers are slower in model_level's contest.
TEXT_PEERS = {name: PEERS[name] for name in ("nn.TransformerEncoder", "padded-sdpa")} | ENGINES
LABELS = ("a", "b")


class Texts:
    """What the contestants share: the texts of each input, the tokenizer, the model's weights.

    In fp32, unless a contestant's name says otherwise.
    """

    def __init__(
        self, setting: Setting, inputs: list[list[str]], tokenizer: Tokenizer, batch_size: int
    ) -> None:
        self.setting = setting = replace(setting, precision="fp32")
        devices.set_precision(setting.device, "fp32")
        self.inputs, self.tokenizer, self.batch_size = inputs, tokenizer, batch_size
        ids = tokenizer.encode_batch(inputs[0]).truncate(setting.config.max_len)
        count = verified_texts(ids.lengths.tolist())
        self.verified = inputs[0][:count]
        batch = make_batches(ids.select(np.arange(count)), count, setting.device)
        self.model = Model(setting, [batch], training=False)

    @classmethod
    def one_by_one(cls, setting: Setting, counts: Sequence[int]) -> Texts:
        """A text of each number of words, which are tokens."""
        words = [f"w{i}" for i in np.random.default_rng(0).integers(0, 1000, max(counts))]
        tokenizer = Tokenizer.train([" ".join(words)], setting.config.vocab_size)
        return cls(setting, [[" ".join(words[:n])] for n in counts], tokenizer, 1)

    def expected(self, tolerance: float) -> Expected:
        exact = self.model.expected_of(self.model.reference, tolerance).measures["logits"].exact
        return Expected.within({"scores": _centred(exact["logits"])}, tolerance)


def _centred(logits: Tensor) -> Tensor:
    """Logits up to what a softmax leaves out."""
    return logits - logits.mean(-1, keepdim=True)


class _Contestant:
    note = ""
    tolerance = 1e-4

    def __init__(self, name: str, work: Texts) -> None:
        self.name, self.work = name, work

    def probabilities(self, texts: Sequence[str]) -> list[list[float]]:
        """Of each label, by text."""
        raise NotImplementedError

    def verify(self) -> None:
        found = torch.tensor(self.probabilities(self.work.verified), dtype=torch.float64)
        self.work.expected(self.tolerance).check(self.name, {"scores": _centred(found.log())})

    def step(self, i: int) -> list[str]:
        return [LABELS[int(np.argmax(p))] for p in self.probabilities(self.work.inputs[i])]


class PeerTexts(_Contestant):
    """Batches of like length, padded to their longest text."""

    def __init__(self, name: str, work: Texts, peer: type[Peer]) -> None:
        super().__init__(name, work)
        self.peer, self.note = peer, peer.note
        self.tolerance = peer.tolerance or self.tolerance

    def prepare(self) -> None:
        setting = self.work.setting
        require(self.peer.unavailable_reasons(setting))
        self.model = self.peer(setting.config).to(setting.device).eval()
        self.model.copy_from(self.work.model.reference)

    @torch.inference_mode()
    def probabilities(self, texts: Sequence[str]) -> list[list[float]]:
        work = self.work
        ids = work.tokenizer.encode_batch(texts).truncate(work.setting.config.max_len)
        order = list(by_length(ids, work.batch_size))
        device = work.setting.device
        batches = [make_batches(ids.select(i), len(i), device)[0] for i in order]
        answers = self.model.answer_all([padded(batch) for batch in batches])
        found = torch.empty(len(texts), len(LABELS))
        for indices, logits in zip(order, answers, strict=True):
            found[torch.from_numpy(indices)] = logits.softmax(-1).cpu()
        return found.tolist()


class OurTexts(_Contestant):
    """`predict` of what `fasttx.load` returns."""

    def __init__(self, name: str, work: Texts, precision: str) -> None:
        super().__init__(name, work)
        self.precision = precision
        self.tolerance = max(self.tolerance, native.TOLERANCES[precision])

    def prepare(self) -> None:
        work = self.work
        model = work.model.build("auto")
        model.load_state_dict(work.model.reference.state_dict())
        self.classifier = native.predictor(model, work.tokenizer, LABELS, self.precision)

    def probabilities(self, texts: Sequence[str]) -> list[list[float]]:
        found = self.classifier.predict(texts, batch_size=self.work.batch_size)
        return [[p.probabilities[label] for label in LABELS] for p in found]


OURS = {f"fasttx-{precision}": precision for precision in native.TOLERANCES}


def names() -> list[str]:
    return [*TEXT_PEERS, *OURS]


def entrants(work: Texts) -> dict[str, Contestant]:
    theirs = {name: PeerTexts(name, work, peer) for name, peer in TEXT_PEERS.items()}
    return theirs | {name: OurTexts(name, work, precision) for name, precision in OURS.items()}


def bulk(setting: Setting, batch_size: int, *, inputs: int = 4) -> Contest:
    """As many texts at a time as in `model_level.bulk`."""
    size, count = setting.of(batch_size), setting.of(4 * batch_size)
    texts, tokenizer, what = setting.raw_texts(inputs * count)
    groups = [texts[i : i + count] for i in range(0, len(texts), count)]
    work = Texts(setting, groups, tokenizer, size)
    title = f"text in, label out, {count} texts in batches of {size} sorted by length, {what}"
    facts = {"level": "text", "batch": size, "lengths": what, "precision": "fp32"}
    return Contest(title, setting.device, inputs, count, entrants(work), facts=facts)
