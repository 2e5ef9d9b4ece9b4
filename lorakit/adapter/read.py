"""Read LoRA files: kohya's layout, in both SDXL namings, and diffusers' and PEFT's dotted names.

No pickle is ever opened, and names and sizes in a file are compared with those of Stable Diffusion before use.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorakit.adapter import targets
from lorakit.adapter.algorithms import Entry, Parts, algorithm_of
from lorakit.adapter.lora import MODELS, Lora, finite
from lorakit.adapter.names import OTHERS, PARTS, PATTERN, TEXT, module_name

PEFT = "adapter_model.safetensors"
LARGEST = 2**25  # numbers of a matrix or a change; no weight of Stable Diffusion has more than 1280 × 2560 × 3 × 3
HEADER = 2**24  # bytes; a header in memory is thirty times as large. Real ones have up to a few million
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
DIMENSIONS = {part: (2, 4) for part in ("down", "up", "dora_scale", "lokr_w2")}  # of a convolution; others have two

READ = "lorakit reads LoRA, LoCon, DoRA, LoHa and LoKr"

DISGUISES = {
    b"PK": "a zip or a PyTorch pickle", b"\x80": "a pickle", b"<": "a web page: the download was refused",
    b"version http": "a Git LFS pointer: the download is incomplete", b"\0" * 8: "a row of zeros: the copy failed",
}  # fmt: skip


@contextmanager
def open_lora_file(path: Path) -> Iterator[safe_open]:
    """A safetensors file. The library compares every size in it with the file's own before it allocates memory.

    Raises:
        FileNotFoundError: no file, or a folder, a pipe or a device, which might never answer.
        ValueError: another kind of file, or one that is cut off or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Give a LoRA's .safetensors file.")
    with path.open("rb") as stream:
        first = stream.read(16)
    try:
        if (length := int.from_bytes(first[:8], "little")) > HEADER:
            raise SafetensorError(f"its header takes {length:,} bytes, the limit is {HEADER:,}")
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:  # older releases cannot map an empty file
        kinds = [f"looks like {kind}" for start, kind in DISGUISES.items() if first.startswith(start)]
        raise ValueError(
            f"{path.name} ({path.stat().st_size:,} bytes) is not a complete safetensors file, it "
            f"{kinds[0] if kinds else 'was cut off or damaged'} ({_shown(str(error))}). Download or copy it again."
        ) from error


def _sort(keys: Sequence[str], file: Path) -> tuple[dict[str, dict[str, str]], list[str]]:
    """{module: {"down": key, "up": key, "alpha": key}}, and the keys of text encoders that belong to no layer.

    Raises:
        ValueError: no LoRA, or one of another method or kind of model; a module without all its parts.
    """
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    text, unknown, name = [], [], file.name
    for key in keys:
        if method := next((method for mark, method in OTHERS.items() if mark in key), None):
            raise ValueError(f"{name} is a {method} file; {READ}.")
        suffix = next((suffix for suffix in PARTS if key.endswith(suffix)), "")
        module = module_name(key.removesuffix(suffix), file.parent.name) if suffix else None
        if module is None and TEXT.match(key):
            text.append(key)
        elif module is None or modules[module].setdefault(PARTS[suffix], key) != key:
            unknown.append(key)
    if strange := [key for key in unknown if key.endswith(tuple(PARTS))]:
        raise ValueError(
            f"{name} adapts {len(strange)} modules that no SD 1.x, 2.x or XL has, or has twice, first "
            f"{_shown(strange[0])}: it is a LoRA for another kind of model (Flux, SD 3 …)."
        )
    if unknown or not (modules or text):
        problem = f"{len(unknown)} of its weights are something else, first {_shown(unknown[0])}" if unknown else ""
        raise ValueError(f"{name} is no LoRA: {problem or 'it is empty'}.")
    for module, parts in modules.items():
        try:
            algorithm_of(parts.keys() - {"alpha"})
        except ValueError:
            raise _damaged(name, f"it holds only {', '.join(sorted(parts))} of {module}") from None
    return dict(modules), text


def _shown(text: str) -> str:
    """A key of a file for a message: it may be of any length, and contain control characters of a terminal."""
    return text if len(text) < 200 and text.isprintable() else ascii(text[:160]) + " …"


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
        with open_lora_file(file) as handle:
            entries = handle.metadata() or {}
            settings = _settings(file, entries.pop("lora_adapter_metadata", None))
            keys, text = _sort(handle.keys(), file)
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
            aside.update({key: _tensor(handle, key, "", file.name) for key in text})
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
        raise ValueError(f"{name}: {_shown(key)} has {kind} numbers, which are no weights. Get the LoRA in float16.")
    dimensions = range(9) if part in ("", "alpha") else DIMENSIONS.get(part, (2,))
    if len(shape) not in dimensions or not 0 < math.prod(shape) <= (1 if part == "alpha" else LARGEST):
        raise _damaged(name, f"the sizes of {_shown(key)}, {str(shape)[:60]}, do not match any weight's")
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
        if config.stat().st_size > HEADER:
            raise _damaged(name, "it is too large")
        text = config.read_bytes()
    return {} if text is None else settings_of(text, name)


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
                f"{name} gives an alpha by a pattern that is no name, {_shown(pattern)}; regular expressions "
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
