"""The metadata of a LoRA file, under kohya's and ModelSpec's names, without anything about the machine."""

import json
import os
import re
from collections.abc import Mapping, Sequence

import torch
from PIL import Image

from lorakit import base as bases
from lorakit.adapter.algorithms import ALGORITHMS, Algorithm
from lorakit.adapter.injection import Adapter
from lorakit.adapter.lora import usual
from lorakit.base import Base
from lorakit.page import jpeg

LOCAL = re.compile(
    r"""(^|(?<=[\s"'=(,]))(/\w[\w.+@-]+/[\w.]|~[/\\]|[A-Za-z]:[/\\]\w|\\\\\w+\\)|^/\w|file://|\bhf_\w{20}"""
)
"""An absolute path (/a/b, ~/a, C:\\a, \\\\host\\a), or a hub token."""


def names_machine(text: str) -> bool:
    """Whether a text contains a path of this machine, its user's name in a path, or a token."""
    user = re.escape(os.path.basename(os.path.expanduser("~")))
    return bool(LOCAL.search(text) or (user and re.search(rf"[/\\]{user}([/\\]|$)", text)))


def check_private(metadata: dict[str, str]) -> None:
    """Refuse metadata that contains paths or tokens of this machine: a LoRA file is made to be shared.

    Raises:
        ValueError: a path or a token. TypeError: a value that is no string.
    """
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise TypeError(f"metadata {key} is {value!r}; readers expect only strings: give {str(value)!r}.")
        if _is_private(key, value):
            raise ValueError(
                f"metadata {key} holds a path or token of this machine, and the file is made to be shared: "
                f"{value[:80]!r}. Take it out."
            )


def _is_private(key: str, value: str) -> bool:
    plain = value.replace(r"\\", "\\")  # JSON writes one backslash as two
    return key != "modelspec.thumbnail" and (names_machine(value) or names_machine(plain))


def public_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """The entries of another program's metadata that `check_private` accepts."""
    return {key: value for key, value in metadata.items() if not _is_private(key, value)}


def precision_name(dtype: torch.dtype) -> str:
    """kohya's name for the precision of a run that computes in a dtype."""
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "no")


def adapter_metadata(adapter: Adapter, base: Base) -> dict[str, str]:
    """The metadata that follows from base and adapter. A1111 tells families apart by the part in `base_metadata`."""
    v, xl = base.prediction_type == "v_prediction", base.family == "sdxl"
    architecture = {"sd15": "v1", "sd2": "v2-768-v" if v else "v2-512", "sdxl": "xl-v1-base"}[base.family]
    kernels = {name: bases.weight_shape(layer.get_base_layer())[2:] for name, layer in adapter.layers.items()}
    network = network_metadata(adapter.ranks, adapter.alphas, kernels, ALGORITHMS[adapter.algorithm])
    return base_metadata(base.family, base) | network | {
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"stable-diffusion-{architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if xl else "diffusers",
        "modelspec.prediction_type": "v" if v else base.prediction_type,
    }  # fmt: skip


def base_metadata(family: str | None, base: Base | None = None) -> dict[str, str]:
    """The values by which programs tell families apart, and the base's name."""
    version = {"sd15": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", None: ""}[family]
    v = "_v" if base and base.prediction_type == "v_prediction" and family != "sdxl" else ""
    known = {"ss_base_model_version": version + v, "ss_v2": str(family == "sd2")} if family else {}
    return known | ({"ss_sd_model_name": base.name} if base else {})


def network_metadata(
    ranks: Mapping[str, int], alphas: Mapping[str, float], kernels: Mapping[str, Sequence[int]], algorithm: Algorithm
) -> dict[str, str]:
    """Ranks and alphas that most modules have, those of convolutions over several pixels apart, as kohya writes them.

    Args:
        kernels: module → its kernel, () of a linear layer.
    """
    wide = [module for module, kernel in kernels.items() if max(kernel, default=1) > 1]
    narrow = [module for module, kernel in kernels.items() if max(kernel, default=1) == 1] or wide
    facts = {
        "ss_network_module": "lycoris.kohya" if algorithm.lycoris else "networks.lora",
        "ss_network_dim": f"{usual(ranks[m] for m in narrow)}",
        "ss_network_alpha": f"{usual(alphas[m] for m in narrow):g}",
    }  # fmt: skip
    arguments = dict(algorithm.lycoris)
    if wide:
        arguments["conv_dim"] = f"{usual(ranks[m] for m in wide)}"
        arguments["conv_alpha"] = f"{usual(alphas[m] for m in wide):g}"
    return facts | ({"ss_network_args": json.dumps(arguments)} if arguments else {})


def thumbnail(picture: Image.Image) -> dict[str, str]:
    """A picture made with the LoRA, as metadata: a JPEG of at most 256 pixels a side."""
    return {"modelspec.thumbnail": jpeg(picture, 256)}
