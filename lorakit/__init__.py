"""lorakit: from a folder of pictures to a Stable Diffusion LoRA that other programs load."""

from typing import TYPE_CHECKING

from lorakit import _lazy

__version__ = "0.1.0"
__all__ = [
    "Config", "adapter", "base", "dataset", "demo", "evaluate", "hosts", "plan", "preset", "publish", "run", "sample",
    "train",
]  # fmt: skip

if TYPE_CHECKING:
    from lorakit import adapter, base, dataset, demo, evaluate, hosts, plan, publish, run, sample, train
    from lorakit.config import Config
    from lorakit.presets import preset
else:
    __getattr__, __dir__ = _lazy.attach(__name__)
