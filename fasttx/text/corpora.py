"""Datasets by name or path: files, IMDB through `datasets`, the demo corpus."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttx.config import SINGLE_LABEL
from fasttx.errors import DataError
from fasttx.files import cache_folder
from fasttx.text import demo
from fasttx.text.cells import some
from fasttx.text.disk import is_file, located, reason
from fasttx.text.folders import SPLITS, UNLABELLED_SPLITS, Corpus, folder_corpus, name_of
from fasttx.text.stored import STORED_FROM, StoredTexts
from fasttx.text.tables import Columns, Rows, Table, table_rows, table_texts
from fasttx.text.textfiles import KINDS, file_rows, kind_of, needs

ENVIRONMENT = "FASTTX_DATA"
HUB_NAME = "stanfordnlp/imdb"
HUB_SECONDS = 3.0  # `datasets` itself waits minutes for a hub that cannot be reached


@dataclass(frozen=True)
class Source:
    """A resolved --dataset: `imdb`, `demo`, or an absolute path. `notes`: why, for people."""

    name: str
    notes: tuple[str, ...] = ()


def resolve(dataset: str) -> Source:
    """Choose for `auto`, and check that a path exists. Raises DataError.

    `auto` is $FASTTX_DATA where that is set, else IMDB where it is cached or the hub can be
    reached, else the built-in corpus.
    """
    if dataset == "imdb" or dataset in demo.NAMES:
        return Source(dataset)
    if dataset == IN_PYTHON:
        if not _held:
            raise DataError(
                "it was trained on an object in Python, which is not here: go on with it by "
                "fasttx.train(dataset, resume=...)"
            )
        return Source(dataset)
    if dataset != "auto":
        path = located(dataset) if dataset.strip() else None
        if path is None:
            raise DataError(
                f"dataset is {dataset!r}: there is no such file or folder; expected auto, imdb, "
                "demo, or the path of a folder or file"
            )
        return Source(str(path))
    if named := os.environ.get(ENVIRONMENT):
        path = located(named)
        if path is None:
            raise DataError(
                f"{ENVIRONMENT} is {named!r}: there is no such file or folder; set it to the "
                "folder or file with the dataset, or unset it"
            )
        return Source(str(path), (f"dataset auto: {named}, named by {ENVIRONMENT}",))
    try:
        hub_imdb()
    except Unavailable as reason:
        return Source("demo", _unmissable(str(reason)))
    return Source("imdb", (f"dataset auto: {HUB_NAME}",))


def _unmissable(reason: str) -> tuple[str, ...]:
    text = (
        f"IMDB could not be had ({reason}): training on the built-in DEMO corpus; its accuracy "
        "says nothing about IMDB. To train on your own copy, set FASTTX_DATA to its folder."
    )
    return ("*" * 96, *(f"*  {line:90}  *" for line in textwrap.wrap(text, 90)), "*" * 96)


def read_corpus(name: str, columns: Columns) -> Corpus:
    """The dataset of a resolved `name`. Raises DataError."""
    if name in demo.NAMES:
        return _demo_corpus(demo.NAMES[name], columns)
    if name == "imdb":
        try:
            found = hub_imdb()
        except Unavailable as error:
            raise DataError(
                f"IMDB could not be had: {error}. Connect to the network once, or pass the folder "
                "of a copy (--dataset PATH), or use the built-in corpus (--dataset demo)"
            ) from error
        return _datasets_corpus("imdb", HUB_NAME, found, columns)
    if name == IN_PYTHON:
        info = getattr(next(iter(_held.values())), "info", None)
        return _datasets_corpus(
            getattr(info, "dataset_name", None) or "dataset", "the dataset", dict(_held), columns
        )
    path = Path(name)
    if is_file(path):
        kind = kind_of(path)
        if kind is None:
            raise DataError(
                f"{path} is of an unknown kind; expected {', '.join(KINDS)}, or a folder"
            )
        splits = {"train": lambda: file_rows([path], columns)}
        return Corpus(path.name[: -len(kind)] or path.name, str(path), splits)
    if is_file(path / "dataset_dict.json") or is_file(path / "state.json"):
        found = _saved_splits(path)
        return _datasets_corpus(name_of(path), str(path), found, columns)
    return folder_corpus(path, columns)


# --- objects in Python ----------------------------------------------------------------------------

IN_PYTHON = "a dataset in Python"  # what config.json has instead of a path
_held: dict[str, Any] = {}


@contextlib.contextmanager
def holding(dataset: Any) -> Iterator[str | None]:
    """Inside, `dataset` can be read under the name that this yields: an object of `datasets` (a
    Dataset, or a dictionary of them by split), else a name or path as it is. An IterableDataset is
    read once, into a folder that goes at the end.

    Raises DataError for anything else.
    """
    if dataset is None or isinstance(dataset, str | os.PathLike):
        yield None if dataset is None else os.fspath(dataset)
        return
    splits = dict(dataset) if isinstance(dataset, dict) else {"train": dataset}
    for name, split in splits.items():
        if not hasattr(split, "select_columns") or not hasattr(split, "features"):
            raise DataError(
                f"dataset {f'has the split {name!r}, which ' if len(splits) > 1 else ''}is of "
                f"type {type(split).__name__}; expected a name, a path, a datasets.Dataset or "
                "IterableDataset, or a dictionary of them by split"
            )
    with contextlib.ExitStack() as stack:
        for name, split in splits.items():
            if not hasattr(split, "__len__"):
                folder = stack.enter_context(_spool_folder())
                splits[name] = _spooled(split, f"the dataset ({name})", folder)
        stack.callback(_held.clear)
        _held.update(splits)
        yield IN_PYTHON


def _spool_folder() -> tempfile.TemporaryDirectory[str]:
    folder = cache_folder()  # on a disk, which /tmp need not be
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=folder, prefix="stream-", ignore_cleanup_errors=True)


def _spooled(stream: Any, where: str, folder: str) -> Any:
    """A Dataset in `folder` with the rows of an IterableDataset. Raises DataError."""
    import datasets

    try:
        found = datasets.Dataset.from_generator(
            _rows_of, stream.features, folder, gen_kwargs={"stream": stream}
        )
    except Exception as error:  # whatever the stream's own code raises
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise DataError(
            f"{where} cannot be read to its end ({reason(cause)}); expected rows with a column of "
            "texts and one of labels"
        ) from error
    found.info.dataset_name = stream.info.dataset_name  # not "generator"
    return found


def _rows_of(stream: Any) -> Iterator[dict[str, Any]]:
    yield from stream


def version(name: str) -> dict[str, Any]:
    """What config.json keeps of a resolved `name` whose texts are made here, so that an older run
    finds its own again."""
    return {"grammar": demo.NAMES[name]} if name in demo.NAMES else {}


def _demo_corpus(grammar: int, columns: Columns) -> Corpus:
    if columns.problem_type != SINGLE_LABEL:
        raise DataError(
            f"each text of the demo corpus has one of two classes; expected problem_type "
            f"{SINGLE_LABEL}, or data of your own for {columns.problem_type}"
        )
    for what, column in (("text_column", columns.text), ("label_column", columns.label)):
        if column is not None:
            raise DataError(
                f"{what} is {column!r}, and the demo corpus has no columns; leave it out, or name "
                "the data that has it"
            )
    train_texts, train_labels, test_texts, test_labels = demo.corpus(grammar=grammar)
    where, names = "the demo corpus", demo.LABEL_NAMES
    train = Rows(train_texts, [*train_labels], where, names)
    test = Rows(test_texts, [*test_labels], where, names)
    return Corpus("demo", where, {"train": lambda: train, "test": lambda: test})


# --- Hugging Face datasets ------------------------------------------------------------------------


class Unavailable(Exception):
    """IMDB cannot be had from the hub or its cache; the message is the reason."""


@functools.lru_cache(maxsize=1)  # `auto` asks whether it is there, then a run reads it
def hub_imdb() -> dict[str, Any]:
    """The splits of stanfordnlp/imdb. Raises Unavailable."""
    try:
        import datasets
    except ImportError as error:
        raise Unavailable(needs("datasets", "downloading it")) from error
    unreachable = hub_unreachable()
    with _offline() if unreachable else contextlib.nullcontext():
        try:
            found = datasets.load_dataset(HUB_NAME)
        except Exception as error:  # datasets, the hub and the network raise many kinds
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if unreachable:
                reason = f"{unreachable}, and the local cache does not hold it"
            raise Unavailable(reason) from error
    return {k: found[k] for k in ("train", "test", *UNLABELLED_SPLITS) if k in found}


def hub_unreachable() -> str | None:
    """Why the hub cannot be reached, after at most HUB_SECONDS; None if it can."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    url, answer = constants.ENDPOINT, []

    def ask() -> None:
        try:
            status = get_session().head(url, timeout=HUB_SECONDS).status_code
            answer.append(None if status < 400 else f"{url} answers with status {status}")
        except Exception as error:  # a missing network raises many kinds
            answer.append(f"{url} cannot be reached ({type(error).__name__})")

    # In a thread, since the timeout does not limit the DNS look-up.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answer[0] if answer else f"{url} did not answer within {HUB_SECONDS:g} s"


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let datasets use its cache only. It reads its environment variables at import: too early."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _saved_splits(folder: Path) -> dict[str, Any]:
    """The splits that save_to_disk wrote; a single Dataset is the split train."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(needs("datasets", f"reading {folder}")) from error
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged folder raises many kinds
        raise DataError(
            f"{folder} cannot be read as a folder of datasets' save_to_disk: {reason(error)}"
        ) from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _datasets_corpus(name: str, where: str, found: dict[str, Any], columns: Columns) -> Corpus:
    def rows(split: str) -> Rows:
        table = _dataset_table(found[split], f"{where} ({split})")
        return table_rows(table, columns)

    known: dict[str, Callable[[], Rows]] = {
        SPLITS[k]: functools.partial(rows, k) for k in found if k in SPLITS
    }
    unlabelled: dict[str, Callable[[], Sequence[str]]] = {
        f"{where} ({k})": functools.partial(
            lambda k: table_texts(_dataset_table(found[k], f"{where} ({k})"), columns.text), k
        )
        for k in found
        if k in UNLABELLED_SPLITS
    }
    if not known:
        raise DataError(
            f"{where} has the splits {some(list(found)) or 'none'}; expected train and test"
        )
    ignored = [k for k in found if k not in SPLITS and k not in UNLABELLED_SPLITS]
    notes = [f"ignored in {where}: {', '.join(ignored)}"] if ignored else []
    return Corpus(name, where, known, notes, unlabelled)


def _dataset_table(dataset: Any, where: str) -> Table:
    features = dataset.features

    def class_names(column: str) -> list[str] | None:
        feature = getattr(features[column], "feature", features[column])  # of a list
        names = getattr(feature, "names", None)
        return list(names) if names else None

    def read(column: str) -> list[Any]:
        try:
            values: list[Any] = dataset.select_columns([column]).with_format(None)[:][column]
        except Exception as error:  # a damaged folder raises many kinds
            raise DataError(
                f"{where} cannot be read ({reason(error)}); is it complete? Save it anew"
            ) from error
        return values

    kinds = {c: getattr(f, "dtype", "") in ("string", "large_string") for c, f in features.items()}

    def stored(column: str) -> StoredTexts:
        return StoredTexts(dataset.select_columns([column]).with_format(None), column)

    large = dataset.data.nbytes >= STORED_FROM
    return Table(where, kinds, read, class_names=class_names, stored=stored if large else None)
