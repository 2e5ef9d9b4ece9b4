"""Tensors in safetensors files: digests, cached entries, memory of their own."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorakit.storage import files


def cache_key(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def digest_tensors(tensors: Mapping[str, Tensor], facts: dict | None = None) -> str:
    """A digest of tensors, on the CPU, and what is said of them, hex."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors to be saved: on the CPU, contiguous, each with memory of its own.

    safetensors refuses tensors that share memory, as bitsandbytes' optimizer states share their quantization tables.
    A tensor that shares none is not copied.
    """
    found, taken = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in taken else tensor
        taken.add(place)
    return found


def read_cached(file: Path, say: Callable[[str], None]) -> dict[str, Tensor] | None:
    """A cached entry; None when it is missing or damaged, which only means that it is encoded again."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            if digest_tensors(tensors) == (handle.metadata() or {}).get("digest"):
                return tensors
    except (OSError, SafetensorError):
        pass
    say(f"cache     {file.name} is damaged: encoded again")
    return None


def write_cached(file: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = own_memory(tensors)
    with files.write_file(file) as partial:
        save_file(tensors, partial, {"digest": digest_tensors(tensors)})
    return tensors
