"""Devices: which one to train on, the dtype to compute in, and their memory."""

import ctypes
import gc
import os
import re
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch


def free_memory(device: torch.device) -> None:
    """Hand freed memory back, after the last reference to a model is gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h: bytes above which freed memory is handed back

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


# ── Where and how it computes ───────────────────────────────────────────────────────────────────────────────────────


def choose_device(name: str = "auto") -> torch.device:
    """The device to train on: an NVIDIA card, else Apple's, else the CPU.

    Raises:
        ValueError: a device is asked for that torch cannot use here.
    """
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, works in usable.items() if works))
    if not usable.get(name, False):
        here = ", ".join(device for device, works in usable.items() if works)
        raise ValueError(f"device {name!r} cannot be used: torch {torch.__version__} sees {here}. Use 'auto'.")
    return torch.device(name)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the frozen base and of autocast.

    bf16 is chosen by compute capability (8.0 and above): torch also reports it on a T4, where it is emulated.
    """
    named = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision in named:
        if precision == "fp16" and device.type == "cpu":
            raise ValueError("mixed_precision 'fp16' does not train on a CPU. Use 'auto', 'bf16' or 'no'.")
        return named[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.float32


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU under Linux, let the C library keep what is freed for what comes next, in this process from now on.

    It would hand each large tensor's pages back, and the system clear new ones for the next: a seventh of a step of
    SD 1.5 at 256 px.
    """
    if device.type == "cpu" and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; others have their own ways
        if mallopt and mallopt(M_MMAP_THRESHOLD, 2**31 - 1):  # older ones refuse, and are better left alone then
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def rest_threads() -> None:
    """Let go of the threads that OpenMP keeps for this one, before another takes over the computing.

    Two sets of them on the same cores wait for each other: a step of the embedded base then takes 2.4 times as long.
    New ones come when this thread computes again. Linux alone; elsewhere nothing is done.
    """
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return
    for library in set(re.findall(r"/\S*/lib(?:gomp|iomp5|omp)[-.]\S*", mapped)):
        with suppress(OSError, AttributeError):  # OpenMP before 5.0 does not know how
            ctypes.CDLL(library).omp_pause_resource_all(1)  # softly: what can be kept is kept


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to a compute dtype; nothing in float32."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


# ── Components ──────────────────────────────────────────────────────────────────────────────────────────────────────


def quiet_libraries() -> None:
    """Keep diffusers' and transformers' progress bars and hints out of a run's own output."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the computer has no memory left, as each of them says it."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    )
