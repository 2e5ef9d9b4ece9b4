"""Files that are whole or not there at all."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def replacing(path: str | Path, size: int | None = None) -> Iterator[Path]:
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


def _explain(error: BaseException, path: Path, partial: Path, size: str) -> OSError | None:
    """The same error with advice, if it is about writing `path`."""
    if isinstance(error, OSError):
        code = error.errno
    else:  # safetensors' writer is Rust: what the system said is only in its text
        told = re.search(r"\(os error (\d+)\)", str(error))
        code = int(told[1]) if told else None
    if code in FULL:
        free = ""
        with suppress(OSError):
            free = f", {shutil.disk_usage(path.parent).free:,} are free"
        where = f"{path.name} in {path.parent}"
        return OSError(code, f"no room for {where}: {size} bytes are needed{free}. Make room or choose another folder")
    about = getattr(error, "filename", None)
    if code in FORBIDDEN and (about is None or Path(os.fsdecode(about)) in (path, partial, *path.parents)):
        reason = os.strerror(code).lower()
        return OSError(code, f"{path.name} cannot be written in {path.parent}, {reason}. Choose another folder")
    return None


def _sync_folder(folder: Path) -> None:
    """Make the new name last as well. Windows and some network drives cannot, and need not be asked."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
