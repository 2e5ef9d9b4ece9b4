"""A LoRA in memory: its modules under the names that diffusers gives them, whoever wrote the file."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorakit.adapter import layers, targets

FAMILIES = {"sd15": "SD 1.5", "sd2": "SD 2.x", "sdxl": "SDXL"}
MODELS = ("unet", *targets.TEXT_ENCODERS)


@dataclass(frozen=True)
class Lora:
    """What a LoRA file holds."""

    name: str  # of the file
    family: str | None  # "sd15", "sd2" or "sdxl" by its keys and shapes, else by its metadata
    metadata: dict[str, str] = field(repr=False)
    modules: dict[str, tuple[dict[str, Tensor], float]] = field(repr=False)
    """A module's name, as `adapter` has it → its parts, as `adapter.parts` names them, and its alpha."""
    aside: dict[str, Tensor] = field(repr=False)  # of text encoders, but no layer of theirs: kept as they are

    @property
    def adapts(self) -> tuple[str, ...]:
        """The models that it changes: "unet", "text_encoder", "text_encoder_2"."""
        return tuple(sorted({targets.model_of(module) for module in self.modules}))

    @property
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The modules' parts without their alphas."""
        return {module: parts for module, (parts, _) in self.modules.items()}

    @property
    def algorithm(self) -> str:
        """ "lora", "dora", "loha" or "lokr"; of several the one that most modules have."""
        return usual(layers.algorithm_of(parts) for parts in self.parts.values()) if self.modules else "lora"


def finite(tensors: dict[str, Tensor], name: str, advice: str) -> None:
    """Raise FloatingPointError where a tensor is not finite."""
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if bad:
        raise FloatingPointError(f"{name}: {len(bad)} weights are NaN or infinite, first {bad[0]}. {advice}.")


def usual(values: Iterable):
    """The value that most have."""
    return Counter(values).most_common(1)[0][0]
