"""Prompts → pictures, with adapters at chosen strengths, one after the other as they are made.

A picture depends on its own prompt and seed alone, whatever is made beside it in a batch.
"""

import io
import json
import tempfile
import threading
import traceback
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
    "lcm": ("LCMScheduler", {}),  # for LoRAs and bases that were made for 4 to 8 steps, at a guidance of 1 to 2
}
USUAL = "dpm++_2m_karras"
FEWEST = 16  # latents on a side of a tile
ANCESTRAL = ("euler_a", "lcm")  # draw noise at each step
SAMPLERS = {  # as A1111 calls them
    "euler": "Euler", "euler_a": "Euler a", "dpm++_2m_karras": "DPM++ 2M Karras", "ddim": "DDIM", "unipc": "UniPC",
    "lcm": "LCM",
}  # fmt: skip


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


def _suits(base: bases.Base, size: tuple[int, int]) -> None:
    if size[0] % base.step or size[1] % base.step:
        raise ValueError(f"Sample size {size[1]}×{size[0]} must be multiples of {base.step} pixels for {base.name}.")


@torch.no_grad()
def latents(
    unet, base: bases.Base, texts: Sequence[Text], negative: Text, seeds: Sequence[int], *, size: tuple[int, int],
    steps: int = 25, guidance: float = 7.0, scheduler_name: str = USUAL, batch: int = 4,
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
    _suits(base, size)
    made = [torch.empty(0, *_shape(base, size))]
    batches = _batches(unet, base, texts, negative, seeds, size, steps, guidance, scheduler_name, batch, stop, empty)
    for some, _ in batches:
        made.append(some)
        if on_picture:
            on_picture(sum(map(len, made)))
    return torch.cat(made)


def _shape(base: bases.Base, size: tuple[int, int]) -> tuple[int, int, int]:
    return base.latent_channels, size[0] // base.vae_factor, size[1] // base.vae_factor


@torch.no_grad()
def _batches(
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
        some = [cache.filled(text, empty or negative, lengths[start]) for text in texts[start:end]]
        unwanted = cache.filled(negative, empty or negative, lengths[start])
        full = False
        try:
            x = _denoised(
                unet, base, some, unwanted, seeds[start:end], _shape(base, size), size, steps, guidance,
                scheduler_name, stop,
            )  # fmt: skip
        except (RuntimeError, MemoryError) as error:
            if not bases.out_of_memory(error) or end - start == 1:
                raise
            full = True  # what the step allocated goes with the error
        if full:
            batch = (end - start + 1) // 2
            cache.free(unet.device)
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
        with bases.autocast(device, dtype):
            answer = unet(scaled, timestep, encoder_hidden_states=embeddings, added_cond_kwargs=conditions).sample
        answer = answer.float()
        if guidance > 1:
            wanted, unwanted = answer.chunk(2)
            answer = unwanted + guidance * (wanted - unwanted)
        x = stepper.step(answer, timestep, x, **random).prev_sample
    return x.cpu()


@torch.no_grad()
def decode(vae, latents: Tensor) -> list[Image.Image]:
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
            if not bases.out_of_memory(error) or side < 2 * FEWEST:
                raise
        cache.free(vae.device)  # what the attempt allocated is gone with the error
        vae.enable_tiling()
        side //= 2
        vae.tile_latent_min_size, vae.tile_sample_min_size = side, side * factor


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


# ── Many at once ────────────────────────────────────────────────────────────────────────────────────────────────────

Attach = Callable[[adapters.Models], adapters.Adapter]  # puts an adapter into models by name, and returns it


@dataclass(frozen=True)
class Variant:
    """What some of the pictures are made with: the base as it is, or with an adapter."""

    attach: Attach | None = None  # None is the bare base; variants with the same one are made with one adapter
    adapts: Sequence[str] = ("unet",)  # the models that it is for: "unet", "text_encoder", "text_encoder_2"
    strength: float = 1.0


class Placed(NamedTuple):
    """A picture that is done, and where it belongs."""

    row: int  # which prompt's
    column: int  # which variant's
    picture: Image.Image


def stream(
    base: bases.Base, prompts: Sequence[str], variants: Sequence[Variant] = (Variant(),), *, negative: str = "",
    seeds: Sequence[int] | int = 0, size: tuple[int, int] | None = None, steps: int = 25, guidance: float = 7.0,
    scheduler_name: str = USUAL, clip_skip: int = 1, device: str = "auto", precision: str = "auto",
    quantize: str = "none", batch: int | None = None, folder: Path | None = None, stop: threading.Event | None = None,
    cells: Collection[tuple[int, int]] | None = None, loaded: adapters.Models | None = None,
) -> Generator[Placed, None, None]:  # fmt: skip
    """Pictures of every prompt with every variant, each as soon as it is made.

    Prompts are read as `lorakit.prompting` says: (word:1.2) weights a word, and they may be of any length.

    The base is loaded once, whatever the number of variants: first its text encoders, then UNet and VAE. Adapters are
    put in and taken out again one after the other. Closing the generator, or setting `stop`, ends it after the current
    denoising step. However it ends, by an error too, the memory is handed back.

    Args:
        seeds: one for each prompt, or the first of a row of them.
        size: (height, width) in pixels; None is the base's own.
        precision: as for `base.compute_dtype`; "fp16", in which a CPU makes no pictures, is "auto" there.
        quantize: as for `base.load_unet`.
        batch: pictures of one variant that are denoised together, as far as the memory goes; None takes eight that are
            smaller than 256 pixels, four larger ones on a card, and one elsewhere.
        folder: where text embeddings are kept; None keeps none.
        cells: which are made, as (row, column); None makes all.
        loaded: models of the base by name that are there already, without an adapter, and are used in place of loading
            them; they come out as they went in, and stay with the caller.

    Raises:
        ValueError: settings that do not suit the base; before anything is loaded.
    """
    scheduler(scheduler_name, base)
    for variant in variants:
        if variant.attach and not {"unet", *base.text_encoders} & set(variant.adapts):
            raise ValueError(
                f"It adapts {', '.join(variant.adapts) or 'nothing'}, and {base.name} has no such part to adapt."
            )
    seeds = [seeds + i for i in range(len(prompts))] if isinstance(seeds, int) else list(seeds)
    if len(seeds) != len(prompts):
        raise ValueError(
            f"{len(seeds)} seeds were given for {len(prompts)} prompts. Give one each, or a single number."
        )
    size = size or (base.resolution, base.resolution)
    _suits(base, size)
    target, stop, loaded = bases.choose_device(device), stop or threading.Event(), loaded or {}
    dtype = bases.compute_dtype("auto" if (precision, target.type) == ("fp16", "cpu") else precision, target)
    most = batch or (8 if max(size) < 256 else 4 if target.type == "cuda" else 1)

    def making() -> Generator[Placed, None, None]:
        most_now = most  # comes down where there is less memory, and stays there
        with tempfile.TemporaryDirectory() as scratch:
            asked = [*prompts, negative, ""]
            plain = cache.encode_prompts(
                base, asked, folder or Path(scratch), device=target, dtype=dtype, clip_skip=clip_skip
            )
        said = _said(base, [plain[prompt] for prompt in asked], variants, target, dtype, clip_skip, loaded)
        if stop.is_set():
            return
        unet = loaded["unet"] if "unet" in loaded else bases.load_unet(base, dtype, target, quantize)
        vae = bases.load_vae(base, dtype, target)
        for variant, columns in _by_adapter(variants):
            with _attached(variant, {"unet": unet}) as adapter:
                for column in columns:
                    *wanted, unwanted, empty = said[column]
                    rows = [row for row in range(len(wanted)) if cells is None or (row, column) in cells]
                    while rows:
                        with _at(adapter, variants[column].strength):
                            found = next(_batches(
                                unet, base, [wanted[row] for row in rows], unwanted, [seeds[row] for row in rows], size,
                                steps, guidance, scheduler_name, most_now, stop, empty,
                            ), None)  # fmt: skip
                        if found is None:  # stopped
                            return
                        latent, most_now = found
                        for row, x in zip(rows, latent, strict=False):
                            yield Placed(row, column, decode(vae, x[None])[0])
                            if stop.is_set():
                                return
                        rows = rows[len(latent) :]
            if adapter:  # before the next one is loaded
                del adapter
                cache.free(target)

    def made() -> Generator[Placed, None, None]:
        try:
            yield from making()  # models and adapters are held by its frame alone, which is gone when memory is freed
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # a notebook keeps the last error, and with it the UNet
            raise
        finally:
            cache.free(target)

    return made()


def _by_adapter(variants: Sequence[Variant]) -> list[tuple[Variant, list[int]]]:
    """The first variant of each adapter, and the columns of all that have it."""
    columns: dict[Attach | None, list[int]] = {}
    for column, variant in enumerate(variants):
        columns.setdefault(variant.attach, []).append(column)
    return [(variants[own[0]], own) for own in columns.values()]


@contextmanager
def _attached(variant: Variant, models: adapters.Models) -> Iterator[adapters.Adapter | None]:
    """The variant's adapter in those of the models that it is for; in the end they are what they were."""
    own = {which: model for which, model in models.items() if variant.attach and which in variant.adapts}
    try:
        yield variant.attach(own) if own else None
    finally:
        adapters.eject(own)


def _at(adapter: adapters.Adapter | None, strength: float):
    return adapters.strength(adapter, strength) if adapter else nullcontext()


def _said(
    base: bases.Base, plain: list[Text], variants: Sequence[Variant], device: torch.device, dtype: torch.dtype,
    clip_skip: int, loaded: adapters.Models,
) -> list[list[Text]]:  # fmt: skip
    """Texts as each variant's text encoders say them; those that are changed and not there are loaded, and freed."""
    said = [plain] * len(variants)
    changed = [which for which in base.text_encoders if any(v.attach and which in v.adapts for v in variants)]
    encoders = {
        which: loaded[which] if which in loaded else bases.load_text_encoder(base, dtype, device, which)[0]
        for which in changed
    }
    for variant, columns in _by_adapter(variants):
        with _attached(variant, encoders) as adapter:
            for column in columns if adapter else ():
                with _at(adapter, variants[column].strength):
                    said[column] = cache.encode_anew(base, adapter.models, plain, clip_skip)
    if encoders:
        del encoders, adapter
        cache.free(device)
    return said


def generate(
    base: bases.Base, prompts: Sequence[str], *, strengths: Sequence[float] = (1.0,), attach: Attach | None = None,
    adapts: Sequence[str] = ("unet",), on_picture: Callable[[int], None] | None = None,
    stop: threading.Event | None = None, **settings,
) -> list[list[Image.Image]]:  # fmt: skip
    """All pictures of `stream`, with one adapter at one strength or several.

    Args:
        attach: called with models by name, returns the adapter it put there; None samples the bare base.
        adapts: the models that `attach` is for.
        on_picture: told how many pictures are done.
        stop: set from elsewhere, ends it after the current denoising step with a KeyboardInterrupt.
        settings: as for `stream`.

    Returns:
        For each prompt, a picture for each strength; all of them.

    Raises:
        KeyboardInterrupt: stopped before the last picture. Who wants those that were made takes `stream`.
    """
    variants = [Variant(attach, tuple(adapts), value) for value in strengths]
    rows: list[list] = [[None] * len(variants) for _ in prompts]
    done = 0
    with closing(stream(base, prompts, variants, stop=stop, **settings)) as pictures:
        for done, (row, column, picture) in enumerate(pictures, 1):
            rows[row][column] = picture
            if on_picture:
                on_picture(done)
    if done < len(prompts) * len(variants):
        raise KeyboardInterrupt
    return rows


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def infotext(
    prompt: str, seed: int, size: tuple[int, int], *, negative: str = "", steps: int | None = None,
    guidance: float | None = None, scheduler_name: str | None = None, clip_skip: int | None = None, model: str = "",
    loras: Sequence[tuple[str, float]] = (),
) -> str:  # fmt: skip
    """What a picture was made of, as A1111's "PNG Info" reads it and sends it on to txt2img.

    Args:
        size: (height, width) in pixels.
        loras: names and strengths, which stand in the prompt there. What has no value is left out.
    """
    tags = "".join(f" <lora:{_tag(name)}:{strength:g}>" for name, strength in loras if strength)
    told = {
        "Steps": steps, "Sampler": SAMPLERS.get(scheduler_name, scheduler_name),
        "CFG scale": None if guidance is None else f"{guidance:g}", "Seed": seed, "Size": f"{size[1]}x{size[0]}",
        "Model": model or None, "Clip skip": clip_skip,
    }  # fmt: skip
    line = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in told.items() if value is not None)
    return "\n".join([prompt + tags, *([f"Negative prompt: {negative}"] if negative else []), line])


def _tag(name: str) -> str:
    """A name that can stand in <lora:…:…>."""
    return "".join("_" if letter in "<>:,\n" else letter for letter in name)


def _quoted(value: str) -> str:
    """As A1111 writes what would be taken for the next setting."""
    return json.dumps(value, ensure_ascii=False) if set(",:\n") & set(value) else value


def prompt_of(infotext: str) -> str:
    """The prompt that an `infotext` begins with, without its LoRAs."""
    prompt = infotext.rpartition("\n")[0].partition("\nNegative prompt: ")[0]
    while prompt.endswith(">") and " <lora:" in prompt:
        prompt = prompt.rpartition(" <lora:")[0]
    return prompt


def png(picture: Image.Image, infotext: str) -> bytes:
    """A picture as a PNG file that tells what it was made of."""
    from PIL.PngImagePlugin import PngInfo

    facts, stream = PngInfo(), io.BytesIO()
    facts.add_text("parameters", infotext)
    picture.save(stream, "PNG", pnginfo=facts)
    return stream.getvalue()


def write(picture: Image.Image, path: Path, infotext: str) -> Path:
    """Write a picture as a PNG file that tells what it was made of, whole or not at all."""
    with files.replacing(path) as partial:
        partial.write_bytes(png(picture, infotext))
    return path


def save(
    pictures: Sequence[Image.Image], folder: Path, prompts: Sequence[str], seeds: Sequence[int], **settings
) -> list[Path]:
    """Write pictures as numbered PNG files that tell what they were made of.

    Args:
        settings: as for `infotext`.
    """
    return [
        write(picture, folder / f"{number:02d}-seed-{seed}.png", infotext(prompt, seed, picture.size[::-1], **settings))
        for number, (picture, prompt, seed) in enumerate(zip(pictures, prompts, seeds, strict=True))
    ]
