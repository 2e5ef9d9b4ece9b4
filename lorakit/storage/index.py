"""What files were found to be, kept in the user's cache folder: one that is unchanged is not read again."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tqdm.auto import tqdm

from lorakit.storage import files

WORKERS = min(8, os.cpu_count() or 1)
RECENT = 2 * 10**9  # ns; a file changed again within a tick of its drive's clock looks unchanged


def measure_files(
    paths: Sequence[Path], measure: Callable[[Path], list | str], store: Path, version: str, fresh: bool = False
) -> list[list | str]:
    """What `measure` says of each file, asked on all cores of those that are new or changed since the last time.

    A file counts as unchanged while its size, its inode and the times of its last changes (of contents, of anything)
    are what they were. What a file was found to be is kept when interrupted, too.

    Args:
        measure: a list of plain values, which is kept, or a reason why there is none, which is not.
        store: file that keeps it; one that is missing, damaged or cannot be written only costs time.
        version: of what is measured; another one's is not used.
        fresh: ask of all files.
    """
    before, now, found = {} if fresh else _read(store, version), {}, {}
    stamps = [_stamp(path) for path in paths]
    for path, stamp in zip(paths, stamps, strict=True):
        if (entry := before.get(str(path))) and stamp and entry[0] == stamp:
            found[path], now[str(path)] = entry[1], entry
    missing = [(path, stamp) for path, stamp in zip(paths, stamps, strict=True) if path not in found]
    began, pool = time.time_ns(), ThreadPoolExecutor(WORKERS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about odd metadata and large pictures; what matters raises
            answers = pool.map(measure, [path for path, _ in missing])
            bar = tqdm(answers, "reading", len(missing), unit="picture", disable=len(missing) <= 200)
            for (path, stamp), answer in zip(missing, bar, strict=True):
                found[path] = answer
                if isinstance(answer, list) and stamp and began - max(stamp[1:3]) > RECENT:
                    now[str(path)] = [stamp, answer]
    finally:
        pool.shutdown(cancel_futures=True)
        if now != before:
            _write(store, version, now)
    return [found[path] for path in paths]


def _stamp(path: Path) -> list[int]:
    try:
        found = path.stat()
    except OSError:  # measure will say why
        return []
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _read(store: Path, version: str) -> dict[str, list]:
    try:
        digest, _, text = store.read_text("utf-8").partition("\n")
        if hashlib.sha256(text.encode()).hexdigest() == digest:
            found = json.loads(text)
            return found["entries"] if found["version"] == version else {}
    except (OSError, ValueError):
        pass
    return {}


def _write(store: Path, version: str, entries: dict[str, list]) -> None:
    text = json.dumps({"version": version, "entries": entries})
    with suppress(OSError), files.write_file(store) as partial:
        partial.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}", "utf-8")
