"""The pictures and captions of a run, and the batches made of them.

Every random choice depends only on (seed, step, place in the step), so a resumed run repeats it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from lorakit import dataset as datasets
from lorakit.base import Encoded, Text
from lorakit.config import Config
from lorakit.train.distributed import ALONE, Team
from lorakit.train.loss import Noise


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward pass, on the CPU."""

    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,)
    perturbation: Tensor | None  # (B, C, h, w)
    embeddings: Tensor  # (B, tokens, width)
    pooled: Tensor  # (B, width)
    sizes: Tensor  # (B, 6)
    tokens: Tensor  # (B, encoders, length): for trained text encoders
    mask: Tensor | None = None  # (B, 1, h, w): weight of each latent cell
    weight: Tensor | None = None  # (B,): weight of each example
    base_target: Tensor | None = None  # (B,), bool: True if the target is the prediction of the base without adapter


@dataclass(frozen=True)
class Examples:
    """Encoded pictures and captions, in the order in which a run trains on them.

    Attributes:
        repeats: occurrences of each picture in an epoch.
        texts: embeddings of every caption in `captions_of(pictures, config)`.
    """

    pictures: Sequence[Encoded]
    repeats: Sequence[int]
    texts: Mapping[str, Text] = field(repr=False)
    config: Config = field(repr=False)

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of each picture in latent cells."""
        return [(p.latents.shape[-1], p.latents.shape[-2]) for p in self.pictures]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates in an epoch."""
        return -(-self.batches_per_epoch // self.config.gradient_accumulation_steps)

    @property
    def total_steps(self) -> int:
        """Optimizer updates in the whole run."""
        return self.config.total_steps(self.batches_per_epoch)

    @cached_property
    def batches_per_epoch(self) -> int:
        return datasets.steps_per_epoch(self.sizes, self.repeats, self.config.batch_size)

    @cached_property
    def _cached_epoch(self) -> Callable[[int], list[list[int]]]:
        return lru_cache(2)(self.epoch)

    def epoch(self, number: int) -> list[list[int]]:
        """The batches of an epoch, counted from 0: the numbers of their pictures."""
        return datasets.epoch_batches(
            self.sizes, self.repeats, self.config.batch_size, seed=self.config.seed, epoch=number
        )

    def group(self, step: int) -> list[list[int]]:
        """The batches of an update, counted from 0; the last one of an epoch may be short, as in kohya's loop."""
        (epoch, place), size = divmod(step, self.steps_per_epoch), self.config.gradient_accumulation_steps
        return self._cached_epoch(epoch)[place * size : (place + 1) * size]

    def update(self, step: int, team: Team = ALONE) -> list[tuple[Batch, float]]:
        """This process's batches of an update, each with its share of the mean loss over the group's batches."""
        items, offset, size = [], 0, self.config.at_once
        for indices in self.group(step):
            mine = team.share(len(indices))
            for class_captions in (False, True) if self.config.asks_class else (False,):
                for start in range(mine.start, mine.stop, size):
                    part = indices[start : min(start + size, mine.stop)]
                    items.append((self.batch(part, step, offset + start, class_captions), len(part) / len(indices)))
            offset += len(indices)
        return items

    def batch(self, indices: Sequence[int], step: int, offset: int = 0, class_captions: bool = False) -> Batch:
        """Assemble a batch.

        Args:
            indices: the numbers of its pictures.
            step: the update, counted from 0.
            offset: place of the first example in the whole update.
            class_captions: use the captions with the class word; the targets are then the base's predictions.
        """
        config, latents, masks, captions = self.config, [], [], []
        for place, index in enumerate(indices, offset):
            picture = self.pictures[index]
            draws = np.random.default_rng([config.seed, step, place, 1]).random(3)
            mirrored = picture.mirrored if draws[0] < 0.5 else None
            latents.append(picture.latents if mirrored is None else mirrored)
            weights = self.cell_weights(picture)
            masks.append(weights if mirrored is None else weights.flip(-1))
            variants = picture.variants or (picture.caption,)
            captions.append("" if draws[1] < config.caption_dropout else variants[int(draws[2] * len(variants))])
        captions, weight, base_target = self._prior(indices, captions, class_captions)
        texts = [self.texts[caption] for caption in captions]
        places = range(offset, offset + len(indices))
        return Batch(
            torch.stack(latents), *Noise.of(config).draw(config.seed, step, places, latents[0].shape),
            torch.stack([text.embeddings for text in texts]), torch.stack([text.pooled for text in texts]),
            torch.stack([self.pictures[i].sizes for i in indices]), torch.stack([text.tokens for text in texts]),
            torch.stack(masks) if any(self.pictures[i].mask is not None for i in indices) else None,
            weight, base_target,
        )  # fmt: skip

    def _prior(
        self, indices: Sequence[int], captions: list[str], class_captions: bool
    ) -> tuple[list[str], Tensor | None, Tensor | None]:
        """The captions, `weight` and `base_target` of a batch."""
        config, prior = self.config, torch.tensor([self.pictures[i].prior for i in indices])
        if class_captions:
            classes = [datasets.without_trigger(text, config.trigger, config.class_word) for text in captions]
            # A caption without the trigger is its own class caption: it cannot be both learned and preserved.
            differs = torch.tensor([float(a != b) for a, b in zip(classes, captions, strict=True)])
            return classes, config.prior_weight * differs, torch.ones_like(prior)
        if not prior.any():
            return captions, None, None
        return captions, torch.where(prior, config.prior_weight, 1.0), prior if config.prior_prediction else None

    def cell_weights(self, picture: Encoded) -> Tensor:
        """The weight of each latent cell of a picture, from its mask: (1, h, w)."""
        if picture.mask is None:
            return torch.ones(1, 1, 1).expand(1, *picture.latents.shape[1:])
        return picture.mask + self.config.unmasked_weight * (1 - picture.mask)


def captions_of(pictures: Sequence[Encoded], config: Config) -> list[str]:
    """Every caption that `Examples.batch` can choose."""
    captions = [caption for picture in pictures for caption in (picture.caption, *picture.variants)]
    if config.asks_class:
        captions += [datasets.without_trigger(text, config.trigger, config.class_word) for text in captions]
    return list(dict.fromkeys(["", *captions]))
