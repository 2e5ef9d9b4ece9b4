"""The frozen Stable Diffusion model: open, load part by part, encode prompts and pictures."""

from typing import TYPE_CHECKING

from lorakit import _lazy

__all__ = [
    "Base",
    "encode_pictures",
    "encode_prompts",
    "encode_texts",
    "known",
    "load_text_encoder",
    "load_unet",
    "load_vae",
    "open",
]

if TYPE_CHECKING:
    from lorakit.base.encode import Encoded, Text, encode_pictures, encode_prompts, encode_texts, pad_text
    from lorakit.base.encode import reencode_texts
    from lorakit.base.model import Base, ask, component_folders, empty, identity, known, load_text_encoder
    from lorakit.base.model import (
        load_unet,
        load_vae,
        open,
        predicting,
        reencode,
        token_limit,
        tokens_needed,
        size_conditions,
        weight_files,
        weight_places,
    )
    from lorakit.base.names import adaptable
    from lorakit.base.prompts import escape
    from lorakit.base.quantization import can_quantize, column_norm, is_quantized, layer_dtype, layer_weight
    from lorakit.base.quantization import quantizable_layers, quantized_size, weight_shape
    from lorakit.base.single_file import ENCODER_PREFIXES, UNET_PREFIX, VAE_PREFIX, WeightPlace, kind_of
else:
    __getattr__, __dir__ = _lazy.attach(__name__)
