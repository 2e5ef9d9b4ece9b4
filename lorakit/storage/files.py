"""Files that are whole or not there at all."""

import errno
import hashlib
import inspect
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
UNLOCKED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def write_file(path: str | Path, size: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends, put what was written there in `path`'s place.

    Whoever opens `path` sees the old file or the new one, never a part of it, even if the machine dies meanwhile.
    On any exception the temporary file is removed and `path` left as it was. Missing folders are made.

    Args:
        size: bytes that will be written, for the message when there is no room.

    Raises:
        OSError: no room, or no right to write there (PermissionError); says what to do.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{path} is a folder: give the name of a file")
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())  # else a power cut can leave the new name on empty blocks
        os.replace(partial, path)
    except BaseException as error:
        written = 0
        with suppress(OSError):
            written = partial.stat().st_size
            partial.unlink()
        if explained := _explain(error, path, partial, f"{size:,}" if size else f"more than {written:,}"):
            raise explained from error
        raise
    _sync_folder(path.parent)


@contextmanager
def write_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; when the block ends, give it that name. All of it is there, or nothing.

    Raises:
        FileExistsError: something of that name is there already.
        OSError: as `replacing`.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(errno.EEXIST, f"{path.name} is there already: name a new folder, or remove it first")
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed program left
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb+") as stream:
                    os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException as error:
        written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        shutil.rmtree(partial, ignore_errors=True)
        if explained := _explain(error, path, partial, f"more than {written:,}"):
            raise explained from error
        raise
    _sync_folder(path.parent)


def append_lines(path: str | Path, text: str) -> None:
    """Add lines to a file, all of them or none, in UTF-8.

    Raises:
        OSError: as `replacing`; the file is what it was then.
    """
    path, left = Path(path), memoryview(text.encode())
    with path.open("ab", buffering=0) as stream:  # a buffer would try again while it is closed
        before = stream.tell()
        try:
            while left:
                left = left[stream.write(left) :]
        except BaseException as error:
            with suppress(OSError):
                os.truncate(path, before)
            if explained := _explain(error, path, path, f"{len(text):,}"):
                raise explained from error
            raise


@contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Let nobody else claim the folder inside a `with` block: no other process, and no other thread of this one.

    The system takes the claim back when a process dies. File systems that know no locks are used without.

    Raises:
        BlockingIOError: somebody has claimed it.
        OSError: it cannot be written.
    """
    from filelock import FileLock, Timeout

    firm = {"fallback_to_soft": False} if "fallback_to_soft" in inspect.signature(FileLock.__init__).parameters else {}
    lock = FileLock(folder / ".lock", timeout=0, **firm)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"{folder.name} is in use: another program, notebook or cell works in it. Stop that one first (a file "
            "named STOP in the folder ends a run after its step), or name another folder."
        ) from None
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno in UNLOCKED:
            yield
            return
        if explained := _explain(error, folder / ".lock", folder / ".lock", "a few"):
            raise explained from error
        raise
    try:
        yield
    finally:
        lock.release()


def remove_partial(folder: Path) -> None:
    """Remove what a killed program left half-written in a folder."""
    for path in folder.rglob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The digest of a file's bytes, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _explain(error: BaseException, path: Path, partial: Path, size: str) -> OSError | None:
    """The same error with advice, if it is about writing `path`."""
    if isinstance(error, OSError):
        code = error.errno
    else:  # safetensors' writer is Rust: what the system said is only in its text
        told = re.search(r"\(os error (\d+)\)", str(error))
        code = int(told[1]) if told else None
    if code in DISK_FULL:
        free = ""
        with suppress(OSError):
            free = f", {shutil.disk_usage(path.parent).free:,} are free"
        where = f"{path.name} in {path.parent}"
        return OSError(code, f"no room for {where}: {size} bytes are needed{free}. Make room or choose another folder")
    about = getattr(error, "filename", None)
    if code in FORBIDDEN and (about is None or Path(os.fsdecode(about)) in (path, partial, *path.parents)):
        reason = os.strerror(code).lower()
        return OSError(code, f"{path.name} cannot be written in {path.parent}, {reason}. Choose another folder")
    if code is not None and not isinstance(error, OSError):
        return OSError(code, f"{path.name} cannot be written: {os.strerror(code).lower()}")
    return None


def _sync_folder(folder: Path) -> None:
    """Make the new name last as well. Windows and some network drives cannot, and need not be asked."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
