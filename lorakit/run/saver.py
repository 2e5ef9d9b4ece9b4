"""Save a run: the log, a checkpoint, then copies at the backup place."""

from collections.abc import Collection

from lorakit import storage
from lorakit.run import checkpoint
from lorakit.run.log import Log
from lorakit.run.session import Session


class Saver:
    """Saves a run so that it can be resumed: the log first, then a checkpoint, then copies at the backup place.

    Attributes:
        saved: the step of the newest checkpoint on the disk.
    """

    def __init__(self, session: Session, log: Log):
        self.session, self.log, self.console = session, log, session.console
        self.saved = session.state.step

    def __call__(self, regular: bool) -> None:
        """Save if possible; otherwise say why, and let training continue."""
        step = self.session.state.step
        try:
            self.save(regular)
        except OSError as error:
            self.console.say(f"save      step {step} is not saved: {error}. Training continues")
            if regular:
                self.console.failed("checkpoint", error, step)
        self.report_copies()

    def save(self, regular: bool) -> None:
        """Save the current state. On a full disk, the states of older checkpoints make room.

        Raises:
            OSError: there is still no room, or no right to write.
        """
        self.log.flush()
        session, step = self.session, self.session.state.step
        path, about = session.folder.checkpoint(step), session.about(step)
        if self.log.file.is_file() and not self.log.unwritten:
            about["log"] = storage.sha256(self.log.file)
        try:
            checkpoint.save(path, session.state, session.settings, regular=regular, about=about)
        except OSError as error:
            if error.errno not in storage.DISK_FULL:
                raise
            self.make_room()
            checkpoint.save(path, session.state, session.settings, regular=regular, about=about)
        self.saved = step
        try:
            keep, states = session.config.keep_checkpoints, session.config.keep_states
            checkpoint.tidy(session.folder.checkpoints, states, keep, self.spared())
        except OSError as error:
            self.console.say(f"save      older checkpoints stay as they are: {error}")
        if session.copier:
            session.copier.put(step, self.copies(step))

    def make_room(self) -> None:
        try:
            checkpoint.make_room(self.session.folder.checkpoints)
        except OSError as error:
            self.console.say(f"save      older checkpoints stay as they are: {error}")

    def spared(self) -> Collection[int]:
        """The step of the best checkpoint so far, which is always kept."""
        best, _ = self.session.folder.best()
        return [] if best is None else [checkpoint.step_of(best)]

    def copies(self, step: int) -> dict[str, storage.Source]:
        """What belongs at the backup place now: regular checkpoints, the newest one, and the log up to it."""
        files: dict[str, storage.Source] = {}
        for path in self.session.folder.saved().values():  # the newest first: it matters most
            try:
                facts = checkpoint.checkpoint_facts(path)
            except (ValueError, OSError):  # damaged: reported when it is read
                continue
            if facts["regular"] or facts["step"] == step:
                files[storage.backup_name(facts["step"], facts["whole"], facts["regular"])] = path
        if self.log.file.is_file():
            files[storage.log_name(step)] = self.log.file.read_bytes()
        return files

    def report_copies(self) -> None:
        """Show the messages of the copier."""
        for text in self.session.copier.messages() if self.session.copier else ():
            self.console.say(text)

    def left(self) -> None:
        """Save where the caller left the loop; a failure is shown and noted, since the caller gets no result."""
        try:
            self.stopped()
        except OSError as error:
            step = self.session.state.step
            self.console.say(f"save      step {step} is not saved: {error}")
            self.console.failed("checkpoint", error, step)

    def stopped(self, error: BaseException | None = None) -> None:
        """Save where the run was stopped or ended by an error, unless that state is saved or incomplete.

        Raises:
            OSError: it cannot be saved; when there is an error already, this is only shown.
        """
        state = self.session.state
        if state.step == self.saved or state.updating:
            return
        if error is None:
            self.save(False)
            return
        try:
            self.save(False)
            self.console.say(f"save      step {state.step} is saved, in spite of: {type(error).__name__}")
        except Exception as trouble:  # a broken device too; the first error is the one to show
            self.console.say(f"save      step {state.step} is not saved: {trouble}")
