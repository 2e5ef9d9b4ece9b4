"""Read finished and unfinished runs, and find what differs between them."""

import json
import math
import re
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit import config as configs
from lorakit import page, plots, run, storage
from lorakit.config import Config
from lorakit.evaluate.candidates import read_config

PLACES = ("dataset", "mask", "regularisation", "start_from")  # settings that name a folder or file
DECIDE_LOSS = {  # losses under different values of these cannot be compared
    "base", "prediction_type", "zero_terminal_snr", "resolution", "loss", "huber_delta", "min_snr_gamma", "debiased",
    "mask", "unmasked_weight",
}  # fmt: skip
PATH = re.compile(r"(?<![\w:/.])(?:~|[A-Za-z]:)?(?:[/\\][^\s'\"/\\:;,]+)+[/\\]([^\s'\"/\\:;,]+)")


@dataclass(frozen=True)
class RunResult:
    """The figures of a run; None where one is not known."""

    name: str
    steps: int  # done so far
    total: int | None
    loss: float | None  # of training at the end, smoothed
    lowest: float | None  # validation loss
    lowest_at: int | None  # its step
    validation_loss: float | None  # at the end, like the overfit gap
    overfit_gap: float | None
    seconds_a_step: float | None
    file_mb: float | None  # size of the finished file, in 10⁶ bytes
    recommended: str | None  # checkpoint to keep; this, likeness and faults are from the run's report
    gain: float | None
    faults: tuple[str, ...] | None
    curve: plots.Curve = field(repr=False)

    def figures(self) -> dict[str, str]:
        """Name → figure, as texts for a table."""
        at = "" if self.lowest_at is None else f" at step {self.lowest_at}"
        return {
            "steps": f"{self.steps}" + ("" if self.total is None else f" of {self.total}"),
            "training loss, smoothed": page.text(self.loss, "#.3g"),
            "lowest validation loss": page.text(self.lowest, "#.4g") + at,
            "validation loss at the end": page.text(self.validation_loss, "#.4g"),
            "overfit gap at the end": page.text(self.overfit_gap, ".3f"),
            "seconds a step": page.text(self.seconds_a_step, ".3g"),
            "file, MB": page.text(self.file_mb, ".1f"),
            "checkpoint to keep": page.text(self.recommended),
            "likeness": page.text(self.gain, ".2f"),
            "faults": "—" if self.faults is None else ", ".join(self.faults) or "none",
        }


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder contains."""

    folder: Path
    name: str
    config: Config | None
    decided: dict[str, Any]  # settings that decide the result, by its newest checkpoint: contents in place of paths
    metadata: dict[str, str]  # of the LoRA in that checkpoint
    saved: int  # its step
    log: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path, name: str, notes: list[str]) -> "RunRecord":
        """Read a run; what is damaged or missing is added to `notes`."""
        problems: list[str] = []
        config, saved, log = read_config(folder, problems), {}, []
        for path in run.checkpoint_paths(folder / "checkpoints"):
            try:
                saved = run.checkpoint_facts(path)
                break
            except (OSError, ValueError) as error:
                problems.append(str(error))
        try:
            log = run.read_log(folder / "log.jsonl", problems.append)
        except OSError:
            problems.append("it has no log yet")
        notes += [f"{name}: {problem}" for problem in problems]
        metadata = (saved.get("about") or {}).get("metadata") or {}
        decided = dict(saved.get("settings") or {})
        if "base" in decided:  # a digest, which says nothing to a reader
            decided["base"] = metadata.get("ss_sd_model_name", decided["base"])
        return cls(folder, name, config, decided, metadata, saved.get("step", 0), log)

    @property
    def file(self) -> Path | None:
        """The finished file."""
        file = self.config and self.folder / f"{self.config.name}.safetensors"
        return file if file and file.is_file() else None

    def weights(self, notes: list[str]) -> Path | None:
        """The finished file, else the newest checkpoint that can be read."""
        for path in [*([self.file] if self.file else []), *run.checkpoint_paths(self.folder / "checkpoints")]:
            try:
                run.lora_of(path)
                return path
            except (ValueError, OSError, FloatingPointError) as error:
                notes.append(f"{self.name}: {error}")
        return None

    def result(self) -> RunResult:
        """The run's figures, from its log, its finished file and its report."""
        steps = [line["step"] for line in self.log if "loss" in line]
        losses = [line["loss"] for line in self.log if "loss" in line]
        smoothed = [value for value in plots.smooth(losses) if math.isfinite(value)]
        validation = [(line["step"], line["validation_loss"]) for line in self.log if _finite(line, "validation_loss")]
        lowest_at, lowest = min(validation, key=lambda mark: mark[1], default=(None, None))
        gaps = [line["overfit_gap"] for line in self.log if _finite(line, "overfit_gap")]
        total = self.config.steps if self.config else None
        with suppress(ValueError):  # a run counted in epochs has its steps in its LoRA's metadata
            total = total or int(self.metadata.get("ss_max_train_steps", "")) or None
        recommended, gain, faults = _reported(self.folder / "report.json")
        return RunResult(
            self.name, max([self.saved, *(line["step"] for line in self.log[-1:])]), total,
            round(smoothed[-1], 6) if smoothed else None, lowest, lowest_at, validation[-1][1] if validation else None,
            gaps[-1] if gaps else None, _pace(self.log), self.file.stat().st_size / 1e6 if self.file else None,
            recommended, gain, faults, plots.Curve(self.name, steps, losses, validation),
        )  # fmt: skip


def _finite(line: dict[str, Any], key: str) -> bool:
    return isinstance(value := line.get(key), int | float) and math.isfinite(value)


def _pace(log: Sequence[dict[str, Any]]) -> float | None:
    """Seconds a step: the median, which ignores pauses for samples and checkpoints, and gaps between two starts."""
    times = [(line["step"], line["seconds"]) for line in log if _finite(line, "seconds")]
    pairs = zip(times, times[1:], strict=False)
    paces = [now - before for (step, before), (after, now) in pairs if after == step + 1 and now > before]
    return round(statistics.median(paces), 4) if paces else None


def _reported(file: Path) -> tuple[str | None, float | None, tuple[str, ...] | None]:
    """Checkpoint to keep, likeness and faults by a run's report; None where there is none to be read."""
    try:
        facts = json.loads(file.read_text("utf-8"))
        gain = facts["lines"][0] if facts["lines"] else {}  # the checklist's first line
        faults = tuple(map(str, facts["faults"]))
        return facts["recommended"], gain["figure"] if _finite(gain, "figure") else None, faults
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None, None


def differences(records: Sequence[RunRecord]) -> dict[str, tuple[Any, ...]]:
    """Setting that decides the result → its value in each run. Folders and files are compared by content."""
    table = {}
    counted = len({record.config.repeats for record in records if record.config}) > 1  # part of a dataset's digest
    for name in Config.model_fields:
        if name in run.FREE - {"trigger"}:  # the prompts must contain it
            continue
        values = [getattr(one.config, name) if one.config else one.decided.get(name) for one in records]
        shown = values
        if name in PLACES or name == "base":
            shown = [_place_name(name, record, value) for record, value in zip(records, values, strict=True)]
            if all(record.decided for record in records) and not (name == "dataset" and counted):
                values = [record.decided.get(name) for record in records]
        if len({json.dumps(value) for value in values}) == 1:
            continue
        if shown is not values and len(set(shown)) == 1:  # different contents under one name
            shown = [f"{same}, contents {str(value)[:6]}" for same, value in zip(shown, values, strict=True)]
        table[name] = tuple(shown)
    return table


def _place_name(setting: str, record: RunRecord, value: str | None) -> str | None:
    """The name of a folder or file, without its path."""
    if setting == "base":
        value = record.decided.get("base", value)
        return value if value and not configs.is_place(value) else last_part(value)
    return last_part(value) if record.config else None


def last_part(path: str | None) -> str | None:
    return path and re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def remarks(records: Sequence[RunRecord], differing: dict[str, tuple[Any, ...]]) -> list[str]:
    """What must be known to compare these runs rightly."""
    lines = [f"{one.name} has no checkpoint yet" for one in records if not one.decided and not one.file]
    if names := [name for name in differing if name in DECIDE_LOSS]:
        lines.append(f"the runs differ in {', '.join(names)}, which change the loss itself: do not compare losses")
    if len({one.decided["held_out"] for one in records if "held_out" in one.decided}) > 1:
        lines.append("the runs held out different pictures: do not compare validation losses")
    if "rank" in differing and "alpha" not in differing:
        lines.append("the runs differ in rank and have the same alpha: the scale alpha / rank differs too")
    return lines


def without_paths(text: str, records: Sequence[RunRecord] = ()) -> str:
    """A text without the paths of this machine."""
    paths = {record.folder for record in records}
    for record in records:
        values = [getattr(record.config, name) for name in ("base", *PLACES)] if record.config else []
        paths |= {Path(value) for value in values if value and configs.is_place(value)}
    for path in sorted(map(str, paths), key=len, reverse=True):
        text = text.replace(path, last_part(path) or path)
    return PATH.sub(r"\1", text.replace(str(storage.home()), "~"))
