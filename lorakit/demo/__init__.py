"""The embedded base and the demo pictures.

The base is a latent-diffusion model of Stable Diffusion's own classes, trained on 64×64 emoji in four styles. The 30
pictures are in a fifth style, Fluent Emoji Flat, which the base has never seen. Licences: LICENSES.md.
"""

import shutil
from pathlib import Path
from typing import Any

from lorakit.config import Config

HERE = Path(__file__).parent
BASE = HERE / "base"
PICTURES = HERE / "pictures"
TRIGGER = "flatto"
PROMPTS = tuple(  # of subjects that the 30 pictures do not show
    f"{TRIGGER} style, {subject}"
    for subject in ("rocket", "red apple", "panda", "guitar", "house", "crab", "wrapped gift", "pizza")
)


def config(**changes: Any) -> Config:
    """The settings of the demo's run, with changes: the style preset's rank and alpha, the pace of a small base."""
    settings: dict[str, Any] = dict(
        base="demo", dataset="demo", kind="style", name="flatto", trigger=TRIGGER, resolution=64, bucket_step=16,
        targets="attention+conv",  # the finest level, which decides between flat and shaded, has no attention
        rank=32, alpha=16, batch_size=4, steps=400, learning_rate=1e-3, schedule="cosine", warmup_steps=20,
        min_snr_gamma=None,  # it nearly ignores the noisy timesteps, which decide subject and style
        save_every=100, sample_every=200, sample_prompts=PROMPTS, sample_steps=20, sample_guidance=2.0,
    )  # fmt: skip
    return Config(**(settings | changes))


def copy(folder: str | Path) -> Path:
    """Copy the pictures and captions to a folder, unless the folder exists. Returns the folder."""
    folder = Path(folder)
    if not folder.exists():
        shutil.copytree(PICTURES, folder)
    return folder
