"""PNG files with the generation parameters that A1111 and ComfyUI read."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lorakit import storage
from lorakit.sample.denoise import Sampling

SAMPLERS = {  # A1111's names
    "euler": "Euler", "euler_a": "Euler a", "dpm++_2m_karras": "DPM++ 2M Karras", "ddim": "DDIM", "unipc": "UniPC",
    "lcm": "LCM",
}  # fmt: skip


def infotext(
    prompt: str, seed: int, size: tuple[int, int], sampling: Sampling, model: str = "",
    loras: Sequence[tuple[str, float]] = (),
) -> str:  # fmt: skip
    """The parameters of a picture in A1111's form, which its "PNG Info" reads and sends on to txt2img.

    Args:
        size: (height, width) in pixels.
        model: name of the base.
        loras: names and strengths, which are appended to the prompt.
    """
    tags = "".join(f" <lora:{_tag(name)}:{strength:g}>" for name, strength in loras if strength)
    parameters = {
        "Steps": sampling.steps, "Sampler": SAMPLERS.get(sampling.scheduler, sampling.scheduler),
        "CFG scale": f"{sampling.guidance:g}", "Seed": seed, "Size": f"{size[1]}x{size[0]}",
        "Model": model or None, "Clip skip": sampling.clip_skip,
    }  # fmt: skip
    line = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in parameters.items() if value is not None)
    negative = [f"Negative prompt: {sampling.negative}"] if sampling.negative else []
    return "\n".join([prompt + tags, *negative, line])


def _tag(name: str) -> str:
    """The name in a form that can stand in <lora:…:…>."""
    return "".join("_" if letter in "<>:,\n" else letter for letter in name)


def _quoted(value: str) -> str:
    """The value, quoted as A1111 does where it would read as several settings."""
    return json.dumps(value, ensure_ascii=False) if set(",:\n") & set(value) else value


def prompt_of(infotext: str) -> str:
    """The prompt at the beginning of an `infotext`, without LoRA tags."""
    prompt = infotext.rpartition("\n")[0].partition("\nNegative prompt: ")[0]
    while prompt.endswith(">") and " <lora:" in prompt:
        prompt = prompt.rpartition(" <lora:")[0]
    return prompt


def png_bytes(picture: Image.Image, infotext: str) -> bytes:
    """The picture as a PNG file with these parameters."""
    from PIL.PngImagePlugin import PngInfo

    text, stream = PngInfo(), io.BytesIO()
    text.add_text("parameters", infotext)
    picture.save(stream, "PNG", pnginfo=text)
    return stream.getvalue()


def write_picture(picture: Image.Image, path: Path, infotext: str) -> Path:
    """Write the picture as a PNG file with these parameters, whole or not at all."""
    with storage.write_file(path) as partial:
        partial.write_bytes(png_bytes(picture, infotext))
    return path
