"""A zip, a tar or a folder on a slow drive → a folder on local disk, made once and brought up to date after that.

Nothing of an archive lands outside of its folder, and none is unpacked that grows as pictures never do.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import BinaryIO

from tqdm.auto import tqdm

from lorakit.storage import files

GiB = 2**30
LIMIT = 20  # times its own size that an archive may grow; pictures are packed already
BLOCK = 4096  # bytes of disk that the smallest file takes
LARGEST_READ = 2**24  # bytes; tarfile reads a header whole, and its size is what the archive says
PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # by a file's first bytes


@dataclass(frozen=True)
class Member:
    """A file in an archive."""

    name: str
    size: int  # bytes, as the archive says
    refused: str  # what is wrong with unpacking it; "" if nothing is
    open: Callable[[], BinaryIO]  # valid until the next member is asked for


def unpack(archive: Path, cache: Path) -> tuple[Path, list[str]]:
    """Unpack a zip or tar into a folder below `cache`; a second time there is nothing to do until it changes.

    What is there stays as it is after that, for captions are edited there: only what is missing is unpacked again.

    Returns:
        The folder, by the archive's name without its suffixes, and a line for each member that is not in it.

    Raises:
        ValueError: no sound archive, or one that grows as pictures do not; it is named, and nothing of it is kept.
        OSError: no room.
    """
    found = archive.stat()
    home = _made(_home(cache, [str(archive), found.st_size, found.st_mtime_ns]))
    root, record = home / _stem(archive), home / ".unpacked"
    with _alone(home):
        refused = _unpacked(root, record)
        if refused is None:
            edited = record.is_file()  # or may be, since it was unpacked
            try:
                names, refused = _unpack(archive, max(GiB, LIMIT * found.st_size), root, edited)
            except ValueError:
                if not edited:
                    shutil.rmtree(root, ignore_errors=True)
                raise
            with files.write_file(record) as partial:
                partial.write_text(json.dumps({"names": sorted(names), "refused": refused}))
    return root, refused


def _unpack(archive: Path, limit: int, root: Path, edited: bool) -> tuple[set[str], list[str]]:
    """The names of the files that are in the folder now, and a line for each that is not."""
    total, names, refused, last = 0, set(), [], "its beginning"
    try:
        with _members(archive, limit) as members, tempfile.TemporaryDirectory(dir=root.parent) as unfinished:
            for member in tqdm(members, f"unpacking {archive.name}", unit="file", delay=2):
                total, last = total + member.size + BLOCK, member.name
                if total > limit:
                    raise _Bomb(f"grows beyond {limit / GiB:.1f} GiB")
                parts = [part for part in last.replace("\\", "/").split("/") if part not in ("", ".")]
                if (name := "/".join(parts)) in names:
                    refused.append(f"{last!r} is in it twice, and the first is used: pack it again")
                elif member.refused:
                    refused.append(f"{last!r} {member.refused}")
                elif reason := _write(member, root.joinpath(*parts), Path(unfinished, "file"), edited):
                    refused.append(f"{last!r} cannot be unpacked ({reason}): pack it again")
                else:
                    names.add(name)
    except _Bomb as error:
        advice = "which pictures do not do: a bomb? If you trust it, unpack it and give the folder"
        raise ValueError(f"{archive} {error} at {last!r}, {advice}") from None
    except Exception as error:  # each way of packing has its own
        if isinstance(error, OSError) and error.errno:  # the drive's, not the archive's
            raise
        if not names:
            reason = f"is neither a folder nor a sound zip or tar ({error}): give the folder that holds the pictures"
            raise ValueError(f"{archive} {reason}") from error
        refused.append(f"breaks off after {last!r} ({error}): copy or pack it again")
    return names, refused


def mirror_folder(
    wanted: Sequence[Path], source: Path, cache: Path, parts: Sequence[Path] = ()
) -> tuple[Path, dict[Path, str]]:
    """Bring the local copy of a folder up to date: what is new or changed there is read, what is gone is removed.

    A file gets its name in the copy, and the time of its original, once its bytes have been read back from local disk
    and have the digest of what was read from the source; so one with its original's size and time is right.

    Args:
        wanted: files under `source`, each once; the copy will hold these and no others.
        parts: the folders under `source` that are meant, where not all of it is; others have a copy of their own.

    Returns:
        The copy, by the source's name, and why for each file that is not in it.

    Raises:
        OSError: no room.
    """
    home = _made(_home(cache, [str(source), *sorted({str(part) for part in parts} - {str(source)})]))
    root = home / (source.name or "root")
    targets = [root / file.relative_to(source) for file in wanted]
    kept, pool = set(targets), ThreadPoolExecutor(8)  # a drive in a network answers slowly, and many at once
    with _alone(home):
        try:
            reasons = tqdm(pool.map(_copy, wanted, targets), "copying", len(wanted), unit="file", delay=2)
            failed = {file: reason for file, reason in zip(wanted, reasons, strict=True) if reason}
        finally:
            pool.shutdown(cancel_futures=True)
        for file in root.rglob("*"):
            if file.is_file() and file not in kept:
                file.unlink()
    return root, failed


def _copy(file: Path, target: Path) -> str:
    try:
        found = file.stat()
        if target.is_file() and _same(target.stat(), found):
            return ""
        with files.write_file(target, found.st_size) as partial:
            digest = hashlib.sha256()
            with file.open("rb") as source, partial.open("wb") as sink:
                while block := source.read(2**20):
                    digest.update(block)
                    sink.write(block)
            if partial.stat().st_size != found.st_size or files.sha256(partial) != digest.hexdigest():
                raise OSError(errno.EIO, "what arrived is not what is there")
            os.utime(partial, ns=(found.st_atime_ns, found.st_mtime_ns))
    except OSError as error:
        if error.errno in files.DISK_FULL:
            raise
        return f"cannot be copied ({error.strerror}): check its permissions and the drive, then scan again"
    return ""


def _same(mine: os.stat_result, other: os.stat_result) -> bool:
    return mine.st_size == other.st_size and mine.st_mtime_ns // 1000 == other.st_mtime_ns // 1000  # NTFS counts 100 ns


class _Bomb(Exception):
    """An archive that grows as pictures do not."""


@contextmanager
def _members(archive: Path, limit: int) -> Iterator[Iterator[Member]]:
    with archive.open("rb") as stream:
        start = stream.read(512)
    plain = start[257:262] == b"ustar"  # else a name in it could be taken for another format
    if not plain and (start.startswith(b"PK") or archive.suffix.lower() == ".zip"):
        with zipfile.ZipFile(archive) as zipped:
            yield _zip_members(zipped, limit)
    else:
        opened = next((way for first, way in PACKED.items() if not plain and start.startswith(first)), open)
        with opened(archive, "rb") as stream, tarfile.open(fileobj=_Limited(stream, limit), mode="r:") as tarred:
            yield _tar_members(tarred)


def _zip_members(zipped: zipfile.ZipFile, limit: int) -> Iterator[Member]:
    members = [member for member in zipped.infolist() if not member.filename.endswith(("/", "\\"))]
    if (needed := sum(member.file_size for member in members)) > limit:
        largest = max(members, key=lambda member: member.file_size).filename
        raise _Bomb(f"would unpack to {needed / GiB:.1f} GiB, a great part of it {largest!r},")
    for member in members:
        refused, kind = _refuse(member.filename), stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            refused = "is a link or a device: pack the file itself"
        elif member.flag_bits & 1:
            refused = "is encrypted: unpack it by hand and give the folder"
        elif member.file_size > GiB // 4 and member.file_size > 100 * member.compress_size:
            refused = f"would grow to {member.file_size / GiB:.1f} GiB, which pictures do not do: a zip bomb?"
        yield Member(member.filename, member.file_size, refused, lambda member=member: zipped.open(member))


def _tar_members(tarred: tarfile.TarFile) -> Iterator[Member]:
    while (member := tarred.next()) is not None:
        refused = _refuse(member.name)
        if not member.isreg() or member.issparse():
            refused = "is a link or a device: pack the file itself"
        if not member.isdir():
            yield Member(member.name, member.size, refused, lambda member=member: tarred.extractfile(member))


def _refuse(name: str) -> str:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or PureWindowsPath(name).drive or ".." in parts:
        return "would land outside of the folder: pack it again with plain names"
    return ""


class _Limited:
    """A tar's stream, unpacked, that goes forward only and ends in an error where it grows beyond the limit."""

    def __init__(self, stream: BinaryIO, limit: int):
        self.stream, self.limit, self.tell = stream, limit, stream.tell

    def read(self, size: int) -> bytes:
        if size > LARGEST_READ or self.tell() > self.limit:
            raise _Bomb(f"has a header of {size:,} bytes" if size > LARGEST_READ else "grows without end")
        return self.stream.read(size)

    def seek(self, position: int) -> None:
        if not self.tell() <= position <= self.limit:
            raise _Bomb("has a member of impossible size")
        self.stream.seek(position)


def _write(member: Member, target: Path, partial: Path, edited: bool) -> str:
    """Put a member in its place, whole, unless it or what was `edited` of it is there; what is wrong with it, or ""."""
    try:
        if target.is_file() and (edited or target.stat().st_size == member.size):
            return ""
        target.parent.mkdir(parents=True, exist_ok=True)
        with member.open() as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        os.replace(partial, target)
    except Exception as error:  # each way of packing has its own errors
        if isinstance(error, OSError) and error.errno in files.DISK_FULL:
            reason = f"no room in {target.parent} for {member.name}: make room, or give another cache folder"
            raise OSError(errno.ENOSPC, reason) from error
        return str(error)
    return ""


def _unpacked(root: Path, record: Path) -> list[str] | None:
    """What was refused when the archive was unpacked; None if it was not, or something of it is missing now."""
    try:
        found = json.loads(record.read_text())
        if all((root / name).is_file() for name in found["names"]):
            return found["refused"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    return None


def _home(cache: Path, facts: list) -> Path:
    return cache.resolve() / hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Let other processes that make the same wait until it is there. Drives that know no locks are used without."""
    from filelock import FileLock

    lock = FileLock(home / ".lock")
    with suppress(NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _stem(archive: Path) -> str:
    return re.sub(r"(?<=.)\.tar$", "", archive.stem, flags=re.IGNORECASE)
