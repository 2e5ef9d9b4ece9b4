"""Read LoRA files: kohya's layout, in both SDXL namings, and diffusers' and PEFT's dotted names.

No pickle is ever opened, and names and sizes in a file are compared with those of Stable Diffusion before use.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lorakit import base as bases
from lorakit import storage
from lorakit.adapter import targets
from lorakit.adapter.algorithms import Entry, Parts, algorithm_of
from lorakit.adapter.lora import MODELS, Lora, finite
from lorakit.adapter.names import ADAPTER, EMBEDDING, OTHERS, PARTS, PATTERN, module_name

PEFT = "adapter_model.safetensors"
LARGEST = 2**25  # numbers of a matrix or a change; no weight of Stable Diffusion has more than 1280 × 2560 × 3 × 3
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
DIMENSIONS = {part: (2, 4) for part in ("down", "up", "dora_scale", "lokr_w2")}  # of a convolution; others have two

KINDS = ("LORA", "LOHA", "LOKR")  # PEFT's names for what lorakit reads
READ = "lorakit reads LoRA, LoCon, DoRA, LoHa and LoKr"
MERGE = (
    "Where the program that made it can merge it into its base, `lorakit extract` makes a LoRA of what the base became"
)


def _sort(keys: Sequence[str], file: Path) -> tuple[dict[str, dict[str, str]], list[str]]:
    """{module: {"down": key, "up": key, "alpha": key}}, and the keys of bundled embeddings.

    Raises:
        ValueError: no LoRA, or one of another method or kind of model; a module without all its parts.
    """
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    embeddings, unknown, name = [], [], file.name
    for key in keys:
        plain = ADAPTER.sub("", key)
        suffix = next((suffix for suffix in PARTS if plain.endswith(suffix)), "")
        module = module_name(plain.removesuffix(suffix), file.parent.name) if suffix else None
        if key.startswith(EMBEDDING):
            embeddings.append(key)
        elif module is None or modules[module].setdefault(PARTS[suffix], key) != key:
            unknown.append(key)
    for pattern, kind in OTHERS.items():
        if other := next(filter(re.compile(pattern).search, unknown), None):
            raise ValueError(f"{name} holds {kind}, first {storage.shown(other)}; {READ}. {MERGE}.")
    if strange := [key for key in unknown if key.endswith(tuple(PARTS))]:
        raise ValueError(
            f"{name} adapts {len(strange)} modules that no SD 1.x, 2.x or XL has, or has twice, first "
            f"{storage.shown(strange[0])}: it is a LoRA for another kind of model (Flux, SD 3 …)."
        )
    if unknown or not (modules or embeddings):
        whole = any(key.startswith(bases.UNET_PREFIX) for key in keys)
        kind = "a whole checkpoint" if whole else bases.kind_of(keys) or "something else"
        problem = f"{kind}, {len(unknown)} weights, first {storage.shown(unknown[0])}" if unknown else "it is empty"
        raise ValueError(f"{name} is no LoRA: {problem}.")
    for module, parts in modules.items():
        try:
            algorithm_of(parts.keys() - {"alpha"})
        except ValueError:
            raise _unreadable(name, module, parts.keys()) from None
    return dict(modules), embeddings


def _unreadable(name: str, module: str, parts: Set[str]) -> ValueError:
    """The error for a module whose parts make no adapter: some of them are missing, or they make another method's."""
    with suppress(ValueError):
        kind = algorithm_of(parts - {"dora_scale", "alpha"}).title
        return ValueError(f"{name} holds {kind} with the lengths of DoRA, first in {module}; {READ}. {MERGE}.")
    return _damaged(name, f"it holds only {', '.join(sorted(parts))} of {module}")


def _family(modules: dict[str, tuple[str, int]], metadata: dict[str, str]) -> str | None:
    """The family that a LoRA is for: by modules and sizes that only one has, else by the file's metadata.

    Args:
        modules: module → one of its keys, and the inputs of the weight that it changes.
    """
    if any(re.search(r"transformer_blocks\.[1-9]|^text_encoder_2", module) for module in modules):
        return "sdxl"
    for module, (_, inputs) in modules.items():
        if module.endswith(("attn2.to_k", "attn2.to_v")) and inputs in (768, 1024, 2048):  # width of the text
            return {768: "sd15", 1024: "sd2", 2048: "sdxl"}[inputs]
    if any(re.search(r"(input|output)_blocks_|middle_block_|lora_te[12]_", key) for key, _ in modules.values()):
        return "sdxl"
    names = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}"
    if name := re.search(r"(?:sd_|stable-diffusion-)(v1|v2|xl)|sdxl", names):
        return {"v1": "sd15", "v2": "sd2"}.get(name[1], "sdxl")
    for module, (_, inputs) in modules.items():
        if module.startswith("text_encoder.") and module.endswith("q_proj") and inputs in (768, 1024):
            return {768: "sd15", 1024: "sd2"}[inputs]
    return None


def load(path: str | Path) -> Lora:
    """Read a LoRA file: kohya's layout in either SDXL naming, diffusers' or PEFT's keys. Missing alpha means rank.

    Args:
        path: the file; or a folder of diffusers', of PEFT's, or with such folders for several models.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no safetensors file, cut off, damaged, no LoRA, or of a method that is not read.
        FloatingPointError: it holds NaN.
    """
    path, known, aside = Path(path), {}, {}
    modules: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for file in _within(path) if path.is_dir() else [path]:
        with storage.open_safetensors(file) as handle:
            entries = handle.metadata() or {}
            settings = _settings(file, entries.pop("lora_adapter_metadata", None))
            keys, embeddings = _sort(handle.keys(), file)
            if twice := modules.keys() & keys.keys():
                raise ValueError(f"{path.name} holds {min(twice)} in two files. Give one of them.")
            alphas = {which: _alphas(settings, which, file.name) for which in {targets.model_of(m) for m in keys}}
            for module, part_keys in keys.items():
                tensors = {part: _tensor(handle, key, part, file.name) for part, key in part_keys.items()}
                parts = {part: tensor for part, tensor in tensors.items() if part != "alpha"}
                known[module] = next(iter(part_keys.values())), _inputs(parts, module, file.name)
                finite(tensors, f"{file.name}, {module}", "Its training diverged, or it was damaged: use another")
                alpha = alphas[targets.model_of(module)](module, algorithm_of(parts).rank(parts) or 1)
                modules[module] = (parts, float(tensors["alpha"].item()) if "alpha" in tensors else alpha)
            aside.update({key: _tensor(handle, key, "", file.name) for key in embeddings})
            metadata = entries | metadata
    return Lora(path.name, _family(known, metadata), metadata, modules, aside)


def _within(folder: Path) -> list[Path]:
    """The files that diffusers or PEFT wrote into a folder.

    Raises:
        FileNotFoundError: none; or only a pickle, which is never opened.
    """
    if (file := folder / "pytorch_lora_weights.safetensors").is_file():
        return [file]
    if files := [file for place in ("", *MODELS) if (file := folder / place / PEFT).is_file()]:
        return files
    pickles = sorted(path.name for depth in ("*.bin", "*/*.bin") for path in folder.glob(depth))
    note = f" It holds {pickles[0]}, a pickle, which lorakit never opens." if pickles else ""
    raise FileNotFoundError(f"{folder.name} holds no {PEFT} and no pytorch_lora_weights.safetensors.{note}")


def _tensor(handle: safe_open, key: str, part: str, name: str) -> Tensor:
    """A tensor, mapped, not read. Its dtype and shape in the header are checked first.

    Args:
        part: of a layer; "" of a tensor that belongs to none.

    Raises:
        ValueError: such a part has another dtype or shape.
    """
    header = handle.get_slice(key)
    shape, kind = header.get_shape(), header.get_dtype()
    if kind not in FLOATS and (part not in ("alpha", "") or kind[0] not in "IU"):  # some programs count their alphas
        raise ValueError(
            f"{name}: {storage.shown(key)} has {kind} numbers, which are no weights. Get the LoRA in float16."
        )
    dimensions = range(9) if part in ("", "alpha") else DIMENSIONS.get(part, (2,))
    if len(shape) not in dimensions or not 0 < math.prod(shape) <= (1 if part == "alpha" else LARGEST):
        raise _damaged(name, f"the sizes of {storage.shown(key)}, {str(shape)[:60]}, do not match any weight's")
    return handle.get_tensor(key)


def _inputs(parts: Parts, module: str, name: str) -> int:
    """in · k · k of the weight that a layer's parts change.

    Raises:
        ValueError: they do not go together, or Stable Diffusion has no such weight.
    """
    algorithm = algorithm_of(parts)
    try:
        out, inputs = algorithm.size(parts)
    except ValueError as error:
        raise _damaged(name, f"the matrices of {module} do not match ({error})") from None
    if out * inputs > LARGEST:
        raise _damaged(name, f"{module} would change {out:,} × {inputs:,} numbers, more than any weight has")
    if problem := algorithm.refusal(parts):
        raise ValueError(f"{name} {problem}.")
    return inputs


# ── PEFT's settings ───────────────────────────────────────────────────────────────────────────────────────────────────


def _settings(file: Path, text: str | bytes | None) -> dict:
    """PEFT's settings for a file.

    Args:
        text: from the file's metadata, where diffusers keeps them; PEFT keeps them in a file in the same folder.
    """
    name, config = file.name, file.with_name("adapter_config.json")
    if file.name == PEFT and config.is_file():
        name = f"{file.parent.name}/{config.name}"
        if config.stat().st_size > storage.HEADER:
            raise _damaged(name, "it is too large")
        text = config.read_bytes()
    settings = {} if text is None else settings_of(text, name)
    for key, kind in settings.items():
        if key.rpartition(".")[2] == "peft_type" and kind not in KINDS:
            raise ValueError(f"{name} is for {storage.shown(str(kind))}, another method of PEFT's; {READ}.")
    return settings


def settings_of(text: str | bytes, name: str) -> dict:
    """Settings in JSON that another program wrote.

    Raises:
        ValueError: it is no JSON object.
    """
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(name, f"its settings cannot be read ({error})") from None
    if not isinstance(settings, dict):
        raise _damaged(name, "it holds no settings")
    return settings


def _alphas(settings: dict, which: str, name: str) -> Callable[[str, int], float]:
    """A function: a module's name and rank → its alpha by PEFT's settings; without any it is the rank.

    Patterns are read as names, or ends of names, which is what PEFT and diffusers write; the first that fits counts.
    They are never run as regular expressions: one from a file can take for ever.

    Raises:
        ValueError: alphas that are no numbers, or a pattern that is no name.
    """
    settings = {key.removeprefix(f"{which}."): value for key, value in settings.items()}
    if settings.get("use_dora"):
        raise ValueError(f"{name} is a DoRA file of PEFT's; {READ}.")
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise _damaged(name, "the alpha_pattern in its settings holds no names")
    ends = {"": (math.inf, settings.get("lora_alpha", settings.get("alpha")))}  # "alpha" of LoHa and LoKr
    for place, (pattern, alpha) in enumerate(patterns.items()):
        if not (path := PATTERN.fullmatch(pattern)):
            raise ValueError(
                f"{name} gives an alpha by a pattern that is no name, {storage.shown(pattern)}; regular expressions "
                "in files are not run. Write the names of modules in its alpha_pattern."
            )
        ends.setdefault(path[1].replace("\\", ""), (place, alpha))
    for _, alpha in ends.values():
        if alpha is not None and not (type(alpha) in (int, float) and abs(alpha) < 1e30):
            raise _damaged(name, "an alpha in its settings is no number, or none that an alpha can be")

    def alpha_of(module: str, rank: int) -> float:
        steps = module.split(".")[which != "unet" :]
        alpha = min(ends[end] for n in range(len(steps) + 1) if (end := ".".join(steps[n:])) in ends)[1]
        return (rank if alpha is None else float(alpha)) * (math.sqrt(rank) if settings.get("use_rslora") else 1)

    return alpha_of


def _damaged(name: str, why: str) -> ValueError:
    return ValueError(f"{name} is damaged: {why}. Download or copy it again.")
