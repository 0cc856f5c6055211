"""Files are written whole or not at all."""

import json
import os
import stat
import time

import pytest

from fasttx.files import atomic_folder, atomic_write, write_json_atomic, write_text_atomic


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as f:
        f.write(b"new")
        f.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def interrupted():
        with atomic_write(path) as f:
            f.write(b"half")
            f.flush()
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_an_error_at_the_rename_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_text_atomic(tmp_path / "folder", "x")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_missing_folder_is_named(tmp_path):
    path = tmp_path / "no" / "a.txt"
    with pytest.raises(FileNotFoundError, match="create it first") as raised:
        write_text_atomic(path, "x")
    assert str(path) in str(raised.value)
    assert str(tmp_path / "no") + " does not exist" in str(raised.value)


def test_text_and_json_are_utf_8_as_written(tmp_path):
    write_text_atomic(tmp_path / "a.txt", "é\r\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\r\n"
    write_json_atomic(str(tmp_path / "a.json"), {"é": [1, 2.5, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "é": [\n')
    assert text.endswith("}\n")
    assert json.loads(text) == {"é": [1, 2.5, None]}


def test_a_value_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    write_json_atomic(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json_atomic(tmp_path / "a.json", object())
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text_atomic("a.txt", "x")
    assert (tmp_path / "a.txt").read_text() == "x"


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_others_may_read_it_as_the_umask_says(tmp_path):
    old = os.umask(0o022)
    try:
        write_text_atomic(tmp_path / "a.txt", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "a.txt")
    write_text_atomic(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "a.txt").read_text() == "x"


def test_what_a_killed_process_left_is_removed_when_it_is_old(tmp_path):
    names = [".a[1].txt.00000000.tmp", ".a[1].txt.11111111.tmp", ".b.txt.00000000.tmp"]
    for name in names:
        (tmp_path / name).write_text("half")
    for name in (names[0], names[2]):
        os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    write_text_atomic(tmp_path / "a[1].txt", "x")
    # Gone is what is old and of this file: the second may still be written by somebody.
    assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], "a[1].txt"])


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "folder"
    with atomic_folder(path) as inside:
        (inside / "a.txt").write_text("a")
        assert not path.exists()
    assert (path / "a.txt").read_text() == "a" and os.listdir(path.parent) == ["folder"]
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as inside:
        (inside / "b.txt").write_text("b")
    assert os.listdir(tmp_path / "empty") == ["b.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_no_folder(tmp_path, error):
    def interrupted():
        with atomic_folder(tmp_path / "folder") as inside:
            (inside / "a.txt").write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert not os.listdir(tmp_path)


def test_a_folder_that_holds_something_stays(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with pytest.raises(OSError, match="not empty") as raised, atomic_folder(tmp_path / "folder"):
        pass
    assert raised.value.filename == str(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["old"]


def test_an_abandoned_folder_goes(tmp_path):
    abandoned = tmp_path / ".folder.12345678.tmp"
    abandoned.mkdir()
    (abandoned / "half").touch()
    os.utime(abandoned, (1, 1))
    with atomic_folder(tmp_path / "folder"):
        pass
    assert os.listdir(tmp_path) == ["folder"]
