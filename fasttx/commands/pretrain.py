"""`fasttx pretrain`: a masked language model on texts alone, for train.py --init-from."""

from __future__ import annotations

import argparse
import functools
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttx import device as devices
from fasttx.commands import flags
from fasttx.config import PRETRAIN, ModelConfig, PretrainConfig
from fasttx.errors import CheckpointError, DataError
from fasttx.files import write_json_atomic
from fasttx.load import by_length
from fasttx.models.masked_lm import MaskedLanguageModel, mask_words
from fasttx.ops import registry
from fasttx.text import splits as data
from fasttx.text.packing import PackedBatch, pack
from fasttx.text.token_cache import encode_cached
from fasttx.text.tokenizer import Tokenizer
from fasttx.training import distributed
from fasttx.training import progress as report
from fasttx.training import run as runs
from fasttx.training.checkpoint import PRETRAINING, Progress, RunConfig, RunFolder
from fasttx.training.trainer import Examples, Interrupted, Trainer

log = logging.getLogger("fasttx")

# Settings of a classifier's training that say nothing here.
WITHOUT = (
    "test_samples", "subset_order", "allow_single_class", "truncation", "long_texts",
    "label_smoothing", "word_dropout", "init_from", "pseudo_labels",
    "split_seed",
)  # fmt: skip
HELD_OUT = 1000  # texts, at most, on which the masked accuracy of an epoch is measured
_HELD_OUT_STREAM, _MASK_STREAM = 4, 2


class MaskedTrainer(Trainer):
    """The training loop of the classifiers, on hidden words."""

    config: PretrainConfig

    def batch(
        self, examples: Examples, indices: np.ndarray, stream: tuple[int, ...]
    ) -> PackedBatch:
        vocab = self.config.model.vocab_size
        ids, rows, words = mask_words(
            examples.ids.select(indices), self.config.mask_share, vocab, (*stream, _MASK_STREAM)
        )
        multiple = devices.token_multiple(self.device, self.config.precision)
        if multiple > 1:  # few sizes here too: up to 31 of the hidden words are not asked for
            asked = len(rows) // 32 * 32 or len(rows)
            rows, words = rows[:asked], words[:asked]
        batch = pack(ids, words, token_multiple=multiple)
        return replace(batch, rows=torch.from_numpy(rows))

    def loss(self, model: Any, batch: PackedBatch, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        with devices.autocast(self.device, self.config.precision):
            return model(**batch.model_inputs(), labels=batch.labels, **inputs)

    @torch.inference_mode()
    def measure(self, examples: Examples) -> tuple[float, float]:
        """Mean loss and accuracy over the hidden words of `examples`, the same ones every time."""
        self.model.eval()
        totals = torch.zeros(3, dtype=torch.float64)
        share = self.processes.share(np.arange(len(examples)))
        for number, at in enumerate(by_length(examples.ids.select(share), self.config.batch_size)):
            stream = (self.config.seed, self.processes.rank, number)
            batch = self.batch(examples, share[at], stream).to(self.device)
            assert batch.labels is not None
            loss, correct = self.loss(self.model, batch)
            totals += torch.tensor([loss.item(), correct.item(), len(batch.labels)])
        loss_sum, correct, count = self.processes.sum(totals).tolist()
        return loss_sum / max(1, count), correct / max(1, count)


def _splits(config: PretrainConfig) -> tuple[list[str], list[str], list[str]]:
    """Texts to train on, texts held out, and notes. Pure functions of the seed."""
    texts, notes = data.load_texts(
        config.dataset, text_column=config.text_column, label_column=config.label_column,
        unlabelled=config.unlabelled,
    )  # fmt: skip
    order = np.random.default_rng([config.seed, _HELD_OUT_STREAM]).permutation(len(texts))
    held_out = min(HELD_OUT, len(texts) // 10)
    if not held_out:
        raise DataError(f"{config.dataset} has {len(texts)} texts; expected at least 10")
    if n := config.train_samples:
        data.check_enough("train_samples", n, len(texts) - held_out, config.dataset)
        order = order[: held_out + n]
    kept = [texts[i] for i in order.tolist()]
    return kept[held_out:], kept[:held_out], notes


def _windows(tokenizer: Tokenizer, texts: list[str], max_len: int) -> Examples:
    ids = encode_cached(tokenizer, texts)
    pieces, _ = ids.select(np.flatnonzero(ids.lengths)).windows(max_len)
    return Examples(pieces, np.zeros(len(pieces), dtype=np.int64))


@dataclass(frozen=True)
class _Open:
    folder: RunFolder
    run: RunConfig
    device: torch.device
    train: Examples
    validation: Examples


def _create(config: PretrainConfig, out: Path | None, processes: distributed.Processes) -> _Open:
    source = data.resolve(config.dataset)
    config = replace(config, dataset=source.name)
    train, held_out, notes = _splits(config)
    for note in (*source.notes, *notes):
        log.info("%s", note)
    folder = runs.new_folder(out, "pretrain", processes)
    device = runs.open_device(config.device, config.precision, processes)
    m = config.model
    backend = registry.resolve_name(m.attn_backend, device, torch.float32, m.d_model // m.num_heads)
    tokenizer = Tokenizer.train(train, m.vocab_size)
    described = {
        "name": Path(source.name).name, "texts": len(train), "held_out": len(held_out),
        "fingerprint": data.texts_fingerprint([*train, *held_out]),
    }  # fmt: skip
    run = RunConfig(config, backend, device.type, (), described, "pretrain")
    processes.barrier()
    if processes.main:
        folder.path.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder.tokenizer)
        run.save(folder.config)
    splits = (_windows(tokenizer, texts, m.max_len) for texts in (train, held_out))
    return _Open(folder, run, device, *splits)


def _resume(path: Path, processes: distributed.Processes) -> _Open | None:
    folder = RunFolder(path)
    run = RunConfig.load(folder.config, PRETRAINING)
    if folder.results.exists():
        log.info("%s is finished: its results are in %s", folder.path, folder.results)
        return None
    config = run.train
    assert isinstance(config, PretrainConfig)
    train, held_out, _ = _splits(config)
    found = data.texts_fingerprint([*train, *held_out])
    if found != run.dataset["fingerprint"]:
        raise CheckpointError(
            f"{folder.config} was made with other texts: {config.dataset!r} has changed "
            f"(fingerprint {found[:12]}, expected {run.dataset['fingerprint'][:12]}). Bring the "
            "texts back, or start a new run"
        )
    tokenizer = Tokenizer.load(folder.tokenizer)
    splits = (_windows(tokenizer, texts, config.model.max_len) for texts in (train, held_out))
    device = runs.open_device(run.device, config.precision, processes)
    return _Open(folder, run, device, *splits)


def _heading(opened: _Open) -> str:
    run, t, m = opened.run, opened.run.train, opened.run.train.model
    assert isinstance(t, PretrainConfig)
    tokens = int(opened.train.ids.lengths.sum())
    return f"""\
run        {opened.folder.path}  (pretraining, seed {t.seed})
texts      {run.dataset["texts"]:,} of {run.dataset["name"]}: {tokens:,} words in \
{len(opened.train):,} windows of at most {m.max_len}; {run.dataset["held_out"]:,} held out
model      {report.model_size(m)}
attention  {run.attn_backend} on {opened.device}, {t.precision}, {torch.get_num_threads()} threads
training   {t.epochs} epochs, batches of {t.batch_size} windows, {t.mask_share:.0%} of the words \
hidden, {t.optimizer} at {t.lr:g} ({t.schedule})
Below, a sample is a window, and accuracy the share of hidden words that are named right."""


def _results(opened: _Open, progress: Progress, parameters: int) -> dict[str, Any]:
    best, run = progress.best or {}, opened.run
    return {
        "masked_loss": best["val_loss"],
        "masked_accuracy": best["val_accuracy"],
        "perplexity": math.exp(best["val_loss"]),
        "best_epoch": best["epoch"],
        "samples_per_second": progress.samples / progress.seconds,
        "seconds": progress.seconds,
        "peak_memory_mb": devices.peak_memory_mb(opened.device),
        "parameters": parameters,
        "attn_backend": run.attn_backend,
        "precision": run.train.precision,
        "seed": run.train.seed,
        "dataset": run.dataset,
        "history": progress.history,
        "config": run.train.to_dict(),
        "versions": devices.versions(),
        "hardware": devices.hardware(opened.device),
    }


def _train(opened: _Open, processes: distributed.Processes) -> int:
    config = opened.run.train
    log.info("%s", _heading(opened))
    torch.manual_seed(config.seed)
    model = MaskedLanguageModel(replace(config.model, attn_backend=opened.run.attn_backend)).to(
        opened.device
    )
    trainer = MaskedTrainer(model, opened.run, opened.folder, opened.device, processes)
    try:
        progress = runs.fit(
            trainer, opened.train, opened.validation, quiet=not processes.main, unit="windows"
        )
    except Interrupted:
        log.info("stopped and saved; go on with: fasttx pretrain --resume %s", opened.folder.path)
        return 130
    if processes.main:
        results = _results(opened, progress, sum(p.numel() for p in model.parameters()))
        write_json_atomic(opened.folder.results, results)
        log.info(
            "masked accuracy %.2f%%, perplexity %.1f on held-out texts (epoch %d)\n"
            "%s; next: python train.py --init-from %s",
            100 * results["masked_accuracy"], results["perplexity"], results["best_epoch"],
            opened.folder.results, opened.folder.path,
        )  # fmt: skip
    return 0


def _command(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    values = {k: v for k, v in vars(args).items() if k != "run_command"}
    flags.refuse_beside_resume(parser, values)
    resume, out = values.pop("resume"), values.pop("out")
    settings, model = flags.split(values)
    processes = distributed.start()
    try:
        with report.console(logging.INFO if processes.main else logging.ERROR):
            config = replace(PRETRAIN, model=replace(PRETRAIN.model, **model), **settings)
            opened = _resume(resume, processes) if resume else _create(config, out, processes)
            if opened is None:
                return 0
            with report.log_file(opened.folder.log, processes.main):
                return _train(opened, processes)
    finally:
        distributed.stop(processes)


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "pretrain",
        help="learn from texts without labels; for train.py --init-from",
        description="Train the encoder as a masked language model, on the texts of a dataset's "
        "training split and on its unlabelled texts (unsupervised.parquet, train/unsup, ...).",
        formatter_class=flags.Formatter,
    )
    run = parser.add_argument_group("run folder")
    run.add_argument("--out", type=Path, metavar="DIR", help="new run folder (default: runs/...)")
    run.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with this run; takes no other settings"
    )
    flags.add_settings(parser, PretrainConfig, WITHOUT)
    flags.add_settings(parser, ModelConfig)
    parser.set_defaults(run_command=functools.partial(_command, parser))
