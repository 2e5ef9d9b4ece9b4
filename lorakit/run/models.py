"""Caches and loaded models that several runs share."""

from dataclasses import dataclass
from typing import Any

from lorakit import adapter as adapters
from lorakit import base as bases
from lorakit.base import Base
from lorakit.config import Config
from lorakit.device import Compute, free_memory
from lorakit.sample import Loaded


@dataclass
class Shared(Loaded):
    """Models and caches of runs that follow one another, so that nothing is encoded or loaded twice.

    One run uses it at a time, and gives the models back as they were loaded.

    Attributes:
        cache: folder of encoded pictures and texts; None: each run has its own.
        origin: the base and the `Compute` that the models were loaded with.
    """

    origin: tuple[str, Compute] | None = None

    @property
    def held(self) -> int:
        """Bytes of the loaded models."""
        tensors = [t for model in self.models.values() for t in (*model.parameters(), *model.buffers())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def suit(self, config: Config) -> None:
        """Free the models that a run with this config cannot use."""
        origin = config.base, Compute.of(config)
        if origin != self.origin:
            self.release()
        self.origin = origin

    def load(self, base: Base, config: Config) -> dict[str, Any]:
        """The UNet and the text encoders that are trained; other text encoders are freed."""
        self.suit(config)
        compute = Compute.of(config)
        trained = config.text_rates(base.text_encoders)
        for name in self.models.keys() - {"unet", *trained}:
            del self.models[name]
        for name in trained:
            if name not in self.models:
                self.models[name] = bases.load_text_encoder(base, compute, name)[0]
        if "unet" not in self.models:
            self.models["unet"] = bases.load_unet(base, compute)
        return {name: self.models[name] for name in ("unet", *trained)}

    def restore(self) -> None:
        """Take out of the models what training has put into them."""
        adapters.eject(self.models)
        for name, model in self.models.items():
            model.requires_grad_(False).eval()
            if name == "unet":
                model.disable_gradient_checkpointing()

    def release(self) -> None:
        """Free the models."""
        self.models.clear()
        if self.origin:
            free_memory(self.origin[1].device)
