"""A run folder: where its files are, who may write them, and whether they are what was written.

`manifest.json` holds the SHA-256 of every file that a run wrote. A file is announced there before
it takes its name, so that no kill can leave a file that the manifest does not know. What is read is
compared with it: a flipped bit and a file of another run are seen alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fasttx.errors import CheckpointError
from fasttx.files import Lock, atomic_write, json_text, write_json_atomic

MANIFEST_FORMAT = "fasttx-manifest-1"


class RunFolder:
    """`runs/<name>/`: where each file of a run is.

    Reading needs nothing; a writer first calls `create` or `open`, and `close` at its end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.tokenizer = path / "tokenizer.json"
        self.best_model = path / "best_model.pt"
        self.last = path / "last.ckpt"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.test_predictions = path / "test_predictions.npz"
        self.pseudo_labels = path / "pseudo_labels.npz"
        self.diverged = path / "diverged.json"
        self.log = path / "train.log"
        self.manifest = path / "manifest.json"
        self._lock: Lock | None = None
        self._made = False  # whether `create` made the folder itself
        self._written: dict[str, str] = {}  # digests of the files that this object wrote

    # --- opening ----------------------------------------------------------------------------------

    @classmethod
    def unique(cls, parent: Path, name: str) -> RunFolder:
        """The first of <name>, <name>-2, <name>-3, ... in `parent` that this call could make."""
        number = 1
        while True:
            folder = cls(parent / (name if number == 1 else f"{name}-{number}"))
            try:
                folder.path.mkdir(parents=True)
            except FileExistsError:
                number += 1
            else:
                folder._made = True
                return folder

    def create(self, resume: str | None = None) -> None:
        """Make the folder, or take an empty one, for this process alone.

        What a run that was killed before its first step left behind counts as nothing. resume: the
        command that goes on with a run, for the message. Raises CheckpointError for a folder that
        holds anything else, InUseError for one that another process has open.
        """
        if not self.path.is_dir() and (self.path.exists() or self.path.is_symlink()):
            raise CheckpointError(
                f"{self.path} is no folder, or a link that leads nowhere; expected a new or empty "
                "folder. Choose another --out"
            )
        try:
            self.path.mkdir(parents=True)
            self._made = True
        except FileExistsError:
            self._refuse_what_it_holds(resume)
        self._lock = Lock(self.path / ".lock")
        try:
            self._refuse_what_it_holds(resume)  # it may have been filled meanwhile
        except CheckpointError:
            self.close()
            raise
        self.manifest.unlink(missing_ok=True)

    def open(self) -> None:
        """Keep other writers out. Raises InUseError, and CheckpointError where there is no run."""
        if not self.config.exists():
            raise CheckpointError(self._no_run())
        self._lock = Lock(self.path / ".lock")

    def close(self) -> None:
        """Let other writers in; any number of times."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def discard(self) -> None:
        """Remove what was written since `create`, for a run that could not begin."""
        with contextlib.suppress(OSError):  # what went wrong is about to be raised
            for path in (*self.files(), self.manifest, self.log):
                path.unlink(missing_ok=True)
        self.close()
        if self._made:
            with contextlib.suppress(OSError):  # somebody may have put a file there
                self.path.rmdir()

    @contextlib.contextmanager
    def created(self) -> Iterator[RunFolder]:
        """`create`, then `close`, or `discard` where the block raises."""
        self.create()
        try:
            yield self
        except BaseException:
            if self._lock is not None:  # else it was finished, and closed
                self.discard()
            raise
        self.close()

    def _contents(self) -> list[str]:
        """What the folder holds, besides a lock, torn temporary files, and a beginning that never
        became a run: all but config.json, which is written last."""
        names = {p.name for p in self.path.iterdir()}
        names = {n for n in names if n != ".lock" and not (n[0] == "." and n.endswith(".tmp"))}
        if names <= {self.manifest.name, self.tokenizer.name, self.log.name}:
            with contextlib.suppress(CheckpointError):
                if self.tokenizer.name in Manifest(self.path).entries() or names == {self.log.name}:
                    return []
        return sorted(names)

    def _refuse_what_it_holds(self, resume: str | None) -> None:
        if not (found := self._contents()):
            return
        if self.config.exists() and resume:
            raise CheckpointError(
                f"{self.path} exists already; expected a new or empty folder. Go on with that run: "
                f"{resume} --resume {self.path}; or choose another --out"
            )
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise CheckpointError(
            f"{self.path} exists already and holds {', '.join(found[:3])}{more}; expected a new or "
            "empty folder. Choose another --out"
        )

    def _no_run(self) -> str:
        if not self.path.exists():
            return f"{self.path} does not exist; expected a run folder"
        if not self.path.is_dir():
            return f"{self.path} is a file; expected a run folder"
        if self._contents():
            return f"{self.path} holds no config.json, so it is no fasttx run"
        return (
            f"{self.path} holds no run yet: it ended before its first step. Start it once more, "
            f"with --out {self.path}"
        )

    # --- writing and reading ----------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[BinaryIO]:
        """A file of the run, written whole or not at all, and known to the manifest."""
        manifest = Manifest(self.path)
        if not manifest.exists() and self._lock is None:  # a report on a run that has none
            with atomic_write(path) as f:
                yield f
            return

        digest = ""

        def announce(temporary: Path) -> None:
            nonlocal digest
            digest = digest_of(temporary)
            manifest.announce(path, digest, self._written.get(path.name))

        with atomic_write(path, announce) as f:
            yield f
        self._written[path.name] = digest

    def write_json(self, path: Path, values: Any) -> None:
        with self.writing(path) as f:
            f.write(json_text(values).encode("utf-8"))

    def seal(self) -> None:
        """Enter the files as they are now, whatever they were."""
        Manifest(self.path).enter(self.files())

    def finish(self, metrics_sha256: str | None) -> None:
        """Enter metrics.jsonl, which was appended to, by the digest of what was written to it."""
        if metrics_sha256 is not None:
            Manifest(self.path).announce(self.metrics, metrics_sha256, metrics_sha256)

    def files(self) -> list[Path]:
        """The files of the run that are there and are read again: all but train.log."""
        written = (
            self.config, self.tokenizer, self.best_model, self.last, self.metrics, self.results,
            self.test_predictions, self.pseudo_labels, self.diverged,
        )  # fmt: skip
        return [path for path in written if path.exists()]


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with open(path, "rb") as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Manifest:
    """manifest.json of a folder: for each file the SHA-256 that it may have, the newest first.

    Two are possible while a file is replaced: a kill leaves the old file or the new one.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "manifest.json"

    def exists(self) -> bool:
        return self.path.exists()

    def entries(self) -> dict[str, list[str]]:
        """Raises CheckpointError for a damaged manifest; a missing one has no entries."""
        if not self.exists():
            return {}
        damaged = f"{self.path} is damaged, so that no file of the run can be checked. {_ACCEPT}"
        try:
            values = json.loads(self.path.read_bytes())
            entries: dict[str, list[str]] = values["files"]
            sound = values["format"] == MANIFEST_FORMAT and values["sha256"] == _own(entries)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(damaged.format(folder=self.path.parent)) from error
        if not sound:
            raise CheckpointError(damaged.format(folder=self.path.parent))
        return entries

    def announce(self, path: Path, digest: str, now: str | None = None) -> None:
        """`path` may have this digest from now on, or the one that it has now.

        now: that one, where it is known. Else it is one of those that the manifest allows; where a
        kill came between announcing and renaming, the file itself tells which.
        """
        entries = self.entries()
        former = entries.get(path.name, [])
        if now is None and len(former) > 1:
            now = digest_of(path) if path.exists() else ""
        if now is not None:
            former = [d for d in former if d == now]
        self._write({**entries, path.name: list(dict.fromkeys([digest, *former]))})

    def enter(self, files: list[Path]) -> None:
        """These files and no others, as they are."""
        self._write({path.name: [digest_of(path)] for path in files})

    def _write(self, entries: dict[str, list[str]]) -> None:
        values = {"format": MANIFEST_FORMAT, "files": entries, "sha256": _own(entries)}
        write_json_atomic(self.path, values)


def _own(entries: dict[str, list[str]]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


_ACCEPT = (
    "Bring back a copy; or, if you trust the files as they are: fasttx verify {folder} --accept"
)
# What can still be done without a file, beside bringing back a copy.
_WITHOUT = {
    "last.ckpt": "The best epoch can still be used (fasttx predict), but the run cannot go on",
    "best_model.pt": "Without one the run has to be trained again",
    "tokenizer.json": "A run on the same data with the same vocabulary size has the same file",
    "test_predictions.npz": "Or delete it: `fasttx report` makes it again",
    "pseudo_labels.npz": "Or make it again: fasttx ensemble --pseudo-labels",
    "metrics.jsonl": "Or delete it: the epochs stand in results.json too",
}


def verified(path: Path) -> bytes:
    """The content of a file of a run, checked. Raises CheckpointError, and FileNotFoundError where
    there is none.

    A run of the first format has no manifest: of its archives the checksums inside are checked.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    manifest = Manifest(path.parent)
    if not manifest.exists():
        _check_archive(path, content)
        return content
    if problem := problem_of(path, content, manifest.entries()):
        raise CheckpointError(f"{path} {problem}. {remedy(path)}")
    return content


def problem_of(path: Path, content: bytes, entries: dict[str, list[str]]) -> str | None:
    """Why this is not the content that the manifest expects of `path`; None if it is."""
    expected = entries.get(path.name)
    if not expected:
        return "is not a file that this run wrote: its manifest.json does not list it"
    found = hashlib.sha256(content).hexdigest()
    if found in expected:
        return None
    return (
        f"is damaged, or not the file that this run wrote (SHA-256 {found[:12]}..., expected "
        f"{expected[0][:12]}...)"
    )


def remedy(path: Path) -> str:
    more = f". {_WITHOUT[path.name]}" if path.name in _WITHOUT else ""
    return _ACCEPT.format(folder=path.parent) + more


def _check_archive(path: Path, content: bytes) -> None:
    if content[:2] != b"PK":
        return
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
    except Exception as error:  # bad bytes make zipfile raise many kinds
        raise CheckpointError(
            f"{path} is damaged or cut short ({error}). Bring back a copy"
        ) from error
    if damaged:
        raise CheckpointError(
            f"{path} is damaged: the checksum of its part {damaged} is wrong. Bring back a copy"
        )
