"""Denoise latents with a UNet, and decode them to pictures.

A picture depends on its own prompt and seed only, not on the pictures that are made in the same batch.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lorakit import base as bases
from lorakit import storage
from lorakit.base import Text
from lorakit.config import Config
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
ANCESTRAL = ("euler_a", "lcm")  # draw noise at each step
SMALLEST_TILE = 16  # latent cells on a side


@dataclass(frozen=True)
class Sampling:
    """How pictures are made from prompts.

    Attributes:
        negative: the prompt that guidance pushes away from.
        steps: denoising steps.
        guidance: strength of the prompt; 1 follows the prompt only and takes half the time
            (classifier-free guidance, Ho & Salimans 2022, arXiv:2207.12598).
        scheduler: one of SCHEDULERS.
        size: (height, width) in pixels; None takes the base's own.
        clip_skip: 1 takes the text encoder's last layer, 2 the one before.
        seeds: one for each prompt, or the first prompt's, from which the others count up.
    """

    negative: str = ""
    steps: int = 25
    guidance: float = 7.0
    scheduler: str = DEFAULT_SCHEDULER
    size: tuple[int, int] | None = None
    clip_skip: int = 1
    seeds: int | Sequence[int] = 0

    @classmethod
    def of(cls, config: Config) -> "Sampling":
        """The settings of a run's sample pictures."""
        return cls(
            steps=config.sample_steps, guidance=config.sample_guidance, size=(config.resolution, config.resolution),
            clip_skip=config.clip_skip, seeds=config.seed,
        )  # fmt: skip

    def resolve(self, count: int, base: bases.Base) -> tuple[list[int], tuple[int, int]]:
        """The seed of each of `count` prompts, and the size (height, width) in pixels.

        Raises:
            ValueError: an unknown scheduler, another number of seeds than prompts, or steps, guidance, size or clip
                skip that the base cannot make a picture with.
        """
        make_scheduler(self.scheduler, base)
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"{self.steps} steps make no picture. Give 1 to 1000; 20 to 30 are usual.")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance {self.guidance} makes no picture. Give 0 or more; 5 to 8 are usual.")
        layers = min(base.configs[name].get("num_hidden_layers", 12) for name in base.text_encoders)
        if not 1 <= self.clip_skip <= layers:
            raise ValueError(f"clip_skip {self.clip_skip} leaves no layer of a text encoder with {layers}. Use 1 or 2.")
        seeds = [self.seeds + i for i in range(count)] if isinstance(self.seeds, int) else list(self.seeds)
        if len(seeds) != count:
            raise ValueError(
                f"{len(seeds)} seeds were given for {count} prompts. Give one for each, or a single number."
            )
        height, width = self.size or (base.resolution, base.resolution)
        if min(height, width) < 1 or height % base.step or width % base.step:
            raise ValueError(f"Sample size {width}×{height} must be multiples of {base.step} pixels for {base.name}.")
        return seeds, (height, width)


@storage.exclusive
def make_scheduler(name: str, base: bases.Base) -> Any:
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


@dataclass
class Denoiser:
    """A UNet with the settings it denoises by.

    Attributes:
        size: (height, width) in pixels.
        batch: prompts denoised together, at most. Halved when the memory does not suffice, and stays so.
        stop: once it is set, no further step is made.
    """

    unet: Any
    base: bases.Base
    sampling: Sampling
    size: tuple[int, int]
    batch: int = 4
    stop: threading.Event | None = None

    @torch.no_grad()
    def __call__(self, texts: Sequence[Text], seeds: Sequence[int], negative: Text, empty: Text) -> Iterator[Tensor]:
        """Denoise one picture for each text, batch by batch; ends early when it is stopped.

        Args:
            texts, seeds: N prompts, and a seed for each.
            empty: the empty prompt, which fills up the shorter one of a prompt and `negative`.

        Yields:
            Latents (n, C, height / factor, width / factor) of the next n texts, float32, on the CPU.
        """
        lengths = [max(len(text.embeddings), len(negative.embeddings)) for text in texts]
        start = 0
        while start < len(texts):
            end = start + 1
            while end < len(texts) and end - start < self.batch and lengths[end] == lengths[start]:
                end += 1
            padded = [bases.pad_text(text, empty, lengths[start]) for text in (*texts[start:end], negative)]
            latents = self._or_less(padded, seeds[start:end])
            if latents is None:
                continue
            if not len(latents):
                return
            yield latents
            start = end

    def _or_less(self, texts: Sequence[Text], seeds: Sequence[int]) -> Tensor | None:
        """`_denoise`; None when there is no memory for so many, and `batch` was halved."""
        try:
            return self._denoise(texts, seeds)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or len(seeds) == 1:
                raise
        self.batch = (len(seeds) + 1) // 2
        free_memory(self.unet.device)  # the memory of the failed step went with its error
        return None

    def _denoise(self, texts: Sequence[Text], seeds: Sequence[int]) -> Tensor:
        """Latents of one batch of texts, the negative one last; empty when it was stopped."""
        device, dtype, sampling = self.unet.device, self.unet.dtype, self.sampling
        height, width = self.size
        shape = self.base.latent_channels, height // self.base.vae_factor, width // self.base.vae_factor
        randoms = [torch.Generator().manual_seed(seed) for seed in seeds]
        x = torch.stack([torch.randn(*shape, generator=random) for random in randoms]).to(device)
        *prompts, negative = texts
        guided = sampling.guidance > 1
        both = [*prompts, *[negative] * (len(prompts) * guided)]
        embeddings = torch.stack([text.embeddings for text in both]).to(device, dtype)
        pooled, sizes = torch.stack([text.pooled for text in both]).to(device, dtype), None
        if self.base.family == "sdxl":
            sizes = bases.size_conditions(self.size, (0, 0), self.size).repeat(len(both), 1).to(device, dtype)
        scheduler = make_scheduler(sampling.scheduler, self.base)
        # LCM takes its steps from 50 timesteps unless it is given more.
        options = (
            {"original_inference_steps": sampling.steps} if sampling.scheduler == "lcm" and sampling.steps > 50 else {}
        )
        scheduler.set_timesteps(sampling.steps, device=device, **options)
        x = x * scheduler.init_noise_sigma
        noise = {"generator": randoms} if sampling.scheduler in ANCESTRAL else {}  # one generator for each picture
        for timestep in scheduler.timesteps:
            if self.stop and self.stop.is_set():
                return x[:0].cpu()
            scaled = scheduler.scale_model_input(x, timestep).to(dtype)
            scaled = torch.cat([scaled, scaled]) if guided else scaled
            with autocast(device, dtype):
                answer = bases.ask(self.unet, scaled, timestep, (embeddings, pooled), sizes).float()
            if guided:
                with_prompt, without = answer.chunk(2)
                answer = without + sampling.guidance * (with_prompt - without)
            x = scheduler.step(answer, timestep, x, **noise).prev_sample
        return x.cpu()


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> list[Image.Image]:
    """Decode latents (N, C, h, w) to RGB pictures, in tiles where whole ones do not fit into memory.

    Raises:
        FloatingPointError: a picture is not finite, and would be black.
    """
    pictures = []
    for x in latents:
        if not torch.isfinite(x).all():
            raise FloatingPointError(
                "The picture has values that are not finite, and would be black. Use a lower strength or guidance; if "
                "the base does this without a LoRA too, use mixed_precision 'bf16' or 'no'."
            )
        x = x[None].to(vae.device, vae.dtype) / vae.config.scaling_factor
        x = x + (getattr(vae.config, "shift_factor", None) or 0.0)
        y = _decode(vae, x).float()
        if not torch.isfinite(y).all():
            raise FloatingPointError(
                f"The base's VAE overflows in {vae.dtype}, and the picture would be black. Use mixed_precision 'bf16' "
                "or 'no', or a base with a VAE for half precision."
            )
        y = (y.clamp(-1, 1) + 1) * 127.5
        pictures.append(Image.fromarray(y.permute(1, 2, 0).round().byte().cpu().numpy()))
    return pictures


def _decode(vae: Any, x: Tensor) -> Tensor:
    side, factor = max(x.shape[-2:]), 2 ** (len(vae.config.block_out_channels) - 1)
    while True:
        try:
            return vae.decode(x).sample[0]
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or side < 2 * SMALLEST_TILE:
                raise
        free_memory(vae.device)  # the memory of the failed attempt went with its error
        vae.enable_tiling()
        side //= 2
        vae.tile_latent_min_size, vae.tile_sample_min_size = side, side * factor


@contextmanager
def borrow(unet: Any) -> Iterator[Any]:
    """Inside, the training UNet samples: no dropout, no gradients. Afterwards it and all randomness are as before."""
    training = unet.training
    numpy_state, devices = np.random.get_state(), [unet.device] if unet.device.type == "cuda" else []
    unet.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield unet
    finally:
        unet.train(training)
        np.random.set_state(numpy_state)
