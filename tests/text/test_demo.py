"""The built-in corpus: the same everywhere, balanced, without leaks, and no bag of words."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import pytest

from fasttx.text import demo

Corpus = tuple[list[str], list[int], list[str], list[int]]
KINDS = {**demo.VERDICTS, "feelings": demo.FEELINGS}
FRAMES = [frame for _, frames in KINDS.values() for frame in frames]
# A changed corpus makes published figures and the fingerprints of saved runs void.
DIGESTS = {
    1: "5bb9bbe9b788cd35e2c504641de0543dbbb66cc25b2a1db054475113f4000d2e",
    2: "f8d5036194e3df1be1793794ac4284d2b0982867060403d21a52a854c9791292",
}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return demo.corpus()


@pytest.mark.parametrize("grammar", DIGESTS)
def test_the_same_everywhere(grammar: int) -> None:
    train_texts, train_labels, test_texts, test_labels = demo.corpus(grammar=grammar)
    lines = [
        f"{label} {text}\n"
        for texts, labels in ((train_texts, train_labels), (test_texts, test_labels))
        for text, label in zip(texts, labels, strict=True)
    ]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert digest == DIGESTS[grammar]


def test_every_grammar_has_a_name() -> None:
    """By which an older run finds its texts."""
    assert {demo.NAMES[demo.name_of(grammar)] for grammar in DIGESTS} == set(demo.NAMES.values())
    assert max(DIGESTS) == demo.GRAMMAR == demo.NAMES["demo"]


def test_sizes_and_seeds() -> None:
    a, b, c = (demo.corpus(seed=seed, train=60, test=20) for seed in (1, 1, 2))
    assert a == b and a[0] != c[0]
    assert [len(part) for part in a] == [60, 60, 20, 20]


def test_balanced_and_without_leaks(corpus: Corpus) -> None:
    train_texts, train_labels, test_texts, test_labels = corpus
    for labels in (train_labels, test_labels):
        assert Counter(labels) == {0: len(labels) // 2, 1: len(labels) // 2}
    assert len({*train_texts, *test_texts}) == len(train_texts) + len(test_texts)


def test_texts_read_like_short_reviews(corpus: Corpus) -> None:
    texts = [*corpus[0], *corpus[2]]
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) >= 14 and max(lengths) <= 45
    assert all(re.fullmatch(r"(?:[A-Z][A-Za-z',-]*(?: [A-Za-z',-]+)+\. ?){2,4}", t) for t in texts)
    words = Counter(word for text in texts for word in re.findall(r"[a-z'-]+", text.lower()))
    assert 250 <= len(words) <= 500
    assert min(words.values()) >= 20, "rare words cannot be learned"


def test_frames_say_nothing_by_themselves() -> None:
    """What speaks for a label stands in the slots alone, and on one side alone."""
    lists = (demo.ADJECTIVES, demo.THINGS, demo.DO, demo.DID)
    sides = [
        {word for words in lists for entry in words[label] for word in entry.split()}
        for label in (0, 1)
    ]
    assert sides[0] & sides[1] == {"a", "of"}
    neutral = [*FRAMES, *demo.ASIDES, *demo.FILMS, *demo.GENRES, *demo.PARTS, *demo.CRITICS]
    neutral += [entry for entries in demo.COLOUR.values() for entry in entries]
    words = {word for entry in neutral for word in re.findall(r"[a-z'-]+", entry)}
    telling = set().union(*(words for both in lists if both is not demo.THINGS for words in both))
    assert not words & telling


def test_word_order_decides() -> None:
    """A frame with a word of each side holds the same words whichever label it is filled for."""
    both = [f for f in FRAMES if "{same" in f and "{other" in f]
    assert len(both) == 9
    for frame in both:
        filled = []
        for x, y in (("dull", "funny"), ("funny", "dull")):
            kinds = ("", "_thing", "_do", "_did")
            slots = {f"same{k}": x for k in kinds} | {f"other{k}": y for k in kinds}
            filled.append(frame.format(**slots, film="it", part="the cast", critic="my aunt"))
        a, b = (sorted(re.findall(r"[a-z]+", text.lower())) for text in filled)
        assert filled[0] != filled[1] and a == b


def test_labels_follow_the_grammar(corpus: Corpus) -> None:
    """Read three kinds of sentence without the generator's help."""
    side = {word: label for label in (0, 1) for word in demo.ADJECTIVES[label]}
    film = "|".join([*demo.FILMS, *demo.GENRES])
    readings = {
        rf"(?:{film}) is not (\w+)\.": -1,
        rf"(?:{film}) is (\w+), not \w+\.": 1,
        r"is (\w+), yeah right": -1,
        rf"but (?:{film}) is (\w+)\.": 1,
    }
    for pattern, sign in readings.items():
        found = [
            (side[match[1]], label)
            for text, label in zip(corpus[0], corpus[1], strict=True)
            for match in re.finditer(pattern, text, re.IGNORECASE)
        ]
        assert len(found) > 100
        assert all((said == label) == (sign == 1) for said, label in found), pattern


def test_feelings_do_not_show_by_their_words(corpus: Corpus) -> None:
    """Neither "nothing" nor "loved" says what a review means: as often as not it is the other."""
    texts, labels = corpus[0], corpus[1]
    for word in ("expected nothing", "expected everything", "i wanted to", "i cannot say"):
        found = [label for text, label in zip(texts, labels, strict=True) if word in text.lower()]
        assert len(found) > 100
        assert 0.4 < sum(found) / len(found) < 0.6, word
    for side, words in enumerate(demo.DID):
        of = [
            label == side
            for text, label in zip(texts, labels, strict=True)
            if set(words) & set(re.findall("[a-z]+", text.lower()))
        ]
        assert 0.4 < sum(of) / len(of) < 0.65, words


def test_bag_of_words_is_not_enough(corpus: Corpus) -> None:
    """The figure that docs/accuracy.md states: all training texts, unigram counts, linear."""
    pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train_texts, train_labels, test_texts, test_labels = corpus
    counts = CountVectorizer()
    model = LogisticRegression(max_iter=1000).fit(counts.fit_transform(train_texts), train_labels)
    assert 0.65 < model.score(counts.transform(test_texts), test_labels) < 0.80
