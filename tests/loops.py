"""What tests of the loop begin with: everything prepared, then UNet, state and loop."""

from dataclasses import replace
from unittest import mock

import torch

from lorakit.adapter import injection
from lorakit.adapter.specs import run_specs
from lorakit.base import model
from lorakit.console import Console
from lorakit.device import Compute
from lorakit.plan import memory
from lorakit.plan import store as stores
from lorakit.run import preparation
from lorakit.train import loop

CPU = torch.device("cpu")


def prepared(settings, folder):
    """The run's pictures and texts, encoded into a folder. Its memory is not predicted: that takes a second."""
    nothing = dict.fromkeys(memory.StepCost.__dataclass_fields__, 0)
    with mock.patch.object(stores, "step_cost", lambda *_, size, **__: memory.StepCost(**nothing | {"size": size})):
        return preparation.prepare(settings, folder / "prepared", Console.quiet())


def examples(ready, config):
    """The run's examples with other settings."""
    return replace(ready.examples, config=config)


def begin(settings, ready):
    """A fresh adapter in the base's models: the UNet, the state before the first step, and the loop."""
    models = {"unet": (unet := model.load_unet(ready.base, Compute(CPU, torch.float32)))}
    for which in settings.text_rates(ready.base.text_encoders):
        models[which] = model.load_text_encoder(ready.base, Compute(CPU, torch.float32), which)[0]
    adapter = injection.inject(models, run_specs(models, settings), settings.seed)
    state = loop.initial_state(adapter, settings, CPU, torch.float32)
    return unet, state, loop.steps(unet, ready.base, state, examples(ready, settings))
