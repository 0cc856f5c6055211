"""Why one text got its label, or its number: integrated gradients of its words, and where each head
looked.

Shapes: n words of the text that the model reads, m of them in the window whose attention is shown
(all n if the text has one window), d d_model, S points of the path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fasttx.config import SINGLE_LABEL
from fasttx.load import TextClassifier
from fasttx.models.classifier import TransformerClassifier
from fasttx.reporting.findings import percent
from fasttx.text.packing import RaggedIds, pack
from fasttx.text.tokenizer import WORDS_ONLY, SpecialTokens
from fasttx.training.inference import predict_logits

# The attributions of a text sum to its margin minus the baseline's, to within this share of that
# difference (or this many logits, if the difference is below 1).
TOLERANCE = 0.01
_FIRST_POINTS, _MOST_POINTS = 32, 512
_ROWS = 4096  # the most rows in one forward pass, which limits memory


@dataclass(frozen=True, eq=False)
class Explanation:
    """One text, as the model read it.

    The margin is the logit of `label` minus the logit of `rival`, the likeliest other label. Where
    labels do not exclude one another there is no rival, and the margin is the logit; in a
    regression it is the number, which has no probability.
    """

    label: str
    probability: float | None
    rival: str | None
    words: tuple[str, ...]  # n, in lower case
    known: np.ndarray  # (n,) bool: in the vocabulary
    attributions: np.ndarray  # (n,) float64, in logits; positive: for `label`
    margin: float
    baseline_margin: float  # of a text of as many unknown words
    points: int  # of the path, in the sum for the integral
    attention: np.ndarray  # (layers, heads, m, m): query, key
    mapped: range  # the m words of the attention maps
    words_left_out: int  # by truncation
    left_out_at: int  # index of the first word after the words left out

    def heading(self, digits: int = 1) -> str:
        """`good, 97.1 % sure`; of a regression `stars 3.2041`."""
        if self.probability is None:
            return f"{self.label} {self.margin:.4f}"
        return f"{self.label}, {percent(self.probability, digits)} sure"

    @property
    def margin_name(self) -> str:
        if self.rival is not None:
            return f"margin over {self.rival}"
        return self.label if self.probability is None else f"logit of {self.label}"

    @property
    def gap(self) -> float:
        """The difference of the margins minus the sum of the attributions; ideally 0."""
        return float(self.margin - self.baseline_margin - self.attributions.sum())

    def ranked(self) -> list[tuple[str, float]]:
        """Words and attributions, the strongest first; those of a repeated word are added."""
        total: dict[str, float] = {}
        for word, value in zip(self.words, self.attributions.tolist(), strict=True):
            total[word] = total.get(word, 0.0) + value
        return sorted(total.items(), key=lambda item: -abs(item[1]))


def integrated_gradients(
    model: TransformerClassifier,
    ids: np.ndarray,
    target: int,
    rival: int | None,
    special: SpecialTokens = WORDS_ONLY,
) -> tuple[np.ndarray, float, float, int]:
    """Attributions (n,) of the words `ids` (n,) to the margin logit[target] - logit[rival], or
    to logit[target] where there is no rival.

    Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks" (ICML 2017), eq. 1, along the
    straight line from a baseline to the text, in the space of word embeddings; positions stay as
    they are. The baseline is a text of as many <UNK>: the model has learnt from rare words what an
    unknown word is, and has never seen a vector of zeros. So <UNK> itself gets 0. A pretrained
    encoder has learnt it of its [MASK]; the special tokens around the text stay, and get 0.

    The integral is a Gauss-Legendre sum. Its points are doubled until the completeness axiom
    (sum of attributions = margin - margin of the baseline) holds to TOLERANCE, or there are 512.
    Returns the attributions, both margins, and the number of points.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    table = parameters["embedding"]
    unknown = ids.copy()
    unknown[len(special.before) : len(ids) - len(special.after)] = special.mask
    words, baseline = (
        table[torch.from_numpy(x.astype(np.int64)).to(table.device)] for x in (ids, unknown)
    )

    def margins(rows: Tensor) -> Tensor:
        """The margins (S,) of S texts (S, n, d) that are given as embeddings, not as ids."""
        count, n = rows.shape[:2]
        every = RaggedIds(np.arange(count * n, dtype=np.int32), np.arange(count + 1) * n)
        # The embedding table is replaced by the texts' own embeddings: id i is word i of them.
        state = {**parameters, "embedding": rows.flatten(0, 1)}
        inputs = pack(every).to(rows.device).model_inputs()
        logits: Tensor = torch.func.functional_call(model, state, kwargs=inputs)
        return _margins(logits, target, rival)

    with torch.no_grad():
        ends = margins(torch.stack([baseline, words])).double().tolist()
    difference = ends[1] - ends[0]
    points = _FIRST_POINTS
    while True:
        mean = _mean_gradient(margins, baseline, words, points)
        attributions = ((words - baseline).double().cpu() * mean).sum(-1).numpy()
        gap = abs(difference - attributions.sum())
        if gap <= TOLERANCE * max(1.0, abs(difference)) or points == _MOST_POINTS:
            return attributions, ends[1], ends[0], points
        points *= 2


def _margins(logits: Tensor, target: int, rival: int | None) -> Tensor:
    return logits[:, target] if rival is None else logits[:, target] - logits[:, rival]


def _mean_gradient(
    margins: Callable[[Tensor], Tensor], baseline: Tensor, words: Tensor, points: int
) -> Tensor:
    """Mean gradient of the margin on the line from `baseline` to `words`: (n, d) float64, CPU."""
    nodes, weights = np.polynomial.legendre.leggauss(points)  # on [-1, 1], where weights sum to 2
    places = torch.tensor((nodes + 1) / 2, dtype=words.dtype, device=words.device)
    at_once = max(1, _ROWS // max(1, len(words)))
    mean = torch.zeros(words.shape, dtype=torch.float64)
    for part, weight in zip(
        places.split(at_once), torch.tensor(weights / 2).split(at_once), strict=True
    ):
        rows = torch.lerp(baseline, words, part[:, None, None]).requires_grad_()
        (gradient,) = torch.autograd.grad(margins(rows).sum(), rows)
        mean += torch.einsum("s,snd->nd", weight, gradient.double().cpu())
    return mean


def explain(classifier: TextClassifier, text: str, label: int | None = None) -> Explanation:
    """The likeliest label of `text`, or its number, what each word contributed, and the attention
    weights. label: of a multi-label model, the one to explain instead.

    If the model reads the text in windows, whose logits are averaged, the attribution of a word is
    that in its window divided by the number of windows. The attention maps are of the window with
    the largest margin. Raises ValueError for a model of one class.
    """
    model, names = classifier.model.eval(), classifier.label_names
    problem = classifier.problem
    if len(names) < 2 and classifier.problem_type == SINGLE_LABEL:
        raise ValueError(f"the model knows the label {names[0]!r} only; expected at least two")
    special = classifier.tokenizer.special
    every_word, word_of = classifier.tokenizer.words(text)
    ids = classifier.tokenizer.encode_batch([text])
    windows, _ = classifier.read(ids)
    # Indices are cut in the same way as ids, to see which pieces of words are kept.
    places = classifier.cut(RaggedIds.from_lists([range(len(word_of))]))
    words = word_of[places.values]  # (pieces,) int64, in order
    first_pieces = np.flatnonzero(np.diff(words, prepend=-1))  # of each word
    kept = words[first_pieces].tolist()
    every_logits = predict_logits(model, windows, classifier.device)
    logits = every_logits.double().mean(0)
    target, rival = problem.decision(logits)
    if label is not None and rival is None:
        target = label
    margins = _margins(every_logits, target, rival).tolist()
    shown = int(np.argmax(margins))
    with torch.no_grad():
        batch = pack(windows.select(np.array([shown]))).to(classifier.device)
        _, weights = model(**batch.model_inputs(), return_attention=True)
    parts = [
        integrated_gradients(model, window, target, rival, special)
        for window in (windows[i] for i in range(len(windows)))
        if len(window)
    ] or [(np.zeros(0), 0.0, 0.0, 0)]
    attributions, margin, baseline_margin, points = zip(*parts, strict=True)
    begin, n = len(special.before), int(places.lengths[shown])
    inside = slice(begin, begin + n)
    attention = [w[0, :, inside, inside].float().cpu().numpy() for w in weights]
    of_pieces = np.concatenate([a[begin : len(a) - len(special.after)] for a in attributions])
    in_map = words[places.offsets[shown] : places.offsets[shown + 1]]
    first_mapped = int(np.searchsorted(kept, in_map[0])) if len(in_map) else 0
    attention = [_by_word(w, in_map) for w in attention]
    n = attention[0].shape[-1] if attention else len(set(in_map.tolist()))
    return Explanation(
        label=names[target],
        probability=problem.probability(logits, target),
        rival=None if rival is None else names[rival],
        words=tuple(every_word[k] for k in kept),
        known=~_summed(np.isin(ids.values[places.values], special.reserved), first_pieces),
        attributions=_summed(of_pieces, first_pieces) / len(parts),
        margin=float(np.mean(margin)),
        baseline_margin=float(np.mean(baseline_margin)),
        points=max(points),
        attention=np.stack(attention) if attention else np.zeros((0, 0, n, n), np.float32),
        mapped=range(first_mapped, first_mapped + n),
        words_left_out=len(every_word) - len(kept),
        left_out_at=next((i for i, k in enumerate(kept) if k != i), len(kept)),
    )


def _summed(pieces: np.ndarray, first_pieces: np.ndarray) -> np.ndarray:
    """Of pieces to that of words, whose first pieces are given: sums of numbers, any of bools."""
    if len(first_pieces) == len(pieces):
        return pieces
    add = np.logical_or if pieces.dtype == bool else np.add
    summed: np.ndarray = add.reduceat(pieces, first_pieces)
    return summed


def _by_word(attention: np.ndarray, words: np.ndarray) -> np.ndarray:
    """(H, pieces, pieces) -> (H, words, words): how much a word looks at another one is the mean
    over its pieces of the sum over the other's (Clark et al., "What Does BERT Look At?", 2019)."""
    first_pieces = np.flatnonzero(np.diff(words, prepend=-1))
    if len(first_pieces) == len(words):
        return attention
    counts = np.diff(np.append(first_pieces, len(words)))
    looked_at = np.add.reduceat(attention, first_pieces, axis=2)
    by_word: np.ndarray = np.add.reduceat(looked_at, first_pieces, axis=1) / counts[:, None]
    return by_word
