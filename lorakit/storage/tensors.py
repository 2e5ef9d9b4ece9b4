"""Safetensors files: open, read headers, digest, cache."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorakit.storage import files

HEADER = 2**24  # bytes; a header in memory is thirty times as large. Real ones have up to a few million
DISGUISES = {  # first bytes of a file → what it is
    b"PK": "a zip or a PyTorch pickle", b"\x80": "a pickle", b"GGUF": "a GGUF file", b"\x1f\x8b": "a gzip archive",
    b"<": "a web page: the download was refused", b"{": "a website's answer: the download was refused",
    b"version http": "a Git LFS pointer: the download is incomplete", b"\0" * 8: "a row of zeros: the copy failed",
}  # fmt: skip


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """A safetensors file, mapped into memory, not read: `safe_open`'s handle.

    The library compares every size in it with the file's own before it allocates memory.

    Raises:
        FileNotFoundError: no file, or a folder, a pipe or a device, which might never answer.
        ValueError: another kind of file, or one that is cut off or damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}. Give a .safetensors file.")
    with file.open("rb") as stream:
        first = stream.read(64)
    try:
        if (length := int.from_bytes(first[:8], "little")) > HEADER:
            raise SafetensorError(f"its header takes {length:,} bytes, the limit is {HEADER:,}")
        handle = safe_open(file, "pt")
    except (SafetensorError, OSError) as error:  # older releases cannot map an empty file
        raise _incomplete(file, first, error) from error
    try:
        with handle:
            yield handle
    except SafetensorError as error:
        raise _incomplete(file, first, error) from error


def _incomplete(file: Path, first: bytes, error: Exception) -> ValueError:
    reason = f"it looks like {kind}" if (kind := disguise(first)) else "it was cut off or damaged"
    return ValueError(
        f"{file.name} ({file.stat().st_size:,} bytes) is not a complete safetensors file, {reason} "
        f"({files.shown(str(error))}). Download or copy it again."
    )


def disguise(first: bytes) -> str | None:
    """What a file is instead of what was asked for, by its first bytes; None if that is not known."""
    if len(first) >= 8 and 0 < int.from_bytes(first[:8], "little") <= HEADER:
        return None  # the length of a header: a safetensors file, whose first byte may be a pickle's
    text = first.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    return next((kind for start, kind in DISGUISES.items() if first.startswith(start) or text.startswith(start)), None)


def read_header(file: Path) -> tuple[dict[str, str], dict[str, dict]]:
    """A safetensors file's metadata, and its tensors in the file's order: key → dtype, shape and data_offsets.

    Raises:
        ValueError: as `open_safetensors`.
    """
    with open_safetensors(file), file.open("rb") as stream:
        table = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    metadata = table.pop("__metadata__", {})
    return metadata, dict(sorted(table.items(), key=lambda item: item[1]["data_offsets"]))


def digest_tensors(tensors: Mapping[str, Tensor], facts: dict | None = None) -> str:
    """A digest of tensors on the CPU and of facts about them that JSON can hold, hex."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, ready to be saved: on the CPU, contiguous, each with its own memory.

    safetensors refuses tensors that share memory, as bitsandbytes' optimizer states share their quantization tables.
    Only such tensors are copied.
    """
    separate, taken = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if place in taken else tensor
        taken.add(place)
    return separate


# ── Cached entries ──────────────────────────────────────────────────────────────────────────────────────────────────


def cache_key(*parts: Any) -> str:
    """A file name for what is computed from these values, which JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def read_cached(file: Path, say: Callable[[str], None]) -> dict[str, Tensor] | None:
    """The tensors of a cache entry; None if it is missing or damaged, and must be computed again.

    Args:
        say: called with a message for a damaged entry.
    """
    if not file.is_file():
        return None
    with suppress(ValueError), open_safetensors(file) as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        if digest_tensors(tensors) == (handle.metadata() or {}).get("digest"):
            return tensors
    say(f"cache     {file.name} is damaged: it is computed again")
    return None


def write_cached(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write a cache entry, and return its tensors on the CPU."""
    separate = own_memory(tensors)
    with files.write_file(file) as partial:
        save_file(separate, partial, {"digest": digest_tensors(separate)})
    return separate
