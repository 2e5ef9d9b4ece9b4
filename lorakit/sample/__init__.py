"""Make pictures with a base and adapters."""

from typing import TYPE_CHECKING

from lorakit import _lazy

__all__ = ["SCHEDULERS", "Variant", "generate", "generate_pictures", "infotext", "stream", "write_picture"]

if TYPE_CHECKING:
    from lorakit.sample.denoise import DEFAULT_SCHEDULER, SCHEDULERS, borrow, decode_latents, sample_latents
    from lorakit.sample.png import SAMPLERS, infotext, png_bytes, prompt_of, save_picture, write_picture
    from lorakit.sample.regularisation import generate_pictures
    from lorakit.sample.sampler import Attach, Variant, generate, stream
else:
    __getattr__, __dir__ = _lazy.attach(__name__)
