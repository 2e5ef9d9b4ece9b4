"""PNG files with the generation parameters that A1111 and ComfyUI read."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lorakit import storage

SAMPLERS = {  # as A1111 calls them
    "euler": "Euler", "euler_a": "Euler a", "dpm++_2m_karras": "DPM++ 2M Karras", "ddim": "DDIM", "unipc": "UniPC",
    "lcm": "LCM",
}  # fmt: skip


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def infotext(
    prompt: str, seed: int, size: tuple[int, int], *, negative: str = "", steps: int | None = None,
    guidance: float | None = None, scheduler_name: str | None = None, clip_skip: int | None = None, model: str = "",
    loras: Sequence[tuple[str, float]] = (),
) -> str:  # fmt: skip
    """What a picture was made of, as A1111's "PNG Info" reads it and sends it on to txt2img.

    Args:
        size: (height, width) in pixels.
        loras: names and strengths, which stand in the prompt there. What has no value is left out.
    """
    tags = "".join(f" <lora:{_tag(name)}:{strength:g}>" for name, strength in loras if strength)
    told = {
        "Steps": steps, "Sampler": SAMPLERS.get(scheduler_name, scheduler_name),
        "CFG scale": None if guidance is None else f"{guidance:g}", "Seed": seed, "Size": f"{size[1]}x{size[0]}",
        "Model": model or None, "Clip skip": clip_skip,
    }  # fmt: skip
    line = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in told.items() if value is not None)
    return "\n".join([prompt + tags, *([f"Negative prompt: {negative}"] if negative else []), line])


def _tag(name: str) -> str:
    """A name that can stand in <lora:…:…>."""
    return "".join("_" if letter in "<>:,\n" else letter for letter in name)


def _quoted(value: str) -> str:
    """As A1111 writes what would be taken for the next setting."""
    return json.dumps(value, ensure_ascii=False) if set(",:\n") & set(value) else value


def prompt_of(infotext: str) -> str:
    """The prompt that an `infotext` begins with, without its LoRAs."""
    prompt = infotext.rpartition("\n")[0].partition("\nNegative prompt: ")[0]
    while prompt.endswith(">") and " <lora:" in prompt:
        prompt = prompt.rpartition(" <lora:")[0]
    return prompt


def png_bytes(picture: Image.Image, infotext: str) -> bytes:
    """A picture as a PNG file that tells what it was made of."""
    from PIL.PngImagePlugin import PngInfo

    facts, stream = PngInfo(), io.BytesIO()
    facts.add_text("parameters", infotext)
    picture.save(stream, "PNG", pnginfo=facts)
    return stream.getvalue()


def write_picture(picture: Image.Image, path: Path, infotext: str) -> Path:
    """Write a picture as a PNG file that tells what it was made of, whole or not at all."""
    with storage.write_file(path) as partial:
        partial.write_bytes(png_bytes(picture, infotext))
    return path


def save_picture(
    pictures: Sequence[Image.Image], folder: Path, prompts: Sequence[str], seeds: Sequence[int], **settings
) -> list[Path]:
    """Write pictures as numbered PNG files that tell what they were made of.

    Args:
        settings: as for `infotext`.
    """
    return [
        write_picture(
            picture, folder / f"{number:02d}-seed-{seed}.png", infotext(prompt, seed, picture.size[::-1], **settings)
        )
        for number, (picture, prompt, seed) in enumerate(zip(pictures, prompts, seeds, strict=True))
    ]
