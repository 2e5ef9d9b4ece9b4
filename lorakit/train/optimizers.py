"""Optimizers and learning-rate schedules by name."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

OPTIMIZERS = {  # name -> the module that has it, and the class
    "adamw": ("torch.optim.adamw", "AdamW"),
    "adamw8bit": ("bitsandbytes.optim.adamw", "AdamW8bit"),
    "paged_adamw8bit": ("bitsandbytes.optim.adamw", "PagedAdamW8bit"),
    "adafactor": ("transformers.optimization", "Adafactor"),
    "prodigy": ("prodigyopt.prodigy", "Prodigy"),
    "lion": ("lion_pytorch.lion_pytorch", "Lion"),
    "adamw_schedulefree": ("schedulefree.adamw_schedulefree", "AdamWScheduleFree"),
}
SCHEDULES = ("constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial")


def optimizer(name: str, parameters: Iterable, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Make an optimizer.

    Args:
        name: "adamw"; "adamw8bit" (a quarter of the state memory), "paged_adamw8bit" (whose state may move to the
            computer's memory when the card is full); "adafactor" (state of rows and columns alone), here with a fixed
            rate; "prodigy" (finds the rate itself: give 1.0); "lion" (one moment; a rate 3 to 10 times lower than
            AdamW's); "adamw_schedulefree" (averages instead of a schedule: sample inside `averaged`).
        parameters: tensors, or groups as torch takes them.

    Raises:
        ValueError: unknown name.
        ImportError: the package that has it is missing.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101; Dettmers et al. 2022, arXiv:2110.02861; Shazeer & Stern 2018,
    arXiv:1804.04235; Mishchenko & Defazio 2024, arXiv:2306.06101; Chen et al. 2023, arXiv:2302.06675; Defazio et al.
    2024, arXiv:2405.15682.
    """
    parameters = list(parameters)
    settings = {"lr": learning_rate, "weight_decay": weight_decay}
    if name == "adamw":
        settings["fused"] = _device(parameters) in ("cpu", "cuda")
    elif name == "adafactor":
        settings |= {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    elif name == "prodigy":
        # As the authors advise for diffusion models.
        settings |= {"use_bias_correction": True, "safeguard_warmup": True}
    made = _class(name)(parameters, **settings)
    if name == "adamw_schedulefree":
        made.train()
    return made


def _class(name: str):
    from importlib import import_module

    if name not in OPTIMIZERS:
        raise ValueError(f"There is no optimizer {name!r}. Use one of {', '.join(OPTIMIZERS)}.")
    module, kind = OPTIMIZERS[name]
    try:
        return getattr(import_module(module), kind)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise ImportError(
            f"optimizer {name!r} needs {package}, which is not installed: `pip install {package}`, or use 'adamw'."
        ) from error


def _device(parameters: list) -> str:
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    return first.device.type


def is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of bitsandbytes'."""
    return type(optimizer).__module__.startswith("bitsandbytes")


def to_8bit(optimizer: torch.optim.Optimizer, saved: dict[int, dict]) -> dict[int, dict]:
    """AdamW's state as bitsandbytes' 8-bit optimizers hold it: the moments are rounded, not lost.

    Args:
        optimizer: a fresh AdamW8bit of the same parameters.
        saved: parameter's number → {"step", "exp_avg", "exp_avg_sq"}.

    Returns:
        Parameter's number → state, as `optimizer.state_dict()` has it.
    """
    from bitsandbytes.functional import quantize_blockwise

    places = [(g, p) for g, group in enumerate(optimizer.param_groups) for p in range(len(group["params"]))]
    for number, (g, p) in enumerate(places):
        group = optimizer.param_groups[g]
        weight = group["params"][p]
        optimizer.init_state(group, weight, g, p)
        state, before = optimizer.state[weight], saved[number]
        state["step"] = int(before["step"])
        for ours, theirs in ((1, "exp_avg"), (2, "exp_avg_sq")):
            moment, kept = before[theirs].to(weight.device), state[f"state{ours}"]
            if kept.dtype == torch.uint8:
                quantize_blockwise(
                    moment, code=state[f"qmap{ours}"], absmax=state[f"absmax{ours}"], out=kept, blocksize=256
                )
            else:  # small ones stay as they are
                kept.copy_(moment)
    return optimizer.state_dict()["state"]


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step can be called off by a tensor (torch's fused kernels), without waiting for the device."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, a schedule-free optimizer's weights are the averaged ones it is judged by; others are left alone.

    Afterwards every weight is what it was, to the bit: the optimizer's own way back rounds.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    before = [weight.detach().clone() for weight in weights]
    try:
        optimizer.eval()
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


def factor(name: str, step: int, steps: int, warmup: float = 0, *, cycles: int = 1, power: float = 1.0) -> float:
    """The share of the full learning rate at an update: a pure function, so that a resumed run needs no state.

    Args:
        name: one of SCHEDULES.
        step: the update, counted from 0.
        steps: updates of the whole run.
        warmup: updates over which the rate rises linearly to its full value; below 1 a share of `steps`.
        cycles: of "cosine_with_restarts": how often it falls.
        power: of "polynomial"; 1 is linear.

    Raises:
        ValueError: unknown name.
    """
    warmup = warmup_steps(warmup, steps)
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


def warmup_steps(warmup: float, steps: int) -> int:
    """Updates of warm-up: as given, or a share of the run where that is below 1."""
    return round(warmup * steps) if warmup < 1 else int(warmup)


# ── The average of the weights ──────────────────────────────────────────────────────────────────────────────────────


class Ema:
    """An exponential moving average of weights, for sampling and the finished file.

    Args:
        weights: in a fixed order; a float32 copy of each is kept.
        decay: share kept at an update; less at first, so that the start is forgotten.
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
        """Inside, the weights are their average; afterwards what they were."""
        before = [weight.detach().clone() for weight in self.weights]
        try:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.average)
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, before)
