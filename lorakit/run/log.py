"""TensorBoard's event files beside log.jsonl, where tensorboard is installed.

Written as records of tensorboard's own protocol buffers: torch's writer imports TensorFlow where that is installed,
which takes seconds and memory, and puts the machine's name into the file's.
"""

import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from lorakit import storage
from lorakit.run import run_folder
from lorakit.train import Step


class Board:
    """Writes figures and pictures that `tensorboard --logdir FOLDER` shows.

    Args:
        folder: where the event files are; a new one is begun.
        resumed_at: steps after this one are written anew, and TensorBoard forgets the old ones.

    Raises:
        ImportError: tensorboard is not installed.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, resumed_at: int = 0):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._scalar = event_pb2, summary_pb2, scalar_pb
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names.
        number = len(list(folder.glob("events.out.tfevents.*")))
        self.file = (folder / f"events.out.tfevents.{number:06d}").open("xb")
        self._records = RecordWriter(self.file)
        try:
            self._write(file_version="brain.Event:2")
            self._write(step=resumed_at + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
            self.flush()
        except OSError:
            with suppress(OSError):
                self.close()
            raise

    def _write(self, **values) -> None:
        event = self._event.Event(**({"wall_time": time.time()} | values))
        self._records.write(event.SerializeToString())

    def figures(self, step: int, **values: float) -> None:
        """Add a point to each named curve."""
        for name, value in values.items():
            self._write(step=step, summary=self._scalar(name, value))

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Add a picture under a name."""
        png = io.BytesIO()
        picture.save(png, "PNG")
        image = self._summary.Summary.Image(
            width=picture.width, height=picture.height, colorspace=3, encoded_image_string=png.getvalue()
        )
        value = self._summary.Summary.Value(tag=name, image=image)
        self._write(step=step, summary=self._summary.Summary(value=[value]))

    def flush(self) -> None:
        """Make what was written visible to TensorBoard."""
        self.file.flush()

    def close(self) -> None:
        self.file.close()


ON_BOARD, LAST_LINES = "curves in TensorBoard", "last lines of log.jsonl"  # what may be missing at the end


@dataclass
class Console:
    """Where a run's words go, and the list of what it could not make."""

    show: Callable[[str], None]
    failures: dict[str, tuple[list[int], str]] = field(default_factory=dict)  # what → steps, the last one's reason

    def __call__(self, text: str) -> None:
        with suppress(OSError):  # a terminal that was closed
            self.show(text)

    def failed(self, what: str, error: Exception | str, step: int | None = None) -> None:
        """Note that something could not be made, and why."""
        steps, _ = self.failures.get(what, ([], ""))
        steps += [] if step is None or step in steps else [step]
        text = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else error
        self.failures[what] = steps, (text.splitlines() or [""])[0]

    def made(self, what: str) -> None:
        """Note that something was made after all."""
        self.failures.pop(what, None)

    @property
    def missing(self) -> tuple[str, ...]:
        """A line for each thing that could not be made: what, at which steps, and why."""
        return tuple(f"{what}{_at(steps)}: {why}" for what, (steps, why) in self.failures.items())

    def end(self) -> tuple[str, ...]:
        """Say what is missing, as a run's last lines."""
        for text in self.missing:
            self(f"missing   {text}")
        return self.missing


def _at(steps: Sequence[int]) -> str:
    """The steps at which something failed, in a few words."""
    if len(steps) < 2:
        return "".join(f" of step {step}" for step in steps)
    few = ", ".join(map(str, steps)) if len(steps) <= 5 else f"{steps[0]} to {steps[-1]}, {len(steps)} of them"
    return f" of steps {few}"


class Log:
    """A listener that writes log.jsonl, a line a step; losses are fetched from the device in tens, or every 2 seconds.

    Args:
        names: of the pictures, to tell which ones a skipped step saw.
        losses: gets each step's, by its number.
        expected: digest of the file up to `resumed_at`, where one was kept.

    Its `board` draws the same curves in TensorBoard, where that is installed.
    """

    def __init__(
        self, file: Path, resumed_at: int, names: Sequence[str], show: Callable[[Step, float], None],
        say: Console, losses: dict[int, float], expected: str | None = None,
    ):  # fmt: skip
        self.file, self.names, self.show, self.say, self.board = file, names, show, say, None
        self.waiting, self.unwritten, self.losses, self.marks = [], "", losses, {}
        self.began = time.monotonic()
        damaged = lambda text: say(f"log       {text}")  # noqa: E731
        kept = [x for x in run_folder.read_log(file, damaged) if x["step"] <= resumed_at] if file.exists() else []
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if expected and hashlib.sha256(text.encode()).hexdigest() != expected:
            say(f"log       {file.name} was changed or damaged after it was saved: its curves may be wrong")
        with storage.write_file(file) as partial:  # steps after the checkpoint are trained again
            partial.write_text(text)

    def __call__(self, step: Step) -> None:
        now = time.monotonic() - self.began
        if self.waiting and (len(self.waiting) == 10 or now - self.waiting[0][1] > 2):
            self.flush()  # not yet this one, to which others may still add marks
        self.waiting.append((step, now))

    def flush(self) -> None:
        """Bring what is waiting to the disk; where there is no room for it, it goes on waiting."""
        if self.waiting:
            losses = torch.stack([step.loss for step, _ in self.waiting]).tolist()
            finite = torch.stack([step.finite for step, _ in self.waiting]).tolist()
            for (step, seconds), value, fine in zip(self.waiting, losses, finite, strict=True):
                self.unwritten += json.dumps(self._line(step, seconds, value, fine)) + "\n"
            self.losses.update((step.number, value) for (step, _), value in zip(self.waiting, losses, strict=True))
            self.show(self.waiting[-1][0], losses[-1])
            self.waiting = []
        try:
            storage.append_lines(self.file, self.unwritten)
            self.unwritten = ""
            self.say.made(LAST_LINES)
        except OSError as error:
            self.say(f"log       not written: {error}. Training goes on")
            self.say.failed(LAST_LINES, error)
        self.draw(lambda board: board.flush())

    def _line(self, step: Step, seconds: float, loss: float, finite: bool) -> dict:
        line = {"step": step.number, "loss": round(loss, 6), "learning_rate": step.learning_rate}
        line |= {"epoch": step.epoch, "seconds": round(seconds, 3)} | self.marks.pop(step.number, {})
        if not finite:
            seen = line["skipped"] = sorted({self.names[i] for i in step.examples})
            self.say(f"skipped   step {step.number}: loss or gradients not finite; it saw {', '.join(seen)}")
        curves = {k: v for k, v in line.items() if isinstance(v, float) and k != "seconds"}
        self.draw(lambda board: board.figures(step.number, **curves))
        return line

    def draw(self, how: Callable[[Board], None]) -> None:
        """Draw on the board, where there is one and as long as its file can be written."""
        try:
            if self.board:
                how(self.board)
        except OSError as error:
            with suppress(OSError):
                self.board.close()
            self.board = None
            self.say(f"board     no more curves in TensorBoard: {error}. They are in log.jsonl")
            self.say.failed(ON_BOARD, error)

    def close(self) -> None:
        """Flush, and write no more."""
        self.flush()
        self.draw(lambda board: board.close())
