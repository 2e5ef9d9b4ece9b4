"""A loss that means something: held-out pictures under fixed noise, the overfit dial, and advice from the curve.

The loss of a training step says little: it depends on the timestep that was drawn far more than on what was learned.
Here the same pictures are always asked the same questions, with the adapter and without.
"""

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorakit import adapter as adapters
from lorakit import sample
from lorakit.base import Base, Encoded, Text
from lorakit.config import Config
from lorakit.dataset import Picture
from lorakit.train import loop, loss
from lorakit.train.loop import Batch, State, Step

TIMESTEPS = (100, 300, 500, 700, 900)  # asked of every picture
SEED = 20_231  # of the questions' noise: never the run's own, so that runs with other seeds compare
TOLERANCE = 0.01  # share of the lowest validation loss by which a later one must differ to count
PATIENCE = 3  # validations that must agree


def hold_out(
    digests: Sequence[str], share: float, seed: int, traits: Sequence[tuple[str, ...]] | None = None
) -> list[int]:
    """Which pictures are kept from training, by their contents: adding one picture exchanges very few others.

    Args:
        digests: of the pictures' contents.
        share: of all pictures; above 0 at least one is held out, and one is always left to train on.
        traits: of each picture, what the held-out ones are to have as often as all: first by the first trait, within
            each of its values by the second, and so on; as `traits` gives them. None leaves the choice to chance.

    Returns:
        Their places, in order. Copies of one picture are held out together or not at all.

    Source: the quotients of Sainte-Laguë, which give seats to parties; with one voter more, few seats change hands.
    """
    if share <= 0:
        return []
    kinds: dict[str, tuple[str, ...]] = {}
    for digest, kind in zip(digests, traits or [()] * len(digests), strict=True):
        kinds[digest] = min(kind, kinds.get(digest, kind))  # copies in two folders: the same, whatever their order
    count = min(max(1, round(share * len(kinds))), len(kinds) - 1)
    chosen = set(_spread(kinds, count, seed))
    return [place for place, digest in enumerate(digests) if digest in chosen]


def _spread(kinds: dict[str, tuple[str, ...]], count: int, seed: int) -> list[str]:
    """So many of the digests, each value of their first trait with its share of them, and so on within it."""
    chance = lambda text: np.random.default_rng([seed, int(text[:12], 16)]).random()  # noqa: E731
    if not any(kinds.values()):
        return sorted(kinds, key=chance)[:count]
    parts: dict[str, dict[str, tuple[str, ...]]] = {}
    for digest, (first, *rest) in kinds.items():
        parts.setdefault(first, {})[digest] = tuple(rest)
    ties = {name: chance(hashlib.sha256(name.encode()).hexdigest()) for name in parts}
    seats = dict.fromkeys(parts, 0)
    for _ in range(count):
        free = [name for name in parts if seats[name] < len(parts[name])]
        seats[max(free, key=lambda name: (len(parts[name]) / (2 * seats[name] + 1), ties[name]))] += 1
    return [digest for name, part in parts.items() for digest in _spread(part, seats[name], seed)]


def traits(pictures: Sequence[Picture]) -> list[tuple[str, ...]]:
    """Of each picture its folder and its shape: what `hold_out` spreads its choice over."""
    ratios = [picture.width / picture.height for picture in pictures]
    shapes = ["wide" if ratio > 1.2 else "tall" if ratio < 1 / 1.2 else "square" for ratio in ratios]
    return [(picture.group or ".", shape) for picture, shape in zip(pictures, shapes, strict=True)]


def representative(held_out: Sequence[int], kinds: Sequence[tuple[str, ...]]) -> str:
    """Say what was held out of each kind, and that this is its share.

    Args:
        held_out: places, as `hold_out` gives them.
        kinds: the traits of all pictures.
    """
    lines = []
    for trait in zip(*kinds, strict=True):
        if len(all_of := Counter(trait)) > 1:
            held = Counter(trait[place] for place in held_out)
            lines.append(", ".join(f"{name} {held[name]} of {n}" for name, n in all_of.most_common(6)))
    what = "; ".join(lines) or "all of one kind"
    return f"chosen to stand for all, by folder and shape in proportion and else by digest: {what}"


def questions(pictures: Sequence[Encoded], texts: dict[str, Text], config: Config) -> list[Batch]:
    """One batch a picture: its latents at each of TIMESTEPS, with noise that never changes; masked as in training."""
    asked, n = [], len(TIMESTEPS)
    for number, picture in enumerate(pictures):
        noise = [torch.randn(picture.latents.shape, generator=loss.generator(SEED, number, k)) for k in range(n)]
        text = texts[picture.caption]
        repeat = lambda x: x.expand(n, *x.shape)  # noqa: E731
        asked.append(
            Batch(
                repeat(picture.latents),
                torch.stack(noise),
                torch.tensor(TIMESTEPS),
                None,
                repeat(text.embeddings),
                repeat(text.pooled),
                repeat(picture.sizes),
                repeat(text.tokens),
                None if picture.mask is None else repeat(loop.counted(picture, config)),
            )
        )
    return asked


@torch.no_grad()
def measure(unet, base: Base, asked: Sequence[Batch], config: Config, adapter: adapters.Adapter | None = None) -> float:
    """The mean loss over questions, weighted as in training. Leaves the UNet and all randomness as they were."""
    alphas = base.alphas_cumprod().to(unet.device)
    with sample.borrow(unet):
        return float(torch.stack([loop.batch_loss(unet, base, alphas, item, config, adapter) for item in asked]).mean())


@dataclass(frozen=True)
class Validation:
    """What the fixed questions gave after a step."""

    step: int
    held_out: float  # mean loss on pictures that are not trained on
    held_out_base: float  # the same without the adapter
    trained: float  # on as many that are
    trained_base: float

    @property
    def gap(self) -> float:
        """The overfit dial: how much more of the base's loss is gone on trained pictures than on held-out ones.

        0: what was learned holds for new pictures as well. 1: it holds for the trained ones alone.
        """
        return self.held_out / self.held_out_base - self.trained / self.trained_base

    def facts(self) -> dict[str, float]:
        """For the log."""
        values = {
            "validation_loss": self.held_out, "validation_loss_base": self.held_out_base,
            "validation_loss_trained": self.trained, "overfit_gap": self.gap,
        }  # fmt: skip
        return {name: round(value, 6) for name, value in values.items()}


def validate_every(
    steps: int, unet, state: State, base: Base, held_out: Sequence[Encoded], trained: Sequence[Encoded],
    texts: dict[str, Text], config: Config, tell: Callable[[Validation], None],
) -> Callable[[Step], None]:  # fmt: skip
    """A listener that asks the fixed questions every so many steps, and at the last one.

    Args:
        held_out: the pictures that are not trained on.
        trained: those that are; as many of them as are held out are asked, spread over all.
        tell: gets each Validation.
    """
    places = np.linspace(0, len(trained) - 1, min(len(held_out), len(trained))).round().astype(int)
    asked = [questions(some, texts, config) for some in (held_out, [trained[i] for i in places])]
    bare: list[float] = []  # of the base alone: asked once

    def listener(step: Step) -> None:
        if step.number % steps and step.number != step.total:
            return
        with state.evaluated():
            if not bare:
                with adapters.strength(state.adapter, 0.0):
                    bare.extend(measure(unet, base, some, config, state.adapter) for some in asked)
            now = [measure(unet, base, some, config, state.adapter) for some in asked]
        tell(Validation(step.number, now[0], bare[0], now[1], bare[1]))

    return listener


@dataclass(frozen=True)
class Advice:
    """What a validation curve says."""

    state: str  # "early", "falling", "plateau" or "rising"
    best: int | None  # the step whose weights to keep
    text: str

    def __str__(self) -> str:
        return self.text


def advise(steps: Sequence[int], losses: Sequence[float]) -> Advice:
    """Read a validation curve the way the training guide does: falling, good; plateau, done; rising, go back.

    The rule: each loss is replaced by the median of itself and its neighbours. The best step is the lowest of these.
    It is *rising* when the last PATIENCE of them, the best not among them, all lie more than TOLERANCE above the best;
    a *plateau* when the last PATIENCE brought the best down by less than TOLERANCE, compared with the best before
    them; *falling* else. Fewer than 2 × PATIENCE values are *early*. Values that are not finite count as infinite.

    Args:
        steps: ascending.
        losses: validation losses, one a step.
    """
    losses = [value if np.isfinite(value) else float("inf") for value in losses]
    smooth = [statistics.median(losses[max(0, i - 1) : i + 2]) for i in range(len(losses))]
    if not smooth:
        return Advice("early", None, "No validation yet.")
    lowest = min(range(len(smooth)), key=lambda i: (smooth[i], losses[i]))
    best = steps[lowest]
    if len(smooth) < 2 * PATIENCE:
        return Advice("early", best, f"Too few validations to tell ({len(smooth)}); lowest so far at step {best}.")
    last, before = smooth[-PATIENCE:], min(smooth[:-PATIENCE])
    if lowest < len(smooth) - PATIENCE and all(value > smooth[lowest] * (1 + TOLERANCE) for value in last):
        return Advice("rising", best, f"Validation loss rises: overtraining. Go back to step {best}.")
    if min(last) > before * (1 - TOLERANCE):
        return Advice("plateau", best, f"Validation loss does not fall any more: done, it seems. Best at step {best}.")
    return Advice("falling", best, f"Validation loss still falls: go on. Best so far at step {best}.")
