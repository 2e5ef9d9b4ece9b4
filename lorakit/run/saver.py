"""Save a run: the log, a checkpoint, then copies at the backup place."""

from collections.abc import Callable, Collection
from pathlib import Path

from lorakit import storage
from lorakit.config import Config
from lorakit.run import checkpoint
from lorakit.run.log import Console, Log
from lorakit.run.run_folder import best_checkpoint
from lorakit.train import State


class Keeper:
    """Saves a run so that it can be gone on from: the log first, then a checkpoint, then copies at the second place.

    Args:
        folder: of the run.
        settings: that decide its result, as `checkpoint.save` takes them.
        about: makes of a step what a checkpoint says of its LoRA.
        copier: to the second place, where there is one.
    """

    def __init__(
        self, folder: Path, state: State, settings: dict, config: Config, about: Callable[[int], dict], log: Log,
        copier: storage.Copier | None, say: Console,
    ):  # fmt: skip
        self.folder, self.checkpoints, self.state, self.settings = folder, folder / "checkpoints", state, settings
        self.config, self.about, self.log, self.copier, self.say = config, about, log, copier, say
        self.saved = state.step  # the newest on disk

    def __call__(self, regular: bool) -> None:
        """Save if that can be; else say why, and let training go on."""
        try:
            self.save(regular)
        except OSError as error:
            self.say(f"save      step {self.state.step} is not saved: {error}. Training goes on")
            if regular:
                self.say.failed("checkpoint", error, self.state.step)
        self.listen()

    def save(self, regular: bool) -> None:
        """Save the state as it is now. On a full disk the optimizer states of older checkpoints make room.

        Raises:
            OSError: no room all the same, or no right to write.
        """
        self.log.flush()
        step = self.state.step
        path, about = self.checkpoints / checkpoint.name(step), self.about(step)
        if self.log.file.is_file() and not self.log.unwritten:
            about["log"] = storage.sha256(self.log.file)
        try:
            checkpoint.save(path, self.state, self.settings, regular=regular, about=about)
        except OSError as error:
            if error.errno not in storage.DISK_FULL:
                raise
            self.tidy(1)
            checkpoint.save(path, self.state, self.settings, regular=regular, about=about)
        self.saved = step
        self.tidy(self.config.keep_states)
        if self.copier:
            self.copier.put(step, self.copies(step))

    def tidy(self, states: int) -> None:
        try:
            checkpoint.tidy(self.checkpoints, states, self.config.keep_checkpoints, self.spared())
        except OSError as error:
            self.say(f"save      older checkpoints stay as they are: {error}")

    def spared(self) -> Collection[int]:
        """The step of the best checkpoint so far, which is kept anyhow."""
        best, _ = best_checkpoint(self.folder)
        return [] if best is None else [checkpoint.step_of(best)]

    def copies(self, step: int) -> dict[str, storage.Source]:
        """What belongs at the second place now: regular checkpoints, the newest one, and the log up to it."""
        found = {}
        for path in checkpoint.checkpoint_paths(self.checkpoints):  # the newest first: it is what matters most
            try:
                own, whole, regular = checkpoint.checkpoint_kind(path)
            except (ValueError, OSError):  # damaged: told when it is asked for
                continue
            if regular or own == step:
                found[storage.backup_names(own, whole, regular)] = path
        if self.log.file.is_file():
            found[storage.log_name(step)] = self.log.file.read_bytes()
        return found

    def listen(self) -> None:
        """Pass on what the copier has to say."""
        for text in self.copier.told() if self.copier else ():
            self.say(text)

    def stopped(self, error: BaseException | None = None) -> None:
        """Save where the loop was stopped, or an error has ended it, unless that state is on disk or is none.

        Raises:
            OSError: it cannot be saved; where there is an error already, that is told instead.
        """
        if self.state.step == self.saved or self.state.updating:
            return
        if error is None:
            self.save(False)
            return
        try:
            self.save(False)
            self.say(f"save      step {self.state.step} is saved, in spite of: {type(error).__name__}")
        except Exception as trouble:  # a broken device as well; the first error is the one to be seen
            self.say(f"save      step {self.state.step} is not saved: {trouble}")
