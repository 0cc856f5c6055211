"""Words to ids: a word-level vocabulary, kept in a tokenizer.json that Hugging Face reads too.

`tokenizers.Tokenizer.from_file` gives the same ids for every text. Python and Oniguruma differ in
\\w, \\s and in lower case, so each character class is spelled out here and written to the file.
(Only capitals that the Unicode tables of one side lack can come out differently.)
"""

from __future__ import annotations

import functools
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasttx.errors import TokenizerError
from fasttx.files import write_json_atomic
from fasttx.text.packing import RaggedIds

PAD, UNK = "<PAD>", "<UNK>"
PAD_ID, UNK_ID = 0, 1


class SpecialTokens(NamedTuple):
    """The ids of a tokenizer that are no words.

    mask: stands for some word; before, after: what a model expects around each sequence; reserved:
    what is neither hidden from the model nor replaced; first_word: words are drawn from there on.
    """

    mask: int = UNK_ID
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    reserved: tuple[int, ...] = (PAD_ID, UNK_ID)
    first_word: int = UNK_ID + 1


WORDS_ONLY = SpecialTokens()

# Between words: control characters, white space, characters of no width. (Dashes of badly decoded
# Windows-1252 pages lie in U+0080-U+009F.)
_SPACE = (
    "0000-0020 007f-00a0 00ad 1680 180e 2000-200b 200e-200f 2028-202f 205f-206f 3000 fe00-fe0f feff"
)
# Words of one character: punctuation, currency signs, symbols, emoji. All others form words.
_MARK = (
    "0021-002f 003a-0040 005b-0060 007b-007e 00a1-00a9 00ab-00ac 00ae-00b1 00b4 00b6-00b8 00bb "
    "00bf 00d7 00f7 2010-2027 2030-205e 20a0-20cf 2190-2bff 2e00-2e7f 3001-3003 3008-3011 "
    "3014-301f 3030 fe30-fe6f ff01-ff0f ff1a-ff20 ff3b-ff40 ff5b-ff65 1f000-1faff"
)


def _character_class(ranges: str) -> str:
    """The inside of [...]. Python, Oniguruma and JavaScript share the escape \\uHHHH, and none for
    characters beyond U+FFFF."""

    def character(code: str) -> str:
        return rf"\u{code}" if len(code) == 4 else chr(int(code, 16))

    return "".join("-".join(map(character, r.split("-"))) for r in ranges.split())


def _words(space: str, mark: str) -> str:
    letter = f"[^{space}{mark}]"
    return f"{letter}+(?:'{letter}+)*|[{mark}]"


# Emoji, each perhaps with a tone of skin, joined by U+200D to one: a family, a rainbow flag.
_JOINER, _EMOJI = "\u200d", _character_class("2190-2bff 1f000-1faff")
_TONED = f"[{_EMOJI}][{_character_class('1f3fb-1f3ff')}]?"
_JOINED = rf"{_TONED}(?:\u200d{_TONED})+"

# Regular expressions and their replacements, for lower-case text.
_QUOTES = ((r"[\u2018\u2019\u00b4]", "'"), (r"[\u201c\u201d]", '"'))
_STYLE = (rf"(?<=[{_EMOJI}])\ufe0f(?=\u200d)", "")  # written or not, it is the same joined emoji
_BREAK = (r"</?br[\u0009-\u000d\u0020]*/?>", " ")
_WORDS = _words(_character_class(_SPACE), _character_class(_MARK))

_straighten = [(re.compile(pattern).sub, by) for pattern, by in _QUOTES]
_drop_styles, _drop_breaks = re.compile(_STYLE[0]).sub, re.compile(_BREAK[0]).sub
# A Python string may hold lone surrogates (undecodable bytes); UTF-8 text cannot.
_ours = _words(_character_class(_SPACE + " d800-dfff"), _character_class(_MARK))
_find_words, _find_joined = re.compile(_ours).findall, re.compile(f"{_JOINED}|{_ours}").findall


def _words_of(text: str, joined_emoji: bool = True) -> list[str]:
    """The words of `text`, whether in the vocabulary or not."""
    if not isinstance(text, str):
        raise TypeError(f"text is {_describe(text)}; expected a str")
    # Python makes a Σ at the end of a word ς. Rust lower-cases each character by itself.
    text = text.replace("\u03a3", "\u03c3").lower()
    if not text.isascii():
        for sub, by in _straighten:
            text = sub(by, text)
    joined = joined_emoji and _JOINER in text
    if joined:
        text = _drop_styles(_STYLE[1], text)
    if "<" in text:
        text = _drop_breaks(_BREAK[1], text)
    return _find_joined(text) if joined else _find_words(text)


class Tokenizer:
    """Text to ids by whole words. A word that is not in `vocab` becomes <UNK>.

    Text is lower-cased, <br> tags are dropped, punctuation marks are words of their own, and a
    word may contain apostrophes (don't). No text is read as the tokens <PAD> or <UNK>.
    """

    special = SpecialTokens()
    # Of a text: its words, whether in the vocabulary or not.
    tokenize: Callable[[str], list[str]] = staticmethod(_words_of)

    def __init__(self, vocab: Sequence[str], *, joined_emoji: bool = True) -> None:
        """`vocab[i]` is the word with id i, after <PAD> 0 and <UNK> 1. Raises ValueError.

        joined_emoji: emoji joined by U+200D are one word. For older tokenizers they are several.
        """
        self.joined_emoji = joined_emoji
        if not joined_emoji:
            self.tokenize = functools.partial(_words_of, joined_emoji=False)
        self.vocab: list[str] = list(vocab)
        if self.vocab[:2] != [PAD, UNK]:
            raise ValueError(f"vocab starts with {self.vocab[:2]!r}; expected {[PAD, UNK]!r}")
        for i, word in enumerate(self.vocab):
            if not isinstance(word, str):
                raise ValueError(f"vocab[{i}] is {word!r}; expected a str")
        self._ids = {word: i for i, word in enumerate(self.vocab)}
        if len(self._ids) < len(self.vocab):
            twice, count = Counter(self.vocab).most_common(1)[0]
            raise ValueError(f"vocab holds {twice!r} {count} times; expected every word once")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 10_000) -> Tokenizer:
        """The `vocab_size` - 2 most frequent words of `texts` (fewer where there are fewer).

        Among equally frequent words, the order of code points decides.
        """
        if vocab_size < 2:
            raise ValueError(f"vocab_size is {vocab_size}; expected at least 2 (<PAD> and <UNK>)")
        counts: Counter[str] = Counter()
        for text in checked_texts(texts):
            counts.update(cls.tokenize(text))
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return cls([PAD, UNK, *(word for word, _ in ranked[: vocab_size - 2])])

    def encode(self, text: str) -> list[int]:
        """The ids of all words of `text`; nothing is cut off or added."""
        return list(map(self._ids.get, self.tokenize(text), repeat(UNK_ID)))

    def encode_batch(self, texts: Iterable[str]) -> RaggedIds:
        """`encode` of every text. Raises TypeError, with the index, for a text that is no str."""
        values, offsets = array("i"), array("q", [0])
        for text in checked_texts(texts):
            values.extend(map(self._ids.get, self.tokenize(text), repeat(UNK_ID)))
            offsets.append(len(values))
        return RaggedIds(np.array(values, np.int32), np.array(offsets, np.int64))

    def words(self, text: str) -> tuple[list[str], np.ndarray]:
        """The words of `text` as they are shown, and the word of each id: as many, in order."""
        words = self.tokenize(text)
        return words, np.arange(len(words))

    def id_to_token(self, token_id: int) -> str:
        """The word with this id. Raises ValueError for an id that is not in the vocabulary."""
        if not 0 <= token_id < len(self.vocab):
            raise ValueError(f"token id {token_id}; expected 0 to {len(self.vocab) - 1}")
        return self.vocab[token_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The words of `ids` with spaces between them; padding is left out."""
        return " ".join(word for word in map(self.id_to_token, ids) if word != PAD)

    def __len__(self) -> int:
        return len(self.vocab)

    def __repr__(self) -> str:
        return f"Tokenizer({len(self)} words)"

    def to_dict(self) -> dict[str, Any]:
        """The content of tokenizer.json, as Hugging Face `tokenizers` defines it."""
        rules = (*_QUOTES, _STYLE, _BREAK) if self.joined_emoji else (*_QUOTES, _BREAK)
        replace = [
            {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
            for pattern, content in rules
        ]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": {
                "strategy": "BatchLongest",
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": PAD_ID,
                "pad_type_id": 0,
                "pad_token": PAD,
            },
            # Empty: a "<PAD>" that a reviewer typed is three words, for both readers.
            "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *replace]},
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": f"{_JOINED}|{_WORDS}" if self.joined_emoji else _WORDS},
                "behavior": "Removed",
                "invert": True,
            },
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": self._ids, "unk_token": UNK},
        }

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, whole or not at all."""
        write_json_atomic(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json that `save` wrote; Hugging Face `tokenizers` may have rewritten it.

        Raises TokenizerError for any other file, also for a tokenizer.json with other rules than
        those of this class, now or in an older version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise TokenizerError(f"{path} does not exist; expected a tokenizer.json") from error
        except (OSError, ValueError, RecursionError) as error:
            raise TokenizerError(
                f"{path} is no tokenizer.json, or damaged or cut short ({error})"
            ) from error
        try:
            vocab, joined_emoji = _read(content)
            return cls(vocab, joined_emoji=joined_emoji)
        except ValueError as error:
            raise TokenizerError(
                f"{path} is not a tokenizer that fasttx wrote: {error}. "
                "Use the tokenizer.json of the run, or train a tokenizer anew"
            ) from error


def _read(content: Any) -> tuple[list[str], bool]:
    """The words of a tokenizer.json in the order of their ids, and whether it joins emoji;
    ValueError if its rules are none of ours."""
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise ValueError("it holds no tokenizer model")
    older = Tokenizer([PAD, UNK], joined_emoji=False).to_dict()
    joined_emoji = content.get("pre_tokenizer") != older["pre_tokenizer"]
    rules = Tokenizer([PAD, UNK]).to_dict() if joined_emoji else older
    for key in ("type", "unk_token"):
        if model.get(key) != rules["model"][key]:
            raise ValueError(
                f"its model's {key} is {model.get(key)!r}; expected {rules['model'][key]!r}"
            )
    # `padding` and `decoder` do not affect the ids of a text.
    for key in sorted(rules.keys() - {"model", "padding", "decoder"}):
        if content.get(key) != rules[key]:
            raise ValueError(f"its {key} is not the one that this version of fasttx writes")
    ids = model.get("vocab")
    if not isinstance(ids, dict) or any(type(i) is not int for i in ids.values()):
        raise ValueError("its model's vocab is no table of words and ids")
    vocab = sorted(ids, key=ids.__getitem__)
    if [ids[word] for word in vocab] != list(range(len(vocab))):
        raise ValueError(f"its {len(vocab)} words do not have the ids 0 to {len(vocab) - 1}")
    return vocab, joined_emoji


def _describe(value: object) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"


def checked_texts(texts: Iterable[str]) -> Iterator[str]:
    if isinstance(texts, str):
        raise TypeError("texts is a single str; expected a list of texts: [text]")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{i}] is {_describe(text)}; expected a str")
        yield text
