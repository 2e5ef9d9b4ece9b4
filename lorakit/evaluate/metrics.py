"""What can be measured of pictures made with a LoRA: plain functions of pictures and of vectors that stand for them.

Vectors are unit vectors as `eyes` gives them, so that a product of two is their cosine. What is compared was made of
the same prompts and seeds: row i of one array belongs to row i of the other.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

NEAREST = 1 / 3  # of the training pictures that a picture is compared with
TWINS = 0.99  # cosine from which two training pictures are the same one
DARK, LIGHT = 4, 251  # levels of 255 from which a colour counts as clipped


# ── Vectors ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def likeness(pictures: np.ndarray, training: np.ndarray) -> np.ndarray:
    """How like the training pictures each picture is, (N,): mean cosine to the third of them that is nearest.

    A third, because a set shows its subject from many sides, and no picture is like all of them.
    """
    return _nearest(pictures @ training.T)


def likeness_within(training: np.ndarray) -> np.ndarray:
    """`likeness` of each training picture to the others, (M,): what a perfect LoRA would reach."""
    cosines = training @ training.T
    others = cosines[~np.eye(len(training), dtype=bool)].reshape(len(training), -1)
    return _nearest(others)


def _nearest(cosines: np.ndarray) -> np.ndarray:
    count = max(1, round(cosines.shape[1] * NEAREST))
    return np.sort(cosines, 1)[:, -count:].mean(1)


def gain(with_it: np.ndarray, without: np.ndarray, within: np.ndarray) -> float:
    """How far likeness went from the bare base's (0) to that of the training pictures among themselves (1)."""
    return float((with_it.mean() - without.mean()) / max(within.mean() - without.mean(), 1e-6))


def hits(with_it: np.ndarray, without: np.ndarray, within: np.ndarray) -> float:
    """Share of pictures more than half of the way from the bare base's likeness to the training pictures' own."""
    return float((with_it > (without.mean() + within.mean()) / 2).mean())


def chance(with_it: np.ndarray, without: np.ndarray, draws: int = 4999) -> float:
    """How probable so much more likeness is where the LoRA does nothing: the control, with labels shuffled.

    In every pair it is drawn anew which of the two pictures counts as made with the LoRA (a paired permutation test).

    Args:
        with_it, without: likeness of the same prompts and seeds, (N,).
    """
    differences = with_it - without
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (draws, len(differences)))
    return float((1 + ((signs * differences).mean(1) >= differences.mean() - 1e-12).sum()) / (1 + draws))


def unevenness(with_it: np.ndarray, without: np.ndarray, within: np.ndarray) -> float:
    """How much likeness differs from subject to subject, as a share of the base's way to the training pictures."""
    return float(with_it.std() / max(within.mean() - without.mean(), 1e-6))


def spread(vectors: np.ndarray) -> float:
    """How unlike pictures are to each other: mean of 1 less the cosine over all pairs."""
    count = len(vectors)
    return float(1 - (np.square(vectors.sum(0)).sum() - count) / max(count * (count - 1), 1))


def leak(
    with_it: np.ndarray, without: np.ndarray, bare_with: np.ndarray, bare_without: np.ndarray, within: np.ndarray
) -> float:
    """How much likeness comes without the trigger, against what comes with it: 0 none, 1 as much.

    Where next to none comes with it, against a quarter of the way to the training pictures' own.

    Args:
        with_it, without: likeness with the trigger, (N,).
        bare_with, bare_without: the same without it, (N,).
        within: that of the training pictures among themselves, (M,).
    """
    whole = max(with_it.mean() - without.mean(), (within.mean() - without.mean()) / 4, 1e-6)
    return float((bare_with.mean() - bare_without.mean()) / whole)


def adherence(pictures: np.ndarray, texts: np.ndarray) -> float:
    """How much nearer pictures are to their own prompts than to each other's: mean difference of cosines."""
    cosines = pictures @ texts.T
    own = np.diag(cosines)
    others = (cosines.sum(1) - own) / max(len(cosines) - 1, 1)
    return float((own - others).mean())


def change(with_it: np.ndarray, without: np.ndarray) -> float:
    """How much pictures change: mean of 1 less the cosine."""
    return float((1 - (with_it * without).sum(1)).mean())


def nearest(pictures: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The training picture that each picture is nearest to, (N,), and its cosine, (N,)."""
    cosines = pictures @ training.T
    return cosines.argmax(1), cosines.max(1)


def too_near(training: np.ndarray, without: np.ndarray) -> float:
    """The cosine from which a picture repeats a training picture.

    That is 15 % of the way from the nearest that two training pictures are, or that the bare base comes to one, to the
    same picture; what is nearest of all is not taken for the rule in either, and a picture that is there twice counts
    once.
    """
    cosines = training @ training.T
    once = [i for i in range(len(training)) if not (cosines[i, :i] > TWINS).any()]
    if len(once) <= len(training) / 2:  # they are all that much alike
        once = list(range(len(training)))
    among = cosines[np.ix_(once, once)] - 2 * np.eye(len(once))
    usual = max(float(np.quantile(values, 0.98)) for values in (among.max(1), nearest(without, training)[1]))
    return usual + 0.15 * (1 - usual)


def rises(values: Sequence[float]) -> float:
    """Whether values rise with their order: Kendall's share of pairs that do, less those that fall; 1 for always."""
    pairs = [np.sign(later - earlier) for i, earlier in enumerate(values) for later in values[i + 1 :]]
    return float(np.mean(pairs)) if pairs else 0.0


# ── Pictures ────────────────────────────────────────────────────────────────────────────────────────────────────────


def arrays(pictures: Sequence[Image.Image]) -> Iterator[np.ndarray]:
    """RGB in [0, 255], (H, W, 3), float32, one at a time."""
    return (np.asarray(picture.convert("RGB"), np.float32) for picture in pictures)


def broken(pictures: Sequence[Image.Image]) -> float:
    """Share of pictures of one colour, as NaN and overflow leave them."""
    return float(np.mean([array.std((0, 1)).max() < 2 for array in arrays(pictures)]))


def colours(pictures: Sequence[Image.Image]) -> np.ndarray:
    """Mean and spread of lightness, red–green and blue–yellow of each picture, (N, 6), in levels of 255."""
    found = []
    for array in arrays(pictures):
        red, green, blue = array.reshape(-1, 3).T
        opposed = np.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue])
        found.append(np.concatenate([opposed.mean(1), opposed.std(1)]))
    return np.array(found)


def colour_shift(with_it: np.ndarray, without: np.ndarray, training: np.ndarray | None) -> float:
    """How far colours went beyond both the base's and the training pictures', in the greater of their deviations.

    Args:
        with_it, without, training: `colours` of each. What lies between base and training was asked for; None measures
            by the base alone.
    """
    own = without if training is None else training
    low, high = (pick(without.mean(0), own.mean(0)) for pick in (np.minimum, np.maximum))
    found = with_it.mean(0)
    beyond = np.maximum(found - high, 0) + np.maximum(low - found, 0)
    usual = np.maximum(own.std(0), without.std(0)).clip(4)  # pictures of one colour are no measure for themselves
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
    found = []
    for array in arrays(pictures):
        grey = array.mean(2)
        padded = np.pad(grey, 1, "edge")
        around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
        found.append(np.abs(around - 4 * grey).mean())
    return float(np.mean(found))


def difference(with_it: Sequence[Image.Image], without: Sequence[Image.Image]) -> float:
    """Mean absolute difference of pixels, in levels of 255."""
    pairs = zip(arrays(with_it), arrays(without), strict=True)
    return float(np.mean([np.abs(one - other).mean() for one, other in pairs]))
