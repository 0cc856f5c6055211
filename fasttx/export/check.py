"""Whether an exported file answers as the run does, on texts of the run; and what int8 costs.

B texts, L padded length, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from fasttx.errors import ExportError, FasttxError
from fasttx.export.formats import Answer
from fasttx.load import TextClassifier
from fasttx.text.packing import RaggedIds
from fasttx.text.reading import by_length
from fasttx.training import run as runs
from fasttx.training.checkpoint import RunConfig
from fasttx.training.folder import RunFolder

# Of the largest logit, or of 1 where that is larger.
LIMIT, INT8_LIMIT = 1e-4, 0.2

_CHECKED, _RANDOM = 32, 16  # texts: of the run, of random words
_BATCHES = (1, 2, 5, 16, 1, 8)  # texts each, again and again
_MEASURED_AT_ONCE = 16


@dataclass(frozen=True)
class Samples:
    """Texts that an export is checked on, what they are, and their labels where they are known."""

    texts: Sequence[str]
    origin: str
    labels: np.ndarray | None = None
    note: str = ""


def samples_of(run: Path, config: RunConfig) -> Samples:
    """The validation split of a run; no text, and a note, where its data is not at hand."""
    try:
        split = runs.load_dataset(RunFolder(run), config).validation
        origin = f"the validation split of {config.dataset['name']}"
        return Samples(split.texts, origin, split.labels)
    except (FasttxError, OSError) as error:
        note = (
            "checked on random words only, since the run's texts are not at hand; --texts FILE "
            f"checks on yours too ({error})"
        )
        return Samples([], "random words", note=note)


def _random_texts(classifier: TextClassifier) -> list[str]:
    """Words of its vocabulary, from one up to more than the model reads."""
    rng, tokenizer = np.random.default_rng(0), classifier.tokenizer
    longest = classifier.model.config.max_len + 8
    lengths = np.linspace(1, longest, _RANDOM).round().astype(int)
    words = []
    for i in range(tokenizer.special.first_word, len(tokenizer)):
        with suppress(ValueError):  # a table may have rows of no word
            words.append(tokenizer.id_to_token(i))
    words = words or ["a"]
    return [" ".join(words[i] for i in rng.integers(len(words), size=n)) for n in lengths]


@dataclass(frozen=True)
class Difference:
    """The largest difference of two logits, the run's largest logit, and the texts compared."""

    largest: float
    scale: float
    texts: int

    @property
    def relative(self) -> float:
        return self.largest / max(1.0, self.scale)


def compare(answer: Answer, classifier: TextClassifier, texts: Sequence[str]) -> Difference:
    """Some of `texts`, random words, and a text without a token: of all lengths, in batches of
    several sizes, padded on either side. Raises ExportError for logits of another shape."""
    ids = classifier.encode([*_spread(texts), *_random_texts(classifier)])
    ids = RaggedIds.concatenate([ids, RaggedIds.from_lists([[]])])
    ids = ids.select(np.random.default_rng(0).permutation(len(ids)))
    wanted = classifier.window_logits(ids).numpy()
    largest = 0.0
    for number, rows in enumerate(_batches(len(ids))):
        found = answer(*padded(ids.select(rows), classifier, left=number % 2 == 1))
        if found.shape != wanted[rows].shape:
            raise ExportError(
                f"the exported model answers {found.shape} to {len(rows)} texts; expected logits "
                f"{wanted[rows].shape}. Please report it: this is a defect of the export"
            )
        # NaN stays: `max` of Python would lose it.
        largest = float(np.maximum(largest, np.abs(found - wanted[rows]).max()))
    return Difference(largest, float(np.abs(wanted).max()), len(ids))


def _spread(texts: Sequence[str]) -> list[str]:
    """Some of many texts: the shortest, the longest and others between."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    places = np.linspace(0, len(order) - 1, min(_CHECKED, len(order))).round().astype(int)
    return [texts[order[i]] for i in places]


def _batches(count: int) -> Iterator[np.ndarray]:
    first = 0
    for size in cycle(_BATCHES):
        if first >= count:
            return
        yield np.arange(first, min(first + size, count))
        first += size


def padded(
    ids: RaggedIds, classifier: TextClassifier, *, left: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """input_ids and attention_mask (B, L) int64, at least one column wide."""
    shape = len(ids), max(1, int(ids.lengths.max(initial=0)))
    input_ids = np.full(shape, classifier.model.config.pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    for i, length in enumerate(ids.lengths):
        place = slice(shape[1] - length, None) if left else slice(0, length)
        input_ids[i, place], attention_mask[i, place] = ids[i], 1
    return input_ids, attention_mask


def require(difference: Difference, limit: float, what: str) -> None:
    """Raises ExportError for a difference above the limit; also for one that is no number."""
    if not difference.relative <= limit:
        raise ExportError(
            f"{what} does not answer as the run: a logit is {difference.largest:.2g} off, on "
            f"{difference.texts} texts whose largest logit is {difference.scale:.2g}; expected at "
            f"most {limit * max(1.0, difference.scale):.2g}. Nothing was kept; choose another "
            "--format, or leave --quantize away"
        )


@dataclass(frozen=True)
class Quality:
    """The measure by which the run chose its best epoch, before and after quantisation."""

    name: str
    before: float
    after: float
    texts: int


def quality(answer: Answer, classifier: TextClassifier, samples: Samples) -> Quality | None:
    """None where the labels are not known."""
    if samples.labels is None:
        return None
    ids = classifier.encode(samples.texts)
    before = classifier.window_logits(ids, batch_size=64).numpy()
    after = np.empty_like(before)
    for rows in by_length(ids, _MEASURED_AT_ONCE):
        after[rows] = answer(*padded(ids.select(rows), classifier))
    problem = classifier.problem
    name = problem.measure.chosen
    first, second = (
        float(getattr(problem.metrics(x, samples.labels), name)) for x in (before, after)
    )
    return Quality(name, first, second, len(ids))


def misread(content: str, classifier: TextClassifier, texts: Sequence[str]) -> int:
    """How many texts have other ids by the tokenizer.json `content` than by the run; texts that it
    has to cut otherwise are not counted."""
    import tokenizers

    theirs = tokenizers.Tokenizer.from_str(content)
    theirs.no_padding()
    ids, limit, count = classifier.encode(texts), classifier.model.config.max_len, 0
    for i, text in enumerate(texts):
        if classifier.truncation == "head+tail" and len(ids[i]) >= limit:
            continue
        with suppress(UnicodeEncodeError, TypeError):  # a lone surrogate is no text elsewhere
            count += theirs.encode(text).ids != ids[i].tolist()
    return count
