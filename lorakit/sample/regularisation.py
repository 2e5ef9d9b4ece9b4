"""Pictures that a base makes, with captions, as training or regularisation data.

The folder grows picture by picture. Each carries its prompt, seed and settings in its own metadata, so that a call that
was cut goes on where it was.
"""

import hashlib
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from lorakit import base as bases
from lorakit import storage
from lorakit.device import choose_device, compute_dtype, free_memory
from lorakit.sample import denoise, png


@dataclass(frozen=True)
class Wanted:
    """A picture that is to be there."""

    path: Path
    prompt: str
    caption: str
    seed: int
    facts: str  # prompt, seed and settings, as A1111's "PNG Info" reads them


def generate_pictures(
    base: bases.Base, prompts: Sequence[str], folder: Path, *, name: str, repeats: int = 1, seeds: Sequence[int] = (0,),
    captions: Sequence[str] = (), negative: str = "", size: tuple[int, int] | None = None, steps: int = 25,
    guidance: float = 7.0, scheduler_name: str = denoise.DEFAULT_SCHEDULER, clip_skip: int = 1, device: str = "auto",
    precision: str = "auto", quantize: str = "none", batch: int = 4,
) -> Path:  # fmt: skip
    """Make a picture of each prompt with each seed, in kohya's form: `FOLDER/REPEATS_NAME/….png` with its `….txt`.

    What is there already, whole and made with the same settings, is not made again; no caption file is written over.
    UNet and VAE are loaded once, side by side, so that every batch can be looked at.

    Args:
        name: what the pictures show, as in "1_cat".
        repeats: times per epoch.
        captions: one for each prompt; by default the prompts themselves.
        size: (height, width) in pixels; None is the base's own.
        quantize: as for `base.load_unet`.

    Returns:
        The folder of the pictures.

    Raises:
        ValueError: settings that make no pictures or do not suit the base.
    """
    if not prompts or not seeds or len(captions or prompts) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts, {len(seeds)} seeds and {len(captions)} captions: give a prompt and a seed at "
            "least, and a caption for each prompt or none."
        )
    if not 1 <= repeats <= 999 or not re.fullmatch(r"[^/\\]+", name):
        raise ValueError(f"A folder {repeats}_{name} does not say its repeats: give 1 to 999, and a plain name.")
    denoise.scheduler(scheduler_name, base)  # an unknown name is told before anything is loaded
    size = size or (base.resolution, base.resolution)
    settings = {"steps": steps, "guidance": guidance, "scheduler_name": scheduler_name, "clip_skip": clip_skip}
    folder, wanted = Path(folder).expanduser() / f"{repeats}_{name}", []
    for prompt, caption in dict(zip(prompts, captions or prompts, strict=True)).items():
        for seed in seeds:
            facts = png.infotext(prompt, seed, size, negative=negative, model=base.name, **settings)
            wanted.append(Wanted(folder / f"{_slug(prompt)}-seed-{seed}.png", prompt, caption, seed, facts))
    missing = [one for one in wanted if not _is_there(one)]
    if not missing:
        return folder
    target = choose_device(device)
    dtype = compute_dtype(precision, target)
    with tempfile.TemporaryDirectory() as scratch:
        said = [*(one.prompt for one in missing), negative]
        texts = bases.encode_texts(base, said, Path(scratch), device=target, dtype=dtype, clip_skip=clip_skip)
    unet, vae = bases.load_unet(base, dtype, target, quantize), bases.load_vae(base, dtype, target)
    with tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc="generating", unit="picture") as bar:
        for start in range(0, len(missing), batch):
            some = missing[start : start + batch]
            latents = denoise.sample_latents(
                unet, base, [texts[one.prompt] for one in some], texts[negative], [one.seed for one in some], size=size,
                steps=steps, guidance=guidance, scheduler_name=scheduler_name, batch=batch,
            )  # fmt: skip
            for one, picture in zip(some, denoise.decode_latents(vae, latents), strict=True):
                _write(one, picture)
                bar.update()
    del unet, vae
    free_memory(target)
    return folder


def _slug(prompt: str) -> str:
    """A file name that tells the prompt, and no other prompt's."""
    words = re.sub(r"\W+", "-", prompt).strip("-")[:40]
    return f"{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


def _is_there(wanted: Wanted) -> bool:
    try:
        with Image.open(wanted.path, formats=["PNG"]) as image:
            image.load()
            return image.info.get("parameters") == wanted.facts and wanted.path.with_suffix(".txt").exists()
    except (OSError, ValueError, SyntaxError):
        return False


def _write(wanted: Wanted, picture: Image.Image) -> None:
    caption = wanted.path.with_suffix(".txt")
    if not caption.exists():  # a person may have written it anew
        with storage.write_file(caption) as partial:
            partial.write_text(wanted.caption + "\n", encoding="utf-8")
    png.write_picture(picture, wanted.path, wanted.facts)
