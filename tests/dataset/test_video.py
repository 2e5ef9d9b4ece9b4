"""Frames of a video: the sharpest of each place, upright, in their own colours, none twice."""

import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from films import film, shapes
from PIL import Image, ImageFilter
from said import naming

from lorakit.dataset import folder as dataset_folder
from lorakit.dataset import video

av = pytest.importorskip("av")
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def blurred(picture: Image.Image, radius: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(radius))


def corners(size: tuple[int, int] = (96, 64)) -> Image.Image:
    quarters = np.array([[RED, BLUE], [GREEN, WHITE]], np.uint8)
    return Image.fromarray(quarters).resize(size, Image.Resampling.NEAREST)


def seen(path: Path) -> list[tuple[int, ...]]:
    """The colours of the four corners, upper left, upper right, lower left, lower right."""
    with Image.open(path) as picture:
        right, bottom = picture.width - 4, picture.height - 4
        return [picture.convert("RGB").getpixel(at) for at in ((3, 3), (right, 3), (3, bottom), (right, bottom))]


def near(found: list, expected: list, most: int) -> bool:
    return np.abs(np.array(found) - np.array(expected)).max() <= most


def distance(path: Path, picture: Image.Image) -> float:
    with Image.open(path) as found:
        return float(np.abs(np.asarray(found).astype(int) - np.asarray(picture)).mean())


def times(paths: list[Path]) -> list[str]:
    return [path.stem.rpartition("-")[2] for path in paths]


def test_of_each_place_the_sharpest_frame(tmp_path):
    """Three and a half seconds at ten frames a second; of each second one frame near its beginning is not blurred."""
    pictures, sharp = [], {0: 1, 1: 12, 2: 18, 3: 30}
    for number in range(35):
        place = round(number / 10)
        picture = shapes(place)
        pictures.append(picture if number in sharp.values() else blurred(picture, 3))
    source = film(tmp_path / "a clip.mp4", pictures)
    found = video.extract_frames(source, tmp_path / "out", every=1.0, window=0.5)
    assert [path.name for path in found] == [f"a clip-00h00m0{s // 10}s{s % 10}00.png" for s in sharp.values()]
    for place, path in enumerate(found):
        assert distance(path, shapes(place)) < 4 < distance(path, blurred(shapes(place), 3))
    assert sorted((tmp_path / "out").iterdir()) == found
    assert len(dataset_folder.scan(tmp_path / "out")) == 4


def test_one_frame_of_each_scene(tmp_path):
    lengths, pictures = (7, 15, 4, 9), []
    for scene, length in enumerate(lengths):
        pictures += [blurred(shapes(scene), 2 if number != 2 else 0) for number in range(length)]
    found = video.extract_frames(film(tmp_path / "a.mp4", pictures), tmp_path / "out", every=None)
    assert times(found) == ["00h00m00s200", "00h00m00s900", "00h00m02s400", "00h00m02s800"]
    assert all(distance(path, shapes(scene)) < 4 for scene, path in enumerate(found))


def test_frames_that_look_alike_are_written_once(tmp_path):
    pictures = [shapes(seed) for seed in (1, 1, 2, 1, 3, 2) for _ in range(10)]
    found = video.extract_frames(film(tmp_path / "a.mp4", pictures), tmp_path / "out", every=0.5, window=0.1)
    assert [round(min((distance(path, shapes(seed)), seed) for seed in (1, 2, 3))[1]) for path in found] == [1, 2, 3]


def test_a_video_may_begin_late_and_run_for_hours(tmp_path):
    source = tmp_path / "a.mkv"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for number, second in enumerate((10, 11, 10 + 3725)):
            frame = av.VideoFrame.from_image(shapes(number))
            frame.pts, frame.time_base = second, Fraction(1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert times(video.extract_frames(source, tmp_path / "out")) == ["00h00m00s000", "00h00m01s000", "01h02m05s000"]


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_a_phone_held_upright(tmp_path, turn):
    """A phone writes lying frames, and how to turn them clockwise into the track's matrix."""
    source = film(tmp_path / "a.mp4", [corners()] * 3)
    cosine, sine = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[turn]
    raw = bytearray(source.read_bytes())
    matrix = raw.index(b"tkhd") + 44
    raw[matrix : matrix + 20] = struct.pack(">5i", cosine << 16, sine << 16, 0, -sine << 16, cosine << 16)
    source.write_bytes(raw)
    (path,) = video.extract_frames(source, tmp_path / "out")
    expected = {0: [RED, BLUE, GREEN, WHITE], 90: [GREEN, RED, WHITE, BLUE], 180: [WHITE, GREEN, BLUE, RED],
                270: [BLUE, WHITE, RED, GREEN]}  # fmt: skip
    assert near(seen(path), expected[turn], 12)


def test_pixels_become_square(tmp_path):
    source = film(tmp_path / "a.mkv", [corners()] * 3, pixel=2)
    (path,) = video.extract_frames(source, tmp_path / "out")
    with Image.open(path) as picture:
        assert picture.size == (192, 64)
    assert near(seen(path), [RED, BLUE, GREEN, WHITE], 12)


@pytest.mark.parametrize(
    ("height", "told", "red"),
    [(64, 2, (81, 90, 240)), (720, 2, (63, 102, 240)), (64, 1, (63, 102, 240)), (720, 5, (81, 90, 240))],
)
def test_colours_are_those_that_players_show(tmp_path, height, told, red):
    """Red by the codes of old (601) and of high-definition television (709), told or, by the height, not."""
    width = height * 2
    planes = np.full((height * 3 // 2, width), red[0], np.uint8)
    chroma = planes[height:].reshape(-1)
    chroma[: chroma.size // 2], chroma[chroma.size // 2 :] = red[1], red[2]
    source = tmp_path / "a.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, "yuv420p", {"crf": "1"}
        stream.codec_context.colorspace = told
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(planes, "yuv420p")
            frame.colorspace = told
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (path,) = video.extract_frames(source, tmp_path / "out")
    assert near(seen(path), [RED] * 4, 4)


def test_as_jpeg(tmp_path):
    (path,) = video.extract_frames(film(tmp_path / "a.mp4", [corners()] * 3), tmp_path / "out", suffix=".jpg")
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
    assert near(seen(path), [RED, BLUE, GREEN, WHITE], 14)


def test_a_video_that_breaks_off_gives_what_is_before(tmp_path):
    source = film(tmp_path / "a.mkv", [shapes(number // 10) for number in range(100)])
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    assert 2 < len(video.extract_frames(source, tmp_path / "out")) < 9


def test_damage_in_the_middle_costs_no_more_than_its_frames(tmp_path):
    source = film(tmp_path / "a.mkv", [shapes(number // 10) for number in range(100)])
    raw = bytearray(source.read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 500] = bytes(500)
    source.write_bytes(raw)
    assert len(video.extract_frames(source, tmp_path / "out")) > 4


def test_what_is_no_video(tmp_path):
    with pytest.raises(FileNotFoundError, match=naming("gone.mp4")):
        video.extract_frames(tmp_path / "gone.mp4", tmp_path / "out")
    for name, contents in (("text.mp4", b"hello"), ("empty.mp4", b"")):
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(ValueError, match=naming(name, "MP4")):
            video.extract_frames(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_makes_no_sense_is_refused(tmp_path):
    source = film(tmp_path / "a.mp4", [corners()])
    for options in ({"every": 0}, {"every": -1.0}, {"window": 0.0}):
        with pytest.raises(ValueError, match=naming("every", "window", *options.values())):
            video.extract_frames(source, tmp_path / "out", **options)
    with pytest.raises(ValueError, match=naming(".gif", ".png", ".jpg")):
        video.extract_frames(source, tmp_path / "out", suffix=".gif")


def test_without_pyav_it_says_what_to_install(tmp_path, monkeypatch):
    source = film(tmp_path / "a.mp4", [corners()])
    monkeypatch.setattr(av, "__version__", "16.1.0")
    with pytest.raises(ImportError, match=naming(17, "av")):
        video.extract_frames(source, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=naming(17, "av")):
        video.extract_frames(source, tmp_path / "out")


def test_an_interrupt_leaves_no_half_written_picture(tmp_path, monkeypatch):
    source, save = film(tmp_path / "a.mp4", [shapes(number) for number in range(30)]), Image.Image.save

    def cut(picture, file, *rest, **options):
        save(picture, file, *rest, **options)
        if len(list((tmp_path / "out").glob("*.png"))) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        video.extract_frames(source, tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 1
