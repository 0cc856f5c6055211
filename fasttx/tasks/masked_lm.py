"""Pretraining: a masked language model on texts without labels. What `fasttx pretrain` trains."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasttx import device as devices
from fasttx.config import ModelConfig, PretrainConfig, TrainConfig
from fasttx.errors import DataError
from fasttx.models.masked_lm import MaskedLanguageModel, mask_words
from fasttx.tasks.encoder import EncoderTask, machine_text, optimizer_text, size_text
from fasttx.text import duplicates
from fasttx.text import splits as data
from fasttx.text.packing import PackedBatch, pack
from fasttx.text.pieces import AnyTokenizer
from fasttx.text.reading import by_length, read
from fasttx.text.token_cache import encode_cached
from fasttx.training.checkpoint import Progress
from fasttx.training.results import common
from fasttx.training.task import Examples, Run, Splits, TaskData

HELD_OUT = 1000  # texts, at most, on which the masked accuracy of an epoch is measured
_HELD_OUT_STREAM, _MASK_STREAM = 4, 2


class MaskedLM(EncoderTask):
    name = "pretraining"
    command = "fasttx pretrain"
    unit = "windows"

    def load(self, config: TrainConfig) -> TaskData:
        """Texts to train on and texts held out, drawn from the seed."""
        assert isinstance(config, PretrainConfig)
        texts, notes = data.load_texts(
            config.dataset,
            text_column=config.text_column,
            label_column=config.label_column,
            unlabelled=config.unlabelled,
            problem_type=config.problem_type,
        )
        order = np.random.default_rng([config.seed, _HELD_OUT_STREAM]).permutation(len(texts))
        size = min(HELD_OUT, len(texts) // 10)
        if not size:
            raise DataError(f"{config.dataset} has {len(texts)} texts; expected at least 10")
        if n := config.train_samples:
            data.check_enough("train_samples", n, len(texts) - size, config.dataset)
            order = order[: size + n]
        kept = [texts[i] for i in order.tolist()]
        held_out, train = kept[:size], kept[size:]
        described = {
            "name": Path(config.dataset).name,
            **data.version(config.dataset),
            "texts": len(train),
            "held_out": len(held_out),
            "duplicates": duplicates.count({"train": train, "held_out": held_out}),
            "fingerprint": data.texts_fingerprint([*train, *held_out]),
        }
        examples = functools.partial(_examples, train, held_out)
        return TaskData(train, (), described, notes, examples)

    def model(self, config: ModelConfig) -> nn.Module:
        return MaskedLanguageModel(config)

    def heading(self, run: Run, model: nn.Module) -> list[str]:
        t, train, dataset = _settings(run), run.splits.train, run.config.dataset
        windows = f"{len(train):,} windows of at most {t.model.max_len}"
        words = f"{int(train.ids.lengths.sum()):,} words in {windows}"
        held_out = f"{dataset['held_out']:,} held out"
        how = f"{t.mask_share:.0%} of the words hidden, {optimizer_text(t)}"
        lines = (
            f"run        {run.folder.path}  (pretraining, seed {t.seed})",
            f"texts      {dataset['texts']:,} of {dataset['name']}: {words}; {held_out}",
            f"model      {size_text(t.model)}",
            f"attention  {run.config.attn_backend} on {machine_text(run)}",
            f"training   {t.epochs} epochs, batches of {t.batch_size} windows, {how}",
        )
        repeated = duplicates.duplicates_text(dataset)
        note = "Below, a sample is a window, and accuracy the share of hidden words that are named"
        return ["\n".join([*lines, f"{note} right."]), *([repeated] if repeated else [])]

    def batch(
        self, run: Run, examples: Examples, indices: np.ndarray, stream: tuple[int, ...]
    ) -> PackedBatch:
        config = _settings(run)
        vocab, stream = config.model.vocab_size, (*stream, _MASK_STREAM)
        ids, rows, words = mask_words(
            examples.ids.select(indices), config.mask_share, vocab, stream, run.splits.special
        )
        multiple = devices.token_multiple(run.device, config.precision)
        if multiple > 1:  # few sizes here too: up to 31 of the hidden words are not asked for
            asked = len(rows) // 32 * 32 or len(rows)
            rows, words = rows[:asked], words[:asked]
        batch = pack(ids, words, token_multiple=multiple)
        return replace(batch, rows=torch.from_numpy(rows))

    def loss(
        self, run: Run, model: Any, batch: PackedBatch, seed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        with devices.autocast(run.device, run.config.train.precision):
            return model(**batch.model_inputs(), labels=batch.labels, seed=seed)

    @torch.inference_mode()
    def measure(self, run: Run, model: nn.Module, examples: Examples) -> tuple[float, float]:
        """Mean loss and accuracy over the hidden words of `examples`, the same ones every time."""
        model.eval()
        config, processes = run.config.train, run.processes
        totals = torch.zeros(3, dtype=torch.float64)
        share = processes.share(np.arange(len(examples)))
        for number, at in enumerate(by_length(examples.ids.select(share), config.batch_size)):
            stream = (config.seed, processes.rank, number)
            batch = self.batch(run, examples, share[at], stream).to(run.device)
            assert batch.labels is not None
            loss, correct = self.loss(run, model, batch)
            totals += torch.tensor([loss.item(), correct.item(), len(batch.labels)])
        loss_sum, right, count = processes.sum(totals).tolist()
        return loss_sum / max(1, count), right / max(1, count)

    def results(self, run: Run, model: nn.Module, progress: Progress) -> dict[str, Any]:
        best = progress.best
        assert best is not None
        return {
            "masked_loss": best["val_loss"],
            "masked_accuracy": best["val_accuracy"],
            "perplexity": math.exp(best["val_loss"]),
            "attn_backend": run.config.attn_backend,
            **common(run, model, progress),
        }

    def closing(self, run: Run, results: dict[str, Any]) -> str:
        return (
            f"masked accuracy {results['masked_accuracy']:.2%}, perplexity "
            f"{results['perplexity']:.1f} on held-out texts (epoch {results['best_epoch']})\n"
            f"{run.folder.results}; next: python train.py --init-from {run.folder.path}"
        )


TASK = MaskedLM()


def _settings(run: Run) -> PretrainConfig:
    assert isinstance(run.config.train, PretrainConfig)
    return run.config.train


def _examples(
    train: list[str], held_out: list[str], config: TrainConfig, tokenizer: AnyTokenizer
) -> Splits:
    """Every text in windows; a window's label is not used, for its words are its labels."""

    def windows(texts: list[str]) -> Examples:
        ids = encode_cached(tokenizer, texts)
        ids = ids.select(np.flatnonzero(ids.lengths))
        pieces, _ = read(ids, config.model.max_len, "head", "windows", tokenizer.special)
        return Examples(pieces, np.zeros(len(pieces), dtype=np.int64))

    return Splits(windows(train), windows(held_out), special=tokenizer.special)
