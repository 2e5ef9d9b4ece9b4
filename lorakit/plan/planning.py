"""Will it fit, how long will it take, and what has to give: settings for a card, before anything is downloaded."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from lorakit import base as bases
from lorakit import storage
from lorakit.config import WHOLE, Config
from lorakit.device import choose_device
from lorakit.plan import memory as memory_module
from lorakit.plan.memory import Prediction

EFFICIENCY = 0.35  # share of a card's peak rate that a training step of batch 1 reaches: an estimate
OVERHEAD = 0.08  # seconds a step takes besides: launching kernels, the optimizer; an estimate
LOWEST = 256  # pixels: below, Stable Diffusion draws nothing worth learning


@dataclass(frozen=True)
class Card:
    """An NVIDIA card as its maker describes it."""

    name: str
    memory: float  # GiB that torch sees
    tflops: float  # dense half-precision matrix products with float32 sums, 10^12 a second
    bf16: bool = True


CARDS = {
    card.name: card
    for card in (
        Card("T4", 14.7, 65, bf16=False), Card("3060", 11.8, 25), Card("3090", 23.7, 71), Card("4090", 23.6, 165),
        Card("A100", 39.4, 312),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What to run on a card, and what that takes."""

    config: Config
    prediction: Prediction
    fits: bool | None  # None: nobody knows how much is free
    changes: tuple[str, ...]  # from the settings that were asked for

    def describe(self) -> str:
        """One line for a person."""
        peak = memory_module.readable_bytes(self.prediction.peak)
        if self.fits is None:
            return f"{peak} predicted; how much is free cannot be told here"
        if not self.fits:
            return f"does not fit, {peak} predicted even with: {'; '.join(self.changes) or 'no change'}"
        return f"fits, {peak} predicted" + (f", with: {'; '.join(self.changes)}" if self.changes else "")


def ladder(config: Config) -> list[Config]:
    """What a run may come down to for want of memory, each needing less than the one before; first the config itself.

    Where the config asks for pictures smaller than LOWEST, as the embedded base does, they are at most halved.
    """
    if not config.fit_memory:
        return [config]
    bits = bases.can_quantize(choose_device(config.device))
    return [lower for lower, _ in rungs(config, max(32, min(LOWEST, config.resolution // 2)), bits)]


def rungs(config: Config, smallest: int = LOWEST, bits: bool = True) -> Iterator[tuple[Config, tuple[str, ...]]]:
    """Settings that need less and less memory, the fastest first, each with what was changed.

    Checkpointing, then 8-bit moments, a base in 4 bits, the batch in parts (which learns the same), a lower resolution.

    Args:
        smallest: pixels below which no picture goes.
        bits: whether bitsandbytes is there to do with fewer of them.
    """
    changes: dict[str, str] = {}
    yield config, ()
    if not config.gradient_checkpointing:
        config = config.with_(gradient_checkpointing=True)
        changes["checkpointing"] = "gradient checkpointing (a third more work)"
        yield config, tuple(changes.values())
    if config.optimizer == "adamw" and bits:
        config = config.with_(optimizer="adamw8bit")
        changes["optimizer"] = "optimizer adamw8bit"
        yield config, tuple(changes.values())
    if config.quantize == "none" and bits and config.algorithm not in WHOLE:
        config = config.with_(quantize="nf4")
        changes["base"] = "the base held in NF4"
        yield config, tuple(changes.values())
    while config.at_once > 1:
        config = config.with_(micro_batch_size=-(-config.at_once // 2))
        changes["batch"] = f"the batch in parts of {config.at_once}"
        yield config, tuple(changes.values())
    while config.resolution - config.bucket_step >= max(smallest, config.min_bucket_side or 0):
        config = config.with_(resolution=config.resolution - config.bucket_step)
        changes["resolution"] = f"resolution {config.resolution}"
        yield config, tuple(changes.values())


def choose_settings(
    base: bases.Base, config: Config, free: int | None, *, dtype: torch.dtype, device: str = "cuda",
    margin: float = memory_module.MARGIN, store: Path | None = None,
) -> Plan:  # fmt: skip
    """The fastest settings that fit, from those asked for downwards.

    Args:
        free: bytes the run may take; None when unknown, which changes nothing.
        dtype, device: as for `memory.predict`.
        margin: share of `free` left to the driver, the kernels' workspaces and fragmentation.
        store: folder where predictions are kept; None predicts anew.
    """
    plan = None
    for settings, changes in rungs(config):
        size = (settings.resolution, settings.resolution)
        prediction = predict_cached(base, settings, size=size, dtype=dtype, device=device, store=store)
        fits = memory_module.verdict(prediction, free, margin).fits
        plan = Plan(settings, prediction, fits, changes)
        packed = settings.quantize != "none" or settings.device == "mps"
        if fits is not False or (packed and prediction.weights > (free or 0) * (1 - margin)):
            break  # no further rung makes the frozen base smaller
    return plan


def predict_cached(
    base: bases.Base, config: Config, *, size: tuple[int, int], dtype: torch.dtype, device: str,
    store: Path | None = None,
) -> Prediction:  # fmt: skip
    """`memory.predict`, whose answer is kept: the same question is asked for every card and every notebook.

    Args:
        store: folder of the answers; None keeps none.
    """
    if store is None:
        return memory_module.predict(base, config, size=size, dtype=dtype, device=device)
    deciding = {
        "unet": base.configs["unet"], "vae": base.configs["vae"],
        "text": [base.configs[which] for which in base.text_encoders],
        "family": base.family, "size": size, "dtype": str(dtype), "device": device,
        "config": {
            name: getattr(config, name)
            for name in ("algorithm", "lokr_factor", "rank", "targets", "conv_rank", "block_ranks", "train_unet",
                         "batch_size", "micro_batch_size", "optimizer", "loss",
                         "gradient_accumulation_steps", "gradient_checkpointing",
                         "asks_class", "prior_prediction", "quantize", "clip_skip")
        },
        "trained": list(config.text_rates(base.text_encoders)),
        "versions": [version(name) for name in ("torch", "diffusers", "peft", "transformers")],
        "code": _code(),
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:24]
    file = store / f"{key}.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return Prediction(**(found | {"size": tuple(found["size"])}))
    except (OSError, ValueError, TypeError):
        pass  # not there, or not ours: predicted again
    prediction = memory_module.predict(base, config, size=size, dtype=dtype, device=device)
    try:
        with storage.write_file(file) as partial:
            partial.write_text(json.dumps(asdict(prediction)), encoding="utf-8")
    except OSError:
        pass  # a full or read-only home costs the seconds again, nothing else
    return prediction


@cache
def _code() -> str:
    """A digest of the code that a prediction depends on."""
    folders = [Path(__file__).parents[1] / folder for folder in ("adapter", "base", "plan", "train")]
    files = sorted(file for folder in folders for file in folder.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def prediction_store() -> Path:
    """Where predictions are kept for this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit" / "predictions"


def seconds_a_step(prediction: Prediction, card: Card) -> float:
    """How long a step may take: an estimate from the step's operations and the card's rate."""
    return prediction.flops / (card.tflops * 1e12 * EFFICIENCY) + OVERHEAD


def this_machine() -> Card | None:
    """The NVIDIA card that is here, with what is free now; its rate is the table's where the name tells it."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    known = next((card for key, card in CARDS.items() if key in name), None)
    free = memory_module.free_memory_bytes("cuda") / 2**30
    return replace(known or Card("", 0, 0, torch.cuda.get_device_capability() >= (8, 0)), name=name, memory=free)


@dataclass(frozen=True)
class Row:
    """A plan for one card."""

    card: Card
    asked: Prediction  # for the settings as they were asked for
    plan: Plan
    steps: int | None  # of the run; None where it is given in epochs

    @property
    def minutes(self) -> float | None:
        """Estimated, for the whole run; None where the card's rate or the run's length is unknown."""
        if not self.card.tflops or self.steps is None:
            return None
        return self.steps * seconds_a_step(self.plan.prediction, self.card) / 60

    def describe(self) -> str:
        """One line for a person."""
        said = f"{self.card.memory:.1f} GiB: {self.plan.describe()}"
        if self.minutes is not None and self.plan.fits:
            said += f"; {self.steps} steps in about {self.minutes:.0f} min (estimated)"
        return said

    def facts(self) -> dict:
        """The same for programs."""
        prediction = self.plan.prediction
        parts = ("weights", "adapter", "gradients", "optimizer", "activations")
        return {
            "card": self.card.name, "memory_gib": round(self.card.memory, 2), "fits": self.plan.fits,
            "peak_gib": round(prediction.peak / 2**30, 3),
            "parts_gib": {part: round(getattr(prediction, part) / 2**30, 3) for part in parts},
            "asked_peak_gib": round(self.asked.peak / 2**30, 3), "file_mb": round(prediction.file_size / 1e6, 2),
            "changes": list(self.plan.changes), "estimated_minutes": self.minutes and round(self.minutes, 1),
            "resolution": self.plan.config.resolution, "batch_size": self.plan.config.batch_size,
            "micro_batch_size": self.plan.config.at_once,
        }  # fmt: skip


def compare_methods(
    base: bases.Base, config: Config, *, dtype: torch.dtype, store: Path | None = None
) -> list[memory_module.Method]:
    """LoRA, DreamBooth and textual inversion of one base at the same settings: what each takes and leaves."""
    size = (config.resolution, config.resolution)
    lora = predict_cached(base, config, size=size, dtype=dtype, device="cuda", store=store)
    return [
        memory_module.Method("LoRA", lora.peak, lora.file_size),
        memory_module.dreambooth(base, config, size=size, dtype=dtype),
        memory_module.textual_inversion(base, config, size=size, dtype=dtype),
    ]


def plan_for_cards(
    base: bases.Base, config: Config, cards: list[str] | None = None, store: Path | None = None
) -> list[Row]:
    """A plan for each card, and for the one that is here.

    Args:
        cards: names from CARDS; None takes all, and this machine's.
        store: folder where predictions are kept; None is the user's own.

    Raises:
        ValueError: an unknown card, or settings that do not suit the base.
    """
    unknown = [name for name in cards or () if name not in CARDS]
    if unknown:
        raise ValueError(f"There is no card {unknown[0]!r} in the table. It has {', '.join(CARDS)}.")
    here = this_machine() if cards is None else None
    store = store or prediction_store()
    rows = []
    for card in [*(CARDS[name] for name in cards or CARDS), *([here] if here else [])]:
        dtype = torch.bfloat16 if card.bf16 else torch.float16
        size = (config.resolution, config.resolution)
        asked = predict_cached(base, config, size=size, dtype=dtype, device="cuda", store=store)
        chosen = choose_settings(base, config, int(card.memory * 2**30), dtype=dtype, store=store)
        rows.append(Row(card, asked, chosen, config.steps))
    return rows
