"""Measure what `lorakit check` catches: real photographs degraded in known ways, and clean ones that it must let pass.

    python tests/bench/check_calibration.py                      # the half of the sources that the limits never saw
    python tests/bench/check_calibration.py --half tune          # the half that they were set with
    python tests/bench/check_calibration.py --photos FOLDER      # photographs of one's own

The sources are the photographs inside the wheels of matplotlib, scikit-image and scikit-learn. Every other one was
tuned with, the others are reported on. Of each there is the whole, reduced to the training area, and crops of its own
pixels. Degradations are counted in pixels at the training scale.
"""

import argparse
import io
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from lorakit.dataset import folder as folders
from lorakit.dataset import picture
from lorakit.dataset import quality as quality_module
from lorakit.dataset.buckets import Buckets

# What is sharp and well exposed: not the microscopy, the scans, and clock_motion, which is smeared.
SKIMAGE = ["astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"]
SKIMAGE += ["gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg"]
SKIMAGE += ["rocket.jpg"]
QUALITIES = (10, 20, 30, 40, 50, 60, 70, 80, 90)
SIGMAS, LENGTHS = (0.5, 1, 1.5, 2, 3, 4), (3, 5, 7, 9, 13, 17)
TIMES, STOPS = (1.5, 2, 2.5, 3, 4), (-3, -2, -1, -0.5, 0.5, 1, 2, 3)
BLUR, JPEG, EXPOSURE = {"blur", "upscaled"}, {"jpeg"}, {"exposure"}
ACCUSATIONS = BLUR | JPEG | EXPOSURE


class Clean(NamedTuple):
    name: str
    image: Image.Image
    resolution: int  # training size in pixels, which the picture has at least


class Copy(NamedTuple):
    what: str  # "blur"
    strength: float | str
    strong: bool  # one that has to be caught
    kinds: set[str]  # of findings that catch it
    image: Image.Image
    saved: dict  # how it is saved: its suffix, and options of Pillow


def sources() -> list[Path]:
    """The photographs, by package and name; the even ones are for tuning, the odd ones for the report."""
    import matplotlib
    import skimage
    import sklearn.datasets

    found = [Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")]
    found += [Path(skimage.__file__).parent / "data" / name for name in SKIMAGE]
    return found + sorted(Path(sklearn.datasets.__file__).parent.glob("images/*.jpg"))


def cleans(paths: list[Path], crops: int = 5) -> Iterator[Clean]:
    """Of each photograph the whole at the training area, and crops of its own pixels."""
    for number, path in enumerate(paths):
        image, random = picture.open_picture(path), np.random.default_rng([7, number])
        area = image.width * image.height
        resolution = next(r for r in (512, 320, 256) if area >= r * r)
        share = resolution / math.sqrt(area)
        whole = image.resize(
            (math.ceil(image.width * share), math.ceil(image.height * share)), Image.Resampling.LANCZOS
        )
        yield Clean(f"{path.name}, whole", whole, resolution)
        for crop in range(crops):
            side, shape = random.integers(256, max(257, min(460, min(image.size)))), random.choice([1, 1.25, 0.8, 1.5])
            width = min(image.width, max(256, int(side * shape**0.5)))
            height = min(image.height, max(256, int(side / shape**0.5), -(-(256**2) // width)))
            width = max(width, -(-(256**2) // height))
            x, y = (int(random.integers(0, most + 1)) for most in (image.width - width, image.height - height))
            yield Clean(f"{path.name}, crop {crop}", image.crop((x, y, x + width, y + height)), 256)


def hard(half: int) -> Iterator[Clean]:
    """Clean pictures that measures of sharpness, blocks and exposure are often wrong about."""
    import matplotlib

    font = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    folder = Path(folders.__file__).parent / "demo" / "pictures"
    for path in sorted(folder.rglob("*.png"))[half::2]:
        yield Clean(f"emoji, {path.stem}", picture.open_picture(path), 64)
    random = np.random.default_rng([11, half])
    for number in range(10):
        yield Clean(f"shapes, {number}", _shapes(random), 512)
    for size in (14, 24, 48, 90) if half else (18, 32, 64, 110):
        page = Image.new("RGB", (512, 512), "white")
        for y in range(0, 512, int(size * 1.4)):
            line = "The quick brown fox jumps over the lazy dog"[y % 7 :]
            ImageDraw.Draw(page).text((10, y), line, "black", ImageFont.truetype(str(font), size))
        yield Clean(f"text, {size} pixels", page, 512)
    for number in range(4):  # nothing but a sky, with the noise of a camera
        top, bottom = random.integers(60, 160, 3), random.integers(150, 235, 3)
        ramp = np.linspace(top, bottom, 512)[:, None] + random.normal(0, 1.5, (512, 512, 3))
        yield Clean(f"sky, {number}", Image.fromarray(ramp.clip(0, 255).astype(np.uint8)), 512)
    for clean in cleans(sources()[half::2], 0):
        image, (width, height) = clean.image, clean.image.size
        yield clean._replace(name=f"{clean.name}, black and white", image=image.convert("L").convert("RGB"))
        around = Image.new("L", image.size)
        x, y = random.uniform(0.3, 0.7, 2) * image.size
        ImageDraw.Draw(around).ellipse((x - width / 4, y - height / 4, x + width / 4, y + height / 4), fill=255)
        bokeh = Image.composite(image, gaussian(image, clean.resolution / 64), gray_blur(around, 4))
        yield clean._replace(name=f"{clean.name}, background out of focus", image=bokeh)
        backdrop = Image.new("RGB", (width * 2, height * 2), "white")
        backdrop.paste(image, (width // 2, height // 2))
        yield clean._replace(name=f"{clean.name}, on white", image=backdrop)


def _shapes(random: np.random.Generator) -> Image.Image:
    colour = lambda: tuple(int(value) for value in random.integers(0, 256, 3))  # noqa: E731
    image = Image.new("RGB", (2048, 2048), colour())
    for _ in range(random.integers(3, 12)):
        x, y, r = (int(value) for value in random.integers(0, 2048, 3))
        draw, box = ImageDraw.Draw(image), (x - r // 3 - 60, y - r // 3 - 60, x + r // 3 + 60, y + r // 3 + 60)
        (draw.ellipse if random.random() < 0.5 else draw.rectangle)(box, fill=colour())
    return image.resize((512, 512), Image.Resampling.LANCZOS)


# Degradations


def gray_blur(image: Image.Image, sigma: float) -> Image.Image:
    from skimage.filters import gaussian as blur

    return Image.fromarray(blur(np.asarray(image), sigma, preserve_range=True).round().astype(np.uint8))


def gaussian(image: Image.Image, sigma: float) -> Image.Image:
    from skimage.filters import gaussian as blur

    blurred = blur(np.asarray(image, float), sigma, preserve_range=True, channel_axis=-1)
    return Image.fromarray(blurred.round().astype(np.uint8))


def motion(image: Image.Image, length: float, angle: float) -> Image.Image:
    """The mean of the picture along a line of `length` pixels."""
    from scipy.signal import fftconvolve

    middle = math.ceil(length / 2)
    kernel = np.zeros((2 * middle + 1, 2 * middle + 1))
    for place in np.linspace(-length / 2, length / 2, 16 * middle):
        x, y = middle + place * math.cos(angle), middle + place * math.sin(angle)
        for row, column in ((int(y), int(x)), (int(y), int(x) + 1), (int(y) + 1, int(x)), (int(y) + 1, int(x) + 1)):
            if max(row, column) <= 2 * middle:
                kernel[row, column] += (1 - abs(y - row)) * (1 - abs(x - column))
    padded = np.pad(np.asarray(image, float), ((middle, middle), (middle, middle), (0, 0)), "edge")
    moved = fftconvolve(padded, kernel[:, :, None] / kernel.sum(), "valid", axes=(0, 1))
    return Image.fromarray(moved.round().clip(0, 255).astype(np.uint8))


def rescaled(image: Image.Image, size: tuple[int, int], way: Image.Resampling) -> Image.Image:
    return image.resize(size, Image.Resampling.LANCZOS).resize(image.size, way)


def exposed(image: Image.Image, stops: float) -> Image.Image:
    """More or less light, in linear light, clipped."""
    srgb = np.asarray(image, float) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4) * 2**stops
    linear = linear.clip(0, 1)
    srgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return Image.fromarray((srgb * 255).round().astype(np.uint8))


def clipped(image: Image.Image) -> np.ndarray:
    """Where two of three colours are at their limit, (H, W)."""
    return np.sort(np.asarray(image), 2)[..., 1] >= 250


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=quality)
    return Image.open(encoded).convert("RGB")


def copies(clean: Clean, number: int, short: bool = False) -> Iterator[Copy]:
    """Every degradation of a picture; `short` gives one strong of each."""
    image, png = clean.image, {"suffix": ".png"}
    larger = math.sqrt(image.width * image.height) / clean.resolution
    angle = (0, 0.4, math.pi / 4, 1.2, math.pi / 2, 2.2)[number % 6]
    way = (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BILINEAR)[number % 3]
    smaller = lambda times: tuple(max(1, round(side / larger / times)) for side in image.size)  # noqa: E731
    for q in (20,) if short else QUALITIES:
        yield Copy("JPEG", q, q <= 30, JPEG, image, {"suffix": ".jpg", "quality": q})
        cut = jpeg(image, q).crop((number % 7, number % 5, *image.size))  # blocks begin anywhere
        yield Copy("JPEG, cut and saved again as PNG", q, q <= 30, JPEG, cut, png)
    for sigma in (2,) if short else SIGMAS:
        yield Copy("Gaussian blur, σ px", sigma, sigma >= 2, BLUR, gaussian(image, sigma * larger), png)
    for length in (9,) if short else LENGTHS:
        yield Copy("motion blur, px", length, length >= 9, BLUR, motion(image, length * larger, angle), png)
    for times in (3,) if short else TIMES:
        yield Copy("down and up, times", times, times >= 3, BLUR, rescaled(image, smaller(times), way), png)
    for stops in (-2, 2) if short else STOPS:
        copy = exposed(image, stops)
        lost = (clipped(copy) & ~clipped(image)).mean()
        rest = stops > 0 and lost < 0.1  # two stops more can make a night shot right
        what = "exposure, EV, that takes less than a tenth" if rest else "exposure, EV"
        yield Copy(what, f"{stops:+g}", abs(stops) >= 2 and not rest, EXPOSURE, copy, png)
    if not short:
        again = {"suffix": ".jpg", "quality": 75}
        half = [side // 2 for side in image.size]
        for level in (2, 4):
            noise = np.random.default_rng(number).normal(0, level, (*image.size[::-1], 1))
            noisy = (np.asarray(gaussian(image, 2 * larger)) + noise).clip(0, 255).astype(np.uint8)
            yield Copy("Gaussian blur of σ 2, then noise of levels", level, False, BLUR, Image.fromarray(noisy), png)
        yield Copy("Gaussian blur of σ 2, then JPEG", 75, False, BLUR, gaussian(image, 2 * larger), again)
        yield Copy("down and up 3 times, then JPEG", 75, False, BLUR, rescaled(image, smaller(3), way), again)
        yield Copy("JPEG, then half the size", 20, False, JPEG, jpeg(image, 20).resize(half), png)


# What is found


def findings(pictures: list[tuple[Image.Image, int, dict]]) -> list[set[str]]:
    """The kinds of warnings that `check` gives about each (picture, training size, how it is saved)."""
    kinds = [set() for _ in pictures]
    with tempfile.TemporaryDirectory() as folder:
        for number, (image, resolution, saved) in enumerate(pictures):
            path = Path(folder, str(resolution), f"{number}{saved['suffix']}")
            path.parent.mkdir(exist_ok=True)
            image.save(path, **{key: value for key, value in saved.items() if key != "suffix"})
        for resolution in {resolution for _, resolution, _ in pictures}:
            found = folders.scan(Path(folder, str(resolution)), cache=Path(folder, "cache"))
            chosen = Buckets(resolution, min(64, resolution // 4))
            for finding in quality_module.check_quality(found, buckets=chosen).findings:
                if finding.pictures and finding.severity != "info":
                    kinds[int(Path(finding.pictures[0]).stem)].add(finding.kind)
    return kinds


def caught(pictures: list[Clean], short: bool = False) -> dict[tuple[str, str], dict]:
    """(degradation, strength) → of how many copies it was found, and as what."""
    made = [(clean, copy) for number, clean in enumerate(pictures) for copy in copies(clean, number, short)]
    rows: dict[tuple[str, str], dict] = {}
    found = findings([(copy.image, clean.resolution, copy.saved) for clean, copy in made])
    for (_, copy), kinds in zip(made, found, strict=True):
        row = rows.setdefault((copy.what, str(copy.strength)), {"strong": copy.strong, "of": 0, "caught": 0, "as": {}})
        row["of"] += 1
        row["caught"] += bool(kinds & copy.kinds)
        for kind in sorted(kinds & copy.kinds):
            row["as"][kind] = row["as"].get(kind, 0) + 1
    return rows


def accused(pictures: list[Clean]) -> dict[str, list[str]]:
    """Name → what is wrong about a clean picture, if one believes `check`."""
    found = findings([(clean.image, clean.resolution, {"suffix": ".png"}) for clean in pictures])
    return {clean.name: sorted(kinds & ACCUSATIONS) for clean, kinds in zip(pictures, found, strict=True)}


def alike(pictures: list[Image.Image]) -> tuple[dict[str, int], int]:
    """How many changed copies are grouped with their picture, by the change; and how many different pictures are."""
    grouped, wrong = {}, set()
    for what, change in CHANGES.items():
        with tempfile.TemporaryDirectory() as folder:
            for number, image in enumerate(pictures):
                image.save(Path(folder, f"{number}.png"))
                change(image).save(Path(folder, f"{number}-again.png"))
            found = folders.scan(folder, cache=Path(folder, ".cache"))
            groups = [
                [int(name.split(".")[0].split("-")[0]) for name in g]
                for g in quality_module.check_quality(found).figures["near_duplicates"]
            ]
        grouped[what] = sum(len(group) - len(set(group)) for group in groups)
        wrong |= {number for group in groups if len(set(group)) > 1 for number in group}
    return grouped, len(wrong)


def _cropped(share: float, x: float = 0.5, y: float = 0.5):
    def crop(image: Image.Image) -> Image.Image:
        left, top = image.width * (1 - share) * x, image.height * (1 - share) * y
        return image.crop((int(left), int(top), int(left + image.width * share), int(top + image.height * share)))

    return crop


CHANGES = {
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "JPEG 50": lambda image: jpeg(image, 50),
    "half a stop brighter": lambda image: exposed(image, 0.5),
    "a stop darker": lambda image: exposed(image, -1),
    "mirrored": ImageOps.mirror,
    "middle 95 %": _cropped(0.95), "middle 90 %": _cropped(0.9), "middle 80 %": _cropped(0.8),
    "95 %, off the middle": _cropped(0.95, 0.2, 0.8), "90 %, off the middle": _cropped(0.9, 0.2, 0.8),
    "80 %, off the middle": _cropped(0.8, 0.2, 0.8),
}  # fmt: skip


def main() -> None:
    from base_quality import RESULTS, counted, table, write

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--half", choices=("tune", "report"), default="report")
    parser.add_argument("--photos", type=Path, help="folder of sharp, well exposed photographs, in place of the half")
    parser.add_argument("--out", type=Path, help="results/check_calibration for the report")
    options = parser.parse_args()
    half = ("tune", "report").index(options.half)
    paths = [p.path for p in folders.scan(options.photos).pictures] if options.photos else sources()[half::2]
    pictures, difficult = list(cleans(paths)), list(hard(half))

    rows, clean, harder = caught(pictures), accused(pictures), accused(difficult)
    drawn = [c.image for c in difficult if c.name.startswith(("emoji", "shapes", "text"))]
    different = [c.image for c in cleans(paths, 0)] + drawn
    grouped, wrong = alike(different)

    def verdict(reached: bool) -> str:
        return "yes" if reached else "no"

    strong = [row for row in rows.values() if row["strong"]]
    total, hits = sum(row["of"] for row in strong), sum(row["caught"] for row in strong)
    summary = [["strong copies caught", counted(hits, total), "≥ 95 %", verdict(hits >= 0.95 * total)]]
    for what in dict.fromkeys(what for what, _ in rows):
        of, found = (
            sum(row[key] for (w, _), row in rows.items() if w == what and row["strong"]) for key in ("of", "caught")
        )
        if of:
            summary.append([f"of these, {what}", counted(found, of), "≥ 95 %", verdict(found >= 0.95 * of)])
    for what, names in (("clean photographs accused", clean), ("difficult clean pictures accused", harder)):
        wrongly = sum(map(bool, names.values()))
        summary.append([what, counted(wrongly, len(names)), "≤ 5 %", verdict(wrongly <= 0.05 * len(names))])
    each = [
        [what, strength, "strong" * row["strong"], counted(row["caught"], row["of"]), _listed(row["as"])]
        for (what, strength), row in rows.items()
    ]
    parts = [
        f"{len(paths)} photographs, {len(pictures)} pictures of them: " + ", ".join(path.name for path in paths) + "\n",
        table(summary, "what", "share", "bar", "reached"),
        table(each, "degradation", "strength", "", "caught", "as"),
        "Accused: " + ("; ".join(f"{n} ({', '.join(k)})" for n, k in (clean | harder).items() if k) or "none") + ".\n",
        f"Near-duplicates: {len(different)} different pictures, {wrong} of them grouped with another.\n",
        table(
            [[w, counted(n, len(different))] for w, n in grouped.items()], "a copy that is", "grouped with its picture"
        ),
    ]
    figures = {
        "photographs": [path.name for path in paths], "clean": clean, "difficult": harder, "grouped": grouped,
        "copies": [{"what": what, "strength": strength, **row} for (what, strength), row in rows.items()],
        "different": len(different), "grouped_wrongly": wrong,
    }  # fmt: skip
    name = "check_calibration" if options.half == "report" and not options.photos else "check_calibration_other"
    write(options.out or RESULTS / name, "What `lorakit check` catches", parts, figures)


def _listed(kinds: dict[str, int]) -> str:
    return ", ".join(f"{kind} {number}" for kind, number in kinds.items())


if __name__ == "__main__":
    main()
