"""A video → pictures to train on: the sharpest frame of each place, without frames that look alike.

Needs PyAV 17 or newer: `pip install av`, or `pip install "lorakit[video]"`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from lorakit import storage

FORMATS = {".png": ("PNG", {}), ".jpg": ("JPEG", {"quality": 95, "subsampling": 0})}
CUT = 27.0  # mean difference of neighbouring frames' pixels, of 255: PySceneDetect's threshold
ALIKE = 3.0  # the same, of frames that look alike
UNSPECIFIED, ITU709 = 2, 1  # how colours are coded, as FFmpeg numbers it


def extract_frames(
    video: str | os.PathLike, folder: str | os.PathLike, *, every: float | None = 1.0, window: float = 0.5,
    suffix: str = ".png",
) -> list[Path]:  # fmt: skip
    """Write the sharpest frame of each place of a video into a folder, upright, named by its time.

    Frames that cannot be decoded are skipped. High dynamic range is not tone-mapped.

    Args:
        every: seconds from place to place; None takes the beginning of each scene.
        window: seconds around a place (after it, for a scene) in which the sharpest frame is searched.
        suffix: ".png" or ".jpg".

    Returns:
        The pictures' files, in the order of the video.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no video, or none of its frames can be decoded.
        ImportError: PyAV is not installed, or too old.
    """
    video, folder = Path(video).expanduser(), Path(folder).expanduser()
    if every is not None and every <= 0 or window <= 0:
        raise ValueError(f"every={every} and window={window} must be more than 0 seconds")
    if suffix not in FORMATS:
        raise ValueError(f"frames cannot be written as {suffix!r}: use {' or '.join(FORMATS)}")
    if not video.is_file():
        raise FileNotFoundError(f"There is no video {video}.")
    kind, options = FORMATS[suffix]
    written, seen = [], np.zeros((0, 32, 32, 3), np.int16)
    for _, near in groupby(_places(video, every, window), key=itemgetter(0)):
        _, best = max(near, key=lambda at: _sharpness(at[1].frame))
        small = _small(best.frame)
        if np.abs(seen - small).mean((1, 2, 3)).min(initial=255) < ALIKE:
            continue
        seen = np.concatenate([seen, small[None]])
        ms = round(best.seconds * 1000)
        stamp = f"{ms // 3_600_000:02d}h{ms // 60_000 % 60:02d}m{ms // 1000 % 60:02d}s{ms % 1000:03d}"
        written.append(folder / f"{video.stem}-{stamp}{suffix}")
        with storage.write_file(written[-1]) as partial:
            _picture(best).save(partial, kind, **options)
    if not written:
        raise ValueError(f"{video} has no frame that can be decoded: copy it again, or convert it to MP4")
    return written


@dataclass(frozen=True)
class Frame:
    """A frame and its place in the video."""

    seconds: float
    frame: Any  # av.VideoFrame
    pixel: float  # width / height of a pixel


def _places(video: Path, every: float | None, window: float) -> Iterator[tuple[int, Frame]]:
    """The frames within the window of a place, with the place's number."""
    scene, began, before = -1, 0.0, None
    for decoded in _decoded(video):
        if every is not None:
            place = round(decoded.seconds / every)
            if abs(decoded.seconds - place * every) <= window / 2:
                yield place, decoded
            continue
        small = _small(decoded.frame)
        if before is None or np.abs(small - before).mean() > CUT:
            scene, began = scene + 1, decoded.seconds
        before = small
        if decoded.seconds - began <= window:
            yield scene, decoded


def _decoded(video: Path) -> Iterator[Frame]:
    try:
        import av

        if int(av.__version__.partition(".")[0]) < 17:  # which mistook colours
            raise ImportError(f"PyAV {av.__version__} is too old")
    except ImportError as error:
        raise ImportError("Frames of a video need PyAV 17 or newer: pip install -U av") from error
    try:
        container = av.open(str(video))
        stream = container.streams.video[0]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{video} is no video that can be read ({error}): convert it to MP4") from error

    def frames() -> Iterator[Any]:
        for packet in container.demux(stream):
            with suppress(av.FFmpegError):
                yield from packet.decode()

    with container:
        stream.thread_type = "AUTO"
        start = stream.start_time * stream.time_base if stream.start_time and stream.time_base else 0
        pixel = float(stream.sample_aspect_ratio or 1)
        for frame in tqdm(frames(), "frames", stream.frames or None, unit="frame", delay=2):
            if frame.time is not None:
                yield Frame(float(frame.time - start), frame, pixel)


def _small(frame: Any) -> np.ndarray:
    """32 × 32 pixels of RGB, to compare frames."""
    return frame.reformat(32, 32, "rgb24", interpolation="AREA").to_ndarray().astype(np.int16)


def _sharpness(frame: Any) -> float:
    """Variance of the Laplacian of the luma, at most 512 pixels wide, so that edges outweigh noise."""
    width = min(512, frame.width)
    grey = frame.reformat(width, max(3, frame.height * width // frame.width), "gray").to_ndarray().astype(np.float32)
    middle = 4 * grey[1:-1, 1:-1]
    return float((middle - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]).var())


def _picture(decoded: Frame) -> Image.Image:
    """The frame in RGB, upright and with square pixels."""
    frame = decoded.frame
    if frame.colorspace == UNSPECIFIED and frame.height >= 720:
        frame.colorspace = ITU709  # as every player does; PyAV would use the coding of old television
    picture = frame.to_image()
    if decoded.pixel != 1:
        picture = picture.resize((round(frame.width * decoded.pixel), frame.height), Image.Resampling.LANCZOS)
    return picture.rotate(frame.rotation, expand=True)
