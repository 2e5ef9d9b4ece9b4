"""Compute a report's figures from its pictures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lorakit.evaluate import metrics
from lorakit.evaluate.pictures import FEWEST, STRENGTHS, PictureSet
from lorakit.evaluate.vision import VisionModel

LIMITS = {  # figure → where "good" ends, where "bad" begins: tests/bench/report_calibration.py
    "gain": (0.75, 0.5), "chance": (0.01, 0.05), "hits": (0.9, 0.8), "unevenness": (0.4, 0.6), "adherence": (0.75, 0.6),
    "variety": (0.7, 0.5), "copied": (0.05, 0.15), "gap": (0.7, 1.0), "shift": (0.5, 0.75), "clipped": (0.03, 0.1),
    "residue": (1.1, 1.3), "broken": (0.0, 0.02), "rises": (0.79, 0.4), "holds": (1.0, 0.7), "leak": (0.4, 0.75),
    "unrelated": (0.3, 0.6),
}  # fmt: skip
ARTIFACTS = ("broken", "shift", "clipped", "residue")
NO_ADHERENCE = 0.005  # the bare base's adherence up to which adherence cannot be measured
NO_DISTANCE = 0.01  # from the base's likeness to the training pictures' own, up to which likeness cannot be measured

Copy = tuple[Image.Image, Image.Image, float]  # made, training picture, cosine


@dataclass(frozen=True)
class Vectors:
    """A vision model's unit vectors of a `PictureSet`'s pictures, (N, D) for each list of pictures."""

    strengths: list[np.ndarray]
    reseeded: list[np.ndarray]
    untriggered: list[np.ndarray]  # empty without a trigger, like `unrelated`
    unrelated: list[np.ndarray]
    checkpoints: dict[int, np.ndarray]
    training: np.ndarray | None  # None where there are fewer than FEWEST
    texts: np.ndarray | None  # of the contexts; None where adherence cannot be measured by this model

    @classmethod
    def of(cls, pictures: PictureSet, model: VisionModel) -> "Vectors":
        embed, last = model.embed_pictures, pictures.strengths[-1]
        strengths = [embed(column) for column in pictures.strengths]
        pairs = pictures.reseeded, pictures.untriggered, pictures.unrelated
        reseeded, untriggered, unrelated = ([embed(column) for column in pair if column] for pair in pairs)
        checkpoints = {
            step: strengths[-1] if column is last else embed(column) for step, column in pictures.checkpoints.items()
        }
        training = embed(pictures.training) if len(pictures.training) >= FEWEST else None
        texts = model.embed_texts(pictures.prompts.contexts) if model.reads_texts else None
        if texts is not None and metrics.adherence(strengths[0], texts) <= NO_ADHERENCE:
            texts = None
        return cls(strengths, reseeded, untriggered, unrelated, checkpoints, training, texts)

    @property
    def base(self) -> np.ndarray:
        """The bare base's pictures of prompts with the trigger, (2N, D)."""
        return np.concatenate([self.strengths[0], self.reseeded[0]])

    @property
    def lora(self) -> np.ndarray:
        """The pictures of the same prompts and seeds with the LoRA at strength 1, (2N, D)."""
        return np.concatenate([self.strengths[-1], self.reseeded[1]])

    @property
    def has_likeness(self) -> bool:
        """Whether the bare base's pictures are less like the training pictures than these are like each other."""
        return self.training is not None and bool(self.within.mean() - self.likeness(self.base).mean() > NO_DISTANCE)

    @property
    def within(self) -> np.ndarray:
        """Likeness of each training picture to the others, (M,)."""
        assert self.training is not None
        return metrics.likeness_within(self.training)

    def likeness(self, vectors: np.ndarray) -> np.ndarray:
        assert self.training is not None
        return metrics.likeness(vectors, self.training)

    def adherence(self, vectors: np.ndarray) -> float:
        """Adherence of pictures to the contexts, relative to the bare base's."""
        assert self.texts is not None
        return metrics.adherence(vectors, self.texts) / metrics.adherence(self.strengths[0], self.texts)


def measure(pictures: PictureSet, vectors: Vectors | None) -> tuple[dict[str, float], tuple[Copy, ...]]:
    """Figures by name, and the pictures that repeat a training picture; None leaves out what needs vectors."""
    figures = _artifacts(pictures) | _by_change(pictures, metrics.difference)
    known = {"gap": pictures.gap, "called": pictures.prompts.trigger_share}
    figures |= {name: value for name, value in known.items() if value is not None}
    copies: tuple[Copy, ...] = ()
    if vectors:
        figures |= _by_change(vectors, metrics.change)
        if vectors.texts is not None:
            columns = zip(STRENGTHS, vectors.strengths, strict=True)
            figures |= {f"adherence {strength:g}": vectors.adherence(column) for strength, column in columns}
            figures["adherence"] = figures["adherence 1"]
        if vectors.has_likeness:
            figures |= _by_likeness(vectors)
        if vectors.training is not None:
            figures["variety"] = metrics.spread(vectors.lora) / max(metrics.spread(vectors.training), 1e-6)
            figures["copied"], copies = _copied(pictures, vectors, vectors.training)
    figures["holds"] = _holds(figures)
    return figures, copies


def _artifacts(pictures: PictureSet) -> dict[str, float]:
    """The figures of artifacts, also at each strength ("shift 0.5")."""
    base, training = pictures.strengths[0], pictures.training
    references = [base, training] if training else [base]
    training_colours = metrics.colours(training) if training else None
    base_colours = metrics.colours(base + pictures.reseeded[0])
    base_clipped = max(map(metrics.clipped, references))
    base_residue = max(*map(metrics.residue, references), 1e-6)
    figures: dict[str, float] = {}
    for strength, column in zip(STRENGTHS, pictures.strengths, strict=True):
        column = column + pictures.reseeded[1] if strength == 1 else column
        figures |= {
            f"broken {strength:g}": metrics.broken(column),
            f"shift {strength:g}": metrics.colour_shift(metrics.colours(column), base_colours, training_colours),
            f"clipped {strength:g}": metrics.clipped(column) - base_clipped,
            f"residue {strength:g}": metrics.residue(column) / base_residue,
        }
    return figures | {name: figures[f"{name} 1"] for name in ARTIFACTS}


def _by_change(shown: PictureSet | Vectors, change: Callable[..., float]) -> dict[str, float]:
    """Figures that need no training pictures, from a measure of change between pictures or between their vectors."""
    columns: Any = shown.strengths
    changes = [change(column, columns[0]) for column in columns]
    figures = {"rises": metrics.rises(changes)}
    if any(map(len, shown.untriggered)):
        figures["leak"] = change(*shown.untriggered) / max(changes[-1], 1e-6)
        figures["unrelated"] = change(*shown.unrelated) / max(change(columns[0], shown.reseeded[0]), 1e-6)
    return figures


def _by_likeness(vectors: Vectors) -> dict[str, float]:
    """Figures of likeness to the training pictures."""
    within, by_strength = vectors.within, [vectors.likeness(column) for column in vectors.strengths]
    base, lora = vectors.likeness(vectors.base), vectors.likeness(vectors.lora)
    figures = {
        "gain": metrics.gain(lora, base, within), "hits": metrics.hits(lora, base, within),
        "chance": metrics.chance(lora, base), "unevenness": metrics.unevenness(lora, base, within),
        "rises": metrics.rises([values.mean() for values in by_strength]),
    }  # fmt: skip
    if vectors.untriggered:
        bare_base, bare_lora = map(vectors.likeness, vectors.untriggered)
        figures["leak"] = metrics.leak(by_strength[-1], by_strength[0], bare_lora, bare_base, within)
    return figures


def _copied(pictures: PictureSet, vectors: Vectors, training: np.ndarray) -> tuple[float, tuple[Copy, ...]]:
    """Share of pictures that repeat a training picture; the nearest four of them."""
    made = pictures.strengths[-1] + pictures.reseeded[1]
    places, cosines = metrics.nearest(vectors.lora, training)
    repeated = cosines > metrics.too_near(training, vectors.base)
    nearest = [i for i in np.argsort(-cosines)[:4] if repeated[i]]
    return float(repeated.mean()), tuple((made[i], pictures.training[places[i]], float(cosines[i])) for i in nearest)


def _holds(figures: Mapping[str, float]) -> float:
    """The highest strength up to which nothing breaks."""
    held = 0.0
    for strength in STRENGTHS[1:]:
        broken = any(figures[f"{name} {strength:g}"] > LIMITS[name][1] for name in ARTIFACTS)
        if broken or figures.get(f"adherence {strength:g}", 1.0) < LIMITS["adherence"][1]:
            break
        held = strength
    return held
