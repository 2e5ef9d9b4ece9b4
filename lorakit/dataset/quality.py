"""Pictures and captions measured against the training guide's checklist, with advice. The files are only read.

A picture is judged at its training size: a large photograph that is soft at its own size is sharp at 512 pixels, and
its JPEG artifacts are gone. The limits below were set with half of the photographs of
tests/bench/check_calibration.py, which reports on the other half.
"""

from __future__ import annotations

import functools
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps
from tqdm.auto import tqdm

from lorakit import storage
from lorakit.dataset import captions
from lorakit.dataset.buckets import DEFAULT, Buckets, Fit, Size
from lorakit.dataset.folder import Dataset, picture_name
from lorakit.dataset.picture import Picture, open_picture
from lorakit.dataset.report import Finding, Report, Severity

Embed = Callable[[Sequence[Picture]], np.ndarray]
LANCZOS = Image.Resampling.LANCZOS
COUNTS = {  # numbers of pictures in the training guide: minimum, recommended, ideal
    "character": (20, (50, 100), (40, 80)),
    "style": (15, (30, 50), (25, 50)),
    "object": (20, (40, 80), (30, 60)),
    "clothing": (25, (50, 100), (40, 70)),
}
THREADS = 200**2  # pixels of a picture from which threads save more than they cost
TILE = 16  # pixels a side of the squares whose sharpness is measured
CONTRAST = (4.0, 2.0)  # mean slope of a tile, in levels of 255 a pixel, from which its detail and edges are judged
SOFT = 2.1  # `Measured.detail` below which a picture lacks the detail of its size
FULL = 9.5  # `Measured.detail` of a picture that was enlarged k times is about this / k²
BLURRED = 1.6  # `Measured.edges` in the worst direction
SMEARED = (1.85, 0.75)  # the same, if it is also this share of the best
INTERPOLATED = 9.0  # `Measured.interpolated` from which a soft picture was enlarged
DARK, BLOWN = 140, 0.1  # `Measured.brightest` and `Measured.blown`
ANGLES = np.arange(12) * (np.pi / 12)  # in which edges are judged
HASH = 12  # side of a perceptual hash, in bits
ALIKE = 30  # bits in which the hashes of two versions of a picture may differ
MIDDLES = (0.95, 0.8, 0.7)  # sides of the central crops that count as the same picture, as shares of its own
ANYWHERE = 0.9  # the same, of crops at any place
STRIPS = (
    (1.0, 0.0),
    *((share, 0.5) for share in MIDDLES),
    *((ANYWHERE, start) for start in (0, 0.5, 1)),
)  # share, place
QUALITY_50 = np.array([  # luminance steps. Source: ITU-T T.81, table K.1
    [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
])  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Measurements of a picture at its training size."""

    name: str
    size: Size  # the file's
    fit: Fit
    jpeg: float  # its JPEG quantisation steps, in % of those of quality 50; 0 if it was never a JPEG
    detail: float | None  # squared spatial frequency of the sharpest tiles, (rad / px)²; None: too little contrast
    edges: tuple[float, float] | None  # the sharpest edges' slope over their slope blurred: worst and best direction
    interpolated: float  # strength of a period that interpolation leaves; about 4 without any
    brightest: float  # 0 to 255; 0.5 % of the picture is brighter
    blown: float  # share of the picture in which two of three colours are at their limit; 0 for drawings
    subject: float  # share of the frame that contains nearly all contrast
    hashes: np.ndarray = field(repr=False, compare=False)  # of the picture, its mirror image, its crops: bool (V, B)

    @property
    def enlarged(self) -> float:
        """Factor by which the picture's sides grow to fill its bucket; at most 1 if they do not."""
        return self.fit.scaled[0] / self.size[0]


def check_quality(
    dataset: Dataset, *, kind: str = "character", trigger: str = "", buckets: Buckets = DEFAULT,
    embed: Embed | None = None, keep: Collection[str] = (),
) -> Report:  # fmt: skip
    """Measure each picture and the set against the training guide's checklist.

    Args:
        kind: of LoRA: character, style, object or clothing; decides how many pictures are enough.
        trigger: the word that every caption should have.
        buckets: decide how each picture is scaled and cropped.
        embed: returns an embedding of each picture, shape (N, D), for the variety and to find pictures unlike all
            others; without it, variety is that of the perceptual hashes.
        keep: names of pictures that a person accepts as they are: they get no findings.

    Returns:
        The report. Its figures include "variety" (0: the same picture throughout; None for a single one),
        "near_duplicates" (groups of names) and "captions" (counts).

    Raises:
        ValueError: unknown kind or rule, a resolution that does not suit the buckets, or not one embedding a picture.
    """
    if kind not in COUNTS:
        raise ValueError(f"there is no kind {kind!r}: use {', '.join(COUNTS)}")
    names = list(dataset.by_name)
    fits = _fit(dataset, buckets)
    pixels = statistics.median(picture.width * picture.height for picture in dataset.pictures)
    with storage.thread_pool(storage.WORKERS if pixels > THREADS else 1) as pool:
        measuring = pool.map(_measure, dataset.pictures, names, fits)
        results = list(tqdm(measuring, "checking", len(names), unit="picture", disable=len(names) <= 200))
    measured = tuple(result for result in results if isinstance(result, Measured))
    findings = [result for result in results if isinstance(result, Finding)]
    for picture in measured:
        findings += _advice(picture)
    groups = _alike(measured)
    for first, *others in groups:
        message = f"nearly the same as {first}: keep one"
        findings += [Finding("duplicate", "warning", message, (name,)) for name in others]
    counts, without_trigger = _captions(dataset, trigger)
    variety, odd = _variety(dataset, names, measured, embed)
    kept = set(keep)
    findings = [finding for finding in findings + without_trigger + odd if not kept & set(finding.pictures)]
    findings += _count(kind, len(names), sum(len(group) - 1 for group in groups))
    figures = {
        "kind": kind, "resolution": buckets.resolution, "pictures": len(dataset), "per_epoch": dataset.epoch_size,
        "variety": variety, "captions": counts, "left_out": _problems(dataset, True),
        "to_look_at": _problems(dataset, False), "near_duplicates": groups,
    }  # fmt: skip
    return Report(_summary(dataset, figures), tuple(findings), figures, dataset, measured)


def _fit(dataset: Dataset, buckets: Buckets) -> list[Fit]:
    return buckets.fit([(picture.width, picture.height) for picture in dataset.pictures])


def _problems(dataset: Dataset, left_out: bool) -> list[dict[str, str]]:
    problems = (problem for problem in dataset.problems if problem.left_out is left_out)
    return [{"picture": picture_name(problem.path, dataset), "reason": problem.reason} for problem in problems]


def _summary(dataset: Dataset, figures: dict) -> tuple[str, ...]:
    words = figures["captions"]["words"]
    counts = ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in figures["captions"].items() if what != "words")
    lines = [
        dataset.describe(),
        f"checked as {figures['kind']} at {figures['resolution']} pixels",
        f"captions: {counts}; {words['least']} to {words['most']} words, half of them up to {words['median']:g}",
    ]
    if figures["variety"] is not None:
        lines.append(f"variety: {figures['variety']:.2f}, where 0 is the same picture throughout")
    return tuple(lines)


# ── One picture ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _measure(picture: Picture, name: str, fit: Fit) -> Measured | Finding:
    try:
        image, steps = open_picture(picture), _file_steps(picture.path)
    except (ValueError, OSError):
        return Finding("file", "serious", "is missing, or has changed: scan again", (name,))
    middle = _middle(image)
    steps = max(steps, _pixel_steps(middle))
    if fit.scaled[0] < image.width:
        image = image.resize(fit.scaled, LANCZOS, reducing_gap=1.5)
    gray = image.convert("L")
    detail, edges, contrast = _sharpness(np.asarray(gray, np.float32))
    return Measured(
        name, (picture.width, picture.height), fit, steps, detail, edges, _interpolation(middle, steps > 0),
        *_exposure(image), _subject(contrast), _hashes(gray),
    )  # fmt: skip


def _middle(image: Image.Image, side: int = 384) -> np.ndarray:
    """Its middle at its own scale, which keeps traces of JPEG and interpolation: gray levels (H, W)."""
    left, top = max(0, image.width - side) // 2, max(0, image.height - side) // 2
    box = (left, top, left + min(side, image.width), top + min(side, image.height))
    return np.asarray(image.crop(box).convert("L"), np.float32)


def _smooth(gray: np.ndarray, times: int = 1) -> np.ndarray:
    """Blur so many times by a binomial kernel whose variance is half a pixel."""
    for _ in range(times):
        padded = np.pad(gray, 1, "edge")
        rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
        gray = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16
    return gray


def _tiles(values: np.ndarray) -> np.ndarray:
    """Mean of each complete tile, (H, W) → (H // 16, W // 16)."""
    rows, columns = values.shape[0] // TILE, values.shape[1] // TILE
    whole = values[: rows * TILE, : columns * TILE]
    return whole.reshape(rows, TILE, columns, TILE).mean((1, 3))


def _sharpness(gray: np.ndarray) -> tuple[float | None, tuple[float, float] | None, np.ndarray]:
    """`Measured.detail`, `Measured.edges`, and the contrast of each tile, (rows, columns).

    Only the sharpest tiles count, so that a blurred background or a sky does not matter. Detail is the energy of the
    Laplacian over that of the gradient, less the noise of the quietest tiles. For edges, gradients are compared with
    those of a blurred copy, in twelve directions: a blur of s pixels leaves √((s² + 2) / (s² + ½)), and motion blurs
    in one direction.

    Source: for edges, Zhuo & Sim 2011, Defocus map estimation from a single image.
    """
    if min(gray.shape) < TILE:
        return None, None, np.zeros((0, 0))
    padded = np.pad(gray, 1, "edge")
    laplacian = padded[1:-1, 2:] + padded[1:-1, :-2] + padded[2:, 1:-1] + padded[:-2, 1:-1] - 4 * gray
    gradients = (np.gradient(_smooth(gray, times)) for times in (1, 4))
    fine, coarse = ([_tiles(product) for product in (x * x, x * y, y * y)] for y, x in gradients)
    curved, steep, contrast = _tiles(laplacian**2), fine[0] + fine[2], coarse[0] + coarse[2]
    seen, detail = contrast >= CONTRAST[0] ** 2, None
    if seen.sum() >= 4:
        noise = np.percentile(curved, 5)
        detail = float(np.percentile((curved - noise)[seen] / np.maximum(steep, contrast)[seen], 95))
    cos, sin = np.cos(ANGLES)[:, None], np.sin(ANGLES)[:, None]
    along = [cos**2 * xx.ravel() + 2 * cos * sin * xy.ravel() + sin**2 * yy.ravel() for xx, xy, yy in (fine, coarse)]
    seen = along[1] >= CONTRAST[1] ** 2
    ratios = np.sort(np.where(seen, along[0] / np.maximum(along[1], 1e-9), np.inf))
    edges = [
        float(_percentile(own[:count], 0.85)) for own, count in zip(ratios, seen.sum(1), strict=True) if count >= 4
    ]
    return detail, (min(edges), max(edges)) if edges else None, contrast


def _percentile(ordered: np.ndarray, share: float) -> float:
    """The value below which a share of ordered values lies: `np.percentile` takes far longer for a few."""
    place = share * (len(ordered) - 1)
    low, high = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
    return low + (high - low) * (place - int(place))


def _subject(contrast: np.ndarray) -> float:
    """Share of the frame within the columns and rows beyond which at most 1 % of all contrast lies on each side."""
    share = 1.0
    for axis in (0, 1):
        summed = np.cumsum(contrast.sum(axis))
        if summed.size and summed[-1] > 0:
            first, last = np.searchsorted(summed, [0.01 * summed[-1], 0.99 * summed[-1]])
            share *= (last - first + 1) / len(summed)
    return float(share)


def _exposure(image: Image.Image) -> tuple[float, float]:
    """`Measured.brightest` and `Measured.blown`.

    A white backdrop is not overexposed, nor are drawings, which have many neighbouring pixels of exactly the same
    colour, nor is print, which is black and white.
    """
    red, green, blue = image.split()
    most, least = ImageChops.lighter(red, green), ImageChops.darker(red, green)
    highest = np.asarray(ImageChops.lighter(most, blue))
    white, black = np.asarray(ImageChops.darker(least, blue)) >= 250, highest <= 5
    blown = np.asarray(ImageChops.lighter(least, ImageChops.darker(most, blue))) >= 250
    border = np.concatenate([white[0], white[-1], white[:, 0], white[:, -1]])
    colours = np.asarray(image.convert("RGBA")).view(np.uint32)[..., 0]
    same = (colours[:, 1:] == colours[:, :-1])[((highest < 250) & ~black)[:, 1:]]
    drawn = same.size < 64 or same.mean() > 0.5
    printed = black.mean() > 0.02 and (white | black).mean() > 0.8
    judged = not (drawn or printed or border.mean() > 0.9)
    return float(np.percentile(highest, 99.5)), float(blown.mean()) if judged else 0.0


def _interpolation(gray: np.ndarray, jpeg: bool) -> float:
    """`Measured.interpolated`: strength of a period in the curvature along rows or columns, except that of JPEG blocks.

    Source: Gallagher 2005, Detection of linear and cubic interpolation in JPEG compressed images.
    """
    highest = 0.0
    for lines in (gray, gray.T):
        curvature = np.abs(np.diff(lines, 2, axis=1)).mean(0)
        if len(curvature) > 64:
            curvature = (curvature - np.convolve(curvature, np.full(17, 1 / 17), "same"))[8:-8]
            spectrum = np.abs(np.fft.rfft(curvature * np.hanning(len(curvature))))
            frequency = np.fft.rfftfreq(len(curvature))
            of_blocks = np.abs(frequency * 8 - np.rint(frequency * 8)) < 0.05
            spectrum = spectrum[(frequency > 0.15) & ~(jpeg & of_blocks)]
            highest = max(highest, float(spectrum.max() / (np.median(spectrum) + 1e-6)))
    return highest


def _file_steps(path: Path) -> float:
    """`Measured.jpeg` by the tables of a JPEG file; 0 for other files."""
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            steps = np.reshape(getattr(image, "quantization")[0], (8, 8))  # noqa: B009 - only JPEGs have it
            return float(100 * steps[:4, :4].sum() / QUALITY_50[:4, :4].sum())  # other steps may be at the limit of 255
    except (Image.UnidentifiedImageError, KeyError):
        return 0.0


def _pixel_steps(gray: np.ndarray) -> float:
    """`Measured.jpeg` by the traces of compression in the pixels of any file; 0 if the picture was scaled since.

    Slopes are steeper between blocks; the coefficients of blocks so placed gather at multiples of the steps.

    Source: Fan & de Queiroz 2003, Identification of bitmap compression history.
    """
    if min(gray.shape) < 32:
        return 0.0
    starts = []
    for lines in (gray, gray.T):
        slopes = np.abs(np.diff(lines, axis=1))
        jumps = np.clip(slopes[:, 1:-1] - (slopes[:, :-2] + slopes[:, 2:]) / 2, -20, 20).mean(0)
        starts.append((int(jumps[: len(jumps) // 8 * 8].reshape(-1, 8).mean(0).argmax()) + 2) % 8)
    left, top = starts
    rows, columns = (gray.shape[0] - top) // 8, (gray.shape[1] - left) // 8
    blocks = gray[top : top + 8 * rows, left : left + 8 * columns].reshape(rows, 8, columns, 8).swapaxes(1, 2)
    waves = np.cos(np.pi / 16 * np.outer(np.arange(4), 2 * np.arange(8) + 1)) / 2
    waves[0] /= np.sqrt(2)
    low = np.abs(blocks.reshape(-1, 64) @ np.kron(waves, waves).T[:, 1:].astype(np.float32))
    most, best = 0.6, 0.0
    for quality in range(5, 96, 5):
        scale = 5000 / quality if quality < 50 else 200 - 2 * quality  # libjpeg's, in % of the steps of quality 50
        steps = np.maximum(np.floor((QUALITY_50[:4, :4].ravel()[1:] * scale + 50) / 100), 1)
        multiples = (low / steps)[low > 0.6 * steps]
        if len(multiples) >= 30 and (gathered := float(np.cos(2 * np.pi * multiples).mean())) > most:
            most, best = gathered, scale
    return best


def _hashes(gray: Image.Image) -> np.ndarray:
    """`Measured.hashes`, of a small copy: which of the lowest frequencies are above their median.

    Source of the hash: Zauner 2010, phash.org. Cutting, scaling and its cosine transform are all linear: one product.
    """
    waves, forms = _hash_waves(), len(STRIPS)
    small = np.asarray(gray.resize((12 * HASH, 12 * HASH), reducing_gap=2.0), float)
    rows = (waves @ small).reshape(-1, 12 * HASH)  # products so small that BLAS starts no threads, which cost more
    every = (rows @ waves.swapaxes(1, 2)).reshape(forms, forms, HASH, HASH).swapaxes(0, 1)
    mirrored = every[0, 0] * (-1) ** np.arange(HASH)
    middles, anywhere = (range(1, len(MIDDLES) + 1), range(len(MIDDLES) + 1, forms))
    crops = [*(every[i, i] for i in middles), *(every[i, j] for i in anywhere for j in anywhere)]
    frequencies = np.stack([every[0, 0], mirrored, *crops]).round(6).reshape(len(crops) + 2, -1)  # of a plain one: 0
    return frequencies > np.median(frequencies, axis=1, keepdims=True)


@functools.cache
def _hash_waves() -> np.ndarray:
    """The lowest frequencies of each of STRIPS as weights of the pixels along a side: (strips, HASH, 12 · HASH)."""
    side, fine = 12 * HASH, 4 * HASH
    waves = np.cos(np.pi / (2 * fine) * np.outer(np.arange(HASH), 2 * np.arange(fine) + 1))
    weights = np.zeros((len(STRIPS), HASH, side))
    for own, (share, start) in zip(weights, STRIPS, strict=True):
        first, last = round(side * (1 - share) * start), round(side * (1 - share) * start + side * share)
        pixels = Image.fromarray(np.eye(last - first, dtype=np.float32)).resize((last - first, fine), LANCZOS)
        scaled = np.asarray(pixels, float)
        own[:, first:last] = waves @ (scaled / scaled.sum(1, keepdims=True))
    return weights


def _advice(picture: Measured) -> Iterator[Finding]:
    """The findings about one picture."""
    fit, enlarged, detail = picture.fit, picture.enlarged, picture.detail
    size, bucket = (f"{width}×{height}" for width, height in (picture.size, fit.size))

    def finding(kind: str, figure: float, serious: float, message: str, warning: float | None = None) -> Finding:
        """Serious from one figure on; below it a warning, or only from a second figure on."""
        level: Severity = "warning" if warning is None or figure >= warning else "info"
        return Finding(kind, "serious" if figure >= serious else level, message, (picture.name,))

    if enlarged > 1.02:
        message = f"{size} pixels are enlarged {enlarged:.2f} times to fill {bucket}: use a larger original"
        yield finding("resolution", enlarged, 2, message, 1.25)
    if fit.lost >= 0.1:
        message = f"{fit.lost:.0%} of {size} pixels are cut off to fill {bucket}: crop it yourself"
        yield finding("crop", fit.lost, 0.4, message, 0.2)
    worst, best = picture.edges or (9.0, 9.0)
    smeared = worst < SMEARED[0] and worst < SMEARED[1] * best
    if smeared or (worst < BLURRED and not (detail is not None and detail < SOFT)):
        how = "smeared in one direction, as by motion" if worst < 0.85 * best else "blurred"
        yield finding("blur", -worst, -1.3, f"{how} (sharpness {worst:.1f} to {best:.1f} of 2 and more): leave it out")
    elif detail is not None and detail < SOFT:
        times = (FULL / max(detail, 0.1)) ** 0.5
        width, height = (round(min(side) / times) for side in zip(fit.scaled, picture.size, strict=True))
        kind = "upscaled" if picture.interpolated > INTERPOLATED else "blur"
        how = "enlarged" if kind == "upscaled" else "blurred, or enlarged"
        message = f"{how}: it has the detail of about {width}×{height} pixels; use the original, or leave it out"
        yield finding(kind, times, 3, message)
    steps = picture.jpeg * min(1, enlarged)  # reducing a picture makes an average of them
    if steps > 80:
        quality = 5000 / picture.jpeg if picture.jpeg > 100 else 100 - picture.jpeg / 2
        message = f"JPEG of quality {quality:.0f}: its blocks and halos would be learned. Use the original"
        yield finding("jpeg", steps, 140, message)
    if picture.brightest < DARK:
        message = f"dark: its brightest parts have {picture.brightest / 255:.0%} of full brightness. Brighten it"
        yield finding("exposure", -picture.brightest, -100, message)
    if picture.blown >= BLOWN:
        message = f"overexposed: {picture.blown:.0%} of it is blown out. Use a darker version, or leave it out"
        yield finding("exposure", picture.blown, 0.4, message)
    if picture.subject < 0.1:
        message = f"its subject fills {picture.subject:.0%} of it: crop it closer"
        yield Finding("subject", "info", message, (picture.name,))


# ── The set ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _alike(pictures: Sequence[Measured]) -> list[list[str]]:
    """Groups of names of pictures that are nearly the same, in the order of the dataset."""
    if not pictures:
        return []
    hashes = np.stack([picture.hashes for picture in pictures]) * np.int8(2) - np.int8(1)
    whole, leader = hashes[:, 0].astype(np.float32), np.arange(len(pictures))  # of each group the first picture

    def leaders(places: np.ndarray) -> np.ndarray:
        while (leader[places] != places).any():
            places = leader[places]
        return places

    for form in range(hashes.shape[1]):
        others = hashes[:, form].T.astype(np.float32)
        for start in range(0, len(whole), 512):  # 512 rows of 10 000 pictures are 20 MB
            near = whole[start : start + 512] @ others >= HASH**2 - 2 * ALIKE
            for i in np.flatnonzero(near.any(1)):
                several = leaders(np.append(np.flatnonzero(near[i]), start + i))
                leader[several] = several.min()
    groups: dict[int, list[str]] = {}
    for first, picture in zip(leaders(np.arange(len(pictures))).tolist(), pictures, strict=True):
        groups.setdefault(first, []).append(picture.name)
    return [group for group in groups.values() if len(group) > 1]


def _variety(
    dataset: Dataset, names: Sequence[str], pictures: Sequence[Measured], embed: Embed | None
) -> tuple[float | None, list[Finding]]:
    """Mean difference of two pictures, and findings about those unlike all others.

    By hashes it is 1 if as many bits differ as by chance; by embeddings it is 1 less the cosine.
    """
    count = len(names if embed else pictures)
    if count < 2:
        return None, []
    if embed is None:
        share = np.mean([picture.hashes[0] for picture in pictures], 0)
        return round(float(4 * (share * (1 - share)).mean() * count / (count - 1)), 3), []
    vectors = np.asarray(embed(dataset.pictures), float)
    if vectors.ndim != 2 or len(vectors) != count:
        raise ValueError(f"embed returned an array of shape {vectors.shape} for {count} pictures: return (N, D)")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    variety = 1 - (np.square(vectors.sum(0)).sum() - count) / (count * (count - 1))
    near = vectors @ vectors.mean(0) / np.linalg.norm(vectors.mean(0))
    usual = np.median(near)
    odd = np.flatnonzero(near < usual - 6 * np.median(np.abs(near - usual)) - 0.05).tolist() if count >= 8 else []
    message = "unlike the others (similarity {:.2f}, theirs {:.2f}): is the subject in it?"
    findings = [Finding("outlier", "info", message.format(near[i], usual), (names[i],)) for i in odd]
    return round(float(variety), 3), findings


def _captions(dataset: Dataset, trigger: str) -> tuple[dict, list[Finding]]:
    """Counts of captions, and findings about those that are empty or lack the trigger."""
    texts, findings = [picture.caption for picture in dataset.pictures], []
    word, often = captions.trigger_pattern(trigger), Counter(texts)
    for name, text in dataset.captions.items():
        if not text:
            findings.append(Finding("caption", "warning", "no caption: write one", (name,)))
        elif trigger and not word.search(text):
            message = f"its caption lacks the trigger {trigger!r}: {text[:60]!r}"
            findings.append(Finding("caption", "warning", message, (name,)))
    lacking = len(findings)
    for sign, found in captions.markup(dataset.captions).items():
        findings += [Finding("caption", "warning", f"has {sign}, {captions.LITERAL}", (name,)) for name in found]
    words = [len(text.split()) for text in texts if text] or [0]
    counts = {
        "with": len(texts) - often[""], "without": often[""],
        "own": sum(picture.has_own_caption for picture in dataset.pictures),
        "shared": sum(often[text] > 1 for text in texts if text),
        "words": {"least": min(words), "median": statistics.median(words), "most": max(words)},
    }  # fmt: skip
    return counts | ({"without_trigger": lacking} if trigger else {}), findings


def _count(kind: str, count: int, doubles: int) -> list[Finding]:
    least, (low, high), ideal = COUNTS[kind]
    different = count - doubles
    if ideal[0] <= different <= max(high, ideal[1]):
        return []
    level: Severity = "warning" if different < least else "info"
    more = "add some" if level == "warning" else "more can help, if they vary"
    advice = more if different < ideal[0] else "fewer, chosen for quality and variety, often do better"
    guide = f"the guide asks for {least}, recommends {low}–{high} and calls {ideal[0]}–{ideal[1]} ideal for a {kind}"
    return [Finding("count", level, f"{different} different pictures; {guide}: {advice}")]


# ── Crops ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def crop_previews(dataset: Dataset, buckets: Buckets = DEFAULT, most: int = 60) -> Image.Image:
    """A sheet of the pictures that lose most, worst first: the part cut off is red, and its share is written below.

    Args:
        most: pictures on the sheet.
    """
    names, fits = list(dataset.by_name), _fit(dataset, buckets)
    order = sorted(range(len(fits)), key=lambda i: -fits[i].lost)[:most]
    columns, cell, text, gap = min(6, len(order)), 180, 40, 12
    with storage.thread_pool() as pool:
        images = list(pool.map(lambda i: _cut(dataset.pictures[i], fits[i], cell), order))
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    heights = [max(images[place].height for place in row) for row in rows]
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, sum(heights) + len(rows) * (text + gap) + gap), "white")
    draw, font, bottom = ImageDraw.Draw(sheet), _font(12), gap
    for row, height in zip(rows, heights, strict=True):
        bottom += height
        for column, place in enumerate(row):
            middle, image, i = gap + column * (cell + gap) + cell // 2, images[place], order[place]
            sheet.paste(image, (middle - image.width // 2, bottom - image.height))
            (width, height), name = fits[i].size, names[i]
            lines = f"{fits[i].lost:.1%} off for {width}×{height}\n{name if len(name) < 25 else '…' + name[-22:]}"
            draw.text((middle, bottom + 4), storage.printable(lines), "#222222", font, "ma", align="center")
        bottom += text + gap
    return sheet


def _cut(picture: Picture, fit: Fit, cell: int) -> Image.Image:
    """The picture within a cell, red outside of its bucket."""
    image = open_picture(picture)
    image = ImageOps.contain(image, (cell, cell))
    across, down = image.width / fit.scaled[0], image.height / fit.scaled[1]
    (left, top), (width, height) = fit.crop, fit.size
    x, y, right, bottom = map(round, (left * across, top * down, (left + width) * across, (top + height) * down))
    shaded = Image.blend(image, Image.new("RGB", image.size, "#d03030"), 0.6)
    shaded.paste(image.crop((x, y, right, bottom)), (x, y))
    return shaded


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's DejaVu Sans, which has more scripts than Pillow's default."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)
