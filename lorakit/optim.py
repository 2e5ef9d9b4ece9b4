"""Optimizers and learning-rate schedules by name."""

import math
from collections.abc import Iterable

import torch


def optimizer(name: str, parameters: Iterable, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Make an optimizer.

    Args:
        name: "adamw", or "adamw8bit" (bitsandbytes: a quarter of the state memory).
        parameters: tensors or parameter groups, as torch takes them.

    Raises:
        ValueError: unknown name.
        ImportError: bitsandbytes is asked for and missing.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101; Dettmers et al. 2022, arXiv:2110.02861.
    """
    parameters = list(parameters)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=_fuses(parameters))
    if name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ImportError(
                "optimizer 'adamw8bit' needs bitsandbytes, which is not installed: "
                "`pip install bitsandbytes`, or use optimizer 'adamw'."
            ) from error
        return AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)
    raise ValueError(f"There is no optimizer {name!r}. Use 'adamw' or 'adamw8bit'.")


def _fuses(parameters: list) -> bool:
    """Whether the fused AdamW kernel exists for the device the parameters are on."""
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    return first.device.type in ("cpu", "cuda")


def factor(name: str, step: int, steps: int, warmup: int = 0) -> float:
    """The share of the full learning rate at an update: a pure function, so that a resumed run needs no state.

    Args:
        name: "constant", "constant_with_warmup", "cosine" or "linear".
        step: the update, counted from 0.
        steps: updates of the whole run.
        warmup: updates over which the rate rises linearly to its full value.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if name in ("constant", "constant_with_warmup"):
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    if name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if name == "linear":
        return max(0.0, 1 - progress)
    raise ValueError(f"There is no schedule {name!r}. Use 'constant', 'constant_with_warmup', 'cosine' or 'linear'.")
