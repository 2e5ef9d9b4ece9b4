"""Validation loss on held-out pictures with fixed noise, the gap that shows overfitting, and advice from the curve.

The loss of a training step depends more on its random timestep than on the adapter. The validation loss always uses
the same pictures, noise and timesteps, with the adapter and without.
"""

import hashlib
import os
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lorakit import adapter as adapters
from lorakit import sample
from lorakit.base import Base, Encoded
from lorakit.config import Config
from lorakit.dataset import Picture
from lorakit.train import loss
from lorakit.train.examples import Batch, Examples
from lorakit.train.loop import State, Step, batch_loss

TIMESTEPS = (100, 300, 500, 700, 900)  # for every picture
SEED = 20_231  # of the noise: not the run's seed, so that runs with different seeds are comparable
TOLERANCE = 0.01  # smallest significant difference, as a share of the lowest validation loss
PATIENCE = 3  # validations that must agree


def hold_out(
    digests: Sequence[str], share: float, seed: int, traits: Sequence[tuple[str, ...]] | None = None
) -> list[int]:
    """The places of the pictures to hold out, in order, chosen by content: adding one picture changes few others.

    Copies of one picture are held out together or not at all.

    Args:
        digests: of the pictures' contents.
        share: of all pictures; above 0 at least one is held out, and one is always left to train on.
        traits: of each picture, as `traits` returns them: the held-out pictures have each value of the first trait in
            proportion, within it each value of the second, and so on. None for a random choice.

    Source: the Sainte-Laguë method of distributing seats among parties; one more vote moves few seats.
    """
    if share <= 0:
        return []
    traits_of: dict[str, tuple[str, ...]] = {}
    for digest, values in zip(digests, traits or [()] * len(digests), strict=True):
        traits_of[digest] = min(values, traits_of.get(digest, values))  # for copies in two folders, in any order
    count = min(max(1, round(share * len(traits_of))), len(traits_of) - 1)
    chosen = set(_spread(traits_of, count, seed))
    return [place for place, digest in enumerate(digests) if digest in chosen]


def _spread(traits_of: dict[str, tuple[str, ...]], count: int, seed: int) -> list[str]:
    """`count` of the digests, with each value of their first trait in proportion, and so on within it."""

    def draw(digest: str) -> float:
        return np.random.default_rng([seed, int(digest[:12], 16)]).random()

    if not any(traits_of.values()):
        return sorted(traits_of, key=draw)[:count]
    parts: dict[str, dict[str, tuple[str, ...]]] = {}
    for digest, (first, *rest) in traits_of.items():
        parts.setdefault(first, {})[digest] = tuple(rest)
    ties = {name: draw(hashlib.sha256(os.fsencode(name)).hexdigest()) for name in parts}
    seats = dict.fromkeys(parts, 0)
    for _ in range(count):
        free = [name for name in parts if seats[name] < len(parts[name])]
        seats[max(free, key=lambda name: (len(parts[name]) / (2 * seats[name] + 1), ties[name]))] += 1
    return [digest for name, part in parts.items() for digest in _spread(part, seats[name], seed)]


def traits(pictures: Sequence[Picture]) -> list[tuple[str, ...]]:
    """The folder and shape of each picture, for `hold_out`."""
    ratios = [picture.width / picture.height for picture in pictures]
    shapes = ["wide" if ratio > 1.2 else "tall" if ratio < 1 / 1.2 else "square" for ratio in ratios]
    return [(picture.group or ".", shape) for picture, shape in zip(pictures, shapes, strict=True)]


def representative(held_out: Sequence[int], kinds: Sequence[tuple[str, ...]]) -> str:
    """Describe how many pictures of each folder and shape are held out, from the places and the traits of all."""
    parts = []
    for values in zip(*kinds, strict=True):
        if len(totals := Counter(values)) > 1:
            held = Counter(values[place] for place in held_out)
            parts.append(", ".join(f"{name} {held[name]} of {total}" for name, total in totals.most_common(6)))
    return "in proportion by folder and shape, then by digest: " + ("; ".join(parts) or "all of one kind")


def questions(pictures: Sequence[Encoded], examples: Examples) -> list[Batch]:
    """One batch per picture: its latents at each of TIMESTEPS, with fixed noise; masked as in training."""
    batches, n = [], len(TIMESTEPS)
    for number, picture in enumerate(pictures):
        noise = [torch.randn(picture.latents.shape, generator=loss.generator(SEED, number, k)) for k in range(n)]
        text = examples.texts[picture.caption]
        latents, embeddings, pooled, sizes, tokens = (
            x.expand(n, *x.shape) for x in (picture.latents, text.embeddings, text.pooled, picture.sizes, text.tokens)
        )
        mask = None if picture.mask is None else examples.cell_weights(picture).expand(n, *picture.mask.shape)
        timesteps = torch.tensor(TIMESTEPS)
        batches.append(Batch(latents, torch.stack(noise), timesteps, None, embeddings, pooled, sizes, tokens, mask))
    return batches


@torch.no_grad()
def measure(
    unet: Any, base: Base, batches: Sequence[Batch], config: Config, adapter: adapters.Adapter | None = None
) -> float:
    """The mean loss over batches, weighted as in training. Leaves the UNet and all randomness unchanged."""
    alphas = base.alphas_cumprod().to(unet.device)
    with sample.borrow(unet):
        return float(torch.stack([batch_loss(unet, base, alphas, item, config, adapter) for item in batches]).mean())


@dataclass(frozen=True)
class Validation:
    """Mean losses after a step."""

    step: int
    held_out: float  # on pictures not used for training
    held_out_base: float  # the same without the adapter
    trained: float  # on as many training pictures
    trained_base: float

    @property
    def gap(self) -> float:
        """The relative decrease of the loss on training pictures minus that on held-out ones.

        0: the adapter works as well for new pictures. 1: it works only for the training pictures (overfitting).
        """
        return self.held_out / self.held_out_base - self.trained / self.trained_base

    def facts(self) -> dict[str, float]:
        """Values for the log."""
        values = {
            "validation_loss": self.held_out, "validation_loss_base": self.held_out_base,
            "validation_loss_trained": self.trained, "overfit_gap": self.gap,
        }  # fmt: skip
        return {name: round(value, 6) for name, value in values.items()}


def validate_every(
    steps: int, unet: Any, base: Base, state: State, examples: Examples, held_out: Sequence[Encoded],
    report: Callable[[Validation], None],
) -> Callable[[Step], None]:  # fmt: skip
    """A listener that validates every `steps` steps, and at the last one.

    Args:
        examples: the training set, from which as many pictures as are held out are measured too, evenly spaced.
        held_out: pictures not used for training.
        report: called with each Validation.
    """
    trained = [picture for picture in examples.pictures if not picture.prior]
    places = np.linspace(0, len(trained) - 1, min(len(held_out), len(trained))).round().astype(int)
    sets = [questions(pictures, examples) for pictures in (held_out, [trained[i] for i in places])]
    base_losses: list[float] = []  # without the adapter, measured once

    def losses() -> list[float]:
        return [measure(unet, base, batches, examples.config, state.adapter) for batches in sets]

    def listener(step: Step) -> None:
        if step.number % steps and step.number != step.total:
            return
        with state.evaluated():
            if not base_losses:
                with adapters.strength(state.adapter, 0.0):
                    base_losses.extend(losses())
            held_out_loss, trained_loss = losses()
        report(Validation(step.number, held_out_loss, base_losses[0], trained_loss, base_losses[1]))

    return listener


@dataclass(frozen=True)
class Advice:
    """The state of a validation curve, and the best step."""

    state: str  # "early", "falling", "plateau" or "rising"
    best: int | None  # the step whose weights to keep; None without validations
    text: str

    def __str__(self) -> str:
        return self.text


def advise(steps: Sequence[int], losses: Sequence[float]) -> Advice:
    """Interpret a validation curve as the training guide does: falling: continue; plateau: done; rising: go back.

    Each loss is replaced by the median of itself and its neighbours; the best step has the lowest median. The curve is
    *rising* if the last PATIENCE medians, without the best, all exceed the best by more than TOLERANCE; a *plateau* if
    the last PATIENCE medians lower the minimum by less than TOLERANCE; else *falling*. Fewer than 2 × PATIENCE values
    are *early*. Values that are not finite count as infinite.

    Args:
        steps: ascending.
        losses: validation losses, one per step.
    """
    losses = [value if np.isfinite(value) else float("inf") for value in losses]
    smooth = [statistics.median(losses[max(0, i - 1) : i + 2]) for i in range(len(losses))]
    if not smooth:
        return Advice("early", None, "No validation yet.")
    lowest = min(range(len(smooth)), key=lambda i: (smooth[i], losses[i]))
    best = steps[lowest]
    if len(smooth) < 2 * PATIENCE:
        return Advice("early", best, f"Too few validations ({len(smooth)}) for advice; lowest so far at step {best}.")
    last, before = smooth[-PATIENCE:], min(smooth[:-PATIENCE])
    if lowest < len(smooth) - PATIENCE and all(value > smooth[lowest] * (1 + TOLERANCE) for value in last):
        return Advice("rising", best, f"Validation loss rises: overtraining. Go back to step {best}.")
    if min(last) > before * (1 - TOLERANCE):
        return Advice("plateau", best, f"Validation loss no longer falls: training is done. Best at step {best}.")
    return Advice("falling", best, f"Validation loss still falls: continue. Best so far at step {best}.")
