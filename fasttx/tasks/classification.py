"""Classification and regression of texts: what `python train.py` trains. What the kinds of problem
differ in stands in `fasttx.training.problems`."""

from __future__ import annotations

import functools
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from fasttx import device as devices
from fasttx.config import ModelConfig, TrainConfig
from fasttx.errors import CheckpointError
from fasttx.models.classifier import TransformerClassifier
from fasttx.ops import registry
from fasttx.tasks.encoder import EncoderTask, machine_text, optimizer_text, size_text
from fasttx.text import splits as data
from fasttx.text.duplicates import duplicates_text, overlap_warning
from fasttx.text.packing import PackedBatch, RaggedIds, pack
from fasttx.text.pieces import AnyTokenizer
from fasttx.text.reading import drop_words, read
from fasttx.text.stored import StoredTexts, encode_stored
from fasttx.text.targets import TARGETS
from fasttx.text.token_cache import encode_cached
from fasttx.training.checkpoint import Progress
from fasttx.training.folder import RunFolder
from fasttx.training.inference import predict_logits, predict_shared
from fasttx.training.measures import Measure
from fasttx.training.predictions import Predictions, PseudoLabels
from fasttx.training.problems import PROBLEMS
from fasttx.training.progress import clock, epoch_table
from fasttx.training.results import common
from fasttx.training.task import Examples, Run, Splits, TaskData

log = logging.getLogger("fasttx")


class Classification(EncoderTask):
    name = "classification"
    command = "python train.py"

    def load(self, config: TrainConfig) -> TaskData:
        """Raises DataError, and CheckpointError for pseudo-labels of other texts or classes."""
        dataset = data.load(config)
        described, more = dataset.describe(), None
        if config.pseudo_labels is not None:
            texts, labels = more = _pseudo_labelled(config, dataset)
            described["pseudo_labels"] = {"texts": len(texts), "fingerprint": labels.fingerprint}
            described["duplicates"] = dataset.count_duplicates(unlabelled=texts)
        return TaskData(
            dataset.train.texts,
            tuple(dataset.label_names),
            described,
            dataset.notes,
            functools.partial(_examples, dataset, more),
            dataset.validation.texts,
        )

    def model(self, config: ModelConfig) -> nn.Module:
        return TransformerClassifier.from_config(config)

    def heading(self, run: Run, model: nn.Module) -> list[str]:
        c, t, m = run.config, run.config.train, run.config.train.model
        auto = " (auto)" if m.attn_backend == "auto" else ""
        longer = t.truncation + (", measured in windows" if t.long_texts == "windows" else "")
        more = ""
        if soft := c.dataset.get("pseudo_labels"):
            more = f", and {soft['texts']:,} texts with the labels of {t.pseudo_labels}"
        lines = (
            f"run        {run.folder.path}  (recipe {c.recipe}, seed {t.seed})",
            f"data       {c.dataset['name']}{more}",
            f"model      {size_text(m)}, {m.max_len} tokens ({longer})",
            f"attention  {c.attn_backend}{auto} on {machine_text(run)}",
            f"training   {t.epochs} epochs, batch {t.batch_size * t.grad_accumulation}, "
            + optimizer_text(t),
        )
        return ["\n".join(lines), *labels_shown(run)]

    def batch(
        self, run: Run, examples: Examples, indices: np.ndarray, stream: tuple[int, ...]
    ) -> PackedBatch:
        config = run.config.train
        special = run.splits.special
        ids = drop_words(examples.ids.select(indices), config.word_dropout, stream, special)
        multiple = devices.token_multiple(run.device, config.precision)
        return pack(ids, examples.labels[indices], token_multiple=multiple)

    def loss(
        self, run: Run, model: Any, batch: PackedBatch, seed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        labels, config = batch.labels, run.config.train
        assert labels is not None
        with devices.autocast(run.device, config.precision):
            logits = model(**batch.model_inputs(), seed=seed).float()
        return PROBLEMS[config.problem_type].loss(logits, labels, config.label_smoothing)

    def begin(self, run: Run, model: Any) -> None:
        PROBLEMS[run.config.train.problem_type].prepare(
            model.head.classify, run.splits.train.labels
        )

    def measures(self, config: TrainConfig) -> Measure:
        return PROBLEMS[config.problem_type].measure

    def measure(self, run: Run, model: nn.Module, examples: Examples) -> tuple[float, float]:
        problem = PROBLEMS[run.config.train.problem_type]
        metrics = problem.metrics(predict_shared(run, model, examples), examples.labels)
        return metrics.loss, getattr(metrics, problem.measure.chosen)

    def results(self, run: Run, model: nn.Module, progress: Progress) -> dict[str, Any]:
        return {
            **measured(run, model, progress),
            "attn_backend": run.config.attn_backend,
            "recipe": run.config.recipe,
            "example": example(run, model),
            **registry.descriptions(run.config.attn_backend),
        }

    def closing(self, run: Run, results: dict[str, Any]) -> str:
        folder, text = run.folder, results["example"]
        path = shlex.quote(str(folder.path))
        ask = f"fasttx predict {path} {shlex.quote(text)}" if text else f"fasttx evaluate {path}"
        return (
            f"\n{result_text(run, results, 'reviews')}\n"
            f"trained at {results['samples_per_second']:.1f} samples/s, "
            f"{clock(results['seconds'])}; peak memory {results['peak_memory_mb']:.0f} MB\n"
            f"{folder.results}; try: {ask}"
            + (f"\n\n{results['warning']}" if results["warning"] else "")
        )


TASK = Classification()


# --- an example -----------------------------------------------------------------------------------

_LONGEST_EXAMPLE = 200  # characters, which a command line shows in two lines
_TRIED = 50


def example(run: Run, model: nn.Module) -> str | None:
    """A short text of the validation split that `model` gets right, of several the surest; None if
    there is none. What it says of it is what `fasttx predict` says, which reads in fp32 too."""
    validation = run.splits.validation
    ids, labels, owner = validation.ids, validation.labels, validation.owner
    short = [
        (len(text), i)
        for i, text in enumerate(run.validation)
        if len(text) <= _LONGEST_EXAMPLE and text.isprintable() and text[:1].isalnum()
    ]
    tried = np.array([i for _, i in sorted(short)[:_TRIED]], dtype=np.int64)
    if owner is not None:
        tried = tried[[int((owner == i).sum()) == 1 for i in tried]]
    if not len(tried):
        return None
    rows = tried if owner is None else np.searchsorted(owner, tried)
    logits = predict_logits(model, ids.select(rows), run.device).numpy()
    sure = PROBLEMS[run.config.train.problem_type].sureness(logits, labels[tried])
    return run.validation[tried[sure.argmax()]] if sure.max() > -np.inf else None


# --- examples -------------------------------------------------------------------------------------


def _pseudo_labelled(
    config: TrainConfig, dataset: data.TextDataset
) -> tuple[list[str], PseudoLabels]:
    """The unlabelled texts of a dataset, with what an ensemble says of them.

    Raises DataError, and CheckpointError for labels of other texts or other classes.
    """
    path = RunFolder(Path(str(config.pseudo_labels))).pseudo_labels
    labels = PseudoLabels.load(path)
    texts, _ = data.load_unlabelled(config.dataset, config.text_column)
    if labels.texts != data.texts_fingerprint(texts):
        raise CheckpointError(
            f"{path} labels other texts than the {len(texts):,} unlabelled ones that "
            f"{config.dataset!r} holds now. Make it again: fasttx ensemble --pseudo-labels"
        )
    if list(labels.label_names) != dataset.label_names:
        raise CheckpointError(
            f"{path} has the classes {', '.join(labels.label_names)}; expected those of "
            f"{config.dataset!r}: {', '.join(dataset.label_names)}"
        )
    if labels.splits != dataset.fingerprint:
        raise CheckpointError(
            f"{path} comes from other splits than this run's: its makers may have learnt the "
            "labels of texts that this run is validated on. Expected the --dataset, --split-seed "
            "and numbers of samples of the runs that made it"
        )
    return texts, labels


def _examples(
    dataset: data.TextDataset,
    more: tuple[list[str], PseudoLabels] | None,
    config: TrainConfig,
    tokenizer: AnyTokenizer,
) -> Splits:
    max_len, special = config.model.max_len, tokenizer.special

    def encoded(texts: Sequence[str], long_texts: str) -> tuple[RaggedIds, np.ndarray | None]:
        def reading(ids: RaggedIds) -> tuple[RaggedIds, np.ndarray | None]:
            return read(ids, max_len, config.truncation, long_texts, special)

        if isinstance(texts, StoredTexts):
            return encode_stored(tokenizer, texts, reading)
        return reading(encode_cached(tokenizer, texts))

    def measured_on(split: data.Split) -> Examples:
        ids, owner = encoded(split.texts, config.long_texts)
        return Examples(ids, split.labels, owner)

    train, labels = encoded(dataset.train.texts, "cut")[0], dataset.train.labels
    if more is not None:
        texts, soft = more
        train = RaggedIds.concatenate([train, encoded(texts, "cut")[0]])
        certain = np.eye(len(dataset.label_names), dtype=np.float32)[labels]
        labels = np.concatenate([certain, soft.probabilities])
    return Splits(
        Examples(train, labels),
        measured_on(dataset.validation),
        measured_on(dataset.test),
        special,
    )


# --- what any classifier of texts shows and records -----------------------------------------------


def labels_shown(run: Run) -> list[str]:
    dataset, target = run.config.dataset, TARGETS[run.config.train.problem_type]
    lines = target.table(dataset), duplicates_text(dataset), warning(run)
    return [line for line in lines if line]


def warning(run: Run) -> str | None:
    """Why what is measured says little, by what config.json keeps of the data."""
    dataset, target = run.config.dataset, TARGETS[run.config.train.problem_type]
    found = target.warning(dataset), overlap_warning(dataset)
    return "\n".join(line for line in found if line) or None


def result_text(run: Run, results: dict[str, Any], unit: str) -> str:
    """The measurement on the test split, in a sentence."""
    dataset, measure = results["dataset"], run.task.measures(run.config.train)
    test, val = (measure.shown(results[f"{part}_{measure.chosen}"]) for part in ("test", "val"))
    return (
        f"{dataset['name']}: test {measure.chosen_title} {test} on {dataset['test_samples']:,} "
        f"{unit} (epoch {results['best_epoch']}, chosen by validation {measure.chosen_title} {val})"
    )


def measured(run: Run, model: nn.Module, progress: Progress) -> dict[str, Any]:
    """Measure on the test split, save the answers, and return what results.json holds of them."""
    test, best = run.splits.test, progress.best
    assert test is not None and best is not None
    kind = run.config.train.problem_type
    problem, measure = PROBLEMS[kind], PROBLEMS[kind].measure
    log.info("\n%s\n", epoch_table(progress.history, best["epoch"], measure))
    log.info("measuring on the %s test reviews ...", f"{len(test):,}")
    predictions = Predictions(predict_shared(run, model, test), test.labels, kind)
    log.info("%s", problem.format(predictions.metrics, run.config.label_names))
    if run.processes.main:
        predictions.save(run.folder)
    found = predictions.metrics.to_dict()
    return {
        f"test_{measure.chosen}": found[measure.chosen],
        "test_loss": found["loss"],
        **problem.more_results(found, progress.history),
        "test": found,
        f"val_{measure.chosen}": best[f"val_{measure.chosen}"],
        "device": str(run.device),
        "warning": warning(run),
        **common(run, model, progress),
    }
