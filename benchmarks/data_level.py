"""The questions before the model: text to ids, and ids to a batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contest import Contest, require
from model_peers import missing
from torch.nn.utils.rnn import pad_sequence
from workload import Setting, reviews

from fasttx.text import demo
from fasttx.text.packing import pack
from fasttx.text.tokenizer import Tokenizer

CPU = torch.device("cpu")


class Work:
    """A contestant from two functions: `make` gives the step, `outcome` its ids to be compared."""

    def __init__(self, name: str, make: Callable[[], Any], outcome: Any, expected: Any, note: str):
        self.name, self.make, self.outcome, self.expected = name, make, outcome, expected
        self.note = note

    def prepare(self) -> None:
        self.work = self.make()

    def verify(self) -> None:
        assert self.outcome(self.work(0)) == self.expected(0), f"{self.name}: other ids"

    def step(self, i: int) -> object:
        return self.work(i)


TOKENISERS = ("tokenizers", "fasttx")


def tokenising(setting: Setting, count: int) -> Contest:
    """`count` texts a step, from str to ids of the same vocabulary. `tokenizers` is Rust."""
    texts = setting.of(count)
    if setting.data:
        corpus, what = reviews(setting.data, 2 * texts), "real reviews"
    else:
        corpus, what = demo.corpus(train=2 * texts, test=0)[0], "the demo corpus"
    inputs = [corpus[:texts], corpus[texts:]]
    tokenizer = Tokenizer.train(corpus, setting.config.vocab_size)

    def expected(i: int) -> list[list[int]]:
        return [tokenizer.encode(text) for text in inputs[i]]

    def fasttx() -> Any:
        return lambda i: tokenizer.encode_batch(inputs[i])

    def rust() -> Any:
        require(missing("tokenizers", "tokenizers"))
        from tokenizers import Tokenizer as RustTokenizer

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.json"
            tokenizer.save(path)
            loaded = RustTokenizer.from_file(str(path))
        loaded.no_padding()
        return lambda i: loaded.encode_batch_fast(inputs[i])

    entrants = {
        "tokenizers": Work("tokenizers", rust, lambda o: [e.ids for e in o], expected,
                           "in Rust"),
        "fasttx": Work("fasttx", fasttx, lambda o: [x.tolist() for x in o], expected, ""),
    }  # fmt: skip
    title = f"tokenise {texts} texts, {what}"
    facts = {"level": "tokenise", "texts": texts, "lengths": what}
    return Contest(title, CPU, 2, texts, entrants, facts=facts)


BATCHERS = ("pad_sequence", "fasttx")


def batching(setting: Setting, batch_size: int, *, inputs: int = 8) -> Contest:
    """Token ids of random texts to one batch: padded by torch, packed by fasttx."""
    size = setting.of(batch_size)
    ids, what = setting.texts(inputs * size)
    chosen = np.random.default_rng(2).permutation(len(ids)).reshape(inputs, size)
    texts = [torch.from_numpy(ids[i].astype(np.int64)) for i in range(len(ids))]

    def expected(i: int) -> list[int]:
        return np.concatenate([ids[j] for j in chosen[i]]).tolist()

    entrants = {
        "pad_sequence": Work(
            "pad_sequence",
            lambda: lambda i: pad_sequence([texts[j] for j in chosen[i]], batch_first=True),
            lambda batch: batch[batch != 0].tolist(), expected, "padded",
        ),
        "fasttx": Work(
            "fasttx", lambda: lambda i: pack(ids.select(chosen[i])),
            lambda batch: batch.input_ids.tolist(), expected, "packed",
        ),
    }  # fmt: skip
    facts = {"level": "batch", "batch": size, "lengths": what}
    title = f"lay out a batch of {size}, {what}"
    return Contest(title, CPU, inputs, size, entrants, facts=facts)
