"""What tests of the loop begin with: everything prepared, then UNet, state and loop."""

import torch

from lorakit import adapter as adapters
from lorakit import base as bases
from lorakit import prepare, train

CPU = torch.device("cpu")


def prepared(settings, folder):
    """The run's pictures and texts, encoded into a folder."""
    return prepare.run(settings, folder / "prepared", say=lambda _: None, progress=False)


def begin(settings, ready):
    """A fresh adapter in the base's models: the UNet, the state before the first step, and the loop."""
    models = {"unet": (unet := bases.load_unet(ready.base, torch.float32, CPU))}
    for which in settings.text_rates(ready.base.text_encoders):
        models[which] = bases.load_text_encoder(ready.base, torch.float32, CPU, which)[0]
    adapter = adapters.fresh(models, settings)
    state = train.start(adapter, settings, CPU, torch.float32)
    return unet, state, train.steps(unet, ready.base, state, ready.pictures, ready.repeats, ready.texts, settings)
