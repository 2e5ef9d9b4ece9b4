"""A second reader of LoRA files, so that the first does not judge itself.

It follows the published rules for kohya's files and what A1111 and ComfyUI do with them, byte for byte from the file,
and imports nothing of lorakit. The names are written out, not derived.
"""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# SDXL: Stability's name of each block, as files have it → diffusers' name.
SDXL = {
    "input_blocks_1_0": "down_blocks.0.resnets.0", "input_blocks_2_0": "down_blocks.0.resnets.1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0": "down_blocks.1.resnets.0", "input_blocks_4_1": "down_blocks.1.attentions.0",
    "input_blocks_5_0": "down_blocks.1.resnets.1", "input_blocks_5_1": "down_blocks.1.attentions.1",
    "input_blocks_6_0_op": "down_blocks.1.downsamplers.0.conv",
    "input_blocks_7_0": "down_blocks.2.resnets.0", "input_blocks_7_1": "down_blocks.2.attentions.0",
    "input_blocks_8_0": "down_blocks.2.resnets.1", "input_blocks_8_1": "down_blocks.2.attentions.1",
    "middle_block_0": "mid_block.resnets.0", "middle_block_1": "mid_block.attentions.0",
    "middle_block_2": "mid_block.resnets.1",
    "output_blocks_0_0": "up_blocks.0.resnets.0", "output_blocks_0_1": "up_blocks.0.attentions.0",
    "output_blocks_1_0": "up_blocks.0.resnets.1", "output_blocks_1_1": "up_blocks.0.attentions.1",
    "output_blocks_2_0": "up_blocks.0.resnets.2", "output_blocks_2_1": "up_blocks.0.attentions.2",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_3_0": "up_blocks.1.resnets.0", "output_blocks_3_1": "up_blocks.1.attentions.0",
    "output_blocks_4_0": "up_blocks.1.resnets.1", "output_blocks_4_1": "up_blocks.1.attentions.1",
    "output_blocks_5_0": "up_blocks.1.resnets.2", "output_blocks_5_1": "up_blocks.1.attentions.2",
    "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks_6_0": "up_blocks.2.resnets.0", "output_blocks_7_0": "up_blocks.2.resnets.1",
    "output_blocks_8_0": "up_blocks.2.resnets.2",
}  # fmt: skip
RESNET = {
    "in_layers_2": "conv1", "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj", "skip_connection": "conv_shortcut",
}  # fmt: skip


def leaves(depth: int) -> list[str]:
    """The adapted modules of one transformer, `depth` blocks deep."""
    inner = ["attn1_to_q", "attn1_to_k", "attn1_to_v", "attn1_to_out_0", "attn2_to_q", "attn2_to_k", "attn2_to_v"]
    inner += ["attn2_to_out_0", "ff_net_0_proj", "ff_net_2"]
    return ["proj_in", "proj_out"] + [f"transformer_blocks_{k}_{leaf}" for k in range(depth) for leaf in inner]


def attention_names(family: str) -> set[str]:
    """The UNet's module names in a kohya file without convolutions."""
    if family == "sdxl":
        depths = {f"input_blocks_{n}_1": 2 for n in (4, 5)} | {f"input_blocks_{n}_1": 10 for n in (7, 8)}
        depths |= {"middle_block_1": 10} | {f"output_blocks_{n}_1": 10 if n < 3 else 2 for n in range(6)}
    else:
        depths = {f"down_blocks_{i}_attentions_{j}": 1 for i in (0, 1, 2) for j in (0, 1)}
        depths |= {"mid_block_attentions_0": 1} | {
            f"up_blocks_{i}_attentions_{j}": 1 for i in (1, 2, 3) for j in (0, 1, 2)
        }
    return {f"lora_unet_{block}_{leaf}" for block, depth in depths.items() for leaf in leaves(depth)}


def text_names(family: str) -> set[str]:
    """The text encoders' module names in a kohya file."""
    depths = {"sd15": {"te": 12}, "sd2": {"te": 23}, "sdxl": {"te1": 12, "te2": 32}}[family]
    leaves = ["self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2"]
    return {
        f"lora_{te}_text_model_encoder_layers_{n}_{leaf}"
        for te, depth in depths.items() for n in range(depth) for leaf in leaves
    }  # fmt: skip


def sdxl_convolution_names() -> set[str]:
    """What the convolutions (LoCon) add for SDXL."""
    resnets = [f"input_blocks_{n}_0" for n in (1, 2, 4, 5, 7, 8)] + ["middle_block_0", "middle_block_2"]
    resnets += [f"output_blocks_{n}_0" for n in range(9)]
    widening = ["input_blocks_4_0", "input_blocks_7_0", *(f"output_blocks_{n}_0" for n in range(9))]
    samplers = ["input_blocks_3_0_op", "input_blocks_6_0_op", "output_blocks_2_2_conv", "output_blocks_5_2_conv"]
    names = [f"{r}_{leaf}" for r in resnets for leaf in ("in_layers_2", "out_layers_3", "emb_layers_1")]
    return {f"lora_unet_{name}" for name in [*names, *(f"{r}_skip_connection" for r in widening), *samplers]}


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str], bytes]:
    """A safetensors file from its bytes: tensors, metadata, and the part that holds the tensors."""
    raw = Path(path).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        data = torch.frombuffer(bytearray(body[begin:end]), dtype=DTYPES[entry["dtype"]])
        tensors[key] = data.reshape(entry["shape"])
    return tensors, metadata, body


def updates(path: Path) -> dict[str, dict[str, Tensor]]:
    """By the file's own module names: what is added to a weight ("added", in any shape of the weight's numbers), and
    the lengths that the columns of the sum are brought to, if there are any ("lengths")."""
    tensors = read(path)[0]
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, part = key.split(".", 1)
        modules.setdefault(name, {})[part] = tensor.float()
    found = {}
    for name, own in modules.items():
        alpha, lengths = own.pop("alpha", None), own.pop("dora_scale", None)
        added, rank = rebuilt(own)
        scale = 1.0 if alpha is None or rank is None else alpha.item() / rank
        found[name] = {"added": added * scale} | ({} if lengths is None else {"lengths": lengths})
    return found


def rebuilt(own: dict[str, Tensor]) -> tuple[Tensor, int | None]:
    """What a module's matrices make, and their rank: None where nothing is of low rank."""
    if "lora_up.weight" in own:
        down, up = own.pop("lora_down.weight"), own.pop("lora_up.weight")
        assert not own
        return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:]), down.shape[0]
    if "hada_w1_a" in own:
        assert len(own) == 4
        return (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"]), own["hada_w1_b"].shape[0]
    rank, matrices = None, []
    for n in (1, 2):
        whole = own.pop(f"lokr_w{n}", None)
        if whole is None:
            a, b = own.pop(f"lokr_w{n}_a"), own.pop(f"lokr_w{n}_b")
            whole, rank = a @ b, b.shape[0]
        matrices.append(whole)
    assert not own
    one, two = matrices
    while one.ndim < two.ndim:
        one = one.unsqueeze(-1)
    return torch.kron(one, two), rank


def change(weight: Tensor, update: dict[str, Tensor]) -> Tensor:
    """What an update does to a bare weight at strength 1: the difference, in the weight's shape, float32."""
    delta = update["added"]
    assert delta.shape[0] == weight.shape[0] and delta.numel() == weight.numel(), (delta.shape, weight.shape)
    after = weight.float() + delta.reshape(weight.shape)
    if (lengths := update.get("lengths")) is not None:
        assert lengths.shape == (1, weight.shape[1], *[1] * (weight.ndim - 2)), lengths.shape
        columns = after.transpose(0, 1).flatten(1).norm(dim=1).reshape(lengths.shape)
        after = after * (lengths / columns)
    return after - weight


@torch.no_grad()
def merge(
    path: Path,
    unet: torch.nn.Module,
    family: str,
    strength: float = 1.0,
    text: dict[str, torch.nn.Module] | None = None,
) -> int:
    """Change a bare UNet's weights (in place) as the file says, as a program that knows nothing of layers does.

    Args:
        text: the bare text encoders, "text_encoder" and SDXL's "text_encoder_2", which are changed as well.

    Returns:
        How many weights were changed. A name that finds no weight is a KeyError, never passed over.
    """
    weights = {name.replace(".", "_"): module for name, module in unet.named_modules() if hasattr(module, "weight")}
    changed = set()
    encoders = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
    for name, update in updates(path).items():
        if prefix := next((prefix for prefix in encoders if name.startswith(prefix)), None):
            own = {
                n.replace(".", "_").removeprefix("text_model_"): m for n, m in text[encoders[prefix]].named_modules()
            }
            weight = own[name.removeprefix(f"{prefix}text_model_")].weight
            weight += strength * change(weight, update).to(weight.dtype)
            changed.add(name)
            continue
        assert name.startswith("lora_unet_"), name
        place = name.removeprefix("lora_unet_")
        if family == "sdxl":
            block = max((b for b in SDXL if place == b or place.startswith(b + "_")), key=len)
            leaf = place.removeprefix(block).removeprefix("_")
            place = "_".join(part for part in (SDXL[block].replace(".", "_"), RESNET.get(leaf, leaf)) if part)
        weight = weights[place].weight
        weight += strength * change(weight, update).to(weight.dtype)
        changed.add(place)
    return len(changed)


def hashes(path: Path) -> tuple[str, str]:
    """sshs_model_hash and sshs_legacy_hash as the file should carry them."""
    from safetensors.torch import save

    tensors, metadata, body = read(path)
    serial = save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    return hashlib.sha256(body).hexdigest(), hashlib.sha256(serial[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
