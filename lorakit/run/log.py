"""The log of a run: log.jsonl, and TensorBoard's event files where tensorboard is installed.

The event files are records of tensorboard's own protocol buffers. torch's writer would import TensorFlow where that is
installed, which takes seconds and memory, and would put the machine's name into the file's.
"""

import hashlib
import io
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lorakit import storage
from lorakit.run.session import Session
from lorakit.train import Step


class Board:
    """Writes figures and pictures that `tensorboard --logdir FOLDER` shows.

    Args:
        folder: where the event files are; a new one is begun.
        resumed_at: steps after this one are written again, and TensorBoard forgets the old ones.

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


ON_BOARD, LAST_LINES = "curves in TensorBoard", "last lines of log.jsonl"  # names of what may be missing at the end


class Log:
    """A listener that writes log.jsonl, a line a step. Losses are fetched from the device in tens, or every 2 seconds.

    Args:
        session: gets the losses; lines after its state's step are written again.
        show: called with the last step and its loss, when losses were fetched.
        expected: SHA-256 of the file up to that step, when it is known.

    Attributes:
        marks: step → more values for its line.
        board: draws the same curves for TensorBoard, where that is installed.
    """

    def __init__(self, session: Session, show: Callable[[Step, float], None], expected: str | None = None):
        self.session, self.console, self.show = session, session.console, show
        self.file = session.folder.log_file
        self.board: Board | None = None
        self.waiting: list[tuple[Step, float]] = []
        self.unwritten = ""
        self.marks: dict[int, dict[str, Any]] = {}
        self.began = time.monotonic()
        lines = session.folder.log(lambda text: self.console.say(f"log       {text}"))
        text = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= session.state.step)
        if expected and hashlib.sha256(text.encode()).hexdigest() != expected:
            self.console.say(
                f"log       {self.file.name} was changed or damaged after it was saved: its curves may be wrong"
            )
        with storage.write_file(self.file) as partial:  # steps after the checkpoint are trained again
            partial.write_text(text)

    def __call__(self, step: Step) -> None:
        now = time.monotonic() - self.began
        if self.waiting and (len(self.waiting) == 10 or now - self.waiting[0][1] > 2):
            self.flush()  # not yet this one, to which others may still add marks
        self.waiting.append((step, now))

    def flush(self) -> None:
        """Write the waiting lines; without room on the disk they keep waiting."""
        if self.waiting:
            losses = torch.stack([step.loss for step, _ in self.waiting]).tolist()
            finite = torch.stack([step.finite for step, _ in self.waiting]).tolist()
            for (step, seconds), value, fine in zip(self.waiting, losses, finite, strict=True):
                self.unwritten += json.dumps(self._line(step, seconds, value, fine)) + "\n"
            self.session.losses.update(
                (step.number, value) for (step, _), value in zip(self.waiting, losses, strict=True)
            )
            self.show(self.waiting[-1][0], losses[-1])
            self.waiting = []
        try:
            storage.append_lines(self.file, self.unwritten)
            self.unwritten = ""
            self.console.made(LAST_LINES)
        except OSError as error:
            self.console.say(f"log       not written: {error}. Training continues")
            self.console.failed(LAST_LINES, error)
        self.draw(lambda board: board.flush())

    def _line(self, step: Step, seconds: float, loss: float, finite: bool) -> dict:
        line: dict[str, Any] = {"step": step.number, "loss": round(loss, 6), "learning_rate": step.learning_rate}
        line |= {} if step.own_rate is None else {"own_rate": step.own_rate}
        line |= {"epoch": step.epoch, "seconds": round(seconds, 3)} | self.marks.pop(step.number, {})
        if not finite:
            seen = line["skipped"] = sorted({self.session.prepared.names[i] for i in step.examples})
            self.console.say(f"skipped   step {step.number}: loss or gradients not finite; it saw {', '.join(seen)}")
        curves = {k: v for k, v in line.items() if isinstance(v, float) and k != "seconds"}
        self.draw(lambda board: board.figures(step.number, **curves))
        return line

    def draw(self, how: Callable[[Board], None]) -> None:
        """Draw on the board, if there is one and its file can be written."""
        board = self.board
        if not board:
            return
        try:
            how(board)
        except OSError as error:
            with suppress(OSError):
                board.close()
            self.board = None
            self.console.say(f"board     no more curves in TensorBoard: {error}. They are in log.jsonl")
            self.console.failed(ON_BOARD, error)

    def close(self) -> None:
        """Flush, and write no more."""
        self.flush()
        self.draw(lambda board: board.close())
