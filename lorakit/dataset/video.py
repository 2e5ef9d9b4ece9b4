"""A video → pictures to train on: of each place its sharpest frame, and no frame that looks like one before.

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

    Frames that cannot be decoded are passed over. High dynamic range is not mapped to that of a screen.

    Args:
        every: seconds from place to place; None takes the beginning of each scene.
        window: seconds around a place (after it, for a scene) in which the sharpest is looked for.
        suffix: ".png" or ".jpg".

    Returns:
        The pictures, in the order of the video.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no video, or not a frame of it can be decoded.
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
        _, found = max(near, key=lambda at: _sharpness(at[1].frame))
        small = _small(found.frame)
        if np.abs(seen - small).mean((1, 2, 3)).min(initial=255) < ALIKE:
            continue
        seen = np.concatenate([seen, small[None]])
        whole = round(found.seconds * 1000)
        stamp = f"{whole // 3_600_000:02d}h{whole // 60_000 % 60:02d}m{whole // 1000 % 60:02d}s{whole % 1000:03d}"
        written.append(folder / f"{video.stem}-{stamp}{suffix}")
        with storage.write_file(written[-1]) as partial:
            _picture(found).save(partial, kind, **options)
    if not written:
        raise ValueError(f"{video} has no frame that can be decoded: copy it again, or convert it to MP4")
    return written


@dataclass(frozen=True)
class Found:
    """A frame and its place in the video."""

    seconds: float
    frame: object  # av.VideoFrame
    pixel: float  # width / height of a pixel


def _places(video: Path, every: float | None, window: float) -> Iterator[tuple[int, Found]]:
    """The frames near enough to a place to stand for it, with the place's number."""
    scene, began, before = -1, 0.0, None
    for found in _decoded(video):
        if every is not None:
            place = round(found.seconds / every)
            if abs(found.seconds - place * every) <= window / 2:
                yield place, found
            continue
        small = _small(found.frame)
        if before is None or np.abs(small - before).mean() > CUT:
            scene, began = scene + 1, found.seconds
        before = small
        if found.seconds - began <= window:
            yield scene, found


def _decoded(video: Path) -> Iterator[Found]:
    try:
        import av
    except ImportError:
        av = None
    if av is None or int(av.__version__.partition(".")[0]) < 17:  # which mistook colours
        raise ImportError("Frames of a video need PyAV 17 or newer, which is not here: pip install -U av")
    try:
        container = av.open(str(video))
        stream = container.streams.video[0]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{video} is no video that can be read ({error}): convert it to MP4") from error
    with container, tqdm(total=stream.frames or None, desc="frames", unit="frame", delay=2) as bar:
        stream.thread_type = "AUTO"
        start = (stream.start_time or 0) * stream.time_base
        pixel = float(stream.sample_aspect_ratio or 1)
        for packet in container.demux(stream):
            with suppress(av.FFmpegError):
                for frame in packet.decode():
                    if frame.time is not None:
                        yield Found(float(frame.time - start), frame, pixel)
                    bar.update()


def _small(frame) -> np.ndarray:
    """32 × 32 pixels of RGB, to compare frames by."""
    return frame.reformat(32, 32, "rgb24", interpolation="AREA").to_ndarray().astype(np.int16)


def _sharpness(frame) -> float:
    """Variance of the Laplacian of the luma, at most 512 pixels wide, so that noise counts for less than edges."""
    width = min(512, frame.width)
    grey = frame.reformat(width, max(3, frame.height * width // frame.width), "gray").to_ndarray().astype(np.float32)
    middle = 4 * grey[1:-1, 1:-1]
    return float((middle - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]).var())


def _picture(found: Found) -> Image.Image:
    """The frame in RGB, upright and with square pixels."""
    frame = found.frame
    if frame.colorspace == UNSPECIFIED and frame.height >= 720:
        frame.colorspace = ITU709  # as every player takes it; PyAV would take the code of old television
    picture = frame.to_image()
    if found.pixel != 1:
        picture = picture.resize((round(frame.width * found.pixel), frame.height), Image.Resampling.LANCZOS)
    return picture.rotate(frame.rotation, expand=True)
