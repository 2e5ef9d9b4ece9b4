"""Picture sizes → aspect-ratio buckets and the order of an epoch. Sizes are (width, height) in pixels.

The buckets are kohya sd-scripts' (`make_bucket_resolutions`), because published advice and other trainers' results
assume them. A rule chooses the bucket of a picture, and none ever pads:

- "kohya": the nearest width/height, as `BucketManager.select_bucket` does when it may scale both up and down.
- "no_upscale": its `bucket_no_upscale`. A picture is never enlarged: the bucket is the picture's own size, or its size
  reduced to the training area, rounded down to the step.
- "least_crop": of all sizes between these, down to three quarters of the area, the one that cuts off the least.

Scaling uses whole numbers and orders use raw generator bits, so every machine gets the same crops and batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, gcd, sqrt
from typing import get_args

import numpy as np
from PIL import Image

from lorakit.config import BucketRule as Rule

Size = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """How one picture gets into its bucket: resize to `scaled`, then cut out `size` at `crop`."""

    size: Size  # the bucket
    scaled: Size  # covers the bucket; one side exactly, except by the rule "no_upscale"
    crop: tuple[int, int]  # (left, top) within `scaled`

    @property
    def lost(self) -> float:
        """Share of the picture's area that is cut off, 0 to 1."""
        return 1 - (self.size[0] * self.size[1]) / (self.scaled[0] * self.scaled[1])


def bucket_sizes(
    resolution: int, *, step: int = 64, minimum: int | None = None, maximum: int | None = None
) -> list[Size]:
    """The buckets whose area is at most resolution², sorted by width, then height; arguments as for `Buckets`.

    Raises:
        ValueError: the resolution is no multiple of `step`, or outside the limits.
    """
    if step < 1 or resolution < step or resolution % step:
        below = resolution // max(step, 1) * step
        near = " or ".join(str(side) for side in (below, below + step) if side > 0)
        raise ValueError(
            f"resolution {resolution} is not a multiple of the bucket step {step}: use {near or 'a step > 0'}"
        )
    minimum = max(step, (resolution // 2 if minimum is None else minimum) // step * step)
    maximum = ceil((resolution * 2 if maximum is None else maximum) / step) * step
    if not minimum <= resolution <= maximum:
        raise ValueError(f"bucket sides {minimum} to {maximum} leave out the resolution {resolution}: widen them")
    sizes = {(resolution, resolution)}
    for width in range(minimum, maximum + 1, step):
        height = min(maximum, resolution**2 // width // step * step)
        if height >= minimum:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def assign(width: int, height: int, buckets: Sequence[Size], rule: Rule = "kohya") -> Size:
    """The bucket for a picture: its own size if that is one, else by the rule.

    Of equally good buckets the narrowest, then lowest, wins, in any order; by "least_crop" the one with the largest
    area.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width}×{height} pixels has no area: leave it out")
    if rule not in get_args(Rule):
        raise ValueError(f"there is no rule {rule!r} for buckets: use {', '.join(get_args(Rule))}")
    if rule == "no_upscale":
        return _own(width, height, buckets).size
    if (width, height) in buckets:
        return (width, height)
    shape = width / height
    if rule == "least_crop":  # the share kept is the smaller aspect ratio over the larger
        kept = lambda s: min(s[0] / s[1] / shape, shape / (s[0] / s[1]))  # noqa: E731
        return max(_finer(tuple(buckets)), key=lambda s: (kept(s), s[0] * s[1]))
    return min(sorted(buckets), key=lambda s: abs(s[0] / s[1] - shape))


def fit_one(width: int, height: int, buckets: Sequence[Size], rule: Rule = "kohya") -> Fit:
    """Cover the picture's bucket with the least scaling, then cut off both ends evenly."""
    size = assign(width, height, buckets, rule)
    return _own(width, height, buckets) if rule == "no_upscale" else _cover(width, height, size)


@dataclass(frozen=True)
class Buckets:
    """The bucket settings of a run.

    Attributes:
        resolution: side of the square bucket, a multiple of `step`.
        step: every side is a multiple of it; it must be a multiple of the base's VAE factor times its UNet's.
        rule: how a picture's bucket is chosen.
        minimum: shortest side, rounded down to a multiple of `step`; half the resolution by default. The limits are
            ignored by "no_upscale", as in kohya's trainer.
        maximum: longest side, rounded up to a multiple of `step`; twice the resolution by default.
    """

    resolution: int = 512
    step: int = 64
    rule: Rule = "kohya"
    minimum: int | None = None
    maximum: int | None = None

    def sizes(self) -> list[Size]:
        """All bucket sizes; errors as `bucket_sizes`."""
        limits = (None, None) if self.rule == "no_upscale" else (self.minimum, self.maximum)
        return bucket_sizes(self.resolution, step=self.step, minimum=limits[0], maximum=limits[1])

    def fit(self, dimensions: Sequence[Size]) -> list[Fit]:
        """How each picture, of this width and height, gets into its bucket; errors as `sizes`, `fit_one`."""
        sizes = self.sizes()
        return [fit_one(width, height, sizes, self.rule) for width, height in dimensions]


DEFAULT = Buckets()


def _cover(width: int, height: int, size: Size) -> Fit:
    w, h = size
    if width * h > w * height:  # wider than its bucket: the height decides
        scaled = ((2 * width * h + height) // (2 * height), h)  # rounded half up
    else:
        scaled = (w, (2 * height * w + width) // (2 * width))
    return _centred(size, scaled)


def _centred(size: Size, scaled: Size) -> Fit:
    return Fit(size, scaled, ((scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2))


def _grid(buckets: Sequence[Size]) -> tuple[int, int]:
    """(step, area in pixels) of a list of buckets."""
    return gcd(*(side for size in buckets for side in size)), max(w * h for w, h in buckets)


@lru_cache
def _finer(buckets: tuple[Size, ...]) -> list[Size]:
    """Every size on the grid and within the limits of these buckets, with at least three quarters of their area."""
    step, area = _grid(buckets)
    sides = range(min(map(min, buckets)), max(map(max, buckets)) + 1, step)
    return [(w, h) for w in sides for h in sides if 0.75 * area <= w * h <= area]


def _own(width: int, height: int, buckets: Sequence[Size]) -> Fit:
    """The fit by the rule "no_upscale": kohya's arithmetic, which uses only the buckets' area and step.

    Only a picture with a side below one step is enlarged; kohya's trainer stops on it.
    """
    step, area = _grid(buckets)
    scaled, shape = (width, height), width / height

    def down(side: float) -> int:
        return max(step, int(side) // step * step)

    if width * height > area:
        across = sqrt(area * shape)
        w, h = down(across + 0.5), down(area / across + 0.5)
        shape_by_width, shape_by_height = w / down(w / shape + 0.5), down(h * shape + 0.5) / h
        if abs(shape_by_width - shape) < abs(shape_by_height - shape):
            scaled = (w, int(w / shape + 0.5))
        else:
            scaled = (int(h * shape + 0.5), h)
    size = (down(scaled[0]), down(scaled[1]))
    return _centred(size, scaled) if min(scaled) >= step else _cover(width, height, size)


def crop_picture(image: Image.Image, fit: Fit) -> np.ndarray:
    """An RGB picture (from `open_picture`) resized and cropped into its bucket: uint8, shape (H, W, 3).

    Pillow's Lanczos filter widens with the scale, so a reduced picture is antialiased.

    Raises:
        ValueError: the picture is not RGB, or has another aspect ratio than `fit`.
    """
    if image.mode != "RGB":
        raise ValueError(f"a picture in mode {image.mode} cannot be cropped: open it with dataset.open_picture")
    (width, height), (sw, sh) = image.size, fit.scaled
    if 2 * abs(sw * height - sh * width) > max(width, height):  # a picture lying on its side would be squeezed
        raise ValueError(
            f"{image.size} pixels do not scale to {fit.scaled}: make the fit from the opened picture's size"
        )
    if image.size != fit.scaled:
        image = image.resize(fit.scaled, Image.Resampling.LANCZOS)
    (left, top), (w, h) = fit.crop, fit.size
    return np.array(image.crop((left, top, left + w, top + h)))


def epoch_batches(
    sizes_by_picture: Sequence[Size], repeats: Sequence[int], batch_size: int, *, seed: int, epoch: int
) -> list[list[int]]:
    """One epoch: batches of picture indices, each index `repeats` times, no batch with two sizes.

    The last batch of a bucket may be short. The order depends only on the arguments.

    Args:
        sizes_by_picture: the bucket of each picture.
        repeats: how often each picture appears, 0 or more.
        batch_size: pictures in a full batch.
        seed: the run's seed, 0 or more.
        epoch: number of the epoch, 0 or more; each has its own order.
    """
    _check(sizes_by_picture, repeats, batch_size)
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed {seed} and epoch {epoch} must not be negative")
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,)))

    def shuffled(items: list) -> list:
        # NumPy keeps its raw bits in all releases, but may change how Generator.permutation uses them.
        return [items[i] for i in np.argsort(bits.random_raw(len(items)), kind="stable")] if items else []

    by_size: dict[Size, list[int]] = {size: [] for size in sorted(set(sizes_by_picture))}
    for index in shuffled([index for index, times in enumerate(repeats) for _ in range(times)]):
        by_size[sizes_by_picture[index]].append(index)
    return shuffled(
        [indices[at : at + batch_size] for indices in by_size.values() for at in range(0, len(indices), batch_size)]
    )


def steps_per_epoch(sizes_by_picture: Sequence[Size], repeats: Sequence[int], batch_size: int) -> int:
    """The number of batches of `epoch_batches` (micro-batches, before gradient accumulation)."""
    _check(sizes_by_picture, repeats, batch_size)
    counts: Counter[Size] = Counter()
    for size, times in zip(sizes_by_picture, repeats, strict=True):
        counts[size] += times
    return sum(ceil(count / batch_size) for count in counts.values())


def _check(sizes_by_picture: Sequence[Size], repeats: Sequence[int], batch_size: int) -> None:
    """Raise ValueError for arguments that would drop or duplicate pictures silently."""
    if len(sizes_by_picture) != len(repeats):
        raise ValueError(
            f"{len(sizes_by_picture)} pictures but {len(repeats)} repeats: give one number for each picture"
        )
    if batch_size < 1 or min(repeats, default=0) < 0:
        raise ValueError(
            f"batch size {batch_size} must be at least 1 and no repeats below 0: {min(repeats, default=0)}"
        )
