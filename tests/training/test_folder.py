"""A run folder: one writer, and files that are what the run wrote."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fasttx.commands import cli
from fasttx.errors import CheckpointError, InUseError
from fasttx.files import Lock
from fasttx.training.folder import Manifest, RunFolder, verified

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """One that holds a run of two files."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.write_json(folder.tokenizer, {"words": 1})
    folder.write_json(folder.config, {"format": "x"})
    folder.close()
    return folder


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


# --- one writer -----------------------------------------------------------------------------------


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    first.create()
    with pytest.raises(InUseError, match=rf"in use by process {os.getpid()} on .* since \d{{4}}-"):
        RunFolder(tmp_path / "run").create()
    first.close()
    first.close()
    second = RunFolder(tmp_path / "run")
    second.create()
    assert names(second.path) == [".lock"]
    second.close()
    assert names(second.path) == []


def test_a_run_has_one_process_that_goes_on_with_it(folder: RunFolder) -> None:
    folder.open()
    with pytest.raises(InUseError, match="Wait for that one to end"):
        RunFolder(folder.path).open()
    folder.close()
    RunFolder(folder.path).open()


def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom fasttx.files import Lock\n"
        "lock = Lock(Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(60)"
    )
    path = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(InUseError, match=f"process {holder.pid} "):
        Lock(path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    Lock(path).release()


def test_default_names_are_unique(tmp_path: Path) -> None:
    found = [RunFolder.unique(tmp_path / "runs", "full-1").path.name for _ in range(3)]
    assert found == ["full-1", "full-1-2", "full-1-3"]


# --- what a folder is -----------------------------------------------------------------------------


def test_a_run_is_not_overwritten(folder: RunFolder) -> None:
    again = RunFolder(folder.path)
    with pytest.raises(CheckpointError, match=r"python train\.py --resume \S+run; or choose"):
        again.create("python train.py")
    with pytest.raises(CheckpointError) as raised:  # of a command that cannot resume
        again.create()
    assert "--resume" not in str(raised.value)
    assert names(folder.path) == ["config.json", "manifest.json", "tokenizer.json"]


@pytest.mark.parametrize("left", ["nothing", "manifest", "tokenizer", "torn file", "lock"])
def test_what_never_became_a_run_counts_as_nothing(folder: RunFolder, left: str) -> None:
    """A kill between two of the steps of `create`: --resume and --out say the same of it."""
    folder.config.unlink()
    if left in ("nothing", "manifest", "torn file", "lock"):
        folder.tokenizer.unlink()
    if left in ("nothing", "torn file", "lock"):
        folder.manifest.unlink()
    if left == "torn file":
        (folder.path / ".tokenizer.json.0123abcd.tmp").write_bytes(b"{")
    if left == "lock":
        (folder.path / ".lock").write_bytes(b"process 1 on x since 2026")
    with pytest.raises(CheckpointError, match="no run yet.*with --out"):
        RunFolder(folder.path).open()
    again = RunFolder(folder.path)
    again.create()
    again.write_json(again.config, {})
    assert "tokenizer.json" not in Manifest(again.path).entries()


def test_somebody_s_tokenizer_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds tokenizer\.json; expected a new or empty"):
        RunFolder(tmp_path).create()
    with pytest.raises(CheckpointError, match=r"holds no config\.json, so it is no fasttx run"):
        RunFolder(tmp_path).open()
    assert names(tmp_path) == ["tokenizer.json"]


def test_a_file_and_a_link_to_nowhere_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("file", "link"):
        with pytest.raises(CheckpointError, match="Choose another --out"):
            RunFolder(tmp_path / name).create()
        with pytest.raises(CheckpointError, match="expected a run folder"):
            RunFolder(tmp_path / name).open()


def test_a_beginning_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with RunFolder(tmp_path / "new").created() as new:
            new.write_json(new.results, {})
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert names(tmp_path) == []


def test_a_finished_part_outlives_the_failure_of_another(tmp_path: Path) -> None:
    def fail() -> None:
        with RunFolder(tmp_path / "a").created() as a, RunFolder(tmp_path / "b").created():
            a.write_json(a.results, {})
            a.close()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["manifest.json", "results.json"]


# --- files that are what was written --------------------------------------------------------------


def test_every_flipped_bit_is_seen(folder: RunFolder) -> None:
    for path in (folder.config, folder.manifest):
        whole = path.read_bytes()
        for bit in range(0, 8 * len(whole), 7):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
                verified(folder.config)
        path.write_bytes(whole)
    assert json.loads(verified(folder.config)) == {"format": "x"}


def test_what_was_damaged_before_the_end_is_not_taken_for_whole(folder: RunFolder) -> None:
    """The end of a run enters metrics.jsonl by what was written to it, and no other file."""
    folder.open()
    folder.metrics.write_bytes(b"{}\n")
    whole = hashlib.sha256(b"{}\n").hexdigest()
    folder.tokenizer.write_bytes(b"{ }")
    folder.finish(whole)
    assert verified(folder.metrics) == b"{}\n"
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        verified(folder.tokenizer)
    folder.metrics.write_bytes(b"[]\n")
    folder.finish(whole)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is damaged"):
        verified(folder.metrics)


def test_a_file_of_another_run_is_seen(folder: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "other")
    other.create()
    other.write_json(other.tokenizer, {"words": 2})
    folder.tokenizer.write_bytes(other.tokenizer.read_bytes())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged, or not the file that"):
        verified(folder.tokenizer)
    folder.results.write_text("{}")
    with pytest.raises(CheckpointError, match=r"results\.json is not a file that this run wrote"):
        verified(folder.results)


@pytest.mark.parametrize("when", ["before the rename", "after it"])
def test_a_kill_between_the_manifest_and_the_file_loses_neither(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    class Killed(BaseException):
        pass

    replace = os.replace

    def killed(source, target):
        if Path(target).name != "config.json":
            return replace(source, target)
        if when == "after it":
            replace(source, target)
        raise Killed

    old, new = folder.config.read_bytes(), {"format": "new"}
    for attempt in range(4):  # again and again, each time with other content
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            with pytest.raises(Killed):
                folder.write_json(folder.config, {**new, "attempt": attempt})
        found = verified(folder.config)
        assert (found == old) == (when == "before the rename")
        assert len(Manifest(folder.path).entries()["config.json"]) <= 3
    folder.write_json(folder.config, new)
    assert json.loads(verified(folder.config)) == new
    folder.seal()
    assert [len(d) for d in Manifest(folder.path).entries().values()] == [1, 1]


def test_verify_tells_and_accepts(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder.path)
    assert cli.main(["verify", run]) == 0
    assert capsys.readouterr().out.count("as it was written") == 2
    folder.config.write_text("{}")
    folder.tokenizer.unlink()
    assert cli.main(["verify", run]) == 2
    said = capsys.readouterr().out
    assert "config.json             is damaged" in said and "is missing" in said
    assert cli.main(["verify", run, "--accept"]) == 0
    assert cli.main(["verify", run]) == 0
    folder.manifest.unlink()
    capsys.readouterr()
    assert cli.main(["verify", run]) == 2
    assert "fasttx verify" in capsys.readouterr().err
