"""Measures of pictures made with a LoRA (`lora`) and without it (`base`), from pixels or from vectors.

Vectors are unit vectors as `vision` gives them, so that a product of two is their cosine. Both sides are made from the
same prompts and seeds: row i of one array belongs to row i of the other.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

NEAREST = 1 / 3  # share of the training pictures that a picture is compared with
TWINS = 0.99  # cosine above which two training pictures are the same one
DARK, LIGHT = 4, 251  # levels of 255 from which a colour counts as clipped


def likeness(pictures: np.ndarray, training: np.ndarray) -> np.ndarray:
    """How like the training pictures each picture is, (N,): mean cosine to the nearest third of them.

    Only a third, because a set shows its subject from many sides, and no picture is like all of them.
    """
    return _nearest(pictures @ training.T)


def likeness_within(training: np.ndarray) -> np.ndarray:
    """`likeness` of each training picture to the others, (M,): what a perfect LoRA reaches."""
    others = ~np.eye(len(training), dtype=bool)
    return _nearest((training @ training.T)[others].reshape(len(training), -1))


def _nearest(cosines: np.ndarray) -> np.ndarray:
    count = max(1, round(cosines.shape[1] * NEAREST))
    return np.sort(cosines, 1)[:, -count:].mean(1)


def gain(lora: np.ndarray, base: np.ndarray, within: np.ndarray) -> float:
    """Likeness on the way from the bare base's (0) to that of the training pictures among themselves (1)."""
    return float((lora.mean() - base.mean()) / max(within.mean() - base.mean(), 1e-6))


def hits(lora: np.ndarray, base: np.ndarray, within: np.ndarray) -> float:
    """Share of pictures more than half of the way from the bare base's likeness to the training pictures' own."""
    return float((lora > (base.mean() + within.mean()) / 2).mean())


def chance(lora: np.ndarray, base: np.ndarray, draws: int = 4999) -> float:
    """How probable the gain in likeness is if the LoRA does nothing: a paired permutation test.

    Each draw chooses at random, in every pair, which of the two pictures counts as made with the LoRA.
    """
    differences = lora - base
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (draws, len(differences)))
    return float((1 + ((signs * differences).mean(1) >= differences.mean() - 1e-12).sum()) / (1 + draws))


def unevenness(lora: np.ndarray, base: np.ndarray, within: np.ndarray) -> float:
    """How much likeness differs from subject to subject, as a share of the base's way to the training pictures."""
    return float(lora.std() / max(within.mean() - base.mean(), 1e-6))


def spread(vectors: np.ndarray) -> float:
    """How unlike each other pictures are: mean of 1 less the cosine over all pairs."""
    count = len(vectors)
    return float(1 - (np.square(vectors.sum(0)).sum() - count) / max(count * (count - 1), 1))


def leak(
    lora: np.ndarray, base: np.ndarray, untriggered_lora: np.ndarray, untriggered_base: np.ndarray, within: np.ndarray
) -> float:
    """Gain in likeness without the trigger, as a share of the gain with it: 0 none, 1 as much.

    All are likenesses. The gain with the trigger counts at least a quarter of the way to the training pictures' own.
    """
    whole = max(lora.mean() - base.mean(), (within.mean() - base.mean()) / 4, 1e-6)
    return float((untriggered_lora.mean() - untriggered_base.mean()) / whole)


def adherence(pictures: np.ndarray, texts: np.ndarray) -> float:
    """How much nearer pictures are to their own prompts than to each other's: mean difference of cosines."""
    cosines = pictures @ texts.T
    matching = np.diag(cosines)
    others = (cosines.sum(1) - matching) / max(len(cosines) - 1, 1)
    return float((matching - others).mean())


def change(lora: np.ndarray, base: np.ndarray) -> float:
    """How much pictures change: mean of 1 less the cosine."""
    return float((1 - (lora * base).sum(1)).mean())


def nearest(pictures: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the training picture nearest to each picture, (N,), and its cosine, (N,)."""
    cosines = pictures @ training.T
    return cosines.argmax(1), cosines.max(1)


def too_near(training: np.ndarray, base: np.ndarray) -> float:
    """The cosine from which a picture repeats a training picture.

    It is 15 % of the way from the usual highest cosine, between two training pictures or between one and a picture of
    the bare base, to 1. The highest 2 % of either are ignored, and a training picture that occurs twice counts once.
    """
    cosines = training @ training.T
    once = [i for i in range(len(training)) if not (cosines[i, :i] > TWINS).any()]
    if len(once) <= len(training) / 2:  # all are much alike
        once = list(range(len(training)))
    among = cosines[np.ix_(once, once)] - 2 * np.eye(len(once))
    usual = max(float(np.quantile(values, 0.98)) for values in (among.max(1), nearest(base, training)[1]))
    return usual + 0.15 * (1 - usual)


def rises(values: Sequence[float]) -> float:
    """Whether values rise in their order: share of pairs that rise, less those that fall (Kendall); 1 is always."""
    pairs = [np.sign(later - earlier) for i, earlier in enumerate(values) for later in values[i + 1 :]]
    return float(np.mean(pairs)) if pairs else 0.0


def arrays(pictures: Sequence[Image.Image]) -> Iterator[np.ndarray]:
    """RGB in [0, 255], (H, W, 3), float32, one at a time."""
    return (np.asarray(picture.convert("RGB"), np.float32) for picture in pictures)


def broken(pictures: Sequence[Image.Image]) -> float:
    """Share of pictures of a single colour, as NaN and overflow leave them."""
    return float(np.mean([array.std((0, 1)).max() < 2 for array in arrays(pictures)]))


def colours(pictures: Sequence[Image.Image]) -> np.ndarray:
    """Mean and spread of lightness, red–green and blue–yellow of each picture, (N, 6), in levels of 255."""
    values = []
    for array in arrays(pictures):
        red, green, blue = array.reshape(-1, 3).T
        opposed = np.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue])
        values.append(np.concatenate([opposed.mean(1), opposed.std(1)]))
    return np.array(values)


def colour_shift(lora: np.ndarray, base: np.ndarray, training: np.ndarray | None) -> float:
    """How far `colours` lie beyond both the base's and the training pictures', in the greater of their deviations.

    Those between base and training pictures are intended. Without training pictures, only the base's count.
    """
    reference = base if training is None else training
    low, high = (pick(base.mean(0), reference.mean(0)) for pick in (np.minimum, np.maximum))
    mean = lora.mean(0)
    beyond = np.maximum(mean - high, 0) + np.maximum(low - mean, 0)
    usual = np.maximum(reference.std(0), base.std(0)).clip(4)  # pictures of one colour have no deviation
    return float(np.sqrt(np.mean(np.square(beyond / usual))))


def clipped(pictures: Sequence[Image.Image]) -> float:
    """Share of pixels in which a colour is at its limit while another is not: burned-in colours, not black or white."""
    shares = []
    for array in arrays(pictures):
        low, high = array.min(2), array.max(2)
        shares.append((((low <= DARK) & (high > 60)) | ((high >= LIGHT) & (low < 195))).mean())
    return float(np.mean(shares))


def residue(pictures: Sequence[Image.Image]) -> float:
    """Strength of the finest detail, noise and halos: mean absolute Laplacian, in levels of 255."""
    values = []
    for array in arrays(pictures):
        grey = array.mean(2)
        padded = np.pad(grey, 1, "edge")
        around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
        values.append(np.abs(around - 4 * grey).mean())
    return float(np.mean(values))


def difference(lora: Sequence[Image.Image], base: Sequence[Image.Image]) -> float:
    """Mean absolute difference of pixels, in levels of 255."""
    pairs = zip(arrays(lora), arrays(base), strict=True)
    return float(np.mean([np.abs(one - other).mean() for one, other in pairs]))
