"""Archives and copies: what is in them, nothing outside of their folder, and nothing that grows as pictures do not."""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from said import line, names, naming

from lorakit.dataset import captions
from lorakit.dataset import folder as dataset_folder
from lorakit.dataset import picture as picture_module
from lorakit.storage import archive as archive_module
from lorakit.storage import files

RED, BLUE = (255, 0, 0), (0, 0, 255)
PACKERS = {".tar": "w:", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}
OUTSIDE = ["../evil.png", "5_cat/../../evil.png", "/evil.png", "..\\evil.png", "C:\\evil.png", "C:evil.png",
           "\\\\h\\e.png"]  # fmt: skip


def picture(color=RED) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(stream, "PNG")
    return stream.getvalue()


def zipped(path: Path, members: dict) -> Path:
    """Write a zip; names may be strings or ZipInfo, contents bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as sink:
        for name, contents in members.items():
            sink.writestr(name, contents)
    return path


def tarred(path: Path, members: dict) -> Path:
    """Write a tar, packed as its suffix says; names may be strings or TarInfo, contents bytes."""
    with tarfile.open(path, PACKERS["".join(path.suffixes)]) as sink:
        for name, contents in members.items():
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(contents)
            sink.addfile(member, io.BytesIO(contents))
    return path


def pack(path: Path, members: dict) -> Path:
    return zipped(path, members) if path.suffix == ".zip" else tarred(path, members)


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def paths(found: dataset_folder.Dataset) -> list[str]:
    return [picture.path.relative_to(found.root).as_posix() for picture in found.pictures]


def reasons(found: dataset_folder.Dataset) -> list[str]:
    return [problem.reason for problem in found.problems]


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]


# Archives


@pytest.mark.parametrize("suffix", [".zip", *PACKERS])
def test_an_archive_reads_like_its_folder(tmp_path, suffix):
    members = {"5_cat/1.png": picture(), "5_cat/1.txt": b"a cat", "3_dog/1.png": picture(BLUE)}
    for name, contents in members.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(contents)
    litter = {"./3_dog/./2.png": picture((0, 9, 0)), "__MACOSX/5_cat/._1.png": b"x", "5_cat/.DS_Store": b"x"}
    (tmp_path / "set" / "3_dog" / "2.png").write_bytes(picture((0, 9, 0)))
    archive = pack(tmp_path / f"set{suffix}", {**members, **litter})
    folder, found = dataset_folder.scan(tmp_path / "set"), dataset_folder.scan(archive, cache=tmp_path / "cache")
    assert paths(found) == paths(folder) and found.problems == ()
    assert [(p.caption, p.repeats, p.digest) for p in found.pictures] == [
        (p.caption, p.repeats, p.digest) for p in folder.pictures
    ]
    assert found.root.is_relative_to(tmp_path / "cache") and found.root.name == "set"

    before = {path: path.stat().st_mtime_ns for path in found.root.rglob("*")}
    assert dataset_folder.scan(archive, cache=tmp_path / "cache") == found
    assert {path: path.stat().st_mtime_ns for path in found.root.rglob("*")} == before  # nothing unpacked again
    found.pictures[0].path.unlink()
    assert dataset_folder.scan(archive, cache=tmp_path / "cache") == found  # but what is gone comes back
    pack(archive, {**members, "new.png": picture((0, 99, 0))})
    assert paths(dataset_folder.scan(archive, cache=tmp_path / "cache")) == ["3_dog/1.png", "5_cat/1.png", "new.png"]


def test_an_archive_is_unpacked_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for suffix in (".zip", ".tar.gz"):
        found = dataset_folder.scan(pack(tmp_path / f"7_sks{suffix}", {"a.png": picture()}))
        assert found.root.is_relative_to(tmp_path / "cache" / "lorakit")
        assert (found.pictures[0].repeats, found.pictures[0].caption) == (7, "sks")


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_captions_that_were_edited_stay(tmp_path, suffix):
    """The next scan once took their sizes for damage and unpacked the archive's own over them."""
    members = {"1.png": picture(), "1.txt": b"a cat", "2.png": picture(BLUE), "2.caption": b"a dog"}
    archive, cache, history = pack(tmp_path / f"set{suffix}", members), tmp_path / "cache", tmp_path / "history"

    def scan() -> tuple[dataset_folder.Dataset, dict[str, str]]:
        found = dataset_folder.scan(archive, cache=cache)
        return found, found.captions

    found, old = scan()
    new = {"1.png": "sks cat on a mat", "2.png": "sks dog in the rain"}
    captions.write_captions(captions.caption_changes(old, new), found.root, history=history)
    (found.root / "note.txt").write_text("own")
    assert scan()[1] == new
    found.pictures[0].path.unlink()
    assert scan()[1] == new and found.pictures[0].path.read_bytes() == members["1.png"]
    assert (found.root / "note.txt").read_text() == "own"
    captions.undo_captions(found.root, history=history)
    assert scan()[1] == old and (found.root / "1.txt").read_bytes() == members["1.txt"]
    captions.write_captions(captions.caption_changes(old, new), found.root, history=history)
    pack(archive, members | {"2.caption": b"a wolf"})
    changed, texts = scan()
    assert texts == {"1.png": "a cat", "2.png": "a wolf"} and changed.root != found.root


@pytest.mark.parametrize("broken", [{}, {"sizes": {"1.png": 3}, "refused": []}], ids=["no names", "an older lorakit's"])
def test_captions_that_were_edited_stay_when_the_record_does_not_say_what_was_unpacked(tmp_path, broken):
    archive = zipped(tmp_path / "set.zip", {"1.png": picture(), "1.txt": b"a cat"})
    (first,) = dataset_folder.scan(archive, cache=tmp_path / "cache").pictures
    first.path.with_suffix(".txt").write_text("sks cat on a mat")
    (record,) = tmp_path.rglob(".unpacked")
    record.write_text(json.dumps(broken))
    (second,) = dataset_folder.scan(archive, cache=tmp_path / "cache").pictures
    assert second.caption == "sks cat on a mat"


def test_an_archive_that_cannot_be_read_any_more_takes_no_captions_along(tmp_path):
    archive = zipped(tmp_path / "set.zip", {"1.png": picture(), "1.txt": b"a cat"})
    before, (first,) = archive.stat(), dataset_folder.scan(archive, cache=tmp_path / "cache").pictures
    first.path.with_suffix(".txt").write_text("sks cat on a mat")
    first.path.unlink()
    archive.write_bytes(bytes(before.st_size))  # as a drive that lost it answers
    os.utime(archive, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=naming("set.zip")):
        dataset_folder.scan(archive, cache=tmp_path / "cache")
    assert first.path.with_suffix(".txt").read_text() == "sks cat on a mat"


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_a_member_that_would_land_outside_is_refused(tmp_path, suffix, name):
    archive = pack(tmp_path / f"set{suffix}", {"good.png": picture(), name: picture(BLUE)})
    found = dataset_folder.scan(archive, cache=tmp_path / "cache" / "deep")
    assert paths(found) == ["good.png"]
    (reason,) = reasons(found)
    assert names(reason, repr(name))
    assert list(tmp_path.rglob("*.png")) == [found.pictures[0].path]
    assert dataset_folder.scan(archive, cache=tmp_path / "cache" / "deep") == found  # it is said the next time, too


def test_links_and_encrypted_and_broken_members_of_a_zip_are_refused(tmp_path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    members = {"good.png": picture(), link: "/etc/passwd", "secret.png": picture(), "crc.png": b"0123456789abcdef"}
    archive = zipped(tmp_path / "set.zip", members)
    raw = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as source:
        contents_at = source.getinfo("crc.png").header_offset + 30 + len("crc.png")
    central = raw.index(b"PK\x01\x02")
    raw[contents_at + 4] ^= 1
    raw[raw.index(b"secret.png", central) - 46 + 8] |= 1  # the flag of an encrypted member
    archive.write_bytes(raw)
    found = dataset_folder.scan(archive, cache=tmp_path / "cache")
    assert paths(found) == ["good.png"]
    refused = reasons(found)
    assert len(refused) == 3 and line(refused, "'crc.png'", "CRC-32")
    assert line(refused, "'link.png'") and line(refused, "'secret.png'")
    assert not any(path.is_symlink() for path in (tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize(
    "member",
    [
        special("link.png", tarfile.SYMTYPE, "/etc/passwd"), special("link.png", tarfile.SYMTYPE, "../../good.png"),
        special("hard.png", tarfile.LNKTYPE, "good.png"), special("hard.png", tarfile.LNKTYPE, "/etc/passwd"),
        special("null.png", tarfile.CHRTYPE), special("disk.png", tarfile.BLKTYPE),
        special("pipe.png", tarfile.FIFOTYPE),
    ],
    ids=lambda member: f"{member.name} {member.linkname}",
)  # fmt: skip
def test_links_and_devices_of_a_tar_are_refused(tmp_path, member):
    folder = special("folder", tarfile.DIRTYPE)
    archive = tarred(tmp_path / "set.tar", {folder: b"", "good.png": picture(), member: b"", "last.png": picture(BLUE)})
    found = dataset_folder.scan(archive, cache=tmp_path / "cache")
    (reason,) = reasons(found)
    assert paths(found) == ["good.png", "last.png"] and names(reason, repr(member.name))
    assert not any(path.is_symlink() for path in (tmp_path / "cache").rglob("*"))


def test_a_member_behind_a_link_lands_inside(tmp_path):
    """A link to a folder outside, then a file in it: the link is not made, so the file has nowhere else to go."""
    outside = tmp_path / "outside"
    outside.mkdir()
    link = special("out", tarfile.SYMTYPE, str(outside))
    archive = tarred(tmp_path / "set.tar", {link: b"", "out/evil.png": picture()})
    assert paths(dataset_folder.scan(archive, cache=tmp_path / "cache")) == ["out/evil.png"]
    assert files_in(outside) == []


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_of_two_members_with_one_name_the_first_is_used(tmp_path, suffix):
    archive = tmp_path / f"set{suffix}"
    first, second = picture(), picture(BLUE)
    with pytest.warns(UserWarning) if suffix == ".zip" else open(os.devnull):
        if suffix == ".zip":
            with zipfile.ZipFile(archive, "w") as sink:
                sink.writestr("a.png", first)
                sink.writestr("a.png", second)
        else:
            tarred(archive, {tarfile.TarInfo("a.png"): first, tarfile.TarInfo("./a.png"): second})
    found = dataset_folder.scan(archive, cache=tmp_path / "cache")
    (reason,) = reasons(found)
    assert picture_module.open_picture(found.pictures[0]).getpixel((0, 0)) == RED and names(reason, "a.png")


def test_several_processes_unpack_and_copy_the_same(tmp_path):
    """As the processes of several cards do, all at once."""
    members = {f"{number}.png": picture((number, 0, 0)) for number in range(60)}
    archive = tarred(tmp_path / "set.tar.gz", members)
    script = "import sys; from lorakit import dataset; from pathlib import Path; archive, folder, cache = sys.argv[1:];"
    script += "print(*(len(dataset.scan(a, cache=Path(cache), copy=a == folder)) for a in (archive, folder)))"
    found = dataset_folder.scan(archive, cache=tmp_path / "first")
    command = [sys.executable, "-c", script, str(archive), str(found.root), str(tmp_path / "cache")]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    written = [run.communicate() for run in runs]
    assert [out.strip() for out, _ in written] == ["60 60"] * 3, written


# What grows


def test_zip_bombs_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_module, "GiB", 400_000)  # so that a small bomb will do
    archive = zipped(tmp_path / "one.zip", {"good.png": picture(), "bomb.txt": bytes(200_000)})
    found = dataset_folder.scan(archive, cache=tmp_path / "cache")
    assert paths(found) == ["good.png"] and line(reasons(found), "'bomb.txt'", "0.5 GiB")
    members = {"good.png": picture(), **{f"{i}.txt": bytes(99_000 + i) for i in range(9)}}
    archive = zipped(tmp_path / "many.zip", members)
    with pytest.raises(ValueError, match=naming("many.zip", "2.2 GiB", "'8.txt'")):
        dataset_folder.scan(archive, cache=tmp_path / "many")
    assert files_in(tmp_path / "many") == []


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.bz2", ".tar.xz"])
def test_tar_bombs_are_refused_by_name(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(archive_module, "GiB", 300_000)
    monkeypatch.setattr(archive_module, "LIMIT", 2)
    archive = tarred(tmp_path / f"one{suffix}", {"good.png": picture(), "bomb.png": bytes(900_000)})
    with pytest.raises(ValueError, match=naming(archive.name, "1.0 GiB", "'bomb.png'")):
        dataset_folder.scan(archive, cache=tmp_path / "cache")
    members = {"good.png": picture(), **{f"{i}.png": bytes(99_000) for i in range(9)}}
    with pytest.raises(ValueError, match=naming(f"many{suffix}") + "(?=.*'[2-5].png')"):
        dataset_folder.scan(tarred(tmp_path / f"many{suffix}", members), cache=tmp_path / "cache")
    assert files_in(tmp_path / "cache") == []


def test_a_bomb_is_not_unpacked_to_be_seen(tmp_path):
    """4 GiB of nothing in a header's word alone: whoever believed it would wait, or run out of memory."""
    good, body = tarfile.TarInfo("good.png"), picture()
    good.size = len(body)
    bombs = [
        (special("bomb.png", tarfile.REGTYPE), "1.0 GiB", "'bomb.png'"),
        (special("hidden", tarfile.XHDTYPE), "4,294,967,296", "'good.png'"),
        (special("hidden", tarfile.GNUTYPE_LONGNAME), "4,294,967,296", "'good.png'"),
    ]
    for number, (member, *values) in enumerate(bombs):
        member.size = 4 * 2**30
        archive = tmp_path / f"{number}.tar.gz"
        archive.write_bytes(gzip.compress(good.tobuf() + body.ljust(512, b"\0") + member.tobuf() + bytes(2**20)))
        with pytest.raises(ValueError, match=naming(archive.name, *values)):
            dataset_folder.scan(archive, cache=tmp_path / "cache")


def test_a_member_of_negative_size_ends_the_reading(tmp_path):
    """CVE-2025-8194: tarfile goes back to before it, again and again."""
    header = bytearray(special("x.png", tarfile.REGTYPE).tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xf6\x00"  # base 256: -2560
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    good = tarfile.TarInfo("good.png")
    good.size = len(picture())
    body = good.tobuf() + picture().ljust(512, b"\0")
    archive = tmp_path / "set.tar"
    archive.write_bytes(body + bytes(header) + bytes(1024))
    try:
        assert paths(dataset_folder.scan(archive, cache=tmp_path / "cache")) == ["good.png"]
    except ValueError as error:
        assert names(str(error), "set.tar", "'x.png'") or names(str(error), "set.tar", "'good.png'")


# What is damaged


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_tar_that_breaks_off_gives_what_is_before(tmp_path, suffix):
    random, members = np.random.default_rng(0), {}
    for number in range(30):
        stream = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)).save(stream, "PNG")
        members[f"{number}.png"] = stream.getvalue()
    archive = tarred(tmp_path / f"set{suffix}", members)
    archive.write_bytes(archive.read_bytes()[:-40_000])
    if suffix == ".tar.bz2":  # one block holds all of it
        with pytest.raises(ValueError, match=naming(archive.name)):
            dataset_folder.scan(archive, cache=tmp_path / "cache")
        return
    found = dataset_folder.scan(archive, cache=tmp_path / "cache")
    assert 5 < len(found) < 30 and paths(found) == [f"{i}.png" for i in range(len(found))]
    assert any(line(reasons(found), repr(f"{number}.png")) for number in (len(found) - 1, len(found)))
    assert dataset_folder.scan(archive, cache=tmp_path / "cache") == found


def test_bytes_that_changed_in_a_packed_tar_never_crash(tmp_path):
    members = {f"{i}.png": picture((i, 0, 0)) for i in range(8)}
    random = np.random.default_rng(0)
    for suffix, compress in ((".tar", bytes), (".tar.gz", gzip.compress), (".tar.bz2", bz2.compress),
                             (".tar.xz", lzma.compress)):  # fmt: skip
        plain = tarred(tmp_path / "plain.tar", members).read_bytes()
        for number in range(30):
            damaged = bytearray(compress(plain))
            for place in random.integers(0, len(damaged), 3):
                damaged[place] = random.integers(256)
            archive = tmp_path / f"{number}{suffix}"
            archive.write_bytes(damaged)
            try:
                found = dataset_folder.scan(archive, cache=tmp_path / "cache")
            except ValueError as error:
                assert names(str(error), archive.name)
            else:
                assert len(found) <= len(members)


def test_a_file_that_is_no_archive(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    with pytest.raises(ValueError, match=naming("a.png")):
        dataset_folder.scan(tmp_path / "a.png")
    archive = zipped(tmp_path / "set.zip", {"a.png": picture()})
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(ValueError, match=naming("set.zip")):
        dataset_folder.scan(archive, cache=tmp_path / "cache")
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=naming("empty.tar")):
        dataset_folder.scan(tmp_path / "empty.tar", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or files_in(tmp_path / "cache") == []


@pytest.mark.parametrize("name", ["BZh.png", "PK.png", "\x1f\x8b.png"])
def test_a_plain_tar_is_known_whatever_its_first_name(tmp_path, name):
    assert paths(dataset_folder.scan(tarred(tmp_path / "set.tar", {name: picture()}), cache=tmp_path / "cache")) == [
        name
    ]


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_a_full_disk_says_where_and_leaves_no_half_file(tmp_path, monkeypatch, suffix):
    archive = pack(tmp_path / f"set{suffix}", {"a.png": picture()})

    def full(source, sink):
        sink.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archive_module.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match=naming(tmp_path / "cache", "a.png")) as caught:
        dataset_folder.scan(archive, cache=tmp_path / "cache")
    assert caught.value.errno == errno.ENOSPC
    assert files_in(tmp_path / "cache") == []


# Copies


def make(folder: Path) -> Path:
    for name, contents in {"5_cat/1.png": picture(), "5_cat/1.txt": b"a cat", "2.png": picture(BLUE)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(contents)
    (folder / "film.mp4").write_bytes(b"large")
    (folder / "drawing.psd").write_bytes(b"large")
    return folder


def facts(found: dataset_folder.Dataset) -> list[tuple]:
    return [(p.group, p.path.name, p.caption, p.repeats, p.digest) for p in found.pictures]


def test_a_copy_reads_like_its_original(tmp_path):
    source = make(tmp_path / "drive" / "7_set")
    there = dataset_folder.scan(source)
    here = dataset_folder.scan(source, copy=True, cache=tmp_path / "cache")
    assert facts(here) == facts(there) and here.root.name == "7_set"
    assert all(p.path.is_relative_to(tmp_path / "cache") for p in here.pictures)
    assert [(p.path.name, p.reason) for p in here.problems] == [(p.path.name, p.reason) for p in there.problems]
    assert sorted(path.name for path in files_in(here.root)) == ["1.png", "1.txt", "2.png"]
    assert sorted(path.name for path in files_in(source)) == ["1.png", "1.txt", "2.png", "drawing.psd", "film.mp4"]


def test_folders_of_a_toml_have_the_same_names_in_the_copy(tmp_path):
    """Each once had a copy of its own, and pictures names such as 9f86d081884c7d65/a/1.png."""
    for number, name in enumerate(["a/1.png", "b/1.png", "b/c/1.png", "other/1.png"]):
        (tmp_path / "drive" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "drive" / name).write_bytes(picture((number, 0, 0)))
    (tmp_path / "drive" / "b" / "1.tags").write_text("tagged")
    os.symlink(tmp_path / "drive" / "a", tmp_path / "drive" / "link")

    def scan(name: str, *folders: str, **options) -> dataset_folder.Dataset:
        subsets = [f"[[datasets.subsets]]\nimage_dir = '{folder}'\ncaption_extension = '.tags'" for folder in folders]
        (tmp_path / "drive" / name).write_text("\n".join(["[[datasets]]", *subsets]))
        return dataset_folder.scan(tmp_path / "drive" / name, **options)

    for folders in (["a", "b"], ["b", "b/c"], ["a", "link", "b/c"], ["b"]):
        there = scan("set.toml", *folders)
        here = scan("set.toml", *folders, copy=True, cache=tmp_path / "cache")
        assert facts(here) == facts(there) and paths(here) == paths(there) and here.root.name == there.root.name
        assert all(p.path.is_relative_to(tmp_path / "cache") for p in here.pictures)
        assert len(files_in(here.root)) == len({p.path for p in here.pictures}) + ("b" in folders)
    one, two = (scan(name, *pair, copy=True, cache=tmp_path / "cache")
                for name, pair in (("set.toml", "ab"), ("more.toml", ["a", "other"])))  # fmt: skip
    assert all(p.path.is_file() for p in one.pictures + two.pictures)  # neither takes the other's for gone
    with pytest.raises(ValueError, match=naming("none.toml", "missing")):
        scan("none.toml", "missing", copy=True, cache=tmp_path / "cache")


def test_only_what_is_new_or_changed_is_copied(tmp_path, monkeypatch):
    source, read = make(tmp_path / "drive"), []
    here = dataset_folder.scan(source, copy=True, cache=tmp_path / "cache")
    digest = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: read.append(path.name) or digest(path))
    assert dataset_folder.scan(source, copy=True, cache=tmp_path / "cache") == here and read == []
    (source / "new.png").write_bytes(picture((0, 9, 0)))
    (source / "5_cat" / "1.txt").write_text("two cats")
    (source / "2.png").unlink()
    here = dataset_folder.scan(source, copy=True, cache=tmp_path / "cache")
    assert sorted(read) == [".1.txt.partial", ".new.png.partial"]
    assert facts(here) == facts(dataset_folder.scan(source))
    assert sorted(path.name for path in files_in(here.root)) == ["1.png", "1.txt", "new.png"]


def test_a_copy_that_was_cut_goes_on(tmp_path, monkeypatch):
    source, replace, done, alone = make(tmp_path / "drive"), os.replace, [], threading.Lock()

    def cut(old, new):
        with alone:  # several threads copy
            if len(done) == 2:
                raise KeyboardInterrupt
            replace(old, new)
            done.append(new)

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        dataset_folder.scan(source, copy=True, cache=tmp_path / "cache")
    monkeypatch.undo()
    originals = {path.read_bytes() for path in files_in(source)}
    copied = files_in(tmp_path / "cache" / "copies")
    assert len(copied) == 2 and all(path.read_bytes() in originals for path in copied)
    assert facts(dataset_folder.scan(source, copy=True, cache=tmp_path / "cache")) == facts(dataset_folder.scan(source))


def test_an_interrupt_does_not_wait_for_the_rest_to_be_copied(tmp_path, monkeypatch):
    for number in range(200):
        (tmp_path / "drive").mkdir(exist_ok=True)
        (tmp_path / "drive" / f"{number}.png").write_bytes(picture((number, 0, 0)))
    copied, copy = [], archive_module._copy
    monkeypatch.setattr(
        archive_module, "_copy", lambda *names: copied.append(names) or time.sleep(0.01) or copy(*names)
    )

    def interrupted(answers, *rest, **options):
        yield next(answers)
        raise KeyboardInterrupt

    monkeypatch.setattr(archive_module, "tqdm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dataset_folder.scan(tmp_path / "drive", copy=True, cache=tmp_path / "cache")
    assert len(copied) < 200


def test_what_arrives_damaged_is_not_there(tmp_path, monkeypatch):
    source, digest = make(tmp_path / "drive"), files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: "0" if "2.png" in path.name else digest(path))
    found = dataset_folder.scan(source, copy=True, cache=tmp_path / "cache")
    assert paths(found) == ["5_cat/1.png"] and line(found.describe().splitlines(), "2.png")
    assert sorted(path.name for path in files_in(found.root)) == ["1.png", "1.txt"]


def test_a_copy_without_room_says_so(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sha256", full)
    with pytest.raises(OSError, match=naming("2.png")) as caught:
        dataset_folder.scan(make(tmp_path / "drive"), copy=True, cache=tmp_path / "cache")
    assert caught.value.errno == errno.ENOSPC and files_in(tmp_path / "cache") == []
