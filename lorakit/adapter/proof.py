"""Read a LoRA file back and compare its effect with what it was made from."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakit.adapter import layers as layers_module
from lorakit.adapter import targets
from lorakit.adapter.injection import Adapter
from lorakit.adapter.lora import Lora
from lorakit.adapter.read import load, open_lora_file, settings_of
from lorakit.adapter.write import layout_alphas, lora_from, rescaled
from lorakit.base import Base

# ── Proof ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Proof:
    """That a file does what the adapter in memory does."""

    modules: int
    error: float  # largest relative difference of a module's ΔW, in the Frobenius norm
    worst: str  # the module that has it

    def describe(self) -> str:
        return f"ΔW of all {self.modules} modules agrees, largest difference {self.error:.2%}"


@torch.no_grad()
def prove(path: str | Path, source: Adapter | Lora, base: Base | None = None, layout: str = "kohya") -> Proof:
    """Read an exported file back and compare what it adds to each weight with what it was made of adds.

    Args:
        source: the adapter in memory, or what was written.
        base: of the adapter.
        layout: that it was written in.

    Raises:
        RuntimeError: a module is missing, superfluous, or differs by more than rounding to the file's dtype can do.
    """
    read, layers = load(path), source.layers if isinstance(source, Adapter) else {}
    own = lora_from(source, base) if layers else source
    odd = sorted(read.modules.keys() ^ own.modules.keys())
    if odd or read.family not in (None, own.family):
        raise RuntimeError(
            f"{read.name} does not hold this LoRA: it reads as {read.family} with {len(read.modules)} modules, "
            f"not as {own.family} with {len(own.modules)}. Only in one of them: {', '.join(odd[:4]) or 'none'}."
        )

    def added(module: str, parts: dict[str, Tensor], alpha: float) -> Tensor:
        parts = {part: tensor.to(device) for part, tensor in parts.items()}
        if module in layers:
            return layers_module.meaning(layers[module], parts, alpha).flatten(1)
        # The lengths of a DoRA say the same of any base: they are compared by themselves.
        return layers_module.change({part: t for part, t in parts.items() if part != "dora_scale"}, alpha)

    errors, alphas = {}, layout_alphas(own, layout)
    for module, (parts, alpha) in read.modules.items():
        device = next(iter(own.modules[module][0].values())).device
        written = rescaled(*own.modules[module], alphas[module])
        dtype = next(t.dtype for part, t in parts.items() if part != "dora_scale")
        rounded = {part: layers_module.file_dtype(part, tensor, dtype) for part, tensor in written.items()}
        if layers_module.size(parts) != layers_module.size(written):
            raise RuntimeError(
                f"{read.name}: {module} adds {layers_module.size(parts)} where {layers_module.size(written)} belongs."
            )
        whole, rounded, other = (
            added(module, *entry) for entry in (own.modules[module], (rounded, alphas[module]), (parts, alpha))
        )
        size, difference = whole.norm().item(), (other - whole).norm().item()
        errors[module] = difference / size if size else difference
        lengths = [some.get("dora_scale", torch.empty(0)).cpu() for some in (parts, written)]
        # Rounding to the file's dtype is all that may part them, and a float32 product's own.
        close = (other - rounded).norm().item() <= 1e-5 * rounded.norm().item() + 1e-12
        if not (close and torch.equal(*lengths)):
            by = f"{errors[module]:.2%}, more than {dtype} explains"
            raise RuntimeError(f"{read.name}: {module} differs from what was written by {by}. Export again.")
    worst = max(errors, key=errors.__getitem__)
    return Proof(len(errors), errors[worst], worst)


# ── Telling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def describe_file(path: str | Path) -> dict:
    """Tell what a LoRA file or folder (or one of a run's checkpoints) is, from its own weights and metadata.

    Raises:
        FileNotFoundError, ValueError, FloatingPointError: as `load`.
    """
    path, run = Path(path), None
    if not path.is_dir():
        with open_lora_file(path) as file:
            run = (file.metadata() or {}).get("lorakit")
    held = [path, *(path.rglob("*") if path.is_dir() else ())]
    told = {"file": path.name, "bytes": sum(file.stat().st_size for file in held if file.is_file())}
    if run:
        facts = settings_of(run, path.name)
        return told | {"kind": "checkpoint", "steps": facts.get("step"), "settings": facts.get("settings")}
    lora = load(path)
    parts, alphas = lora.parts.values(), [alpha for _, alpha in lora.modules.values()]
    locon = any(targets.RESNET.search(module) for module in lora.modules)
    return told | {
        "kind": {"lora": "LoCon" if locon else "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}[lora.algorithm],
        "family": lora.family,
        "modules": len(parts),
        "text_encoder": sum(targets.model_of(module) != "unet" for module in lora.modules),
        "rank": sorted({rank for own in parts if (rank := layers_module.rank_of(own))}),
        "alpha": sorted(set(alphas)),
        "dtype": sorted({str(tensor.dtype).removeprefix("torch.") for own in parts for tensor in own.values()}),
        "base": lora.metadata.get("ss_sd_model_name"),
        "trigger": lora.metadata.get("modelspec.trigger_phrase"),
        "steps": lora.metadata.get("ss_steps"),
        "hash": "none" if path.is_dir() else _verify(path, lora.metadata.get("sshs_model_hash")),
    }


def _verify(path: Path, expected: str | None) -> str:
    """Whether the tensors are still those that the file's `sshs_model_hash` was made of."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        while block := stream.read(1 << 22):
            digest.update(block)
    return {None: "none", digest.hexdigest(): "verified"}.get(expected, "does not match: the weights were changed")
