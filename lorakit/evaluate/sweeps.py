"""Train runs that differ in one setting, and compare them."""

import json
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit import config as configs
from lorakit import run, storage, train
from lorakit.base import Progress
from lorakit.config import Config
from lorakit.evaluate.comparison import MOST, Trials, compare_runs, last_part, save_comparison, without_paths

# ── A sweep ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def sweep(
    config: Config, setting: str, values: Sequence[Any], folder: str | Path, *, prompts: Sequence[str] = (),
    seeds: Sequence[int] = (42,), strength: float = 1.0, pictures: bool = True, say: Callable[[str], None] = print,
    progress: bool | Progress = True, stop: threading.Event | None = None,
) -> Trials:  # fmt: skip
    """Train one run after the other that differ in one setting alone, and compare them.

    Each has its folder, such as `rank=8`, and ends in the weights that it has when it is trained alone. They share
    what is encoded, and the base that is loaded. Called again, it goes on: what is finished stays as it is.

    Args:
        config: of all runs.
        folder: for the runs, the cache and the comparison; new, empty, or that of the same sweep.
        prompts, seeds, strength, pictures: of the comparison, as `compare_runs` takes them.
        progress: as `run.start` takes it.
        stop: ends it after the current step, as Ctrl-C does; it is set where the sweep was stopped.

    Returns:
        The comparison, which is written into the folder; of a sweep that was stopped what there is, without pictures.

    Raises:
        ValueError: what is wrong with the setting, or with any of the values; before anything is trained.
        BlockingIOError: the folder is in use.
    """
    folder, stop = Path(folder).absolute(), stop or threading.Event()
    runs, shared = variations(config, setting, values), run.Shared(folder / "cache")
    if train.join_team(config.device).size > 1:
        raise ValueError("A sweep runs in one process: start it without accelerate, or train its runs one by one.")
    _claim(folder)
    with storage.claim_folder(folder):
        try:
            said, missing = _train_all(runs, shared, folder, say, progress, stop)
            folders = [folder / name for name in runs if run.is_run(folder / name)]
            if stop.is_set():
                return compare_runs(folders, pictures=False) if folders else Trials((), {})
            made = compare_runs(
                folders, prompts=prompts or said, seeds=seeds, strength=strength, pictures=pictures, say=say, stop=stop,
                shared=shared,
            )  # fmt: skip
            missing = [without_paths(text, ()) for text in missing]
            made = replace(made, told=(*made.told, *missing), missing=(*missing, *made.missing))
            say(
                f"look      {save_comparison(made, folder)[0].name}: what differs, curves, figures and pictures "
                "side by side"
            )
            return made
        finally:
            shared.release()
            if stop.is_set() or sys.exc_info()[0] is KeyboardInterrupt:
                say(_far(runs, folder))


def variations(config: Config, setting: str, values: Sequence[Any]) -> dict[str, Config]:
    """The runs of a sweep by name, such as `rank=8`.

    Raises:
        ValueError: no such setting, one that decides nothing, or values that cannot be used; says all that is wrong.
    """
    if setting not in Config.model_fields:
        configs.parse(config.model_dump() | {setting: None}, where="The sweep cannot begin")
    nothing = run.FREE - {"decisions"} - ({"trigger"} if config.asks_class else set())
    if setting in nothing:
        raise ValueError(
            f"{setting} decides nothing of what is learned, so that all runs would be the same. Sweep over a setting "
            "such as rank, learning_rate or steps."
        )
    runs, problems, seen = {}, [], []
    for value in values:
        length = {"steps": {"epochs": None}, "epochs": {"steps": None}}.get(setting, {})
        name = _name(setting, value)
        try:
            made = configs.parse(config.model_dump() | length | {setting: value}, where=name)
        except ValueError as error:
            problems.append(str(error))
            continue
        if getattr(made, setting) in seen:
            problems.append(f"{name}: it is there twice.")
        seen.append(getattr(made, setting))
        runs[name] = made.with_(name=f"{config.name}-{name.replace('=', '-')}")
    if len(values) < 2:
        problems.append(f"{len(values)} values of {setting} are nothing to compare: give two at least.")
    if problems:
        raise ValueError("The sweep cannot begin:\n" + "\n".join(problems))
    return runs


def _name(setting: str, value: Any) -> str:
    """What a run is called: a folder's name that any system takes, and that tells no path."""
    text = value if isinstance(value, str) else json.dumps(value)
    short = re.sub(r"[^\w.+-]+", "-", last_part(text) or "").strip("-.")[:40]
    return f"{setting}={short}" + (f"-{run.settings_digest(value)[:6]}" if short != text else "")


def _claim(folder: Path) -> None:
    """Make the sweep's folder, or check that it is one.

    Raises:
        ValueError: it holds something else.
    """
    if folder.is_file() or run.is_run(folder):
        raise ValueError(f"{folder.name} is a {'file' if folder.is_file() else 'run'}. Name a folder for the sweep.")
    own = {"cache", "comparison.html", "comparison.json", "curves.png"}
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if foreign := [name for name in there if name not in own and "=" not in name and not name.startswith(".")]:
        raise ValueError(f"{folder.name} holds other files ({', '.join(foreign[:3])}). Name a new or empty folder.")
    folder.mkdir(parents=True, exist_ok=True)


def _standing(
    runs: dict[str, Config], shared: run.Shared, folder: Path, say: Callable[[str], None], progress: bool | Progress,
    stop: threading.Event,
) -> tuple[set[str], list[str]]:  # fmt: skip
    """Which runs are finished, and the prompts of the first; what all of them need is encoded before a UNet is loaded.

    Raises:
        ValueError: what is wrong with any of them.
    """
    finished, prompts, problems = set(), [], {}
    say(f"sweep     {len(runs)} runs: {', '.join(runs)}")
    for name, own in runs.items():
        try:
            how = {"say": lambda _: None, "progress": progress, "stop": stop, "store": shared.cache}
            prepared = run.prepare(own, folder / name, **how)
            prompts = prompts or prepared.prompts[:MOST]
            if run.is_finished(own, folder / name, prepared):
                finished.add(name)
                say(f"sweep     {name} is finished: it stays as it is")
        except (ValueError, OSError) as error:
            problems.setdefault(str(error), []).append(name)
    if problems:
        told = [f"{', '.join(names)}: {text}" for text, names in problems.items()]
        raise ValueError("The sweep cannot begin:\n" + "\n".join(told))
    return finished, prompts


def _train_all(
    runs: dict[str, Config], shared: run.Shared, folder: Path, say: Callable[[str], None], progress: bool | Progress,
    stop: threading.Event,
) -> tuple[list[str], list[str]]:  # fmt: skip
    """Train every run that is not finished, one after the other, until it is stopped.

    Returns:
        Prompts to compare with, and what the runs could not make.
    """
    prompts: list[str] = []
    missing: list[str] = []
    try:
        storage.remove_partial(folder)
        finished, prompts = _standing(runs, shared, folder, say, progress, stop)
        for place, (name, own) in enumerate(runs.items(), 1):
            if name not in finished and not stop.is_set():
                say(f"sweep     {name}, {place} of {len(runs)}")
                missing += _train(own, folder / name, shared, say, progress, stop)
    except KeyboardInterrupt:
        if not stop.is_set():
            raise
    return prompts, missing


def _train(
    config: Config, folder: Path, shared: run.Shared, say: Callable[[str], None], progress: bool | Progress,
    stop: threading.Event,
) -> list[str]:  # fmt: skip
    """Train one run of a sweep, and return what it could not make. One that diverges ends none of the others."""
    try:
        result = run.start(config, folder, say=say, progress=progress, live=run.Live(stop), shared=shared)
        if result.steps < result.total:
            stop.set()  # by a file named STOP too
        return [f"{folder.name}: {text}" for text in result.missing]
    except FloatingPointError as error:
        say(f"sweep     {folder.name} is given up: {error}")
        return [f"{folder.name}: {error}"]


def _far(runs: dict[str, Config], folder: Path) -> str:
    """How far a sweep has come."""
    done = [name for name, own in runs.items() if (folder / name / f"{own.name}.safetensors").is_file()]
    saved = {name: run.checkpoint_paths(folder / name / "checkpoints")[:1] for name in runs if name not in done}
    begun = [f", {name} is at step {run.step_of(path)}" for name, paths in saved.items() for path in paths]
    return f"stopped   {len(done)} of {len(runs)} runs are finished{''.join(begun)}. Start again to go on."
