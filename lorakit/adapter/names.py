"""The names of modules and tensors in LoRA files: kohya's, diffusers' and PEFT's."""

import re
from functools import cache

from lorakit.adapter import algorithms, targets
from lorakit.base import adaptable

# ── Writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def kohya_name(module: str, family: str | None) -> str:
    """The name of a module in kohya's files: Stability's in SDXL's UNet, diffusers' in others.

    Raises:
        ValueError: no Stable Diffusion has such a module.
    """
    if (which := targets.model_of(module)) != "unet":
        path, prefix = targets.path_of(module), KOHYA_TEXT.get((which, family == "sdxl"))
        if prefix and module == targets.PROJECTION:
            return f"{prefix}_{path}"
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
EMBEDDING = "bundle_emb."  # begins the keys of embeddings that OneTrainer and A1111 bundle with a LoRA
PATTERN = re.compile(r"\^?(?:text_model\\?\.)?((?:\w|\\?\.)+)\$?")  # a name as PEFT and diffusers write it
ADAPTER = re.compile(r"(?<=\.lora_[AB])\.[\w-]+(?=\.weight$)")  # the name of an adapter in PEFT's live models

UNET = re.compile(r"lora_unet_|lycoris_|unet\.|(model\.)?diffusion_model\.")  # kohya, LyCORIS, diffusers, ComfyUI
TEXT = re.compile(
    r"(?:lora_te([12]?)_|lycoris_|text_encoder(_2)?\.|text_encoders\.clip_([lgh])\.transformer\.)?"
    r"(?:text_model[._])?(encoder[._]layers[._].+|text_projection)"
)
TEXT_LAYER = re.compile(r"(encoder)_(layers)_([0-9]{1,2})_(?:(self_attn)_([qkv]_proj|out_proj)|(mlp)_(fc[12]))")

# What lorakit does not read: pattern of a key → what it is.
OTHERS = {
    r"\.lora_magnitude": "lengths of rows (PEFT's DoRA)", r"lora_mid\.": "Tucker LoCon",
    r"\.hada_t[12]$": "Tucker LoHa", r"\.lokr_t[12]$": "Tucker LoKr", r"\.oft_|\.rescale$": "OFT",
    r"\.[wb]_norm$": "changes of norms", r"\.(diff(_b)?|set_weight)$": "changes of whole weights",
    r"\.on_input$|\.ia3_l": "IA3", r"\.([ab][12]|bm)\.weight$": "GLoRA", r"\.lambda_layer$|\.[pq]_layer\.": "T-LoRA",
    r"\.lora_E": "AdaLoRA", r"\.lora(_up|_B|\.up)(\.[\w-]+)?\.bias$": "biases", r"\.scalar$": "scalars (LyCORIS)",
    r"vera_lambda": "VeRA", r"^(emb_params|clip_[lg])$": "a textual inversion embedding",
    r"^(image_proj|ip_adapter)\.": "an IP-Adapter", r"motion_modules\.": "an AnimateDiff module",
    r"^lora_controlnet$": "a Control-LoRA",
}  # fmt: skip


@cache
def _unet_modules() -> dict[str, str]:
    """A name of a UNet's module, diffusers' or Stability's, with dots or underscores → diffusers' path."""
    names = {name: path for path, other in adaptable().items() for name in (path, other)}
    return names | {name.replace(".", "_"): path for name, path in names.items()}


def module_name(stem: str, folder: str) -> str | None:
    """The name of a module by its key without suffix; None if it is none of Stable Diffusion's modules.

    Args:
        folder: of the file; it says which text encoder PEFT's names are of.
    """
    path = stem.replace("base_model.model.", "", 1)
    if text := TEXT.fullmatch(path):
        second = any(mark in ("2", "_2", "g") for mark in text.groups()[:3])
        second = second or (path != stem and folder == "text_encoder_2")
        if text[4] == "text_projection":  # the first encoder has none
            return targets.PROJECTION if second else None
        layer = TEXT_LAYER.fullmatch(text[4].replace(".", "_"))
        which = "text_encoder_2" if second else "text_encoder"
        return f"{which}.{'.'.join(filter(None, layer.groups()))}" if layer else None
    prefix = UNET.match(path)
    path = path[prefix.end() :] if prefix else path
    path = path.replace(".processor.", ".") + (".0" if path.endswith(".to_out") else "")
    return _unet_modules().get(path)
