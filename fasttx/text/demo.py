"""The built-in corpus `demo`: generated film reviews in which word order decides.

Every frame below serves both labels: {same} is a word of the review's own label, {other} one of
the opposite label. So a frame alone says nothing of the label, and counting words only shows which
side has more of them. The label follows from what is negated, what is said of the film rather than
of a part of it, and whom the reviewer believes.

The grammar has a version. A run keeps the number (config.json), so that an older run still finds
the texts that it was trained on, under a name of NAMES.
"""

from __future__ import annotations

from random import Random

LABEL_NAMES = ["negative", "positive"]
GRAMMAR = 2  # 1 knows no FEELINGS
NAMES = {"demo": GRAMMAR, "demo-1": 1}

# Indexed by label.
ADJECTIVES = (
    "dull boring tedious clumsy hollow stale lifeless pointless awful dreadful forgettable painful "
    "lazy shallow messy bland annoying ridiculous weak ugly predictable flat silly noisy".split(),
    "brilliant charming funny clever gripping moving fresh lovely superb wonderful memorable "
    "thrilling witty tender graceful warm inspired strong beautiful surprising rich lively "
    "elegant splendid".split(),
)
THINGS = (
    "a bore|a mess|a chore|a disaster|a letdown|a waste of an evening|a failure|a headache|"
    "a sleeping pill|a crime against cinema".split("|"),
    "a joy|a triumph|a treat|a gem|a delight|a feast for the eyes|a success|a masterpiece|"
    "a breath of fresh air|a little miracle".split("|"),
)
DO = ("hate loathe dislike regret".split(), "adore enjoy like admire".split())
DID = ("hated loathed disliked regretted".split(), "loved adored enjoyed liked admired".split())
_WORDS = {"": ADJECTIVES, "thing": THINGS, "do": DO, "did": DID}

FILMS = "the film|this film|the movie|this movie|the whole thing|the film as a whole".split("|")
GENRES = (
    "the sequel|the comedy|the western|the thriller|the musical|the heist film|the ghost story|"
    "the space opera|the love story|the remake|the documentary|the road movie".split("|")
)
PARTS = (
    "the cast|the music|the lighting|the poster|the trailer|the camera work|the first act|"
    "the popcorn|the cinema|the title song|the villain|the opening scene|the dog|the make-up|"
    "the car chase|the leading man|the dubbing|the wardrobe|the sword fight|the dance number"
).split("|")
CRITICS = (
    "my brother|the critic next to me|my neighbour|the local paper|my dentist|a man in a hat|"
    "my aunt|the usher|my boss|the fan club|my old teacher|the press kit"
).split("|")
COLOUR = {
    "when": (
        "on a rainy tuesday|last night|on my birthday|at noon|during a heat wave|by mistake|"
        "on new year's eve|after a long week"
    ).split("|"),
    "company": (
        "with my sister|all alone|with nine cousins|with a bucket of nachos|in an empty hall|"
        "with a school class|in the front row|with my landlord"
    ).split("|"),
    "hero": (
        "a plumber|a retired spy|a talking goat|a shy detective|a lighthouse keeper|a robot|"
        "a former thief|a baker from mars|a haunted piano|a very small king|a nun on a motorbike"
    ).split("|"),
    "wish": (
        "a quiet life|revenge|the lost recipe|a decent sandwich|the way home|the moon|a better hat|"
        "a partner for the dance contest|the other half of a map|a good lawyer"
    ).split("|"),
}

# Sentences about the film. Each of them means {same}; the numbers are the shares of the kinds.
VERDICTS: dict[str, tuple[int, tuple[str, ...]]] = {
    # Here counting words works.
    "outright": (
        48,
        (
            "{film} is {same} and {same}",
            "{film} turned out to be {same_thing}",
            "I found {film} {same} from start to finish",
            "{critic} called it {same_thing} and I have to agree",
            "{part} is {same} and {film} is {same} too",
        ),
    ),
    # The word occurs, and is negated.
    "negated": (
        11,
        (
            "{film} is not {other}",
            "{film} is never {other}",
            "{film} is anything but {other}",
            "nobody could call {film} {other}",
            "there is not one minute of {film} that I would call {other}",
        ),
    ),
    # Words of both sides: the scope of the negation decides.
    "scope": (
        18,
        (
            "{film} is {same}, not {other}",
            "{film} is {same} and never {other}",
            "I expected {other_thing} and got {same_thing}",
        ),
    ),
    # A part of the film against the film.
    "contrast": (
        14,
        (
            "{part} is {other}, but {film} is {same}",
            "although {part} is {other}, {film} is {same}",
            "{film} is {same}, even though {part} is {other}",
            "{part} may be {other}, {film} is {same}",
        ),
    ),
    # Opinions the reviewer shares, and opinions the reviewer mocks.
    "irony": (
        9,
        (
            "oh sure, {film} is {other}, and pigs can fly",
            "{film} is {other}, yeah right, and I am the queen of norway",
            "{critic} calls {film} {other}, but {critic} also eats soap",
            "do not believe {critic}, who finds {film} {other}",
            "believe {critic}, who finds {film} {same}",
        ),
    ),
}

# What the reviewer felt. Here words of the label's side are as frequent as those of the other.
FEELINGS: tuple[int, tuple[str, ...]] = (
    14,
    (
        "I expected nothing and {same_did} it",
        "I expected everything and {same_did} it",
        "I wanted to {other_do} {film} and {same_did} it",
        "{critic} {other_did} {film}, I {same_did} it",
        "nobody could say that I {other_did} {film}",
        "I cannot say that I {other_did} it",
    ),
)
_GRAMMARS = {1: VERDICTS, 2: {**VERDICTS, "feelings": FEELINGS}}

# Other sentences. {any} is {same} in LEANING of a hundred cases, since the parts of a good film
# tend to be good.
LEANING = 70
ASIDES = (
    "{part} is {any}",
    "people tell me that {part} is {any_thing}",
    "I saw it {when} {company}",
    "{when} I went to see it {company}",
    "it is about {hero} who wants {wish}",
    "{hero} and an old enemy both want {wish}",
    "somewhere in the middle {hero} finds {wish}",
)


def name_of(grammar: int) -> str:
    """The name of the corpus that a grammar makes, in NAMES."""
    return "demo" if grammar == GRAMMAR else f"demo-{grammar}"


def _pick(rng: Random, options: list[str] | tuple[str, ...]) -> str:
    # Every Python gives the same numbers for random(); this is not promised of choice().
    return options[int(rng.random() * len(options))]


class _Slots(dict[str, str]):
    """The words that str.format_map puts into the slots of one review, drawn anew each time."""

    def __init__(self, rng: Random, label: int) -> None:
        super().__init__(critic=_pick(rng, CRITICS))  # one review quotes one critic,
        self.films = [*FILMS, _pick(rng, GENRES)]  # and is about one film
        self.rng, self.label = rng, label

    def __missing__(self, slot: str) -> str:
        side, _, kind = slot.partition("_")
        if side in ("same", "other", "any"):
            if side == "any":
                side = "same" if self.rng.random() * 100 < LEANING else "other"
            return _pick(self.rng, _WORDS[kind][self.label if side == "same" else 1 - self.label])
        return _pick(self.rng, {"film": self.films, "part": PARTS, **COLOUR}[slot])


def _verdict(rng: Random, grammar: int) -> str:
    kinds = _GRAMMARS[grammar].values()
    point = rng.random() * sum(share for share, _ in kinds)
    for share, frames in kinds:
        point -= share
        if point < 0:
            return _pick(rng, frames)
    raise AssertionError("a number below the sum of the shares is below one of its parts")


def review(rng: Random, label: int, grammar: int = GRAMMAR) -> str:
    """A review of two to four sentences; one or two of them are verdicts on the film."""
    verdicts = 1 if rng.random() < 0.7 else 2
    asides = 1 + int(rng.random() * 2)
    frames: list[str] = []
    while len(frames) < verdicts + asides:
        frame = _verdict(rng, grammar) if len(frames) < verdicts else _pick(rng, ASIDES)
        if frame not in frames:
            frames.insert(int(rng.random() * (len(frames) + 1)), frame)
    slots = _Slots(rng, label)
    sentences = [frame.format_map(slots) for frame in frames]
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


def corpus(
    seed: int = 0, train: int = 16_000, test: int = 2000, grammar: int = GRAMMAR
) -> tuple[list[str], list[int], list[str], list[int]]:
    """`(train_texts, train_labels, test_texts, test_labels)`: half negative (0), half positive (1).

    Equal arguments give equal texts on every machine. No text occurs twice, so no test text is in
    train.
    """
    rng = Random(seed)
    texts: dict[str, int] = {}
    while len(texts) < train + test:
        label = len(texts) % 2
        text = review(rng, label, grammar)
        if 14 <= len(text.split()) <= 45:
            texts.setdefault(text, label)
    reviews, labels = list(texts), list(texts.values())
    return reviews[:train], labels[:train], reviews[train:], labels[train:]
