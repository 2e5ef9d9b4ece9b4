"""Find where a run continues: its checkpoints, the backup place, another run that it is forked from."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lorakit import plan, storage, train
from lorakit.config import Config
from lorakit.console import Console
from lorakit.run import checkpoint, preparation
from lorakit.run.checkpoint import Checkpoint
from lorakit.run.models import Shared
from lorakit.run.preparation import Prepared
from lorakit.run.run_folder import RunFolder


class OtherSettings(ValueError):
    """A folder holds a run of other settings.

    Attributes:
        changed: setting → its value in the run, and its value now.
    """

    def __init__(self, run: str, changed: dict[str, tuple]):
        self.changed = changed
        super().__init__(
            f"{run} was started with other settings: "
            + "; ".join(f"{name} was {before!r}, is now {now!r}" for name, (before, now) in changed.items())
            + ". Use those again to resume it, or name another folder for a new run: an empty one, or one with --fork, "
            "which continues from this run's newest checkpoint with the new settings."
        )


def find_start(
    config: Config, folder: RunFolder, console: Console, *, fork: Path | None, shared: Shared, team: train.Team
) -> tuple[Prepared, Checkpoint | None]:
    """Prepare a run, find the checkpoint that it continues from, and write its config down.

    Raises:
        OtherSettings: the folder holds a run of other settings.
    """
    if fork and (cache := RunFolder(fork).cache).is_dir() and not folder.cache.exists():
        shutil.copytree(cache, folder.cache)  # nothing is encoded twice
    shared.suit(config)
    prepared = preparation.prepare(config, folder.path, console, shared=shared, processes=team.size)
    warn = lambda text: console.say(f"resume    {text}")  # noqa: E731
    saved, fetched = checkpoint.newest(folder.checkpoints, warn), None
    if config.backup:
        fetched = _fetch(config.backup, folder, saved.step if saved else 0, console)
    if not (fetched or saved) and (aside := checkpoint.put_aside(folder.checkpoints, folder.log_file)):
        console.say(
            f"resume    starts from the beginning: none of {', '.join(aside)} can be resumed. They are kept as ….aside"
        )
    if saved := fetched or saved:
        prepared = _as_found(prepared, saved)
        config = config.with_(prediction_type=prepared.config.prediction_type)
        lower = _reduced(config, prepared, saved.settings)
        check_settings(saved, config, folder, prepared)
        if lower != prepared.config:
            console.say(f"memory    continues with {preparation.changes(config, lower)}, as when it was saved")
            rungs = plan.ladder(config)
            below = rungs[rungs.index(lower) :]
            prepared = preparation.prepare(lower, folder.path, console, shared=shared, processes=team.size, rungs=below)
    if fetched and saved:
        folder.checkpoints.mkdir(exist_ok=True)
        if (log := fetched.path.with_name("log.jsonl")).exists():  # in place of an older one
            log.replace(folder.log_file)
        saved = replace(saved, path=fetched.path.replace(folder.checkpoint(saved.step)))
        console.say(f"resume    step {saved.step} comes from the backup place")
    if fork and not saved:
        saved = _fork(RunFolder(fork), folder, prepared, warn)
        console.say(f"fork      starts where {fork.name} was at step {saved.step}")
    folder.write_config(prepared.config)
    return prepared, saved


def _fetch(backup: str, folder: RunFolder, step: int, console: Console) -> Checkpoint | None:
    """A checkpoint at the backup place that is newer than a step, fetched into the cache."""
    place, warn = storage.backup_place(backup, folder.name), lambda text: console.say(f"resume    {text}")
    fetched = storage.newest_backup(place, step, folder.cache / "fetched", checkpoint.read_whole, warn)
    if not fetched:
        console.say(f"backup    nothing newer than step {step} at the backup place")
    return fetched


def _fork(origin: RunFolder, folder: RunFolder, prepared: Prepared, warn: Callable[[str], None]) -> Checkpoint:
    """The first checkpoint of a run that starts where another one is.

    Raises:
        ValueError: that run has no checkpoint, is past this run's end, or its weights are for other modules.
    """
    saved = checkpoint.newest(origin.checkpoints, warn)
    if saved is None:
        raise ValueError(f"{origin.name} has no checkpoint to fork from. Name the folder of a run that has saved one.")
    if saved.step >= (total := prepared.examples.total_steps):
        raise ValueError(f"{origin.name} is at step {saved.step}: set steps above that, it is {total} now.")
    forked = checkpoint.fork(saved, folder.checkpoints, preparation.settings(prepared.config, prepared))
    if origin.log_file.exists():
        shutil.copyfile(origin.log_file, folder.log_file)
    return forked


def _reduced(config: Config, prepared: Prepared, saved: dict) -> Config:
    """The lower one on the ladder of the settings that fit now and those that the run was saved with."""
    ladder = plan.ladder(config)
    for place, lower in enumerate(ladder):
        if preparation.settings(lower, prepared) == _as_of_now(saved):
            return ladder[max(place, ladder.index(prepared.config))]
    return prepared.config


def _as_found(prepared: Prepared, saved: Checkpoint) -> Prepared:
    """A prepared run with the prediction type that its base was found to have when it began, if the config is open."""
    found = saved.settings.get("prediction_type")
    own = prepared.config.prediction_type == "auto" and found not in (None, "auto", prepared.base.prediction_type)
    return prepared.predicting(str(found)) if own else prepared


def check_settings(saved: Checkpoint, config: Config, folder: RunFolder, prepared: Prepared) -> None:
    """Refuse to resume a run whose settings are not among those that the config may be reduced to.

    Raises:
        OtherSettings: says which differ.
    """
    before, prepared = _as_of_now(saved.settings), _as_found(prepared, saved)
    if before not in [preparation.settings(rung, prepared) for rung in plan.ladder(config)]:
        now = preparation.settings(prepared.config, prepared)
        names = sorted(before.keys() | now.keys())
        changed = {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}
        if "base" in changed:
            name = ((saved.about or {}).get("metadata") or {}).get("ss_sd_model_name", "another one")
            now_name = prepared.base.name
            changed["base"] = name, f"{now_name} with other weights" if name == now_name else now_name
        if changed:
            raise OtherSettings(folder.name, changed)


def _as_of_now(saved: dict) -> dict:
    """A run's settings, with the defaults of those that were added since it was written."""
    own = preparation.FREE | {"steps", "epochs", "base", "dataset"}
    return Config(steps=1).model_dump(mode="json", exclude=own) | saved


def is_finished(config: Config, path: Path, prepared: Prepared) -> bool:
    """Whether a folder holds this run, at its last step and with its file.

    Raises:
        OtherSettings: a run of other settings.
    """
    folder = RunFolder(path)
    saved = checkpoint.newest(folder.checkpoints, lambda _: None)
    if saved is None:
        return False
    check_settings(saved, config, folder, prepared)
    return saved.step >= prepared.examples.total_steps and folder.lora_file(config).is_file()


def last_good(folder: Path) -> Checkpoint | None:
    """The newest regular checkpoint before the first step that was not finite; newer ones are renamed to `….diverged`.

    Only a regular one, so that a run that was stopped in between goes back as far as one that was not.
    """
    for path in checkpoint.checkpoint_paths(folder):
        try:
            saved = checkpoint.read_whole(path)
        except ValueError:
            continue
        if saved.regular and saved.clean:
            return saved
        path.replace(path.with_suffix(".diverged"))
    return None
