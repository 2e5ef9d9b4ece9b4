"""Small videos."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av")


def film(path: Path, pictures: list[Image.Image], rate: int = 10, codec: str = "libx264", pixel: int = 1) -> Path:
    """Write a video whose pictures come back nearly as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "1"} if codec == "libx264" else {}
        stream.codec_context.sample_aspect_ratio = Fraction(pixel)
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


def shapes(seed: int, size: tuple[int, int] = (160, 96)) -> Image.Image:
    """A picture with edges, unlike that of another seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 10, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.NEAREST)
