"""What a run makes at its end: the finished file and its proof, the loss figure, the comparison."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorakit import adapter as adapters
from lorakit import plots, sample, storage
from lorakit.adapter import Lora
from lorakit.base import Base
from lorakit.config import Config
from lorakit.console import Console
from lorakit.device import Compute
from lorakit.run import checkpoint, run_folder
from lorakit.run.run_folder import RunFolder
from lorakit.run.session import Session
from lorakit.sample import Loaded, Sampling, Source

STRENGTHS = (0.0, 0.5, 0.7, 0.9, 1.0)  # the guide's, and the bare base
Made = TypeVar("Made")


@dataclass(frozen=True)
class Finished:
    """What the comparison of a finished run is made with."""

    base: Base
    file: Path
    config: Config  # the one that the run ended with

    @property
    def lora(self) -> Lora:
        return run_folder.lora_of(self.file)

    @property
    def sampling(self) -> Sampling:
        return Sampling.of(self.config)

    @property
    def compute(self) -> Compute:
        return Compute.of(self.config)


def attempt(console: Console, what: str, make: Callable[[], Made]) -> Made | None:
    """Make a picture of the run; an error is shown and noted, and ends nothing."""
    try:
        return make()
    except Exception as error:  # a full disk or card too
        console.say(f"look      no {what}: {type(error).__name__}: {error}")
        console.failed(what, error)
        return None


def draw_loss(folder: RunFolder, config: Config) -> None:
    """Draw the loss curve into loss.png."""
    if lines := folder.log():
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        validation = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
        plots.loss(steps, losses, title=config.name, validation=validation).save(folder.loss_figure)


def draw_comparison(
    source: Source, prompts: Sequence[str], path: Path, *, strengths: Sequence[float] = STRENGTHS,
    loaded: Loaded | None = None, console: Console | None = None,
) -> Path | None:  # fmt: skip
    """Write a sheet of prompts × strengths; None when it was stopped, and nothing is written."""
    console = console or Console()
    try:
        sheet = sample.grid(source, prompts, strengths, loaded=loaded, console=console)
    except KeyboardInterrupt:
        if not console.stop.is_set():
            raise
        return None
    sheet.figure(path)
    return path


def export(session: Session) -> Path:
    """Write the finished file, read it back and compare it with the adapter. Older states make room for it.

    Raises:
        OSError: there is no room even then, or no right to write.
    """
    base, adapter, file = session.prepared.base, session.state.adapter, session.folder.lora_file(session.config)
    metadata = session.metadata(session.total) | run_folder.thumbnail(session.folder.samples(session.total))
    with session.state.evaluated():
        try:
            path = adapters.save_adapter(adapter, base, file, metadata=metadata)
        except OSError as error:
            if error.errno not in storage.DISK_FULL:
                raise
            checkpoint.make_room(session.folder.checkpoints)
            path = adapters.save_adapter(adapter, base, file, metadata=metadata)
        proof = adapters.prove(path, adapter, base)
    size = path.stat().st_size / 1e6
    session.console.say(f"export    {path.name}, {size:.1f} MB, kohya's format (A1111, Forge, ComfyUI, Civitai)")
    for line in proof.lines():
        session.console.say(line)
    return path
