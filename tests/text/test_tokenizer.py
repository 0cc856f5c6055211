"""The tokenizer by itself, against Hugging Face `tokenizers` on its own file, and its cache."""

# ruff: noqa: RUF001 - characters that look like others are what this is about

import importlib
import json
import os
import random
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttx.errors import TokenizerError
from fasttx.text.token_cache import encode_cached
from fasttx.text.tokenizer import Tokenizer

REVIEWS = [
    "A great, GREAT film!<br /><br />Don't miss it: 10/10.",
    "a bad film<BR/>it isn't a great film",
    "The café’s “great” ΟΔΟΣ İstanbul 映画 ★★★ naïve 😀😀 don´t",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(REVIEWS)


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \t\n\x00\x1c\x1f\x85\xa0\u2003\u200b\u2028\u3000\ufeff ", []),
        ("Hello, World", "hello , world"),
        ("don't 'tis actors' rock'n'roll ' ''", "don't ' tis actors ' rock'n'roll ' ' '"),
        ("don’t ‘don´t’ “so”", "don't ' don't ' \" so \""),
        ("well-known 9/10 3.5 a_b", "well - known 9 / 10 3 . 5 a _ b"),
        ("one<br />two<br>three<BR/>four<bR\n>five</br>six", "one two three four five six"),
        ("<b>bold</b> <brand> < br >", "< b > bold < / b > < brand > < br >"),
        ("wow...!!", "wow . . . ! !"),
        ("ΟΔΟΣ", "οδοσ"),  # no final sigma
        ("naïve na\u0069\u0308ve", "naïve nai\u0308ve"),
        ("«oui» ¿qué? ¡sí! 5€…", "« oui » ¿ qué ? ¡ sí ! 5 € …"),
        ("映画、最高！", "映画 、 最高 ！"),
        ("great😀😀 ❤\ufe0f★★", "great 😀 😀 ❤ ★ ★"),
        ("wow\x96so\x85", "wow so"),
        ("so👍🏽 👩🏽", "so 👍 🏽 👩 🏽"),
        ("a👨\u200d👩\u200d👧b 🏳\ufe0f\u200d🌈!", "a 👨\u200d👩\u200d👧 b 🏳\u200d🌈 !"),
        ("🏳\u200d🌈 ❤\ufe0f\u200d🔥❤\u200d🔥", "🏳\u200d🌈 ❤\u200d🔥 ❤\u200d🔥"),
        ("🕵🏽\u200d♂\ufe0f👩🏽\u200d🚀", "🕵🏽\u200d♂ 👩🏽\u200d🚀"),
        ("👩\u200d \u200d👩 👩\u200d\u200d👩", "👩 \u200d \u200d 👩 👩 \u200d\u200d 👩"),
        ("👩\u200da\u200db ക്\u200dഷ", "👩 \u200da\u200db ക്\u200dഷ"),  # letters that it joins
        ("caf\udce9 \ud83d", "caf"),  # undecodable bytes, as os.fsdecode gives them
        ("<PAD> <UNK>", "< pad > < unk >"),
    ],
)
def test_words(text, words):
    assert Tokenizer.tokenize(text) == (words.split(" ") if words else [])


def test_every_character_str_split_drops_separates_words():
    for code in range(sys.maxunicode + 1):
        if chr(code).isspace():
            assert Tokenizer.tokenize(f"a{chr(code)}b") == ["a", "b"], hex(code)


# --- vocabulary and ids ---------------------------------------------------------------------------


def test_train_takes_the_most_frequent_words_and_breaks_ties_by_code_point():
    texts = ["b b b a a a", "é d z Z c d"]
    assert Tokenizer.train(texts).vocab == ["<PAD>", "<UNK>", "a", "b", "d", "z", "c", "é"]
    assert Tokenizer.train(texts, vocab_size=5).vocab == ["<PAD>", "<UNK>", "a", "b", "d"]
    assert Tokenizer.train(iter(texts[::-1]), vocab_size=5).vocab[2:] == ["a", "b", "d"]
    assert Tokenizer.train(["a"], vocab_size=2).vocab == ["<PAD>", "<UNK>"]
    assert len(Tokenizer.train([])) == 2


def test_ids():
    tokenizer = Tokenizer(["<PAD>", "<UNK>", "film", "great", "!"])
    assert tokenizer.encode("GREAT film! <PAD>") == [3, 2, 4, 1, 1, 1]
    assert tokenizer.encode("") == []
    assert len(tokenizer.encode("film " * 5000)) == 5000  # nothing is cut off
    assert tokenizer.decode([3, 2, 1, 0, 0]) == "great film <UNK>"
    assert tokenizer.decode(np.array([2, 4], np.int32)) == "film !"
    assert tokenizer.id_to_token(4) == "!"
    assert len(tokenizer) == 5


@pytest.mark.parametrize("token_id", [-1, 5])
def test_an_id_outside_the_vocabulary_is_refused(token_id):
    tokenizer = Tokenizer(["<PAD>", "<UNK>", "film", "great", "!"])
    with pytest.raises(ValueError, match=f"token id {token_id}; expected 0 to 4"):
        tokenizer.decode([2, token_id])


def test_encode_batch_is_encode_of_every_text(tokenizer):
    texts = [*REVIEWS, "", "unknown words", ""]
    ids = tokenizer.encode_batch(texts)
    assert ids.values.dtype == np.int32
    assert ids.offsets.dtype == np.int64
    assert [ids[i].tolist() for i in range(len(ids))] == [tokenizer.encode(t) for t in texts]
    assert ids.values.flags.writeable
    for nothing in ([], ["", ""]):
        ids = tokenizer.encode_batch(nothing)
        assert ids.values.dtype == np.int32
        assert ids.lengths.tolist() == [0] * len(nothing)
    generated = tokenizer.encode_batch(t for t in texts)
    assert len(generated) == len(texts)


def test_what_is_no_string_is_refused_with_its_place(tokenizer, tmp_path):
    bad = ["a", "b", float("nan")]
    for use in (
        Tokenizer.train,
        tokenizer.encode_batch,
        lambda texts: encode_cached(tokenizer, texts, tmp_path),
    ):
        with pytest.raises(TypeError, match=r"texts\[2\] is float nan; expected a str"):
            use(bad)
        with pytest.raises(TypeError, match=r"single str; expected a list of texts"):
            use("a review")
    with pytest.raises(TypeError, match=r"text is bytes b'a'; expected a str"):
        tokenizer.encode(b"a")


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        ([], r"vocab starts with \[\]"),
        (["<UNK>", "<PAD>", "a"], "expected"),
        (["<PAD>", "<UNK>", "a", "b", "a"], "'a' 2 times"),
        (["<PAD>", "<UNK>", 7], r"vocab\[2\] is 7; expected a str"),
    ],
)
def test_a_wrong_vocabulary_is_refused(vocab, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(vocab)


def test_a_vocabulary_without_room_for_the_special_words_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 1; expected at least 2"):
        Tokenizer.train(["a"], vocab_size=1)


# --- tokenizer.json -------------------------------------------------------------------------------


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(str(path))
    assert loaded.vocab == tokenizer.vocab
    assert [loaded.encode(t) for t in REVIEWS] == [tokenizer.encode(t) for t in REVIEWS]
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def damage(content, path, value):
    """`content` with one place changed; the place is named like 'model.type'."""
    content = json.loads(json.dumps(content))
    *parents, last = path.split(".")
    place = content
    for key in parents:
        place = place[key]
    place[last] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("model.type", "BPE", "its model's type is 'BPE'; expected 'WordLevel'"),
        ("model.unk_token", "[UNK]", "its model's unk_token is"),
        ("model", None, "no tokenizer model"),
        ("normalizer", None, "its normalizer is not the one"),
        ("normalizer.normalizers", [{"type": "Lowercase"}], "its normalizer is not the one"),
        ("pre_tokenizer", {"type": "Whitespace"}, "its pre_tokenizer is not the one"),
        ("pre_tokenizer.invert", False, "its pre_tokenizer is not the one"),
        ("post_processor", {"type": "BertProcessing"}, "its post_processor is not the one"),
        ("truncation", {"max_length": 128}, "its truncation is not the one"),
        ("added_tokens", [{"id": 0, "content": "<PAD>"}], "its added_tokens is not the one"),
        ("version", "2.0", "its version is not the one"),
        ("model.vocab", ["<PAD>", "<UNK>"], "no table of words and ids"),
        ("model.vocab", {"<PAD>": 0, "<UNK>": "1"}, "no table of words and ids"),
        ("model.vocab", {"<PAD>": 0, "<UNK>": 1, "a": 3}, "do not have the ids 0 to 2"),
        ("model.vocab", {"<PAD>": 0, "<UNK>": 1, "a": 1}, "do not have the ids 0 to 2"),
        ("model.vocab", {"[PAD]": 0, "[UNK]": 1}, "vocab starts with"),
        ("model.vocab", {}, "vocab starts with"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(tokenizer, tmp_path, where, value, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(damage(tokenizer.to_dict(), where, value))
    with pytest.raises(TokenizerError, match=message) as raised:
        Tokenizer.load(path)
    assert str(path) in str(raised.value)


def test_a_damaged_file_is_refused_by_name(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    whole = path.read_bytes()
    others = [b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b"PK\x03\x04"]
    for content in [whole[:cut] for cut in range(0, len(whole) - 2, 97)] + others:
        path.write_bytes(content)
        with pytest.raises(TokenizerError) as raised:
            Tokenizer.load(path)
        assert str(path) in str(raised.value)
    for path in (tmp_path, tmp_path / "missing.json"):
        with pytest.raises(TokenizerError, match=path.name):
            Tokenizer.load(path)


# --- Hugging Face ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def huggingface(tokenizer, tmp_path_factory):
    """tokenizer -> the same in Hugging Face's library, through tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("huggingface")

    def read(ours):
        ours.save(folder / "tokenizer.json")
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    return read


@pytest.fixture(scope="module")
def theirs(tokenizer, huggingface):
    return huggingface(tokenizer)


def words_by(theirs, text):
    """Their words before the vocabulary, where a difference cannot hide behind <UNK>."""
    pieces = theirs.pre_tokenizer.pre_tokenize_str(theirs.normalizer.normalize_str(text))
    return [word for word, _ in pieces]


def character_for_fuzz(code):
    """The character, or None where Python and Rust may know different versions of Unicode.

    Characters younger than Unicode 3.2 stand in lower case, since one side may not know it.
    """
    character = chr(code)
    if unicodedata.category(character) in ("Cn", "Cs"):
        return None
    old = unicodedata.ucd_3_2_0.category(character) != "Cn"
    return character if old else character.lower()


ALPHABET = [c for c in map(character_for_fuzz, range(sys.maxunicode + 1)) if c]
# Where the two sides have most to disagree about.
TRAPS = [
    *"aZ09_'’‘´“”\"<>/- \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x00\x7f\x85\xa0\xad",
    *"ΣσςİıßẞſKÅǅDžŉΐᾳᾼ\u0301\u0307\u0345\u0308\u200b\u200c\u200d\u2028\u2060\u3000\ufeff\ufe0f",
    *"«»¡¿…‐—•€★❤映画、！ｆＦ가😀👍🏽🇫🇷𝔘𐐀👩👧🚀♂🏳🌈",
    "👩\u200d👩\u200d👧", "👩🏽\u200d🚀", "❤\ufe0f\u200d🔥", "🕵\ufe0f\u200d♂\ufe0f", "\u200d👩",
    "<br />", "<BR>", "<bR/>", "</br>", "<br", "br/>", "<PAD>", "<UNK>", "don't", "ΟΔΟΣ", "İ'İ",
]  # fmt: skip


def test_every_character_alone_and_inside_a_word(theirs):
    # Private-use characters are all alike: one in fifty of them.
    characters = [
        c for i, c in enumerate(ALPHABET) if i % 50 == 0 or unicodedata.category(c[0]) != "Co"
    ]
    for start in range(0, len(characters), 2000):
        text = " ".join(f"{c} a{c}b" for c in characters[start : start + 2000])
        assert Tokenizer.tokenize(text) == words_by(theirs, text)


@settings(derandomize=True, database=None, deadline=None, max_examples=400)
@given(st.lists(st.sampled_from(TRAPS) | st.sampled_from(ALPHABET), max_size=40).map("".join))
def test_words_are_theirs_too(theirs, text):
    assert Tokenizer.tokenize(text) == words_by(theirs, text)


PIECES = st.sampled_from("👩🏽🚀❤♂🏳a'.\ufe0f\ufe0f\u200d\u200d\u200d ")


@pytest.mark.parametrize("joined", [True, False])
@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(st.lists(PIECES, max_size=30).map("".join))
def test_joined_emoji_are_theirs_too(huggingface, joined, text):
    ours = Tokenizer(["<PAD>", "<UNK>"], joined_emoji=joined)
    if joined not in _theirs:
        _theirs[joined] = huggingface(ours)
    assert ours.tokenize(text) == words_by(_theirs[joined], text)


_theirs = {}


def test_an_older_tokenizer_keeps_its_rules(huggingface, tmp_path):
    """Its model has learnt the words that it was given."""
    text = "a family 👩\u200d👩\u200d👧 it is ❤\ufe0f\u200d🔥"
    older = Tokenizer(["<PAD>", "<UNK>", "a", "👩", "\u200d", "👧", "❤"], joined_emoji=False)
    path = tmp_path / "tokenizer.json"
    for _ in range(2):  # a run that starts from it writes it again
        older.save(path)
        older = Tokenizer.load(path)
    assert older.tokenize(text) == "a family 👩 \u200d 👩 \u200d 👧 it is ❤ \u200d 🔥".split(" ")
    assert older.encode(text) == [2, 1, 3, 4, 3, 4, 5, 1, 1, 6, 4, 1]
    assert older.encode_batch([text])[0].tolist() == older.encode(text)
    assert huggingface(older).encode(text).ids == older.encode(text)
    newer = Tokenizer(older.vocab)
    newer.save(path)
    newer = Tokenizer.load(path)
    assert newer.encode(text) == [2, 1, 1, 1, 1, 1] and newer.tokenize("❤\u200d🔥") == ["❤\u200d🔥"]
    first = encode_cached(older, [text], tmp_path)
    assert not same(first, encode_cached(newer, [text], tmp_path))
    assert same(first, encode_cached(older, [text], tmp_path))


def test_ids_are_theirs_too(huggingface):
    rng = random.Random(0)
    texts = ["".join(rng.choices(TRAPS, k=rng.randrange(60))) for _ in range(500)]
    ours = Tokenizer.train([*texts, *REVIEWS], vocab_size=300)
    theirs = huggingface(ours)
    batch = ours.encode_batch([*texts, *REVIEWS])
    for i, text in enumerate([*texts, *REVIEWS]):
        assert batch[i].tolist() == theirs.encode(text).ids, text
    assert theirs.get_vocab_size() == len(ours) == 300
    assert (batch.values > 1).any()


def test_special_words_in_a_text_are_ordinary_words(tokenizer, theirs):
    ours = Tokenizer(["<PAD>", "<UNK>", "<", "pad", ">"])
    assert ours.encode("<PAD><UNK> <pad>") == [2, 3, 4, 2, 1, 4, 2, 3, 4]
    text = "film <PAD> film <UNK> film"
    assert tokenizer.encode(text) == theirs.encode(text).ids


def test_they_pad_with_our_pad(tokenizer, theirs):
    short, long = theirs.encode_batch(["great", "a great film"])
    assert short.ids == [*tokenizer.encode("great"), 0, 0]
    assert short.attention_mask == [1, 0, 0]
    assert long.attention_mask == [1, 1, 1]


@pytest.mark.parametrize(
    "text",
    [
        "a" * 300_000,
        "a'" * 150_000,
        "<br" + " " * 300_000,
        "'" * 300_000,
        "👩\u200d" * 50_000,
        "🏽" * 100_000 + "\u200d",
        "🏽\ufe0f\u200d" * 50_000,
    ],
)
def test_one_long_word(theirs, text):
    assert Tokenizer.tokenize(text) == words_by(theirs, text)


def test_a_file_that_they_wrote_again_is_read(tokenizer, huggingface, tmp_path):
    path = tmp_path / "tokenizer.json"
    theirs = huggingface(tokenizer)
    theirs.save(str(path))
    assert Tokenizer.load(path).vocab == tokenizer.vocab
    theirs.no_padding()
    theirs.decoder = importlib.import_module("tokenizers").decoders.Fuse()
    theirs.save(str(path))
    assert Tokenizer.load(path).vocab == tokenizer.vocab
    theirs.enable_truncation(8)  # from here on the ids of a text are others
    theirs.save(str(path))
    with pytest.raises(TokenizerError, match="its truncation"):
        Tokenizer.load(path)


def test_real_reviews(imdb, huggingface):
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = {
        split: parquet.read_table(imdb / f"{split}.parquet", columns=["text"])["text"].to_pylist()
        for split in ("train", "test")
    }
    ours = Tokenizer.train(texts["train"][::10])
    assert len(ours) == 10_000
    theirs = huggingface(ours)
    for sample in (texts["train"][::25], texts["test"][::25]):
        batch = ours.encode_batch(sample)
        for i, text in enumerate(sample):
            assert batch[i].tolist() == theirs.encode(text).ids


# --- the cache ------------------------------------------------------------------------------------


def same(a, b):
    return np.array_equal(a.values, b.values) and np.array_equal(a.offsets, b.offsets)


@pytest.fixture
def encodings(monkeypatch):
    """How often texts were really encoded."""
    calls = []
    encode = Tokenizer.encode_batch

    def counted(self, texts):
        calls.append(texts)
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", counted)
    return calls


def test_the_second_time_the_ids_come_from_disk(tokenizer, tmp_path, encodings):
    first = encode_cached(tokenizer, REVIEWS, tmp_path)
    second = encode_cached(Tokenizer(tokenizer.vocab), tuple(REVIEWS), str(tmp_path))
    assert len(encodings) == 1
    assert same(first, second)
    assert same(first, tokenizer.encode_batch(REVIEWS))
    assert (second.values.dtype, second.offsets.dtype) == (np.int32, np.int64)
    (file,) = (tmp_path / "tokens").iterdir()
    assert file.suffix == ".npz"


def test_other_texts_and_other_vocabularies_are_other_entries(tokenizer, tmp_path, encodings):
    asked = [
        (tokenizer, ["ab", "c"]),
        (tokenizer, ["a", "bc"]),
        (tokenizer, ["abc"]),
        (tokenizer, ["ab", "c", ""]),
        (tokenizer, []),
        (tokenizer, ["caf\udce9"]),
        (Tokenizer(["<PAD>", "<UNK>", "ab", "c"]), ["ab", "c"]),
        (Tokenizer(["<PAD>", "<UNK>", "c", "ab"]), ["ab", "c"]),
    ]
    for _ in range(2):
        for which, texts in asked:
            assert same(encode_cached(which, texts, tmp_path), which.encode_batch(texts))
    assert len(encodings) == len(asked) + 2 * len(asked)


def test_a_damaged_cache_file_is_written_anew(tokenizer, tmp_path, encodings):
    wanted = encode_cached(tokenizer, REVIEWS, tmp_path)
    (file,) = (tmp_path / "tokens").iterdir()
    whole = file.read_bytes()

    def npz(**arrays):
        with open(file, "wb") as f:
            np.savez(f, **arrays)

    values, offsets = wanted.values, wanted.offsets
    damages = [
        lambda: file.write_bytes(b""),
        lambda: file.write_bytes(whole[: len(whole) // 2]),
        lambda: file.write_bytes(whole.replace(values.tobytes(), values[::-1].tobytes())),
        lambda: npz(values=values),
        lambda: npz(values=values.astype(np.int64), offsets=offsets),
        lambda: npz(values=values[:-1], offsets=offsets),
        lambda: npz(values=values, offsets=offsets[:-1]),
        lambda: npz(values=values, offsets=offsets[[0, 3]]),
        lambda: npz(values=values, offsets=offsets[[0, 2, 1, 3]]),
        lambda: npz(values=values + len(tokenizer), offsets=offsets),
        lambda: npz(values=values - len(tokenizer), offsets=offsets),
        lambda: npz(values=np.array([print], object), offsets=offsets),
    ]
    for i, damage_it in enumerate(damages):
        damage_it()
        assert same(encode_cached(tokenizer, REVIEWS, tmp_path), wanted)
        assert len(encodings) == 2 + i, "the damaged file was used"
        assert file.read_bytes()[:2] == b"PK"
    assert same(encode_cached(tokenizer, REVIEWS, tmp_path), wanted)
    assert len(encodings) == 1 + len(damages)


def test_a_cache_that_cannot_be_written_is_no_error(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    wanted = tokenizer.encode_batch(REVIEWS)
    assert same(encode_cached(tokenizer, REVIEWS, tmp_path / "file"), wanted)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert same(encode_cached(tokenizer, REVIEWS, tmp_path), wanted)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_the_cache_keeps_the_twenty_files_used_last(tokenizer, tmp_path, encodings):
    encode_cached(tokenizer, ["first"], tmp_path)
    for age, file in enumerate((tmp_path / "tokens").iterdir()):
        os.utime(file, (1000 + age, 1000 + age))
    encode_cached(tokenizer, ["first"], tmp_path)  # used again: young again
    for i in range(24):
        encode_cached(tokenizer, [f"text {i}"], tmp_path)
        for file in (tmp_path / "tokens").iterdir():  # as if a second had passed
            seconds = file.stat().st_mtime - 1
            os.utime(file, (seconds, seconds))
        if i == 15:
            encode_cached(tokenizer, ["first"], tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 20
    assert len(encodings) == 25
    encode_cached(tokenizer, ["first"], tmp_path)
    encode_cached(tokenizer, ["text 23"], tmp_path)
    assert len(encodings) == 25
    encode_cached(tokenizer, ["text 0"], tmp_path)
    assert len(encodings) == 26


def test_where_the_cache_lies(tokenizer, tmp_path, monkeypatch):
    for name in ("FASTTX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    encode_cached(tokenizer, REVIEWS)
    assert len(list((tmp_path / "home/.cache/fasttx/tokens").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    encode_cached(tokenizer, REVIEWS)
    assert len(list((tmp_path / "xdg/fasttx/tokens").iterdir())) == 1
    monkeypatch.setenv("FASTTX_CACHE", str(tmp_path / "own"))
    encode_cached(tokenizer, REVIEWS)
    assert len(list((tmp_path / "own/tokens").iterdir())) == 1
