"""What runs survive: kills, flipped bits, full disks.

    python -m tests.faults kills --count 200        (or flips, full-disk)

Each function tries so many faults on tiny runs and returns a line for each that was not survived.
docs/reliability.md has what they found; `tests/training/test_faults.py` runs a slice of them.
The trainings run in forked processes, so that a fault costs no start of Python. They use one
thread, since OpenMP's threads do not survive a fork.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import errno
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import fasttx
import train
from fasttx.commands import cli
from fasttx.errors import FasttxError
from fasttx.tasks import TASKS
from fasttx.training.checkpoint import load_state
from fasttx.training.folder import RunFolder

SIZES = (
    "--vocab-size 200 --d-model 16 --num-heads 2 --num-layers 1 --d-ff 32 --max-len 16 "
    "--attn-backend reference --epochs 3 --log-every 2 --checkpoint-seconds 0 --device cpu"
).split()
Program = Callable[[list[str]], int]
PROGRAMS: dict[str, Program] = {
    "classification": lambda argv: train.main(argv),
    "pretraining": lambda argv: cli.main(["pretrain", *argv]),
}


def write_reviews(folder: Path, rows: int = 160) -> Path:
    """A dataset of two classes, with a test split."""
    rng = random.Random(0)
    words = ["dull awful weak flat".split(), "warm witty fresh grand".split()]
    folder.mkdir()
    for name, count in (("train", rows), ("test", 30)):
        lines = []
        for i in range(count):
            text = " ".join(rng.choice(words[i % 2]) for _ in range(rng.randint(2, 12)))
            lines.append(
                json.dumps({"text": f"{name} {i} {text}", "label": ["bad", "good"][i % 2]})
            )
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def child(program: Program, argv: list[str], said: Path, prepare: Callable[[], object]) -> int:
    """The process id of `program(argv)` in a process of its own, whose output goes to `said`."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        with open(said, "wb") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        prepare()
        status = program(argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def none() -> None:
    """Nothing to prepare."""


def wait(pid: int) -> int:
    """The exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, object]]]:
    """What a finished run came to, less what a clock says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in ("seconds", "samples_per_second"):
            row.pop(name, None)
    return load_state(folder / "best_model.pt"), rows


def differs(folder: Path, whole: Path) -> bool:
    (mine, rows), (theirs, other) = outcome(folder), outcome(whole)
    return rows != other or not all(torch.equal(mine[k], theirs[k]) for k in theirs)


@contextlib.contextmanager
def room() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        os.environ["FASTTX_CACHE"] = str(Path(name) / "cache")
        yield Path(name)


# --- kills ----------------------------------------------------------------------------------------


def kills(count: int, seed: int = 0) -> Iterator[str]:
    """SIGKILL at random moments; a run that is resumed until its end ends as an undisturbed one."""
    rng, done, number = random.Random(seed), 0, 0
    with room() as place:
        data, said = write_reviews(place / "data"), place / "said"
        for name, program in PROGRAMS.items():
            argv = [*SIZES, "--dataset", str(data), "--out", str(place / name)]
            start = time.perf_counter()
            assert wait(child(program, argv, said, none)) == 0, said.read_text()
            seconds = time.perf_counter() - start
            share = done + (count - done) // (len(PROGRAMS) - list(PROGRAMS).index(name))
            while done < share:
                number += 1
                folder = place / f"{name}-{number}"
                begin = [*argv[:-1], str(folder)]
                for attempt in range(50):
                    begun = (folder / "config.json").exists()
                    command = ["--resume", str(folder)] if begun else begin
                    pid = child(program, command, said, none)
                    if attempt < 20:
                        time.sleep(rng.random() * seconds)
                        os.kill(pid, signal.SIGKILL)
                    status = wait(pid)
                    done += status == -signal.SIGKILL
                    if status != -signal.SIGKILL:
                        break
                if status != 0:
                    yield f"{folder.name}: status {status}: {said.read_text()[-300:]}"
                elif differs(folder, place / name):
                    yield f"{folder.name}: another end than the undisturbed run's"
                shutil.rmtree(folder)


# --- flipped bits ---------------------------------------------------------------------------------


def flips(count: int, seed: int = 0) -> Iterator[str]:
    """One flipped bit in a file of a run, which what reads that file must notice."""
    rng = random.Random(seed)
    with room() as place:
        data, said = write_reviews(place / "data"), place / "said"
        finished, half = place / "finished", place / "half"
        argv = [*SIZES, "--dataset", str(data), "--out"]
        program = PROGRAMS["classification"]
        assert wait(child(program, [*argv, str(finished)], said, none)) == 0
        shutil.copytree(finished, half)
        (half / "results.json").unlink()
        for number in range(count):
            run = (finished, half)[number % 2]
            files = [*RunFolder(run).files(), RunFolder(run).manifest]
            path = files[number // 2 % len(files)]
            whole = path.read_bytes()
            bit = rng.randrange(8 * len(whole))
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            if not noticed(run, path, said):
                yield f"{run.name}/{path.name}, bit {bit}: not noticed"
            path.write_bytes(whole)


def noticed(run: Path, path: Path, said: Path) -> bool:
    """Whether what reads this file refuses it in one line, or says that it is damaged."""
    folder = RunFolder(run)
    unfinished = not folder.results.exists()
    try:
        if path == folder.last and not unfinished:  # nothing reads it any more, but for verify
            return wait(child(lambda argv: cli.main(argv), ["verify", str(run)], said, none)) == 2
        if path in (folder.best_model, folder.tokenizer, folder.config, folder.manifest):
            fasttx.load(run, device="cpu")
        elif unfinished:
            copy = run.with_name("copy")
            shutil.copytree(run, copy)
            argv = ["--resume", str(copy)]
            try:
                status = wait(child(PROGRAMS["classification"], argv, said, none))
            finally:
                shutil.rmtree(copy)
            text = said.read_text()
            if path == folder.metrics:  # which is written anew
                return "metrics.jsonl was damaged" in text
            if path == folder.test_predictions:  # which is made again at the end, and not read
                return True
            return status == 2 and path.name in text and "Traceback" not in text
        else:
            from fasttx.reporting.finished import open_run

            open_run(run, "cpu")
    except FasttxError as error:
        return path.name in str(error) and "\n" not in str(error)
    return False


# --- full disks -----------------------------------------------------------------------------------


def limit_writes(limit: int) -> None:
    """From so many bytes on, every file of this process that is being written meets a full disk."""
    real, left = builtins.open, [limit]

    def limited(path, mode="r", *given, **more):
        file = real(path, mode, *given, **more)
        if not set(mode) & set("wax+") or "cache" in str(path):
            return file
        write = file.write

        def counted(data):
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return write(data)

        with contextlib.suppress(AttributeError):  # the file is written in C, and slips through
            file.write = counted
            return file
        return Limited(file, counted)

    builtins.open = limited  # type: ignore[assignment]


class Limited:
    """A file whose `write` is another one."""

    def __init__(self, file, write) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def __iter__(self):
        return iter(self._file)


def full_disk(count: int, seed: int = 0) -> Iterator[str]:
    """A disk that is full at a random byte: one line, no torn file; with room again the run ends as
    an undisturbed one."""
    rng = random.Random(seed)
    with room() as place:
        data, said = write_reviews(place / "data"), place / "said"
        whole = place / "whole"
        program = PROGRAMS["classification"]
        argv = [*SIZES, "--dataset", str(data), "--out"]
        assert wait(child(program, [*argv, str(whole)], said, none)) == 0
        written = 25 * (whole / "last.ckpt").stat().st_size
        for number in range(count):
            folder = place / f"full-{number}"
            limit = int(written * rng.random() ** 2)
            pid = child(
                program, [*argv, str(folder)], said, lambda limit=limit: limit_writes(limit)
            )
            status, text = wait(pid), said.read_text()
            if status not in (0, 2) or "Traceback" in text:
                yield f"{limit} bytes: status {status}: {text[-300:]}"
            if status == 2 and "No space left" not in text:
                yield f"{limit} bytes: the disk is not named: {text[-300:]}"
            if folder.exists() and any(p.name.endswith(".tmp") for p in folder.iterdir()):
                yield f"{limit} bytes: a torn file is left"
            if status:
                begun = (folder / "config.json").exists()
                again = ["--resume", str(folder)] if begun else [*argv, str(folder)]
                status = wait(child(program, again, said, none))
            if status != 0 or differs(folder, whole):
                yield f"{limit} bytes: status {status} with room again: {said.read_text()[-300:]}"
            shutil.rmtree(folder)


FAULTS = {"kills": kills, "flips": flips, "full-disk": full_disk}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # What a training imports when it begins: else each of the processes takes seconds for it.
    for name in ("torch._dynamo", *(entry.module for entry in TASKS.values())):
        importlib.import_module(name)
    start, failures = time.perf_counter(), 0
    for line in FAULTS[args.fault](args.count, args.seed):
        failures += 1
        print(line, flush=True)
    seconds = time.perf_counter() - start
    print(f"{args.fault}: {args.count} tried, {failures} not survived, {seconds:.0f} s")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
