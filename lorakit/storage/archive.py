"""A zip, a tar or a folder on a slow drive → a folder on local disk, made once and then kept up to date.

No file of an archive lands outside of that folder, and archives that grow far more than pictures do are refused.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import IO, Any

from tqdm.auto import tqdm

from lorakit.storage import files
from lorakit.storage.threads import thread_pool

GiB = 2**30
LIMIT = 20  # times its own size that an archive may grow; pictures are compressed already
BLOCK = 4096  # bytes of disk that the smallest file takes
LARGEST_READ = 2**24  # bytes; tarfile reads a header at once, and the archive states its size
COMPRESSED: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}  # by a file's first bytes
LINK = "is a link or a device: pack the file itself"


@dataclass(frozen=True)
class Member:
    """A file in an archive."""

    name: str
    size: int  # bytes, as the archive states
    refused: str  # why it must not be unpacked; "" if it may
    open: Callable[[], Any]  # as a binary stream, valid until the next member is read


# ── Archives ────────────────────────────────────────────────────────────────────────────────────────────────────────


def unpack(archive: Path, cache: Path) -> tuple[Path, list[str]]:
    """Unpack a zip or tar into a folder below `cache`, unless that was done since the archive last changed.

    Captions are edited in that folder, so files in it are never replaced: only missing ones are unpacked again.

    Returns:
        The folder, named as the archive without its suffixes, and a line for each member that is not in it.

    Raises:
        ValueError: the archive is damaged, or grows far more than pictures do; nothing of it is kept.
        OSError: the disk is full.
    """
    status = archive.stat()
    home = _home(cache, [str(archive), status.st_size, status.st_mtime_ns])
    root, record = home / re.sub(r"(?<=.)\.tar$", "", archive.stem, flags=re.IGNORECASE), home / ".unpacked"
    with files.claim_folder(home, wait=True):
        refused = _refused_before(root, record)
        if refused is None:
            unpacking = _Unpacking(archive, root, max(GiB, LIMIT * status.st_size), edited=record.is_file())
            unpacking.run()
            refused = unpacking.refused
            with files.write_file(record) as partial:
                partial.write_text(json.dumps({"names": sorted(unpacking.names), "refused": refused}))
    return root, refused


def _refused_before(root: Path, record: Path) -> list[str] | None:
    """The lines of an earlier `unpack`; None if there was none, or files are missing now."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        contents = json.loads(record.read_text())
        if all((root / name).is_file() for name in contents["names"]):
            return contents["refused"]
    return None


class _Unpacking:
    """Unpacks an archive.

    Args:
        limit: bytes to which it may grow.
        edited: files in `root` may have been edited since an earlier call: none is replaced.
    """

    def __init__(self, archive: Path, root: Path, limit: int, edited: bool):
        self.archive, self.root, self.limit, self.edited = archive, root, limit, edited
        self.names: set[str] = set()  # of the files that are in `root` now
        self.refused: list[str] = []  # a line for each member that is not
        self.total, self.last = 0, "its beginning"

    def run(self) -> None:
        """Unpack all members, or those before the place where the archive is damaged; errors as `unpack`."""
        home, failure = self.root.parent, ""
        try:
            with _members(self.archive, self.limit) as members, tempfile.TemporaryDirectory(dir=home) as unfinished:
                for member in tqdm(members, f"unpacking {self.archive.name}", unit="file", delay=2):
                    self._add(member, Path(unfinished, "file"))
        except _Bomb as error:
            advice = "which pictures do not do: a bomb? If you trust it, unpack it and give the folder"
            failure = f"{self.archive} {error} at {self.last!r}, {advice}"
        except Exception as error:  # each way of packing has its own
            if isinstance(error, OSError) and error.errno:  # the drive's, not the archive's
                raise
            self.refused.append(f"breaks off after {self.last!r} ({error}): copy or pack it again")
            if not self.names:
                advice = "give the folder that holds the pictures"
                failure = f"{self.archive} is neither a folder nor a readable zip or tar ({error}): {advice}"
        if failure:
            if not self.edited:
                shutil.rmtree(self.root, ignore_errors=True)
            raise ValueError(failure)

    def _add(self, member: Member, partial: Path) -> None:
        self.total, self.last = self.total + member.size + BLOCK, member.name
        if self.total > self.limit:
            raise _Bomb(f"grows beyond {self.limit / GiB:.1f} GiB")
        parts = [part for part in member.name.replace("\\", "/").split("/") if part not in ("", ".")]
        if (name := "/".join(parts)) in self.names:
            self.refused.append(f"{member.name!r} is in it twice, and the first is used: pack it again")
        elif member.refused:
            self.refused.append(f"{member.name!r} {member.refused}")
        elif reason := self._write(member, self.root.joinpath(*parts), partial):
            self.refused.append(f"{member.name!r} cannot be unpacked ({reason}): pack it again")
        else:
            self.names.add(name)

    def _write(self, member: Member, target: Path, partial: Path) -> str:
        """Write a member to its place, complete, unless it is there already; returns why it cannot be read, or ""."""
        try:
            if target.is_file() and (self.edited or target.stat().st_size == member.size):
                return ""
            target.parent.mkdir(parents=True, exist_ok=True)
            with member.open() as source, partial.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            os.replace(partial, target)
        except Exception as error:  # each way of packing has its own errors
            if isinstance(error, OSError) and error.errno in files.DISK_FULL:
                advice = f"no room in {target.parent} for {member.name}: make room, or give another cache folder"
                raise OSError(errno.ENOSPC, advice) from error
            return str(error)
        return ""


class _Bomb(Exception):
    """An archive that grows far more than pictures do."""


@contextmanager
def _members(archive: Path, limit: int) -> Iterator[Iterator[Member]]:
    with archive.open("rb") as stream:
        start = stream.read(512)
    plain = start[257:262] == b"ustar"  # else a name in it could be taken for another format
    if not plain and (start.startswith(b"PK") or archive.suffix.lower() == ".zip"):
        with zipfile.ZipFile(archive) as zipped:
            yield _zip_members(zipped, limit)
    else:
        opener = next((way for first, way in COMPRESSED.items() if not plain and start.startswith(first)), open)
        with opener(archive, "rb") as stream:
            limited: Any = _Limited(stream, limit)
            with tarfile.open(fileobj=limited, mode="r:") as tarred:
                yield _tar_members(tarred)


def _zip_members(zipped: zipfile.ZipFile, limit: int) -> Iterator[Member]:
    members = [member for member in zipped.infolist() if not member.filename.endswith(("/", "\\"))]
    if (needed := sum(member.file_size for member in members)) > limit:
        largest = max(members, key=lambda member: member.file_size).filename
        raise _Bomb(f"would grow to {needed / GiB:.1f} GiB, a great part of it {largest!r},")
    for member in members:
        refused = _outside(member.filename)
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
            refused = LINK
        elif member.flag_bits & 1:
            refused = "is encrypted: unpack it by hand and give the folder"
        elif member.file_size > GiB // 4 and member.file_size > 100 * member.compress_size:
            refused = f"would grow to {member.file_size / GiB:.1f} GiB, which pictures do not do: a zip bomb?"
        yield Member(member.filename, member.file_size, refused, partial(zipped.open, member))


def _tar_members(tarred: tarfile.TarFile) -> Iterator[Member]:
    while (member := tarred.next()) is not None:
        refused = LINK if not member.isreg() or member.issparse() else _outside(member.name)
        if not member.isdir():
            yield Member(member.name, member.size, refused, partial(tarred.extractfile, member))


def _outside(name: str) -> str:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or PureWindowsPath(name).drive or ".." in parts:
        return "would land outside of the folder: pack it again with plain names"
    return ""


class _Limited:
    """A tar's decompressed stream that only moves forward, and fails where it grows beyond the limit in bytes."""

    def __init__(self, stream: IO[bytes], limit: int):
        self.stream, self.limit, self.tell = stream, limit, stream.tell

    def read(self, size: int) -> bytes:
        if size > LARGEST_READ or self.tell() > self.limit:
            raise _Bomb(f"has a header of {size:,} bytes" if size > LARGEST_READ else "grows without end")
        return self.stream.read(size)

    def seek(self, position: int) -> None:
        if not self.tell() <= position <= self.limit:
            raise _Bomb("has a member of impossible size")
        self.stream.seek(position)


# ── Copies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def mirror_folder(
    sources: Sequence[Path], source: Path, cache: Path, parts: Sequence[Path] = ()
) -> tuple[Path, dict[Path, str]]:
    """Bring the local copy of a folder up to date: read files that are new or changed, remove those that are gone.

    A file gets its name in the copy, and the time of its original, only after its bytes have been read back from local
    disk and compared with those read from the source; so a copy with its original's size and time is right.

    Args:
        sources: files under `source`, each once; the copy will hold only these.
        parts: the folders under `source` that are read, where not all of it is; each choice has its own copy.

    Returns:
        The copy, named as the source, and for each file that is not in it the reason.

    Raises:
        OSError: the disk is full.
    """
    home = _home(cache, [str(source), *sorted({str(part) for part in parts} - {str(source)})])
    root = home / (source.name or "root")
    targets = [root / file.relative_to(source) for file in sources]
    with files.claim_folder(home, wait=True):
        with thread_pool(8) as pool:  # a drive in a network answers slowly, and many requests at once
            reasons = list(tqdm(pool.map(_copy, sources, targets), "copying", len(sources), unit="file", delay=2))
        kept = set(targets)
        for file in [file for file in root.rglob("*") if file.is_file() and file not in kept]:
            file.unlink()
    return root, {file: reason for file, reason in zip(sources, reasons, strict=True) if reason}


def _copy(file: Path, target: Path) -> str:
    """Copy a file unless its copy is up to date; returns why it cannot be copied, or ""."""
    try:
        status = file.stat()
        copied = target.stat() if target.is_file() else None
        same_time = copied and copied.st_mtime_ns // 1000 == status.st_mtime_ns // 1000  # NTFS counts 100 ns
        if copied and same_time and copied.st_size == status.st_size:
            return ""
        with files.write_file(target, status.st_size) as partial:
            digest = _copy_bytes(file, partial)
            if partial.stat().st_size != status.st_size or files.sha256(partial) != digest:
                raise OSError(errno.EIO, "the copy differs from the file")
            os.utime(partial, ns=(status.st_atime_ns, status.st_mtime_ns))
    except OSError as error:
        if error.errno in files.DISK_FULL:
            raise
        return f"cannot be copied ({error.strerror}): check its permissions and the drive, then scan again"
    return ""


def _copy_bytes(file: Path, target: Path) -> str:
    """Copy a file; returns the digest of the bytes that were read."""
    digest = hashlib.sha256()
    with file.open("rb") as source, target.open("wb") as sink:
        while block := source.read(2**20):
            digest.update(block)
            sink.write(block)
    return digest.hexdigest()


def _home(cache: Path, identity: list) -> Path:
    """The folder below `cache` for what has this identity, made if it is missing."""
    home = cache.resolve() / hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    home.mkdir(parents=True, exist_ok=True)
    return home
