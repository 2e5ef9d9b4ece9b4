"""A dataset measured against the guide's checklist: what may spoil the result, as advice. The user's files stay as
they are.

A picture is judged at the scale it is trained at: a large photograph that is soft at its own size is sharp at 512
pixels, and its JPEG artifacts are gone. The limits below were set with half of the photographs of
tests/bench/check_calibration.py, which reports on the other half.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps
from tqdm.auto import tqdm

from lorakit import storage
from lorakit.config import BucketRule as Rule
from lorakit.dataset import buckets
from lorakit.dataset import captions as captions_module
from lorakit.dataset.buckets import Fit, Size
from lorakit.dataset.folder import Dataset
from lorakit.dataset.picture import Picture, open_picture
from lorakit.dataset.selection import picture_name

try:
    import imagehash
except ImportError as error:
    raise ImportError("Checking pictures needs imagehash: `pip install imagehash`.") from error

Severity = Literal["serious", "warning", "info"]
Sides = tuple[int | None, int | None]  # a bucket's shortest and longest, in pixels
COUNTS = {  # the training guide's: pictures at least, recommended, ideal
    "character": (20, (50, 100), (40, 80)),
    "style": (15, (30, 50), (25, 50)),
    "object": (20, (40, 80), (30, 60)),
    "clothing": (25, (50, 100), (40, 70)),
}
TILE = 16  # pixels of a square that is sharp or not
CONTRAST = (4.0, 2.0)  # mean slope of a tile, in levels of 255 a pixel, from which its detail and edges are judged
SOFT = 2.1  # `Measured.detail` below which a picture has not the detail of its size
FULL = 9.5  # `Measured.detail` of a picture that was enlarged k times is about this / k²
BLURRED = 1.6  # `Measured.edges` in the worst direction
SMEARED = (1.85, 0.75)  # the same, if it is also that much below the best
INTERPOLATED = 9.0  # `Measured.interpolated` from which a soft picture was enlarged
DARK, BLOWN = 140, 0.1  # `Measured.brightest` and `Measured.blown`
HASH = 12  # side of a perceptual hash, in bits
ALIKE = 30  # bits of it in which two forms of one picture may differ
MIDDLES = (0.95, 0.8, 0.7)  # shares of a picture's sides that others may show alone, from its middle
ANYWHERE = 0.9  # the same, but wherever it is cut
QUALITY_50 = np.array([  # luminance steps. Source: ITU-T T.81, table K.1
    [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
])  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Advice about a picture, or about the set."""

    picture: str | None  # its name: the path relative to the dataset's root; None for the set
    kind: str  # file, resolution, crop, blur, upscaled, jpeg, exposure, subject, duplicate, outlier, caption, …
    severity: Severity
    message: str  # what was found, with the figure, and what to do


@dataclass(frozen=True)
class Measured:
    """A picture in numbers, at the scale it is trained at."""

    name: str
    size: Size  # its own
    fit: Fit
    jpeg: float  # steps it was quantised with, in % of those of quality 50; 0 if it was not
    detail: float | None  # squared spatial frequency of the sharpest tiles, (rad / px)²; None: too little contrast
    edges: tuple[float, float] | None  # what a blur takes of the sharpest edges: in the worst and the best direction
    interpolated: float  # how far a period of interpolation stands out; about 4 where there was none
    brightest: float  # 0 to 255; 0.5 % of the picture is brighter
    blown: float  # share of the picture in which two of three colours are at their limit; 0 for drawings
    subject: float  # share of the frame that holds nearly all contrast
    hashes: np.ndarray = field(repr=False, compare=False)  # of the picture, its mirror image, its crops: bool (V, B)

    @property
    def enlarged(self) -> float:
        """Times that the picture's sides grow to fill its bucket; 1 and below: they do not."""
        return self.fit.scaled[0] / self.size[0]


@dataclass(frozen=True)
class QualityReport:
    dataset: Dataset = field(repr=False)
    kind: str
    resolution: int
    pictures: tuple[Measured, ...] = field(repr=False)
    findings: tuple[Finding, ...]
    groups: tuple[tuple[str, ...], ...]  # names of pictures that are nearly the same
    variety: float | None  # 0: the same picture throughout. None for a single one
    captions: dict

    def describe(self, some: int = 8) -> str:
        """The report for people; of each kind of finding at most `some`."""
        words = self.captions["words"]
        captions = ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in self.captions.items() if what != "words")
        lines = [
            self.dataset.describe(),
            f"checked as {self.kind} at {self.resolution} pixels",
            f"captions: {captions}; {words['least']} to {words['most']} words, half of them up to {words['median']:g}",
        ]
        if self.variety is not None:
            lines.append(f"variety: {self.variety:.2f}, where 0 is the same picture throughout")
        for level in ("serious", "warning", "info"):
            for kind in dict.fromkeys(finding.kind for finding in self.findings if finding.severity == level):
                found = [f for f in self.findings if (f.kind, f.severity) == (kind, level)]
                lines.append(f"{level}: {kind} × {len(found)}")
                lines += [f"  {f.picture or 'the set'}: {f.message}" for f in found[:some]]
                lines += [f"  … and {len(found) - some} more"] * (len(found) > some)
        if not self.findings:
            lines.append("nothing was found that would spoil the result")
        return _printable("\n".join(lines))

    def facts(self) -> dict:
        """The report for programs, fit for JSON. Pictures are named by their path relative to the dataset."""

        def problems(left_out: bool) -> list[dict]:
            found = (problem for problem in self.dataset.problems if problem.left_out is left_out)
            return [
                {"picture": picture_name(problem.path, self.dataset), "reason": problem.reason} for problem in found
            ]

        return {
            "kind": self.kind, "resolution": self.resolution, "pictures": len(self.dataset),
            "per_epoch": self.dataset.epoch_size, "variety": self.variety, "captions": self.captions,
            "left_out": problems(True), "to_look_at": problems(False),
            "near_duplicates": [list(group) for group in self.groups],
            "findings": [vars(finding) for finding in self.findings],
        }  # fmt: skip


def check_quality(
    dataset: Dataset, *, kind: str = "character", resolution: int = 512, trigger: str = "", step: int = 64,
    rule: Rule = "kohya", sides: Sides = (None, None), embed: Callable[[Sequence[Picture]], np.ndarray] | None = None,
    keep: Collection[str] = (),
) -> QualityReport:  # fmt: skip
    """Measure each picture and the set against the guide's checklist.

    Args:
        kind: what is taught: character, style, object or clothing; says how many pictures are enough.
        resolution: training size in pixels; with `step`, `rule` and `sides`, the shortest and the longest of a bucket,
            it says how each picture is scaled and cut.
        trigger: the word that every caption should have.
        embed: returns an embedding of each picture, shape (N, D), for the variety and to find pictures unlike all
            others; without it, variety is that of the perceptual hashes.
        keep: names of pictures that a person has seen and wants as they are: nothing is found about them.

    Raises:
        ValueError: no such kind or rule, a resolution that is no multiple of `step` or not among `sides`, or not one
            embedding a picture.
    """
    if kind not in COUNTS:
        raise ValueError(f"there is no kind {kind!r}: use {', '.join(COUNTS)}")
    names, fits = (
        [picture_name(picture.known_as, dataset) for picture in dataset.pictures],
        _fits(dataset, resolution, step, rule, sides),
    )
    measuring = _each(_measure, dataset.pictures, names, fits)
    found = list(tqdm(measuring, "checking", len(names), unit="picture", disable=len(names) <= 200))
    pictures = tuple(each for each in found if isinstance(each, Measured))
    findings = [each for each in found if isinstance(each, Finding)]
    for picture in pictures:
        findings += _advice(picture)
    groups = _alike(pictures)
    for first, *others in groups:
        findings += [Finding(name, "duplicate", "warning", f"nearly the same as {first}: keep one") for name in others]
    captions, bare = _captions(dataset, names, trigger)
    variety, odd = _variety(dataset, names, pictures, embed)
    findings = [finding for finding in findings + bare + odd if finding.picture not in keep]
    findings += _count(kind, len(names), sum(len(group) - 1 for group in groups))
    return QualityReport(dataset, kind, resolution, pictures, tuple(findings), groups, variety, captions)


def _fits(dataset: Dataset, resolution: int, step: int, rule: Rule, sides: Sides) -> list[Fit]:
    dimensions = [(picture.width, picture.height) for picture in dataset.pictures]
    return buckets.fit_all(dimensions, resolution, step=step, rule=rule, minimum=sides[0], maximum=sides[1])


def _each(function: Callable, *arguments: Sequence) -> Iterator:
    """The function's answers in order, asked on all cores; what is not begun when interrupted is left."""
    pool = ThreadPoolExecutor(storage.WORKERS)
    try:
        yield from pool.map(function, *arguments)
    finally:
        pool.shutdown(cancel_futures=True)


# One picture


def _measure(picture: Picture, name: str, fit: Fit) -> Measured | Finding:
    try:
        image, steps = open_picture(picture), _file_steps(picture.path)
    except (ValueError, OSError):
        return Finding(name, "file", "serious", "cannot be opened any more, or has changed: scan again")
    middle = _middle(image)
    steps = max(steps, _pixel_steps(middle))
    if fit.scaled[0] < image.width:
        image = image.resize(fit.scaled, Image.Resampling.LANCZOS, reducing_gap=1.5)
    gray = image.convert("L")
    detail, edges, contrast = _sharpness(np.asarray(gray, np.float32))
    return Measured(
        name, (picture.width, picture.height), fit, steps, detail, edges, _interpolation(middle, steps > 0),
        *_exposure(image), _subject(contrast), _hashes(gray),
    )  # fmt: skip


def _middle(image: Image.Image, side: int = 384) -> np.ndarray:
    """Its middle at its own scale, where traces of JPEG and of interpolation are: gray levels (H, W)."""
    left, top = max(0, image.width - side) // 2, max(0, image.height - side) // 2
    box = (left, top, left + min(side, image.width), top + min(side, image.height))
    return np.asarray(image.crop(box).convert("L"), np.float32)


def _smooth(gray: np.ndarray, times: int = 1) -> np.ndarray:
    """Blur by a binomial kernel whose variance is half a pixel, as often as asked."""
    for _ in range(times):
        padded = np.pad(gray, 1, "edge")
        rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
        gray = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16
    return gray


def _tiles(values: np.ndarray) -> np.ndarray:
    """Mean of each tile, (H, W) → (H // 16, W // 16); what does not fill one is left away."""
    rows, columns = values.shape[0] // TILE, values.shape[1] // TILE
    whole = values[: rows * TILE, : columns * TILE]
    return whole.reshape(rows, TILE, columns, TILE).mean((1, 3))


def _sharpness(gray: np.ndarray) -> tuple[float | None, tuple[float, float] | None, np.ndarray]:
    """`Measured.detail`, `Measured.edges`, and the contrast of each tile, (rows, columns).

    The sharpest tiles decide, so that a blurred background counts for nothing, nor does a sky. Detail is the energy
    of the Laplacian over that of the gradient, less the noise of the quietest tiles. For edges, gradients are compared
    with those of a blurred copy, in twelve directions: a blur of s pixels leaves √((s² + 2) / (s² + ½)), and motion
    is a blur in one direction.

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
    edges = []
    for angle in np.arange(12) * (np.pi / 12):
        cos, sin = np.cos(angle), np.sin(angle)
        own, blurred = (cos**2 * xx + 2 * cos * sin * xy + sin**2 * yy for xx, xy, yy in (fine, coarse))
        seen = blurred >= CONTRAST[1] ** 2
        if seen.sum() >= 4:
            edges.append(float(np.percentile(own[seen] / blurred[seen], 85)))
    return detail, (min(edges), max(edges)) if edges else None, contrast


def _subject(contrast: np.ndarray) -> float:
    """Share of the frame between the outermost columns and rows that are more than 1 % of all contrast in."""
    share = 1.0
    for axis in (0, 1):
        summed = np.cumsum(contrast.sum(axis))
        if summed.size and summed[-1] > 0:
            first, last = np.searchsorted(summed, [0.01 * summed[-1], 0.99 * summed[-1]])
            share *= (last - first + 1) / len(summed)
    return float(share)


def _exposure(image: Image.Image) -> tuple[float, float]:
    """`Measured.brightest` and `Measured.blown`.

    A white backdrop is not overexposed, nor are drawings, which are told by their many neighbouring pixels of exactly
    the same colour, nor is print, which is black and white.
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
    """How far a period stands out in the curvature along rows or columns, as enlarging leaves one; not that of blocks.

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
    """`Measured.jpeg` by the tables of a JPEG file; 0 for another file."""
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            steps = np.reshape(image.quantization[0], (8, 8))
            return float(100 * steps[:4, :4].sum() / QUALITY_50[:4, :4].sum())  # others may have no room to be larger
    except (Image.UnidentifiedImageError, KeyError):
        return 0.0


def _pixel_steps(gray: np.ndarray) -> float:
    """`Measured.jpeg` by what compression left in the pixels, whatever file they are in now.

    Slopes stand out between blocks; of blocks so placed, coefficients gather at multiples of the steps. Of a picture
    that was scaled or turned since nothing is seen.

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
    most, found = 0.6, 0.0
    for quality in range(5, 96, 5):
        scale = _scale(quality)
        steps = np.maximum(np.floor((QUALITY_50[:4, :4].ravel()[1:] * scale + 50) / 100), 1)
        multiples = (low / steps)[low > 0.6 * steps]
        if len(multiples) >= 30 and (gathered := float(np.cos(2 * np.pi * multiples).mean())) > most:
            most, found = gathered, scale
    return found


def _scale(quality: float) -> float:
    """Steps of libjpeg's quality, in % of those of 50."""
    return 5000 / quality if quality < 50 else 200 - 2 * quality


def _hashes(gray: Image.Image) -> np.ndarray:
    """`Measured.hashes`, of a small copy. Source of the hash: Zauner 2010, phash.org."""
    side = 12 * HASH
    gray = gray.resize((side, side), reducing_gap=2.0)
    places = [(share, 0.5, 0.5) for share in MIDDLES]
    places += [(ANYWHERE, x, y) for x in (0, 0.5, 1) for y in (0, 0.5, 1)]
    corners = [(side * (1 - share) * x, side * (1 - share) * y, side * share) for share, x, y in places]
    crops = [gray.crop((round(x), round(y), round(x + wide), round(y + wide))) for x, y, wide in corners]
    return np.stack([imagehash.phash(form, HASH).hash.ravel() for form in (gray, ImageOps.mirror(gray), *crops)])


def _advice(picture: Measured) -> Iterator[Finding]:
    """What there is to say of one picture."""
    fit, enlarged, detail = picture.fit, picture.enlarged, picture.detail
    own, into = (f"{width}×{height}" for width, height in (picture.size, fit.size))

    def finding(kind: str, figure: float, serious: float, message: str, warning: float | None = None) -> Finding:
        """Serious from one figure on; given another, a warning from that one on, below it information."""
        level = "serious" if figure >= serious else "warning" if warning is None or figure >= warning else "info"
        return Finding(picture.name, kind, level, message)

    if enlarged > 1.02:
        message = f"{own} pixels are enlarged {enlarged:.2f} times to fill {into}: use a larger original"
        yield finding("resolution", enlarged, 2, message, 1.25)
    if fit.lost >= 0.1:
        message = f"{fit.lost:.0%} of {own} pixels are cut off to fill {into}: crop it yourself"
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
        how = "was enlarged" if kind == "upscaled" else "is blurred, or was enlarged"
        message = f"it {how}, and has the detail of about {width}×{height} pixels: use the original, or leave it out"
        yield finding(kind, times, 3, message)
    steps = picture.jpeg * min(1, enlarged)  # reducing a picture makes an average of them
    if steps > 80:
        quality = 5000 / picture.jpeg if picture.jpeg > 100 else 100 - picture.jpeg / 2
        message = f"JPEG of quality {quality:.0f}: its blocks and halos would be learned. Use the original"
        yield finding("jpeg", steps, 140, message)
    if picture.brightest < DARK:
        message = f"dark: the brightest of it has {picture.brightest / 255:.0%} of full brightness. Brighten it"
        yield finding("exposure", -picture.brightest, -100, message)
    if picture.blown >= BLOWN:
        message = f"overexposed: {picture.blown:.0%} of it are blown out. Use a darker version, or leave it out"
        yield finding("exposure", picture.blown, 0.4, message)
    if picture.subject < 0.1:
        message = f"all there is to see fills {picture.subject:.0%} of it: crop it closer"
        yield Finding(picture.name, "subject", "info", message)


# The set


def _alike(pictures: Sequence[Measured]) -> tuple[tuple[str, ...], ...]:
    """Names of pictures that are nearly the same, grouped, in the order of the dataset."""
    if not pictures:
        return ()
    hashes = np.stack([picture.hashes for picture in pictures]) * np.int8(2) - np.int8(1)
    own, leader = hashes[:, 0].astype(np.float32), list(range(len(pictures)))

    def lead(i: int) -> int:
        while leader[i] != i:
            i = leader[i]
        return i

    for form in range(hashes.shape[1]):
        others = hashes[:, form].astype(np.float32)
        for start in range(0, len(own), 512):  # 512 rows of 10 000 pictures are 20 MB
            agreement = own[start : start + 512] @ others.T
            for i, j in zip(*np.nonzero(agreement >= HASH**2 - 2 * ALIKE), strict=True):
                first, second = sorted((lead(start + int(i)), lead(int(j))))
                leader[second] = first
    groups: dict[int, list[str]] = {}
    for i, picture in enumerate(pictures):
        groups.setdefault(lead(i), []).append(picture.name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _variety(
    dataset: Dataset, names: Sequence[str], pictures: Sequence[Measured],
    embed: Callable[[Sequence[Picture]], np.ndarray] | None,
) -> tuple[float | None, list[Finding]]:  # fmt: skip
    """Mean difference of two pictures, and what there is to say of it.

    By hashes it is 1 where as many bits differ as by chance; by embeddings, 1 less the cosine.
    """
    count = len(names if embed else pictures)
    if count < 2:
        return None, []
    if embed is None:
        share = np.mean([picture.hashes[0] for picture in pictures], 0)
        return round(float(4 * (share * (1 - share)).mean() * count / (count - 1)), 3), []
    vectors = np.asarray(embed(dataset.pictures), float)
    if vectors.ndim != 2 or len(vectors) != count:
        raise ValueError(f"embed gave an array of shape {vectors.shape} for {count} pictures: return (N, D)")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    variety = 1 - (np.square(vectors.sum(0)).sum() - count) / (count * (count - 1))
    near = vectors @ vectors.mean(0) / np.linalg.norm(vectors.mean(0))
    usual = np.median(near)
    odd = np.flatnonzero(near < usual - 6 * np.median(np.abs(near - usual)) - 0.05) if count >= 8 else []
    message = "unlike the others (similarity {:.2f}, theirs {:.2f}): is the subject in it?"
    return round(float(variety), 3), [Finding(names[i], "outlier", "info", message.format(near[i], usual)) for i in odd]


def _captions(dataset: Dataset, names: Sequence[str], trigger: str) -> tuple[dict, list[Finding]]:
    """How many captions there are of which sort, and those to look at."""
    texts, findings = [picture.caption for picture in dataset.pictures], []
    word, often = captions_module.trigger_pattern(trigger), Counter(texts)
    for name, text in zip(names, texts, strict=True):
        if not text:
            findings.append(Finding(name, "caption", "warning", "no caption: write one"))
        elif trigger and not word.search(text):
            message = f"its caption lacks the trigger {trigger!r}: {text[:60]!r}"
            findings.append(Finding(name, "caption", "warning", message))
    words = [len(text.split()) for text in texts if text] or [0]
    counts = {
        "with": len(texts) - often[""], "without": often[""],
        "own": sum(picture.caption_source not in ("given", "folder", "none") for picture in dataset.pictures),
        "shared": sum(often[text] > 1 for text in texts if text),
        "words": {"least": min(words), "median": statistics.median(words), "most": max(words)},
    }  # fmt: skip
    return counts | ({"without_trigger": len(findings)} if trigger else {}), findings


def _count(kind: str, count: int, doubles: int) -> list[Finding]:
    least, (low, high), ideal = COUNTS[kind]
    different = count - doubles
    if different < least:
        level, advice = "warning", "add some"
    elif different < ideal[0]:
        level, advice = "info", "more can help, if they vary"
    elif different > max(high, ideal[1]):
        level, advice = "info", "fewer, chosen for quality and variety, often do better"
    else:
        return []
    guide = f"the guide asks for {least}, recommends {low}–{high} and calls {ideal[0]}–{ideal[1]} ideal for a {kind}"
    return [Finding(None, "count", level, f"{different} different pictures; {guide}: {advice}")]


# What is cut off


def crop_previews(
    dataset: Dataset, *, resolution: int = 512, step: int = 64, rule: Rule = "kohya", sides: Sides = (None, None),
    most: int = 60,
) -> Image.Image:  # fmt: skip
    """A sheet of the pictures that lose most, worst first: what is cut off is red, and its share is written below.

    Args:
        resolution, step, rule, sides: as for `check`.
        most: pictures on the sheet.
    """
    fits = _fits(dataset, resolution, step, rule, sides)
    order = sorted(range(len(fits)), key=lambda i: -fits[i].lost)[:most]
    columns, cell, text, gap = min(6, len(order)), 180, 40, 12
    shown = list(_each(_cut, [dataset.pictures[i] for i in order], [fits[i] for i in order], [cell] * len(order)))
    rows = [range(start, min(start + columns, len(shown))) for start in range(0, len(shown), columns)]
    heights = [max(shown[place].height for place in row) for row in rows]
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, sum(heights) + len(rows) * (text + gap) + gap), "white")
    draw, font, bottom = ImageDraw.Draw(sheet), _font(12), gap
    for row, height in zip(rows, heights, strict=True):
        bottom += height
        for column, place in enumerate(row):
            middle, picture, i = gap + column * (cell + gap) + cell // 2, shown[place], order[place]
            sheet.paste(picture, (middle - picture.width // 2, bottom - picture.height))
            (width, height), name = fits[i].size, picture_name(dataset.pictures[i].known_as, dataset)
            lines = f"{fits[i].lost:.1%} off for {width}×{height}\n{name if len(name) < 25 else '…' + name[-22:]}"
            draw.text((middle, bottom + 4), _printable(lines), "#222222", font, "ma", align="center")
        bottom += text + gap
    return sheet


def _cut(picture: Picture, fit: Fit, cell: int) -> Image.Image:
    """The picture within a cell, red where its bucket has no room."""
    image = open_picture(picture)
    image = ImageOps.contain(image, (cell, cell))
    across, down = image.width / fit.scaled[0], image.height / fit.scaled[1]
    (left, top), (width, height) = fit.crop, fit.size
    box = tuple(map(round, (left * across, top * down, (left + width) * across, (top + height) * down)))
    shaded = Image.blend(image, Image.new("RGB", image.size, "#d03030"), 0.6)
    shaded.paste(image.crop(box), box[:2])
    return shaded


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's DejaVu Sans, which knows more scripts than Pillow's own."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # a file's name need not be UTF-8
