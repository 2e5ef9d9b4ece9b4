"""What tests of the loop begin with: everything prepared, then UNet, state and loop."""

from unittest import mock

import torch
from said import QUIET

from lorakit.adapter import injection
from lorakit.base import model
from lorakit.plan import memory, planning
from lorakit.run import preparation
from lorakit.train import loop

CPU = torch.device("cpu")


def prepared(settings, folder):
    """The run's pictures and texts, encoded into a folder. Its memory is not predicted: that takes a second."""
    nothing = dict.fromkeys(memory.Prediction.__dataclass_fields__, 0)
    with mock.patch.object(
        planning, "predict_cached", lambda *_, size, **__: memory.Prediction(**nothing | {"size": size})
    ):
        return preparation.prepare(settings, folder / "prepared", **QUIET)


def begin(settings, ready):
    """A fresh adapter in the base's models: the UNet, the state before the first step, and the loop."""
    models = {"unet": (unet := model.load_unet(ready.base, torch.float32, CPU))}
    for which in settings.text_rates(ready.base.text_encoders):
        models[which] = model.load_text_encoder(ready.base, torch.float32, CPU, which)[0]
    adapter = injection.fresh(models, settings)
    state = loop.initial_state(adapter, settings, CPU, torch.float32)
    return unet, state, loop.steps(unet, ready.base, state, ready.pictures, ready.repeats, ready.texts, settings)
