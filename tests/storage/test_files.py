"""Files appear whole or not at all."""

import errno
import os
from types import SimpleNamespace

import pytest
from said import naming

from lorakit.storage import files


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    for text in ("one", "two"):
        with files.write_file(path) as partial:
            assert partial.parent == path.parent and partial.name == ".a.txt.partial"
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("name", ["a" * 255, "\u00e9" * 127])
def test_the_longest_names_are_written(tmp_path, name):
    with files.write_file(tmp_path / name) as partial:
        partial.write_text("one")
    with files.write_folder(tmp_path / ("b" + name[1:])) as partial:
        (partial / "x").write_text("two")
    assert (tmp_path / name).read_text() == "one" and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.EIO, "input/output error")])
def test_an_error_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)) as raised, files.write_file(path) as partial:
        partial.write_text("half of")
        raise error
    assert raised.value is error
    assert os.listdir(tmp_path) == ["a.txt"] and path.read_text() == "old"


@pytest.mark.parametrize("writer", ["Python", "safetensors"])
def test_a_full_disk_says_what_was_needed(tmp_path, writer, monkeypatch):
    error = OSError(errno.ENOSPC, "No space left on device")
    if writer == "safetensors":
        kind = pytest.importorskip("safetensors").SafetensorError
        error = kind("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=7_654_321))
    for size, needed in ((123_456, "123,456"), (None, "1,234")):  # else more than there is already
        message = naming("a.txt", tmp_path, needed, "7,654,321")
        with pytest.raises(OSError, match=message) as raised, files.write_file(tmp_path / "a.txt", size) as partial:
            partial.write_bytes(bytes(1234))
            raise error
        assert raised.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_only_when_flushed(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=naming("a.txt")) as raised, files.write_file(tmp_path / "a.txt") as partial:
        partial.write_text("x")
    assert raised.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    def forbidden(source, target):
        raise PermissionError(errno.EACCES, "Permission denied", str(source))

    monkeypatch.setattr(os, "replace", forbidden)
    message = naming("a.txt", tmp_path)
    with pytest.raises(PermissionError, match=message), files.write_file(tmp_path / "a.txt") as partial:
        partial.write_text("x")
    assert os.listdir(tmp_path) == []


def test_an_error_about_another_file_is_not_blamed_on_this_one(tmp_path):
    with pytest.raises(PermissionError, match=naming("elsewhere.txt")), files.write_file(tmp_path / "a.txt"):
        raise PermissionError(errno.EACCES, "Permission denied", "elsewhere.txt")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match=naming(tmp_path)), files.write_file(tmp_path):
        pass
    assert tmp_path.is_dir()


# ── Folders ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_folder_appears_whole(tmp_path):
    path = tmp_path / "outer" / "new"
    for number in range(2):
        with files.write_folder(path) as partial:
            assert partial.parent == path.parent and partial.name == ".new.partial"
            (partial / "inner").mkdir()
            (partial / "inner" / "a.txt").write_text(f"{number}")
            assert sorted(os.listdir(path.parent)) == [".new.partial", *(["new"] if number else [])]
        assert os.listdir(path.parent) == ["new"] and (path / "inner" / "a.txt").read_text() == f"{number}"
        (path / "inner" / "a.txt").unlink()
        (path / "inner").rmdir()  # an empty folder of that name is taken


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.EIO, "input/output error")])
def test_an_error_leaves_no_folder(tmp_path, error):
    with pytest.raises(type(error)) as raised, files.write_folder(tmp_path / "new") as partial:
        (partial / "a.txt").write_text("half of")
        raise error
    assert raised.value is error and os.listdir(tmp_path) == []


def test_what_a_killed_program_left_of_a_folder_is_not_kept(tmp_path):
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "old.txt").write_text("of a run that was killed")
    with files.write_folder(tmp_path / "new") as partial:
        (partial / "a.txt").write_text("x")
    assert os.listdir(tmp_path) == ["new"] and os.listdir(tmp_path / "new") == ["a.txt"]


@pytest.mark.parametrize("held", ["a folder", "a file"])
def test_what_is_there_is_left_alone(tmp_path, held):
    path = tmp_path / "mine"
    if held == "a folder":
        path.mkdir()
        (path / "a.txt").write_text("old")
    else:
        path.write_text("old")
    with (
        pytest.raises(FileExistsError, match=naming("mine")),
        files.write_folder(path),
    ):
        raise AssertionError("the block is not to be entered")
    assert os.listdir(tmp_path) == ["mine"] and (path / "a.txt" if path.is_dir() else path).read_text() == "old"


def test_a_disk_that_is_full_leaves_no_folder(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=naming("new", tmp_path, "1,234")) as raised:  # noqa: SIM117
        with files.write_folder(tmp_path / "new") as partial:
            (partial / "a.txt").write_bytes(bytes(1234))
    assert raised.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []


def test_a_folder_where_nothing_may_be_made(tmp_path, monkeypatch):
    def forbidden(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(files.Path, "mkdir", forbidden)
    with (
        pytest.raises(PermissionError, match=naming("new", tmp_path)),
        files.write_folder(tmp_path / "new"),
    ):
        raise AssertionError("the block is not to be entered")
