"""TensorBoard's event files beside log.jsonl, where tensorboard is installed.

Written as records of tensorboard's own protocol buffers: torch's writer imports TensorFlow where that is installed,
which takes seconds and memory, and puts the machine's name into the file's.
"""

import io
import time
from contextlib import suppress
from pathlib import Path

from PIL import Image


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
