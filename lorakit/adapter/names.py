"""The names of modules and tensors in LoRA files: kohya's, diffusers' and PEFT's."""

import re
from functools import cache

from lorakit.adapter import algorithms, targets
from lorakit.base import adaptable

# ── Writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def _modules_by_name() -> dict[str, str]:
    """kohya's name without prefix, in either naming → diffusers' path."""
    return {name.replace(".", "_"): path for path, other in adaptable().items() for name in (path, other)}


def kohya_name(module: str, family: str | None) -> str:
    """The name of a module in kohya's files: Stability's in SDXL's UNet, diffusers' in others.

    Raises:
        ValueError: no Stable Diffusion has such a module.
    """
    if (which := targets.model_of(module)) != "unet":
        path, prefix = targets.path_of(module), KOHYA_TEXT.get((which, family == "sdxl"))
        if not (prefix and targets.TEXT.fullmatch(path)):
            raise ValueError(f"{module} is no module of a text encoder, so no other program would find it.")
        return f"{prefix}_text_model_{path.replace('.', '_')}"
    if module not in adaptable():
        raise ValueError(f"{module} is no module of a Stable Diffusion UNet, so no other program would find it.")
    return "lora_unet_" + (adaptable()[module] if family == "sdxl" else module).replace(".", "_")


KOHYA_TEXT = {  # (text encoder, whether the base is an SDXL) → the prefix of kohya's keys
    ("text_encoder", False): "lora_te", ("text_encoder", True): "lora_te1", ("text_encoder_2", True): "lora_te2",
}  # fmt: skip
KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}  # the names of other parts are LyCORIS'


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────

PARTS = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha",  # kohya
    ".lora_A.weight": "down", ".lora_B.weight": "up",  # PEFT, diffusers
    ".lora.down.weight": "down", ".lora.up.weight": "up",  # diffusers before PEFT
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",  # its text encoders
    "_lora.down.weight": "down", "_lora.up.weight": "up",  # its attention processors
    **{f".{part}": part for part in algorithms.PARTS if part not in KOHYA},  # LyCORIS
}  # fmt: skip
TEXT = re.compile(r"lora_te\d?_|text_encoder|(base_model\.model\.)?(text_model|encoder\.layers)|bundle_emb")
OF_TEXT = re.compile(r"lora_te([12]?)_text_model_(.+)|(?:text_encoder(_2)?\.)?(?:text_model\.)?(encoder\.layers\..+)")
DOTTED = re.compile(r"(encoder)_(layers)_([0-9]{1,2})_(?:(self_attn)_([qkv]_proj|out_proj)|(mlp)_(fc[12]))")
PATTERN = re.compile(r"\^?(?:text_model\\?\.)?((?:\w|\\?\.)+)\$?")  # a name as PEFT and diffusers write it

OTHERS = {
    "lora_magnitude": "PEFT's DoRA", "hada_t": "Tucker LoHa", "lokr_t": "Tucker LoKr", "oft_": "OFT",
    "lora_mid": "Tucker LoCon",
}  # fmt: skip


def module_name(stem: str, folder: str) -> str | None:
    """The name of a module by its key without suffix; None if it is none of Stable Diffusion's modules."""
    if stem.startswith("lora_unet_"):
        return _modules_by_name().get(stem.removeprefix("lora_unet_"))
    path = stem.removeprefix("base_model.model.")
    # Newer transformers have no inner text_model, and PEFT's names are those of the modules: the folder says of which.
    if text := OF_TEXT.fullmatch(path):
        dotted = DOTTED.fullmatch((text[2] or text[4]).replace(".", "_"))
        second = text[1] == "2" or text[3] or (path != stem and folder == "text_encoder_2")
        which = "text_encoder_2" if second else "text_encoder"
        return f"{which}.{'.'.join(filter(None, dotted.groups()))}" if dotted else None
    path = path.removeprefix("unet.").replace(".processor.", ".")
    path += ".0" if path.endswith(".to_out") else ""
    return path if path in adaptable() else None
