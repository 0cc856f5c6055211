"""What is measured of a model beside its loss, under which names, and which epoch is the best."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """The two numbers of an epoch beside its losses.

    chosen: on validation texts, by which the best epoch is chosen; trained: on training texts, as
    the mean over a batch's texts, which a step can have at no cost. Both are keys of metrics.jsonl
    and results.json (`val_<chosen>`, `train_<trained>`); the titles are for people.
    """

    trained: str = "accuracy"
    chosen: str = "accuracy"
    trained_title: str = "accuracy"
    chosen_title: str = "accuracy"
    is_share: bool = True  # both are, of 1, and more is better; else errors, and less is better

    def shown(self, value: float) -> str:
        return f"{value:.2%}" if self.is_share else f"{value:.4f}"


ACCURACY = Measure()
