"""Stability's own layout: what its files call the modules, and whole checkpoints in one `.safetensors` file.

Such a file is recognised by its keys, without reading a weight. Its tensors are read one at a time and given
diffusers' names, so that opening a component never holds more than that component.

The names are written down, not read off live classes: a renamed class has silently emptied LoRAs before.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorakit.base.names import open_clip_names, unet_names


@cache
def _vae() -> dict[str, str]:
    """Stability's path of every module of an autoencoder → diffusers'."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    leaves = {leaf: leaf for leaf in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    for half, way, count in (("encoder", "down", 2), ("decoder", "up", 3)):
        names |= {f"{half}.{leaf}": f"{half}.{leaf}" for leaf in ("conv_in", "conv_out")}
        names[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        places = {f"mid.block_{j + 1}": f"mid_block.resnets.{j}" for j in range(2)}
        for i in range(4):
            level = i if way == "down" else 3 - i  # Stability counts both from the pixels inwards
            places |= {f"{way}.{level}.block.{j}": f"{way}_blocks.{i}.resnets.{j}" for j in range(count)}
            names[f"{half}.{way}.{level}.{way}sample.conv"] = f"{half}.{way}_blocks.{i}.{way}samplers.0.conv"
        names |= {f"{half}.{a}.{x}": f"{half}.{b}.{y}" for a, b in places.items() for x, y in leaves.items()}
        names |= {f"{half}.mid.attn_1.{x}": f"{half}.mid_block.attentions.0.{y}" for x, y in attention.items()}
    return names


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────────────

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
CLIP_L, OPEN_CLIP_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
ENCODER_PREFIXES = {  # family → component → what the keys of its tensors begin with; OpenCLIP's end in "model."
    "sd15": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {"text_encoder": CLIP_L, "text_encoder_2": OPEN_CLIP_G},
}
UNET_TENSORS = {"sd15": 686, "sd2": 686, "sdxl": 1680}
OTHERS = {  # what a file with such a key is
    r"^lora_|\.lora_": "a LoRA", r"double_blocks\.": "a Flux model", r"joint_blocks\.": "an SD 3 model",
    r"^control_model\.": "a ControlNet", r"^edm_mean": "an EDM model",
    r"^conditioner\.embedders\.0\.model\.": "the SDXL refiner",
    r"^model\.diffusion_model\.": "a checkpoint without its text encoder",
    r"^(down_blocks|up_blocks|text_model)\.": "one component of a diffusers folder",
    r"^(first_stage_model\.)?(encoder|decoder)\.": "an autoencoder alone",
}  # fmt: skip


@contextmanager
def open_checkpoint(file: Path) -> Iterator:
    """A safetensors file, mapped, not read.

    Raises:
        ValueError: damaged, cut off, or something else.
    """
    try:
        with safe_open(file, "pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file.name} ({file.stat().st_size:,} bytes) is no whole safetensors file ({error}). Download it again."
        ) from error


def recognise(file: Path) -> tuple[str, dict]:
    """What a checkpoint file is, by its keys.

    Returns:
        The name of the configs that fit ("sd15", "sd21", "sd21-base" or "sdxl"), and what of the scheduler's config
        the file itself says: `prediction_type`, `rescale_betas_zero_snr`.

    Raises:
        ValueError: no whole checkpoint of a family that lorakit trains; says what it is, where that can be told.
    """
    with open_checkpoint(file) as handle:
        keys, metadata = set(handle.keys()), handle.metadata() or {}
        first = f"{UNET_PREFIX}input_blocks.0.0.weight"
        channels = handle.get_slice(first).get_shape()[1] if first in keys else 0
    has = lambda prefix: any(key.startswith(prefix) for key in keys)  # noqa: E731
    family = next((f for f, parts in ENCODER_PREFIXES.items() if all(map(has, parts.values()))), None)
    if not (channels and family) or "edm_mean" in keys:
        kinds = (kind for mark, kind in OTHERS.items() if any(re.search(mark, key) for key in keys))
        raise ValueError(
            f"{file.name} is {next(kinds, 'something else')}, not a checkpoint of SD 1.x, 2.x or XL. Give the model's "
            "whole checkpoint (UNet, text encoder and VAE in one file), its diffusers folder or its hub id."
        )
    if channels != 4:
        raise ValueError(
            f"{file.name} takes {channels} channels, not the 4 of its latents: inpainting and depth checkpoints "
            "cannot be trained. Use the plain text-to-image checkpoint."
        )
    if not has(VAE_PREFIX):
        raise ValueError(f"{file.name} holds no VAE. Use the form of this checkpoint with the VAE baked in.")
    count = sum(key.startswith(UNET_PREFIX) for key in keys)
    if count != UNET_TENSORS[family]:
        raise ValueError(
            f"{file.name} has the keys of {family}, but {count} tensors in its UNet where {UNET_TENSORS[family]} "
            "belong: a distilled or cut-down model, which cannot be trained from a single file. Give its diffusers "
            "folder."
        )
    said = f"{metadata.get('modelspec.architecture', '')} {metadata.get('modelspec.prediction_type', '')}".lower()
    epsilon = "epsilon" in said or "v2-512" in said
    velocity = "v_pred" in keys or bool(re.search(r"768-v|\bv$|v_pred|velocity", said))
    schedule = {"rescale_betas_zero_snr": True} if "ztsnr" in keys else {}
    if family == "sd2":  # nothing in the weights tells the two apart
        return ("sd21-base" if epsilon else "sd21"), schedule
    return family, schedule | ({"prediction_type": "v_prediction"} if velocity else {})


def _prefix(family: str, component: str) -> str:
    return {"unet": UNET_PREFIX, "vae": VAE_PREFIX}.get(component) or ENCODER_PREFIXES[family][component]


def _names(prefix: str, key: str) -> list[str]:
    """What diffusers and transformers call the tensor `key`, whose component's keys begin with `prefix`."""
    own = key.removeprefix(prefix)
    if prefix in (UNET_PREFIX, VAE_PREFIX):
        module, _, leaf = own.rpartition(".")
        path = (unet_names() if prefix == UNET_PREFIX else _vae()).get(module)
        return [f"{path}.{leaf}"] if path else []
    return open_clip_names(own) if prefix.endswith(".model.") else [own.removeprefix("text_model.")]


def tensors(file: Path, family: str, component: str, wanted: dict[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one component, one at a time, under diffusers' names (a text encoder's without `text_model.`).

    Args:
        wanted: name → shape of what the component's model holds; what else the file has is not read.
    """
    prefix = _prefix(family, component)
    with open_checkpoint(file) as handle:
        for key in handle.keys():  # noqa: SIM118
            names = _names(prefix, key) if key.startswith(prefix) else []
            if not names or names[0] not in wanted:
                continue
            for name, part in zip(names, _split(key, handle.get_tensor(key), len(names)), strict=True):
                flat = part.ndim > len(wanted[name]) and part.numel() == wanted[name].numel()
                yield name, part.reshape(wanted[name]) if flat else part  # the VAE's attention was 1×1 convolutions


def _split(key: str, tensor: Tensor, parts: int) -> tuple[Tensor, ...]:
    """A file's tensor as transformers has it: OpenCLIP multiplies with its projection from the other side."""
    return (tensor.T if key.endswith(".text_projection") else tensor).chunk(parts)


class WeightPlace(NamedTuple):
    """Where a weight stands: all of a tensor in a file, or one of its equal parts along the first axis."""

    file: Path
    key: str
    shape: tuple[int, ...]  # of the weight
    part: int = 0
    parts: int = 1  # 3 where OpenCLIP's queries, keys and values are one tensor

    def read(self) -> Tensor:
        """The weight, in the file's dtype."""
        with open_checkpoint(self.file) as handle:
            return _split(self.key, handle.get_tensor(self.key), self.parts)[self.part]


def places(file: Path, family: str | None = None, component: str = "") -> dict[str, WeightPlace]:
    """Where the weights of a component stand, by diffusers' names (a text encoder's without `text_model.`).

    No weight is read.

    Args:
        family, component: of a whole checkpoint; without them the file is one of a diffusers folder.
    """
    found, prefix = {}, _prefix(family, component) if family else ""
    with open_checkpoint(file) as handle:
        for key in handle.keys():  # noqa: SIM118
            names = _names(prefix, key) if key.startswith(prefix) else []
            shape = handle.get_slice(key).get_shape() if names else []
            shape = shape[::-1] if key.endswith(".text_projection") else shape
            own = (*(n // len(names) for n in shape[:1]), *shape[1:])
            found |= {name: WeightPlace(file, key, own, part, len(names)) for part, name in enumerate(names)}
    return found


def read_header(file: Path) -> tuple[dict[str, str], dict[str, dict]]:
    """A safetensors file's metadata, and its tensors in their order: key → dtype, shape and data_offsets."""
    with open_checkpoint(file), file.open("rb") as stream:
        table = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    metadata = table.pop("__metadata__", {})
    return metadata, dict(sorted(table.items(), key=lambda item: item[1]["data_offsets"]))


def raw(file: Path, family: str, component: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one component as they stand in the file, in the order of their keys."""
    prefix = _prefix(family, component)
    with open_checkpoint(file) as handle:
        for key in sorted(handle.keys()):
            if key.startswith(prefix):
                yield key, handle.get_tensor(key)
