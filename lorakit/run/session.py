"""What the parts of a run share while it trains."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lorakit import storage
from lorakit.config import Config
from lorakit.console import Console
from lorakit.run import preparation
from lorakit.run.preparation import Prepared
from lorakit.run.run_folder import RunFolder
from lorakit.train import ALONE, State, Team


@dataclass
class Session:
    """A run between two changes of its config: from a start to its end, or until memory runs out.

    Attributes:
        models: "unet", and the text encoders that are trained, with the adapter in them.
        metadata: makes the metadata of a LoRA that was trained until a step.
        losses: step → loss, of the steps since the start.
        copier: brings copies to the backup place.
    """

    folder: RunFolder
    prepared: Prepared
    models: dict[str, Any]
    state: State
    console: Console
    metadata: Callable[[int], dict[str, str]]
    losses: dict[int, float] = field(default_factory=dict)
    copier: storage.Copier | None = None
    team: Team = ALONE

    @property
    def config(self) -> Config:
        return self.prepared.config

    @property
    def unet(self) -> Any:
        return self.models["unet"]

    @property
    def total(self) -> int:
        """Optimizer updates of the whole run."""
        return self.prepared.examples.total_steps

    @property
    def settings(self) -> dict:
        """The settings that decide the result, as checkpoints keep them."""
        return preparation.settings(self.config, self.prepared)

    def about(self, step: int) -> dict:
        """The LoRA's facts for a checkpoint of a step."""
        return {"family": self.prepared.base.family, "metadata": self.metadata(step)}
