"""A file, scored in parts: memory stays bounded, a kill loses the part in work, processes share.

Finished parts lie in a folder beside the output, `OUT.parts`, each written whole or not at all. The
same command again goes on after them. At the end they are joined in order, and the folder goes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fasttx import terminal
from fasttx.errors import CheckpointError, DataError
from fasttx.files import Lock, atomic_write, write_json_atomic
from fasttx.scoring import files
from fasttx.scoring.scorer import Scorer
from fasttx.training.folder import RunFolder, digest_of

AHEAD = 2  # chunks a worker that are read before they are needed


@dataclass(frozen=True)
class Job:
    source: Path
    out: Path
    scorer: Scorer
    column: str | None = None
    workers: int = 1


@dataclass
class Done:
    """What a job did: rows in all, of which some were finished before, and the time it took."""

    rows: int
    resumed: int
    seconds: float


def run(job: Job) -> Done:
    """Score every row. Raises DataError for a file that cannot be read or written, CheckpointError
    for parts of something else."""
    if job.source.resolve() == job.out.resolve():
        raise DataError(f"--out is {job.out}, the file that is read; expected another name")
    files.check_output(job.out)
    reader = files.open_table(job.source)
    column = files.text_column(reader, job.source, job.column)
    added = job.scorer.added
    if taken := [name for name in added if name in reader.columns]:
        raise DataError(
            f"{job.source} has a column {taken[0]!r}, the name of a column that is added; rename it"
        )
    folder = job.out.with_name(job.out.name + ".parts")
    folder.mkdir(exist_ok=True)
    lock = Lock(folder / ".lock")
    try:
        _continue_or_begin(folder, _description(job, column, added))
        done = _score(job, reader, column, folder)
        with atomic_write(job.out) as f:
            files.join(job.out, sorted(folder.glob("part-*")), f)
    finally:
        lock.release()
    shutil.rmtree(folder)
    return done


def _description(job: Job, column: str, added: list[str]) -> dict[str, Any]:
    """What parts have to agree in."""
    stat = job.source.stat()
    return {
        "source": str(job.source.resolve()),
        "size": stat.st_size,
        "modified": stat.st_mtime_ns,
        "column": column,
        "added": added,
        "precision": job.scorer.classifier.precision,
        "model": digest_of(RunFolder(Path(job.scorer.run)).best_model),
        "format": files.format_of(job.out),
        "chunk": [files.CHUNK_ROWS, files.CHUNK_CHARACTERS],
    }


def _continue_or_begin(folder: Path, described: dict[str, Any]) -> None:
    path = folder / "job.json"
    if not path.exists():
        write_json_atomic(path, described)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        before = None
    if before != described:
        before = before if isinstance(before, dict) else {}
        other = [name for name in described if before.get(name) != described[name]]
        raise CheckpointError(
            f"{folder} holds parts of another job (another {', '.join(other)}); remove the folder "
            "to begin anew, or choose another --out"
        )


def _score(job: Job, reader: files.Reader, column: str, folder: Path) -> Done:
    begin = time.monotonic()
    progress = _Progress(begin)
    rows = resumed = 0
    todo = ((folder / _part_name(i), chunk) for i, chunk in enumerate(reader.chunks(column)))
    with _pool(job) as pool:
        running: deque[tuple[Future[int], files.Chunk]] = deque()
        for part, chunk in todo:
            rows += len(chunk.texts)
            if part.exists():
                resumed += len(chunk.texts)
                progress.skip(len(chunk.texts), chunk.share)
                continue
            future = pool.submit(_part, job.scorer, job.out, reader.columns, part, chunk)
            running.append((future, chunk))
            while len(running) >= AHEAD * job.workers:
                _finished(running, progress)
        while running:
            _finished(running, progress)
    progress.end()
    if not rows:
        raise DataError(f"{job.source} holds no rows; expected at least one text")
    return Done(rows, resumed, time.monotonic() - begin)


def _part_name(number: int) -> str:
    return f"part-{number:08}"


def _finished(running: deque[tuple[Future[int], files.Chunk]], progress: _Progress) -> None:
    future, chunk = running.popleft()
    try:
        progress.add(future.result(), chunk.share)
    except BrokenProcessPool as error:
        raise CheckpointError(
            "a worker died; what was finished is kept. Give the same command again to go on"
        ) from error


def _part(scorer: Scorer, out: Path, columns: list[str], part: Path, chunk: files.Chunk) -> int:
    """Write one part; the number of its rows."""
    added = dict(scorer.score(chunk.texts))
    content = files.part_of(out, columns, chunk.rows, added, part.name == _part_name(0))
    with atomic_write(part) as f:
        f.write(content)
    return len(chunk.texts)


# --- processes ------------------------------------------------------------------------------------


class _Here:
    """A pool of this process alone."""

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def submit(self, function: Any, *arguments: Any) -> Future[int]:
        future: Future[int] = Future()
        future.set_result(function(*arguments))
        return future


_scorer: Scorer | None = None


def _start(scorer: Scorer) -> None:
    global _scorer
    _scorer = scorer
    scorer.classifier  # noqa: B018 - read the model before the first part


def _part_in_worker(_: None, *arguments: Any) -> int:
    assert _scorer is not None
    return _part(_scorer, *arguments)


class _Workers:
    def __init__(self, job: Job) -> None:
        context = get_context("spawn")
        self._pool = ProcessPoolExecutor(job.workers, context, _start, (job.scorer,))

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, function: Any, scorer: Scorer, *arguments: Any) -> Future[int]:
        return self._pool.submit(_part_in_worker, None, *arguments)


def _pool(job: Job) -> _Here | _Workers:
    return _Here() if job.workers == 1 else _Workers(job)


# --- progress -------------------------------------------------------------------------------------


class _Progress:
    """One line on standard error: rows, rows a second, time left. A terminal shows the last one."""

    def __init__(self, begin: float) -> None:
        self._begin, self._shown = begin, begin
        self._rows, self._share = 0, 0.0
        self._skipped_share = 0.0
        self._skipped = 0
        self._terminal = sys.stderr is not None and sys.stderr.isatty()

    def skip(self, rows: int, share: float) -> None:
        self._skipped += rows
        self._skipped_share = self._share = share

    def add(self, rows: int, share: float) -> None:
        self._rows += rows
        self._share = max(self._share, share)
        now = time.monotonic()
        if now - self._shown >= (0.5 if self._terminal else 10.0):
            self._shown = now
            self._say(now)

    def _say(self, now: float) -> None:
        seconds = max(1e-9, now - self._begin)
        fresh = self._share - self._skipped_share
        left = seconds * (1 - self._share) / fresh if fresh > 0 else 0.0
        minutes, rest = divmod(round(left), 60)
        line = (
            f"{self._skipped + self._rows:,} rows, {100 * self._share:.1f} %, "
            f"{self._rows / seconds:,.0f} rows/s, {minutes}:{rest:02} left"
        )
        if self._terminal:
            print(f"\r{line:<70}", end="", file=sys.stderr, flush=True)
        else:
            terminal.complain(line)

    def end(self) -> None:
        if self._terminal and self._shown > self._begin:
            print(file=sys.stderr)


def threads_of(workers: int) -> int | None:
    """Of each worker, where there are several."""
    return None if workers == 1 else max(1, (os.cpu_count() or 1) // workers)
