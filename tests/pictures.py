"""Pictures for tests: `stream` and `grid` called with flat settings."""

from contextlib import closing
from dataclasses import replace

import torch

from lorakit.console import Console
from lorakit.device import Compute
from lorakit.sample import sampler
from lorakit.sample.denoise import Denoiser, Sampling
from lorakit.sample.sampler import Loaded, Variant

BARE = (Variant(),)


def sampling(settings: dict) -> Sampling:
    """Take the settings of `Sampling` out of a dictionary."""
    return Sampling(**{name: settings.pop(name) for name in list(settings) if name in Sampling.__dataclass_fields__})


def compute(settings: dict) -> Compute:
    """Take the settings of `Compute` out of a dictionary."""
    device, precision = settings.pop("device", "auto"), settings.pop("precision", "auto")
    chosen = Compute.choose(device, precision, settings.pop("quantize", "none"))
    return replace(chosen, batch=settings.pop("batch", None))


def stream(base, prompts, variants=BARE, **settings):
    """`sampler.stream` with the settings of Sampling, Compute, Loaded and Console as keyword arguments."""
    own, where = sampling(settings), compute(settings)
    loaded = Loaded(settings.pop("loaded", None) or {}, settings.pop("cache", None))
    console = Console(settings.pop("say", print), settings.pop("progress", False))
    console.stop = settings.pop("stop", None) or console.stop
    return sampler.stream(base, prompts, variants, own, compute=where, loaded=loaded, console=console, **settings)


def rows(base, prompts, strengths=(1.0,), attach=None, adapts=("unet",), **settings):
    """All pictures, a row for each prompt and a column for each strength of one adapter."""
    console = Console(print, settings.pop("progress", False))
    console.stop = settings.get("stop") or console.stop
    variants = [Variant(attach, tuple(adapts), strength) for strength in strengths]
    with closing(stream(base, prompts, variants, **settings)) as pictures:
        return sampler.collect(pictures, len(prompts), len(strengths), console)


def latents(unet, base, texts, negative, seeds, batch=4, stop=None, empty=None, **settings):
    """The latents of all texts, in one tensor."""
    complete = sampling(settings | {"seeds": seeds})
    seeds, size = complete.resolve(len(texts), base)
    return torch.cat(list(Denoiser(unet, base, complete, size, batch, stop)(texts, seeds, negative, empty or negative)))
