"""Checkpoints in Stability's layout: UNet, text encoders and VAE in one `.safetensors` file.

A file is recognised by its keys, without reading a weight. Its tensors are read one at a time and renamed to
diffusers' names, so opening a component never loads more than that component.

The names are listed here, not derived from live classes: a renamed class has silently emptied LoRAs before.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.base.names import open_clip_names, unet_names
from lorakit.storage import open_safetensors, read_header


@cache
def _vae() -> dict[str, str]:
    """Every module of an autoencoder: Stability's path → diffusers' path."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    leaves = {leaf: leaf for leaf in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    for half, kind, count in (("encoder", "down", 2), ("decoder", "up", 3)):
        names |= {f"{half}.{leaf}": f"{half}.{leaf}" for leaf in ("conv_in", "conv_out")}
        names[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        places = {f"mid.block_{j + 1}": f"mid_block.resnets.{j}" for j in range(2)}
        for i in range(4):
            level = i if kind == "down" else 3 - i  # Stability counts both from the pixels inwards
            places |= {f"{kind}.{level}.block.{j}": f"{kind}_blocks.{i}.resnets.{j}" for j in range(count)}
            names[f"{half}.{kind}.{level}.{kind}sample.conv"] = f"{half}.{kind}_blocks.{i}.{kind}samplers.0.conv"
        names |= {f"{half}.{a}.{x}": f"{half}.{b}.{y}" for a, b in places.items() for x, y in leaves.items()}
        names |= {f"{half}.mid.attn_1.{x}": f"{half}.mid_block.attentions.0.{y}" for x, y in attention.items()}
    return names


UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
CLIP_L, OPEN_CLIP_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
ENCODER_PREFIXES = {  # family → component → prefix of its keys; OpenCLIP's prefixes end in "model."
    "sd15": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {"text_encoder": CLIP_L, "text_encoder_2": OPEN_CLIP_G},
}
UNET_TENSORS = {"sd15": 686, "sd2": 686, "sdxl": 1680}
OTHERS = {  # pattern of a key → the kind of file that has it
    r"^lora_|\.lora_": "a LoRA", r"double_blocks\.": "a Flux model", r"joint_blocks\.": "an SD 3 model",
    r"^control_model\.": "a ControlNet", r"^edm_mean": "an EDM model",
    r"^conditioner\.embedders\.0\.model\.": "the SDXL refiner",
    r"^model\.diffusion_model\.": "a checkpoint without its text encoder",
    r"^(down_blocks|up_blocks|text_model)\.": "one component of a diffusers folder",
    r"^(first_stage_model\.)?(encoder|decoder)\.": "an autoencoder",
}  # fmt: skip


QUANTIZED = {  # pattern of a key → the form of the weights
    r"(^|\.)scaled_fp8$|\.(scale_weight|weight_scale|comfy_quant)$": "fp8 with scales",
    r"\.quant_state\.bitsandbytes__|\.absmax$": "NF4 or FP4 (bitsandbytes)", r"\.SCB$": "int8 (bitsandbytes)",
}  # fmt: skip


def quantized(table: Mapping[str, dict]) -> str | None:
    """The form of quantized weights in a file; None where all are plain numbers. fp8 without scales is plain.

    Args:
        table: as `storage.read_header` returns it.
    """
    for pattern, form in QUANTIZED.items():
        if any(map(re.compile(pattern).search, table)):
            return form
    whole = any(
        x["dtype"][0] in "IU" for key, x in table.items() if key.startswith(UNET_PREFIX) and key.endswith("weight")
    )
    return "integers" if whole else None


def kind_of(keys: Collection[str]) -> str | None:
    """The kind of file, other than a LoRA's and a whole checkpoint's, that has such keys; None if it is not known."""
    return next((kind for pattern, kind in OTHERS.items() if any(map(re.compile(pattern).search, keys))), None)


def recognise(file: Path) -> tuple[str, dict[str, Any]]:
    """Identify a checkpoint file by its keys.

    Returns:
        The name of the matching configs ("sd15", "sd21", "sd21-base" or "sdxl"), and the values of the scheduler's
        config that the file records: `prediction_type`, `rescale_betas_zero_snr`.

    Raises:
        ValueError: not a whole checkpoint of a family that lorakit trains; names the kind of file if known.
    """
    metadata, keys = read_header(file)
    if kind := quantized(keys):
        raise ValueError(
            f"{file.name} has its weights in {kind}, which only makes pictures. Get the fp16 or bf16 form of the same "
            "checkpoint; `quantize` holds it in fewer bits while a LoRA is trained."
        )
    first = keys.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    channels = first["shape"][1] if first else 0

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in keys)

    family = next((name for name, parts in ENCODER_PREFIXES.items() if all(map(has, parts.values()))), None)
    if not (channels and family) or "edm_mean" in keys:
        raise ValueError(
            f"{file.name} is {kind_of(keys) or 'something else'}, not a checkpoint of SD 1.x, 2.x or XL. Give the "
            "model's whole checkpoint (UNet, text encoder and VAE in one file), its diffusers folder or its hub id."
        )
    if channels != 4:
        raise ValueError(
            f"{file.name} takes {channels} channels, not the 4 of its latents: inpainting and depth checkpoints "
            "cannot be trained. Use the plain text-to-image checkpoint."
        )
    if not has(VAE_PREFIX):
        raise ValueError(f"{file.name} contains no VAE. Use a version of this checkpoint that includes the VAE.")
    count = sum(key.startswith(UNET_PREFIX) for key in keys)
    if count != UNET_TENSORS[family]:
        raise ValueError(
            f"{file.name} has the keys of {family}, but its UNet has {count} tensors instead of {UNET_TENSORS[family]}:"
            " a distilled or pruned model, which cannot be trained from a single file. Give its diffusers folder."
        )
    spec = f"{metadata.get('modelspec.architecture', '')} {metadata.get('modelspec.prediction_type', '')}".lower()
    schedule: dict[str, Any] = {"rescale_betas_zero_snr": True} if "ztsnr" in keys else {}
    if family == "sd2":  # the weights of both prediction types have the same form; v-prediction is more common
        return ("sd21-base" if "epsilon" in spec or "v2-512" in spec else "sd21"), schedule
    if "v_pred" in keys or re.search(r"768-v|\bv$|v_pred|velocity", spec):
        schedule["prediction_type"] = "v_prediction"
    return family, schedule


def _prefix(family: str, component: str) -> str:
    return {"unet": UNET_PREFIX, "vae": VAE_PREFIX}.get(component) or ENCODER_PREFIXES[family][component]


def _keys(handle: Any, prefix: str) -> Iterator[tuple[str, list[str]]]:
    """The keys of a component in an open file, each with diffusers' or transformers' names for its tensor."""
    for key in handle.keys():  # noqa: SIM118
        if not key.startswith(prefix):
            continue
        path = key.removeprefix(prefix)
        if prefix in (UNET_PREFIX, VAE_PREFIX):
            module, _, leaf = path.rpartition(".")
            module = (unet_names() if prefix == UNET_PREFIX else _vae()).get(module, "")
            names = [f"{module}.{leaf}"] if module else []
        else:
            names = open_clip_names(path) if prefix.endswith(".model.") else [path.removeprefix("text_model.")]
        if names:
            yield key, names


def tensors(file: Path, family: str, component: str, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one component, one at a time, under diffusers' names (a text encoder's without `text_model.`).

    Only those in `shapes`, the shapes of the model's weights, are read.
    """
    with open_safetensors(file) as handle:
        for key, names in _keys(handle, _prefix(family, component)):
            if names[0] not in shapes:
                continue
            for name, part in zip(names, _split(key, handle.get_tensor(key), len(names)), strict=True):
                flat = part.ndim > len(shapes[name]) and part.numel() == shapes[name].numel()
                yield name, part.reshape(shapes[name]) if flat else part  # the VAE's attention was 1×1 convolutions


def _split(key: str, tensor: Tensor, parts: int) -> tuple[Tensor, ...]:
    """A file's tensor in transformers' layout: OpenCLIP's text projection is transposed."""
    return (tensor.T if key.endswith(".text_projection") else tensor).chunk(parts)


class WeightPlace(NamedTuple):
    """The location of a weight: a tensor in a file, or one of its equal parts along the first axis."""

    file: Path
    key: str
    shape: tuple[int, ...]  # of the weight
    part: int = 0
    parts: int = 1  # 3 if OpenCLIP's queries, keys and values are one tensor

    def read(self) -> Tensor:
        """The weight, in the file's dtype."""
        with open_safetensors(self.file) as handle:
            return self.split(handle.get_tensor(self.key))[self.part]

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The weights in the file's tensor."""
        return _split(self.key, tensor, self.parts)

    def join(self, weights: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        whole = torch.cat(list(weights)) if self.parts > 1 else weights[0]
        return whole.T if self.key.endswith(".text_projection") else whole


def places(file: Path, family: str | None = None, component: str = "") -> dict[str, WeightPlace]:
    """The location of a component's weights, from the file's header; names as for `tensors`.

    Args:
        family, component: of a whole checkpoint; without them, the file belongs to a diffusers folder.
    """
    places: dict[str, WeightPlace] = {}
    with open_safetensors(file) as handle:
        for key, names in _keys(handle, _prefix(family, component) if family else ""):
            shape = handle.get_slice(key).get_shape()
            shape = shape[::-1] if key.endswith(".text_projection") else shape
            part_shape = (*(n // len(names) for n in shape[:1]), *shape[1:])
            places |= {name: WeightPlace(file, key, part_shape, i, len(names)) for i, name in enumerate(names)}
    return places


def raw(file: Path, family: str, component: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one component under the file's keys, in their order."""
    prefix = _prefix(family, component)
    with open_safetensors(file) as handle:
        for key in sorted(handle.keys()):
            if key.startswith(prefix):
                yield key, handle.get_tensor(key)
