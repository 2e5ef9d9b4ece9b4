"""The dataset: every picture right, every one left out named, and nothing written where the user's files are."""

import base64
import hashlib
import io
import json
import os
import re
import struct
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from said import line, names, naming

from lorakit.config import Config
from lorakit.dataset import captions, gallery, selection
from lorakit.dataset import folder as folders
from lorakit.dataset import picture as picture_module
from lorakit.dataset.caption_quality import audit_captions
from lorakit.storage import index

RED, BLUE = (255, 0, 0), (0, 0, 255)


def draw(path: Path, color=RED, size=(8, 6), **options) -> Path:
    """Save a picture of one colour, making its folders; each colour and size is another file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def noise(suffix: str) -> bytes:
    """A picture that does not compress, so that any cut loses pixels."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(file, suffix)
    return file.getvalue()


def paths(found: folders.Dataset) -> list[str]:
    return [picture.path.relative_to(found.root).as_posix() for picture in found.pictures]


def reasons(found: folders.Dataset, left_out: bool) -> dict[str, str]:
    return {problem.path.name: problem.reason for problem in found.problems if problem.left_out is left_out}


def described(found: folders.Dataset) -> list[str]:
    return found.describe().splitlines()


# Folders


def test_kohyas_tree(tmp_path):
    cat = draw(tmp_path / "5_sks cat" / "1.png")
    write(cat.with_suffix(".txt"), "a photo of sks cat")
    draw(tmp_path / "5_sks cat" / "2.jpg", BLUE, (10, 20))
    draw(tmp_path / "2_a_dog" / "deep" / "1.webp", BLUE)
    found = folders.scan(tmp_path)
    assert paths(found) == ["2_a_dog/deep/1.webp", "5_sks cat/1.png", "5_sks cat/2.jpg"]
    assert [p.repeats for p in found.pictures] == [2, 5, 5]
    assert [p.group for p in found.pictures] == ["2_a_dog/deep", "5_sks cat", "5_sks cat"]
    assert [p.caption for p in found.pictures] == ["a_dog", "a photo of sks cat", "sks cat"]
    assert [p.caption_source for p in found.pictures] == ["folder", ".txt", "folder"]
    assert (found.pictures[2].width, found.pictures[2].height) == (10, 20)
    assert found.pictures[1].digest == hashlib.sha256(cat.read_bytes()).hexdigest()
    assert found.problems == () and len(found) == 3 and found.epoch_size == 12
    lines = described(found)
    assert names(lines[0], 3, 12) and line(lines, "5_sks cat", "2 × 5")
    assert line(lines, "folder", "'sks cat' × 1", ".txt × 1")


def test_a_flat_folder_and_one_that_is_named_with_repeats(tmp_path):
    draw(tmp_path / "flat" / "a.png")
    draw(tmp_path / "10_sks" / "a.png")
    (flat,) = folders.scan(tmp_path / "flat").pictures
    assert (flat.repeats, flat.caption, flat.caption_source, flat.group) == (1, "", "none", "")
    assert line(described(folders.scan(tmp_path / "flat")), "none × 1")
    (named,) = folders.scan(str(tmp_path / "10_sks")).pictures
    assert (named.repeats, named.caption, named.caption_source, named.group) == (10, "sks", "folder", "")
    assert names(described(folders.scan(tmp_path / "10_sks"))[0], 1, 10)


def test_arguments_stand_in_for_folder_names(tmp_path):
    draw(tmp_path / "5_cat" / "1.png")
    write(draw(tmp_path / "5_cat" / "2.png", BLUE).with_suffix(".txt"), "own")
    found = folders.scan(tmp_path, repeats=3, caption=" sks\n style ")
    assert [(p.caption, p.caption_source) for p in found.pictures] == [("sks style", "given"), ("own", ".txt")]
    assert found.epoch_size == 6
    with pytest.raises(ValueError, match=naming("repeats", 0)):
        folders.scan(tmp_path, repeats=0)


def test_repeats_by_folder(tmp_path):
    for number, name in enumerate(("5_cat/1.png", "5_cat/deep/1.png", "dogs/1.png", "1.png")):
        draw(tmp_path / name, (number, 0, 0))
    found = folders.scan(tmp_path, repeats={"dogs": 3, "5_cat/deep": 2})
    assert {p.group: p.repeats for p in found.pictures} == {"": 1, "5_cat": 5, "5_cat/deep": 2, "dogs": 3}
    assert {p.repeats for p in folders.scan(tmp_path, repeats={"": 4}).pictures} == {4}
    with pytest.raises(ValueError, match=naming("repeats", "'dog'")) as caught:
        folders.scan(tmp_path, repeats={"dog": 3})
    assert str(caught.value).count("'dogs'") == 2  # in the list of what is there, and as the nearest
    with pytest.raises(ValueError, match=naming("repeats", "'dogs/deep'")):
        folders.scan(tmp_path, repeats={"dogs/deep": 3})
    with pytest.raises(ValueError, match=naming("repeats", 0)):
        folders.scan(tmp_path, repeats={"dogs": 0})


def test_a_regularisation_folder_is_a_second_scan(tmp_path):
    draw(tmp_path / "learn" / "5_sks cat" / "1.png")
    draw(tmp_path / "reg" / "1_cat" / "1.png", BLUE)
    for folder, caption, repeats in (("learn", "sks cat", 5), ("reg", "cat", 1)):
        (picture,) = folders.scan(tmp_path / folder, regularisation=True).pictures
        assert (picture.caption, picture.repeats) == (caption, repeats)


def test_masks_and_class_pictures_in_the_dataset_are_not_learned(tmp_path):
    for name in ("x.png", "5_cat/y.png", "masks/x.png", "reg/1_cat/z.png", "x-masklabel.png"):
        draw(tmp_path / name, (len(name), 0, 0))
    config = Config(dataset=str(tmp_path), mask=str(tmp_path / "masks"), regularisation=str(tmp_path / "reg"), steps=1)
    learned = selection.scan_dataset(config)
    assert sorted(learned.by_name) == ["5_cat/y.png", "x.png"]
    assert {p.path.name for p in learned.problems if p.left_out} == {"masks", "reg", "x-masklabel.png"}
    (mask, other) = folders.find_masks([learned.by_name["x.png"], learned.by_name["5_cat/y.png"]], tmp_path, tmp_path)
    assert mask.path.name == "x-masklabel.png" and other is None


def test_a_project_of_kohyas_gui_has_its_pictures_in_img(tmp_path):
    for name in ("img/5_cat/x.png", "reg/1_cat/y.png", "sample/z.png", "model/w.png"):
        draw(tmp_path / name, (len(name), 0, 0))
    scanned = folders.scan(tmp_path)
    assert list(scanned.by_name) == ["img/5_cat/x.png"] and scanned.pictures[0].repeats == 5
    assert {problem.path.name for problem in scanned.problems} == {"reg", "sample", "model"}


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("sks cat".encode("utf-16-le"), "sks cat"), ("sks cat".encode("utf-16-be"), "sks cat"),
        ("sks cat".encode("utf-32"), "sks cat"), ("sks cat".encode("utf-32-le"), "sks cat"),
        ("sks, ネコ".encode("utf-16"), "sks, ネコ"), ("été, Mädchen".encode("cp1252"), "été, Mädchen"),
        ("女の子、笑顔".encode("cp932"), ""), ("一个女孩，微笑".encode("gbk"), ""),
        (b"sks\0\0\0cat", ""), (b"\x89PNG\r\n\x1a\n\0", ""), (b" , ,, ", ""),
    ],
)  # fmt: skip
def test_encodings_are_read_right_or_named_and_never_learned_wrong(tmp_path, raw, text):
    draw(tmp_path / "a.png")
    write(tmp_path / "a.txt", raw)
    scanned = folders.scan(tmp_path)
    assert scanned.pictures[0].caption == text
    assert text in ("sks cat", "sks, ネコ") or "a.txt" in reasons(scanned, False)


def test_a_caption_is_found_whatever_the_case_and_with_the_pictures_suffix(tmp_path):
    for name in ("A.PNG", "b.png", "c.png"):
        draw(tmp_path / name, (ord(name[0]), 0, 0))
    for name in ("a.txt", "b.png.txt", "C.TXT"):
        write(tmp_path / name, f"caption {name[0].lower()}")
    scanned = folders.scan(tmp_path)
    assert [picture.caption[-1] for picture in scanned.pictures] == ["a", "b", "c"] and not scanned.problems
    files = captions.caption_files(scanned.by_name, tmp_path)
    assert [file.name for file in files.values()] == ["a.txt", "b.png.txt", "C.TXT"]  # so that edits reach them
    files = captions.caption_files(["A.PNG", draw(tmp_path / "a.jpg", BLUE).name], tmp_path)
    assert [file.name for file in files.values()] == ["A.txt", "a.txt"]  # which is the other picture's now


def test_files_that_are_not_read_are_named_by_their_kind(tmp_path):
    draw(tmp_path / "a.png")
    for name in ("a.jpg_large", "b.jpg_large", "c", "d.download", "captions.csv", "a.json"):
        write(tmp_path / name, "x")
    shown = reasons(folders.scan(tmp_path), False)
    assert set(shown) == {"a.jpg_large", "c", "d.download", "captions.csv", "a.json"}
    assert names(shown["a.jpg_large"], ".jpg_large", 1)


@pytest.mark.parametrize("suffix", ["pjpeg", "mpo", "ppm", "ico", "jp2", "tga", "qoi"])
def test_formats_that_pillow_reads_safely(tmp_path, suffix):
    Image.new("RGB", (32, 32), RED).save(tmp_path / f"a.{suffix}", "JPEG" if suffix == "pjpeg" else None)
    (scanned,) = folders.scan(tmp_path).pictures
    red, green, _ = picture_module.open_picture(scanned).getpixel((8, 8))
    assert red > 240 and green < 20


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"text": ["a", "b"]}, "list"),
        ({"text": {"en": "a"}}, "dict"),
        ({"text": True}, "bool"),
        ({"prompt": "a"}, "prompt"),
    ],
)
def test_a_text_that_is_none_is_named_with_its_file(tmp_path, row, named):
    draw(tmp_path / "a.png")
    write(tmp_path / "metadata.jsonl", json.dumps({"file_name": "a.png"} | row))
    scanned = folders.scan(tmp_path)
    assert scanned.pictures[0].caption == "" and names(reasons(scanned, False)["metadata.jsonl"], named, "a.png")


def test_a_very_deep_tree(tmp_path):
    deep = tmp_path
    for _ in range(700):
        deep = deep / "a"
    try:
        deep.mkdir(parents=True)
    except (OSError, RecursionError):
        pytest.skip("this system has no such deep folders")
    draw(tmp_path / "1.png")
    draw(deep / "2.png", BLUE)
    assert len(folders.scan(tmp_path)) == 2


def test_a_date_is_no_number_of_repeats_and_0_leaves_out(tmp_path):
    draw(tmp_path / "2024_holiday" / "1.png")
    draw(tmp_path / "0_off" / "1.png", BLUE)
    found = folders.scan(tmp_path)
    assert [(p.repeats, p.caption) for p in found.pictures] == [(1, "")]
    assert reasons(found, left_out=False).keys() == {"2024_holiday"}
    assert names(reasons(found, left_out=True)["1.png"], 0)


def test_the_order_is_natural_and_always_the_same(tmp_path):
    for i, name in enumerate(("c/1.png", "10.png", "2.png", "B.png", "a2.png", "a10.png", "c/10.png", "c/9.png")):
        draw(tmp_path / name, (i, 0, 0))
    expected = ["2.png", "10.png", "a2.png", "a10.png", "B.png", "c/1.png", "c/9.png", "c/10.png"]
    assert paths(folders.scan(tmp_path)) == expected
    assert folders.scan(tmp_path) == folders.scan(tmp_path)


@pytest.mark.parametrize("name", ["кот", "猫", "قطة", "बिल्ली", "고양이", "chat été", "🐈", "a b'c\"d", "e\u0301"])
def test_names_in_any_script(tmp_path, name):
    draw(tmp_path / f"3_{name}" / f"{name}.png")
    write(tmp_path / f"3_{name}" / f"{name}.txt", name)
    (picture,) = folders.scan(tmp_path).pictures
    assert (picture.caption, picture.caption_source, picture.repeats) == (name, ".txt", 3)
    assert picture_module.open_picture(picture).size == (8, 6)


def test_accents_match_however_they_are_written(tmp_path):
    draw(tmp_path / "caf\u00e9.png")
    write(tmp_path / "cafe\u0301.txt", "a café")
    (picture,) = folders.scan(tmp_path).pictures
    assert picture.caption == "a café"


def test_a_name_that_is_not_utf8_can_be_printed(tmp_path):
    try:
        draw(tmp_path / os.fsdecode(b"3_\xff") / os.fsdecode(b"\xfe.png"))
        write(tmp_path / os.fsdecode(b"3_\xff") / "b.png", b"")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    found = folders.scan(tmp_path)
    found.describe().encode()
    found._repr_html_().encode()
    found.pictures[0].caption.encode()
    names_of = list(found.by_name)
    selection.save_decisions(selection.Decisions(keep=names_of), tmp_path / "d.json", tmp_path)
    assert selection.load_decisions(tmp_path / "d.json", tmp_path).keep == tuple(names_of)
    changes = [captions.Change(names_of[0], "", "a cat")]
    captions.write_captions(changes, tmp_path, history=tmp_path / "history.jsonl")
    assert folders.scan(tmp_path).pictures[0].caption == "a cat"


@pytest.mark.parametrize("name", ["a" * 246, "\u00e9" * 123])
def test_names_of_250_bytes(tmp_path, name):
    """A temporary name that is the file's with more added is longer than file systems allow."""
    root = tmp_path / "set"
    write(draw(root / f"{name}.png").with_suffix(".txt"), "a cat")
    found = folders.scan(root, copy=True, cache=tmp_path / "cache")
    assert [picture.caption for picture in found.pictures] == ["a cat"]
    changes = [captions.Change(f"{name}.png", "a cat", "a dog")]
    captions.write_captions(changes, root, history=tmp_path / "history.jsonl")
    assert (root / f"{name}.txt").read_text().strip() == "a dog" and len(os.listdir(root)) == 2
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as zipped:
        zipped.write(root / f"{name}.png", f"{name}.png")
    assert len(folders.scan(tmp_path / "set.zip", cache=tmp_path / "cache")) == 1


def test_a_picture_of_which_nothing_can_be_seen_is_left_out(tmp_path):
    draw(tmp_path / "a.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (8, 8), (90, 0)).save(tmp_path / "clear grey.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 1)).save(tmp_path / "b.png")
    found = folders.scan(tmp_path)
    assert paths(found) == ["a.png", "b.png"]
    assert all(names(reasons(found, True)[name], "transparent") for name in ("clear.png", "clear grey.png"))


def test_a_caption_of_100_kb_is_shown_in_short(tmp_path):
    write(draw(tmp_path / "a.png").with_suffix(".txt"), "word, " * 20_000)
    found = folders.scan(tmp_path)
    assert len(found.pictures[0].caption) > 100_000
    given = folders.scan(draw(tmp_path / "b" / "b.png").parent, caption="word, " * 20_000)
    assert len(given.describe()) < 500 and len(found._repr_html_()) < 5000
    report = audit_captions(found, trigger="cat")
    assert names(report.describe(), 40_000, 75) and len(report.describe()) < 3000
    after = found.pictures[0].caption.replace("word", "noun")[:-4] + "end"
    shown = captions.describe_changes([captions.Change("a.png", found.pictures[0].caption, after)])
    assert "noun" in shown and len(shown) < 1000
    shown = captions.describe_changes([captions.Change("a.png", "word, " * 20_000 + "a", "word, " * 20_000 + "b")])
    assert "word, a" in shown and "word, b" in shown and len(shown) < 1000  # the place of the change is shown


def test_hidden_files_and_other_systems_litter_are_passed_over(tmp_path):
    draw(tmp_path / "a.png")
    for name in ("__MACOSX/a.png", "__MACOSX/._a.png", ".ipynb_checkpoints/a.png", ".hidden.png", "._a.png"):
        draw(tmp_path / name, BLUE)
    write(tmp_path / "Thumbs.db", b"x")
    found = folders.scan(tmp_path)
    assert paths(found) == ["a.png"] and found.problems == ()


def test_nothing_is_written_into_the_folder(tmp_path):
    draw(tmp_path / "set" / "5_cat" / "a.png")
    write(tmp_path / "set" / "5_cat" / "bad.png", b"x")
    with zipfile.ZipFile(tmp_path / "set" / "more.zip", "w") as zipped:
        zipped.write(tmp_path / "set" / "5_cat" / "a.png", "a.png")

    def state():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}

    before = state()
    for picture in folders.scan(tmp_path / "set").pictures:
        picture_module.open_picture(picture)
    folders.scan(tmp_path / "set" / "more.zip", cache=tmp_path / "cache")
    assert state() == before


# Captions


@pytest.mark.parametrize("suffix", [".txt", ".caption", ".TXT"])
def test_both_caption_suffixes_are_found(tmp_path, suffix):
    draw(tmp_path / "a.JPG")
    write(tmp_path / f"a{suffix}", "a cat\n")
    (picture,) = folders.scan(tmp_path).pictures
    assert (picture.caption, picture.caption_source) == ("a cat", suffix.lower())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_caption_encodings(tmp_path, encoding):
    draw(tmp_path / "a.png")
    write(tmp_path / "a.txt", "кот, café".encode(encoding))
    found = folders.scan(tmp_path)
    assert found.pictures[0].caption == "кот, café" and found.problems == ()


def test_a_caption_that_is_not_utf8_is_read_and_reported(tmp_path):
    draw(tmp_path / "a.png")
    write(tmp_path / "a.txt", "café – été".encode("cp1252"))
    found = folders.scan(tmp_path)
    assert found.pictures[0].caption == "café – été"
    assert names(reasons(found, left_out=False)["a.txt"], "UTF-8", "'café – été'")


def test_all_lines_of_a_caption_count(tmp_path):
    draw(tmp_path / "a.png")
    write(tmp_path / "a.txt", "\r\n  a cat,\r\n\tsitting   down \n\n")
    assert folders.scan(tmp_path).pictures[0].caption == "a cat, sitting down"


def test_only_the_first_line_counts_if_asked_for(tmp_path):
    draw(tmp_path / "a.png")
    write(tmp_path / "a.txt", "\n a  cat, \r\nsitting down\n")
    assert folders.scan(tmp_path, first_line=True).pictures[0].caption == "a cat,"


def test_captions_that_differ_are_reported_and_txt_wins(tmp_path):
    for i, (txt, other) in enumerate((("one", "two"), ("same", " same "), ("", "only"))):
        draw(tmp_path / f"{i}.png", (i, 0, 0))
        write(tmp_path / f"{i}.txt", txt)
        write(tmp_path / f"{i}.caption", other)
    found = folders.scan(tmp_path)
    captions = [(picture.caption, picture.caption_source) for picture in found.pictures]
    assert captions == [("one", ".txt"), ("same", ".txt"), ("only", ".caption")]
    notes = reasons(found, left_out=False)
    assert set(notes) == {"0.caption", "2.txt"}
    assert names(notes["0.caption"], ".caption", "'two'", ".txt")
    assert names(notes["2.txt"], "'only'", ".caption")


def test_an_empty_caption_is_treated_as_missing_and_said(tmp_path):
    draw(tmp_path / "4_sks" / "a.png")
    write(tmp_path / "4_sks" / "a.txt", " \n")
    found = folders.scan(tmp_path)
    assert (found.pictures[0].caption, found.pictures[0].caption_source) == ("sks", "folder")
    assert names(reasons(found, left_out=False)["a.txt"], "'sks'", "folder")


def test_what_stands_in_for_missing_captions_is_said_by_name(tmp_path):
    write(draw(tmp_path / "a.png").with_suffix(".txt"), "a cat")
    draw(tmp_path / "3_sks" / "b.png", BLUE)
    draw(tmp_path / "c.png", (0, 1, 0))
    lines = described(folders.scan(tmp_path))
    assert line(lines, "c.png", "none")
    first = lines.index(line(lines, "3_sks/b.png", "'sks'", "folder"))
    assert names(lines[first - 1], 2)
    assert line(described(folders.scan(tmp_path, caption="thing")), "c.png", "'thing'", "given")
    (tmp_path / "a.txt").unlink()
    assert ".png" not in folders.scan(tmp_path).describe()  # where all lack one, no picture is named


def test_lost_captions_shared_stems_and_copies_are_reported(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "a.jpg", BLUE)
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    write(tmp_path / "a.txt", "shared")
    write(tmp_path / "gone.txt", "lost")
    found = folders.scan(tmp_path)
    assert [picture.caption for picture in found.pictures] == ["shared", "shared", ""]
    notes = reasons(found, left_out=False)
    assert notes.keys() == {"gone.txt", "a.png", "copy.png"}
    assert names(notes["a.png"], "a.jpg") and names(notes["copy.png"], "a.png")
    title, *listed = described(found)[-4:]
    assert reasons(found, left_out=True) == {} and names(title, 3)
    assert [text.split(":")[0].strip() for text in listed] == ["a.png", "copy.png", "gone.txt"]


# Shown


def test_a_dataset_prints_as_its_description(tmp_path):
    draw(tmp_path / "2_cat" / "1.png")
    write(tmp_path / "bad.png", b"x")
    found = folders.scan(tmp_path)
    assert str(found) == repr(found) == found.describe()
    assert found.captions == {"2_cat/1.png": "cat"} and found.by_name == {"2_cat/1.png": found.pictures[0]}


def test_a_notebook_shows_thumbnails_captions_and_problems(tmp_path, monkeypatch):
    for number in range(30):
        write(draw(tmp_path / f"{number}.png", (number, 0, 0), (300, 200)).with_suffix(".txt"), f"<b>cat {number}")
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    write(tmp_path / "bad.png", b"x")
    opened, thumbnail = [], picture_module.thumbnail.__wrapped__
    monkeypatch.setattr(gallery, "thumbnail", lambda picture: opened.append(picture) or thumbnail(picture))
    found = folders.scan(tmp_path)
    found.describe()
    assert not opened  # nothing is decoded before it is shown
    (tmp_path / "3.png").unlink()
    html = found._repr_html_()
    images = re.findall('src="data:image/jpeg;base64,([^"]+)"', html)
    assert len(images) == len(opened) == 24 and names(html, 7)  # and 7 more
    assert {Image.open(io.BytesIO(base64.b64decode(data))).size for data in images} == {(128, 85), (128, 128)}
    assert "&lt;b&gt;cat 0" in html and "<b>cat" not in html and "bad.png" in html and len(html) < 100_000


# Hugging Face's metadata


def describe(folder: Path, rows: list[dict], name: str = "metadata.jsonl") -> Path:
    """Write a metadata file."""
    if name.endswith(".csv"):
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    return write(folder / name, "\n".join(lines) + "\n")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("column", ["text", "caption"])
def test_metadata_files_give_captions(tmp_path, name, column):
    for number, file in enumerate(("a.png", "deep/кот.png", "bare.png")):
        draw(tmp_path / file, (number, 0, 0))
    rows = [{"file_name": "a.png", column: "a, cat"}, {"file_name": "deep/кот.png", column: " a\tkот "}]
    describe(tmp_path, rows, name)
    found = folders.scan(tmp_path)
    said = {p.path.name: (p.caption, p.caption_source) for p in found.pictures}
    assert said == {"a.png": ("a, cat", name), "кот.png": ("a kот", name), "bare.png": ("", "none")}
    assert found.problems == () and line(described(found), f"{name} × 2")


def test_metadata_keeps_lines_and_survives_what_is_no_text(tmp_path):
    draw(tmp_path / "a.png")
    write(tmp_path / "metadata.csv", 'file_name,text,caption\r\na.png,"a cat,\nsitting",other\r\n')
    assert folders.scan(tmp_path).pictures[0].caption == "a cat, sitting"
    (tmp_path / "metadata.csv").unlink()
    write(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": "half \\ud800 a pair"}')
    folders.scan(tmp_path).pictures[0].caption.encode()


def test_the_nearest_metadata_file_counts_and_the_other_is_reported(tmp_path):
    draw(tmp_path / "train" / "a.png")
    describe(tmp_path, [{"file_name": "train/a.png", "text": "far"}])
    describe(tmp_path / "train", [{"file_name": "a.png", "text": "near"}])
    found = folders.scan(tmp_path)
    assert found.pictures[0].caption == "near"
    assert names(reasons(found, left_out=False)["a.png"], "metadata.jsonl")


def test_a_caption_file_goes_before_metadata_and_a_conflict_is_reported(tmp_path):
    rows = []
    for number, (own, text) in enumerate((("own", "other"), ("same", "same"), ("", "described"))):
        write(draw(tmp_path / f"{number}.png", (number, 0, 0)).with_suffix(".txt"), own)
        rows.append({"file_name": f"{number}.png", "text": text})
    describe(tmp_path, rows)
    found = folders.scan(tmp_path)
    assert [p.caption for p in found.pictures] == ["own", "same", "described"]
    notes = reasons(found, left_out=False)
    assert set(notes) == {"0.png", "2.txt"} and names(notes["0.png"], "metadata.jsonl", "'other'", ".txt")


def test_metadata_that_is_wrong_is_reported_and_never_followed(tmp_path):
    draw(tmp_path / "secret.png", BLUE)
    draw(tmp_path / "set" / "a.png")
    wrong = ["gone.png", "../secret.png", str(tmp_path / "secret.png")]
    rows = [{"file_name": name, "text": "x"} for name in wrong]
    file = describe(tmp_path / "set", [*rows, {"text": "no name"}, {"file_name": "a.png", "text": "a cat"}])
    write(file, file.read_bytes() + b"[1, 2]\n")
    found = folders.scan(tmp_path / "set")
    assert [(p.path.name, p.caption) for p in found.pictures] == [("a.png", "a cat")]
    unread, *refused = [problem.reason for problem in found.problems]
    assert names(unread, 5)  # rows before the one that is no row
    assert all(names(reason, repr(name)) for reason, name in zip(refused, [*wrong, "None"], strict=True))


@pytest.mark.parametrize(
    "contents", [b"\xff\xfe\x00", b"{", b"[" * 100_000, b"a,b\n1", b"\0", b"", b'"' + b"x" * 200_000]
)
def test_metadata_that_is_nothing_of_the_kind_does_not_cost_the_pictures(tmp_path, contents):
    draw(tmp_path / "a.png")
    for name in ("metadata.jsonl", "metadata.csv"):
        write(tmp_path / name, contents)
    assert paths(folders.scan(tmp_path)) == ["a.png"]


# sd-scripts' dataset TOML

TOML = """
[general]
enable_bucket = true
caption_extension = ".caption"
shuffle_caption = true
keep_tokens = 0

[[datasets]]
resolution = 768
num_repeats = 2

  [[datasets.subsets]]
  image_dir = "cats"
  class_tokens = "sks cat"
  num_repeats = 5

  [[datasets.subsets]]
  image_dir = "../dogs"
  caption_extension = "tags"
  face_crop_aug_range = [1.0, 2.0]

  [[datasets.subsets]]
  image_dir = "reg"
  class_tokens = "cat"
  is_reg = true
"""


def write_toml(folder: Path, text: str = TOML) -> Path:
    draw(folder / "sets" / "cats" / "1.png")
    draw(folder / "sets" / "cats" / "2.png", BLUE)
    write(folder / "sets" / "cats" / "2.txt", "from txt")
    write(folder / "sets" / "cats" / "2.caption", "from caption")
    draw(folder / "sets" / "cats" / "10_more" / "1.png", (1, 1, 1))
    draw(folder / "dogs" / "1.png", (0, 9, 0))
    write(folder / "dogs" / "1.tags", "a dog")
    draw(folder / "sets" / "reg" / "1.png", (9, 9, 9))
    return write(folder / "sets" / "set.toml", text)


def test_a_dataset_toml(tmp_path):
    found = folders.scan(write_toml(tmp_path))
    assert found.root == tmp_path.resolve()
    assert [(p.group, p.path.name, p.repeats, p.caption, p.caption_source) for p in found.pictures] == [
        ("sets/cats", "1.png", 5, "sks cat", "given"),
        ("sets/cats", "2.png", 5, "from caption", ".caption"),
        ("dogs", "1.png", 2, "a dog", ".tags"),
    ]
    told = {problem.path.name: problem.reason for problem in found.problems}
    assert told.keys() == {"10_more", "2.txt", "reg", "set.toml"}
    settings = [problem.reason for problem in found.problems if problem.path.name == "set.toml"]
    assert len(settings) == 3 and line(settings, "face_crop_aug_range", "[1.0, 2.0]")
    assert line(settings, "resolution", 768) and line(settings, "shuffle_caption", "True", "shuffle_captions")
    (prior,) = folders.scan(tmp_path / "sets" / "set.toml", regularisation=True).pictures
    assert (prior.path.parent.name, prior.caption, prior.repeats) == ("reg", "cat", 2)
    assert folders.scan(tmp_path / "sets" / "set.toml", repeats=1, caption="x").pictures[0].caption == "x"


def test_a_dataset_toml_names_what_it_cannot_use(tmp_path):
    text = TOML.replace('"../dogs"', '"dosg"').replace('"cats"', '"cats"\n  metadata_file = "meta.json"')
    found = folders.scan(write_toml(tmp_path, text.replace('"reg"', '"cats/"').replace("is_reg = true", "")))
    assert len(found) == 2
    told = [f"{problem.path.name}: {problem.reason}" for problem in found.problems]
    assert [text for text in told if text.startswith("dosg: ")]
    assert [text for text in told if text.startswith("cats: ") and names(text, "set.toml")]  # named twice
    assert line(told, "metadata_file", "meta.json")


@pytest.mark.parametrize(
    "text", ["learning_rate = 1e-4", "[[datasets]]", "datasets = 3",
             "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 3",
             "[[datasets]]\n[[datasets.subsets]]", "[[datasets]]\nsubsets = 'x'", "[[datasets",
             "general = 1\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'cats'",
             "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'cats'\nnum_repeats = 'many'"]
)  # fmt: skip
def test_a_toml_that_is_no_dataset(tmp_path, text):
    with pytest.raises(ValueError, match=naming("set.toml")):
        folders.scan(write_toml(tmp_path, text))


def test_a_toml_without_usable_folders_says_why(tmp_path):
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'cast'"
    with pytest.raises(ValueError, match=naming("set.toml", "cast")) as caught:
        folders.scan(write_toml(tmp_path, text))
    assert str(caught.value).count("'cats'") == 2  # in the list of what is there, and as the nearest


# What is left out


def test_every_picture_left_out_is_named_with_a_reason(tmp_path):
    draw(tmp_path / "good.png")
    write(tmp_path / "cut_jpg.jpg", noise("JPEG")[:-400])
    write(tmp_path / "cut_png.png", noise("PNG")[:-400])
    write(tmp_path / "cut_webp.webp", noise("WEBP")[:-400])
    write(tmp_path / "empty.png", b"")
    write(tmp_path / "page.png", b"<html>not found</html>")
    write(tmp_path / "script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    write(tmp_path / "drawing.PSD", b"x")
    write(tmp_path / "drawing.txt", "its caption is not lost")
    write(tmp_path / "more.zip", b"x")
    Image.new("F", (4, 4)).save(tmp_path / "float.tiff")
    found = folders.scan(tmp_path)
    assert paths(found) == ["good.png"] and reasons(found, left_out=False) == {}
    said = reasons(found, left_out=True)
    assert set(said) == {path.name for path in tmp_path.iterdir()} - {"good.png", "drawing.txt"}
    assert all(names(said[name], "truncated") for name in ("cut_jpg.jpg", "cut_png.png"))  # what Pillow says of them
    assert said["page.png"] == said["script.png"] and len(set(said.values())) == len(said) - 1
    assert names(said["float.tiff"], "F") and names(said["empty.png"], 0)
    assert names(said["drawing.PSD"], ".PSD", "PNG", "JPEG")
    title, *listed = described(found)[-10:]
    assert names(title, 9) and line(listed, "cut_jpg.jpg", "image file is truncated")


def test_a_name_may_lie_about_the_format(tmp_path):
    draw(tmp_path / "really_png.jpg", format="PNG")
    assert paths(folders.scan(tmp_path)) == ["really_png.jpg"]


def test_too_many_pixels_or_bytes(tmp_path, monkeypatch):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png", size=(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)  # 48 pixels warn, 1600 are refused
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = folders.scan(tmp_path)
    assert paths(found) == ["a.png"] and names(reasons(found, left_out=True)["b.png"], 1600)
    monkeypatch.setattr(picture_module, "GiB", 10)
    size = (tmp_path / "a.png").stat().st_size
    with pytest.raises(ValueError, match=naming("a.png", f"{size / 10:.1f} GiB")):
        folders.scan(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links(tmp_path):
    inside = draw(tmp_path / "set" / "a.png")
    draw(tmp_path / "outside" / "secret.png", BLUE)
    (inside.parent / "within.png").symlink_to(inside)
    (inside.parent / "out.png").symlink_to("../outside/secret.png")
    (inside.parent / "out").symlink_to(tmp_path / "outside")
    (inside.parent / "up").symlink_to(inside.parent)
    (inside.parent / "broken.png").symlink_to("nowhere.png")
    (inside.parent / "loop.png").symlink_to("loop.png")
    os.mkfifo(inside.parent / "pipe.png")
    found = folders.scan(inside.parent)
    assert paths(found) == ["a.png", "out.png", "within.png"]  # a snapshot in the Hub's cache is all links
    said = reasons(found, left_out=True)
    assert set(said) == {"out", "up", "broken.png", "loop.png", "pipe.png"}
    assert names(said["out"], tmp_path / "outside")
    (tmp_path / "link").symlink_to(inside.parent)  # the folder itself may be one
    assert paths(folders.scan(tmp_path / "link")) == paths(found)


def test_a_long_list_of_problems_is_cut_short(tmp_path):
    draw(tmp_path / "good.png")
    for i in range(30):
        write(tmp_path / f"bad{i}.png", b"x")
    found = folders.scan(tmp_path)
    title, *listed, last = described(found)[-11:]
    assert len(found.problems) == 30 and names(title, 30) and names(last, 21)
    assert [text.split(":")[0].strip() for text in listed] == [f"bad{i}.png" for i in range(9)]
    assert [p.path.name for p in found.problems[:3]] == ["bad0.png", "bad1.png", "bad2.png"]


def test_a_missing_folder_says_what_is_near(tmp_path):
    draw(tmp_path / "dataset" / "a.png")
    for missing in (tmp_path / "datset", tmp_path / "data-set" / "5_cat"):
        with pytest.raises(FileNotFoundError, match=naming(missing)) as caught:
            folders.scan(missing)
        assert str(caught.value).count("'dataset'") == 2  # in the list of what is there, and as the nearest


def test_a_folder_without_pictures_says_what_it_holds(tmp_path):
    with pytest.raises(ValueError, match=naming(tmp_path)):
        folders.scan(tmp_path)
    for i in range(3):
        write(tmp_path / f"{i}.pdf", b"x")
    write(tmp_path / "bad.png", b"x")
    with pytest.raises(ValueError) as caught:
        folders.scan(tmp_path)
    first, *listed = str(caught.value).replace(str(tmp_path), "").splitlines()
    assert names(first, 4, ".pdf × 3", ".png × 1") and line(listed, "bad.png")


def test_many_pictures_show_a_bar_and_few_do_not(tmp_path, capsys):
    for i in range(201):
        draw(tmp_path / f"{i}.bmp", (i, 0, 0), (1, 1))
    assert folders.scan(tmp_path).epoch_size == 201
    assert names(capsys.readouterr().err, 201)
    (tmp_path / "0.bmp").unlink()
    folders.scan(tmp_path)
    assert capsys.readouterr().err == ""


# Pixels


def corners(mode: str = "RGB") -> Image.Image:
    """A picture that looks different however it is turned."""
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0], pixels[0, -1], pixels[-1, 0], pixels[-1, -1] = RED, BLUE, (0, 255, 0), (255, 255, 255)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "b.tiff", "c.webp"):
        corners().save(tmp_path / name, exif=exif, lossless=True)
    for picture in folders.scan(tmp_path).pictures:
        opened = picture_module.open_picture(picture)
        assert opened.size == (picture.width, picture.height) == ((4, 6) if orientation > 4 else (6, 4))
        with Image.open(picture.path) as raw:
            assert (np.asarray(opened) == np.asarray(ImageOps.exif_transpose(raw).convert("RGB"))).all()
        if orientation == 6:  # a phone held upright: the stored left edge is the top, its bottom corner on the left
            assert opened.getpixel((0, 0)) == (0, 255, 0) and opened.getpixel((3, 0)) == RED


def test_broken_exif_does_not_cost_a_picture(tmp_path):
    corners().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(folders.scan(tmp_path)) == 1


def test_transparency_lies_on_white(tmp_path):
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(255, 0, 0, 255), (0, 0, 255, 0), (0, 0, 0, 128)])
    rgba.save(tmp_path / "rgba.png")
    expected = [RED, (255, 255, 255), (127, 127, 127)]
    assert list(pixels_of(tmp_path / "rgba.png")) == expected
    grey = Image.merge("LA", [Image.frombytes("L", (2, 1), b"\x40\x40"), Image.frombytes("L", (2, 1), b"\xff\x00")])
    grey.save(tmp_path / "la.png")
    assert list(pixels_of(tmp_path / "la.png")) == [(64, 64, 64), (255, 255, 255)]

    palette = Image.frombytes("P", (3, 1), b"\x00\x01\x02")
    palette.putpalette([255, 0, 0, 0, 0, 255, 0, 0, 0])
    palette.save(tmp_path / "one.png", transparency=1)
    assert list(pixels_of(tmp_path / "one.png")) == [RED, (255, 255, 255), (0, 0, 0)]
    palette.save(tmp_path / "each.png", transparency=b"\xff\x00\x80")
    assert list(pixels_of(tmp_path / "each.png")) == expected
    palette.save(tmp_path / "opaque.png")
    assert list(pixels_of(tmp_path / "opaque.png")) == [RED, BLUE, (0, 0, 0)]
    Image.new("RGB", (1, 1), RED).save(tmp_path / "keyed.png", transparency=RED)
    assert list(pixels_of(tmp_path / "keyed.png")) == [(255, 255, 255)]


def pixels_of(path: Path) -> list[tuple[int, int, int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = picture_module.open_picture(path)
    assert opened.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(opened).reshape(-1, 3).tolist()]


def test_grey_bilevel_and_palette(tmp_path):
    Image.frombytes("L", (2, 1), b"\x00\x63").save(tmp_path / "grey.png")
    assert pixels_of(tmp_path / "grey.png") == [(0, 0, 0), (99, 99, 99)]
    Image.new("1", (1, 1), 1).save(tmp_path / "bit.png")
    assert pixels_of(tmp_path / "bit.png") == [(255, 255, 255)]


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.apng", "a.webp", "a.avif", "a.tiff", "a.jpg"])
def test_of_several_frames_the_first_is_used(tmp_path, name):
    if name == "a.avif" and ".avif" not in Image.registered_extensions():
        pytest.skip("Pillow reads AVIF since 11.3")
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, BLUE)]
    kind = {"a.jpg": "MPO", "a.apng": "PNG"}.get(name)  # phones keep a depth map or a second picture that way
    frames[0].save(tmp_path / name, kind, save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 2
    assert np.abs(np.array(pixels_of(tmp_path / name)) - RED).max() <= 2
    assert len(folders.scan(tmp_path)) == 1


@pytest.mark.parametrize("name", ["a.jpg", "a.tiff"])
def test_cmyk_is_not_inverted(tmp_path, name):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / name)  # no cyan: red
    assert abs(np.array(pixels_of(tmp_path / name)) - RED).max() <= 3
    if name == "a.jpg":
        assert b"Adobe" in (tmp_path / name).read_bytes()  # which is why its values are stored inverted


def test_lab_is_read_as_colour(tmp_path):
    Image.new("LAB", (1, 1), (138, 80 + 128, 67 + 128)).save(tmp_path / "a.tiff")  # pure red, in 255ths of L
    assert np.abs(np.array(pixels_of(tmp_path / "a.tiff")) - RED).max() <= 12


def test_16_bit_pictures_keep_their_range(tmp_path):
    grey = np.array([[0, 128 * 257, 65535, 257]], np.uint16)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(grey).save(tmp_path / name)
        assert pixels_of(tmp_path / name) == [(v, v, v) for v in (0, 128, 255, 1)]

    two_pixels = {  # as Pillow cannot write them: colour type, samples, extra chunk, what is seen
        "rgb.png": (2, (65535, 0, 128 * 257, 0, 65535, 0), b"", [(255, 0, 128), (0, 255, 0)]),
        "rgba.png": (6, (65535, 0, 0, 65535, 0, 0, 0, 128 * 257), b"", [RED, (127, 127, 127)]),
        "la.png": (4, (65535, 0, 64 * 257, 65535), b"", [(255, 255, 255), (64, 64, 64)]),
        "key.png": (0, (4660, 4661), chunk(b"tRNS", struct.pack(">H", 4660)), [(255, 255, 255), (18, 18, 18)]),
    }
    for name, (kind, samples, extra, seen) in two_pixels.items():
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, kind, 0, 0, 0))
        row = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(f">{len(samples)}H", *samples)))
        write(tmp_path / name, b"\x89PNG\r\n\x1a\n" + header + extra + row + chunk(b"IEND", b""))
        assert pixels_of(tmp_path / name) == seen


def chunk(kind: bytes, contents: bytes) -> bytes:
    return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))


def tiff(width: int, height: int, bits: int, photometric: int, samples: bytes, more: dict | None = None) -> bytes:
    """A TIFF by hand, uncompressed grey; `more` holds (type, values) by tag: 1 bytes, 3 shorts, 4 longs, 10 ratios."""
    tags = {256: (4, [width]), 257: (4, [height]), 258: (3, [bits]), 259: (3, [1]), 262: (3, [photometric]),
            273: (4, [0]), 277: (3, [1]), 278: (4, [height]), 279: (4, [len(samples)])} | (more or {})  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    for _ in range(2):  # the first time round tells where the samples begin
        entries, outside = b"", b""
        for tag, (kind, values) in sorted(tags.items()):
            raw = struct.pack(f"<{len(values)}{ {1: 'B', 3: 'H', 4: 'I', 10: 'i'}[kind] }", *values)
            count = len(values) // 2 if kind == 10 else len(values)
            place = raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack("<I", start + len(outside))
            entries += struct.pack("<HHI", tag, kind, count) + place
            outside += raw + bytes(len(raw) % 2) if len(raw) > 4 else b""
        tags[273] = (4, [start + len(outside)])
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + outside + samples


def test_tiffs_of_12_bits_and_with_white_at_0(tmp_path):
    twelve = tiff(2, 1, 12, 1, bytes([0xFF, 0xF8, 0x00]))
    assert pixels_of(write(tmp_path / "a.tif", twelve)) == [(255, 255, 255), (128, 128, 128)]
    inverted = tiff(2, 1, 16, 0, struct.pack("<2H", 65535, 0))
    assert pixels_of(write(tmp_path / "b.tif", inverted)) == [(0, 0, 0), (255, 255, 255)]


# Formats whose libraries may be missing


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_stands_upright(tmp_path, orientation):
    """A phone turns its HEIC in the container, and says so in EXIF as well: turned once."""
    pytest.importorskip("pillow_heif")
    picture_module.register_formats()  # tells Pillow of it
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = corners().resize((96, 64), Image.Resampling.NEAREST)
    large.save(tmp_path / "a.heic", quality=95, exif=exif.tobytes())
    large.save(tmp_path / "b.png", exif=exif)
    heic, png = folders.scan(tmp_path).pictures
    assert (heic.width, heic.height) == (png.width, png.height)
    seen, right = (np.asarray(picture_module.open_picture(picture)).astype(int) for picture in (heic, png))
    assert np.abs(seen - right).mean() < 2


def test_heic_by_another_name_with_transparency_and_profile(tmp_path):
    pytest.importorskip("pillow_heif")
    picture_module.register_formats()
    Image.new("RGB", (64, 64), RED).save(tmp_path / "a.heic", quality=-1, icc_profile=swapped_profile())
    (tmp_path / "a.heic").rename(tmp_path / "a.jpg")
    nearly_clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    nearly_clear.paste((255, 0, 0, 255), (48, 48, 64, 64))
    nearly_clear.save(tmp_path / "b.heic")
    profiled, clear = folders.scan(tmp_path).pictures
    assert np.abs(np.array(picture_module.open_picture(profiled).getpixel((9, 9))) - BLUE).max() <= 3
    assert picture_module.open_picture(clear).getpixel((9, 9)) == (255, 255, 255)
    assert [mask is not None for mask in folders.find_masks([profiled, clear], "alpha", tmp_path)] == [False, True]


def dng(width: int = 48, height: int = 32, orientation: int = 1) -> bytes:
    """A camera raw: red on the left half, grey on the right, in the sRGB primaries' own space."""
    bayer = np.full((height, width), 20000, np.uint16)
    bayer[:, : width // 2] = 2000
    bayer[::2, : width // 2 : 2] = 40000  # red stands in even rows and columns
    to_camera = [32406, -15372, -4986, -9689, 18758, 415, 557, -2040, 10570]
    more = {
        254: (4, [0]), 271: (1, [*b"lorakit\0"]), 272: (1, [*b"test\0"]), 274: (3, [orientation]), 33421: (3, [2, 2]),
        33422: (1, [0, 1, 1, 2]), 50706: (1, [1, 4, 0, 0]), 50708: (1, [*b"lorakit test\0"]), 50717: (4, [65535]),
        50721: (10, [part for value in to_camera for part in (value, 10000)]),
        50728: (10, [1, 1] * 3), 50778: (3, [21]),
    }  # fmt: skip
    return tiff(width, height, 16, 32803, bayer.tobytes(), more)


def test_camera_raw_is_developed(tmp_path):
    pytest.importorskip("rawpy")
    write(tmp_path / "a.dng", dng())
    write(tmp_path / "b.DNG", dng(orientation=6))
    lying, upright = folders.scan(tmp_path).pictures
    assert (lying.width, lying.height, upright.width, upright.height) == (48, 32, 32, 48)
    pixels = np.asarray(picture_module.open_picture(lying)).astype(int)
    red, grey = pixels[16, 10], pixels[16, 40]
    assert red[0] > 200 and red[1:].max() < 120 and np.ptp(grey) <= 8
    turned = np.asarray(picture_module.open_picture(upright)).astype(int)
    assert np.abs(turned - np.rot90(pixels, -1)).max() <= 2
    write(tmp_path / "cut.dng", dng()[:900])
    assert reasons(folders.scan(tmp_path), left_out=True).keys() == {"cut.dng"}


def test_the_raw_of_a_picture_is_left_out(tmp_path):
    write(draw(tmp_path / "1.jpg").with_suffix(".txt"), "a cat")
    write(tmp_path / "1.nef", dng())
    found = folders.scan(tmp_path)
    assert [(p.path.name, p.caption) for p in found.pictures] == [("1.jpg", "a cat")]
    assert reasons(found, left_out=True).keys() == {"1.nef"}
    assert names(reasons(found, left_out=True)["1.nef"], "1.jpg")


def test_a_missing_library_is_named_for_each_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "rawpy", None)
    monkeypatch.setattr(Image, "OPEN", {name: way for name, way in Image.OPEN.items() if name not in ("HEIF", "AVIF")})
    for name, brand in (("a.heic", b"heic"), ("b.jpg", b"mif1"), ("c.avif", b"avif")):
        write(tmp_path / name, b"\0\0\0\x18ftyp" + brand + bytes(40))
    write(tmp_path / "d.dng", dng())
    draw(tmp_path / "good.png")
    said = reasons(folders.scan(tmp_path), left_out=True)
    assert names(said["a.heic"], "pillow-heif") and names(said["b.jpg"], "pillow-heif")
    assert names(said["c.avif"], "pillow>=11.3") and names(said["d.dng"], "rawpy")
    picture_module.register_formats.cache_clear()


# Colour profiles


def swapped_profile() -> bytes:
    """The ICC profile of a strange screen: sRGB with red and blue exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    return profile.replace(b"rXYZ", b"temp", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"temp", b"bXYZ", 1)


def test_colour_profiles_are_followed(tmp_path):
    profile = swapped_profile()
    Image.new("RGB", (1, 1), RED).save(tmp_path / "rgb.png", icc_profile=profile)
    assert np.abs(np.array(pixels_of(tmp_path / "rgb.png")) - BLUE).max() <= 2
    Image.new("RGBA", (1, 1), (*RED, 0)).save(tmp_path / "clear.png", icc_profile=profile)
    assert pixels_of(tmp_path / "clear.png") == [(255, 255, 255)]  # white after the profile, not through it
    Image.new("L", (1, 1), 100).save(tmp_path / "grey.png", icc_profile=profile)
    assert np.abs(np.array(pixels_of(tmp_path / "grey.png")) - 100).max() <= 2
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (1, 1), (12, 34, 56)).save(tmp_path / "srgb.png", icc_profile=srgb)
    assert pixels_of(tmp_path / "srgb.png") == [(12, 34, 56)]


def profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile by hand."""
    table, contents, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += struct.pack(">4sII", name, start + len(contents), len(value))
        contents += value + bytes(-len(value) % 4)
    white = struct.pack(">3i", 63190, 65536, 54061)  # D50
    facts = (start + len(contents), b"", 0x02400000, b"scnr", space, connection, b"acsp")
    header = struct.pack(">I4sI4s4s4s12x4s28x", *facts)
    return header + white + bytes(48) + struct.pack(">I", len(tags)) + table + contents


def test_grey_has_profiles_too(tmp_path):
    linear = profile(b"GRAY", b"XYZ ", {b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061),
                                       b"kTRC": b"curv" + bytes(8)})  # fmt: skip
    Image.new("L", (1, 1), 128).save(tmp_path / "grey.png", icc_profile=linear)
    Image.new("LA", (1, 1), (128, 255)).save(tmp_path / "clear.png", icc_profile=linear)
    Image.fromarray(np.array([[128 * 257]], np.uint16)).save(tmp_path / "deep.png", icc_profile=linear)
    for name in ("grey.png", "clear.png", "deep.png"):  # half of the light is 188 in sRGB
        assert np.abs(np.array(pixels_of(tmp_path / name)) - 188).max() <= 1


@pytest.mark.parametrize("name", ["a.jpg", "a.tiff"])
def test_cmyk_goes_through_its_profile(tmp_path, name):
    """On this press, cyan ink is green; without the profile it would be cyan."""
    paper, green = bytes([255, 128, 128]), bytes([225, 42, 211])  # Lab, as ICC counts it in bytes
    corners_of_ink = b"".join(green if ink & 8 else paper for ink in range(16))
    straight = bytes(range(256))
    table = struct.pack(">4s4xBBBx9i", b"mft1", 4, 3, 2, *(65536 * v for v in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    press = profile(b"CMYK", b"Lab ", {b"A2B0": table + straight * 4 + corners_of_ink + straight * 3})
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / name, icc_profile=press)
    red, green, blue = pixels_of(tmp_path / name)[40]
    assert green > 240 and red < 60 and blue < 60
    Image.new("CMYK", (16, 16), (0, 0, 0, 0)).save(tmp_path / name, icc_profile=press)
    assert min(pixels_of(tmp_path / name)[40]) >= 253


def test_palettes_and_lab_go_through_profiles(tmp_path):
    palette = Image.frombytes("P", (2, 1), b"\x00\x01")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "a.png", icc_profile=swapped_profile(), transparency=1)
    seen = pixels_of(tmp_path / "a.png")
    assert np.abs(np.array(seen[0]) - BLUE).max() <= 2 and seen[1] == (255, 255, 255)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.new("LAB", (1, 1), (138, 80 + 128, 67 + 128)).save(tmp_path / "lab.tiff", icc_profile=lab)
    assert np.abs(np.array(pixels_of(tmp_path / "lab.tiff")) - RED).max() <= 12


def test_broken_and_wrong_profiles_are_passed_over(tmp_path):
    Image.new("RGB", (1, 1), RED).save(tmp_path / "broken.png", icc_profile=b"no profile at all")
    assert pixels_of(tmp_path / "broken.png") == [RED]
    Image.new("CMYK", (1, 1), (0, 255, 255, 0)).save(tmp_path / "wrong.tiff", icc_profile=swapped_profile())
    assert pixels_of(tmp_path / "wrong.tiff") == [RED]


def test_a_picture_that_changed_after_the_scan_is_noticed(tmp_path):
    path = draw(tmp_path / "a.png")
    (picture,) = folders.scan(tmp_path).pictures
    draw(path, BLUE)
    with pytest.raises(ValueError, match=naming("a.png", "fresh")):
        picture_module.open_picture(picture)
    assert picture_module.open_picture(path).getpixel((0, 0)) == BLUE
    write(path, b"x")
    with pytest.raises(ValueError, match=naming("a.png")):
        picture_module.open_picture(path)


# The index


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of files that scans decode; the young ones count as old."""
    seen, load = [], folders.measure
    monkeypatch.setattr(folders, "measure", lambda file: seen.append(file.name) or load(file))
    monkeypatch.setattr(index, "RECENT", -(10**12))
    return seen


def test_a_second_scan_reads_only_what_is_new_or_changed(tmp_path, decoded):
    folder, cache = tmp_path / "set", tmp_path / "cache"
    for number in range(4):
        draw(folder / f"{number}.png", (number, 0, 0))
    first = folders.scan(folder, cache=cache)
    assert sorted(decoded) == ["0.png", "1.png", "2.png", "3.png"]
    decoded.clear()
    assert folders.scan(folder, cache=cache) == first and decoded == []
    draw(folder / "1.png", BLUE, (6, 8))
    draw(folder / "new.png", BLUE, (8, 7))
    (folder / "2.png").unlink()
    write(folder / "0.txt", "a caption is always read")
    second = folders.scan(folder, cache=cache)
    assert sorted(decoded) == ["1.png", "new.png"]
    heights = {p.path.name: p.height for p in second.pictures}
    assert heights == {"0.png": 6, "1.png": 8, "3.png": 6, "new.png": 7}
    assert second.pictures[0].caption == "a caption is always read"
    assert second == folders.scan(folder, cache=tmp_path / "other cache")


def test_a_change_that_keeps_size_and_time_is_read_again(tmp_path, decoded):
    file = draw(tmp_path / "set" / "a.bmp")
    before = file.stat()
    (first,) = folders.scan(tmp_path / "set", cache=tmp_path / "cache").pictures
    draw(file, BLUE)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and file.stat().st_mtime_ns == before.st_mtime_ns
    if os.name != "nt":  # which does not tell when a file was touched
        (second,) = folders.scan(tmp_path / "set", cache=tmp_path / "cache").pictures
        assert second.digest == hashlib.sha256(file.read_bytes()).hexdigest() != first.digest
    (third,) = folders.scan(tmp_path / "set", cache=tmp_path / "cache", fresh=True).pictures
    assert picture_module.open_picture(third).getpixel((0, 0)) == BLUE
    with pytest.raises(ValueError, match=naming("a.bmp", "fresh")):
        picture_module.open_picture(first)


def test_files_that_just_changed_are_not_trusted(tmp_path, decoded, monkeypatch):
    monkeypatch.setattr(index, "RECENT", 10**12)
    draw(tmp_path / "set" / "a.png")
    for _ in range(2):
        folders.scan(tmp_path / "set", cache=tmp_path / "cache")
    assert decoded == ["a.png"] * 2


def test_a_damaged_index_is_only_slower(tmp_path, decoded):
    folder, cache = tmp_path / "set", tmp_path / "cache"
    for number in range(3):
        draw(folder / f"{number}.png", (number, 0, 0))
    first = folders.scan(folder, cache=cache)
    (store,) = (cache / "index").iterdir()
    whole = store.read_bytes()
    for damaged in (whole[:-20], whole.replace(b"[8, 6", b"[9, 6"), b"", b"\xff", b"x\n{}", whole + b"x"):
        store.write_bytes(damaged)
        decoded.clear()
        assert folders.scan(folder, cache=cache) == first and len(decoded) == 3
        assert store.read_bytes() == whole  # mended
    store.unlink()
    store.mkdir()  # cannot be written
    assert folders.scan(folder, cache=cache) == first


def test_pictures_left_out_are_looked_at_again(tmp_path, decoded):
    draw(tmp_path / "set" / "a.png")
    write(tmp_path / "set" / "bad.png", b"x")
    for _ in range(2):
        found = folders.scan(tmp_path / "set", cache=tmp_path / "cache")
        assert paths(found) == ["a.png"] and reasons(found, left_out=True).keys() == {"bad.png"}
    assert sorted(decoded) == ["a.png", "bad.png", "bad.png"]


def test_what_was_read_before_an_interrupt_is_kept(tmp_path, decoded, monkeypatch):
    for number in range(20):
        draw(tmp_path / "set" / f"{number}.png", (number, 0, 0))
    measure = folders.measure

    def interrupted(file):
        if file.name == "15.png":
            raise KeyboardInterrupt
        return measure(file)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folders.scan(tmp_path / "set", cache=tmp_path / "cache")
    decoded.clear()
    assert len(folders.scan(tmp_path / "set", cache=tmp_path / "cache")) == 20
    assert set(decoded) == {f"{number}.png" for number in range(15, 20)}
