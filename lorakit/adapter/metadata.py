"""What a LoRA file says of itself, under kohya's and ModelSpec's names, and nothing of the machine it was made on."""

import json
import os
import re
from collections.abc import Sequence

import torch
from PIL import Image

from lorakit import base as bases
from lorakit.adapter.injection import Adapter
from lorakit.adapter.lora import usual
from lorakit.base import Base
from lorakit.page import jpeg

LOCAL = re.compile(
    r"""(^|(?<=[\s"'=(,]))(/\w[\w.+@-]+/[\w.]|~[/\\]|[A-Za-z]:[/\\]\w|\\\\\w+\\)|^/\w|file://|\bhf_\w{20}"""
)
"""An absolute path (/a/b, ~/a, C:\\a, \\\\host\\a), or a hub token."""


def names_machine(text: str) -> bool:
    """Whether a text tells of this machine or its user."""
    user = re.escape(os.path.basename(os.path.expanduser("~")))
    return bool(LOCAL.search(text) or (user and re.search(rf"[/\\]{user}([/\\]|$)", text)))


def check_private(metadata: dict[str, str]) -> None:
    """Refuse metadata that tells of this machine: a LoRA file is made to be shared.

    Raises:
        ValueError: a path or a token. TypeError: a value that is no string.
    """
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise TypeError(f"metadata {key} is {value!r}; readers expect strings alone: give {str(value)!r}.")
        plain = value.replace(r"\\", "\\")  # JSON writes one backslash as two
        if key != "modelspec.thumbnail" and (names_machine(value) or names_machine(plain)):
            raise ValueError(
                f"metadata {key} holds a path or token of this machine, and the file is made to be shared: "
                f"{value[:80]!r}. Take it out."
            )


def public_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """What of another program's metadata may be written again: all that does not tell of a machine, as `private`."""
    kept = {}
    for key, value in metadata.items():
        try:
            check_private({key: value})
        except ValueError:
            continue
        kept[key] = value
    return kept


def precision_name(dtype: torch.dtype) -> str:
    """What kohya calls the precision of a run that computes in a dtype."""
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "no")


def adapter_metadata(adapter: Adapter, base: Base) -> dict[str, str]:
    """What base and adapter alone say about a file. A1111 tells families apart by the first two."""
    v, xl = base.prediction_type == "v_prediction", base.family == "sdxl"
    version = {"sd15": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[base.family]
    architecture = {"sd15": "v1", "sd2": "v2-768-v" if v else "v2-512", "sdxl": "xl-v1-base"}[base.family]
    shapes = {module: bases.weight_shape(layer.get_base_layer()) for module, layer in adapter.layers.items()}
    wide = [module for module in adapter.layers if _wide(shapes[module])]
    narrow = [module for module in adapter.layers if not _wide(shapes[module])] or wide
    lycoris = {"lora": {}, "dora": {"algo": "lora", "dora_wd": "True"}}.get(
        adapter.algorithm, {"algo": adapter.algorithm}
    )
    facts = {
        "ss_base_model_version": version + "_v" * (v and not xl), "ss_v2": str(base.family == "sd2"),
        "ss_sd_model_name": base.name, "ss_network_module": "lycoris.kohya" if lycoris else "networks.lora",
        "ss_network_dim": f"{usual(adapter.ranks[m] for m in narrow)}",
        "ss_network_alpha": f"{usual(adapter.alphas[m] for m in narrow):g}",
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"stable-diffusion-{architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if xl else "diffusers",
        "modelspec.prediction_type": "v" if v else base.prediction_type,
    }  # fmt: skip
    arguments = lycoris
    if wide:
        dim, alpha = usual(adapter.ranks[m] for m in wide), usual(adapter.alphas[m] for m in wide)
        arguments = arguments | {"conv_dim": f"{dim}", "conv_alpha": f"{alpha:g}"}
    if arguments:
        facts["ss_network_args"] = json.dumps(arguments)
    return facts


def _wide(shape: Sequence[int]) -> bool:
    """Whether a weight or down matrix is that of a convolution over more than one pixel."""
    return max(shape[2:], default=1) > 1


def thumbnail(picture: Image.Image) -> dict[str, str]:
    """A picture that the LoRA made, for the file: JPEG of at most 256 pixels a side."""
    return {"modelspec.thumbnail": jpeg(picture, 256)}
