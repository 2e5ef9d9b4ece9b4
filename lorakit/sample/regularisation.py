"""Make pictures with captions from a base, as training or regularisation data.

The folder grows picture by picture. Each file holds its prompt, seed and settings, so that a call that was cut
continues where it stopped.
"""

import hashlib
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from lorakit import base as bases
from lorakit import storage
from lorakit.device import Compute
from lorakit.sample import png
from lorakit.sample.denoise import Sampling
from lorakit.sample.sampler import Variant, stream


@dataclass(frozen=True)
class _Picture:
    """A picture of the folder, made or not."""

    path: Path
    prompt: str
    caption: str
    seed: int
    infotext: str


def generate_pictures(
    base: bases.Base, prompts: Sequence[str], folder: Path, name: str, sampling: Sampling | None = None, *,
    repeats: int = 1, captions: Sequence[str] = (), compute: Compute | None = None,
) -> Path:  # fmt: skip
    """Make a picture of each prompt with each seed, in kohya's form: `FOLDER/REPEATS_NAME/….png` with its `….txt`.

    Whole pictures of the same settings are not made again; existing caption files are not overwritten.

    Args:
        name: what the pictures show, as in "1_cat".
        sampling: its `seeds` are used for every prompt.
        repeats: times that each picture counts in an epoch.
        captions: one for each prompt; by default the prompts.
        compute: None chooses the best of this machine.

    Returns:
        The folder of the pictures.

    Raises:
        ValueError: nothing to make, a name that cannot be a folder's, or settings that do not suit the base.
    """
    sampling = sampling or Sampling()
    seeds = [sampling.seeds] if isinstance(sampling.seeds, int) else list(sampling.seeds)
    if not prompts or not seeds or len(captions or prompts) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts, {len(seeds)} seeds and {len(captions)} captions: give at least one prompt and "
            "one seed, and one caption for each prompt or none."
        )
    if not 1 <= repeats <= 999 or not re.fullmatch(r"[^/\\]+", name):
        raise ValueError(f"A folder {repeats}_{name} cannot hold repeats: give 1 to 999, and a name without slashes.")
    _, size = replace(sampling, seeds=0).resolve(1, base)
    folder, pictures = Path(folder).expanduser() / f"{repeats}_{name}", []
    for prompt, caption in dict(zip(prompts, captions or prompts, strict=True)).items():
        for seed in seeds:
            text = png.infotext(prompt, seed, size, sampling, base.name)
            pictures.append(_Picture(folder / f"{_slug(prompt)}-seed-{seed}.png", prompt, caption, seed, text))
    missing = [picture for picture in pictures if not _is_whole(picture)]
    if not missing:
        return folder
    sampling = replace(sampling, seeds=[picture.seed for picture in missing])
    images = stream(base, [picture.prompt for picture in missing], [Variant()], sampling, compute=compute)
    with closing(images), tqdm(total=len(pictures), initial=len(pictures) - len(missing), unit="picture") as bar:
        for row, _, image in images:
            _write(missing[row], image)
            bar.update()
    return folder


def _slug(prompt: str) -> str:
    """A file name that shows the prompt and is unique to it."""
    words = re.sub(r"\W+", "-", prompt).strip("-")[:40]
    return f"{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


def _is_whole(picture: _Picture) -> bool:
    """Whether the picture and its caption are there, made with the same settings."""
    try:
        with Image.open(picture.path, formats=["PNG"]) as image:
            image.load()
            return image.info.get("parameters") == picture.infotext and picture.path.with_suffix(".txt").exists()
    except (OSError, ValueError, SyntaxError):
        return False


def _write(picture: _Picture, image: Image.Image) -> None:
    caption = picture.path.with_suffix(".txt")
    if not caption.exists():  # somebody may have edited it
        with storage.write_file(caption) as partial:
            partial.write_text(picture.caption + "\n", encoding="utf-8")
    png.write_picture(image, picture.path, picture.infotext)
