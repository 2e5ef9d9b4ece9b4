"""Compare runs: settings that differ, losses, figures, and pictures of the same prompts and seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from lorakit import page, plots, run
from lorakit.config import Config
from lorakit.console import Console
from lorakit.device import Compute, out_of_memory
from lorakit.evaluate.candidates import distinct, open_for
from lorakit.evaluate.records import RunRecord, RunResult, differences, remarks, without_paths
from lorakit.evaluate.variants import BARE, Column, make_grid, make_variants
from lorakit.sample import Loaded, Sampling

DECIDE_PICTURES = ("clip_skip", "prediction_type", "zero_terminal_snr")  # settings that decide what pictures look like
MOST = 4  # prompts, where none are given


@dataclass(frozen=True)
class PictureOptions:
    """The pictures of a comparison: every prompt with every seed, by the bare base and by each run."""

    prompts: str | Sequence[str] = ()  # () takes the first run's
    seeds: Sequence[int] = (42,)
    strength: float = 1.0  # of the LoRAs
    base: str | None = None  # as for `base.open`; None takes the first run's
    device: str | None = None  # as for `device.choose_device`; None takes the first run's


@dataclass(frozen=True)
class PictureGrid:
    """Pictures of the same prompts and seeds; None where one was not made."""

    prompts: tuple[tuple[str, int], ...] = ()  # prompt and seed of each row
    columns: tuple[str, ...] = ()  # "base", and the runs' names
    rows: tuple[tuple[Image.Image | None, ...], ...] = field(default=(), repr=False)
    settings: str = ""  # base, strength and sampler, in words


@dataclass(frozen=True)
class Comparison(page.Page):
    """Runs compared. Prints as text and shows itself in a notebook."""

    runs: tuple[RunResult, ...]
    differing: dict[str, tuple[Any, ...]]  # setting → its value in each run
    notes: tuple[str, ...] = ()  # what is damaged or missing, and what must be known to compare the runs
    pictures: PictureGrid = PictureGrid()
    missing: tuple[str, ...] = ()  # a line for each thing that could not be made, and why

    @property
    def title(self) -> str:
        return ", ".join(result.name for result in self.runs)

    @property
    def curves(self) -> plots.Chart:
        return plots.losses([result.curve for result in self.runs])

    def tables(self) -> dict[str, list[list[str]]]:
        """Differing settings, and figures that are known, as texts: rows of a name and its value in each run."""
        settings = [[name, *map(page.text, values)] for name, values in self.differing.items()]
        columns = [result.figures() for result in self.runs]
        figures = [[name, *(column[name] for column in columns)] for name in (columns[0] if columns else ())]
        return {"settings that differ": settings, "figures": [row for row in figures if set(row[1:]) != {"—"}]}

    def facts(self) -> dict[str, Any]:
        names, grid = [result.name for result in self.runs], self.pictures
        return {
            "runs": [{name: value for name, value in vars(one).items() if name != "curve"} for one in self.runs],
            "differing": {name: dict(zip(names, values, strict=True)) for name, values in self.differing.items()},
            "pictures": {"made": grid.settings, "asked": list(map(list, grid.prompts)), "columns": list(grid.columns)},
            "told": list(self.notes),
        }  # fmt: skip

    def describe(self) -> str:
        parts = []
        for title, rows in self.tables().items():
            lines = [[title, *(result.name for result in self.runs)], *(rows or [["none", *[""] * len(self.runs)]])]
            columns = [[f"{cell:<{max(map(len, column))}}" for cell in column] for column in zip(*lines, strict=True)]
            parts += ["  ".join(line).rstrip() for line in zip(*columns, strict=True)] + [""]
        return "\n".join([*parts, *(f"note: {text}" for text in self.notes)]).rstrip()

    def body(self) -> str:
        dots = [
            f'<span style="color:{plots.COLOURS[place % len(plots.COLOURS)]}">●</span> {escape(result.name)}'
            for place, result in enumerate(self.runs)
        ]
        parts = []
        for title, rows in self.tables().items():
            table = page.table([[*map(escape, row)] for row in rows], "", *dots) if rows else "<p>None.</p>"
            parts.append(f"<h2>{escape(title.capitalize())}</h2>{table}")
        parts += [f"<p>{escape(text[:1].upper() + text[1:])}.</p>" for text in self.notes]
        parts.append(f"<h2>Curves</h2>{self.curves.svg(height=200)}")
        if grid := self.pictures.rows and self.pictures:
            labels = [f"{escape(prompt)}<br><small>seed {seed}</small>" for prompt, seed in grid.prompts]
            sheet = page.pictures(labels, grid.rows, grid.columns, 160)
            parts.append(f"<h2>Pictures</h2><p>{escape(grid.settings)}</p>{sheet}")
        return "".join(parts)


def save_comparison(comparison: Comparison, folder: str | Path) -> tuple[Path, Path]:
    """Write comparison.html, comparison.json and the curves as curves.png into a folder; returns the first two."""
    paths = comparison.save(folder, "comparison")
    comparison.curves.save(Path(folder) / "curves.png")
    return paths


def compare_runs(
    sources: Sequence[str | Path], pictures: PictureOptions | bool = True, *,
    console: Console | None = None, shared: run.Shared | None = None,
) -> Comparison:  # fmt: skip
    """Compare runs: settings that differ, curves, figures, and the same pictures of each.

    Pictures are made with the first run's base, sampler and size: with the bare base, and with each run's finished
    file, or its newest checkpoint. What is damaged or missing is noted in the result, and the rest compared.

    Args:
        sources: folders of runs, or of sweeps for all of theirs.
        pictures: True takes the first run's prompts; False makes none.
        console: its `stop` ends the pictures after the current denoising step; those made are kept. None prints.
        shared: models and encoded texts of a sweep.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a folder that contains no run, or no folders at all.
    """
    notes: list[str] = []
    folders = list(dict.fromkeys(folder.resolve() for source in sources for folder in _runs(Path(source))))
    names = distinct([folder.name for folder in folders], [folder.parent.name for folder in folders])
    records = [RunRecord.read(folder, name, notes) for folder, name in zip(folders, names, strict=True)]
    if not records:
        raise ValueError("There is nothing to compare: give the folders of runs.")
    differing = differences(records)
    notes += remarks(records, differing)
    grid, missing = PictureGrid(), tuple[str, ...]()
    first = next((record.config for record in records if record.config), None)
    if pictures and not first:
        notes.append("no pictures: no run's settings can be read")
    elif pictures and first:
        if names := [name for name in DECIDE_PICTURES if name in differing]:
            notes.append(f"the runs differ in {', '.join(names)}: all pictures are made with the first run's")
        try:
            options = PictureOptions() if pictures is True else pictures
            grid = _make_pictures(records, first, options, notes, console or Console(), shared or run.Shared())
        except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not out_of_memory(error):
                raise
            notes.append(f"no pictures: {str(error) or type(error).__name__}")
            missing = (without_paths(notes[-1], records),)
    public = tuple(dict.fromkeys(without_paths(text, records) for text in notes))
    return Comparison(tuple(record.result() for record in records), differing, public, grid, missing)


def _runs(source: Path) -> list[Path]:
    """The folder of a run, or those of a sweep."""
    source = source.expanduser()
    if not source.is_dir():
        raise FileNotFoundError(f"There is no folder {source}. Give the folders of runs.")
    folders = [source] if run.is_run(source) else run.runs_in(source)
    if not folders:
        raise ValueError(f"{source.name} is no run and contains none: it has neither config.json nor checkpoints/.")
    return folders


def _make_pictures(
    records: Sequence[RunRecord], first: Config, options: PictureOptions, notes: list[str], console: Console,
    shared: run.Shared,
) -> PictureGrid:  # fmt: skip
    """Every prompt with every seed, by the bare base and by each run that fits it."""
    reference, device = options.base or first.base, options.device or first.device
    base = open_for(reference, first)
    paths = {record.name: path for record in records if (path := record.weights(notes))}
    if not paths:
        raise ValueError("no run has weights yet")
    for record in records:
        if record.name in paths and record.decided.get("base", base.name) != base.name:
            notes.append(f"{record.name} was trained on {record.decided['base']}; its pictures are made on {base.name}")
    columns: list[Column] = [BARE, *((name, options.strength) for name in paths)]
    variants = make_variants(base, columns, paths, warn=notes.append)
    prompts = [options.prompts] if isinstance(options.prompts, str) else options.prompts
    rows = tuple(product(prompts or first.sample_prompts[:MOST] or (first.trigger,), options.seeds))
    loaded = Loaded(cache=shared.cache)
    if reference == first.base and device == first.device:
        shared.suit(first)
        loaded = shared
    total = len(variants) * len(rows)
    console.say(f"pictures  {total}: {len(rows)} with the base and with {len(variants) - 1} of {len(records)} runs")
    compute = Compute.choose(device, first.mixed_precision, first.quantize)
    grid = make_grid(base, rows, variants, Sampling.of(first), compute=compute, loaded=loaded, console=console)
    if len(grid) < total:
        notes.append(f"stopped after {len(grid)} of {total} pictures")
    settings = (
        f"on {base.name} at strength {options.strength:g}, {first.resolution}×{first.resolution} px, "
        f"{first.sample_steps} steps, guidance {first.sample_guidance:g}, clip skip {first.clip_skip}"
    )
    labels = tuple("base" if name is None else name for name, _ in variants)
    pictures = tuple(tuple(grid.get((row, column)) for column in variants) for row in range(len(rows)))
    return PictureGrid(rows, labels, pictures, settings)
