"""Token ids on disk, by a hash of the tokenizer and the texts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import unicodedata
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from fasttx.files import atomic_write, cache_folder
from fasttx.text.packing import RaggedIds
from fasttx.text.pieces import AnyTokenizer
from fasttx.text.tokenizer import checked_texts

_CACHE_FORMAT = "fasttx-tokens-1"
_CACHE_FILES = 20  # the ids of IMDB's 25,000 training reviews are 27 MB


def encode_cached(
    tokenizer: AnyTokenizer, texts: Sequence[str], cache_dir: str | Path | None = None
) -> RaggedIds:
    """`tokenizer.encode_batch(texts)`, read from disk if it was computed before.

    The cache is the folder `tokens` of `cache_dir` (default: `fasttx.files.cache_folder`). It has
    one file for each vocabulary and list of texts (by SHA-256) and keeps the 20 used last. A
    damaged file is written anew. Where the cache cannot be written, nothing is cached.
    """
    key = _cache_key(tokenizer, texts)
    try:
        folder = (Path(cache_dir) if cache_dir else cache_folder()) / "tokens"
    except RuntimeError:  # there is no home folder
        return tokenizer.encode_batch(texts)
    path = folder / f"{key}.npz"
    ids = _read_ids(path, len(texts), len(tokenizer))
    if ids is None:
        ids = tokenizer.encode_batch(texts)
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as f:
                np.savez(f, values=ids.values, offsets=ids.offsets)
    with contextlib.suppress(OSError):
        os.utime(path)
        by_use = sorted(folder.glob("*.npz"), key=lambda p: p.stat().st_mtime, reverse=True)
        for old in by_use[_CACHE_FILES:]:
            old.unlink()
    return ids


def _cache_key(tokenizer: AnyTokenizer, texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    rules = json.dumps(tokenizer.to_dict())
    # What lower case is depends on Python's Unicode tables.
    head = (_CACHE_FORMAT, unicodedata.unidata_version, rules)
    for part in chain(head, checked_texts(texts)):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _read_ids(path: Path, texts: int, vocab_size: int) -> RaggedIds | None:
    """The ids in a cache file; None if it is missing, damaged or does not fit."""
    try:
        with open(path, "rb") as f, np.load(f, allow_pickle=False) as content:
            ids = RaggedIds(content["values"], content["offsets"])
    except Exception:  # a damaged file raises anything, and all of it can be computed again
        return None
    sound = (
        ids.values.dtype == np.int32
        and ids.offsets.dtype == np.int64
        and ids.values.ndim == 1
        and ids.offsets.shape == (texts + 1,)
        and ids.offsets[0] == 0
        and ids.offsets[-1] == len(ids.values)
        and bool((ids.lengths >= 0).all())
        and bool((ids.values >= 0).all())
        and bool((ids.values < vocab_size).all())
    )
    return ids if sound else None
