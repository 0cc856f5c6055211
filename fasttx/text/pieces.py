"""Texts to ids by a pretrained encoder's own tokenizer.json, read by Hugging Face `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fasttx.errors import TokenizerError
from fasttx.files import write_json_atomic
from fasttx.text.packing import RaggedIds
from fasttx.text.tokenizer import SpecialTokens, Tokenizer, checked_texts

_AT_ONCE = 1000  # texts, whose encodings take some ten times the memory of their ids


class PieceTokenizer:
    """Word pieces (WordPiece, BPE or Unigram). `encode` gives the pieces of a text alone: what the
    encoder expects around them is `special.before` and `special.after`.

    No text is read as a special token: a "[SEP]" that somebody typed is three pieces, or unknown.
    """

    def __init__(self, content: str, path: str | Path = "tokenizer.json") -> None:
        """content: of a tokenizer.json; path: for messages. Raises TokenizerError for another
        content, and for a tokenizer without a padding token or a token for unknown words."""
        try:
            import tokenizers
        except ImportError as error:
            raise TokenizerError(
                f"{path} needs the package tokenizers, which is not installed: "
                "pip install 'fasttx[hf]'"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # Rust's errors have no type of their own
            raise TokenizerError(
                f"{path} is no tokenizer.json, or damaged or cut short ({error}). Fetch it anew"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.special = self._special_tokens(path)

    @classmethod
    def load(cls, path: str | Path) -> PieceTokenizer:
        """Raises TokenizerError for a file that is missing or holds something else."""
        return cls(_text_of(path), path)

    def _special_tokens(self, path: str | Path) -> SpecialTokens:
        tokenizer = self._tokenizer
        special = {
            token.content: number
            for number, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        found = {_bare(content): number for content, number in special.items()}
        unknown = getattr(tokenizer.model, "unk_token", None)
        number = tokenizer.token_to_id(unknown) if unknown else found.get("unk")
        if "pad" not in found:
            raise _lacks(path, "padding", "pad")
        if number is None:
            raise _lacks(path, "unknown", "unk")
        # As the encoder was trained: what stands before and after a text.
        some = tokenizer.encode("a", add_special_tokens=False).ids
        framed = tokenizer.encode("a").ids
        at = next((i for i in range(len(framed)) if framed[i : i + len(some)] == some), len(framed))
        before, after = framed[:at], framed[at + len(some) :]
        self._unknown = number
        self.pad_token = next(c for c, i in special.items() if i == found["pad"])
        self.unk_token = self.id_to_token(number)
        reserved = sorted({*special.values(), number})
        return SpecialTokens(
            found.get("mask", number), tuple(before), tuple(after), tuple(reserved), 0
        )

    def encode(self, text: str) -> list[int]:
        """The ids of all pieces of `text`; nothing is cut off or added."""
        return [int(i) for i in self.encode_batch([text]).values]

    def encode_batch(self, texts: Iterable[str]) -> RaggedIds:
        """`encode` of every text. Raises TypeError, with the index, for a text that is no str."""
        lists: list[np.ndarray] = []
        remaining = map(_sound, checked_texts(texts))
        while some := list(islice(remaining, _AT_ONCE)):
            encoded = self._tokenizer.encode_batch_fast(some, add_special_tokens=False)
            lists += [np.array(e.ids, dtype=np.int32) for e in encoded]
        offsets = np.zeros(len(lists) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in lists], out=offsets[1:])
        values = np.concatenate(lists) if lists else np.zeros(0, np.int32)
        # Unigram's pieces hold the special tokens too.
        values[np.isin(values, self.special.reserved)] = self._unknown
        return RaggedIds(values, offsets)

    def words(self, text: str) -> tuple[list[str], np.ndarray]:
        """The words of `text` as it writes them, and (pieces,) int64, the word of each piece."""
        text = _sound(text)
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        # A piece of no word (a tokenizer may add one) stands for itself.
        owners = [-1 - i if w is None else w for i, w in enumerate(encoded.word_ids)]
        spans: dict[int, tuple[int, int]] = {}
        for owner, (first, last) in zip(owners, encoded.offsets, strict=True):
            begin, end = spans.get(owner, (first, last))
            spans[owner] = min(begin, first), max(end, last)
        order = {owner: i for i, owner in enumerate(spans)}
        shown = [text[first:last].strip() for first, last in spans.values()]
        return shown, np.array([order[owner] for owner in owners], dtype=np.int64)

    def id_to_token(self, token_id: int) -> str:
        """Raises ValueError for an id that is not in the vocabulary."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:
            raise ValueError(f"token id {token_id}; expected 0 to {len(self) - 1}")
        return token

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        return str(self._tokenizer.decode(list(ids)))

    def __len__(self) -> int:
        """Rows that an embedding needs: one more than the largest id."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def __repr__(self) -> str:
        return f"PieceTokenizer({len(self)} pieces)"

    def to_dict(self) -> dict[str, Any]:
        """The content of tokenizer.json, without truncation and padding, which are fasttx' own."""
        content: dict[str, Any] = json.loads(self._tokenizer.to_str())
        return content

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, whole or not at all."""
        write_json_atomic(path, self.to_dict())

    def __getstate__(self) -> dict[str, Any]:
        return {"content": self._tokenizer.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


AnyTokenizer = Tokenizer | PieceTokenizer


def read_tokenizer(path: str | Path) -> AnyTokenizer:
    """The tokenizer of a run: of words, or a pretrained encoder's. Raises TokenizerError."""
    try:
        kind = json.loads(Path(path).read_bytes())["model"]["type"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        kind = "WordLevel"  # whose reader says what is wrong
    return Tokenizer.load(path) if kind == "WordLevel" else PieceTokenizer.load(path)


def _lacks(path: str | Path, name: str, short: str) -> TokenizerError:
    return TokenizerError(
        f"{path} has no {name} token; expected one among its added_tokens, such as "
        f"[{short.upper()}] or <{short}>. In Python `tokenizer.save_pretrained(folder)` of "
        "transformers writes it, once the tokenizer has one"
    )


def _text_of(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise TokenizerError(
            f"{path} does not exist; expected the tokenizer.json of the encoder. In Python "
            "`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` of transformers "
            "writes it"
        ) from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is no tokenizer.json ({error}). Fetch it anew") from error


def _bare(token: str) -> str:
    """`mask` of [MASK] and of <mask>."""
    return token.strip("[]<>|").lower()


def _sound(text: str) -> str:
    """`text`, with U+FFFD for lone surrogates, which UTF-8 cannot hold."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
