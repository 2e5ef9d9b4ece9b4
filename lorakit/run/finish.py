"""What a run makes at its end: the comparison sheet and the loss figure."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from lorakit import adapter as adapters
from lorakit import base as bases
from lorakit import plots, sample
from lorakit.base import Progress
from lorakit.config import Config
from lorakit.run import preparation, run_folder
from lorakit.run.log import Console

STRENGTHS = (0.0, 0.5, 0.7, 0.9, 1.0)  # the guide's, and the bare base


def draw(say: Console, what: str, how: Callable[[], Path | None]) -> Path | None:
    """A picture of the run; what stands in its way is said, and undoes nothing."""
    try:
        return how()
    except Exception as error:  # a full disk or card too
        say(f"look      no {what}: {type(error).__name__}: {error}")
        say.failed(what, error)
        return None


def draw_loss(folder: Path, config: Config) -> None:
    lines = run_folder.read_log(folder / "log.jsonl")
    if lines:
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        judged = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
        plots.loss(steps, losses, path=folder / "loss.png", title=config.name, validation=judged)


def draw_comparison(
    base: bases.Base, lora: Path, prompts: Sequence[str], config: Config, path: Path, *,
    strengths: Sequence[float] = STRENGTHS, progress: bool | Progress = True, stop: threading.Event | None = None,
    loaded: adapters.Models | None = None, store: Path | None = None,
) -> Path | None:  # fmt: skip
    """A sheet of pictures made with the exported file: a row a prompt, a column a strength, the same noise in each.

    Args:
        stop: set from elsewhere, ends it after the current denoising step.
        loaded: models of the base that are there already, as `sample.stream` takes them.
        store: folder of text embeddings; None keeps none.

    Returns:
        The sheet's path; None where it was stopped: nothing is written then.
    """
    own = adapters.load(lora)
    try:
        with preparation.bar(progress) as show:
            rows = sample.generate(
                base, prompts, seeds=config.seed, size=(config.resolution, config.resolution), strengths=strengths,
                attach=lambda models: adapters.attach(models, base, own), adapts=own.adapts,
                steps=config.sample_steps, guidance=config.sample_guidance, clip_skip=config.clip_skip,
                device=config.device, precision=config.mixed_precision, quantize=config.quantize,
                on_picture=lambda n: show("comparing", n, len(prompts) * len(strengths)), stop=stop, loaded=loaded,
                folder=store,
            )  # fmt: skip
    except KeyboardInterrupt:
        if stop and stop.is_set():
            return None
        raise
    labels = ["base" if s == 0 else f"strength {s:g}" for s in strengths]
    plots.grid(rows, row_labels=list(prompts), column_labels=labels, path=path)
    return path
