"""Stability's names of modules and tensors, and diffusers' and transformers' names for the same."""

import re
from collections.abc import Iterator
from functools import cache

ATTENTION = (
    "proj_in", "proj_out",
    *(f"transformer_blocks.{k}.{attention}.{leaf}" for k in range(10) for attention in ("attn1", "attn2")
      for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"transformer_blocks.{k}.ff.net.{leaf}" for k in range(10) for leaf in ("0.proj", "2")),
)  # fmt: skip
RESNET = {
    "conv1": "in_layers.2", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
# Modules that no LoRA adapts.
ATTENTION_NORMS = ("norm", *(f"transformer_blocks.{k}.norm{n}" for k in range(10) for n in (1, 2, 3)))
RESNET_NORMS = {"norm1": "in_layers.0", "norm2": "out_layers.0"}


def _blocks() -> Iterator[tuple[str, int, str, str]]:
    """(diffusers' block, number in it, Stability's attention, Stability's resnet) of a UNet of up to four levels."""
    for i in range(4):
        for j in range(2):
            yield f"down_blocks.{i}", j, f"input_blocks.{3 * i + j + 1}.1", f"input_blocks.{3 * i + j + 1}.0"
        for j in range(3):
            yield f"up_blocks.{i}", j, f"output_blocks.{3 * i + j}.1", f"output_blocks.{3 * i + j}.0"
    for j in range(2):
        yield "mid_block", j, f"middle_block.{2 * j + 1}", f"middle_block.{2 * j}"


@cache
def adaptable() -> dict[str, str]:
    """Every module of a Stable Diffusion UNet that a LoRA can adapt: diffusers' path → Stability's path."""
    names = dict(OUTSIDE)
    for block, j, attention, resnet in _blocks():
        names |= {f"{block}.attentions.{j}.{leaf}": f"{attention}.{leaf}" for leaf in ATTENTION}
        names |= {f"{block}.resnets.{j}.{leaf}": f"{resnet}.{theirs}" for leaf, theirs in RESNET.items()}
    for i in range(4):
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{3 * i + 3}.0.op"
        names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{3 * i + 2}.2.conv"
    return names


@cache
def unet_names() -> dict[str, str]:
    """Every module of a UNet: Stability's path → diffusers' path."""
    names = {theirs: path for path, theirs in adaptable().items()} | {"out.0": "conv_norm_out"}
    for block, j, attention, resnet in _blocks():
        names |= {f"{attention}.{leaf}": f"{block}.attentions.{j}.{leaf}" for leaf in ATTENTION_NORMS}
        names |= {f"{resnet}.{theirs}": f"{block}.resnets.{j}.{leaf}" for leaf, theirs in RESNET_NORMS.items()}
    for i in range(4):  # a level without attention has its upsampler one place earlier
        names[f"output_blocks.{3 * i + 2}.1.conv"] = f"up_blocks.{i}.upsamplers.0.conv"
    return names


# OpenCLIP's name → CLIP's in transformers, outside and inside of a layer.
OPEN_CLIP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}  # fmt: skip
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip


def open_clip_names(key: str) -> list[str]:
    """transformers' names for a tensor of OpenCLIP: three if it combines queries, keys and values."""
    layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", key)
    if not layer:
        return [OPEN_CLIP[key]] if key in OPEN_CLIP else []
    number, leaf, kind = layer.groups()
    parts = [f"self_attn.{x}_proj" for x in "qkv"] if leaf == "attn.in_proj" else [OPEN_CLIP_LAYER[leaf]]
    return [f"encoder.layers.{number}.{part}.{kind}" for part in parts]
