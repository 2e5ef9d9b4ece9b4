"""Read a LoRA file back, compare its effect with its source's, and describe files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit import storage
from lorakit.adapter import targets
from lorakit.adapter.algorithms import ALGORITHMS, Entry, Parts, algorithm_of
from lorakit.adapter.injection import Adapter
from lorakit.adapter.lora import Lora, distinct
from lorakit.adapter.read import load, settings_of
from lorakit.adapter.write import layout_alphas, lora_from, rescaled
from lorakit.base import Base

if TYPE_CHECKING:
    from lorakit.adapter.layers import AdapterLayer

# ── Proof ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Proof:
    """The agreement of a file with the adapter in memory."""

    modules: int
    error: float  # largest relative difference of a module's ΔW, in the Frobenius norm
    worst: str  # the module that has it
    losses: tuple[str, ...] = ()  # what other programs leave out of such a file, in sentences

    def describe(self) -> str:
        return f"ΔW of all {self.modules} modules agrees, largest difference {self.error:.2%}"

    def lines(self) -> list[str]:
        """The proof and the losses, for a log."""
        return [f"proof     read back: {self.describe()}", *(f"note      {loss}" for loss in self.losses)]


@torch.no_grad()
def prove(path: str | Path, source: Adapter | Lora, base: Base | None = None, layout: str = "kohya") -> Proof:
    """Read an exported file back and compare what it adds to each weight with what its source adds.

    Args:
        source: the adapter in memory, or the LoRA that was written.
        base: of the adapter.
        layout: that it was written in.

    Raises:
        RuntimeError: a module is missing, superfluous, or differs by more than rounding to the file's dtype can do.
    """
    file = load(path)
    layers: Mapping[str, AdapterLayer] = {}
    if isinstance(source, Adapter):
        assert base, "an adapter needs its base"
        layers, source = source.layers, lora_from(source, base)
    unmatched = sorted(file.modules.keys() ^ source.modules.keys())
    if unmatched or file.family not in (None, source.family):
        raise RuntimeError(
            f"{file.name} does not hold this LoRA: it reads as {file.family} with {len(file.modules)} modules, "
            f"not as {source.family} with {len(source.modules)}. Only in one of them: "
            f"{', '.join(unmatched[:4]) or 'none'}."
        )
    errors, alphas = {}, layout_alphas(source, layout)
    for module, entry in file.modules.items():
        layer = layers.get(module)
        written = rescaled(*source.modules[module], alphas[module])
        errors[module] = _compare(file.name, module, entry, source.modules[module], (written, alphas[module]), layer)
    worst = max(errors, key=errors.__getitem__)
    return Proof(len(errors), errors[worst], worst, tuple(_losses(file, layout)))


def _losses(file: Lora, layout: str) -> Iterator[str]:
    """What other programs leave out of a file."""
    if layout == "diffusers" and "unet" in file.adapts:
        yield "ComfyUI skips the attention layers of diffusers' layout: write layout kohya for it"
    for algorithm in sorted(set(file.algorithms.values()), key=lambda algorithm: algorithm.name):
        parts = next(parts for parts in file.parts.values() if algorithm_of(parts) is algorithm)
        if loss := algorithm.loss(_dtype(parts)):
            yield loss
    if targets.PROJECTION in file.modules:
        yield "A1111 and sd-scripts skip the change of SDXL's text projection"


def _compare(name: str, module: str, read: Entry, memory: Entry, written: Entry, layer: AdapterLayer | None) -> float:
    """The relative difference of what a module adds in memory and in the file.

    Args:
        written: the parts in memory at the alpha that the file's layout has.
        layer: of an adapter in memory. Without it the lengths of a DoRA are compared by themselves, and otherwise the
            LoRA that it contains: the lengths are those of any base.

    Raises:
        RuntimeError: it is more than rounding explains.
    """
    algorithm = algorithm_of(read[0])
    expected, sizes = algorithm_of(written[0]), [algorithm_of(parts).size(parts) for parts, _ in (read, written)]
    if expected is not algorithm or sizes[0] != sizes[1]:
        raise RuntimeError(
            f"{name}: {module} is a {algorithm.title} of {sizes[0]}, not the {expected.title} of {sizes[1]} written."
        )
    device = next(iter(memory[0].values())).device
    dtype = _dtype(read[0])

    def added(parts: Parts, alpha: float) -> Tensor:
        parts = {part: w.to(device) for part, w in parts.items()}
        return layer.delta(parts, alpha).flatten(1) if layer else algorithm.delta(parts, alpha)

    whole, rounded, in_file = added(*memory), added(algorithm.rounded(written[0], dtype), written[1]), added(*read)
    size, difference = whole.norm().item(), (in_file - whole).norm().item()
    error = difference / size if size else difference
    # The difference may come from rounding to the file's dtype, and from that of a float32 product.
    close = (in_file - rounded).norm().item() <= 1e-5 * rounded.norm().item() + 1e-12
    if not (close and all(torch.equal(read[0][part].cpu(), written[0][part].cpu()) for part in algorithm.exact)):
        explained = f"{error:.2%}, more than {dtype} explains"
        raise RuntimeError(f"{name}: {module} differs from what was written by {explained}. Export again.")
    return error


def _dtype(parts: Parts) -> torch.dtype:
    """The dtype of a module's matrices in a file."""
    return next(weight.dtype for part, weight in parts.items() if part not in algorithm_of(parts).exact)


# ── Describing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def describe_file(path: str | Path) -> dict[str, Any]:
    """Describe a LoRA file or folder (or one of a run's checkpoints) from its own weights and metadata.

    Raises:
        FileNotFoundError, ValueError, FloatingPointError: as `load`.
    """
    path, run = Path(path), None
    if not path.is_dir():
        with storage.open_safetensors(path) as file:
            run = (file.metadata() or {}).get("lorakit")
    files = [path, *(path.rglob("*") if path.is_dir() else ())]
    facts = {"file": path.name, "bytes": sum(file.stat().st_size for file in files if file.is_file())}
    if run:
        record = settings_of(run, path.name)
        return facts | {"kind": "checkpoint", "steps": record.get("step"), "settings": record.get("settings")}
    lora = load(path)
    facts |= {"embeddings": lora.embeddings} if lora.embeddings else {}
    modules, algorithm = lora.parts, ALGORITHMS[lora.algorithm]
    locon = algorithm.sums and any(map(targets.RESNET.search, modules))
    return facts | {
        "kind": "LoCon" if locon else algorithm.title,
        "family": lora.family,
        "modules": len(modules),
        "text_encoder": sum(targets.model_of(module) != "unet" for module in modules),
        "rank": distinct(lora.ranks.values()),
        "alpha": sorted({float(f"{alpha:.6g}") for _, alpha in lora.modules.values()}),
        "dtype": sorted({str(w.dtype).removeprefix("torch.") for parts in modules.values() for w in parts.values()}),
        "base": lora.metadata.get("ss_sd_model_name"),
        "trigger": lora.metadata.get("modelspec.trigger_phrase"),
        "steps": lora.metadata.get("ss_steps"),
        "hash": "none" if path.is_dir() else _verify(path, lora.metadata.get("sshs_model_hash")),
    }


def _verify(path: Path, expected: str | None) -> str:
    """Whether the tensors still have the hash in the file's metadata, `sshs_model_hash`."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        while block := stream.read(1 << 22):
            digest.update(block)
    return {None: "none", digest.hexdigest(): "verified"}.get(expected, "does not match: the weights were changed")
