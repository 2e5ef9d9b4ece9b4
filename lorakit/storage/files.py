"""Files and folders that are complete or absent."""

import errno
import hashlib
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
UNLOCKED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)

LONG = 120  # bytes of a name to which more can be added on any file system: encrypted ones allow 143


def home() -> Path:
    """The user's home; the folder of temporary files where the user has none, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir())


def user_cache() -> Path:
    """The folder of lorakit's caches for this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache", "lorakit")


@contextmanager
def write_file(path: str | Path, size: int | None = None) -> Iterator[Path]:
    """Yield a temporary path in the same folder; when the block ends, move the file written there to `path`.

    A reader of `path` sees the old file or the new one, never a part of it, even if the machine stops meanwhile.
    On any exception the temporary file is removed and `path` is unchanged. Missing folders are made.

    Args:
        size: bytes that will be written, for the message when the disk is full.

    Raises:
        OSError: the disk is full, or `path` must not be written (PermissionError); the message gives advice.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{path} is a folder: give the name of a file")
    with _replace(path, size) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial


@contextmanager
def write_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder in the same place; when the block ends, rename it to `path`, with all of its files.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
        OSError: as `write_file`.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(errno.EEXIST, f"{path.name} already exists: name a new folder, or remove it first")
    with _replace(path, None) as partial:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed program
        partial.mkdir(parents=True)
        yield partial


@contextmanager
def _replace(path: Path, size: int | None) -> Iterator[Path]:
    """Yield the temporary path; when the block ends, flush the files there and move them to `path`."""
    name = os.fsencode(path.name)
    short = path.name if len(name) <= LONG else hashlib.sha256(name).hexdigest()
    partial = path.with_name(f".{short}.partial")
    try:
        yield partial
        for file in _files(partial):
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())  # else a power cut can leave the new name on empty blocks
        os.replace(partial, path)
    except BaseException as error:
        written = 0
        with suppress(OSError):
            written = sum(file.stat().st_size for file in _files(partial))
            _remove(partial)
        _raise_with_advice(error, path, partial, f"{size:,}" if size else f"more than {written:,}")
    with suppress(OSError):  # Windows and some network drives can flush no folder, and need not
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)  # else the new name may be lost
        finally:
            os.close(handle)


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove the temporary files and folders that a killed program left in a folder."""
    for path in folder.rglob(".*.partial"):
        _remove(path)


def append_lines(path: str | Path, text: str) -> None:
    """Append lines to a file in UTF-8, all of them or none.

    Raises:
        OSError: as `write_file`; the file is unchanged.
    """
    path, rest = Path(path), memoryview(text.encode())
    with path.open("ab", buffering=0) as stream:  # a buffer would try again while it is closed
        before = stream.tell()
        try:
            while rest:
                rest = rest[stream.write(rest) :]
        except BaseException as error:
            with suppress(OSError):
                os.truncate(path, before)
            _raise_with_advice(error, path, path, f"{len(text):,}")


@contextmanager
def claim_folder(folder: Path, wait: bool = False) -> Iterator[None]:
    """Lock the folder during a `with` block, against other processes and other threads of this one.

    The system frees the lock when the process ends. File systems without locks are used unlocked.

    Args:
        wait: until it is free; else a locked folder is an error.

    Raises:
        BlockingIOError: it is already locked.
        OSError: it cannot be written.
    """
    from filelock import FileLock, Timeout

    known = inspect.signature(FileLock.__init__).parameters
    firm: dict[str, Any] = {"fallback_to_soft": False} if "fallback_to_soft" in known else {}
    lock = FileLock(folder / ".lock", timeout=-1 if wait else 0, **firm)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"{folder.name} is in use by another program, notebook or cell. Stop that one first (a file named STOP in "
            "the folder ends a run after its step), or name another folder."
        ) from None
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in UNLOCKED:
            _raise_with_advice(error, folder / ".lock", folder / ".lock", "a few")
    try:
        yield
    finally:
        lock.release()


def sha256(path: Path) -> str:
    """The digest of a file's bytes, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters without the full stop; else its type."""
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else type(error).__name__


def printable(text: str) -> str:
    """The text without surrogates, which stand for the bytes of a file's name that are no UTF-8."""
    return text.encode("utf-8", "replace").decode()


def shown(text: str) -> str:
    """A text from a file for a message: it may be of any length, and contain control characters of a terminal."""
    return text if len(text) < 200 and text.isprintable() else ascii(text[:160]) + " …"


def _raise_with_advice(error: BaseException, path: Path, partial: Path, size: str) -> NoReturn:
    """Raise the error again, with advice if the system refused to write `path`.

    Args:
        size: bytes that were to be written, as text.
    """
    if isinstance(error, OSError):
        code = error.errno
    else:  # safetensors' writer is Rust: the system's error is only in its text
        match = re.search(r"\(os error (\d+)\)", str(error))
        code = int(match[1]) if match else None
    name = getattr(error, "filename", None)
    if code in DISK_FULL:
        free = ""
        with suppress(OSError):
            free = f", {shutil.disk_usage(path.parent).free:,} are free"
        needs = f"no room for {path.name} in {path.parent}: {size} bytes are needed{free}"
        raise OSError(code, f"{needs}. Make room or choose another folder") from error
    if code in FORBIDDEN and (name is None or Path(os.fsdecode(name)) in (path, partial, *path.parents)):
        reason = f"{path.name} cannot be written in {path.parent}, {os.strerror(code).lower()}"
        raise OSError(code, f"{reason}. Choose another folder") from error
    if code is not None and not isinstance(error, OSError):
        raise OSError(code, f"{path.name} cannot be written: {os.strerror(code).lower()}") from error
    raise error
