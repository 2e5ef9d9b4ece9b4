"""Prompts → pictures, with the adapter at a chosen strength.

A picture depends on its own prompt and seed alone, whatever is made beside it in a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lorakit import adapter as adapters
from lorakit import base as bases
from lorakit import cache, files
from lorakit.cache import Text

SCHEDULERS: dict[str, tuple[str, dict]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "ddim": ("DDIMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


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


@torch.no_grad()
def latents(
    unet, base: bases.Base, texts: Sequence[Text], negative: Text, seeds: Sequence[int], *, size: tuple[int, int],
    steps: int = 25, guidance: float = 7.0, scheduler_name: str = "dpm++_2m_karras", batch: int = 4,
    on_picture: Callable[[int], None] | None = None,
) -> Tensor:  # fmt: skip
    """Denoise one set of latents a text.

    Args:
        texts, seeds: a prompt and a seed for each picture, N of them.
        negative: what guidance pushes away from.
        size: (height, width) in pixels, multiples of `base.step`.
        guidance: 1 follows the prompt alone and costs half.

    Returns:
        Latents (N, C, height / factor, width / factor), float32, on the CPU.

    Raises:
        ValueError: size does not suit the base.

    Source: Ho & Salimans 2022, arXiv:2207.12598 (classifier-free guidance).
    """
    if size[0] % base.step or size[1] % base.step:
        raise ValueError(f"Sample size {size[1]}×{size[0]} must be multiples of {base.step} pixels for {base.name}.")
    device, dtype = unet.device, unet.dtype
    shape = (base.latent_channels, size[0] // base.vae_factor, size[1] // base.vae_factor)
    sizes = bases.size_conditions(size, (0, 0), size)
    finished = []
    for start in range(0, len(texts), batch):
        some, own_seeds = texts[start : start + batch], seeds[start : start + batch]
        randoms = [torch.Generator().manual_seed(seed) for seed in own_seeds]
        x = torch.stack([torch.randn(*shape, generator=random) for random in randoms]).to(device)
        both = [*some, *([negative] * len(some) if guidance > 1 else [])]
        embeddings = torch.stack([text.embeddings for text in both]).to(device, dtype)
        conditions = None
        if base.family == "sdxl":
            pooled = torch.stack([text.pooled for text in both]).to(device, dtype)
            conditions = {"text_embeds": pooled, "time_ids": sizes.repeat(len(both), 1).to(device, dtype)}
        stepper = scheduler(scheduler_name, base)
        stepper.set_timesteps(steps, device=device)
        x = x * stepper.init_noise_sigma
        # Ancestral samplers draw noise at each step: from each picture's own generator, whatever the batch.
        random = {"generator": randoms} if scheduler_name == "euler_a" else {}
        for timestep in stepper.timesteps:
            scaled = stepper.scale_model_input(x, timestep).to(dtype)
            scaled = torch.cat([scaled, scaled]) if guidance > 1 else scaled
            with bases.autocast(device, dtype):
                answer = unet(scaled, timestep, encoder_hidden_states=embeddings, added_cond_kwargs=conditions).sample
            answer = answer.float()
            if guidance > 1:
                wanted, unwanted = answer.chunk(2)
                answer = unwanted + guidance * (wanted - unwanted)
            x = stepper.step(answer, timestep, x, **random).prev_sample
        finished.append(x.cpu())
        if on_picture:
            on_picture(start + len(some))
    return torch.cat(finished)


@torch.no_grad()
def decode(vae, latents: Tensor) -> list[Image.Image]:
    """Latents (N, C, h, w), as `latents` gives them, → RGB pictures."""
    pictures = []
    for x in latents:
        x = x[None].to(vae.device, vae.dtype) / vae.config.scaling_factor
        x = x + (getattr(vae.config, "shift_factor", None) or 0.0)
        y = (vae.decode(x).sample[0].float().clamp(-1, 1) + 1) * 127.5
        pictures.append(Image.fromarray(y.permute(1, 2, 0).round().byte().cpu().numpy()))
    return pictures


@contextmanager
def borrowed(unet) -> Iterator:
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


def generate(
    base: bases.Base, prompts: Sequence[str], *, negative: str = "", seeds: Sequence[int] | int = 0,
    size: tuple[int, int] | None = None, strengths: Sequence[float] = (1.0,), attach: Callable | None = None,
    adapts: Sequence[str] = ("unet",), steps: int = 25, guidance: float = 7.0,
    scheduler_name: str = "dpm++_2m_karras", clip_skip: int = 1, device: str = "auto", precision: str = "auto",
    quantize: str = "none", batch: int = 4, folder: Path | None = None,
    on_picture: Callable[[int], None] | None = None,
) -> list[list[Image.Image]]:  # fmt: skip
    """Pictures for prompts, at one strength or several, loading one component of the base at a time.

    Args:
        seeds: one for each prompt, or the first of a row of them.
        size: (height, width) in pixels; None is the base's own.
        attach: called with models by name, returns the adapter it put there; None samples the bare base.
        adapts: the models that `attach` is for: "unet", "text_encoder", "text_encoder_2".
        quantize: as for `base.load_unet`.
        folder: where text embeddings are kept; None keeps none.
        on_picture: told how many pictures are done.

    Returns:
        For each prompt, a picture for each strength.
    """
    import tempfile

    if attach and not {"unet", *base.text_encoders} & set(adapts):
        raise ValueError(f"It adapts {', '.join(adapts) or 'nothing'}, and {base.name} has no such part to adapt.")
    scheduler(scheduler_name, base)  # an unknown name is told before anything is loaded
    target = bases.choose_device(device)
    dtype = bases.compute_dtype(precision, target)
    seeds = [seeds + i for i in range(len(prompts))] if isinstance(seeds, int) else list(seeds)
    if len(seeds) != len(prompts):
        raise ValueError(
            f"{len(seeds)} seeds were given for {len(prompts)} prompts. Give one each, or a single number."
        )
    size = size or (base.resolution, base.resolution)
    with tempfile.TemporaryDirectory() as scratch:
        texts = cache.encode_texts(
            base, [*prompts, negative], folder or Path(scratch), device=target, dtype=dtype, clip_skip=clip_skip
        )
    said = [[texts[prompt] for prompt in (*prompts, negative)]] * len(strengths)
    if attach and (changed := [which for which in base.text_encoders if which in adapts]):
        encoders = {which: bases.load_text_encoder(base, dtype, target, which)[0] for which in changed}
        adapter = attach(encoders)
        for number, value in enumerate(strengths):
            with adapters.strength(adapter, value):
                said[number] = cache.encode_anew(base, encoders, said[number], clip_skip)
        del encoders, adapter
        cache.free(target)
    unet = bases.load_unet(base, dtype, target, quantize)
    adapter = attach({"unet": unet}) if attach and "unet" in adapts else None
    columns, total = [], len(prompts)
    for number, value in enumerate(strengths):
        *wanted, unwanted = said[number]
        seen = (lambda n, before=number * total: on_picture(before + n)) if on_picture else None
        with adapters.strength(adapter, value) if adapter else nullcontext():
            columns.append(
                latents(unet, base, wanted, unwanted, seeds, size=size, steps=steps,
                        guidance=guidance, scheduler_name=scheduler_name, batch=batch, on_picture=seen)
            )  # fmt: skip
    del unet, adapter
    cache.free(target)
    vae = bases.load_vae(base, dtype, target)
    pictures = [decode(vae, column) for column in columns]
    return [list(row) for row in zip(*pictures, strict=True)]


def save(pictures: Sequence[Image.Image], folder: Path, prompts: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """Write pictures as PNG, with prompt and seed in their metadata where A1111's "PNG Info" finds them."""
    from PIL.PngImagePlugin import PngInfo

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (picture, prompt, seed) in enumerate(zip(pictures, prompts, seeds, strict=True)):
        facts = PngInfo()
        facts.add_text("parameters", f"{prompt}\nSeed: {seed}, Size: {picture.width}x{picture.height}")
        paths.append(folder / f"{number:02d}-seed-{seed}.png")
        with files.replacing(paths[-1]) as partial:
            picture.save(partial, "PNG", pnginfo=facts)
    return paths
