"""The check: what is wrong with a picture is found, what is right is let pass, and no file of the user's changes."""

import importlib.util
import json
import os
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from said import line, names, naming

from lorakit.dataset import folder as folders
from lorakit.dataset import picture as picture_module
from lorakit.dataset import quality as quality_module
from lorakit.dataset import selection
from lorakit.dataset.buckets import Buckets
from lorakit.dataset.report import Report
from lorakit.dataset.selection import Decisions
from lorakit.demo import PICTURES

PHOTO = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")


@pytest.fixture(autouse=True)
def _saved_fast(monkeypatch):
    """Compressing PNGs well takes as long as checking them."""
    save = Image.Image.save
    fast = lambda image, *arguments, **options: save(image, *arguments, **{"compress_level": 1} | options)  # noqa: E731
    monkeypatch.setattr(Image.Image, "save", fast)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A real photograph, 512×600, sharp and well exposed."""
    return picture_module.open_picture(PHOTO)


@pytest.fixture(scope="module")
def calibration():
    """The script that the limits were set with."""
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    file = Path(__file__).parents[1] / "bench" / "check_calibration.py"
    spec = importlib.util.spec_from_file_location("check_calibration", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def found(folder: Path, pictures: dict[str, Image.Image | bytes | None], **options) -> Report:
    """Save pictures (a name with .jpg as JPEG of high quality), and check them."""
    for name, image in pictures.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **({"quality": 97} if path.suffix == ".jpg" else {}))
    return quality_module.check_quality(folders.scan(folder), **options)


def kinds(report: Report, name: str | None) -> set[str]:
    pictures = () if name is None else (name,)
    return {finding.kind for finding in report.findings if finding.pictures == pictures and finding.kind != "caption"}


def message(report: Report, kind: str) -> str:
    (finding,) = [finding for finding in report.findings if finding.kind == kind]
    return f"{finding.severity}: {finding.message}"


# Calibrated


def test_strong_damage_is_caught_and_clean_photographs_pass(calibration):
    """A short form of tests/bench/check_calibration.py, on photographs that the limits were not set with."""
    pictures = list(calibration.cleans(calibration.sources()[1::4], 0))
    rows = calibration.caught(pictures, short=True)
    caught, of = (sum(row[key] for row in rows.values() if row["strong"]) for key in ("caught", "of"))
    assert len(rows) >= 7 and of >= 24 and caught >= 0.95 * of, rows
    assert not any(calibration.accused(pictures).values())


def test_what_is_hard_to_judge_passes(calibration, monkeypatch):
    camera = next(path for path in calibration.sources() if path.name == "camera.png")
    monkeypatch.setattr(calibration, "sources", lambda: [camera] * 2)  # the others would be made for nothing
    hard = {clean.name: clean for clean in calibration.hard(1)}
    some = [name for name in hard if name.startswith(("sky", "shapes", "text", "camera.png"))]
    accused = {name: kinds for name, kinds in calibration.accused([hard[name] for name in some]).items() if kinds}
    assert len(some) == 21 and len(accused) <= 1, accused


# One picture


def test_a_photograph_has_nothing_wrong(tmp_path, photo):
    report = found(tmp_path, {"a.png": photo})
    assert kinds(report, "a.png") == set()
    (measured,) = report.measured
    assert measured.detail > 3 * quality_module.SOFT and measured.fit.size == (448, 576) and measured.enlarged < 1


def test_each_damage_is_named(tmp_path, photo):
    dark, small = photo.point(lambda value: value // 3), photo.resize((128, 150), Image.Resampling.LANCZOS)
    noise = np.random.default_rng(0).normal(0, 3, (600, 512, 1))
    blurred = photo.filter(ImageFilter.GaussianBlur(2.5))
    report = found(tmp_path, {
        "blurred.png": blurred,
        "blurred and noisy.png": Image.fromarray((np.asarray(blurred) + noise).clip(0, 255).astype(np.uint8)),
        "shaken.png": Image.fromarray(np.mean([np.roll(photo, x, 1) for x in range(12)], 0).astype(np.uint8)),
        "enlarged.png": small.resize(photo.size, Image.Resampling.BICUBIC),
        "dark.png": dark,
        "bright.png": photo.point(lambda value: min(255, value * 4)),
        "small.png": small,
        "wide.png": photo.crop((0, 200, 512, 280)),
    })  # fmt: skip
    expected = {
        "blurred.png": {"blur"}, "blurred and noisy.png": {"blur"}, "shaken.png": {"blur"}, "dark.png": {"exposure"},
        "enlarged.png": {"upscaled"}, "bright.png": {"exposure"}, "small.png": {"resolution"},
        "wide.png": {"resolution", "crop"},
    }  # fmt: skip
    assert {name: kinds(report, name) - {"duplicate"} for name in expected} == expected
    told = {name: f.message for f in report.findings for name in f.pictures if f.kind not in ("caption", "duplicate")}
    measured = {picture.name: picture for picture in report.measured}
    worst, best = measured["shaken.png"].edges  # of twelve directions
    assert worst < 0.85 * best and names(told["shaken.png"], f"{worst:.1f}", f"{best:.1f}")
    assert names(told["dark.png"], f"{measured['dark.png'].brightest / 255:.0%}")
    assert names(told["bright.png"], f"{measured['bright.png'].blown:.0%}")
    assert names(told["small.png"], "128×150")
    ((width, height),) = re.findall(r"(\d+)×(\d+)", told["enlarged.png"])
    assert 100 < int(width) < 200 and 120 < int(height) < 230


def test_a_large_picture_is_judged_as_it_is_trained(tmp_path, photo):
    """At four times the size a picture may be soft, and full of blocks: reduced, it is neither."""
    large = photo.resize((2048, 2400), Image.Resampling.BICUBIC)
    large.save(tmp_path / "large.jpg", quality=30)
    report = quality_module.check_quality(folders.scan(tmp_path))
    assert kinds(report, "large.jpg") == set()
    report = quality_module.check_quality(folders.scan(tmp_path), buckets=Buckets(2048))
    assert kinds(report, "large.jpg") == {"blur", "jpeg"}


@pytest.mark.parametrize("quality", [10, 25, 50, 75])
def test_jpeg_is_seen_in_files_and_in_pixels_alike(tmp_path, photo, quality):
    """Saved again as PNG, cut off the grid of blocks, what a JPEG was compressed with is still told."""
    photo.save(tmp_path / "a.jpg", quality=quality)
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    assert quality_module._file_steps(tmp_path / "a.jpg") == pytest.approx(
        scale, rel=0.15
    )  # steps are whole and at most 255
    cut = picture_module.open_picture(tmp_path / "a.jpg").crop((3, 5, 512, 600))
    assert quality_module._pixel_steps(quality_module._middle(cut)) == scale
    cut.save(tmp_path / "b.png")
    assert quality_module._file_steps(tmp_path / "b.png") == 0


def test_what_was_never_a_jpeg_is_not_called_one(photo):
    reduced = photo.resize((400, 470), Image.Resampling.LANCZOS)
    assert quality_module._pixel_steps(quality_module._middle(reduced)) == 0
    assert quality_module._pixel_steps(np.zeros((512, 512), np.float32)) == 0
    assert quality_module._pixel_steps(np.zeros((8, 8), np.float32)) == 0


def test_a_picture_on_a_backdrop_is_neither_blurred_nor_overexposed(tmp_path, photo):
    white = Image.new("RGB", (1024, 1024), "white")
    white.paste(photo.resize((200, 234), Image.Resampling.LANCZOS), (400, 400))
    blurred = photo.filter(ImageFilter.GaussianBlur(8))
    blurred.paste(photo.crop((150, 100, 350, 320)), (150, 100))
    report = found(tmp_path, {"white.png": white, "bokeh.png": blurred})
    assert kinds(report, "bokeh.png") == set()
    assert kinds(report, "white.png") == {"subject"} and names(message(report, "subject"), "5%")


def test_any_shape_is_measured(tmp_path):
    """Nothing to see, one colour, one pixel, a line: no crash, no warning of NumPy's."""
    shapes = {"dot.png": (1, 1), "line.png": (900, 1), "grey.png": (512, 512), "small.png": (17, 33)}
    report = found(tmp_path, {name: Image.new("RGB", size, (90, 120, 200)) for name, size in shapes.items()})
    assert not {"blur", "upscaled", "jpeg"} & {finding.kind for finding in report.findings}
    assert all(picture.detail is None for picture in report.measured)


def test_a_file_that_has_changed_since_is_told(tmp_path, photo):
    photo.save(tmp_path / "a.png")
    photo.crop((0, 0, 300, 300)).save(tmp_path / "b.png")
    scanned = folders.scan(tmp_path)
    (tmp_path / "a.png").write_bytes(b"gone")
    report = quality_module.check_quality(scanned)
    assert kinds(report, "a.png") == {"file"} and message(report, "file").startswith("serious")
    assert [picture.name for picture in report.measured] == ["b.png"]


# The set


def test_near_duplicates_are_grouped_and_others_are_not(tmp_path, photo):
    again = {
        "original.png": photo, "half.png": photo.resize((256, 300)), "mirrored.png": ImageOps.mirror(photo),
        "middle.png": photo.crop((50, 60, 462, 540)), "corner.png": photo.crop((0, 0, 461, 540)),
        "saved.jpg": photo, "brighter.png": photo.point(lambda value: min(255, int(value * 1.2))),
    }  # fmt: skip
    emoji = {path.name: picture_module.open_picture(path) for path in sorted(PICTURES.rglob("*.png"))[:12]}
    report = found(tmp_path, again | emoji, buckets=Buckets(64, 16))
    assert [set(group) for group in report.figures["near_duplicates"]] == [set(again)]
    assert sum(finding.kind == "duplicate" for finding in report.findings) == len(again) - 1
    assert report.facts()["near_duplicates"] == [sorted(again)]


def test_variety_tells_one_scene_from_many(tmp_path, photo):
    scene = {f"{i}.png": photo.crop((i * 20, 0, i * 20 + 400, 500)) for i in range(6)}
    one = found(tmp_path / "one", scene).figures["variety"]
    emoji = {path.name: picture_module.open_picture(path) for path in sorted(PICTURES.rglob("*.png"))[:6]}
    many = found(tmp_path / "many", emoji, buckets=Buckets(64)).figures["variety"]
    assert one < many <= 1.2
    assert found(tmp_path / "single", {"a.png": photo}).figures["variety"] is None
    assert found(tmp_path / "same", {"a.png": photo, "b.jpg": photo}).figures["variety"] < 0.1


def test_embeddings_tell_variety_and_what_is_unlike_the_rest(tmp_path):
    emoji = {f"{i}.png": Image.new("RGB", (64, 64), (i * 9, 0, 0)) for i in range(10)}
    rest = np.random.default_rng(0).normal(0, 0.05, (10, 8)) + np.eye(8)[0]
    rest[7] = np.eye(8)[3]
    report = found(tmp_path, emoji, buckets=Buckets(64), embed=lambda pictures: rest[: len(pictures)])
    (odd,) = [finding for finding in report.findings if finding.kind == "outlier"]
    assert odd.pictures == ("7.png",) and odd.severity == "info"
    scanned = folders.scan(tmp_path)

    def variety(vectors: np.ndarray) -> float:
        return quality_module.check_quality(scanned, buckets=Buckets(64), embed=lambda _: vectors).figures["variety"]

    assert variety(np.ones((10, 3))) == pytest.approx(0) and variety(np.eye(10)) == pytest.approx(1)
    with pytest.raises(ValueError, match=naming((3, 2), 10)):
        variety(np.ones((3, 2)))


def test_pictures_are_counted_by_the_guides_table(tmp_path):
    assert quality_module.COUNTS["character"] == (20, (50, 100), (40, 80)) and quality_module.COUNTS["style"][0] == 15
    random = np.random.default_rng(0)
    for i in range(16):
        Image.fromarray(random.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / f"{i}.png")
    scanned = folders.scan(tmp_path)
    character, style = (
        quality_module.check_quality(scanned, kind=kind, buckets=Buckets(64)) for kind in ("character", "style")
    )
    assert names(message(character, "count"), "warning", 16, 20)
    assert message(style, "count").startswith("info")
    assert quality_module._count("object", 45, 0) == []
    (few,), (many,) = (quality_module._count("clothing", count, 0) for count in (30, 300))
    assert few.severity == many.severity == "info" and names(many.message, 300)
    assert few.message != many.message.replace("300", "30")  # more of them, or fewer
    assert quality_module._count("style", 16, 2)[0].severity == "warning"
    with pytest.raises(ValueError, match=naming("'person'", *quality_module.COUNTS)):
        quality_module.check_quality(scanned, kind="person")


def test_captions_are_counted_and_the_trigger_is_a_word(tmp_path):
    texts = ["sks cat on a mat", "a dog", "asks", "SKS, sitting", ""]
    for i, text in enumerate(texts):
        Image.new("RGB", (64, 64), (i * 20, 0, 0)).save(tmp_path / f"{i}.png")
        if text:
            (tmp_path / f"{i}.txt").write_text(text)
    report = quality_module.check_quality(folders.scan(tmp_path), buckets=Buckets(64), trigger="sks")
    lacking = [name for finding in report.findings for name in finding.pictures if finding.kind == "caption"]
    assert lacking == ["1.png", "2.png", "4.png"]
    words = {"least": 1, "median": 2, "most": 5}
    assert report.figures["captions"] == {
        "with": 4, "without": 1, "own": 4, "shared": 0, "words": words, "without_trigger": 3,
    }  # fmt: skip
    report = quality_module.check_quality(folders.scan(tmp_path), buckets=Buckets(64))
    assert "without_trigger" not in report.figures["captions"]


# The report


def test_programs_get_names_relative_to_the_dataset(tmp_path, photo):
    folder = tmp_path / "home of somebody"
    pictures = {"3_sks/кот.png": photo.filter(ImageFilter.GaussianBlur(3)), "猫.png": photo.resize((100, 117))}
    (folder / "3_sks").mkdir(parents=True)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "lonely.txt").write_text("a caption")
    report = found(folder, pictures)
    facts = json.loads(json.dumps(report.facts()))
    assert "home of somebody" not in json.dumps(facts)
    assert (facts["pictures"], facts["per_epoch"], facts["kind"]) == (2, 4, "character")
    assert [problem["picture"] for problem in facts["left_out"]] == ["broken.png"]
    assert [problem["picture"] for problem in facts["to_look_at"]] == ["lonely.txt"]
    about = {(finding["picture"], finding["kind"], finding["severity"]) for finding in facts["findings"]}
    assert about >= {
        ("3_sks/кот.png", "blur", "serious"),
        ("猫.png", "resolution", "serious"),
        (None, "count", "warning"),
    }
    assert all(finding["message"] for finding in facts["findings"])


def test_people_get_the_worst_first_and_not_everything(tmp_path):
    for i in range(12):
        Image.new("RGB", (20, 20), (i * 20, 200, 0)).save(tmp_path / f"{i}.png")
    report = quality_module.check_quality(folders.scan(tmp_path), buckets=Buckets(64))
    assert not names(message(report, "count"), 12)  # they are all alike
    lines = report.describe(most=3).splitlines()
    assert names(lines[0], 12, 1)
    first = lines.index(line(lines, "serious", "resolution", 12))
    assert [text.split(":")[0].strip() for text in lines[first + 1 : first + 4]] == ["0.png", "1.png", "2.png"]
    assert names(lines[first + 4], 9)
    assert first < lines.index(line(lines, "warning"))


def test_a_name_that_is_not_utf8_can_be_reported(tmp_path):
    try:
        Image.new("RGB", (20, 20)).save(tmp_path / os.fsdecode(b"\xff.png"))
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    report = quality_module.check_quality(folders.scan(tmp_path), buckets=Buckets(64))
    report.describe().encode()
    json.dumps(report.facts()).encode()
    quality_module.crop_previews(report.dataset, buckets=Buckets(64))


def test_what_a_person_keeps_is_not_told_again(tmp_path, photo):
    report = found(tmp_path, {"a.png": photo.resize((100, 117)), "b.png": photo.resize((120, 140))}, keep=["a.png"])
    assert not kinds(report, "a.png") and "resolution" in kinds(report, "b.png") and "count" in kinds(report, None)


# Decisions


def test_decisions_change_the_dataset_and_no_file(tmp_path, photo):
    folder, better = tmp_path / "pictures", tmp_path / "better.png"
    found(folder, {f"4_sks/{i}.png": photo.crop((i, 0, 300 + i, 300)) for i in range(4)})
    photo.save(better)
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    scanned = folders.scan(folder)
    made = Decisions(("4_sks/0.png",), ("4_sks/3.png",), {"4_sks/1.png": str(better)})
    selection.save_decisions(made, tmp_path / "run" / "decisions.json", folder)
    assert selection.load_decisions(tmp_path / "run" / "decisions.json", folder) == made
    assert selection.load_decisions(tmp_path / "run" / "decisions.json", tmp_path) == Decisions()  # of another folder
    decided = selection.apply_decisions(scanned, made)
    assert [picture.path.name for picture in decided.pictures] == ["better.png", "2.png", "3.png"]
    new, old = decided.pictures[0], scanned.pictures[1]
    assert (new.width, new.height, new.caption, new.repeats) == (512, 600, old.caption, 4)
    assert picture_module.open_picture(new).size == photo.size
    (problem,) = decided.problems
    assert problem.left_out and problem.path == folder / "4_sks" / "0.png"
    assert line(decided.describe().splitlines(), "4_sks/0.png")
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    assert json.dumps(quality_module.check_quality(decided).facts()).count(str(tmp_path)) == 0


def test_leaving_out(tmp_path, photo):
    found(tmp_path, {"a.png": photo, "b.png": ImageOps.mirror(photo)})
    scanned = folders.scan(tmp_path)

    def left(names):
        return selection.apply_decisions(scanned, Decisions(leave_out=tuple(names))).pictures

    assert [picture.path.name for picture in left(["a.png"])] == ["b.png"]
    assert left([]) == scanned.pictures
    with pytest.raises(ValueError, match=naming("'aa.png'", "'a.png'")):
        left(["aa.png"])
    with pytest.raises(ValueError, match=naming(2)):
        left(["a.png", "b.png"])
    with pytest.raises(FileNotFoundError):
        selection.apply_decisions(scanned, Decisions(replace={"a.png": str(tmp_path / "none.png")}))


def test_what_was_decided_about_other_folders_stays(tmp_path):
    file, one, other = tmp_path / "decisions.json", tmp_path / "one", tmp_path / "other"
    one.mkdir()
    assert selection.last_source(file) is None
    selection.save_decisions(Decisions(leave_out=("1.png",)), file, other)
    assert selection.last_source(file) is None  # it is gone
    selection.save_decisions(Decisions(keep=("2.png",)), file, one)
    assert selection.last_source(file) == one
    assert selection.load_decisions(file, other).leave_out == ("1.png",) and selection.load_decisions(
        file, str(one)
    ).keep == ("2.png",)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"of": {"/": {"leave_out": 3}}}', '{"of": [1]}'])
def test_damaged_decisions_are_named(tmp_path, text):
    (tmp_path / "decisions.json").write_text(text)
    with pytest.raises(ValueError, match=naming("decisions.json")):
        selection.load_decisions(tmp_path / "decisions.json", "/")


# What is cut off


def test_the_sheet_reddens_what_is_cut_off(tmp_path):
    blue = Image.new("RGB", (1024, 256), (0, 0, 200))
    blue.save(tmp_path / "wide.png")
    Image.new("RGB", (512, 512), (0, 0, 200)).save(tmp_path / "square.png")
    scanned = folders.scan(tmp_path)
    sheet = np.asarray(quality_module.crop_previews(scanned, buckets=Buckets(64, 64))).astype(int)  # one bucket: 64×64
    red, whole = sheet[..., 0] > 100, (sheet == (0, 0, 200)).all(2)
    shaded = red & (sheet[..., 1] < 100) & (sheet[..., 2] < 150)
    columns = np.flatnonzero(whole.any(0))
    assert shaded.any() and len(columns) and sheet.shape[1] < 500
    left = np.flatnonzero(shaded.any(0))
    assert shaded.sum() == pytest.approx(0.75 * 180 * 45, rel=0.05)  # a square out of the middle is left of 4 by 1
    assert left.min() < columns.min()
    assert quality_module.crop_previews(scanned, buckets=Buckets(64), most=1).width < sheet.shape[1]


# In a notebook


def test_a_report_shows_its_findings_with_their_pictures(tmp_path):
    for i in range(30):
        Image.new("RGB", (20, 20), (i * 8, 200, 0)).save(tmp_path / f"<{i}>.png")
    report = quality_module.check_quality(folders.scan(tmp_path), buckets=Buckets(64))
    html = report._repr_html_()
    assert html.count("data:image/jpeg;base64,") == 24 and "&lt;0&gt;.png" in html and "<0>" not in html
    assert message(report, "count").partition(": ")[2] in html and str(tmp_path) not in html
    assert str(report) == report.describe()
