"""Linear models on bags of words: scikit-learn's, and NBSVM, which is made of their pieces.

Shapes: n texts, V n-grams, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fasttx.errors import BaselineError


def log_count_ratio(counts: Any, positive: np.ndarray, alpha: float) -> np.ndarray:
    """r of Wang & Manning (2012), section 2.1: how much likelier an n-gram is among positives.

    counts (n, V) sparse, positive (n,) bool -> (V,) float64: log((p / |p|) / (q / |q|)), where p
    and q are alpha plus the counts of the positive and of the other texts.
    """
    p = alpha + np.asarray(counts[positive].sum(0), dtype=np.float64).ravel()
    q = alpha + np.asarray(counts[~positive].sum(0), dtype=np.float64).ravel()
    ratio: np.ndarray = np.log(p / p.sum()) - np.log(q / q.sum())
    return ratio


@dataclass
class NBSVM:
    """A linear SVM on naive-Bayes features, with the settings of its paper; one class against the
    rest where there are more than two.

    Source: Wang, Manning, "Baselines and Bigrams: Simple, Good Sentiment and Topic Classification",
    ACL 2012, section 2.3. Features are binary counts times `log_count_ratio`; the weights w of an
    SVM with squared hinge loss are drawn towards naive Bayes: (1 - beta) mean |w| + beta w.
    """

    alpha: float = 1.0
    beta: float = 0.25
    C: float = 1.0
    # LIBLINEAR's own for this solver: scikit-learn's 1e-4 is not reached in 1,000 passes over IMDB.
    tol: float = 0.1
    random_state: int = 0
    classes_: np.ndarray = field(init=False, repr=False)
    coef_: np.ndarray = field(init=False, repr=False)  # (1 or C, V)
    intercept_: np.ndarray = field(init=False, repr=False)  # (1 or C,)

    def fit(self, counts: Any, labels: np.ndarray) -> NBSVM:
        """counts (n, V) sparse and binary, labels (n,) integers of at least two classes."""
        self.classes_ = np.unique(labels)
        of_two = len(self.classes_) == 2
        separated = [
            self._separate(counts, labels == c) for c in self.classes_[1 if of_two else 0 :]
        ]
        self.coef_ = np.stack([weights for weights, _ in separated])
        self.intercept_ = np.array([intercept for _, intercept in separated])
        return self

    def _separate(self, counts: Any, positive: np.ndarray) -> tuple[np.ndarray, float]:
        from sklearn.svm import LinearSVC

        r = log_count_ratio(counts, positive, self.alpha)
        svm = LinearSVC(C=self.C, dual=True, tol=self.tol, random_state=self.random_state)
        svm.fit(counts.multiply(r).tocsr(), positive)
        w = svm.coef_[0]
        return r * ((1 - self.beta) * np.abs(w).mean() + self.beta * w), float(svm.intercept_[0])

    def decision_function(self, counts: Any) -> np.ndarray:
        """Margins as scikit-learn's: (n,) of the second of two classes, else (n, C)."""
        scores: np.ndarray = counts @ self.coef_.T + self.intercept_
        return scores[:, 0] if scores.shape[1] == 1 else scores


# --- the table ------------------------------------------------------------------------------------


def _terms(ngrams: int) -> dict[str, Any]:
    """Words, or words and pairs. Most pairs occur in one text only, and teach nothing.

    Triples hold words of one letter too, which scikit-learn leaves out unless asked: "don't like"
    is "don", "t", "like". On IMDB triples gain little without them (docs/accuracy.md).
    """
    letters = {"token_pattern": r"(?u)\b\w+\b"} if ngrams == 3 else {}
    return {"ngram_range": (1, ngrams), "min_df": min(ngrams, 2), **letters}


def _naive_bayes(ngrams: int, seed: int) -> tuple[Any, Any]:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    return CountVectorizer(binary=True, **_terms(ngrams)), MultinomialNB()


def _logistic_regression(ngrams: int, seed: int) -> tuple[Any, Any]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    tfidf = TfidfVectorizer(sublinear_tf=True, **_terms(ngrams))
    return tfidf, LogisticRegression(C=10 if ngrams == 1 else 30, max_iter=1000)


def _linear_svm(ngrams: int, seed: int) -> tuple[Any, Any]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    tfidf = TfidfVectorizer(sublinear_tf=True, **_terms(ngrams))
    return tfidf, LinearSVC(C=0.5, dual="auto", random_state=seed)


def _nbsvm(ngrams: int, seed: int) -> tuple[Any, Any]:
    from sklearn.feature_extraction.text import CountVectorizer

    return CountVectorizer(binary=True, **_terms(ngrams)), NBSVM(random_state=seed)


@dataclass(frozen=True)
class Kind:
    """A line of the table: its name, (ngrams, seed) -> unfitted (vectorizer, classifier), the
    n-grams it takes unless asked, and whether its scores are log-probabilities, or mere margins."""

    title: str
    build: Callable[[int, int], tuple[Any, Any]]
    ngrams: int = 2
    probabilistic: bool = False


NGRAMS = (1, 2, 3)
KINDS = {
    "nb": Kind("naive Bayes, binary", _naive_bayes, ngrams=1, probabilistic=True),
    "logreg": Kind("logistic regression, tf-idf", _logistic_regression, probabilistic=True),
    "linear-svm": Kind("linear SVM, tf-idf", _linear_svm),
    "nbsvm": Kind("NBSVM, binary", _nbsvm),
}


def title(kind: str, ngrams: int) -> str:
    return f"{KINDS[kind].title} {('unigrams', 'bigrams', 'trigrams')[ngrams - 1]}"


# --- fitting --------------------------------------------------------------------------------------


def require_scikit_learn() -> None:
    """Raises BaselineError where it is missing."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise BaselineError(
            "the linear baselines need the package scikit-learn, which is not installed: "
            "pip install 'fasttx[baselines]'"
        ) from error


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted vectorizer and classifier of scikit-learn's kind, for labels 0 ... C - 1."""

    vectorizer: Any
    classifier: Any
    num_classes: int

    @property
    def features(self) -> int:
        """V, the n-grams in use."""
        return len(self.vectorizer.vocabulary_)

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """(n, C) float64, finite: log-probabilities up to a constant a text, or margins."""
        x, classifier = self.vectorizer.transform(texts), self.classifier
        if hasattr(classifier, "predict_joint_log_proba"):  # naive Bayes has no other scores
            scores = classifier.predict_joint_log_proba(x)
        else:
            scores = classifier.decision_function(x)
        if scores.ndim == 1:  # of two classes, the log-odds or margin of the second
            scores = np.stack([np.zeros_like(scores), scores], 1)
        # A class that no training text has is never predicted.
        logits = np.full((len(scores), self.num_classes), scores.min() - 100.0)
        logits[:, classifier.classes_] = scores
        return logits

    def __str__(self) -> str:
        steps = (" ".join(repr(step).split()) for step in (self.vectorizer, self.classifier))
        return " -> ".join(steps)


def fit(
    kind: str, ngrams: int, texts: Sequence[str], labels: np.ndarray, *, num_classes: int, seed: int
) -> Fitted:
    """A baseline of `KINDS` on words (ngrams 1), words and pairs of them (2), or triples too (3).

    labels (n,) integers in [0, num_classes). Raises BaselineError where scikit-learn is missing,
    and where no n-gram is frequent enough to be used.
    """
    require_scikit_learn()
    vectorizer, classifier = KINDS[kind].build(ngrams, seed)
    try:
        x = vectorizer.fit_transform(texts)
    except ValueError as error:  # "empty vocabulary", "no terms remain"
        raise BaselineError(
            f"{title(kind, ngrams)}: the {len(texts):,} training texts hold no n-gram that it can "
            f"use ({error}). Train on more texts, or on texts with words in them"
        ) from error
    return Fitted(vectorizer, classifier.fit(x, labels), num_classes)
