"""A folder or zip → pictures with captions, and every problem met on the way. Nothing is written into the folder.

Reads kohya's tree (`5_name/` holds pictures to show 5 times per epoch), one flat folder, nested folders, and a `.zip`
of any of these. A caption is the `.txt` or `.caption` file beside the picture that has the same stem.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import io
import os
import re
import shutil
import stat
import tempfile
import unicodedata
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
from PIL import Image, ImageCms
from tqdm.auto import tqdm

CAPTIONS = (".txt", ".caption")  # where both say something, the first is used
PICTURES = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
FOREIGN = {".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".xcf", ".kra", ".eps", ".exr", ".hdr", ".tga"}
FOREIGN |= {".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"}  # camera raw
# Only these decoders see people's files: Pillow has dozens, and one of them starts Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
REPEATS = re.compile(r"(\d{1,3})_(.*)")  # more digits are a date: nobody means 2024_holiday 2024 times
FLIPS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
UPRIGHT = {2 + i: Image.Transpose[name] for i, name in enumerate(FLIPS.split())}  # by EXIF orientation
GiB = 2**30


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str  # what the text encoder will see, "" if nothing
    caption_source: str  # ".txt", ".caption", "given" (to scan), "folder" (its name) or "none"
    repeats: int  # times per epoch
    width: int  # pixels, as open_picture returns it
    height: int
    digest: str  # SHA-256 of the file, in hex
    group: str  # its folder relative to the root, "5_cat"; "" for the root itself


@dataclass(frozen=True)
class Mask:
    """What of a picture is trained on: white where it is, black where not."""

    path: Path
    digest: str  # SHA-256 of the file, in hex
    alpha: bool  # the file is the picture itself, and its transparency the mask


@dataclass(frozen=True)
class Problem:
    path: Path
    reason: str  # what is wrong, and what to do
    left_out: bool = True  # False: nothing is missing because of it, but a person should look


@dataclass(frozen=True)
class Dataset:
    root: Path
    pictures: tuple[Picture, ...]
    problems: tuple[Problem, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def epoch_size(self) -> int:
        """Pictures shown in one epoch, repeats counted."""
        return sum(picture.repeats for picture in self.pictures)

    def describe(self) -> str:
        """Say in a few lines what was found, where the captions come from, and what was left out."""
        groups = Counter((picture.group, picture.repeats) for picture in self.pictures)
        repeats = {repeats for _, repeats in groups}
        times = f" × {_count(repeats.pop(), 'repeat')}" if len(repeats) == 1 else ""
        lines = [f"{_count(len(self), 'picture')}{times} = {self.epoch_size} per epoch"]
        if len(groups) > 1:
            lines += _listed(f"{group or '.'}: {n} × {repeats}" for (group, repeats), n in groups.items())
        sources = Counter((p.caption_source, p.caption) for p in self.pictures if p.caption_source not in CAPTIONS)
        sources.update((p.caption_source, "") for p in self.pictures if p.caption_source in CAPTIONS)
        named = [f"{source} {text!r} × {n}" if text else f"{source} × {n}" for (source, text), n in sources.items()]
        lines.append("captions from: " + "; ".join(_some(named, 5)))
        for title, left_out in (("left out", True), ("to look at", False)):
            if found := [problem for problem in self.problems if problem.left_out is left_out]:
                lines += [f"{len(found)} {title}:", *_listed(_lines(found, self.root))]
        return _printable("\n".join(lines))


def scan(
    path: str | os.PathLike, *, repeats: int | None = None, caption: str | None = None, cache: Path | None = None
) -> Dataset:
    """Read every picture under a folder, or in a zip, in natural order of its path.

    Each file is read once and decoded completely, so that what is in the dataset can be trained on. A picture without
    a caption file (or with an empty one) gets `caption`, else the name of its folder after the repeats, as in kohya's
    trainer ("5_sks dog" → "sks dog"), else "". Unlike there, all lines of a caption count, joined by spaces.

    Args:
        path: folder or zip.
        repeats: times per epoch for every picture; by default what the nearest folder says (`5_name`), else 1.
        caption: for pictures that have none of their own.
        cache: folder that zips are unpacked in; by default the user's cache folder.

    Raises:
        FileNotFoundError: nothing is there; the message says what is near.
        ValueError: not one picture can be used (the message lists what was found), or the file is no sound zip.
    """
    if repeats is not None and repeats < 1:
        raise ValueError(f"repeats={repeats} would show no picture: give 1 or more, or None for what the folders say")
    path, problems = Path(path).expanduser(), []
    if not path.exists():
        raise FileNotFoundError(_printable(_missing(path.absolute())))
    root = path.resolve() if path.is_dir() else _unpack(path.resolve(), cache, problems)
    files = sorted(_walk(root, problems), key=lambda file: _natural(_name(file, root)))
    captions = _captions(files, root, caption, problems)
    candidates = [file for file in files if file.suffix.lower() in PICTURES]
    pictures, first = [], {}
    for file, measured in zip(candidates, _measure_all(candidates), strict=True):
        times = _folder(file.parent, root)[0] if repeats is None else repeats
        if isinstance(measured, str):
            problems.append(Problem(file, measured))
        elif times == 0:
            problems.append(Problem(file, "its folder's name asks for 0 repeats: rename the folder to use it"))
        else:
            width, height, digest = measured
            if (same := first.setdefault(digest, file)) != file:
                reason = f"the same picture as {_name(same, root)}, which so counts twice: remove one"
                problems.append(Problem(file, reason, False))
            source, text = captions[_stem(file)]
            group = _name(file.parent, root) if file.parent != root else ""
            pictures.append(Picture(file, text, source, times, width, height, digest, group))
    problems.sort(key=lambda problem: _natural(_name(problem.path, root)))
    if not pictures:
        raise ValueError(_printable(_nothing(path, root, files, problems)))
    return Dataset(root, tuple(pictures), tuple(problems))


def open_picture(picture: Picture | str | os.PathLike) -> Image.Image:
    """Open a picture as people see it: RGB in sRGB colours, upright, transparency on white, the first frame.

    Raises:
        ValueError: it cannot be decoded, or (given a Picture) is no longer the file that was scanned.
    """
    path = Path(picture.path if isinstance(picture, Picture) else picture)
    encoded = path.read_bytes()
    if isinstance(picture, Picture) and hashlib.sha256(encoded).hexdigest() != picture.digest:
        raise ValueError(f"{path} has changed since it was scanned: scan again")
    try:
        return _decode(encoded)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def masks(pictures: Sequence[Picture], where: str | os.PathLike, root: Path) -> list[Mask | None]:
    """The mask of each picture; None for one that has none and so counts as a whole.

    Args:
        where: "alpha" for the pictures' own transparency, or a folder that holds a picture by the same name (and in
            the same subfolder, or in none) for each that is masked.
        root: of the pictures.

    Raises:
        ValueError: not a single picture has a mask.
        FileNotFoundError: no such folder.
    """
    found: list[Mask | None] = []
    if where == "alpha":
        found = [Mask(p.path, p.digest, True) if _has_alpha(p.path) else None for p in pictures]
    else:
        folder = Path(where).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(_printable(_missing(folder.absolute())))
        files = [f for f in folder.rglob("*") if f.suffix.lower() in PICTURES and not _ignored(f.name)]
        by_name = {(f.parent.relative_to(folder).as_posix(), _stem(f)[1]): f for f in sorted(files)}
        for picture in pictures:
            group, stem = picture.path.parent.relative_to(root).as_posix(), _stem(picture.path)[1]
            file = by_name.get((group, stem)) or by_name.get((".", stem))
            found.append(Mask(file, hashlib.sha256(file.read_bytes()).hexdigest(), False) if file else None)
    if not any(found):
        what = "no picture is transparent anywhere" if where == "alpha" else "it holds no picture by their names"
        raise ValueError(_printable(f"mask {str(where)!r} masks nothing: {what}. Set mask to null, or mask some."))
    return found


def open_mask(mask: Mask) -> Image.Image:
    """Open a mask, upright: mode L.

    Raises:
        ValueError: it cannot be decoded.
    """
    if not mask.alpha:
        return open_picture(mask.path).convert("L")
    with Image.open(mask.path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
        turned, alpha = _turned(image), image.convert("RGBA").getchannel("A")
    return alpha if turned is None else alpha.transpose(turned)


def _has_alpha(path: Path) -> bool:
    with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
        if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
            return False
        return image.convert("RGBA").getchannel("A").getextrema()[0] < 255


def _measure_all(files: list[Path]) -> list[tuple[int, int, str] | str]:
    """Decode the files on all cores: (width, height, digest) of each, or what is wrong with it."""
    Image.init()  # here, because Pillow's own lazy start is not safe in threads
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")  # Pillow's, about odd metadata and large pictures; what matters raises
        return list(tqdm(pool.map(_measure, files), "reading", len(files), unit="picture", disable=len(files) <= 200))


def _measure(file: Path) -> tuple[int, int, str] | str:
    try:
        if (size := file.stat().st_size) > GiB:
            return f"{size / GiB:.1f} GiB is too large for a picture: scale it down"
        encoded = file.read_bytes()
        return *_decode(encoded).size, hashlib.sha256(encoded).hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror}): check its permissions or copy it again"
    except ValueError as error:
        return str(error)


def _decode(encoded: bytes) -> Image.Image:
    if not encoded:
        raise ValueError("empty (0 bytes): copy it again")
    try:
        Image.init()
        image = Image.open(io.BytesIO(encoded), formats=[name for name in FORMATS if name in Image.OPEN])
        image.load()
        return _rgb(image)
    except Image.UnidentifiedImageError:
        raise ValueError("not a picture that can be read, whatever its name says: save it as PNG or JPEG") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"too many pixels to decode safely ({error}): scale it down") from error
    except Exception as error:  # a damaged file can raise nearly anything: SyntaxError, struct.error, …
        raise ValueError(f"cannot be decoded ({error}): copy it again, or save it as PNG or JPEG") from error


def _rgb(image: Image.Image) -> Image.Image:
    turned, profile, alpha = _turned(image), image.info.get("icc_profile"), None
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # older Pillow calls it I
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"samples in mode {image.mode} have no known white")
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        alpha = with_alpha.getchannel("A")
        image = with_alpha.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    image = _srgb(image, profile)
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image if turned is None else image.transpose(turned)


def _turned(image: Image.Image) -> Image.Transpose | None:
    """How a picture must be turned to stand upright, by its EXIF; None where it does."""
    try:
        return UPRIGHT.get(image.getexif().get(0x0112))
    except Exception:  # broken EXIF does not make a broken picture
        return None


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to RGB through the picture's ICC profile; one that is broken or of another kind is passed over."""
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}.get(source.profile.xcolor_space.strip())
            if image.mode == "L" and mode == "RGB":
                image = image.convert("RGB")
            if image.mode == mode and not (source.profile.profile_description or "").startswith("sRGB"):
                return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass
    return image if image.mode == "RGB" else image.convert("RGB")  # a copy would cost more than decoding did


def _captions(
    files: list[Path], root: Path, given: str | None, problems: list[Problem]
) -> dict[tuple[Path, str], tuple[str, str]]:
    """(source, text) for each stem that has a picture."""
    by_stem, captions = defaultdict(list), {}
    for file in files:
        by_stem[_stem(file)].append(file)
    for stem, same in by_stem.items():
        texts = [file for suffix in CAPTIONS for file in same if file.suffix.lower() == suffix]
        pictures = [file for file in same if file.suffix.lower() in PICTURES | FOREIGN]
        readable = [file for file in pictures if file.suffix.lower() in PICTURES]
        for file in pictures:
            if file not in readable:
                problems.append(Problem(file, f"{file.suffix} files are not read: save it as PNG or JPEG"))
        for file in readable[1:]:
            reason = f"shares its name, and so its caption, with {readable[0].name}: rename or remove one"
            problems.append(Problem(file, reason, False))
        if not pictures:
            problems += [Problem(file, "a caption without a picture of that name", False) for file in texts]
            continue
        found = {}  # text: source
        for file in texts:
            if text := _read_caption(file, problems):
                if found and text not in found:
                    reason = f"differs from the {next(iter(found.values()))} file, which is used: keep one of them"
                    problems.append(Problem(file, reason, False))
                found.setdefault(text, file.suffix.lower())
        found.setdefault(_one_line(given or ""), "given")
        found.setdefault(_one_line(_folder(stem[0], root)[1]), "folder")
        captions[stem] = next(((source, text) for text, source in found.items() if text), ("none", ""))
    return captions


def _read_caption(file: Path, problems: list[Problem]) -> str:
    try:
        raw = file.read_bytes()
    except OSError as error:
        problems.append(Problem(file, f"cannot be read ({error.strerror}): check its permissions", False))
        return ""
    wide = raw.startswith((b"\xff\xfe", b"\xfe\xff"))  # Notepad's "Unicode"
    try:
        text = _one_line(raw.decode("utf-16" if wide else "utf-8-sig"))
    except UnicodeDecodeError:
        text = _one_line(raw.decode("cp1252", "replace"))
        reason = f"not UTF-8, so read as Western European, {text[:40]!r}: if that is wrong, save it as UTF-8"
        problems.append(Problem(file, reason, False))
    if not text:
        problems.append(Problem(file, "an empty caption, so treated as missing: write one", False))
    return text


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _folder(folder: Path, root: Path) -> tuple[int, str]:
    """(repeats, caption) by the name of the nearest folder that says, the root included; (1, "") if none does."""
    for named in (folder, *folder.parents):
        if match := REPEATS.fullmatch(named.name):
            return int(match[1]), unicodedata.normalize("NFC", _printable(match[2]))
        if named == root:
            break
    return 1, ""


def _walk(root: Path, problems: list[Problem]) -> Iterable[Path]:
    """Yield the files under a folder that are not hidden, and report the links that lead out of it."""

    def unlisted(error: OSError) -> None:
        problems.append(Problem(Path(error.filename), f"cannot be listed ({error.strerror}): check its permissions"))

    for folder, folders, names in os.walk(root, onerror=unlisted):
        folders[:] = [name for name in folders if not _ignored(name)]
        for dated in (name for name in folders if re.match(r"\d{4,}_", name)):
            reason = "read as a date, not as a number of repeats: give repeats= if you meant that"
            problems.append(Problem(Path(folder, dated), reason, False))
        for file in (Path(folder, name) for name in (*folders, *names) if not _ignored(name)):
            if file.is_symlink() and not Path(os.path.realpath(file)).is_relative_to(root):
                problems.append(Problem(file, f"a link out of the folder, to {os.readlink(file)}: copy the file here"))
            elif file.is_symlink() and file.is_dir():
                problems.append(Problem(file, "a link to a folder that is read anyway: remove it"))
            elif file.is_file():
                yield file
            elif not file.is_dir():
                problems.append(Problem(file, "a broken link, a pipe or a device, not a file: remove it"))


def _unpack(archive: Path, cache: Path | None, problems: list[Problem]) -> Path:
    """Unpack a zip into a folder named by its contents, so that the next time there is nothing to do."""
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lorakit", "unpacked")
    try:
        zipped = zipfile.ZipFile(archive)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        reason = f"is neither a folder nor a sound zip ({error}): give the folder that holds the pictures"
        raise ValueError(f"{archive} {reason}") from error
    with zipped:
        members = [member for member in zipped.infolist() if not member.filename.endswith(("/", "\\"))]
        contents = repr([(member.filename, member.CRC, member.file_size) for member in members])
        home = Path(cache).resolve() / hashlib.sha256(contents.encode()).hexdigest()[:16]
        root, missing = home / archive.stem, []
        for member in members:
            parts = [part for part in member.filename.replace("\\", "/").split("/") if part not in ("", ".")]
            if refused := _refuse(member):
                problems.append(Problem(archive, f"{member.filename!r} {refused}"))
            elif not any(map(_ignored, parts)):
                target = root.joinpath(*parts)
                if not target.is_file() or target.stat().st_size != member.file_size:
                    missing.append((member, target))
        needed = sum(member.file_size for member, _ in missing)
        if needed > max(GiB, 20 * archive.stat().st_size):
            largest = max(members, key=lambda member: member.file_size).filename
            raise ValueError(
                f"{archive} would unpack to {needed / GiB:.1f} GiB, which pictures do not do: a zip bomb? Its largest "
                f"file is {largest!r}. If you trust it, unpack it by hand and give the folder."
            )
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as unfinished:
            for member, target in tqdm(missing, "unpacking", unit="file", disable=len(missing) <= 200):
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with zipped.open(member) as source, open(Path(unfinished, "file"), "wb") as sink:
                        shutil.copyfileobj(source, sink)
                    os.replace(sink.name, target)
                except Exception as error:  # each way of packing has its own errors
                    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                        reason = f"no room in {cache}: free {needed / GiB:.1f} GiB there, or give another cache folder"
                        raise OSError(errno.ENOSPC, reason) from error
                    reason = f"{member.filename!r} cannot be unpacked ({error}): pack it again"
                    problems.append(Problem(archive, reason))
    return root


def _refuse(member: zipfile.ZipInfo) -> str:
    """Say what is wrong with unpacking this member; "" if nothing is."""
    name, kind = member.filename.replace("\\", "/"), stat.S_IFMT(member.external_attr >> 16)
    if name.startswith("/") or PureWindowsPath(name).drive or ".." in name.split("/"):
        return "would land outside of the folder: pack it again with plain names"
    if kind not in (0, stat.S_IFREG):
        return "is a link or a device: pack the file itself"
    if member.flag_bits & 1:
        return "is encrypted: unpack it by hand and give the folder"
    if member.file_size > GiB // 4 and member.file_size > 100 * member.compress_size:
        return f"would grow to {member.file_size / GiB:.1f} GiB, which pictures do not do: a zip bomb?"
    return ""


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")


def _stem(file: Path) -> tuple[Path, str]:
    return file.parent, unicodedata.normalize("NFC", file.stem)  # macOS takes accents apart, other systems do not


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _natural(name: str) -> tuple:
    """Sort key: folder by folder, with 2.png before 10.png, capitals beside small letters."""
    parts = [enumerate(re.split(r"(\d+)", part.casefold())) for part in name.split("/")]
    return [[int(text) if i % 2 else text for i, text in part] for part in parts], name


def _missing(path: Path) -> str:
    parent = next(folder for folder in path.parents if folder.is_dir())
    names = sorted(name for name in os.listdir(parent) if not _ignored(name)) if os.access(parent, os.R_OK) else []
    near = difflib.get_close_matches(path.relative_to(parent).parts[0], names, 1)
    found = f"{parent} holds " + (", ".join(_some([repr(name) for name in names], 8)) or "nothing")
    return f"{path} does not exist. {found}." + (f" Did you mean {near[0]!r}?" if near else "")


def _nothing(path: Path, root: Path, files: list[Path], problems: list[Problem]) -> str:
    kinds = Counter(file.suffix.lower() or "no suffix" for file in files)
    held = f"{_count(len(files), 'file')} ({', '.join(f'{kind} × {n}' for kind, n in kinds.most_common(8))})"
    first = f"{path} has no picture to train on; it holds {held if files else 'no files'}."
    return "\n".join([first, *_listed(_lines(problems, root)), "Give a folder or zip with PNG, JPEG or WebP pictures."])


def _lines(problems: Iterable[Problem], root: Path) -> list[str]:
    return [f"{_name(problem.path, root)}: {problem.reason}" for problem in problems]


def _some(items: list[str], most: int) -> list[str]:
    return items if len(items) <= most else [*items[: most - 1], f"… and {len(items) - most + 1} more"]


def _listed(items: Iterable[str]) -> list[str]:
    return [f"  {item}" for item in _some(list(items), 10)]


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("s" if n != 1 else "")


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # a name that is not UTF-8 must not break a print
