"""Threads for work that waits for drives or runs in C."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

WORKERS = min(8, os.cpu_count() or 1)


@contextmanager
def thread_pool(workers: int = WORKERS) -> Iterator[ThreadPoolExecutor]:
    """A pool that starts no more of its tasks once the block ends, as by an interrupt."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
