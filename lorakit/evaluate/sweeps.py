"""Train runs that differ in one setting, and compare them."""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorakit import config as configs
from lorakit import run, storage, train
from lorakit.config import Config
from lorakit.console import Console
from lorakit.evaluate.comparison import MOST, Comparison, PictureOptions, compare_runs, save_comparison
from lorakit.evaluate.records import last_part, without_paths


def sweep(
    config: Config, setting: str, values: Sequence[Any], folder: str | Path,
    pictures: PictureOptions | bool = True, *, console: Console | None = None,
) -> Comparison:  # fmt: skip
    """Train one run after the other that differ in one setting; compare them and write the comparison into the folder.

    Each run has a folder, such as `rank=8`, and ends in the weights that it would have without the others. The runs
    share encoded pictures and texts, and the loaded base. Called again, it resumes; finished runs are kept. A stopped
    sweep returns the comparison of its runs so far, without pictures.

    Args:
        folder: for the runs, the cache and the comparison; new, empty, or that of the same sweep.
        pictures: as for `compare_runs`; by default, with the prompts of the first run's samples.
        console: its `stop` ends the sweep after the current step, as Ctrl-C does; a stopped sweep sets it.

    Raises:
        ValueError: an unknown setting, or values that cannot be used; raised before training.
        BlockingIOError: the folder is in use.
    """
    runs, folder = variations(config, setting, values), Path(folder).absolute()
    if train.join_team(config.device).size > 1:
        raise ValueError("A sweep runs in one process: start it without accelerate, or train its runs one by one.")
    _claim(folder)
    with storage.claim_folder(folder):
        return _Sweep(runs, folder, console or Console(), run.Shared(cache=folder / "cache")).result(pictures)


def variations(config: Config, setting: str, values: Sequence[Any]) -> dict[str, Config]:
    """The runs of a sweep by name, such as `rank=8`; a ValueError lists all that is wrong with setting and values."""
    if setting not in Config.model_fields:
        configs.parse(config.model_dump() | {setting: None}, where="The sweep cannot begin")
    without_effect = run.FREE - {"decisions"} - ({"trigger"} if config.asks_class else set())
    if setting in without_effect:
        raise ValueError(
            f"{setting} does not change what is learned: all runs would be the same. Sweep over a setting such as "
            "rank, learning_rate or steps."
        )
    runs, problems, seen = {}, [], []
    for value in values:
        length = {"steps": {"epochs": None}, "epochs": {"steps": None}}.get(setting, {})
        name = _name(setting, value)
        try:
            changed = configs.parse(config.model_dump() | length | {setting: value}, where=name)
        except ValueError as error:
            problems.append(str(error))
            continue
        if getattr(changed, setting) in seen:
            problems.append(f"{name}: the value is given twice.")
        seen.append(getattr(changed, setting))
        runs[name] = changed.with_(name=f"{config.name}-{name.replace('=', '-')}")
    if len(values) < 2:
        problems.append(f"{len(values)} values of {setting} cannot be compared: give at least two.")
    if problems:
        raise ValueError("The sweep cannot begin:\n" + "\n".join(problems))
    return runs


def _name(setting: str, value: Any) -> str:
    """A run's name: valid as a folder's on any system, and without a path."""
    text = value if isinstance(value, str) else json.dumps(value)
    short = re.sub(r"[^\w.+-]+", "-", last_part(text) or "").strip("-.")[:40]
    return f"{setting}={short}" + (f"-{run.settings_digest(value)[:6]}" if short != text else "")


def _claim(folder: Path) -> None:
    """Make the sweep's folder; a ValueError where it contains something else."""
    if folder.is_file() or run.is_run(folder):
        raise ValueError(f"{folder.name} is a {'file' if folder.is_file() else 'run'}. Name a folder for the sweep.")
    known = {"cache", "comparison.html", "comparison.json", "curves.png"}
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if foreign := [name for name in names if name not in known and "=" not in name and not name.startswith(".")]:
        raise ValueError(f"{folder.name} contains other files ({', '.join(foreign[:3])}). Name a new or empty folder.")
    folder.mkdir(parents=True, exist_ok=True)


@dataclass
class _Sweep:
    """The runs of a sweep, by name, in a folder."""

    runs: dict[str, Config]
    folder: Path
    console: Console
    shared: run.Shared
    prompts: list[str] = field(default_factory=list)  # of the first run's samples
    missing: list[str] = field(default_factory=list)  # what the runs could not make

    def result(self, pictures: PictureOptions | bool) -> Comparison:
        """Train what is not finished, compare the runs and write the comparison."""
        stop = self.console.stop
        try:
            self._train_all()
            folders = [self.folder / name for name in self.runs if run.is_run(self.folder / name)]
            if stop.is_set():
                return compare_runs(folders, pictures=False) if folders else Comparison((), {})
            if pictures:
                options = PictureOptions() if pictures is True else pictures
                pictures = replace(options, prompts=options.prompts or self.prompts)
            comparison = compare_runs(folders, pictures, console=self.console, shared=self.shared)
            missing = tuple(without_paths(text) for text in self.missing)
            notes = comparison.notes + missing
            comparison = replace(comparison, notes=notes, missing=missing + comparison.missing)
            page, _ = save_comparison(comparison, self.folder)
            self.console.say(f"look      {page.name}: settings, curves, figures and pictures side by side")
            return comparison
        finally:
            self.shared.release()
            if stop.is_set() or sys.exc_info()[0] is KeyboardInterrupt:
                self.console.say(self._progress())

    def _train_all(self) -> None:
        """Train every run that is not finished, one after the other, until it is stopped."""
        say, stop = self.console.say, self.console.stop
        try:
            storage.remove_partial(self.folder)
            say(f"sweep     {len(self.runs)} runs: {', '.join(self.runs)}")
            finished = self._check_all()
            for place, (name, config) in enumerate(self.runs.items(), 1):
                if name not in finished and not stop.is_set():
                    say(f"sweep     {name}, {place} of {len(self.runs)}")
                    self._train(name, config)
        except KeyboardInterrupt:
            if not stop.is_set():
                raise

    def _check_all(self) -> set[str]:
        """The names of finished runs. Encodes what all runs need, before a UNet is loaded.

        Raises:
            ValueError: a run cannot be prepared; names all problems.
        """
        finished: set[str] = set()
        problems: dict[str, list[str]] = {}
        quiet = replace(self.console, show=lambda _: None)
        for name, config in self.runs.items():
            folder = self.folder / name
            try:
                prepared = run.prepare(config, folder, quiet, shared=run.Shared(cache=self.shared.cache))
                self.prompts = self.prompts or prepared.prompts[:MOST]
                if run.is_finished(config, folder, prepared):
                    finished.add(name)
                    self.console.say(f"sweep     {name} is finished and kept")
            except (ValueError, OSError) as error:
                problems.setdefault(str(error), []).append(name)
        if problems:
            lines = [f"{', '.join(names)}: {text}" for text, names in problems.items()]
            raise ValueError("The sweep cannot begin:\n" + "\n".join(lines))
        return finished

    def _train(self, name: str, config: Config) -> None:
        """Train one run. If it diverges, the others are trained all the same."""
        console, control = self.console, run.Control(self.console.stop)
        try:
            result = run.start(
                config, self.folder / name, say=console.say, progress=console.progress, control=control,
                shared=self.shared,
            )  # fmt: skip
            if result.steps < result.total:
                console.stop.set()  # the run was stopped, perhaps by a file named STOP
            self.missing += [f"{name}: {text}" for text in result.missing]
        except FloatingPointError as error:
            console.say(f"sweep     {name} is given up: {error}")
            self.missing.append(f"{name}: {error}")

    def _progress(self) -> str:
        """How many runs are finished, and the step of those that have begun."""
        done = [name for name, own in self.runs.items() if (self.folder / name / f"{own.name}.safetensors").is_file()]
        saved = {name: run.RunFolder(self.folder / name).saved() for name in self.runs if name not in done}
        begun = [f", {name} is at step {max(steps)}" for name, steps in saved.items() if steps]
        return f"stopped   {len(done)} of {len(self.runs)} runs are finished{''.join(begun)}. Start again to continue."
