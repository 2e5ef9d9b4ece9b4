"""Make pictures from prompts, with adapters at several strengths."""

import tempfile
import threading
import traceback
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from lorakit import adapter as adapters
from lorakit import base as bases
from lorakit.base import Text
from lorakit.device import choose_device, compute_dtype, free_memory
from lorakit.sample.denoise import DEFAULT_SCHEDULER, decode_latents, in_batches, scheduler, suits

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
    scheduler_name: str = DEFAULT_SCHEDULER, clip_skip: int = 1, device: str = "auto", precision: str = "auto",
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
    suits(base, size)
    target, stop, loaded = choose_device(device), stop or threading.Event(), loaded or {}
    dtype = compute_dtype("auto" if (precision, target.type) == ("fp16", "cpu") else precision, target)
    most = batch or (8 if max(size) < 256 else 4 if target.type == "cuda" else 1)

    def making() -> Generator[Placed, None, None]:
        most_now = most  # comes down where there is less memory, and stays there
        with tempfile.TemporaryDirectory() as scratch:
            asked = [*prompts, negative, ""]
            plain = bases.encode_prompts(
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
                            found = next(in_batches(
                                unet, base, [wanted[row] for row in rows], unwanted, [seeds[row] for row in rows], size,
                                steps, guidance, scheduler_name, most_now, stop, empty,
                            ), None)  # fmt: skip
                        if found is None:  # stopped
                            return
                        latent, most_now = found
                        for row, x in zip(rows, latent, strict=False):
                            yield Placed(row, column, decode_latents(vae, x[None])[0])
                            if stop.is_set():
                                return
                        rows = rows[len(latent) :]
            if adapter:  # before the next one is loaded
                del adapter
                free_memory(target)

    def made() -> Generator[Placed, None, None]:
        try:
            yield from making()  # models and adapters are held by its frame alone, which is gone when memory is freed
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # a notebook keeps the last error, and with it the UNet
            raise
        finally:
            free_memory(target)

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
                    said[column] = bases.reencode_texts(base, adapter.models, plain, clip_skip)
    if encoders:
        del encoders, adapter
        free_memory(device)
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
