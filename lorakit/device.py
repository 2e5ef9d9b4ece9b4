"""Devices, compute dtypes, memory and threads."""

import ctypes
import gc
import os
import re
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from lorakit.config import Config


def free_memory(device: torch.device) -> None:
    """Return unused memory to the device, after the last reference to a model is gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h: bytes above which freed memory is returned

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


def choose_device(name: str = "auto") -> torch.device:
    """The named device; for "auto" an NVIDIA card, else Apple's, else the CPU.

    Raises:
        ValueError: torch cannot use this device on this machine.
    """
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, works in usable.items() if works))
    if not usable.get(name, False):
        names = ", ".join(device for device, works in usable.items() if works)
        raise ValueError(f"device {name!r} cannot be used: torch {torch.__version__} finds {names}. Use 'auto'.")
    return torch.device(name)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the frozen base and of autocast.

    "auto" selects bf16 by compute capability (8.0 and above): torch also reports it on a T4, where it is emulated.
    """
    dtypes = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if (precision, device.type) == ("fp16", "cpu"):
        raise ValueError("mixed_precision 'fp16' does not train on a CPU. Use 'auto', 'bf16' or 'no'.")
    if precision in dtypes:
        return dtypes[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.float32


@dataclass(frozen=True)
class Compute:
    """The device, dtype and quantization of a base.

    Attributes:
        dtype: of the frozen weights and of autocast.
        quantize: "none", "nf4" or "int8", for the UNet's transformers.
        batch: the largest number of pictures in one forward pass; None leaves the choice to the function.
    """

    device: torch.device
    dtype: torch.dtype
    quantize: str = "none"
    batch: int | None = None

    @classmethod
    def choose(cls, device: str = "auto", precision: str = "auto", quantize: str = "none") -> "Compute":
        """For sampling: the best choice on this machine, or the named device and precision.

        Args:
            device: as for `choose_device`.
            precision: as for `compute_dtype`, but on a CPU "fp16" counts as "auto".

        Raises:
            ValueError: the device cannot be used on this machine.
        """
        usable = choose_device(device)
        precision = "auto" if (precision, usable.type) == ("fp16", "cpu") else precision
        return cls(usable, compute_dtype(precision, usable), quantize)

    @classmethod
    def of(cls, config: Config) -> "Compute":
        """The device, dtype and quantization of a run.

        Raises:
            ValueError: the device or precision cannot be used on this machine.
        """
        device = choose_device(config.device)
        return cls(device, compute_dtype(config.mixed_precision, device), config.quantize)

    @property
    def half(self) -> bool:
        """Whether it computes in half precision, so that weights in float16 are enough."""
        return self.dtype != torch.float32

    def autocast(self) -> AbstractContextManager:
        return autocast(self.device, self.dtype)


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU under Linux, let the C library reuse freed memory, for the rest of this process.

    By default it returns each large tensor's pages to the system, which clears new ones for the next tensor: a seventh
    of the time of a step of SD 1.5 at 256 px.
    """
    if device.type == "cpu" and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries than glibc lack it
        if mallopt and mallopt(M_MMAP_THRESHOLD, 2**31 - 1):  # fails in older releases
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def rest_threads() -> None:
    """Release the OpenMP threads of this thread, before another thread takes over the computation (on Linux).

    Two sets of OpenMP threads on the same cores wait for each other: a step of the embedded base then takes 2.4 times
    as long. OpenMP starts new threads when this thread computes again.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return
    for library in set(re.findall(r"/\S*/lib(?:gomp|iomp5|omp)[-.]\S*", maps)):
        with suppress(OSError, AttributeError):  # OpenMP before 5.0 lacks the function
            ctypes.CDLL(library).omp_pause_resource_all(1)  # omp_pause_soft: may keep other resources


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to a compute dtype; no effect for float32."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


def quiet_libraries() -> None:
    """Switch off diffusers' and transformers' progress bars and hints."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device or the computer is out of memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    )
