"""A diffusers folder as one checkpoint file in Stability's layout, as Civitai's files are."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lorakit.base import names as base_names
from lorakit.base import single_file


def weights(folder: Path, component: str) -> dict[str, torch.Tensor]:
    """A component's tensors by diffusers' names; a text encoder's without `text_model.`, as old and new ones differ."""
    (file,) = (folder / component).glob("*.safetensors")
    return {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}


def write_file(folder: Path, file: Path, family: str, *, leave_out: str = "", **more) -> Path:
    """The weights of a diffusers folder as one file in Stability's layout."""
    tensors = {}
    for component, prefix, names in (
        ("unet", single_file.UNET_PREFIX, base_names.unet_names()), ("vae", single_file.VAE_PREFIX, single_file._vae()),
    ):  # fmt: skip
        own = {}
        for theirs, path in names.items():  # a sampler that has two names stands where its level leaves room
            own.setdefault(path, []).append(theirs)
        for name, tensor in weights(folder, component).items():
            path, _, leaf = name.rpartition(".")
            theirs = own[path][0]
            if len(own[path]) > 1:
                level = int(path.split(".")[1])
                bare = f"up_blocks.{level}.attentions.0.proj_in.weight" not in weights(folder, "unet")
                theirs = f"output_blocks.{3 * level + 2}.{1 if bare else 2}.conv"
            if component == "vae" and ".attn_1." in theirs and leaf == "weight" and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
            tensors[f"{prefix}{theirs}.{leaf}"] = tensor
    for component, prefix in single_file.ENCODER_PREFIXES[family].items():
        state = weights(folder, component)
        if not prefix.endswith(".model."):
            tensors |= {f"{prefix}text_model.{name}": tensor for name, tensor in state.items()}
            tensors[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]  # older files have it
            continue
        outside = {theirs: name for name, theirs in base_names.OPEN_CLIP.items()}
        inside = {theirs: name for name, theirs in base_names.OPEN_CLIP_LAYER.items()}
        for name, tensor in state.items():
            if name in outside:
                tensors[prefix + outside[name]] = tensor.T if name.startswith("text_projection") else tensor
            elif ".q_proj." in name:
                joined = torch.cat([state[name.replace(".q_", f".{x}_")] for x in "qkv"])
                layer, leaf = name.split(".")[2], name.rpartition(".")[2]
                tensors[f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{leaf}"] = joined
            elif ".k_proj." not in name and ".v_proj." not in name:
                _, _, layer, *leaf, kind = name.split(".")
                tensors[f"{prefix}transformer.resblocks.{layer}.{inside['.'.join(leaf)]}.{kind}"] = tensor
        tensors[f"{prefix}logit_scale"] = torch.tensor(4.6)
    tensors |= {"model_ema.decay": torch.tensor(1.0), "alphas_cumprod": torch.rand(1000)}
    tensors = {
        key: x.contiguous().clone() for key, x in tensors.items() if not (leave_out and key.startswith(leave_out))
    }
    save_file(tensors | more.pop("tensors", {}), file, metadata=more or None)
    return file
