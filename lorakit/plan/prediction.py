"""What a run takes on a card, to look at in a notebook or at a terminal."""

from dataclasses import dataclass
from html import escape
from typing import Any

from lorakit import page
from lorakit.config import Config
from lorakit.plan.cards import Card
from lorakit.plan.memory import StepCost, readable_bytes
from lorakit.plots import ACCENT, TONES

EFFICIENCY = 0.35  # share of a card's peak rate that a training step of batch 1 reaches: an estimate
OVERHEAD = 0.08  # seconds of a step for launching kernels and for the optimizer: an estimate


@dataclass(frozen=True, repr=False)
class Prediction:
    """The fastest settings that fit on a card, and the memory, time, steps and file size of a run with them."""

    base: str  # its name
    card: Card
    config: Config  # the settings asked for, with the changes
    changes: tuple[str, ...]  # that make the run fit
    fits: bool | None  # None: the card's memory is unknown
    cost: StepCost  # with the changes
    requested: StepCost  # without them
    steps: int | None  # optimizer updates of the run; None: the config gives epochs, and the pictures are unknown
    pictures: int | None = None
    epoch_size: int | None = None  # pictures × repeats
    problem: str = ""  # why the pictures are unknown

    @property
    def minutes(self) -> float | None:
        """Estimated time of the run; None if the card's rate in that precision or the run's length is unknown."""
        full_rate = self.cost.precision == "float16" or (self.cost.precision == "bfloat16" and self.card.bf16)
        if not self.card.tflops or not full_rate or self.steps is None:
            return None
        return self.steps * (self.cost.flops / (self.card.tflops * 1e12 * EFFICIENCY) + OVERHEAD) / 60

    def describe(self) -> str:
        """One line for a person."""
        peak, changes = readable_bytes(self.cost.peak), "; ".join(self.changes)
        if self.fits is None:
            return f"{peak} predicted; the free memory is unknown"
        if not self.fits:
            text = f"does not fit, {peak} predicted even with: {changes or 'no change'}"
        else:
            text = f"fits, {peak} predicted" + (f", with: {changes}" if changes else "")
            if self.minutes is not None:
                text += f"; {self.steps} steps in about {self.minutes:.0f} min (estimated)"
        return f"{self.card.memory:.1f} GiB: {text}"

    def facts(self) -> dict[str, Any]:
        """The prediction for programs."""
        gib = {part: round(size / 2**30, 3) for part, size in self.cost.parts.items()}
        return {
            "card": self.card.name, "memory_gib": self.card.memory and round(self.card.memory, 2), "fits": self.fits,
            "peak_gib": round(self.cost.peak / 2**30, 3), "parts_gib": gib,
            "asked_peak_gib": round(self.requested.peak / 2**30, 3), "file_mb": round(self.cost.file_size / 1e6, 2),
            "changes": list(self.changes), "estimated_minutes": self.minutes and round(self.minutes, 1),
            "resolution": self.config.resolution, "batch_size": self.config.batch_size,
            "micro_batch_size": self.config.at_once,
        }  # fmt: skip

    def _figures(self) -> dict[str, str]:
        steps = "unknown" if self.steps is None else str(self.steps)
        if self.steps is not None and self.epoch_size:
            steps += f" = {self.steps * self.config.batch_size / self.epoch_size:.3g} epochs"
        return {
            "pictures": "unknown" if self.pictures is None else str(self.pictures), "steps": steps,
            "time": "unknown" if self.minutes is None else f"about {self.minutes:.0f} min (estimated)",
            "LoRA file": f"{self.cost.file_size / 1e6:.1f} MB",
        }  # fmt: skip

    def _notes(self) -> list[tuple[str, str]]:
        """Sentences, each with its tone."""
        tone = {True: "warning" if self.changes else "good", False: "bad", None: "warning"}[self.fits]
        notes = [(f"{self.base} on {self.card.name}, {self.describe()}", tone)]
        if self.problem:
            notes.append((f"The pictures are unknown, and so are epochs: {self.problem}", "warning"))
        if self.card.device == "cpu" and self.config.base != "demo":
            notes.append(("There is no NVIDIA card here: training this base on a CPU takes days.", "bad"))
        return [*notes, (f"device {self.card.device}, precision {self.cost.precision}", "")]

    def __repr__(self) -> str:
        (first, _), *notes = self._notes()
        figures = [f"  {name:<15}{text}" for name, text in self._figures().items() if name != "LoRA file"]
        return "\n".join([first, self.cost.describe(), *figures, *(text for text, _ in notes)])

    def _repr_html_(self) -> str:
        free, peak = self.card.free, self.cost.peak
        rows = []
        for part, size in (self.cost.parts | {"peak": peak}).items():
            bar = f"width:{min(size / (free or peak or 1), 1):.1%};background:{ACCENT}"
            bar = f'<div style="width:240px;background:#8883"><div style="{bar}">&nbsp;</div></div>'
            rows.append([part, readable_bytes(size), bar])
        rows += [[name, escape(text), ""] for name, text in self._figures().items()]
        first, *notes = (
            f'<div style="color:{TONES[tone]};line-height:1.3;white-space:pre-wrap">{escape(text)}</div>'
            for text, tone in self._notes()
        )
        scale = f"of {readable_bytes(free)} free" if free else "of the peak"
        return "".join([first, page.table(rows, "", "predicted", scale), *notes])
