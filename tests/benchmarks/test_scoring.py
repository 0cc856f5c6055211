"""A file beside the same texts in memory: other labels are not timed."""

from __future__ import annotations

from pathlib import Path

import pytest
import scoring

from fasttx.scoring.scorer import Scorer

RUN = Path(__file__).resolve().parents[1] / "data" / "runs" / "classification-finished"
GROUPS = [["a wonderful film", 'dull, and\n"long"'], ["", "the story is bad", "good"]]


def test_both_are_timed_on_each_file(tmp_path):
    found = scoring.compare(Scorer(RUN, device="cpu"), GROUPS, tmp_path)
    assert len(found) == len(GROUPS) and all(s > 0 for pair in found for s in pair)
    assert len(scoring.labels_of(tmp_path / "1.parquet")) == 3


def test_other_labels_are_not_timed(tmp_path, monkeypatch):
    scorer = Scorer(RUN, device="cpu")
    score = scorer.score
    monkeypatch.setattr(scorer, "score", lambda texts: score([*texts[1:], texts[0]]))
    labels = [answer.label for answer in scorer.classifier.predict(GROUPS[1])]
    assert labels != [*labels[1:], labels[0]], "a turn would not be seen"
    with pytest.raises(AssertionError, match="other labels"):
        scoring.compare(scorer, GROUPS[1:], tmp_path)
