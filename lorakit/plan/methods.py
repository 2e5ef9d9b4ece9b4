"""Compare a LoRA with other ways to train a base: DreamBooth, textual inversion and hypernetworks."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorakit import base as bases
from lorakit.config import Config
from lorakit.plan import store as stores
from lorakit.plan.memory import optimizer_state

TOKENS = 16  # vectors in a textual inversion's file, as is common for a character
FROZEN_SHARE = 0.6  # of a LoRA's activations, what a frozen UNet keeps: counted on SD 1.5, 2.1 and XL, 0.58 to 0.60


class Method(NamedTuple):
    """A way to train a base."""

    name: str
    peak: int  # bytes
    file_size: int  # bytes, in fp16; of textual inversion and hypernetworks in float32, as is usual
    time: str  # the training guide's
    works_with: str  # bases that its file works with


def compare_methods(base: bases.Base, config: Config, *, dtype: torch.dtype, store: Path | None = None) -> list[Method]:
    """Memory and file size of LoRA, DreamBooth, textual inversion and, but for SDXL, a hypernetwork; the same settings.

    The activations of the others are derived from those of a plain LoRA. For SD 1.5, 2.1 and XL with batch 1, their
    peaks are within 5 % of those of a counted step; with batch 4, within 8 %.

    Args:
        dtype: of autocast, and of weights that are not trained.
        store: folder of earlier predictions; None predicts again.

    Source: Ruiz et al. 2022, arXiv:2208.12242 (DreamBooth); Gal et al. 2022, arXiv:2208.01618 (textual inversion);
    what is trained, and in which dtype, as in diffusers' `train_dreambooth.py` and `textual_inversion.py`.
    """
    size = (config.resolution, config.resolution)
    lora = plain = stores.step_cost(base, config, size=size, dtype=dtype, device="cuda", store=store)
    if (settings := _plain(config)) != config:
        plain = stores.step_cost(base, settings, size=size, dtype=dtype, device="cuda", store=store)
    models: list[Any] = [bases.empty(base, name) for name in ("unet", "vae", *base.text_encoders)]
    unet, vae, *encoders = models
    unet_numbers, vae_numbers, *encoder_numbers = (_numbers(model) for model in (unet, vae, *encoders))
    # DreamBooth: the UNet in float32. The update needs all gradients, the step activations and autocast's copies.
    copies = dtype.itemsize * unet_numbers if dtype != torch.float32 else 0
    moments = sum(optimizer_state(config.optimizer, weight.shape) for weight in unet.parameters())
    full = 4 * unet_numbers + moments + max(4 * unet_numbers, plain.activations + copies)
    # Textual inversion: the tables of token vectors in float32, with gradients for every row.
    vectors = [encoder.get_input_embeddings().weight for encoder in encoders]
    trained = sum(8 * table.numel() + optimizer_state(config.optimizer, table.shape) for table in vectors)
    frozen = unet_numbers + sum(encoder_numbers) - sum(table.numel() for table in vectors)
    inversion = dtype.itemsize * frozen + trained + round(FROZEN_SHARE * plain.activations)
    file_size = 2 * (unet_numbers + vae_numbers + sum(encoder_numbers))
    words = 4 * TOKENS * sum(table.shape[1] for table in vectors)
    found = [
        Method("LoRA", lora.peak, lora.file_size, "30–90 min", "every checkpoint of its family"),
        Method("DreamBooth", full, file_size, "2–6 h", "it is a checkpoint itself"),
        Method("textual inversion", inversion, words, "2–4 h", "every checkpoint with these text encoders"),
    ]
    if base.family != "sdxl":
        found.append(_hypernetwork(base, config, dtype.itemsize * unet_numbers + plain.activations))
    return found


def _hypernetwork(base: bases.Base, config: Config, others: int) -> Method:
    """A hypernetwork: for each width of attention a network n → 2n → n for keys and one for values, in float32.

    Args:
        others: bytes of the frozen UNet and of activations.

    Source: A1111's stable-diffusion-webui, whose default layers are (1, 2, 1); it has none for SDXL.
    """
    widths = {base.configs["unet"]["cross_attention_dim"], *base.configs["unet"]["block_out_channels"]}
    shapes = [torch.Size(sides) for n in widths for sides in ((2 * n, n), (2 * n,), (n, 2 * n), (n,))]
    numbers = 2 * sum(map(math.prod, shapes))
    moments = 2 * sum(optimizer_state(config.optimizer, shape) for shape in shapes)
    peak = others + 8 * numbers + moments
    return Method("hypernetwork", peak, 4 * numbers, "4–8 h", "its family, in A1111 and ComfyUI")


def _plain(config: Config) -> Config:
    """The settings of a step without what only LoRA has."""
    return config.with_(
        algorithm="lora", targets="attention", block_ranks={}, quantize="none", text_encoder_rate=0,
        text_encoder_2_rate=None, train_unet=True, prior_prediction=False,
    )  # fmt: skip


def _numbers(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())
