"""Adapter ↔ LoRA files that other programs read, and the proof that a file does the same."""

import hashlib
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save as serialize
from safetensors.torch import save_file
from torch import Tensor

from lorakit import storage
from lorakit.adapter import layers, targets
from lorakit.adapter import metadata as metadata_module
from lorakit.adapter.attachment import layer_rank
from lorakit.adapter.injection import Adapter
from lorakit.adapter.lora import Lora, finite, usual
from lorakit.adapter.names import KOHYA, kohya_name
from lorakit.adapter.read import PEFT
from lorakit.base import Base
from lorakit.storage import own_memory

# ── Writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────

LAYOUTS = {  # layout -> the algorithms that it has a place for
    "kohya": ("lora", "dora", "loha", "lokr"), "diffusers": ("lora",), "peft": ("lora", "loha", "lokr"),
}  # fmt: skip
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
    """What an adapter in memory is as a LoRA: its live weights, and what is known of base and adapter.

    Args:
        metadata: from `metadata.of_run`.
    """
    own = {
        module: {part: w.detach() for part, w in layers.layer_parts(x).items()} for module, x in adapter.layers.items()
    }
    modules = {module: (parts, adapter.alphas[module]) for module, parts in own.items()}
    return Lora("adapter", base.family, metadata_module.adapter_metadata(adapter, base) | (metadata or {}), modules, {})


def save_adapter(
    adapter: Adapter, base: Base, path: str | Path, *, metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float16, layout: str = "kohya",
) -> Path:  # fmt: skip
    """Write the adapter as a LoRA file, whole or not at all: `write` of what `of` makes of it.

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
        ValueError: unknown layout, or one that has no place for the algorithm; a family that cannot be told; a module
            without a canonical name; metadata that tells of this machine.
        FloatingPointError: weights that are NaN, or too large for `dtype`.
        OSError: no room or no right to write; nothing is left behind.
    """
    path = Path(path)
    if problem := refusal(layout, lora.algorithm):
        raise ValueError(problem)
    kinds = {layers.algorithm_of(parts) for parts in lora.parts.values()}
    if layout != "kohya" and (len(kinds) != 1 or lora.aside):
        held = ", ".join([*sorted(kinds), *lora.aside][:3])
        raise ValueError(f"layout {layout!r} has no place for all that {lora.name} holds ({held}). Use 'kohya'.")
    if (layout == "peft") == (path.suffix == ".safetensors"):
        kind = "folder without suffix" if layout == "peft" else "file that ends in .safetensors"
        raise ValueError(f"layout {layout!r} is written as a {kind}, not {path.name}.")
    if lora.family is None:
        raise ValueError(f"{lora.name} does not tell which family it is for. Say it: sd15, sd2 or sdxl.")
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
    """Why a LoRA of an algorithm cannot be written in a layout; None where it can."""
    if layout not in LAYOUTS:
        return f"layout {layout!r} is unknown. Use {', '.join(map(repr, LAYOUTS))}."
    if algorithm in LAYOUTS[layout]:
        return None
    able = " or ".join(repr(name) for name, algorithms in LAYOUTS.items() if algorithm in algorithms)
    return f"layout {layout!r} has no place for algorithm {algorithm!r}, and what reads it would drop it. Use {able}."


def _rounded(lora: Lora, layout: str, dtype: torch.dtype, name: str) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    Raises:
        FloatingPointError: NaN, or too large for the dtype.
    """
    tensors = {}
    for module, parts in lora.parts.items():
        for part, tensor in parts.items():
            stored = layers.file_dtype(part, tensor, dtype)
            # sd-scripts makes convolutions of these where it trains on a single file; diffusers has them linear.
            linear = layout != "kohya" and lora.family != "sd15" and module.endswith((".proj_in", ".proj_out"))
            stored = stored.flatten(1) if linear else stored
            tensors[_key(layout, module, part, lora.family)] = stored
    tensors = own_memory(tensors)
    finite(tensors, name, f"Training diverged, or they exceed {dtype}: use an earlier checkpoint, or float32")
    return tensors


def _key(layout: str, module: str, part: str, family: str) -> str:
    """The key of a tensor; of layout "peft" within the model's own file."""
    if layout == "kohya":
        return f"{kohya_name(module, family)}.{KOHYA.get(part, part)}"
    part = {"down": "lora_A.weight", "up": "lora_B.weight"}.get(part, part)
    which, path = (
        targets.model_of(module),
        module if targets.model_of(module) == "unet" else module.partition(".")[2],
    )
    if layout == "diffusers":
        return f"{which}.{path}.{part}" if which == "unet" else f"{which}.text_model.{path}.{part}"
    return f"base_model.model.{_inner(which)}{path}.{part}"


def _laid_out(lora: Lora, layout: str) -> Lora:
    """The LoRA with weights and alphas as a layout holds them."""
    alphas, settings = layout_alphas(lora, layout), {}
    modules = {m: (rescaled(parts, alpha, alphas[m]), alphas[m]) for m, (parts, alpha) in lora.modules.items()}
    if layout != "diffusers":
        return replace(lora, modules=modules)
    for which in lora.adapts:
        own = {module: entry for module, entry in modules.items() if targets.model_of(module) == which}
        settings |= {f"{which}.{key}": value for key, value in _peft_settings(own, which).items()}
    return replace(lora, modules=modules, metadata=lora.metadata | {"lora_adapter_metadata": json.dumps(settings)})


def layout_alphas(lora: Lora, layout: str) -> dict[str, float]:
    """The alphas that modules have in a layout; what that changes is worked into the weights.

    diffusers, reading a kohya file, takes the alpha that most modules of a model have for that of every text encoder's
    and every attention's layer. It does find those of wide convolutions.
    """
    if layout == "diffusers":
        return {module: float(layers.rank_of(parts)) for module, parts in lora.parts.items()}
    alphas = {module: alpha for module, (_, alpha) in lora.modules.items()}
    if layout == "kohya":
        for which in lora.adapts:
            downs = {m: parts.get("down") for m, (parts, _) in lora.modules.items() if targets.model_of(m) == which}
            most = usual([alphas[module] for module in downs if alphas[module]] or [1.0])
            narrow = [m for m, down in downs.items() if down is not None and max(down.shape[2:], default=1) == 1]
            alphas |= dict.fromkeys(narrow, most)
    return alphas


def rescaled(parts: dict[str, Tensor], alpha: float, to: float) -> dict[str, Tensor]:
    """A LoRA's parts that do at another alpha what these do at theirs."""
    return parts if alpha == to else parts | {"up": parts["up"].float() * (alpha / to)}


# ── PEFT's folders ──────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def _inner(which: str) -> str:
    """What stands before `encoder.layers` in a text encoder's modules: newer transformers have no inner text_model."""
    import transformers

    if which == "unet":
        return ""
    kind = transformers.CLIPTextModelWithProjection if which == "text_encoder_2" else transformers.CLIPTextModel
    small = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    return "text_model." if hasattr(kind(transformers.CLIPTextConfig(vocab_size=3, **small)), "text_model") else ""


def _peft_settings(modules: dict[str, tuple[dict[str, Tensor], float]], which: str) -> dict:
    """Modules of one model as PEFT's config says them: ranks and alphas by pattern where they are not the usual."""
    # PEFT compares names from their end, so that they fit text encoders with an inner text_model and without.
    paths = {module: module if which == "unet" else module.partition(".")[2] for module in modules}
    ranks = {module: layer_rank(parts) for module, (parts, _) in modules.items()}
    # Where nothing is of low rank there is no scale.
    alphas = {m: alpha if layers.rank_of(parts) else float(ranks[m]) for m, (parts, alpha) in modules.items()}
    rank, alpha = usual(ranks.values()), usual(alphas.values())
    return {
        "r": rank, "lora_alpha": alpha, "target_modules": sorted(paths.values()),
        "rank_pattern": {paths[m]: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {paths[m]: a for m, a in alphas.items() if a != alpha},
    }  # fmt: skip


def _write_peft(lora: Lora, path: Path, dtype: torch.dtype) -> Path:
    import peft

    kind = {"lora": peft.LoraConfig, "loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[lora.algorithm]
    metadata_module.check_private(lora.metadata)
    metadata = {"format": "pt"} | {key: value for key, value in lora.metadata.items() if "hash" not in key}
    with storage.write_folder(path) as partial:
        for which in lora.adapts:
            own = {module: entry for module, entry in lora.modules.items() if targets.model_of(module) == which}
            settings = _peft_settings(own, which)
            if lora.algorithm != "lora":
                settings["alpha"] = settings.pop("lora_alpha")
            if lora.algorithm == "lokr":
                settings |= _lokr_division(own, lora.name)
            kind(**settings, inference_mode=True).save_pretrained(partial / which)
            tensors = _rounded(replace(lora, modules=own), "peft", dtype, path.name)
            save_file(tensors, partial / which / PEFT, metadata)
    return path


def _lokr_division(modules: dict[str, tuple[dict[str, Tensor], float]], name: str) -> dict:
    """PEFT's settings that make every module's parts of these names and sizes.

    Raises:
        ValueError: none do; other programs divide otherwise.
    """
    from peft.tuners.lokr.layer import factorization

    both = any("lokr_w1_a" in parts for parts, _ in modules.values())
    divided, same = set(), True  # (one side of a weight, the small matrix's part of it)
    for module, (parts, _) in modules.items():
        (out, inputs), small = layers.size(parts), _sides(parts, "lokr_w1")
        inputs //= 9 if targets.RESNET.search(module) and module.endswith(("conv", "conv1", "conv2")) else 1
        divided |= {(out, small[0]), (inputs, small[1])}
        rank, large = layer_rank(parts), (out // small[0], inputs // small[1])
        whole = {"lokr_w1": not both or rank >= max(small) / 2, "lokr_w2": rank >= max(large) / 2}
        same &= all((part in parts) == is_whole for part, is_whole in whole.items())
    for factor in (-1, *sorted({part for _, part in divided if part > 1})):
        if same and all(factorization(side, factor)[0] == part for side, part in divided):
            return {"decompose_factor": factor, "decompose_both": both}
    raise ValueError(f"{name} divides its matrices as PEFT does not. Use layout 'kohya'.")


def _sides(parts: dict[str, Tensor], name: str) -> tuple[int, int]:
    """The two sides of a matrix that may be given as a product."""
    if name in parts:
        return parts[name].shape[0], parts[name].shape[1]
    return parts[f"{name}_a"].shape[0], parts[f"{name}_b"].shape[1]


def header(metadata: dict[str, str], table: dict) -> bytes:
    """The first part of a safetensors file. The library's own puts metadata in random order, so no two files agree."""
    table = {"__metadata__": dict(sorted(metadata.items()))} | table
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
