"""The models of a service: each a run, its name, its queue, and how it is read again."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttx.load import TextClassifier, load
from fasttx.reporting.attributions import explain
from fasttx.serving.batching import Batcher
from fasttx.serving.limits import Limits
from fasttx.serving.metrics import Metrics
from fasttx.terminal import decoded

log = logging.getLogger("fasttx.serving")

PROBE = "This text asks whether the model answers."


@dataclass(frozen=True)
class Source:
    """Where a model comes from: what `fasttx.load` is given."""

    name: str
    run: Path
    device: str = "auto"
    attn_backend: str | None = None
    precision: str = "fp32"

    def read(self) -> TextClassifier:
        """Raises as `fasttx.load`, and where the model does not answer a first text."""
        classifier = load(
            self.run, device=self.device, attn_backend=self.attn_backend, precision=self.precision
        )
        classifier.predict([PROBE, ""])
        return classifier


class ServedModel:
    def __init__(self, source: Source, limits: Limits, metrics: Metrics) -> None:
        self.source, self.name = source, source.name
        self._metrics = metrics
        self._reading = threading.Lock()
        self.batcher = Batcher(source.name, source.read(), limits, metrics)
        self._explainer: TextClassifier | None = None

    @property
    def classifier(self) -> TextClassifier:
        return self.batcher.classifier

    def described(self) -> dict[str, Any]:
        c = self.classifier
        return {
            "name": self.name,
            "labels": list(c.label_names),
            "problem_type": c.problem_type,
            "max_len": c.model.config.max_len,
            "truncation": c.truncation,
            "long_texts": c.long_texts,
            "precision": c.precision,
            "parameters": sum(p.numel() for p in c.model.parameters()),
        }

    def reload(self) -> bool:
        """Read the run again. Until the new model has answered a text, and where it cannot, the old
        one goes on."""
        with self._reading:
            try:
                renewed = self.source.read()
            except Exception as error:
                log.error("model %s stays as it was: %s", self.name, error)
                self._metrics.reloads.labels(self.name, "failed").inc()
                return False
            self.batcher.classifier, self._explainer = renewed, None
            log.info("model %s was read again", self.name)
            self._metrics.reloads.labels(self.name, "done").inc()
            return True

    def explain(self, text: str) -> dict[str, Any]:
        """The label of a text, and its words with what each contributed."""
        with self._reading:
            if self._explainer is None:
                # sdpa runs everywhere, and has gradients everywhere.
                source = self.source
                self._explainer = load(source.run, device=source.device, attn_backend="sdpa")
            explainer = self._explainer
        found = explain(explainer, decoded(text))
        words = zip(found.words, found.known.tolist(), found.attributions.tolist(), strict=True)
        return {
            "label": found.label,
            "probability": found.probability,
            "rival": found.rival,
            "margin": found.margin,
            "baseline_margin": found.baseline_margin,
            "words": [{"word": w, "known": k, "attribution": a} for w, k, a in words],
            "words_left_out": found.words_left_out,
        }
