"""The dataset: every picture right, every one left out named, and nothing written where the user's files are."""

import errno
import hashlib
import io
import os
import stat
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from lorakit import dataset

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


def names(found: dataset.Dataset) -> list[str]:
    return [picture.path.relative_to(found.root).as_posix() for picture in found.pictures]


def reasons(found: dataset.Dataset, left_out: bool) -> dict[str, str]:
    return {problem.path.name: problem.reason for problem in found.problems if problem.left_out is left_out}


# Folders


def test_kohyas_tree(tmp_path):
    cat = draw(tmp_path / "5_sks cat" / "1.png")
    write(cat.with_suffix(".txt"), "a photo of sks cat")
    draw(tmp_path / "5_sks cat" / "2.jpg", BLUE, (10, 20))
    draw(tmp_path / "2_a_dog" / "deep" / "1.webp", BLUE)
    found = dataset.scan(tmp_path)
    assert names(found) == ["2_a_dog/deep/1.webp", "5_sks cat/1.png", "5_sks cat/2.jpg"]
    assert [p.repeats for p in found.pictures] == [2, 5, 5]
    assert [p.group for p in found.pictures] == ["2_a_dog/deep", "5_sks cat", "5_sks cat"]
    assert [p.caption for p in found.pictures] == ["a_dog", "a photo of sks cat", "sks cat"]
    assert [p.caption_source for p in found.pictures] == ["folder", ".txt", "folder"]
    assert (found.pictures[2].width, found.pictures[2].height) == (10, 20)
    assert found.pictures[1].digest == hashlib.sha256(cat.read_bytes()).hexdigest()
    assert found.problems == () and len(found) == 3 and found.epoch_size == 12
    text = found.describe()
    assert text.startswith("3 pictures = 12 per epoch")
    assert "5_sks cat: 2 × 5" in text and "folder 'sks cat' × 1" in text and ".txt × 1" in text


def test_a_flat_folder_and_one_that_is_named_with_repeats(tmp_path):
    draw(tmp_path / "flat" / "a.png")
    draw(tmp_path / "10_sks" / "a.png")
    (flat,) = dataset.scan(tmp_path / "flat").pictures
    assert (flat.repeats, flat.caption, flat.caption_source, flat.group) == (1, "", "none", "")
    assert "none × 1" in dataset.scan(tmp_path / "flat").describe()
    (named,) = dataset.scan(str(tmp_path / "10_sks")).pictures
    assert (named.repeats, named.caption, named.caption_source, named.group) == (10, "sks", "folder", "")
    assert dataset.scan(tmp_path / "10_sks").describe().startswith("1 picture × 10 repeats = 10 per epoch")


def test_arguments_stand_in_for_folder_names(tmp_path):
    draw(tmp_path / "5_cat" / "1.png")
    write(draw(tmp_path / "5_cat" / "2.png", BLUE).with_suffix(".txt"), "own")
    found = dataset.scan(tmp_path, repeats=3, caption=" sks\n style ")
    assert [(p.caption, p.caption_source) for p in found.pictures] == [("sks style", "given"), ("own", ".txt")]
    assert found.epoch_size == 6
    with pytest.raises(ValueError, match="repeats=0"):
        dataset.scan(tmp_path, repeats=0)


def test_a_date_is_no_number_of_repeats_and_0_leaves_out(tmp_path):
    draw(tmp_path / "2024_holiday" / "1.png")
    draw(tmp_path / "0_off" / "1.png", BLUE)
    found = dataset.scan(tmp_path)
    assert [(p.repeats, p.caption) for p in found.pictures] == [(1, "")]
    assert "read as a date" in reasons(found, left_out=False)["2024_holiday"]
    assert "0 repeats" in reasons(found, left_out=True)["1.png"]


def test_the_order_is_natural_and_always_the_same(tmp_path):
    for i, name in enumerate(("c/1.png", "10.png", "2.png", "B.png", "a2.png", "a10.png", "c/10.png", "c/9.png")):
        draw(tmp_path / name, (i, 0, 0))
    expected = ["2.png", "10.png", "a2.png", "a10.png", "B.png", "c/1.png", "c/9.png", "c/10.png"]
    assert names(dataset.scan(tmp_path)) == expected
    assert dataset.scan(tmp_path) == dataset.scan(tmp_path)


@pytest.mark.parametrize("name", ["кот", "猫", "قطة", "बिल्ली", "고양이", "chat été", "🐈", "a b'c\"d", "e\u0301"])
def test_names_in_any_script(tmp_path, name):
    draw(tmp_path / f"3_{name}" / f"{name}.png")
    write(tmp_path / f"3_{name}" / f"{name}.txt", name)
    (picture,) = dataset.scan(tmp_path).pictures
    assert (picture.caption, picture.caption_source, picture.repeats) == (name, ".txt", 3)
    assert dataset.open_picture(picture).size == (8, 6)


def test_accents_match_however_they_are_written(tmp_path):
    draw(tmp_path / "caf\u00e9.png")
    write(tmp_path / "cafe\u0301.txt", "a café")
    (picture,) = dataset.scan(tmp_path).pictures
    assert picture.caption == "a café"


def test_a_name_that_is_not_utf8_can_be_printed(tmp_path):
    try:
        draw(tmp_path / os.fsdecode(b"3_\xff") / os.fsdecode(b"\xfe.png"))
        write(tmp_path / os.fsdecode(b"3_\xff") / "b.png", b"")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    found = dataset.scan(tmp_path)
    found.describe().encode()
    found.pictures[0].caption.encode()


def test_hidden_files_and_other_systems_litter_are_passed_over(tmp_path):
    draw(tmp_path / "a.png")
    for name in ("__MACOSX/a.png", "__MACOSX/._a.png", ".ipynb_checkpoints/a.png", ".hidden.png", "._a.png"):
        draw(tmp_path / name, BLUE)
    write(tmp_path / "Thumbs.db", b"x")
    found = dataset.scan(tmp_path)
    assert names(found) == ["a.png"] and found.problems == ()


def test_nothing_is_written_into_the_folder(tmp_path):
    draw(tmp_path / "set" / "5_cat" / "a.png")
    write(tmp_path / "set" / "5_cat" / "bad.png", b"x")
    with zipfile.ZipFile(tmp_path / "set" / "more.zip", "w") as zipped:
        zipped.write(tmp_path / "set" / "5_cat" / "a.png", "a.png")

    def state():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}

    before = state()
    for picture in dataset.scan(tmp_path / "set").pictures:
        dataset.open_picture(picture)
    dataset.scan(tmp_path / "set" / "more.zip", cache=tmp_path / "cache")
    assert state() == before


# Captions


@pytest.mark.parametrize("suffix", [".txt", ".caption", ".TXT"])
def test_both_caption_suffixes_are_found(tmp_path, suffix):
    draw(tmp_path / "a.JPG")
    write(tmp_path / f"a{suffix}", "a cat\n")
    (picture,) = dataset.scan(tmp_path).pictures
    assert (picture.caption, picture.caption_source) == ("a cat", suffix.lower())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_caption_encodings(tmp_path, encoding):
    draw(tmp_path / "a.png")
    write(tmp_path / "a.txt", "кот, café".encode(encoding))
    found = dataset.scan(tmp_path)
    assert found.pictures[0].caption == "кот, café" and found.problems == ()


def test_a_caption_that_is_not_utf8_is_read_and_reported(tmp_path):
    draw(tmp_path / "a.png")
    write(tmp_path / "a.txt", "café – été".encode("cp1252"))
    found = dataset.scan(tmp_path)
    assert found.pictures[0].caption == "café – été"
    assert "not UTF-8" in reasons(found, left_out=False)["a.txt"]


def test_all_lines_of_a_caption_count(tmp_path):
    draw(tmp_path / "a.png")
    write(tmp_path / "a.txt", "\r\n  a cat,\r\n\tsitting   down \n\n")
    assert dataset.scan(tmp_path).pictures[0].caption == "a cat, sitting down"


def test_captions_that_differ_are_reported_and_txt_wins(tmp_path):
    for i, (txt, other) in enumerate((("one", "two"), ("same", " same "), ("", "only"))):
        draw(tmp_path / f"{i}.png", (i, 0, 0))
        write(tmp_path / f"{i}.txt", txt)
        write(tmp_path / f"{i}.caption", other)
    found = dataset.scan(tmp_path)
    captions = [(picture.caption, picture.caption_source) for picture in found.pictures]
    assert captions == [("one", ".txt"), ("same", ".txt"), ("only", ".caption")]
    notes = reasons(found, left_out=False)
    assert set(notes) == {"0.caption", "2.txt"} and ".txt file, which is used" in notes["0.caption"]


def test_an_empty_caption_is_treated_as_missing_and_said(tmp_path):
    draw(tmp_path / "4_sks" / "a.png")
    write(tmp_path / "4_sks" / "a.txt", " \n")
    found = dataset.scan(tmp_path)
    assert (found.pictures[0].caption, found.pictures[0].caption_source) == ("sks", "folder")
    assert "empty caption" in reasons(found, left_out=False)["a.txt"]


def test_lost_captions_shared_stems_and_copies_are_reported(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "a.jpg", BLUE)
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    write(tmp_path / "a.txt", "shared")
    write(tmp_path / "gone.txt", "lost")
    found = dataset.scan(tmp_path)
    assert [picture.caption for picture in found.pictures] == ["shared", "shared", ""]
    notes = reasons(found, left_out=False)
    assert "without a picture" in notes["gone.txt"]
    assert "a.jpg" in notes["a.png"] and "same picture as a.png" in notes["copy.png"]
    assert reasons(found, left_out=True) == {} and "3 to look at:" in found.describe()


# What is left out


def test_every_picture_left_out_is_named_with_a_reason(tmp_path):
    draw(tmp_path / "good.png")
    write(tmp_path / "cut_jpg.jpg", noise("JPEG")[:-400])
    write(tmp_path / "cut_png.png", noise("PNG")[:-400])
    write(tmp_path / "cut_webp.webp", noise("WEBP")[:-400])
    write(tmp_path / "empty.png", b"")
    write(tmp_path / "page.png", b"<html>not found</html>")
    write(tmp_path / "script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    write(tmp_path / "phone.HEIC", b"x")
    write(tmp_path / "phone.txt", "its caption is not lost")
    write(tmp_path / "camera.nef", b"x")
    Image.new("F", (4, 4)).save(tmp_path / "float.tiff")
    found = dataset.scan(tmp_path)
    assert names(found) == ["good.png"] and reasons(found, left_out=False) == {}
    said = reasons(found, left_out=True)
    assert set(said) == {path.name for path in tmp_path.iterdir()} - {"good.png", "phone.txt"}
    assert all(
        "cannot be decoded" in said[name] for name in ("cut_jpg.jpg", "cut_png.png", "cut_webp.webp", "float.tiff")
    )
    assert "0 bytes" in said["empty.png"]
    assert all("not a picture" in said[name] for name in ("page.png", "script.png"))
    assert ".HEIC files are not read: save it as PNG or JPEG" in said["phone.HEIC"]
    assert (
        "9 left out:" in found.describe()
        and "  cut_jpg.jpg: cannot be decoded (image file is trunc" in found.describe()
    )


def test_a_name_may_lie_about_the_format(tmp_path):
    draw(tmp_path / "really_png.jpg", format="PNG")
    assert names(dataset.scan(tmp_path)) == ["really_png.jpg"]


def test_too_many_pixels_or_bytes(tmp_path, monkeypatch):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png", size=(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)  # 48 pixels warn, 1600 are refused
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = dataset.scan(tmp_path)
    assert names(found) == ["a.png"] and "too many pixels" in reasons(found, left_out=True)["b.png"]
    monkeypatch.setattr(dataset, "GiB", 10)
    with pytest.raises(ValueError, match="too large for a picture"):
        dataset.scan(tmp_path)


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
    found = dataset.scan(inside.parent)
    assert names(found) == ["a.png", "within.png"]
    said = reasons(found, left_out=True)
    assert set(said) == {"out.png", "out", "up", "broken.png", "loop.png", "pipe.png"}
    assert all("out of the folder" in said[name] for name in ("out", "out.png"))
    (tmp_path / "link").symlink_to(inside.parent)  # the folder itself may be one
    assert names(dataset.scan(tmp_path / "link")) == names(found)


def test_a_long_list_of_problems_is_cut_short(tmp_path):
    draw(tmp_path / "good.png")
    for i in range(30):
        write(tmp_path / f"bad{i}.png", b"x")
    found = dataset.scan(tmp_path)
    assert len(found.problems) == 30 and "… and 21 more" in found.describe()
    assert [p.path.name for p in found.problems[:3]] == ["bad0.png", "bad1.png", "bad2.png"]


def test_a_missing_folder_says_what_is_near(tmp_path):
    draw(tmp_path / "dataset" / "a.png")
    with pytest.raises(FileNotFoundError, match=r"datset.* does not exist.*holds 'dataset'\. Did you mean 'dataset'\?"):
        dataset.scan(tmp_path / "datset")
    with pytest.raises(FileNotFoundError, match="Did you mean 'dataset'"):
        dataset.scan(tmp_path / "data-set" / "5_cat")


def test_a_folder_without_pictures_says_what_it_holds(tmp_path):
    with pytest.raises(ValueError, match="no picture to train on; it holds no files"):
        dataset.scan(tmp_path)
    for i in range(3):
        write(tmp_path / f"{i}.pdf", b"x")
    write(tmp_path / "bad.png", b"x")
    with pytest.raises(ValueError, match=r"holds 4 files \(\.pdf × 3, \.png × 1\)\.\n  bad\.png: not a picture"):
        dataset.scan(tmp_path)


def test_many_pictures_show_a_bar_and_few_do_not(tmp_path, capsys):
    for i in range(201):
        draw(tmp_path / f"{i}.bmp", (i, 0, 0), (1, 1))
    assert dataset.scan(tmp_path).epoch_size == 201
    assert "reading" in capsys.readouterr().err
    (tmp_path / "0.bmp").unlink()
    dataset.scan(tmp_path)
    assert capsys.readouterr().err == ""


# Zips


def pack(path: Path, members: dict) -> Path:
    """Write a zip; names may be strings or ZipInfo, contents bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, contents in members.items():
            zipped.writestr(name, contents)
    return path


def linked(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


def test_a_zip_reads_like_its_folder(tmp_path):
    draw(tmp_path / "set" / "5_cat" / "1.png")
    write(tmp_path / "set" / "5_cat" / "1.txt", "a cat")
    draw(tmp_path / "set" / "3_dog" / "1.png", BLUE)
    files = [path for path in (tmp_path / "set").rglob("*") if path.is_file()]
    members = {path.relative_to(tmp_path / "set").as_posix(): path.read_bytes() for path in files}
    litter = {"./3_dog/./2.png": noise("PNG"), "__MACOSX/5_cat/._1.png": b"x", "5_cat/.DS_Store": b"x", "5_cat/": b""}
    archive = pack(tmp_path / "set.zip", {**members, **litter})
    write(tmp_path / "set" / "3_dog" / "2.png", noise("PNG"))
    folder, zipped = dataset.scan(tmp_path / "set"), dataset.scan(archive, cache=tmp_path / "cache")
    assert names(zipped) == names(folder) and zipped.problems == ()
    assert [(p.caption, p.repeats, p.digest) for p in zipped.pictures] == [
        (p.caption, p.repeats, p.digest) for p in folder.pictures
    ]
    assert zipped.root.is_relative_to(tmp_path / "cache") and zipped.root.name == "set"

    before = {path: path.stat().st_mtime_ns for path in zipped.root.rglob("*")}
    assert dataset.scan(archive, cache=tmp_path / "cache") == zipped
    assert {path: path.stat().st_mtime_ns for path in zipped.root.rglob("*")} == before  # nothing unpacked again
    zipped.pictures[0].path.unlink()
    assert dataset.scan(archive, cache=tmp_path / "cache") == zipped  # but what is gone comes back
    write(tmp_path / "new.txt", "x")
    with zipfile.ZipFile(archive, "a") as more:
        more.write(draw(tmp_path / "new.png", (0, 9, 0)), "new.png")
    assert len(dataset.scan(archive, cache=tmp_path / "cache")) == 4


def test_a_zip_is_unpacked_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archive = pack(tmp_path / "7_sks.zip", {"a.png": draw(tmp_path / "a.png").read_bytes()})
    found = dataset.scan(archive)
    assert found.root.is_relative_to(tmp_path / "cache" / "lorakit")
    assert (found.pictures[0].repeats, found.pictures[0].caption) == (7, "sks")


@pytest.mark.parametrize(
    "name",
    ["../evil.png", "5_cat/../../evil.png", "/evil.png", "..\\evil.png", "C:\\evil.png", "C:evil.png", "\\\\h\\e.png"],
)
def test_a_member_that_would_land_outside_is_refused(tmp_path, name):
    picture = draw(tmp_path / "a.png").read_bytes()
    archive = pack(tmp_path / "set.zip", {"good.png": picture, name: picture})
    found = dataset.scan(archive, cache=tmp_path / "cache" / "deep")
    assert names(found) == ["good.png"]
    assert [p.reason.startswith(f"{name!r} would land outside") for p in found.problems] == [True]
    pictures = [path for path in tmp_path.rglob("*.png") if path != tmp_path / "a.png"]
    assert pictures == [found.pictures[0].path]


def test_links_and_encrypted_and_broken_members_are_refused(tmp_path):
    picture = draw(tmp_path / "a.png").read_bytes()
    archive = pack(
        tmp_path / "set.zip",
        {"good.png": picture, linked("link.png"): "/etc/passwd", "secret.png": picture, "crc.png": b"0123456789abcdef"},
    )
    raw = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as zipped:
        data_at = zipped.getinfo("crc.png").header_offset + 30 + len("crc.png")
        central = raw.index(b"PK\x01\x02")
    raw[data_at + 4] ^= 1
    entry = raw.index(b"secret.png", central) - 46
    raw[entry + 8] |= 1  # the flag of an encrypted member
    archive.write_bytes(raw)
    found = dataset.scan(archive, cache=tmp_path / "cache")
    assert names(found) == ["good.png"]
    said = "\n".join(problem.reason for problem in found.problems)
    assert (
        "'link.png' is a link" in said and "'secret.png' is encrypted" in said and "'crc.png' cannot be unpack" in said
    )
    assert not any(path.is_symlink() for path in (tmp_path / "cache").rglob("*"))


def test_zip_bombs_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "GiB", 400_000)  # so that a small bomb will do
    picture = draw(tmp_path / "a.png").read_bytes()
    archive = pack(tmp_path / "one.zip", {"good.png": picture, "bomb.txt": bytes(200_000)})
    found = dataset.scan(archive, cache=tmp_path / "cache")
    assert names(found) == ["good.png"] and "'bomb.txt' would grow to 0.5 GiB" in found.problems[0].reason
    archive = pack(tmp_path / "many.zip", {"good.png": picture, **{f"{i}.txt": bytes(99_000 + i) for i in range(9)}})
    with pytest.raises(ValueError, match="many.zip would unpack to 2.2 GiB.*zip bomb.*'8.txt'"):
        dataset.scan(archive, cache=tmp_path / "many")
    assert not (tmp_path / "many").exists()


def test_a_full_disk_says_where_and_leaves_no_half_file(tmp_path, monkeypatch):
    archive = pack(tmp_path / "set.zip", {"a.png": draw(tmp_path / "a.png").read_bytes()})

    def full(source, sink):
        sink.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dataset.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="no room in .*cache: free 0.0 GiB there, or give another cache folder"):
        dataset.scan(archive, cache=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_file_that_is_no_zip(tmp_path):
    picture = draw(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png is neither a folder nor a sound zip.*give the folder"):
        dataset.scan(picture)
    archive = pack(tmp_path / "set.zip", {"a.png": picture.read_bytes()})
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(ValueError, match="neither a folder nor a sound zip"):
        dataset.scan(archive, cache=tmp_path / "cache")


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
    for picture in dataset.scan(tmp_path).pictures:
        opened = dataset.open_picture(picture)
        assert opened.size == (picture.width, picture.height) == ((4, 6) if orientation > 4 else (6, 4))
        with Image.open(picture.path) as raw:
            assert (np.asarray(opened) == np.asarray(ImageOps.exif_transpose(raw).convert("RGB"))).all()
        if orientation == 6:  # a phone held upright: the stored left edge is the top, its bottom corner on the left
            assert opened.getpixel((0, 0)) == (0, 255, 0) and opened.getpixel((3, 0)) == RED


def test_broken_exif_does_not_cost_a_picture(tmp_path):
    corners().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(dataset.scan(tmp_path)) == 1


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
        opened = dataset.open_picture(path)
    assert opened.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(opened).reshape(-1, 3).tolist()]


def test_grey_bilevel_and_animated(tmp_path):
    Image.frombytes("L", (2, 1), b"\x00\x63").save(tmp_path / "grey.png")
    assert pixels_of(tmp_path / "grey.png") == [(0, 0, 0), (99, 99, 99)]
    Image.new("1", (1, 1), 1).save(tmp_path / "bit.png")
    assert pixels_of(tmp_path / "bit.png") == [(255, 255, 255)]
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert set(pixels_of(tmp_path / "a.gif")) == {RED}


@pytest.mark.parametrize("name", ["a.jpg", "a.tiff"])
def test_cmyk_is_not_inverted(tmp_path, name):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / name)  # no cyan: red
    assert abs(np.array(pixels_of(tmp_path / name)) - RED).max() <= 3


def test_16_bit_pictures_keep_their_range(tmp_path):
    grey = np.array([[0, 128 * 257, 65535, 257]], np.uint16)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(grey).save(tmp_path / name)
        assert pixels_of(tmp_path / name) == [(v, v, v) for v in (0, 128, 255, 1)]

    def chunk(kind: bytes, contents: bytes) -> bytes:
        return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))

    row = b"\0" + struct.pack(
        ">6H", 65535, 0, 128 * 257, 0, 65535, 0
    )  # two pixels of 16-bit RGB, as Pillow cannot write
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert pixels_of(write(tmp_path / "rgb.png", png)) == [(255, 0, 128), (0, 255, 0)]


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


def test_broken_and_wrong_profiles_are_passed_over(tmp_path):
    Image.new("RGB", (1, 1), RED).save(tmp_path / "broken.png", icc_profile=b"no profile at all")
    assert pixels_of(tmp_path / "broken.png") == [RED]
    Image.new("CMYK", (1, 1), (0, 255, 255, 0)).save(tmp_path / "wrong.tiff", icc_profile=swapped_profile())
    assert pixels_of(tmp_path / "wrong.tiff") == [RED]


def test_a_picture_that_changed_after_the_scan_is_noticed(tmp_path):
    path = draw(tmp_path / "a.png")
    (picture,) = dataset.scan(tmp_path).pictures
    draw(path, BLUE)
    with pytest.raises(ValueError, match="changed since it was scanned: scan again"):
        dataset.open_picture(picture)
    assert dataset.open_picture(path).getpixel((0, 0)) == BLUE
    write(path, b"x")
    with pytest.raises(ValueError, match=r"a\.png: not a picture"):
        dataset.open_picture(path)
