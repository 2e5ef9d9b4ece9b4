"""Predict a run before anything is downloaded, and choose settings that fit into memory."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lorakit import base as bases
from lorakit import dataset as datasets
from lorakit import named
from lorakit.config import WHOLE, Config
from lorakit.device import choose_device
from lorakit.plan import cards
from lorakit.plan import store as stores
from lorakit.plan.cards import Card
from lorakit.plan.memory import StepCost, readable_bytes
from lorakit.plan.prediction import Prediction

SIDES = (256, 384, 512, 640, 768, 896, 1024, 1280, 1536)  # resolutions that `largest` tries
BATCHES = (1, 2, 4, 8, 16)
MARGIN = 0.1  # share of the free memory left to the driver, the kernels' workspaces and fragmentation
LOWEST = 256  # pixels: below, Stable Diffusion draws nothing worth learning


class Verdict(NamedTuple):
    """Whether a step fits; as a string, the sentence for a person."""

    fits: bool | None  # None: the free memory is unknown
    text: str

    def __str__(self) -> str:
        return self.text


def verdict(cost: StepCost, free: int | None, margin: float = MARGIN) -> Verdict:
    """Whether a step fits, and what to change if it does not, the cheapest change first.

    Args:
        free: bytes; None: unknown.
        margin: share of `free` left to the driver, the kernels' workspaces and fragmentation.
    """
    peak, reserve = readable_bytes(cost.peak), f"{margin:.0%} kept for the driver and fragmentation"
    if free is None:
        return Verdict(None, f"The free memory is unknown; the run is predicted to need {peak}.")
    usable = int(free * (1 - margin))
    if cost.peak <= usable:
        return Verdict(True, f"Fits: {peak} predicted, {readable_bytes(free)} free ({reserve}).")
    problem = f"Does not fit: {peak} predicted, {readable_bytes(free)} free ({reserve}). "
    if cost.weights > usable:
        cure = "quantize it (quantize 'nf4'), or use a larger card"
        return Verdict(False, f"{problem}The frozen base takes {readable_bytes(cost.weights)}: {cure}.")
    changes = []
    if not cost.gradient_checkpointing:
        changes.append("gradient_checkpointing true (a third more work, most activations gone)")
    if cost.batch_size > 1:
        changes.append("micro_batch_size 1 (one picture in a forward pass; the result is the same)")
    if cost.optimizer > max(cost.adapter, cost.peak // 50):
        changes.append(f"optimizer 'adamw8bit' (saves about {readable_bytes(cost.optimizer * 3 // 4)})")
    if cost.activations > cost.peak // 10:
        changes.append("a lower resolution (activations grow with the area)")
    if cost.adapter + cost.gradients + cost.optimizer > cost.peak // 10:
        changes.append("a lower rank")
    return Verdict(False, problem + "Change one at a time: " + "; ".join(changes or ["use a larger card"]) + ".")


def ladder(config: Config) -> list[Config]:
    """Settings for a run that is out of memory: the config first, each further one needs less memory.

    Sides stay at LOWEST pixels or more; a config below that, as the embedded base's, is at most halved.
    """
    return [lower for lower, _ in _run_rungs(config)]


def _run_rungs(config: Config) -> Iterable[tuple[Config, tuple[str, ...]]]:
    """The `rungs` that a run on this machine takes."""
    if not config.fit_memory:
        return [(config, ())]
    bits = bases.can_quantize(choose_device(config.device))
    return rungs(config, max(32, min(LOWEST, config.resolution // 2)), bits)


def rungs(config: Config, smallest: int = LOWEST, bits: bool = True) -> Iterator[tuple[Config, tuple[str, ...]]]:
    """Settings that need less and less memory, the fastest first, each with its changes.

    Gradient checkpointing, 8-bit moments, a base in NF4, the batch in parts (same result), a lower resolution.

    Args:
        smallest: the lowest resolution, in pixels.
        bits: whether bitsandbytes can be used.
    """
    changes: tuple[str, ...] = ()
    yield config, changes
    if not config.gradient_checkpointing:
        config, changes = config.with_(gradient_checkpointing=True), ("gradient checkpointing (a third more work)",)
        yield config, changes
    if config.optimizer == "adamw" and bits:
        config, changes = config.with_(optimizer="adamw8bit"), (*changes, "optimizer adamw8bit")
        yield config, changes
    if config.quantize == "none" and bits and config.algorithm not in WHOLE:
        config, changes = config.with_(quantize="nf4"), (*changes, "the base held in NF4")
        yield config, changes
    whole_batch = changes
    while config.at_once > 1:
        config = config.with_(micro_batch_size=-(-config.at_once // 2))
        changes = (*whole_batch, f"the batch in parts of {config.at_once}")
        yield config, changes
    full_size = changes
    while config.resolution - config.bucket_step >= max(smallest, config.min_bucket_side or 0):
        config = config.with_(resolution=config.resolution - config.bucket_step)
        yield config, (*full_size, f"resolution {config.resolution}")


def choose_settings(
    base: bases.Base, config: Config, card: Card, store: Path | None = None, local: bool = False
) -> Prediction:  # fmt: skip
    """The fastest settings that fit on a card, found by changing the given ones step by step; pictures are not scanned.

    Args:
        store: folder of earlier predictions; None predicts again.
        local: only with changes that a run on this machine makes.
    """
    dtype, requested = card.dtype(config.mixed_precision), None
    for settings, changes in _run_rungs(config) if local else rungs(config, bits=card.device != "mps"):
        size = (settings.resolution, settings.resolution)
        cost = stores.step_cost(base, settings, size=size, dtype=dtype, device=card.device, store=store)
        requested, fits = requested or cost, verdict(cost, card.free).fits
        prediction = Prediction(base.name, card, settings, changes, fits, cost, requested, settings.steps)
        packed = settings.quantize != "none" or card.device == "mps"
        if fits is not False or (packed and cost.weights > (card.free or 0) * (1 - MARGIN)):
            break  # no further change makes the frozen base smaller
    return prediction


def plan_for_cards(
    base: bases.Base, config: Config, names: list[str] | None = None, store: Path | None = None
) -> list[Prediction]:
    """A prediction for each card; pictures are not scanned.

    Args:
        names: from CARDS; None takes all, and this machine's NVIDIA card.
        store: folder of earlier predictions; None is the user's own.

    Raises:
        ValueError: an unknown card, or settings that do not suit the base.
    """
    local, store = cards.this_machine() if names is None else None, store or stores.prediction_store()
    chosen = [*map(cards.card, names or cards.CARDS), *([local] if local else [])]
    return [choose_settings(base, config, card, store) for card in chosen]


def largest(
    base: bases.Base, config: Config, names: list[str] | None = None, store: Path | None = None
) -> dict[str, tuple[int | None, int | None]]:
    """The largest resolution with one picture, and the largest batch at the config's resolution, that fit on each card.

    Args:
        config: its other settings are kept.
        names: from CARDS; None takes all.
        store: folder of earlier predictions; None is the user's own.

    Returns:
        Card → (pixels, pictures) of SIDES and BATCHES; None if the smallest does not fit.
    """
    store = store or stores.prediction_store()

    def fits(card: Card, side: int, batch: int) -> bool:
        asked = config.with_(batch_size=batch, micro_batch_size=None)
        dtype = card.dtype(config.mixed_precision)
        cost = stores.step_cost(base, asked, size=(side, side), dtype=dtype, device=card.device, store=store)
        return verdict(cost, card.free).fits is True

    answers = {}
    for card in map(cards.card, names or cards.CARDS):
        sides = bisect_left(SIDES, True, key=lambda side: not fits(card, side, 1))
        batches = bisect_left(BATCHES, True, key=lambda batch: not fits(card, config.resolution, batch))
        answers[card.name] = (SIDES[sides - 1] if sides else None, BATCHES[batches - 1] if batches else None)
    return answers


def predict(
    config: Config, *, base: bases.Base | None = None, card: Card | str | None = None, store: Path | None = None
) -> Prediction:
    """Predict memory, minutes, steps and file size of a run, with the fastest settings that fit.

    Without the dataset, the steps are those of the config, and pictures and epochs are unknown. With epochs, the steps
    are those of a single bucket without held-out pictures.

    Args:
        base: None opens the config's; for a named base nothing is downloaded.
        card: a name from CARDS, or a card of your own; None is the device of this machine that the config trains on.
        store: folder of earlier predictions; None is the user's own.

    Raises:
        ValueError: an unknown card, settings that do not suit the base, a device that torch cannot use, or no usable
            picture.
        FileNotFoundError: no such base.
    """
    if base is None:
        kind = config.prediction_type, config.zero_terminal_snr
        base = bases.known(config.base) if named.find(config.base) else bases.open(config.base, *kind)
    local = card is None
    card = cards.card(card) if isinstance(card, str) else card or cards.local_card(config.device)
    prediction = choose_settings(base, config, card, store or stores.prediction_store(), local)
    try:
        pictures = datasets.scan_dataset(config)
    except FileNotFoundError as error:
        return replace(prediction, problem=str(error))
    steps = config.total_steps(-(-pictures.epoch_size // config.batch_size))
    return replace(prediction, steps=steps, pictures=len(pictures), epoch_size=pictures.epoch_size)
