"""Linear models on bags of words, for scale: python benchmarks/baselines.py [--dataset imdb]

scikit-learn's, fitted on training and validation reviews together (nothing is chosen with the
latter), measured on the same test reviews as train.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from fasttx import data
from fasttx.config import TrainConfig

BASELINES = {
    "naive Bayes, binary unigrams": lambda: make_pipeline(
        CountVectorizer(binary=True), MultinomialNB()
    ),
    "logistic regression, tf-idf unigrams": lambda: make_pipeline(
        TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
    ),
    "logistic regression, tf-idf bigrams": lambda: make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        LogisticRegression(C=30, max_iter=1000),
    ),
    "linear SVM, tf-idf bigrams": lambda: make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LinearSVC(C=0.5)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", default="auto")
    parser.add_argument("--train-samples", type=int)
    parser.add_argument("--test-samples", type=int)
    parser.add_argument("--seed", type=int, default=0)
    config = TrainConfig(**vars(parser.parse_args()))
    dataset = data.load(config)
    texts = [*dataset.train.texts, *dataset.validation.texts]
    labels = [*dataset.train.labels, *dataset.validation.labels]
    print(f"{dataset.name}: {len(texts)} training reviews, {len(dataset.test.texts)} test reviews")
    for name, build in BASELINES.items():
        start = time.perf_counter()
        accuracy = build().fit(texts, labels).score(dataset.test.texts, dataset.test.labels)
        print(f"{name:38} {accuracy:7.2%}  {time.perf_counter() - start:5.1f} s", flush=True)


if __name__ == "__main__":
    main()
