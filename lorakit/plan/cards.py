"""Cards, and the memory that is free on this machine."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorakit.device import choose_device, compute_dtype


@dataclass(frozen=True)
class Card:
    """What computes: an NVIDIA card as its maker describes it, or a device of this machine."""

    name: str
    memory: float | None  # GiB that torch sees; None: unknown
    tflops: float = 0.0  # dense half-precision matrix products with float32 sums, 10^12 a second; 0: unknown
    bf16: bool = True
    device: str = "cuda"

    @property
    def free(self) -> int | None:
        """The card's memory in bytes; None: unknown."""
        return None if self.memory is None else int(self.memory * 2**30)

    def dtype(self, precision: str = "auto") -> torch.dtype:
        """The dtype of the frozen base on this card.

        Args:
            precision: the setting `mixed_precision`.
        """
        if self.device == "cuda" and precision == "auto":
            return torch.bfloat16 if self.bf16 else torch.float16
        return compute_dtype(precision, torch.device(self.device))


CARDS = {
    card.name: card
    for card in (
        Card("1660", 5.8, 5, bf16=False), Card("2060", 5.8, 26, bf16=False), Card("T4", 14.7, 65, bf16=False),
        Card("3060", 11.8, 25), Card("3070", 7.7, 41), Card("3080", 9.7, 60), Card("3090", 23.7, 71),
        Card("4080", 15.6, 97), Card("4090", 23.6, 165), Card("A100", 39.4, 312),
        # Apple's M1 to M3: Metal's recommended working set is two thirds of 8 and of 16 GiB.
        Card("Apple 8 GB", 5.3, device="mps"), Card("Apple 16 GB", 10.7, device="mps"),
    )
}  # fmt: skip


def card(name: str) -> Card:
    """The card of that name in CARDS, however it is written: "t4", "RTX 4090". ValueError: unknown name."""
    if not (known := {_short(key): found for key, found in CARDS.items()}.get(_short(name))):
        raise ValueError(f"There is no card {name!r} in the table. It has {', '.join(CARDS)}.")
    return known


def _short(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[rg]tx|[\s_-]", "", name.lower())


def this_machine() -> Card | None:
    """The NVIDIA card of this machine with its free memory, and the rate of CARDS if its name is there."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    known = next((card for key, card in CARDS.items() if key in name), None)
    free = (free_memory_bytes("cuda") or 0) / 2**30
    return replace(known or Card("", 0, bf16=torch.cuda.get_device_capability() >= (8, 0)), name=name, memory=free)


def local_card(name: str = "auto") -> Card:
    """The device of this machine that a run trains on. ValueError: torch cannot use it.

    Args:
        name: the setting `device`.
    """
    device = choose_device(name)
    if device.type == "cuda" and (found := this_machine()):
        return found
    free = free_memory_bytes(device)
    return Card("this computer", None if free is None else free / 2**30, device=device.type)


def free_memory_bytes(device: torch.device | str) -> int | None:
    """Bytes that a run can still allocate on a device of this machine; None: unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps" and hasattr(torch.mps, "recommended_max_memory"):
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        from psutil import virtual_memory
    except ImportError:
        return None
    return min([virtual_memory().available, *_container_limits()])


def _container_limits(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that a container can still allocate, from its control group (version 2, then 1); empty without a limit."""
    for folder, limit, used in (
        (root, "memory.max", "memory.current"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            # Cached files count as used, but the kernel frees them when memory is needed.
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            return [int((folder / limit).read_text()) - int((folder / used).read_text()) + cached]
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return []
