"""Find where a run continues: settings, checkpoints, forks and backups."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lorakit import plan, train
from lorakit.config import Config
from lorakit.run import checkpoint, preparation
from lorakit.run.preparation import Prepared


class OtherSettings(ValueError):
    """A folder holds a run that was begun with other settings.

    Attributes:
        changed: setting → what the run has, and what was asked for now.
    """

    def __init__(self, run: str, changed: dict[str, tuple]):
        self.changed = changed
        super().__init__(
            f"{run} was begun with other settings: "
            + "; ".join(f"{name} was {before!r}, is now {now!r}" for name, (before, now) in changed.items())
            + ". Put them back to go on, or name another folder for a new run: an empty one, or with --fork one that "
            "goes on from this run's newest checkpoint with the new settings."
        )


# ── Resuming ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _come_down(config: Config, prepared: Prepared, saved: dict) -> Config:
    """The lower of what is predicted to fit now and what a run had come down to when it was saved."""
    ladder = plan.ladder(config)
    for place, lower in enumerate(ladder):
        if preparation.settings(lower, prepared) == saved:
            return ladder[max(place, ladder.index(prepared.config))]
    return prepared.config


def _as_of_now(saved: dict) -> dict:
    """The settings of a run begun before some of today's were known, which then were as they are by default."""
    unlike = preparation.FREE | {"steps", "epochs", "base", "dataset"}
    return json.loads(Config(steps=1).model_dump_json(exclude=unlike)) | saved


def is_finished(config: Config, folder: Path, prepared: Prepared) -> bool:
    """Whether a folder holds this very run, at its last step and with its file.

    Raises:
        OtherSettings: a run that was begun with other settings.
    """
    saved = checkpoint.newest(folder / "checkpoints", lambda _: None)
    if saved is None:
        return False
    _known(replace(saved, settings=_as_of_now(saved.settings)), config, folder, prepared)
    _, total = train.plan_epochs(prepared.pictures, prepared.repeats, prepared.config)
    return saved.step >= total and (folder / f"{config.name}.safetensors").is_file()


def _known(saved: checkpoint.Checkpoint, config: Config, folder: Path, prepared: Prepared) -> None:
    """Refuse to go on with a run that these settings do not come down to."""
    if saved.settings not in [preparation.settings(above, prepared) for above in plan.ladder(config)]:
        before, now = saved.settings, preparation.settings(prepared.config, prepared)
        names = sorted(before.keys() | now.keys())
        changed = {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}
        if changed:
            raise OtherSettings(folder.name, changed)


def claim(folder: Path) -> None:
    """Make the run folder, or check that it is one.

    Raises:
        ValueError: the folder holds something else.
        OSError: it cannot be made or written.
    """
    own = {"cache", "log.jsonl", "STOP"}  # before there is a config.json
    try:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file. Name a folder for the run.")
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        foreign = {name for name in there if not name.startswith(".")} - own
        if foreign and not {"config.json", "checkpoints"} & foreign:
            raise ValueError(f"{folder} holds other files and no run. Name a new or empty folder.")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror.lower() if error.strerror else error
        raise OSError(error.errno, f"the run folder {folder.name} cannot be made: {reason}. Choose another") from error


def _take_in(fetched: Path, folder: Path) -> Path:
    """Put a checkpoint that was fetched among the run's own, and its log in place of an older one."""
    log, path = fetched.with_name("log.jsonl"), folder / "checkpoints" / fetched.name
    path.parent.mkdir(exist_ok=True)
    if log.exists():
        log.replace(folder / "log.jsonl")
    return fetched.replace(path)


def _forked(origin: Path, folder: Path, prepared: Prepared, warn: Callable[[str], None]) -> checkpoint.Checkpoint:
    """The first checkpoint of a run that begins where another one is.

    Raises:
        ValueError: there is nothing to begin from, it is past this run's end, or its weights are for other modules.
    """
    saved = checkpoint.newest(origin / "checkpoints", warn)
    if saved is None:
        raise ValueError(f"{origin.name} has no checkpoint to fork from. Name the folder of a run that has saved one.")
    if saved.step >= (total := prepared.config.total_steps(prepared.batches)):
        raise ValueError(f"{origin.name} is at step {saved.step}: set steps above that, it is {total} now.")
    forked = checkpoint.fork(saved, folder / "checkpoints", preparation.settings(prepared.config, prepared))
    if (log := origin / "log.jsonl").exists():
        shutil.copyfile(log, folder / "log.jsonl")
    return forked


def _saved_anyhow(
    folder: Path, state: train.State, config: Config, decided: dict, about: dict, say: Callable[[str], None]
) -> checkpoint.Checkpoint | None:  # fmt: skip
    """A checkpoint of the last whole step, written now; where an update was cut in its midst, the newest there is."""
    if state.updating:
        return checkpoint.newest(folder, say)
    path, regular = folder / checkpoint.name(state.step), state.step > 0 and state.step % config.save_every == 0
    try:
        return checkpoint.read(checkpoint.save(path, state, decided, regular=regular, about=about))
    except OSError as error:
        say(f"save      step {state.step} is not saved: {error}")
        return checkpoint.newest(folder, say)


def _last_good(folder: Path) -> checkpoint.Checkpoint | None:
    """The newest regular checkpoint before any step of the bad row; newer ones are put aside as `….diverged`.

    Only regular ones: a run that was stopped in between goes back as far as one that was not.
    """
    for path in checkpoint.checkpoint_paths(folder):
        try:
            found = checkpoint.read_whole(path)
        except ValueError:
            continue
        if found.regular and found.clean:
            return found
        path.replace(path.with_suffix(".diverged"))
    return None
