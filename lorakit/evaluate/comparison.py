"""One change at a time: runs beside each other, and a sweep that trains them.

What differs among their settings, their losses in one figure, pictures of the same prompts and seeds, and figures.
"""

import json
import math
import re
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from html import escape
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from lorakit import config as configs
from lorakit import page as page_module
from lorakit import plots, run, sample, storage
from lorakit.config import Config
from lorakit.device import out_of_memory
from lorakit.evaluate import candidates, checklist
from lorakit.evaluate import variants as variants_module

PLACES = ("dataset", "mask", "regularisation", "start_from")  # settings that name a folder or file
MEASURED_BY = {  # a loss under one value says nothing against a loss under another
    "base", "prediction_type", "zero_terminal_snr", "resolution", "loss", "huber_delta", "min_snr_gamma", "debiased",
    "mask", "unmasked_weight",
}  # fmt: skip
ASKED_WITH = ("clip_skip", "prediction_type", "zero_terminal_snr")  # decide what a picture looks like, too
MOST = 4  # prompts, where none are asked for
PATH = re.compile(r"(?<![\w:/.])(?:~|[A-Za-z]:)?(?:[/\\][^\s'\"/\\:;,]+)+[/\\]([^\s'\"/\\:;,]+)")


@dataclass(frozen=True)
class Trial:
    """One run among others. What cannot be told is None."""

    name: str
    steps: int  # done
    total: int | None
    loss: float | None  # of training at the end, smoothed
    lowest: float | None  # validation loss
    lowest_at: int | None  # its step
    validation_loss: float | None  # at the end
    overfit_gap: float | None  # at the end
    seconds_a_step: float | None
    file_mb: float | None  # the finished file's
    recommended: str | None  # checkpoint; this and the next two are its report's
    gain: float | None
    faults: tuple[str, ...] | None
    curve: plots.Curve = field(repr=False)

    def facts(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "curve"}

    def figures(self) -> dict[str, str]:
        """As they are shown, by their names."""
        at = "" if self.lowest_at is None else f" at step {self.lowest_at}"
        return {
            "steps": f"{self.steps}" + ("" if self.total is None else f" of {self.total}"),
            "training loss, smoothed": _told(self.loss, "#.3g"),
            "lowest validation loss": _told(self.lowest, "#.4g") + at,
            "validation loss at the end": _told(self.validation_loss, "#.4g"),
            "overfit gap at the end": _told(self.overfit_gap, ".3f"),
            "seconds a step": _told(self.seconds_a_step, ".3g"),
            "file, MB": _told(self.file_mb, ".1f"),
            "checkpoint to keep": _told(self.recommended),
            "likeness": _told(self.gain, ".2f"),
            "faults": "—" if self.faults is None else ", ".join(self.faults) or "none",
        }


@dataclass(frozen=True)
class Trials:
    """Runs beside each other."""

    runs: tuple[Trial, ...]
    differing: dict[str, tuple]  # setting → its value in each run
    told: tuple[str, ...] = ()  # what is missing, and what must be known to compare them
    asked: tuple[tuple[str, int], ...] = ()  # prompts and seeds, a row each
    columns: tuple[str, ...] = ()  # of the pictures: the bare base, and runs
    rows: tuple[tuple[Image.Image | None, ...], ...] = field(default=(), repr=False)
    made: str = ""  # how the pictures were
    missing: tuple[str, ...] = ()  # what could not be made, and why: a line each

    @property
    def curves(self) -> list[plots.Curve]:
        return [trial.curve for trial in self.runs]

    def tables(self) -> dict[str, list[list[str]]]:
        """What differs and the figures, as texts: a row's name, and what it is in each run. Empty rows are left out."""
        settings = [[name, *map(_told, values)] for name, values in self.differing.items()]
        shown = [trial.figures() for trial in self.runs]
        figures = [[name, *(own[name] for own in shown)] for name in (shown[0] if shown else ())]
        return {"settings that differ": settings, "figures": [row for row in figures if set(row[1:]) != {"—"}]}

    def facts(self) -> dict:
        """For programs, fit for JSON. Names no path."""
        names = [trial.name for trial in self.runs]
        return {
            "runs": [trial.facts() for trial in self.runs],
            "differing": {name: dict(zip(names, values, strict=True)) for name, values in self.differing.items()},
            "pictures": {"made": self.made, "asked": [list(row) for row in self.asked], "columns": list(self.columns)},
            "told": list(self.told),
        }  # fmt: skip

    def describe(self) -> str:
        """For a terminal."""
        parts = []
        for title, rows in self.tables().items():
            lines = [[title, *(trial.name for trial in self.runs)], *(rows or [["none", *[""] * len(self.runs)]])]
            widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
            cells = [[f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)] for line in lines]
            parts += ["  ".join(line).rstrip() for line in cells] + [""]
        return "\n".join([*parts, *(f"note: {text}" for text in self.told)]).rstrip()

    def html(self) -> str:
        """One page that holds its pictures, of any colour scheme."""
        title = escape(", ".join(trial.name for trial in self.runs))
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{page_module.STYLE}</style></head>'
            f"<body><h1>{title}</h1>{_body(self)}</body></html>\n"
        )

    def _repr_html_(self) -> str:
        return f'<div style="max-width:900px">{_body(self)}</div>'


def save_comparison(trials: Trials, folder: str | Path) -> tuple[Path, Path]:
    """Write comparison.html and comparison.json into a folder, and the curves beside them as curves.png."""
    page, facts = Path(folder) / "comparison.html", Path(folder) / "comparison.json"
    with storage.write_file(page) as partial:
        partial.write_text(trials.html(), "utf-8")
    with storage.write_file(facts) as partial:
        partial.write_text(json.dumps(trials.facts(), indent=2, ensure_ascii=False) + "\n", "utf-8")
    plots.losses(trials.curves, path=Path(folder) / "curves.png")
    return page, facts


# ── Comparing ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Run:
    """What is read of a run's folder."""

    folder: Path
    name: str
    config: Config | None
    decided: dict  # what decides it, as its newest checkpoint has it: contents and no paths
    metadata: dict  # of its LoRA, from there too
    saved: int  # step of that checkpoint
    log: list[dict]

    @property
    def file(self) -> Path | None:
        """The finished file."""
        file = self.config and self.folder / f"{self.config.name}.safetensors"
        return file if file and file.is_file() else None


def compare_runs(
    sources: Sequence[str | Path], *, prompts: Sequence[str] = (), seeds: Sequence[int] = (42,), strength: float = 1.0,
    pictures: bool = True, base: str | None = None, device: str | None = None, say: Callable[[str], None] = print,
    stop: threading.Event | None = None, shared: run.Shared | None = None,
) -> Trials:  # fmt: skip
    """Runs beside each other: what differs, curves, figures, and the same pictures of each.

    Pictures are made with the first run's base, sampler and size: with the base alone, and with each run's finished
    file, or its newest checkpoint. What is damaged or missing is told in the result, and the rest compared.

    Args:
        sources: folders of runs, or of sweeps for all of theirs.
        prompts: () takes the first run's.
        base: as `base.open` takes it; None is the first run's.
        device: None is the first run's.
        stop: set from elsewhere, ends it after the current denoising step, with the pictures made so far.
        shared: of runs before, whose models are used where they are of the same base.

    Raises:
        FileNotFoundError: no such folder. ValueError: it holds no run.
    """
    told: list[str] = []
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    found = [_read(folder, name, told) for folder, name in _labelled([f for s in sources for f in _runs(Path(s))])]
    if not found:
        raise ValueError("There is nothing to compare: give the folders of runs.")
    differing = _differing(found)
    told += _remarks(found, differing)
    first, made = next((one.config for one in found if one.config), None), _Pictures()
    missing: tuple[str, ...] = ()
    if pictures and first is None:
        told.append("no pictures: no run's settings can be read")
    elif pictures:
        if odd := [name for name in ASKED_WITH if name in differing]:
            told.append(f"they differ in {', '.join(odd)}: all pictures are made with the first run's")
        asked = tuple(product(prompts or first.sample_prompts[:MOST] or (first.trigger,), seeds))
        try:
            made = _pictures(found, first, asked, strength, base or first.base, device or first.device, say, told,
                             stop or threading.Event(), shared or run.Shared())  # fmt: skip
        except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not out_of_memory(error):
                raise
            told.append(f"no pictures: {str(error) or type(error).__name__}")
            missing = (without_paths(told[-1], found),)
    public = tuple(dict.fromkeys(without_paths(text, found) for text in told))
    trials = tuple(map(_trial, found))
    return Trials(trials, differing, public, made.asked, made.columns, made.rows, made.made, missing)


def _runs(source: Path) -> list[Path]:
    """The folder of a run, or those of a sweep's."""
    source = source.expanduser()
    if not source.is_dir():
        raise FileNotFoundError(f"There is no folder {source}. Give the folders of runs.")
    if run.is_run(source):
        return [source]
    inside = run.runs_in(source)
    if not inside:
        raise ValueError(f"{source.name} is no run and holds none: there is neither config.json nor checkpoints/.")
    return inside


def _labelled(folders: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Folders, each once, with names that tell them apart."""
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    short = [folder.name for folder in folders]
    long = [f"{f.parent.name}/{f.name}" if short.count(f.name) > 1 else f.name for f in folders]
    for place, (folder, name) in enumerate(zip(folders, long, strict=True)):
        yield folder, f"{name} ({long[: place + 1].count(name)})" if long.count(name) > 1 else name


def _read(folder: Path, name: str, told: list[str]) -> _Run:
    config, saved, log = None, {}, []
    try:
        config = configs.load(folder / "config.json")
    except (OSError, ValueError) as error:
        told.append(f"{name}: its settings cannot be read: {error}")
    for path in run.checkpoint_paths(folder / "checkpoints"):
        try:
            saved = run.checkpoint_facts(path)
            break
        except (OSError, ValueError) as error:
            told.append(f"{name}: {error}")
    file = folder / "log.jsonl"
    try:
        log = run.read_log(file, lambda text: told.append(f"{name}: {text}"))
    except OSError:
        told.append(f"{name}: there is no log of it yet")
    about = (saved.get("about") or {}).get("metadata") or {}
    return _Run(folder, name, config, saved.get("settings") or {}, about, saved.get("step", 0), log)


def _trial(one: _Run) -> Trial:
    steps = [line["step"] for line in one.log if "loss" in line]
    losses = [line["loss"] for line in one.log if "loss" in line]
    judged = [(line["step"], line["validation_loss"]) for line in one.log if _number(line.get("validation_loss"))]
    lowest = min(judged, key=lambda mark: mark[1], default=(None, None))
    gaps = [line["overfit_gap"] for line in one.log if _number(line.get("overfit_gap"))]
    smoothed = [value for value in plots.smooth(losses) if math.isfinite(value)]
    total = one.config.steps if one.config else None
    with suppress(ValueError):  # of a run counted in epochs, its LoRA tells
        total = total or int(one.metadata.get("ss_max_train_steps", "")) or None
    done = max([one.saved, *(line["step"] for line in one.log[-1:])])
    size = one.file.stat().st_size / 1e6 if one.file else None
    last = judged[-1][1] if judged else None
    return Trial(
        one.name, done, total, round(smoothed[-1], 6) if smoothed else None, lowest[1], lowest[0], last,
        gaps[-1] if gaps else None, _pace(one.log), size, *_reported(one.folder / "report.json"),
        plots.Curve(one.name, steps, losses, judged),
    )  # fmt: skip


def _pace(log: Sequence[dict]) -> float | None:
    """Seconds a step: the median, which knows no pause for samples or checkpoints and no gap between two starts."""
    times = [(line["step"], line["seconds"]) for line in log if _number(line.get("seconds"))]
    pairs = zip(times, times[1:], strict=False)
    found = [now - then for (step, then), (after, now) in pairs if after == step + 1 and now > then]
    return round(statistics.median(found), 4) if found else None


def _reported(file: Path) -> tuple[str | None, float | None, tuple[str, ...] | None]:
    """What a run's report says: the checkpoint to keep, likeness, faults; None each where there is none to be read."""
    try:
        facts, what = json.loads(file.read_text("utf-8")), {row[0]: row[2] for row in checklist.ROWS}["gain"]
        gain = next((line["figure"] for line in facts["lines"] if line["what"] == what), None)
        return facts["recommended"], gain if _number(gain) else None, tuple(map(str, facts["faults"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None, None, None


def _number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ── What differs ────────────────────────────────────────────────────────────────────────────────────────────────────


def _differing(found: Sequence[_Run]) -> dict[str, tuple]:
    """Settings that decide the result and are not the same in all runs. Folders and files are compared by contents."""
    table = {}
    counted = len({one.config.repeats for one in found if one.config}) > 1  # which a dataset's digest counts as well
    for name in Config.model_fields:
        if name in run.FREE - {"trigger"}:  # which prompts must say, whatever it decides
            continue
        values = [getattr(one.config, name) if one.config else one.decided.get(name) for one in found]
        shown = values
        if name in PLACES or name == "base":
            shown = [_named(name, one, value) for one, value in zip(found, values, strict=True)]
            if all(one.decided for one in found) and not (name == "dataset" and counted):
                values = [one.decided.get(name) for one in found]
        if len({json.dumps(value) for value in values}) == 1:
            continue
        if shown is not values and len(set(shown)) == 1:  # of one name, and not the same
            shown = [f"{own}, contents {str(value)[:6]}" for own, value in zip(shown, values, strict=True)]
        table[name] = tuple(shown)
    return table


def _named(setting: str, one: _Run, value: str | None) -> str | None:
    """A folder or file by its name alone."""
    if setting == "base":
        value = one.decided.get("base", value)
        return value if value and not configs.is_place(value) else last_part(value)
    return last_part(value) if one.config else None


def last_part(path: str | None) -> str | None:
    return path and re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _remarks(found: Sequence[_Run], differing: dict[str, tuple]) -> list[str]:
    """What must be known to compare them rightly."""
    remarks = [f"{one.name} has no checkpoint yet" for one in found if not one.decided and not one.file]
    if odd := [name for name in differing if name in MEASURED_BY]:
        remarks.append(f"they differ in {', '.join(odd)}: their losses are measured in other ways, and do not compare")
    if len({one.decided["held_out"] for one in found if "held_out" in one.decided}) > 1:
        remarks.append("they held out other pictures: their validation losses do not compare")
    if "rank" in differing and "alpha" not in differing:
        remarks.append("they differ in rank and have one alpha: the scale alpha / rank differs with it")
    return remarks


def without_paths(text: str, found: Sequence[_Run]) -> str:
    """A text without the paths of this machine."""
    paths = {one.folder for one in found}
    for one in found:
        own = [getattr(one.config, name) for name in ("base", *PLACES)] if one.config else []
        paths |= {Path(value) for value in own if value and configs.is_place(value)}
    for path in sorted(map(str, paths), key=len, reverse=True):
        text = text.replace(path, last_part(path) or path)
    return PATH.sub(r"\1", text.replace(str(Path.home()), "~"))


def _told(value: Any, form: str = "") -> str:
    if value is None:
        return "—"
    if isinstance(value, bool | dict | list | tuple):
        return json.dumps(value)
    return f"{value:{form or 'g'}}" if isinstance(value, float) else str(value)


# ── Pictures ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Pictures:
    asked: tuple[tuple[str, int], ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Image.Image | None, ...], ...] = ()
    made: str = ""


def _pictures(
    found: Sequence[_Run], first: Config, asked: Sequence[tuple[str, int]], strength: float, reference: str,
    device: str, say: Callable[[str], None], told: list[str], stop: threading.Event, shared: run.Shared,
) -> _Pictures:  # fmt: skip
    """Every prompt with every seed, by the bare base and by each run that fits it; a row each."""
    opened = candidates.open_for(reference, first)
    paths = {one.name: path for one in found if (path := _weights(one, told))}
    if not paths:
        raise ValueError("no run has weights yet")
    for one in found:
        if one.name in paths and one.decided.get("base", opened.name) != opened.name:
            told.append(f"{one.name} was trained on {one.decided['base']}; its pictures are made on {opened.name}")
    wanted = [(None, 0.0), *((name, strength) for name in paths)]
    variants = variants_module.make_variants(opened, wanted, paths, tell=told.append)
    prompts, own_seeds = zip(*asked, strict=True)
    side, ours = (first.resolution, first.resolution), list(variants)
    loaded = None
    if reference == first.base and device == first.device:
        shared.suit(first)
        loaded = shared.loaded
    rows: list[list[Image.Image | None]] = [[None] * len(ours) for _ in asked]
    say(f"pictures  {len(ours) * len(asked)}: {len(asked)} with the base and with {len(ours) - 1} of {len(found)} runs")
    stream = sample.stream(
        opened, prompts, list(variants.values()), seeds=own_seeds, size=side, steps=first.sample_steps,
        guidance=first.sample_guidance, clip_skip=first.clip_skip, device=device, precision=first.mixed_precision,
        quantize=first.quantize, stop=stop, folder=shared.cache, loaded=loaded,
    )  # fmt: skip
    with closing(stream):
        for row, column, picture in stream:
            rows[row][column] = picture
    done = sum(picture is not None for row in rows for picture in row)
    if done < len(ours) * len(asked):
        told.append(f"stopped after {done} of {len(ours) * len(asked)} pictures")
    made = (
        f"on {opened.name} at strength {strength:g}, {side[0]}×{side[1]} px, {first.sample_steps} steps, guidance "
        f"{first.sample_guidance:g}, clip skip {first.clip_skip}"
    )
    columns = tuple("base" if name is None else name for name, _ in ours)
    return _Pictures(tuple(asked), columns, tuple(map(tuple, rows)), made)


def _weights(one: _Run, told: list[str]) -> Path | None:
    """The finished file of a run, else the newest of its checkpoints that can be read."""
    for path in [*([one.file] if one.file else []), *run.checkpoint_paths(one.folder / "checkpoints")]:
        try:
            run.lora_of(path)
            return path
        except (ValueError, OSError, FloatingPointError) as error:
            told.append(f"{one.name}: {error}")
    return None


# ── The page ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _body(trials: Trials) -> str:
    dots = [
        f'<span style="color:{plots.COLOURS[place % len(plots.COLOURS)]}">●</span> {escape(trial.name)}'
        for place, trial in enumerate(trials.runs)
    ]
    parts = []
    for title, rows in trials.tables().items():
        parts.append(f"<h2>{escape(title.capitalize())}</h2>")
        cells = [[escape(cell) for cell in row] for row in rows]
        parts.append(page_module.table(cells, "", *dots) if rows else "<p>None.</p>")
    parts += [f"<p>{escape(text[:1].upper() + text[1:])}.</p>" for text in trials.told]
    parts.append(f"<h2>Curves</h2>{plots.losses_svg(trials.curves)}")
    if trials.rows:
        rows = [
            [f"{escape(prompt)}<br><small>seed {seed}</small>", *(page_module.image(picture, 160) for picture in row)]
            for (prompt, seed), row in zip(trials.asked, trials.rows, strict=True)
        ]
        parts.append(
            f"<h2>Pictures</h2><p>{escape(trials.made)}</p>{page_module.table(rows, '', *map(escape, trials.columns))}"
        )
    return "".join(parts)
