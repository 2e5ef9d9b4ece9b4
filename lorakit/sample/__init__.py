"""Make pictures with a base and adapters."""

from typing import TYPE_CHECKING

from lorakit import _lazy

__all__ = [
    "Grid",
    "SCHEDULERS",
    "Sampling",
    "Variant",
    "generate_pictures",
    "grid",
    "infotext",
    "stream",
    "write_picture",
]

if TYPE_CHECKING:
    from lorakit.sample.denoise import DEFAULT_SCHEDULER, Denoiser, SCHEDULERS, Sampling, borrow, decode_latents
    from lorakit.sample.png import SAMPLERS, infotext, png_bytes, prompt_of, write_picture
    from lorakit.sample.regularisation import generate_pictures
    from lorakit.sample.sampler import Attach, Grid, Loaded, Placed, Source, Variant, grid, stream
else:
    __getattr__, __dir__ = _lazy.attach(__name__)
