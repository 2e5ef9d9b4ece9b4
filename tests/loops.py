"""What tests of the loop begin with: everything prepared, then UNet, state and loop."""

from unittest import mock

import torch
from said import QUIET

from lorakit import adapter as adapters
from lorakit import base as bases
from lorakit import memory, plan, prepare, train

CPU = torch.device("cpu")


def prepared(settings, folder):
    """The run's pictures and texts, encoded into a folder. Its memory is not predicted: that takes a second."""
    nothing = dict.fromkeys(memory.Prediction.__dataclass_fields__, 0)
    with mock.patch.object(plan, "predict", lambda *_, size, **__: memory.Prediction(**nothing | {"size": size})):
        return prepare.run(settings, folder / "prepared", **QUIET)


def begin(settings, ready):
    """A fresh adapter in the base's models: the UNet, the state before the first step, and the loop."""
    models = {"unet": (unet := bases.load_unet(ready.base, torch.float32, CPU))}
    for which in settings.text_rates(ready.base.text_encoders):
        models[which] = bases.load_text_encoder(ready.base, torch.float32, CPU, which)[0]
    adapter = adapters.fresh(models, settings)
    state = train.start(adapter, settings, CPU, torch.float32)
    return unet, state, train.steps(unet, ready.base, state, ready.pictures, ready.repeats, ready.texts, settings)
