"""Prompts → pictures, with adapters at chosen strengths, one after the other as they are made.

A picture depends on its own prompt and seed alone, whatever is made beside it in a batch.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lorakit import base as bases
from lorakit.base import Text
from lorakit.device import autocast, free_memory, out_of_memory

SCHEDULERS: dict[str, tuple[str, dict]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "ddim": ("DDIMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),  # for LoRAs and bases that were made for 4 to 8 steps, at a guidance of 1 to 2
}
DEFAULT_SCHEDULER = "dpm++_2m_karras"
FEWEST = 16  # latents on a side of a tile
ANCESTRAL = ("euler_a", "lcm")  # draw noise at each step


def scheduler(name: str, base: bases.Base):
    """A diffusers scheduler with the base's own noise schedule.

    Raises:
        ValueError: unknown name.
    """
    import diffusers

    if name not in SCHEDULERS:
        raise ValueError(f"There is no scheduler {name!r}. Use one of {', '.join(SCHEDULERS)}.")
    cls, options = SCHEDULERS[name]
    if base.configs["scheduler"].get("rescale_betas_zero_snr"):
        options = options | {"timestep_spacing": "trailing"}  # such a base must be asked at the last timestep
    return getattr(diffusers, cls).from_config(base.configs["scheduler"], **options)


def suits(base: bases.Base, size: tuple[int, int]) -> None:
    if size[0] % base.step or size[1] % base.step:
        raise ValueError(f"Sample size {size[1]}×{size[0]} must be multiples of {base.step} pixels for {base.name}.")


@torch.no_grad()
def sample_latents(
    unet, base: bases.Base, texts: Sequence[Text], negative: Text, seeds: Sequence[int], *, size: tuple[int, int],
    steps: int = 25, guidance: float = 7.0, scheduler_name: str = DEFAULT_SCHEDULER, batch: int = 4,
    on_picture: Callable[[int], None] | None = None, stop: threading.Event | None = None, empty: Text | None = None,
) -> Tensor:  # fmt: skip
    """Denoise one set of latents a text.

    Args:
        texts, seeds: a prompt and a seed for each picture, N of them.
        negative: what guidance pushes away from.
        size: (height, width) in pixels, multiples of `base.step`.
        guidance: 1 follows the prompt alone and costs half.
        batch: pictures at once, at most; half as many where there is no memory for them.
        stop: once it is set, no further step is made.
        empty: the empty prompt, which prompts are filled up with where the negative one is longer, and it where they
            are; None does with the negative one.

    Returns:
        Latents (N, C, height / factor, width / factor), float32, on the CPU; of those finished, where it was stopped.

    Raises:
        ValueError: size does not suit the base.

    Source: Ho & Salimans 2022, arXiv:2207.12598 (classifier-free guidance).
    """
    suits(base, size)
    made = [torch.empty(0, *_shape(base, size))]
    batches = in_batches(unet, base, texts, negative, seeds, size, steps, guidance, scheduler_name, batch, stop, empty)
    for some, _ in batches:
        made.append(some)
        if on_picture:
            on_picture(sum(map(len, made)))
    return torch.cat(made)


def _shape(base: bases.Base, size: tuple[int, int]) -> tuple[int, int, int]:
    return base.latent_channels, size[0] // base.vae_factor, size[1] // base.vae_factor


@torch.no_grad()
def in_batches(
    unet, base: bases.Base, texts: Sequence[Text], negative: Text, seeds: Sequence[int], size: tuple[int, int],
    steps: int, guidance: float, scheduler_name: str, batch: int, stop: threading.Event | None, empty: Text | None,
) -> Iterator[tuple[Tensor, int]]:  # fmt: skip
    """`latents` batch by batch; each with how many at once there was memory for."""
    lengths = [max(len(text.embeddings), len(negative.embeddings)) for text in texts]
    start = 0
    while start < len(texts):
        end = start + 1
        while end < len(texts) and end - start < batch and lengths[end] == lengths[start]:
            end += 1
        some = [bases.pad_text(text, empty or negative, lengths[start]) for text in texts[start:end]]
        unwanted = bases.pad_text(negative, empty or negative, lengths[start])
        full = False
        try:
            x = _denoised(
                unet, base, some, unwanted, seeds[start:end], _shape(base, size), size, steps, guidance,
                scheduler_name, stop,
            )  # fmt: skip
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or end - start == 1:
                raise
            full = True  # what the step allocated goes with the error
        if full:
            batch = (end - start + 1) // 2
            free_memory(unet.device)
            continue
        if x is None:
            break
        yield x, batch
        start = end


def _denoised(
    unet, base: bases.Base, texts: Sequence[Text], negative: Text, seeds: Sequence[int], shape: tuple[int, int, int],
    size: tuple[int, int], steps: int, guidance: float, scheduler_name: str, stop: threading.Event | None,
) -> Tensor | None:  # fmt: skip
    """`latents` of one batch, of texts of one length; None where it was stopped."""
    device, dtype = unet.device, unet.dtype
    randoms = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = torch.stack([torch.randn(*shape, generator=random) for random in randoms]).to(device)
    both = [*texts, *([negative] * len(texts) if guidance > 1 else [])]
    embeddings = torch.stack([text.embeddings for text in both]).to(device, dtype)
    conditions = None
    if base.family == "sdxl":
        pooled = torch.stack([text.pooled for text in both]).to(device, dtype)
        sizes = bases.size_conditions(size, (0, 0), size).repeat(len(both), 1)
        conditions = {"text_embeds": pooled, "time_ids": sizes.to(device, dtype)}
    stepper = scheduler(scheduler_name, base)
    # LCM takes its steps from among 50 others, unless told to from more.
    among = {"original_inference_steps": steps} if scheduler_name == "lcm" and steps > 50 else {}
    stepper.set_timesteps(steps, device=device, **among)
    x = x * stepper.init_noise_sigma
    # From each picture's own generator, whatever the batch.
    random = {"generator": randoms} if scheduler_name in ANCESTRAL else {}
    for timestep in stepper.timesteps:
        if stop and stop.is_set():
            return None
        scaled = stepper.scale_model_input(x, timestep).to(dtype)
        scaled = torch.cat([scaled, scaled]) if guidance > 1 else scaled
        with autocast(device, dtype):
            answer = unet(scaled, timestep, encoder_hidden_states=embeddings, added_cond_kwargs=conditions).sample
        answer = answer.float()
        if guidance > 1:
            wanted, unwanted = answer.chunk(2)
            answer = unwanted + guidance * (wanted - unwanted)
        x = stepper.step(answer, timestep, x, **random).prev_sample
    return x.cpu()


@torch.no_grad()
def decode_latents(vae, latents: Tensor) -> list[Image.Image]:
    """Latents (N, C, h, w), as `latents` gives them, → RGB pictures; in tiles where whole ones do not fit."""
    pictures = []
    for x in latents:
        x = x[None].to(vae.device, vae.dtype) / vae.config.scaling_factor
        x = x + (getattr(vae.config, "shift_factor", None) or 0.0)
        y = (_decoded(vae, x).float().clamp(-1, 1) + 1) * 127.5
        pictures.append(Image.fromarray(y.permute(1, 2, 0).round().byte().cpu().numpy()))
    return pictures


def _decoded(vae, x: Tensor) -> Tensor:
    side, factor = max(x.shape[-2:]), 2 ** (len(vae.config.block_out_channels) - 1)
    while True:
        try:
            return vae.decode(x).sample[0]
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or side < 2 * FEWEST:
                raise
        free_memory(vae.device)  # what the attempt allocated is gone with the error
        vae.enable_tiling()
        side //= 2
        vae.tile_latent_min_size, vae.tile_sample_min_size = side, side * factor


@contextmanager
def borrow(unet) -> Iterator:
    """The training UNet in sampling state: no dropout, no gradients; handed back as it was, randomness too."""
    training = unet.training
    numpy_state, devices = np.random.get_state(), [unet.device] if unet.device.type == "cuda" else []
    unet.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield unet
    finally:
        unet.train(training)
        np.random.set_state(numpy_state)
