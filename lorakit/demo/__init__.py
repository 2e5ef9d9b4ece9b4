"""The embedded base, its demo pictures, and the script that made both.

The base is a real latent-diffusion model of Stable Diffusion's own classes, trained on 64×64 emoji in four styles; the
30 pictures are in a fifth, Fluent Emoji Flat, which it has never seen. Licences stand beside them.
"""

import shutil
from pathlib import Path
from lorakit.config import Config

HERE = Path(__file__).parent
BASE = HERE / "base"
PICTURES = HERE / "pictures"
TRIGGER = "flatto"
PROMPTS = tuple(  # subjects that are not among the 30 pictures
    f"{TRIGGER} style, {subject}"
    for subject in ("rocket", "red apple", "panda", "guitar", "house", "crab", "wrapped gift", "pizza")
)


def config(**changes) -> Config:
    """The demo's settings: the style preset's rank and alpha, with the pace of a model this small."""
    settings = dict(
        base="demo", dataset="demo", kind="style", name="flatto", trigger=TRIGGER, resolution=64, bucket_step=16,
        targets="attention+conv",  # the finest level has no attention, and flat or shaded is settled there
        rank=32, alpha=16, batch_size=4, steps=400, learning_rate=1e-3, schedule="cosine", warmup_steps=20,
        min_snr_gamma=None,  # it all but leaves out the noisy timesteps, where a subject and a style are settled
        save_every=100, sample_every=200, sample_prompts=PROMPTS, sample_steps=20, sample_guidance=2.0,
    )  # fmt: skip
    return Config(**(settings | changes))


def copy(folder: str | Path) -> Path:
    """A copy of the pictures and captions, to be changed; what is there already stays as it is."""
    folder = Path(folder)
    if not folder.exists():
        shutil.copytree(PICTURES, folder)
    return folder
