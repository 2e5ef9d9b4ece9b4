"""Adapter ↔ LoRA files that other programs read, and the proof that a file does the same."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save as serialize
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit import adapter as adapters
from lorakit import files, quantize
from lorakit import metadata as metadatas
from lorakit.adapter import Adapter
from lorakit.base import Base
from lorakit.cache import own
from lorakit.lora import FAMILIES, KOHYA, PEFT, Lora, finite, kohya_name, load, opened, settings_of, usual

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


def of(adapter: Adapter, base: Base, metadata: dict[str, str] | None = None) -> Lora:
    """What an adapter in memory is as a LoRA: its live weights, and what is known of base and adapter.

    Args:
        metadata: from `metadata.of_run`.
    """
    own = {module: {part: w.detach() for part, w in adapters.parts(x).items()} for module, x in adapter.layers.items()}
    modules = {module: (parts, adapter.alphas[module]) for module, parts in own.items()}
    return Lora("adapter", base.family, metadatas.of_adapter(adapter, base) | (metadata or {}), modules, {})


def save(
    adapter: Adapter, base: Base, path: str | Path, *, metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float16, layout: str = "kohya",
) -> Path:  # fmt: skip
    """Write the adapter as a LoRA file, whole or not at all: `write` of what `of` makes of it.

    Shapes are those of the base's own layers. For SD 2.x that makes `proj_in` and `proj_out` 2-D, as sd-scripts
    writes them for a diffusers folder; for a single checkpoint file it makes convolutions of them and writes 4-D.
    A1111 reshapes and ComfyUI flattens, so either fits there; diffusers and sd-scripts on a folder take only 2-D.
    """
    return write(of(adapter, base, metadata), path, dtype=dtype, layout=layout)


def write(lora: Lora, path: str | Path, *, dtype: torch.dtype = torch.float16, layout: str = "kohya") -> Path:
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
    kinds = {adapters.algorithm(parts) for parts in lora.parts.values()}
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
    metadatas.private(metadata)
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
    with files.replacing(path, len(first) + len(body)) as partial, partial.open("wb") as stream:
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
            stored = adapters.as_file(part, tensor, dtype)
            # sd-scripts makes convolutions of these where it trains on a single file; diffusers has them linear.
            linear = layout != "kohya" and lora.family != "sd15" and module.endswith((".proj_in", ".proj_out"))
            stored = stored.flatten(1) if linear else stored
            tensors[_key(layout, module, part, lora.family)] = stored
    tensors = own(tensors)
    finite(tensors, name, f"Training diverged, or they exceed {dtype}: use an earlier checkpoint, or float32")
    return tensors


def _key(layout: str, module: str, part: str, family: str) -> str:
    """The key of a tensor; of layout "peft" within the model's own file."""
    if layout == "kohya":
        return f"{kohya_name(module, family)}.{KOHYA.get(part, part)}"
    part = {"down": "lora_A.weight", "up": "lora_B.weight"}.get(part, part)
    which, path = adapters.which(module), module if adapters.which(module) == "unet" else module.partition(".")[2]
    if layout == "diffusers":
        return f"{which}.{path}.{part}" if which == "unet" else f"{which}.text_model.{path}.{part}"
    return f"base_model.model.{_inner(which)}{path}.{part}"


def _laid_out(lora: Lora, layout: str) -> Lora:
    """The LoRA with weights and alphas as a layout holds them."""
    alphas, settings = _alphas(lora, layout), {}
    modules = {m: (_scaled(parts, alpha, alphas[m]), alphas[m]) for m, (parts, alpha) in lora.modules.items()}
    if layout != "diffusers":
        return replace(lora, modules=modules)
    for which in lora.adapts:
        own = {module: entry for module, entry in modules.items() if adapters.which(module) == which}
        settings |= {f"{which}.{key}": value for key, value in _peft_settings(own, which).items()}
    return replace(lora, modules=modules, metadata=lora.metadata | {"lora_adapter_metadata": json.dumps(settings)})


def _alphas(lora: Lora, layout: str) -> dict[str, float]:
    """The alphas that modules have in a layout; what that changes is worked into the weights.

    diffusers, reading a kohya file, takes the alpha that most modules of a model have for that of every text encoder's
    and every attention's layer. It does find those of wide convolutions.
    """
    if layout == "diffusers":
        return {module: float(adapters.rank_of(parts)) for module, parts in lora.parts.items()}
    alphas = {module: alpha for module, (_, alpha) in lora.modules.items()}
    if layout == "kohya":
        for which in lora.adapts:
            downs = {m: parts.get("down") for m, (parts, _) in lora.modules.items() if adapters.which(m) == which}
            most = usual([alphas[module] for module in downs if alphas[module]] or [1.0])
            narrow = [m for m, down in downs.items() if down is not None and max(down.shape[2:], default=1) == 1]
            alphas |= dict.fromkeys(narrow, most)
    return alphas


def _scaled(parts: dict[str, Tensor], alpha: float, to: float) -> dict[str, Tensor]:
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
    ranks = {module: _rank(parts) for module, (parts, _) in modules.items()}
    # Where nothing is of low rank there is no scale.
    alphas = {m: alpha if adapters.rank_of(parts) else float(ranks[m]) for m, (parts, alpha) in modules.items()}
    rank, alpha = usual(ranks.values()), usual(alphas.values())
    return {
        "r": rank, "lora_alpha": alpha, "target_modules": sorted(paths.values()),
        "rank_pattern": {paths[m]: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {paths[m]: a for m, a in alphas.items() if a != alpha},
    }  # fmt: skip


def _write_peft(lora: Lora, path: Path, dtype: torch.dtype) -> Path:
    import peft

    kind = {"lora": peft.LoraConfig, "loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[lora.algorithm]
    metadatas.private(lora.metadata)
    metadata = {"format": "pt"} | {key: value for key, value in lora.metadata.items() if "hash" not in key}
    with files.new_folder(path) as partial:
        for which in lora.adapts:
            own = {module: entry for module, entry in lora.modules.items() if adapters.which(module) == which}
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
        (out, inputs), small = adapters.size(parts), _sides(parts, "lokr_w1")
        inputs //= 9 if adapters.RESNET.search(module) and module.endswith(("conv", "conv1", "conv2")) else 1
        divided |= {(out, small[0]), (inputs, small[1])}
        rank, large = _rank(parts), (out // small[0], inputs // small[1])
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


def inject(models: nn.Module | adapters.Models, base: Base, lora: Lora | str | Path) -> Adapter:
    """Put a file's LoRA into models (in place), to sample with or to train on. `adapter.eject` is the inverse.

    1×1 convolutions and linear layers hold the same numbers, so either shape fits either.

    Args:
        models: a UNet, or those of `lora.adapts` by name; what the file has for others is left out.

    Raises:
        ValueError: a LoRA of another family, or for layers that this base does not have; nothing is changed then.
    """
    lora = lora if isinstance(lora, Lora) else load(lora)
    models = adapters.together(models)
    if lora.family not in (None, base.family):
        raise ValueError(
            f"{lora.name} is an {FAMILIES[lora.family]} LoRA, the base {base.name} is {FAMILIES[base.family]}: "
            "the two do not go together. Use a base of the LoRA's family."
        )
    own = {module: entry for module, entry in lora.modules.items() if adapters.which(module) in models}
    kinds = sorted({adapters.algorithm(parts) for parts, _ in own.values()})
    if not own:
        raise ValueError(
            f"{lora.name} adapts {' and '.join(lora.adapts) or 'nothing'} alone and not {' or '.join(models)}: "
            "it cannot be used here."
        )
    if len(kinds) > 1:
        raise ValueError(f"{lora.name} mixes {', '.join(kinds)}; lorakit puts one algorithm at a time into a model.")
    wrong = []
    for module, (parts, _) in own.items():
        layer, theirs = adapters.find(models, module), adapters.size(parts)
        shape = quantize.shape(layer) if hasattr(layer, "weight") else None
        if shape is None or theirs != (shape[0], math.prod(shape[1:])):
            ours = "missing here" if shape is None else f"{shape[0]}×{math.prod(shape[1:])} here"
            wrong.append(f"{module} is {theirs[0]}×{theirs[1]} in the file, {ours}")
    if wrong:
        raise ValueError(
            f"{lora.name} does not fit {base.name} in {len(wrong)} of {len(own)} modules: "
            + "; ".join(wrong[:3]) + ". It was made for another base."
        )  # fmt: skip
    modules = [name for name in adapters.paths(models) if name in own]
    ranks = {name: _rank(own[name][0]) for name in modules}
    alphas = {name: own[name][1] for name in modules}
    targets = "attention+conv" if any(adapters.RESNET.search(name) for name in modules) else "attention"
    adapter = adapters.inject(
        models, usual(ranks.values()), usual(alphas.values()), targets, modules=modules, ranks=ranks, alphas=alphas,
        algorithm=kinds[0], like={name: parts for name, (parts, _) in own.items()},
    )  # fmt: skip
    try:
        adapter.load(_fitted(own, adapter))
    except (ValueError, RuntimeError, KeyError) as error:
        adapters.eject(models)
        raise ValueError(f"{lora.name} divides its matrices as lorakit does not: {error}") from None
    return adapter


def _rank(parts: dict[str, Tensor]) -> int:
    """The rank to make a layer of, so that it has these parts."""
    return adapters.rank_of(parts) or max(parts["lokr_w2"].shape[:2])


def _fitted(modules: dict[str, tuple[dict[str, Tensor], float]], adapter: Adapter) -> dict[str, Tensor]:
    """A file's weights as an adapter's state: linear layers and 1×1 convolutions hold the same numbers."""
    own = adapter.state()
    given = {f"{m}.{part}": tensor for m, (parts, _) in modules.items() for part, tensor in parts.items()}
    same = {name for name in own.keys() & given.keys() if _tight(own[name].shape) == _tight(given[name].shape)}
    return {name: tensor.reshape(own[name].shape) if name in same else tensor for name, tensor in given.items()}


def _tight(shape: Sequence[int]) -> list[int]:
    return [n for n in shape if n != 1]


@torch.no_grad()
def begin_from(adapter: Adapter, base: Base, lora: Lora | str | Path) -> None:
    """Let a fresh adapter do what a file's LoRA does, to train it further. Another alpha is worked into the weights.

    Raises:
        ValueError: a LoRA of another family, or with other modules or ranks than the adapter's; nothing is changed.
    """
    lora = lora if isinstance(lora, Lora) else load(lora)
    if lora.family not in (None, base.family):
        raise ValueError(f"{lora.name} is an {FAMILIES[lora.family]} LoRA, the base is {FAMILIES[base.family]}.")
    if lora.modules and lora.algorithm != adapter.algorithm:
        raise ValueError(f"{lora.name} is {lora.algorithm}: set algorithm to it, which is {adapter.algorithm!r} now.")
    own = {module: adapters.parts(layer) for module, layer in adapter.layers.items()}
    ours, theirs = ({m: adapters.rank_of(parts) for m, parts in every.items()} for every in (own, lora.parts))
    if ours != theirs:
        odd = [m for m in sorted(ours.keys() | theirs.keys()) if ours.get(m, 0) != theirs.get(m, 0)]
        raise ValueError(
            f"{lora.name} has {len(theirs)} modules of ranks {_distinct(theirs)}, the run's settings ask for "
            f"{len(ours)} of ranks {_distinct(ours)}; first difference: {odd[0]}. "
            "Set rank, targets, conv_rank, block_ranks and text_encoder_rate as the file has them."
        )
    state = {name: tensor.float() for name, tensor in _fitted(lora.modules, adapter).items()}
    for module, (parts, alpha) in lora.modules.items():
        scaled = next(part for part in ("up", "hada_w1_a", "lokr_w1", "lokr_w1_a") if part in parts)
        if adapters.rank_of(parts) is not None:
            state[f"{module}.{scaled}"] = state[f"{module}.{scaled}"] * (alpha / adapter.alphas[module])
    try:
        adapter.load(state)
    except ValueError as error:
        raise ValueError(f"{lora.name} does not fit the run's settings and base: {error}") from None


def _distinct(ranks: dict[str, int | None]) -> list[int]:
    return sorted({rank for rank in ranks.values() if rank})


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
    own = of(source, base) if layers else source
    odd = sorted(read.modules.keys() ^ own.modules.keys())
    if odd or read.family not in (None, own.family):
        raise RuntimeError(
            f"{read.name} does not hold this LoRA: it reads as {read.family} with {len(read.modules)} modules, "
            f"not as {own.family} with {len(own.modules)}. Only in one of them: {', '.join(odd[:4]) or 'none'}."
        )

    def added(module: str, parts: dict[str, Tensor], alpha: float) -> Tensor:
        parts = {part: tensor.to(device) for part, tensor in parts.items()}
        if module in layers:
            return adapters.meaning(layers[module], parts, alpha).flatten(1)
        # The lengths of a DoRA say the same of any base: they are compared by themselves.
        return adapters.change({part: t for part, t in parts.items() if part != "dora_scale"}, alpha)

    errors, alphas = {}, _alphas(own, layout)
    for module, (parts, alpha) in read.modules.items():
        device = next(iter(own.modules[module][0].values())).device
        written = _scaled(*own.modules[module], alphas[module])
        dtype = next(t.dtype for part, t in parts.items() if part != "dora_scale")
        rounded = {part: adapters.as_file(part, tensor, dtype) for part, tensor in written.items()}
        if adapters.size(parts) != adapters.size(written):
            raise RuntimeError(
                f"{read.name}: {module} adds {adapters.size(parts)} where {adapters.size(written)} belongs."
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


def describe(path: str | Path) -> dict:
    """Tell what a LoRA file or folder (or one of a run's checkpoints) is, from its own weights and metadata.

    Raises:
        FileNotFoundError, ValueError, FloatingPointError: as `load`.
    """
    path, run = Path(path), None
    if not path.is_dir():
        with opened(path) as file:
            run = (file.metadata() or {}).get("lorakit")
    held = [path, *(path.rglob("*") if path.is_dir() else ())]
    told = {"file": path.name, "bytes": sum(file.stat().st_size for file in held if file.is_file())}
    if run:
        facts = settings_of(run, path.name)
        return told | {"kind": "checkpoint", "steps": facts.get("step"), "settings": facts.get("settings")}
    lora = load(path)
    parts, alphas = lora.parts.values(), [alpha for _, alpha in lora.modules.values()]
    locon = any(adapters.RESNET.search(module) for module in lora.modules)
    return told | {
        "kind": {"lora": "LoCon" if locon else "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}[lora.algorithm],
        "family": lora.family,
        "modules": len(parts),
        "text_encoder": sum(adapters.which(module) != "unet" for module in lora.modules),
        "rank": sorted({rank for own in parts if (rank := adapters.rank_of(own))}),
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
