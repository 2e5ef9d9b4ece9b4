"""Optimizers and learning-rate schedules by name, and averages of the weights."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lorakit import storage

OPTIMIZERS = {  # name → its module and class
    "adamw": ("torch.optim.adamw", "AdamW"),
    "adamw8bit": ("bitsandbytes.optim.adamw", "AdamW8bit"),
    "paged_adamw8bit": ("bitsandbytes.optim.adamw", "PagedAdamW8bit"),
    "adafactor": ("transformers.optimization", "Adafactor"),
    "prodigy": ("prodigyopt.prodigy", "Prodigy"),
    "lion": ("lion_pytorch.lion_pytorch", "Lion"),
    "adamw_schedulefree": ("schedulefree.adamw_schedulefree", "AdamWScheduleFree"),
}
SCHEDULES = ("constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial")


@storage.exclusive
def optimizer(name: str, parameters: Iterable, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Make an optimizer.

    Args:
        name: "adamw"; "adamw8bit" (a quarter of the state memory), "paged_adamw8bit" (moves its state to the computer's
            memory when the card is full); "adafactor" (stores only rows and columns of the state), here with a fixed
            rate; "prodigy" (adapts the rate itself: give 1.0); "lion" (one moment; use a rate 3 to 10 times lower than
            AdamW's); "adamw_schedulefree" (averages instead of a schedule: sample inside `averaged`).
        parameters: tensors, or torch's parameter groups.

    Raises:
        ValueError: unknown name.
        ImportError: its package is missing.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101; Dettmers et al. 2022, arXiv:2110.02861; Shazeer & Stern 2018,
    arXiv:1804.04235; Mishchenko & Defazio 2024, arXiv:2306.06101; Chen et al. 2023, arXiv:2302.06675; Defazio et al.
    2024, arXiv:2405.15682.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"There is no optimizer {name!r}. Use one of {', '.join(OPTIMIZERS)}.")
    module, class_name = OPTIMIZERS[name]
    try:
        cls = getattr(import_module(module), class_name)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise ImportError(
            f"optimizer {name!r} needs {package}, which is not installed: `pip install {package}`, or use 'adamw'."
        ) from error
    parameters = list(parameters)
    settings: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    if name == "adamw":
        first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
        settings["fused"] = first.device.type in ("cpu", "cuda")
    elif name == "adafactor":
        settings |= {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    elif name == "prodigy":  # the authors' advice for diffusion models
        settings |= {"use_bias_correction": True, "safeguard_warmup": True}
    optimizer = cls(parameters, **settings)
    if name == "adamw_schedulefree":
        optimizer.train()
    return optimizer


def is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer is one of bitsandbytes'."""
    return type(optimizer).__module__.startswith("bitsandbytes")


def to_8bit(optimizer: Any, saved: dict[int, dict]) -> dict[int, dict]:
    """Convert AdamW's state to the format of bitsandbytes' 8-bit optimizers, rounding the moments.

    Args:
        optimizer: a fresh AdamW8bit of the same parameters.
        saved: parameter's number → {"step", "exp_avg", "exp_avg_sq"}.

    Returns:
        Parameter's number → state, as in `optimizer.state_dict()`.
    """
    from bitsandbytes.functional import quantize_blockwise

    places = [(g, p) for g, group in enumerate(optimizer.param_groups) for p in range(len(group["params"]))]
    for number, (g, p) in enumerate(places):
        group = optimizer.param_groups[g]
        weight = group["params"][p]
        optimizer.init_state(group, weight, g, p)
        state, before = optimizer.state[weight], saved[number]
        state["step"] = int(before["step"])
        for n, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
            moment, out = before[name].to(weight.device), state[f"state{n}"]
            if out.dtype == torch.uint8:
                quantize_blockwise(moment, code=state[f"qmap{n}"], absmax=state[f"absmax{n}"], out=out, blocksize=256)
            else:  # bitsandbytes keeps small moments in float32
                out.copy_(moment)
    return optimizer.state_dict()["state"]


def factor(name: str, step: int, steps: int, warmup: float = 0, *, cycles: int = 1, power: float = 1.0) -> float:
    """The share of the full learning rate at an update: a pure function, so a resumed run needs no schedule state.

    Args:
        name: one of SCHEDULES.
        step: the update, counted from 0.
        steps: updates of the whole run.
        warmup: updates over which the rate rises linearly to its full value; below 1 a share of `steps`.
        cycles: number of decays of "cosine_with_restarts".
        power: of "polynomial"; 1 is linear.

    Raises:
        ValueError: unknown name.
    """
    warmup = round(warmup * steps) if warmup < 1 else int(warmup)
    if name not in SCHEDULES:
        raise ValueError(f"There is no schedule {name!r}. Use one of {', '.join(SCHEDULES)}.")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if name in ("constant", "constant_with_warmup"):
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if name == "cosine_with_restarts":
        progress = (progress * cycles) % 1.0 if progress < 1 else 1.0
    if name.startswith("cosine"):
        return 0.5 * (1 + math.cos(math.pi * progress))
    return (1 - progress) ** (power if name == "polynomial" else 1.0)


# ── Averages of the weights ─────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _restored(weights: Sequence[Tensor]) -> Iterator[None]:
    """Restore the weights (in place) at the end, to the bit."""
    before = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(weights), before)


@contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """Inside, a schedule-free optimizer's weights are their averages, to sample and validate; no effect on others.

    The weights are restored from a copy, because the optimizer's own inverse rounds.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    with _restored([weight for group in optimizer.param_groups for weight in group["params"]]):
        try:
            optimizer.eval()
            yield
        finally:
            optimizer.train()


class Ema:
    """An exponential moving average of weights, for sampling and the exported file.

    Args:
        weights: in a fixed order; a float32 copy of each is kept.
        decay: share of the average kept at an update; less in the first updates, to forget the initial weights.
    """

    def __init__(self, weights: list[Tensor], decay: float):
        self.weights, self.decay = weights, decay
        self.average = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after update `step`, counted from 1."""
        torch._foreach_lerp_(self.average, self.weights, 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the weights are their average."""
        with _restored(self.weights):
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.average)
            yield
