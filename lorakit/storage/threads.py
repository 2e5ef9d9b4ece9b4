"""Threads for work that waits for drives or runs in C, and the lock of work that must not run in two threads."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
WORKERS = min(8, os.cpu_count() or 1)
LOADING = threading.RLock()  # held to import model libraries, and to make, load or change models


def exclusive(function: Callable[P, T]) -> Callable[P, T]:
    """Hold LOADING during a call.

    While a library makes an empty model, it patches torch for all threads: a model that another thread makes at that
    moment has no weights either.
    """

    @wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> T:
        with LOADING:
            return function(*args, **kwargs)

    return locked


@contextmanager
def thread_pool(workers: int = WORKERS) -> Iterator[ThreadPoolExecutor]:
    """A pool that starts no more of its tasks once the block ends, as by an interrupt."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
