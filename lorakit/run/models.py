"""Caches and a loaded UNet that several runs share."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from lorakit import adapter as adapters
from lorakit import base as bases
from lorakit.config import Config
from lorakit.device import choose_device, compute_dtype, free_memory


@dataclass
class Shared:
    """What runs that follow one another have in common, so that nothing is encoded or loaded twice.

    One run at a time uses it, and hands models back as they were loaded.
    """

    cache: Path | None = None  # folder for what is encoded; None: one in each run's own
    loaded: dict[str, torch.nn.Module] = field(default_factory=dict, repr=False)  # "unet", and encoders in training
    origin: tuple = ()  # what decides their weights and where they are

    @property
    def held(self) -> int:
        """Bytes that the loaded models take."""
        tensors = [t for model in self.loaded.values() for t in (*model.parameters(), *model.buffers())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def suit(self, config: Config) -> None:
        """Free what a run with these settings has no use for."""
        device = choose_device(config.device)
        origin = (config.base, compute_dtype(config.mixed_precision, device), device, config.quantize)
        if origin != self.origin:
            self.release()
        self.origin = origin

    def models(self, base: bases.Base, config: Config) -> adapters.Models:
        """The UNet, and the text encoders that are trained: what is not there yet is loaded, the rest is freed."""
        self.suit(config)
        _, dtype, device, quantize = self.origin
        trained = config.text_rates(base.text_encoders)
        for which in self.loaded.keys() - {"unet", *trained}:
            del self.loaded[which]
        for which in trained:
            if which not in self.loaded:
                self.loaded[which] = bases.load_text_encoder(base, dtype, device, which)[0]
        if "unet" not in self.loaded:
            self.loaded["unet"] = bases.load_unet(base, dtype, device, quantize)
        return {which: self.loaded[which] for which in ("unet", *trained)}

    def restore(self) -> None:
        """Take out of the models what training has put into them."""
        adapters.eject(self.loaded)
        for which, model in self.loaded.items():
            model.requires_grad_(False).eval()
            if which == "unet":
                model.disable_gradient_checkpointing()

    def release(self) -> None:
        """Free the models."""
        self.loaded.clear()
        if self.origin:
            free_memory(self.origin[2])
