"""Files appear whole or not at all."""

import errno
import os

import pytest
from safetensors import SafetensorError

from lorakit import files


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    for text in ("one", "two"):
        with files.replacing(path) as partial:
            assert partial.parent == path.parent and partial.name == ".a.txt.partial"
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.EIO, "input/output error")])
def test_an_error_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)) as raised, files.replacing(path) as partial:
        partial.write_text("half of")
        raise error
    assert raised.value is error
    assert os.listdir(tmp_path) == ["a.txt"] and path.read_text() == "old"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_says_what_was_needed(tmp_path, error):
    message, path = r"no room for a\.txt in .*: 123,456 bytes are needed, [\d,]+ are free", tmp_path / "a.txt"
    with pytest.raises(OSError, match=message) as raised, files.replacing(path, 123_456) as partial:
        partial.write_text("half of")
        raise error
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="more than 7 bytes are needed"), files.replacing(tmp_path / "a.txt") as partial:
        partial.write_text("half of")
        raise error
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_only_when_flushed(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no room"), files.replacing(tmp_path / "a.txt") as partial:
        partial.write_text("x")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    def forbidden(source, target):
        raise PermissionError(errno.EACCES, "Permission denied", str(source))

    monkeypatch.setattr(os, "replace", forbidden)
    message = "cannot be written in .*permission denied. Choose another folder"
    with pytest.raises(PermissionError, match=message), files.replacing(tmp_path / "a.txt") as partial:
        partial.write_text("x")
    assert os.listdir(tmp_path) == []


def test_an_error_about_another_file_is_not_blamed_on_this_one(tmp_path):
    with pytest.raises(PermissionError, match="elsewhere"), files.replacing(tmp_path / "a.txt"):
        raise PermissionError(errno.EACCES, "Permission denied", "elsewhere.txt")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"), files.replacing(tmp_path):
        pass
    assert tmp_path.is_dir()
