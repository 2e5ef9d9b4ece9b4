"""Captions: what a text encoder is told of a picture, and what is varied of it from one step to the next."""

import hashlib

import numpy as np


def tags(caption: str) -> list[str]:
    """The comma-separated parts of a caption, without empty ones."""
    return [tag for tag in (part.strip() for part in caption.split(",")) if tag]


def variants(
    caption: str, count: int, *, shuffle: bool = False, keep_tokens: int = 0, tag_dropout: float = 0.0, seed: int = 0
) -> tuple[str, ...]:
    """The forms of a caption that a run draws from, each encoded once.

    Args:
        count: how many; one is enough, and given, where nothing is varied.
        shuffle: put the tags into another order in each.
        keep_tokens: so many tags in front keep their place and are never dropped: the trigger's, most of all. The
            name is sd-scripts'; what it counts is tags there too.
        tag_dropout: the probability that a tag is left out.
        seed: with the caption's own words, all that chance depends on.
    """
    fixed, free = tags(caption)[:keep_tokens], tags(caption)[keep_tokens:]
    if not free or not (tag_dropout or (shuffle and len(free) > 1)):
        return (caption,)
    own = int(hashlib.sha256(caption.encode()).hexdigest()[:16], 16)
    found = []
    for number in range(count):
        random = np.random.default_rng([seed, own, number])
        keys, kept = random.random(len(free)), random.random(len(free)) >= tag_dropout
        order = np.argsort(keys, kind="stable") if shuffle else np.arange(len(free))
        found.append(", ".join(fixed + [free[i] for i in order if kept[i]]))
    return tuple(found)


def without_trigger(caption: str, trigger: str, class_word: str) -> str:
    """The caption of the class: the trigger exchanged for the word of what it is one of."""
    return caption.replace(trigger, class_word) if trigger else caption
