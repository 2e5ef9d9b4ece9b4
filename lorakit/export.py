"""Adapter ↔ LoRA files that other programs read, with metadata and hashes, and the proof that a file does the same.

Written is the layout of kohya's sd-scripts, which A1111, Forge, ComfyUI, Civitai and diffusers take. Read is that,
in both SDXL namings, and diffusers' and PEFT's dotted names. No pickle is ever opened.
"""

import base64
import datetime
import hashlib
import io
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, count
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from lorakit import adapter as adapters
from lorakit import buckets, files, optim, quantize
from lorakit.adapter import Adapter
from lorakit.base import Base
from lorakit.config import Config
from lorakit.dataset import Dataset
from lorakit.original import adaptable

FAMILIES = {"sd15": "SD 1.5", "sd2": "SD 2.x", "sdxl": "SDXL"}


# ── Names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def _modules_by_name() -> dict[str, str]:
    """kohya's name without prefix, in either naming → diffusers' path."""
    return {name.replace(".", "_"): path for path, own in adaptable().items() for name in (path, own)}


def kohya_name(module: str, family: str) -> str:
    """What kohya's files call a module: of SDXL's UNet by Stability's names, of others' by diffusers'.

    Raises:
        ValueError: no Stable Diffusion has such a module.
    """
    if (which := adapters.which(module)) != "unet":
        path = module.partition(".")[2]
        if not adapters.TEXT.fullmatch(path):
            raise ValueError(f"{module} is no module of a text encoder, so no other program would find it.")
        return f"{KOHYA_TEXT[which, family == 'sdxl']}_text_model_{path.replace('.', '_')}"
    if module not in adaptable():
        raise ValueError(f"{module} is no module of a Stable Diffusion UNet, so no other program would find it.")
    return "lora_unet_" + (adaptable()[module] if family == "sdxl" else module).replace(".", "_")


KOHYA_TEXT = {  # which, whether the base is an SDXL -> how kohya's keys begin
    ("text_encoder", False): "lora_te", ("text_encoder", True): "lora_te1", ("text_encoder_2", True): "lora_te2",
}  # fmt: skip
KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}  # what LyCORIS adds is called in files as it is here


# ── Writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def save(
    adapter: Adapter, base: Base, path: str | Path, *, metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float16, layout: str = "kohya",
) -> Path:  # fmt: skip
    """Write the adapter as a LoRA file, whole or not at all.

    Shapes are those of the base's own layers. For SD 2.x that makes `proj_in` and `proj_out` 2-D, as sd-scripts
    writes them for a diffusers folder; for a single checkpoint file it makes convolutions of them and writes 4-D.
    A1111 reshapes and ComfyUI flattens, so either fits there; diffusers and sd-scripts on a folder take only 2-D.

    Args:
        metadata: from `run_metadata`; hashes and what is known of base and adapter are added.
        dtype: of the matrices, float16, bfloat16 or float32.

    Raises:
        ValueError: unknown layout, a module without a canonical name, metadata that tells of this machine.
        FloatingPointError: weights that are NaN, or too large for `dtype`.
        OSError: no room or no right to write; nothing is left behind.
    """
    path = Path(path)
    if layout != "kohya" or path.suffix != ".safetensors":
        raise ValueError(f"layout {layout!r} in {path.name}: LoRAs are written in layout 'kohya' as .safetensors.")
    tensors = {}
    for module, layer in adapter.layers.items():
        name = kohya_name(module, base.family)
        # A float32 alpha keeps scales such as 0.3 exact; every reader takes it with .item().
        tensors[f"{name}.alpha"] = torch.tensor(adapter.alphas[module], dtype=torch.float32)
        for part, weight in adapters.parts(layer).items():
            stored = adapters.as_file(part, weight.detach(), dtype)
            tensors[f"{name}.{KOHYA.get(part, part)}"] = stored.cpu().contiguous()
    _finite(tensors, path.name, f"Training diverged, or they exceed {dtype}: use an earlier checkpoint, or float32")
    metadata = {"modelspec.title": path.stem} | _facts(adapter, base) | (metadata or {})
    _private(metadata)
    serial = serialize(tensors)
    length = 8 + int.from_bytes(serial[:8], "little")
    table, body = json.loads(serial[8:length]), memoryview(serial)[length:]
    digest = hashlib.sha256(body).hexdigest()
    legacy = _header({k: v for k, v in metadata.items() if k.startswith("ss_")}, table)
    at, until = (max(0, edge - len(legacy)) for edge in (0x100000, 0x110000))
    metadata |= {
        "sshs_model_hash": digest,
        "sshs_legacy_hash": hashlib.sha256(legacy[0x100000:0x110000] + bytes(body[at:until])).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{digest}",
    }
    header = _header(metadata, table)
    with files.replacing(path, len(header) + len(body)) as partial, partial.open("wb") as stream:
        stream.write(header)
        stream.write(body)
    return path


def _header(metadata: dict[str, str], table: dict) -> bytes:
    """The first part of a safetensors file. The library's own puts metadata in random order, so no two files agree."""
    table = {"__metadata__": dict(sorted(metadata.items()))} | table
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _finite(tensors: dict[str, Tensor], name: str, advice: str) -> None:
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if bad:
        raise FloatingPointError(f"{name}: {len(bad)} weights are NaN or infinite, first {bad[0]}. {advice}.")


# ── Metadata ────────────────────────────────────────────────────────────────────────────────────────────────────────

LOCAL = re.compile(
    r"""(^|(?<=[\s"'=(,]))(/\w[\w.+@-]+/[\w.]|~[/\\]|[A-Za-z]:[/\\]\w|\\\\\w+\\)|^/\w|file://|\bhf_\w{20}"""
)
"""An absolute path (/a/b, ~/a, C:\\a, \\\\host\\a), or a hub token."""


def _tells(text: str) -> bool:
    """Whether a text tells of this machine or its user."""
    user = re.escape(os.path.basename(os.path.expanduser("~")))
    return bool(LOCAL.search(text) or (user and re.search(rf"[/\\]{user}([/\\]|$)", text)))


def _private(metadata: dict[str, str]) -> None:
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise TypeError(f"metadata {key} is {value!r}; readers expect strings alone: give {str(value)!r}.")
        plain = value.replace(r"\\", "\\")  # JSON writes one backslash as two
        if key != "modelspec.thumbnail" and (_tells(value) or _tells(plain)):
            raise ValueError(
                f"metadata {key} holds a path or token of this machine, and the file is made to be shared: "
                f"{value[:80]!r}. Take it out."
            )


def _facts(adapter: Adapter, base: Base) -> dict[str, str]:
    """What base and adapter alone say about a file. A1111 tells families apart by the first two."""
    v, xl = base.prediction_type == "v_prediction", base.family == "sdxl"
    version = {"sd15": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[base.family]
    architecture = {"sd15": "v1", "sd2": "v2-768-v" if v else "v2-512", "sdxl": "xl-v1-base"}[base.family]
    shapes = {module: quantize.shape(layer.get_base_layer()) for module, layer in adapter.layers.items()}
    wide = [module for module in adapter.layers if _wide(shapes[module])]
    narrow = [module for module in adapter.layers if not _wide(shapes[module])] or wide
    lycoris = {"lora": {}, "dora": {"algo": "lora", "dora_wd": "True"}}.get(
        adapter.algorithm, {"algo": adapter.algorithm}
    )
    facts = {
        "ss_base_model_version": version + "_v" * (v and not xl), "ss_v2": str(base.family == "sd2"),
        "ss_sd_model_name": base.name, "ss_network_module": "lycoris.kohya" if lycoris else "networks.lora",
        "ss_network_dim": f"{_usual(adapter.ranks[m] for m in narrow)}",
        "ss_network_alpha": f"{_usual(adapter.alphas[m] for m in narrow):g}",
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"stable-diffusion-{architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if xl else "diffusers",
        "modelspec.prediction_type": "v" if v else base.prediction_type,
    }  # fmt: skip
    arguments = lycoris
    if wide:
        dim, alpha = _usual(adapter.ranks[m] for m in wide), _usual(adapter.alphas[m] for m in wide)
        arguments = arguments | {"conv_dim": f"{dim}", "conv_alpha": f"{alpha:g}"}
    if arguments:
        facts["ss_network_args"] = json.dumps(arguments)
    return facts


def _wide(shape: Sequence[int]) -> bool:
    """Whether a weight or down matrix is that of a convolution over more than one pixel."""
    return max(shape[2:], default=1) > 1


def _usual(values: Iterable):
    return Counter(values).most_common(1)[0][0]


def run_metadata(
    config: Config, base: Base, dataset: Dataset, *, steps: int, epochs: int, started: float, finished: float,
    adapter: Adapter, batches: int | None = None, prior: int = 0, thumbnail: Image.Image | None = None,
) -> dict[str, str]:  # fmt: skip
    """The metadata of a run, under kohya's and ModelSpec's names; what is not used is "None", as kohya writes it.

    Pictures are counted with their repeats, tags without, both as kohya does. Folders are given by name only.

    Args:
        steps, epochs: that the weights have been trained for.
        started, finished: seconds since 1970.
        batches: an epoch; None counts them from the dataset.
        prior: regularisation pictures an epoch, repeats counted.
        thumbnail: a picture the LoRA made; stored as JPEG of at most 256 pixels a side.
    """
    sizes = buckets.sizes(config.resolution, step=max(config.bucket_step, base.step))
    chosen = [buckets.assign(p.width, p.height, sizes) for p in dataset.pictures]
    repeats = [p.repeats for p in dataset.pictures]
    if batches is None:
        batches = buckets.steps_per_epoch(chosen, repeats, config.batch_size)
    total = config.total_steps(batches)
    skewed = [abs(w / h - p.width / p.height) for (w, h), p in zip(chosen, dataset.pictures, strict=True)]
    filled = {
        size: sum(times for own, times in zip(chosen, repeats, strict=True) if own == size)
        for size in sorted(set(chosen))
    }
    folders = _folders(dataset, config)
    tags = {folder: Counter() for folder in folders.values()}
    dirs = {folder: {"n_repeats": 1, "img_count": 0} for folder in folders.values()}
    for picture in dataset.pictures:
        folder, said = folders[picture.group], (tag.strip().lower() for tag in picture.caption.split(","))
        tags[folder].update(tag for tag in said if tag and not _tells(tag))  # a caption may hold a path, the file not
        dirs[folder] = {"n_repeats": picture.repeats, "img_count": dirs[folder]["img_count"] + 1}
    facts = {
        "ss_output_name": config.name, "ss_training_started_at": started, "ss_training_finished_at": finished,
        "ss_learning_rate": config.learning_rate, "ss_unet_lr": config.learning_rate if config.train_unet else None,
        "ss_text_encoder_lr": list(config.text_rates(base.text_encoders).values()) or None,
        "ss_optimizer": f"{'.'.join(optim.OPTIMIZERS[config.optimizer])}(weight_decay={config.weight_decay})",
        "ss_lr_scheduler": config.schedule, "ss_lr_warmup_steps": config.warmup_steps,
        "ss_max_grad_norm": config.max_grad_norm, "ss_min_snr_gamma": config.min_snr_gamma,
        "ss_loss_type": {"mse": "l2"}.get(config.loss, config.loss), "ss_debiased_estimation": config.debiased,
        "ss_multires_noise_iterations": config.multires_noise_iterations or None,
        "ss_multires_noise_discount": config.multires_noise_discount,
        "ss_ip_noise_gamma": config.input_perturbation or None,
        "ss_noise_offset": config.noise_offset or None, "ss_caption_dropout_rate": config.caption_dropout,
        "ss_steps": steps, "ss_max_train_steps": total, "ss_epoch": epochs,
        "ss_num_epochs": -(-total // -(-batches // config.gradient_accumulation_steps)),
        "ss_num_batches_per_epoch": batches, "ss_num_train_images": sum(repeats), "ss_num_reg_images": prior,
        "ss_prior_loss_weight": config.prior_weight,
        "ss_batch_size_per_device": config.batch_size,
        "ss_total_batch_size": config.batch_size * config.gradient_accumulation_steps,
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_mixed_precision": {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(adapter.dtype, "no"),
        "ss_full_fp16": False, "ss_seed": config.seed, "ss_clip_skip": config.clip_skip,
        "ss_cache_latents": True, "ss_flip_aug": config.flip, "ss_shuffle_caption": config.shuffle_captions,
        "ss_keep_tokens": config.keep_tokens, "ss_caption_tag_dropout_rate": config.tag_dropout,
        "ss_masked_loss": bool(config.mask),
        "ss_resolution": (config.resolution, config.resolution), "ss_enable_bucket": True,
        "ss_min_bucket_reso": min(map(min, sizes)), "ss_max_bucket_reso": max(map(max, sizes)),
        "ss_bucket_info": json.dumps({
            "buckets": {i: {"resolution": size, "count": n} for i, (size, n) in enumerate(filled.items())},
            "mean_img_ar_error": sum(skewed) / len(skewed),
        }),
        "ss_dataset_dirs": json.dumps(dirs), "ss_reg_dataset_dirs": "{}", "ss_tag_frequency": json.dumps(tags),
        "modelspec.title": config.name, "modelspec.resolution": f"{config.resolution}x{config.resolution}",
        "modelspec.date": datetime.datetime.fromtimestamp(int(finished), datetime.timezone.utc).isoformat(),
        "modelspec.encoder_layer": config.clip_skip,
    }  # fmt: skip
    if config.trigger:
        facts["modelspec.trigger_phrase"] = config.trigger
    if thumbnail is not None:
        facts["modelspec.thumbnail"] = _data_url(thumbnail)
    metadata = _facts(adapter, base) | {key: str(value) for key, value in facts.items()}
    _private(metadata)
    return metadata


def _folders(dataset: Dataset, config: Config) -> dict[str, str]:
    """A name for each of the dataset's groups: its folder's, numbered where two agree, as kohya does.

    Pictures beside no folder get one made of the run's name: the root's own name is a matter of this machine.
    """
    names: dict[str, str] = {}
    for group, repeats in {p.group: p.repeats for p in dataset.pictures}.items():
        own = Path(group).name or f"{repeats}_{config.name}"
        numbered = (f"{own} ({number})" for number in count(2))
        names[group] = next(name for name in chain([own], numbered) if name not in names.values())
    return names


def _data_url(picture: Image.Image) -> str:
    small, stream = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((256, 256))
    small.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────

PARTS = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha",  # kohya
    ".lora_A.weight": "down", ".lora_B.weight": "up",  # PEFT, diffusers
    ".lora.down.weight": "down", ".lora.up.weight": "up",  # diffusers before PEFT
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",  # its text encoders
    "_lora.down.weight": "down", "_lora.up.weight": "up",  # its attention processors
    **{f".{part}": part for part in ("dora_scale", *(f"hada_w{n}_{side}" for n in (1, 2) for side in "ab"),
                                     *(f"lokr_w{n}{side}" for n in (1, 2) for side in ("", "_a", "_b")))},  # LyCORIS
}  # fmt: skip
TEXT = re.compile(r"lora_te\d?_|text_encoder|(base_model\.model\.)?(text_model|encoder\.layers)|bundle_emb")
OF_TEXT = re.compile(r"lora_te(\d?)_text_model_(.+)|(?:text_encoder(_2)?\.)?(?:text_model\.)?(encoder\.layers\..+)")
DOTTED = re.compile(r"(encoder)_(layers)_(\d+)_(?:(self_attn)_([qkv]_proj|out_proj)|(mlp)_(fc[12]))")
OTHERS = {
    "lora_magnitude": "PEFT's DoRA", "hada_t": "Tucker LoHa", "lokr_t": "Tucker LoKr", "oft_": "OFT",
    "lora_mid": "Tucker LoCon",
}  # fmt: skip
DISGUISES = {
    b"PK": "a zip or a PyTorch pickle", b"\x80": "a pickle", b"<": "a web page: the download was refused",
    b"version http": "a Git LFS pointer: the download is incomplete", b"\0" * 8: "a row of zeros: the copy failed",
}  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """What a LoRA file holds."""

    name: str  # of the file
    family: str | None  # "sd15", "sd2" or "sdxl" by its keys and shapes, else by its metadata
    metadata: dict[str, str] = field(repr=False)
    modules: dict[str, tuple[dict[str, Tensor], float]] = field(repr=False)
    """A module's name, as `adapter` has it → its parts, as `adapter.parts` names them, and its alpha."""
    aside: dict[str, Tensor] = field(repr=False)  # of text encoders, but no layer of theirs: kept as they are

    @property
    def adapts(self) -> tuple[str, ...]:
        """The models that it changes: "unet", "text_encoder", "text_encoder_2"."""
        return tuple(sorted({adapters.which(module) for module in self.modules}))

    @property
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The modules' parts without their alphas."""
        return {module: parts for module, (parts, _) in self.modules.items()}

    @property
    def algorithm(self) -> str:
        """ "lora", "dora", "loha" or "lokr"; of several the one that most modules have."""
        return _usual(adapters.algorithm(parts) for parts in self.parts.values()) if self.modules else "lora"


@contextmanager
def _opened(path: Path) -> Iterator:
    """A safetensors file. The library compares every size in it with the file's own before memory is taken."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Give a LoRA's .safetensors file.")
    with path.open("rb") as stream:
        first = stream.read(16)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:  # older releases cannot map an empty file
        kinds = [f"looks like {kind}" for start, kind in DISGUISES.items() if first.startswith(start)]
        raise ValueError(
            f"{path.name} ({path.stat().st_size:,} bytes) is no whole safetensors file, it "
            f"{kinds[0] if kinds else 'was cut off or damaged'} ({error}). Download or copy it again."
        ) from error


def _sort(keys: Sequence[str], name: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """{module: {"down": key, "up": key, "alpha": key}}, and those keys of text encoders that are of no layer.

    Raises:
        ValueError: no LoRA, or one of another method or kind of model; a module without all its parts.
    """
    modules, text, unknown = defaultdict(dict), [], []
    for key in keys:
        if method := next((method for mark, method in OTHERS.items() if mark in key), None):
            raise ValueError(f"{name} is a {method} file; lorakit reads LoRA, LoCon, DoRA, LoHa and LoKr.")
        suffix = next((suffix for suffix in PARTS if key.endswith(suffix)), "")
        module = _module(key.removesuffix(suffix)) if suffix else None
        if module is None and TEXT.match(key):
            text.append(key)
        elif module is None or modules[module].setdefault(PARTS[suffix], key) != key:
            unknown.append(key)
    if strange := [key for key in unknown if key.endswith(tuple(PARTS))]:
        raise ValueError(
            f"{name} adapts {len(strange)} modules that no SD 1.x, 2.x or XL has, or has twice, first {strange[0]}: "
            "it is a LoRA for another kind of model (Flux, SD 3 …)."
        )
    if unknown or not (modules or text):
        some = f"{len(unknown)} of its weights are something else, first {unknown[0]}" if unknown else "it is empty"
        raise ValueError(f"{name} is no LoRA: {some}.")
    for module, parts in modules.items():
        try:
            adapters.algorithm(parts.keys() - {"alpha"})
        except ValueError:
            raise ValueError(f"{name} is damaged: of {module} it holds {', '.join(sorted(parts))} alone.") from None
    return dict(modules), text


def _module(stem: str) -> str | None:
    """The name of a module by its key without suffix; None if it is none of Stable Diffusion's modules."""
    if stem.startswith("lora_unet_"):
        return _modules_by_name().get(stem.removeprefix("lora_unet_"))
    # Newer transformers have no inner text_model, and PEFT's names are those of the modules.
    if text := OF_TEXT.fullmatch(stem.removeprefix("base_model.model.")):
        dotted = DOTTED.fullmatch((text[2] or text[4]).replace(".", "_"))
        which = "text_encoder_2" if text[1] == "2" or text[3] else "text_encoder"
        return f"{which}.{'.'.join(filter(None, dotted.groups()))}" if dotted else None
    path = stem.removeprefix("base_model.model.").removeprefix("unet.").replace(".processor.", ".")
    path += ".0" if path.endswith(".to_out") else ""
    return path if path in adaptable() else None


def _family(modules: dict[str, tuple[str, int]], metadata: dict[str, str]) -> str | None:
    """Which family a LoRA is for: by what only one has, else by what the file says of itself.

    Args:
        modules: module → one of its keys, and the inputs of the weight that it changes.
    """
    if any("transformer_blocks.1." in module for module in modules):
        return "sdxl"
    for module, (_, inputs) in modules.items():
        if module.endswith(("attn2.to_k", "attn2.to_v")) and inputs in (768, 1024, 2048):  # width of the text
            return {768: "sd15", 1024: "sd2", 2048: "sdxl"}[inputs]
    if any(re.search(r"(input|output)_blocks_|middle_block_|lora_te[12]_|text_encoder_2", key)
           for key, _ in modules.values()):  # fmt: skip
        return "sdxl"
    said = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}"
    found = re.search(r"(?:sd_|stable-diffusion-)(v1|v2|xl)|sdxl", said)
    if found:
        return {"v1": "sd15", "v2": "sd2"}.get(found[1], "sdxl")
    for module, (_, inputs) in modules.items():
        if module.startswith("text_encoder.") and module.endswith("q_proj") and inputs in (768, 1024):
            return {768: "sd15", 1024: "sd2"}[inputs]
    return None


def _alpha(metadata: dict[str, str], module: str, rank: int) -> float:
    """The alpha of a module that has none of its own: from PEFT's settings, if diffusers kept them, else the rank."""
    settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    which = adapters.which(module)
    settings = {key.removeprefix(f"{which}."): value for key, value in settings.items()}
    alpha = settings.get("lora_alpha", rank)
    for pattern, own in (settings.get("alpha_pattern") or {}).items():
        path = module if which == "unet" else module.partition(".")[2]
        pattern = pattern.removeprefix("^").removeprefix("text_model.")
        alpha = own if re.fullmatch(rf"(.*\.)?({pattern})", path) else alpha
    return float(alpha) * (math.sqrt(rank) if settings.get("use_rslora") else 1)


def load(path: str | Path) -> Lora:
    """Read a LoRA file: kohya's layout in either SDXL naming, diffusers' or PEFT's keys. Missing alpha means rank.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no safetensors file, cut off, damaged, no LoRA, or of a method that is not read.
        FloatingPointError: it holds NaN.
    """
    path, modules, known = Path(path), {}, {}
    with _opened(path) as file:
        metadata = file.metadata() or {}
        keys, text = _sort(file.keys(), path.name)
        for module, own in keys.items():
            tensors = {part: file.get_tensor(key) for part, key in own.items()}
            parts = {part: tensor for part, tensor in tensors.items() if part != "alpha"}
            try:
                known[module] = next(iter(own.values())), adapters.size(parts)[1]
            except (ValueError, IndexError) as error:
                raise ValueError(f"{path.name} is damaged: the matrices of {module} do not match ({error}).") from None
            if "dora_scale" in parts and parts["dora_scale"].shape[0] != 1:
                raise ValueError(
                    f"{path.name} is a DoRA file whose lengths are those of rows. Programs disagree on what they mean; "
                    "lorakit reads and writes those of columns, on which they agree."
                )
            _finite(tensors, f"{path.name}, {module}", "Its training diverged, or it was damaged")
            rank = adapters.rank_of(parts) or 1
            alpha = tensors["alpha"].reshape(-1)[0].item() if "alpha" in tensors else _alpha(metadata, module, rank)
            modules[module] = (parts, alpha)
        aside = {key: file.get_tensor(key) for key in text}
    return Lora(path.name, _family(known, metadata), metadata, modules, aside)


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
    if not own:
        raise ValueError(
            f"{lora.name} adapts {' and '.join(lora.adapts) or 'nothing'} alone and not {' or '.join(models)}: "
            "it cannot be used here."
        )
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
        models, _usual(ranks.values()), _usual(alphas.values()), targets, modules=modules, ranks=ranks, alphas=alphas,
        algorithm=lora.algorithm, like={name: parts for name, (parts, _) in own.items()},
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
    adapter.load(state)


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
def prove(path: str | Path, adapter: Adapter, base: Base) -> Proof:
    """Read an exported file back and compare what it adds to each weight with what the adapter adds.

    Raises:
        RuntimeError: a module is missing, superfluous, or differs by more than rounding to the file's dtype can do.
    """
    lora = load(path)
    odd = sorted(lora.modules.keys() ^ adapter.layers.keys())
    if odd or lora.family not in (None, base.family):
        raise RuntimeError(
            f"{lora.name} does not hold this adapter: it reads as {lora.family} with {len(lora.modules)} modules, "
            f"not as {base.family} with {len(adapter.layers)}. Only in one of them: {', '.join(odd[:4]) or 'none'}."
        )
    errors = {}
    for module, (parts, alpha) in lora.modules.items():
        layer, own = adapter.layers[module], adapters.delta(adapter, module).flatten(1)
        if adapters.size(parts) != own.shape:
            raise RuntimeError(f"{lora.name}: {module} adds {adapters.size(parts)} where {tuple(own.shape)} belongs.")
        other = adapters.meaning(layer, {part: t.to(own.device) for part, t in parts.items()}, alpha).flatten(1)
        dtype = next(t.dtype for part, t in parts.items() if part != "dora_scale")
        rounded = adapters.delta(adapter, module, dtype).flatten(1)
        size = own.norm().item()
        difference = (other - own).norm().item()
        errors[module] = difference / size if size else difference
        # Rounding to the file's dtype is all that may part them, and a float32 product's own.
        if not (other - rounded).norm().item() <= 1e-5 * rounded.norm().item() + 1e-12:
            by = f"{errors[module]:.2%}, more than {dtype} explains"
            raise RuntimeError(f"{lora.name}: {module} differs from the adapter by {by}. Export again.")
    worst = max(errors, key=errors.__getitem__)
    return Proof(len(errors), errors[worst], worst)


# ── Telling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def describe(path: str | Path) -> dict:
    """Tell what a LoRA file (or one of a run's checkpoints) is, from its own weights and metadata.

    Raises:
        FileNotFoundError, ValueError, FloatingPointError: as `load`.
    """
    path = Path(path)
    with _opened(path) as file:
        run = (file.metadata() or {}).get("lorakit")
    told = {"file": path.name, "bytes": path.stat().st_size}
    if run:
        return told | {"kind": "checkpoint", "steps": json.loads(run)["step"], "settings": json.loads(run)["settings"]}
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
        "hash": _verify(path, lora.metadata.get("sshs_model_hash")),
    }


def _verify(path: Path, expected: str | None) -> str:
    """Whether the tensors are still those that the file's `sshs_model_hash` was made of."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        while block := stream.read(1 << 22):
            digest.update(block)
    return {None: "none", digest.hexdigest(): "verified"}.get(expected, "does not match: the weights were changed")
