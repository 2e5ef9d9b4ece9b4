"""A loss that means something: held-out pictures under fixed noise, the overfit dial, and advice from the curve.

The loss of a training step says little: it depends on the timestep that was drawn far more than on what was learned.
Here the same pictures are always asked the same questions, with the adapter and without.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorakit import adapter as adapters
from lorakit import loss, sample, train
from lorakit.base import Base
from lorakit.cache import Encoded, Text
from lorakit.config import Config
from lorakit.train import Batch, State, Step

TIMESTEPS = (100, 300, 500, 700, 900)  # asked of every picture
SEED = 20_231  # of the questions' noise: never the run's own, so that runs with other seeds compare
TOLERANCE = 0.01  # share of the lowest validation loss by which a later one must differ to count
PATIENCE = 3  # validations that must agree


def hold_out(digests: Sequence[str], share: float, seed: int) -> list[int]:
    """Which pictures are kept from training, by their contents: adding one picture exchanges at most one other.

    Args:
        digests: of the pictures' contents.
        share: of all pictures; above 0 at least one is held out, and one is always left to train on.

    Returns:
        Their places, in order. Copies of one picture are held out together or not at all.
    """
    if share <= 0:
        return []
    unlike = sorted(set(digests), key=lambda digest: np.random.default_rng([seed, int(digest[:12], 16)]).random())
    count = min(max(1, round(share * len(unlike))), len(unlike) - 1)
    chosen = set(unlike[:count])
    return [place for place, digest in enumerate(digests) if digest in chosen]


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
                None if picture.mask is None else repeat(train.counted(picture, config)),
            )
        )
    return asked


@torch.no_grad()
def measure(unet, base: Base, asked: Sequence[Batch], config: Config, adapter: adapters.Adapter | None = None) -> float:
    """The mean loss over questions, weighted as in training. Leaves the UNet and all randomness as they were."""
    alphas = base.alphas_cumprod().to(unet.device)
    with sample.borrowed(unet):
        return float(
            torch.stack([train.batch_loss(unet, base, alphas, item, config, adapter) for item in asked]).mean()
        )


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


def every(
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
        return Advice("early", best, f"{len(smooth)} validations are too few to tell; lowest so far at step {best}.")
    last, before = smooth[-PATIENCE:], min(smooth[:-PATIENCE])
    if lowest < len(smooth) - PATIENCE and all(value > smooth[lowest] * (1 + TOLERANCE) for value in last):
        return Advice("rising", best, f"Validation loss rises: overtraining. Go back to step {best}.")
    if min(last) > before * (1 - TOLERANCE):
        return Advice("plateau", best, f"Validation loss does not fall any more: done, it seems. Best at step {best}.")
    return Advice("falling", best, f"Validation loss still falls: go on. Best so far at step {best}.")
