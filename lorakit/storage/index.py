"""Measurements of files, kept in the user's cache: an unchanged file is not read again."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tqdm.auto import tqdm

from lorakit.storage import files
from lorakit.storage.threads import WORKERS, thread_pool

RECENT = 2 * 10**9  # ns; a file changed again within a tick of its drive's clock looks unchanged


def measure_files(
    paths: Sequence[Path], measure: Callable[[Path], list | str], store: Path, version: str, fresh: bool = False
) -> list[list | str]:
    """The measurement of each file; files that are new or changed since the last call are measured, on all cores.

    A file counts as unchanged while its size, its inode, and the times at which its contents or attributes last
    changed are the same. Measurements made before an interrupt are kept.

    Args:
        measure: returns a list of plain values, which is kept, or a reason why there is none, which is not.
        store: file that keeps the measurements; a missing, damaged or read-only one only costs time.
        version: of the measurement; those of another version are not used.
        fresh: measure all files.
    """
    before = {} if fresh else _read(store, version)
    stamps = {path: _stamp(path) for path in paths}
    kept = {str(path): before[str(path)] for path, stamp in stamps.items()
            if stamp and before.get(str(path), [None])[0] == stamp}  # fmt: skip
    missing = [path for path in paths if str(path) not in kept]
    measured: dict[Path, list | str] = {}
    began = time.time_ns()
    try:
        with warnings.catch_warnings(), thread_pool(WORKERS) as pool:
            warnings.simplefilter("ignore")  # Pillow's, about odd metadata and large pictures; what matters raises
            answers = pool.map(measure, missing)
            for path in tqdm(missing, "reading", unit="picture", disable=len(missing) <= 200):
                measured[path] = next(answers)
    finally:
        settled = [path for path, stamp in stamps.items() if stamp and began - max(stamp[1:3]) > RECENT]
        valid = [path for path in settled if isinstance(measured.get(path), list)]
        after = kept | {str(path): [stamps[path], measured[path]] for path in valid}
        if after != before:
            _write(store, version, after)
    return [measured[path] if path in measured else kept[str(path)][1] for path in paths]


def _stamp(path: Path) -> list[int]:
    """What changes with a file: size in bytes, times in ns, inode; [] if the file cannot be reached."""
    try:
        status = path.stat()
    except OSError:  # `measure` will return the reason
        return []
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read(store: Path, version: str) -> dict[str, list]:
    with suppress(OSError, ValueError):
        digest, _, text = store.read_text("utf-8").partition("\n")
        if hashlib.sha256(text.encode()).hexdigest() == digest:
            index = json.loads(text)
            return index["entries"] if index["version"] == version else {}
    return {}


def _write(store: Path, version: str, entries: dict[str, list]) -> None:
    text = json.dumps({"version": version, "entries": entries})
    with suppress(OSError), files.write_file(store) as partial:
        partial.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}", "utf-8")
