"""lorakit: from a folder of pictures to a Stable Diffusion LoRA that other programs load.

The rooms are modules; name the one you need: `from lorakit import config, dataset, run`.
"""

__version__ = "0.1.0"
