"""Write adapters and LoRAs as files that other programs read."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from safetensors.torch import save_file
from torch import Tensor

from lorakit import storage
from lorakit.adapter import metadata as metadata_module
from lorakit.adapter import targets
from lorakit.adapter.algorithms import ALGORITHMS, Entry, Parts, algorithm_of
from lorakit.adapter.injection import Adapter
from lorakit.adapter.lora import Lora, finite, usual
from lorakit.adapter.names import KOHYA, kohya_name
from lorakit.adapter.read import PEFT
from lorakit.base import Base

LAYOUTS = {  # layout → the algorithms that it can hold
    layout: tuple(name for name, algorithm in ALGORITHMS.items() if layout in algorithm.layouts)
    for layout in ("kohya", "diffusers", "peft")
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def dtype_of(name: str) -> torch.dtype:
    """A dtype by the name that kohya's settings give it.

    Raises:
        ValueError: unknown name.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown. Use {', '.join(DTYPES)}.")
    return DTYPES[name]


def lora_from(adapter: Adapter, base: Base, metadata: dict[str, str] | None = None) -> Lora:
    """An adapter in memory as a LoRA: its live weights, and the metadata of base and adapter.

    Args:
        metadata: more of it, of the run.
    """
    modules = {
        module: ({part: weight.detach() for part, weight in layer.parts.items()}, layer.spec.alpha)
        for module, layer in adapter.layers.items()
    }
    return Lora("adapter", base.family, metadata_module.adapter_metadata(adapter, base) | (metadata or {}), modules, {})


def save_adapter(
    adapter: Adapter, base: Base, path: str | Path, *, metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float16, layout: str = "kohya",
) -> Path:  # fmt: skip
    """Write the adapter as a LoRA file, whole or not at all: `save` of `lora_from`.

    Shapes are those of the base's own layers. For SD 2.x that makes `proj_in` and `proj_out` 2-D, as sd-scripts
    writes them for a diffusers folder; for a single checkpoint file it makes convolutions of them and writes 4-D.
    A1111 reshapes and ComfyUI flattens, so either fits there; diffusers and sd-scripts on a folder take only 2-D.
    """
    return save(lora_from(adapter, base, metadata), path, dtype=dtype, layout=layout)


def save(lora: Lora, path: str | Path, *, dtype: torch.dtype = torch.float16, layout: str = "kohya") -> Path:
    """Write a LoRA, whole or not at all.

    Args:
        path: a `.safetensors` file; of layout "peft" a new folder, which gets one of PEFT's for each model.
        dtype: of the matrices, float16, bfloat16 or float32.
        layout: "kohya" is read by A1111, Forge, ComfyUI, Civitai, sd-scripts and diffusers, and holds any algorithm;
            "diffusers" by diffusers, with the scale worked into the weights, because its older releases and all other
            programs take alpha for the rank there; "peft" by PEFT's `from_pretrained` on a UNet or text encoder.

    Raises:
        ValueError: unknown layout, or one that cannot hold the algorithm; an unknown family; a module without a
            canonical name; metadata with paths or tokens of this machine.
        FloatingPointError: weights that are NaN, or too large for `dtype`.
        OSError: no room or no right to write; nothing is left behind.
    """
    path = Path(path)
    if problem := refusal(layout, lora.algorithm):
        raise ValueError(problem)
    kinds = {algorithm.name for algorithm in lora.algorithms.values()}
    if layout != "kohya" and (len(kinds) != 1 or lora.aside):
        contents = ", ".join([*sorted(kinds), *lora.aside][:3])
        raise ValueError(f"layout {layout!r} cannot hold everything in {lora.name} ({contents}). Use 'kohya'.")
    if (layout == "peft") == (path.suffix == ".safetensors"):
        kind = "folder without suffix" if layout == "peft" else "file that ends in .safetensors"
        raise ValueError(f"layout {layout!r} is written as a {kind}, not {path.name}.")
    if lora.family is None:
        raise ValueError(f"The family of {lora.name} is not known. Give it: sd15, sd2 or sdxl.")
    lora = _laid_out(lora, layout)
    if layout == "peft":
        return _write_peft(lora, path, dtype)
    tensors = _rounded(lora, layout, dtype, path.name)
    if layout == "kohya":
        # A float32 alpha keeps scales such as 0.3 exact; every reader takes it with .item().
        alphas = {module: torch.tensor(alpha, dtype=torch.float32) for module, (_, alpha) in lora.modules.items()}
        tensors |= {f"{kohya_name(module, lora.family)}.alpha": alpha for module, alpha in alphas.items()}
        tensors |= lora.aside
    metadata = {"modelspec.title": path.stem} | lora.metadata
    metadata_module.check_private(metadata)
    serial = serialize(tensors)
    length = 8 + int.from_bytes(serial[:8], "little")
    table, body = json.loads(serial[8:length]), memoryview(serial)[length:]
    digest = hashlib.sha256(body).hexdigest()
    legacy = header({k: v for k, v in metadata.items() if k.startswith("ss_")}, table)
    at, until = (max(0, edge - len(legacy)) for edge in (0x100000, 0x110000))
    metadata |= {
        "sshs_model_hash": digest,
        "sshs_legacy_hash": hashlib.sha256(legacy[0x100000:0x110000] + bytes(body[at:until])).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{digest}",
    }
    first = header(metadata, table)
    with storage.write_file(path, len(first) + len(body)) as partial, partial.open("wb") as stream:
        stream.write(first)
        stream.write(body)
    return path


def refusal(layout: str, algorithm: str) -> str | None:
    """Why a LoRA of an algorithm cannot be written in a layout; None where it can be."""
    if layout not in LAYOUTS:
        return f"layout {layout!r} is unknown. Use {', '.join(map(repr, LAYOUTS))}."
    if algorithm in LAYOUTS[layout]:
        return None
    able = " or ".join(repr(name) for name, algorithms in LAYOUTS.items() if algorithm in algorithms)
    return f"layout {layout!r} cannot hold algorithm {algorithm!r}; its readers would drop it. Use {able}."


def _rounded(lora: Lora, layout: str, dtype: torch.dtype, name: str) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    Raises:
        FloatingPointError: NaN, or too large for the dtype.
    """
    tensors = {}
    for module, parts in lora.parts.items():
        for part, stored in algorithm_of(parts).rounded(parts, dtype).items():
            # sd-scripts makes convolutions of these where it trains on a single file; diffusers has them linear.
            linear = layout != "kohya" and lora.family != "sd15" and module.endswith((".proj_in", ".proj_out"))
            stored = stored.flatten(1) if linear else stored
            tensors[_key(layout, module, part, lora.family)] = stored
    tensors = storage.own_memory(tensors)
    finite(tensors, name, f"Training diverged, or they exceed {dtype}: use an earlier checkpoint, or float32")
    return tensors


def _key(layout: str, module: str, part: str, family: str | None) -> str:
    """The key of a tensor; of layout "peft" within the model's own file."""
    if layout == "kohya":
        return f"{kohya_name(module, family)}.{KOHYA.get(part, part)}"
    part = {"down": "lora_A.weight", "up": "lora_B.weight"}.get(part, part)
    which, path = targets.model_of(module), targets.path_of(module)
    outside = which == "unet" or module == targets.PROJECTION  # of a text encoder's inner text_model
    if layout == "diffusers":
        return f"{which}.{'' if outside else 'text_model.'}{path}.{part}"
    return f"base_model.model.{'' if outside else _inner(which)}{path}.{part}"


def _laid_out(lora: Lora, layout: str) -> Lora:
    """The LoRA with the weights and alphas that it has in a layout."""
    alphas, settings = layout_alphas(lora, layout), {}
    modules = {m: (rescaled(parts, alpha, alphas[m]), alphas[m]) for m, (parts, alpha) in lora.modules.items()}
    if layout != "diffusers":
        return replace(lora, modules=modules)
    for which in lora.adapts:
        adapted = {module: entry for module, entry in modules.items() if targets.model_of(module) == which}
        settings.update({f"{which}.{key}": value for key, value in _peft_settings(adapted).items()})
    return replace(lora, modules=modules, metadata=lora.metadata | {"lora_adapter_metadata": json.dumps(settings)})


def layout_alphas(lora: Lora, layout: str) -> dict[str, float]:
    """The alphas that modules have in a layout; `rescaled` works the change into the weights.

    diffusers, reading a kohya file, gives every layer of text encoders and attention the alpha that most modules of the
    model have. It does find those of larger convolutions.
    """
    if layout == "diffusers":
        return {module: float(algorithm_of(parts).layer_rank(parts)) for module, parts in lora.parts.items()}
    alphas = {module: alpha for module, (_, alpha) in lora.modules.items()}
    if layout == "kohya":
        for which in lora.adapts:
            kernels = {m: algorithm_of(x).kernel(x) for m, x in lora.parts.items() if targets.model_of(m) == which}
            most = usual([alphas[module] for module in kernels if alphas[module]] or [1.0])
            narrow = [m for m, kernel in kernels.items() if kernel is not None and max(kernel, default=1) == 1]
            alphas |= dict.fromkeys(narrow, most)
    return alphas


def rescaled(parts: Parts, alpha: float, to: float) -> Parts:
    """Parts that add at the alpha `to` what these add at theirs."""
    return parts if alpha == to else algorithm_of(parts).times(parts, alpha / to)


# ── PEFT's folders ──────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def _inner(which: str) -> str:
    """The prefix of `encoder.layers` in a text encoder's modules: newer transformers have no inner text_model."""
    import transformers

    kind = transformers.CLIPTextModelWithProjection if which == "text_encoder_2" else transformers.CLIPTextModel
    small: dict[str, Any] = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    return "text_model." if hasattr(kind(transformers.CLIPTextConfig(vocab_size=3, **small)), "text_model") else ""


def _peft_settings(modules: Mapping[str, Entry]) -> dict[str, Any]:
    """PEFT's settings for modules of one model: ranks and alphas by pattern where they are not the usual."""
    # PEFT compares names from their end, so that they fit text encoders with an inner text_model and without.
    paths = {module: targets.path_of(module) for module in modules}
    ranks = {module: algorithm_of(parts).layer_rank(parts) for module, (parts, _) in modules.items()}
    # Without a part of low rank there is no scale.
    alphas = {m: alpha if algorithm_of(x).rank(x) else float(ranks[m]) for m, (x, alpha) in modules.items()}
    rank, alpha = usual(ranks.values()), usual(alphas.values())
    return {
        "r": rank, "lora_alpha": alpha, "target_modules": sorted(paths.values()),
        "rank_pattern": {paths[m]: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {paths[m]: a for m, a in alphas.items() if a != alpha},
    }  # fmt: skip


def _write_peft(lora: Lora, path: Path, dtype: torch.dtype) -> Path:
    """Write a folder with a file and settings for each model."""
    import peft

    algorithm = ALGORITHMS[lora.algorithm]
    config, alpha = algorithm.peft
    metadata_module.check_private(lora.metadata)
    metadata = {"format": "pt"} | {key: value for key, value in lora.metadata.items() if "hash" not in key}
    with storage.write_folder(path) as partial:
        for which in lora.adapts:
            modules = {module: entry for module, entry in lora.modules.items() if targets.model_of(module) == which}
            settings = _peft_settings(modules)
            settings[alpha] = settings.pop("lora_alpha")
            settings |= algorithm.peft_settings({module: parts for module, (parts, _) in modules.items()}, lora.name)
            getattr(peft, config)(**settings, inference_mode=True).save_pretrained(partial / which)
            tensors = _rounded(replace(lora, modules=modules), "peft", dtype, path.name)
            save_file(tensors, partial / which / PEFT, metadata)
    return path


def header(metadata: dict[str, str], table: dict) -> bytes:
    """The first bytes of a safetensors file, with sorted metadata: the library's order is random, so files differ."""
    table = {"__metadata__": dict(sorted(metadata.items()))} | table
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
