"""A LoRA in memory, with diffusers' names for its modules, whichever program wrote the file."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from lorakit.adapter import targets
from lorakit.adapter.algorithms import Algorithm, Entry, Parts, algorithm_of
from lorakit.base import Base

FAMILIES = {"sd15": "SD 1.5", "sd2": "SD 2.x", "sdxl": "SDXL"}
MODELS = ("unet", *targets.TEXT_ENCODERS)
Size = tuple[int, int]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Lora:
    """The contents of a LoRA file."""

    name: str  # of the file
    family: str | None  # "sd15", "sd2" or "sdxl" by its keys and shapes, else by its metadata
    metadata: dict[str, str] = field(repr=False)
    modules: Mapping[str, Entry] = field(repr=False)
    """The name of a module, as in `Adapter.layers` → its parts, as in `algorithms`, and its alpha."""
    aside: dict[str, Tensor] = field(repr=False)  # bundled embeddings by key: kept as they are

    @property
    def adapts(self) -> tuple[str, ...]:
        """The models that it changes: "unet", "text_encoder", "text_encoder_2"."""
        return tuple(sorted({targets.model_of(module) for module in self.modules}))

    @property
    def parts(self) -> dict[str, Parts]:
        """The modules' parts without their alphas."""
        return {module: parts for module, (parts, _) in self.modules.items()}

    @property
    def algorithms(self) -> dict[str, Algorithm]:
        """The algorithm of each module."""
        return {module: algorithm_of(parts) for module, parts in self.parts.items()}

    @property
    def algorithm(self) -> str:
        """ "lora", "dora", "loha" or "lokr"; of several the one that most modules have."""
        return usual(algorithm.name for algorithm in self.algorithms.values()) if self.modules else "lora"

    @property
    def plain(self) -> bool:
        """Whether all modules are plain LoRAs, so that several such files make one exactly."""
        return {algorithm.sums for algorithm in self.algorithms.values()} == {True}

    @property
    def ranks(self) -> dict[str, int | None]:
        """The rank of each module; None of a LoKr without a part of low rank."""
        return {module: algorithm_of(parts).rank(parts) for module, parts in self.parts.items()}

    @property
    def sizes(self) -> dict[str, Size]:
        """(out, in · k · k) of the weight that each module's parts change."""
        return {module: algorithm_of(parts).size(parts) for module, parts in self.parts.items()}

    @property
    def embeddings(self) -> list[str]:
        """The names of the embeddings that are bundled with it."""
        return sorted({key.split(".")[1] for key in self.aside})

    def check_family(self, base: Base) -> None:
        """Raise ValueError where it is known to be for another family than the base's."""
        if self.family not in (None, base.family):
            raise ValueError(
                f"{self.name} is an {FAMILIES[self.family]} LoRA, the base {base.name} is {FAMILIES[base.family]}: "
                "they cannot be combined. Use a base of the LoRA's family."
            )


def check_sizes(name: str, sizes: Mapping[str, Size], base: str, shapes: Mapping[str, Sequence[int]]) -> None:
    """Compare the modules of a LoRA with those of a base.

    Args:
        name, base: for the message.
        sizes: module → (out, in · k · k) in the LoRA.
        shapes: module → (out, in[, k, k]) in the base, of those that it has.

    Raises:
        ValueError: a module is missing in the base, or has another size.
    """
    wrong = []
    for module, (out, inputs) in sizes.items():
        shape = shapes.get(module)
        size = shape and (shape[0], math.prod(shape[1:]))
        if size != (out, inputs):
            in_base = f"{size[0]}×{size[1]} in the base" if size else "missing in the base"
            wrong.append(f"{module} is {out}×{inputs} in the LoRA, {in_base}")
    if wrong:
        raise ValueError(
            f"{name} does not fit {base} in {len(wrong)} of {len(sizes)} modules: {'; '.join(wrong[:3])}. "
            "It was made for another base."
        )


def finite(tensors: dict[str, Tensor], name: str, advice: str) -> None:
    """Raise FloatingPointError where a tensor is not finite."""
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if bad:
        raise FloatingPointError(f"{name}: {len(bad)} weights are NaN or infinite, first {bad[0]}. {advice}.")


def usual(values: Iterable[Value]) -> Value:
    """The most frequent value."""
    return Counter(values).most_common(1)[0][0]


def distinct(ranks: Iterable[int | None]) -> list[int]:
    """The different ranks, sorted; without None."""
    return sorted({rank for rank in ranks if rank})
