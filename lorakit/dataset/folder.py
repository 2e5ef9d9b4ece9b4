"""A folder or archive → pictures with captions, and every problem met on the way. Nothing is written into the folder.

Reads kohya's tree (`5_name/` holds pictures to show 5 times per epoch), one flat folder, nested folders, a zip or tar
of any of these, and the dataset TOML of sd-scripts. A caption is the `.txt` or `.caption` file beside the picture that
has the same stem, or what Hugging Face's `metadata.jsonl` or `metadata.csv` says of it.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import PIL

from lorakit import kohya, storage
from lorakit.dataset.picture import FOREIGN, PICTURES, RAW, Mask, Picture, has_alpha, measure, register_formats

CAPTIONS = (".txt", ".caption")  # where both say something, the first is used
METADATA = ("metadata.jsonl", "metadata.csv")
STAND_INS = ("given", "folder", "none")  # the caption sources that are not the picture's own

ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz")

REPEATS = re.compile(r"(\d{1,3})_(.*)")  # more digits are a date: nobody means 2024_holiday 2024 times

MOUNTS = Path("/proc/mounts")


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
        bare = [picture for picture in self.pictures if picture.caption_source in STAND_INS]
        sources = Counter((p.caption_source, p.caption * (p.caption_source in STAND_INS)) for p in self.pictures)
        named = [f"{source} {text!r} × {n}" if text else f"{source} × {n}" for (source, text), n in sources.items()]
        lines.append("captions from: " + "; ".join(_some(named, 5)))
        if 0 < len(bare) < len(self):
            said = (f"{_name(p.known_as, self.root)}: {_quoted(p.caption_source, p.caption)} is used" for p in bare)
            lines += [f"{len(bare)} without a caption of their own:", *_listed(said)]
        for title, left_out in (("left out", True), ("to look at", False)):
            if found := [problem for problem in self.problems if problem.left_out is left_out]:
                lines += [f"{len(found)} {title}:", *_listed(_lines(found, self.root))]
        return _printable("\n".join(lines))


@dataclass(frozen=True)
class _Part:
    """A folder to read, and what is known of its pictures beforehand."""

    folder: Path
    repeats: int | Mapping[str, int] | None  # None: what the names of folders say
    caption: str = ""  # for pictures that have none of their own
    suffixes: tuple[str, ...] = CAPTIONS  # of caption files, the first before the next
    nested: bool = True


def scan(
    path: str | os.PathLike, *, repeats: int | Mapping[str, int] | None = None, caption: str | None = None,
    first_line: bool = False, regularisation: bool = False, copy: bool = False, fresh: bool = False,
    cache: Path | None = None,
) -> Dataset:  # fmt: skip
    """Read every picture under a folder, in an archive or of sd-scripts' dataset TOML, in natural order of its path.

    Each file is read and decoded completely, so that what is in the dataset can be trained on. A picture without a
    caption of its own gets `caption`, else the name of its folder after the repeats, as in kohya's trainer ("5_sks dog"
    → "sks dog"), else "". Unlike there, all lines of a caption count, joined by spaces.

    What was read is kept in an index, so that the next scan reads only files whose size, inode or times have changed.
    A file that was changed and has all of these as before (which systems that know when a file was touched, Linux and
    macOS, do not let happen) is listed as the file it was; `open_picture` compares the bytes and refuses it. `fresh`
    reads it again.

    Args:
        path: folder; zip or tar, also gzip, bzip2 or xz; or TOML whose folders are meant from its own.
        repeats: times per epoch for every picture, or by folder ("cats/indoors"; "" is all); by default what the
            nearest folder says (`5_name`) or the TOML, else 1.
        caption: for pictures that have none of their own.
        first_line: of a caption file only the first line counts, as in kohya's trainer.
        regularisation: of a TOML, read its regularisation pictures (`is_reg`) and not the others.
        copy: read from a copy of the folder on local disk, made or brought up to date first: for Drive.
        fresh: read files again that have not changed by their sizes and times.
        cache: folder for unpacked archives, copies and the index; by default the user's cache folder.

    Raises:
        FileNotFoundError: nothing is there; the message says what is near.
        ValueError: not one picture can be used (the message lists what was found), or no sound archive or TOML.
        OSError: no room for what is unpacked or copied.
    """
    for times in repeats.values() if isinstance(repeats, Mapping) else [repeats]:
        if times is not None and times < 1:
            raise ValueError(f"repeats={times} would show no picture: give 1 or more, or None for what the folders say")
    path, problems = Path(path).expanduser(), []
    if not path.exists():
        raise FileNotFoundError(_printable(_missing(path.absolute())))
    path, cache = path.resolve(), Path(cache or _user_cache())
    parts = _parts(path, repeats, _one_line(caption or ""), regularisation, cache, problems)
    walked = [sorted(_walk(p, problems), key=lambda file, p=p: _natural(_name(file, p.folder))) for p in parts]
    root = Path(os.path.commonpath([part.folder for part in parts] or [path.parent]))
    if copy and parts and not root.is_relative_to(cache.resolve()):  # else unpacked there
        root, parts, walked = _copied(root, parts, walked, cache / "copies", problems)
    held, chosen = [], {}  # chosen: file → (part, caption source, caption)
    for part, files in zip(parts, walked, strict=True):
        captions = _captions(files, part, first_line, problems)
        chosen |= {file: (part, *captions[file]) for file in files if file in captions}
        held += files
    pictures, first, facts = [], {}, _measured(list(chosen), path, cache, fresh)
    for (file, (part, source, text)), measured in zip(chosen.items(), facts, strict=True):
        times = _times(file.parent, part)
        if isinstance(measured, str):
            problems.append(Problem(file, measured))
        elif times < 1:
            problems.append(Problem(file, f"{times} repeats are asked for, by folder or TOML: change that to use it"))
        else:
            width, height, digest = measured
            if (same := first.setdefault(digest, file)) != file:
                reason = f"the same picture as {_name(same, root)}, which so counts twice: remove one"
                problems.append(Problem(file, reason, False))
            group = _name(file.parent, root) if file.parent != root else ""
            pictures.append(Picture(file, text, source, times, width, height, digest, group))
    problems = sorted(dict.fromkeys(problems), key=lambda problem: _natural(_name(problem.path, root)))
    if not pictures:
        raise ValueError(_printable(_nothing(path, root, held, problems)))
    return Dataset(root, tuple(pictures), tuple(problems))


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a folder or file is on Google Drive as Colab mounts it, where each file that is opened is fetched."""
    try:
        mounts = [line.split()[:3] for line in MOUNTS.read_text().splitlines()]
    except OSError:  # not Linux
        return False
    path = Path(path).expanduser().resolve()
    return any(what == "drive" and kind.startswith("fuse") and path.is_relative_to(to) for what, to, kind in mounts)


def find_masks(
    pictures: Sequence[Picture], where: str | os.PathLike, root: Path, *, copy: bool = False, cache: Path | None = None
) -> list[Mask | None]:
    """The mask of each picture; None for one that has none and so counts as a whole.

    Args:
        where: "alpha" for the pictures' own transparency, or a folder that holds a picture by the same name (and in
            the same subfolder, or in none) for each that is masked.
        root: of the pictures.
        copy, cache: as in `scan`, of a folder with masks.

    Raises:
        ValueError: not a single picture has a mask.
        FileNotFoundError: no such folder.
        OSError: no room for the copy, or a mask cannot be copied.
    """
    found: list[Mask | None] = []
    if where == "alpha":
        found = [Mask(p.path, p.digest, True) if has_alpha(p.path) else None for p in pictures]
    else:
        folder, failed = Path(where).expanduser().resolve(), {}
        if not folder.is_dir():
            raise FileNotFoundError(_printable(_missing(folder)))
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in PICTURES and not _ignored(f.name))
        by_name, here = {(f.parent.relative_to(folder).as_posix(), _stem(f)[1]): f for f in files}, folder
        if copy:  # beside those of datasets: a folder may be both
            here, failed = storage.mirror_folder(files, folder, Path(cache or _user_cache()) / "masks")
        for picture in pictures:
            group, stem = picture.known_as.parent.relative_to(root).as_posix(), _stem(picture.known_as)[1]
            if (file := by_name.get((group, stem)) or by_name.get((".", stem))) is None:
                found.append(None)
                continue
            if file in failed:  # else the whole picture would be learned
                raise OSError(f"The mask {file} {failed[file]}")
            file = here / file.relative_to(folder)
            found.append(Mask(file, hashlib.sha256(file.read_bytes()).hexdigest(), False))
    if not any(found):
        what = "no picture is transparent anywhere" if where == "alpha" else "it holds no picture by their names"
        raise ValueError(_printable(f"mask {str(where)!r} masks nothing: {what}. Set mask to null, or mask some."))
    return found


def _measured(files: list[Path], path: Path, cache: Path, fresh: bool) -> list[list | str]:
    """[width, height, digest] of each file, or what is wrong with it."""
    register_formats.cache_clear()  # a library may have been installed since the last scan
    register_formats()  # here, because Pillow's own lazy start is not safe in threads
    store = cache / "index" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.json"
    return storage.measure_files(files, measure, store, f"1, Pillow {PIL.__version__}", fresh)


def _parts(
    path: Path, repeats: int | Mapping[str, int] | None, caption: str, regularisation: bool, cache: Path,
    problems: list[Problem],
) -> list[_Part]:  # fmt: skip
    """The folders that a path stands for."""
    if path.is_dir():
        return [_checked(_Part(path, repeats, caption))]
    if path.suffix.lower() != ".toml":
        folder, refused = storage.unpack(path, cache / "unpacked")
        problems += [Problem(path, reason) for reason in refused]
        return [_checked(_Part(folder, repeats, caption))]
    subsets, notes = kohya.subsets(path)
    problems += [Problem(path, note, False) for note in notes]
    parts = {}
    for subset in subsets:
        folder, suffixes = Path(os.path.abspath(subset.folder)), dict.fromkeys((subset.extension or ".txt", *CAPTIONS))
        if not folder.is_dir():
            problems.append(Problem(folder, _missing(folder)))
        elif subset.regularisation is not regularisation:
            which = "regularisation pictures" if subset.regularisation else "pictures to learn"
            problems.append(Problem(folder, f"{which}, which this scan is not asked for", False))
        elif folder in parts:
            problems.append(Problem(folder, f"named twice in {path.name}: the first is used", False))
        else:
            times = subset.repeats if repeats is None else repeats
            part = _Part(folder.resolve(), times, caption or _one_line(subset.caption), tuple(suffixes), nested=False)
            parts[folder] = _checked(part)
    return list(parts.values())


def _checked(part: _Part) -> _Part:
    """The same part.

    Raises:
        ValueError: repeats for a folder that it does not have.
    """
    for name in part.repeats if isinstance(part.repeats, Mapping) else ():
        if not (part.folder / name).is_dir():
            raise ValueError(f"repeats names a folder {name!r}: {_missing(part.folder / name)}")
    return part


def _copied(
    root: Path, parts: list[_Part], walked: list[list[Path]], cache: Path, problems: list[Problem]
) -> tuple[Path, list[_Part], list[list[Path]]]:
    """The root, the parts and their files in one copy on local disk, where they have the same names relative to it.

    Files that are never opened are named, not copied.
    """
    wanted = {}  # each once: two parts may be links to one folder
    for part, files in zip(parts, walked, strict=True):
        read = PICTURES | {*part.suffixes}
        wanted |= {file: None for file in files if file.suffix.lower() in read or file.name in METADATA}
    here, failed = storage.mirror_folder(list(wanted), root, cache, [part.folder for part in parts])
    problems += [Problem(file, reason) for file, reason in failed.items()]
    parts = [replace(part, folder=here / part.folder.relative_to(root)) for part in parts]
    return here, parts, [[here / f.relative_to(root) for f in files if f not in failed] for files in walked]


def _captions(files: list[Path], part: _Part, first_line: bool, problems: list[Problem]) -> dict[Path, tuple[str, str]]:
    """(source, text) for each picture that is to be read."""
    by_stem, captions, described = defaultdict(list), {}, _described(files, problems)
    for file in files:
        by_stem[_stem(file)].append(file)
    for same in by_stem.values():
        pictures = [file for file in same if file.suffix.lower() in PICTURES or file.suffix.lower() in FOREIGN]
        texts = [file for suffix in part.suffixes for file in same if file.suffix.lower() == suffix]
        if not pictures:
            problems += [Problem(file, "a caption without a picture of that name", False) for file in texts]
            continue
        own = [(file, file.suffix.lower(), _read_caption(file, first_line, problems)) for file in texts]
        for file in _readable(pictures, problems):
            said = [*own, (file, *described[file])] if file in described else own
            folder = _folder(file.parent, part.folder)[1]
            captions[file] = _choose([*said, (file, "given", part.caption), (file, "folder", folder)], problems)
    return captions


def _choose(said: Sequence[tuple[Path, str, str | None]], problems: list[Problem]) -> tuple[str, str]:
    """(source, text) of the first of (file, source, text) with a text; a file that says another is reported."""
    source, text = next(((source, text) for _, source, text in said if text), ("none", ""))
    for file, other, differing in said:
        if differing == "" and other not in STAND_INS:
            problems.append(Problem(file, f"an empty caption: {_quoted(source, text)} is used. Write one", False))
        elif differing and differing != text and other not in STAND_INS:
            reason = f"{other} says {differing[:40]!r}, and {source}, which is used, something else: keep one of them"
            problems.append(Problem(file, reason, False))
    return source, text


def _readable(pictures: list[Path], problems: list[Problem]) -> list[Path]:
    """Those of the pictures with one stem that are to be read."""
    known = [file for file in pictures if file.suffix.lower() in PICTURES]
    developed = [file for file in known if file.suffix.lower() not in RAW]
    for file in pictures:
        if file not in known:
            problems.append(Problem(file, f"{file.suffix} files are not read: save it as PNG or JPEG"))
        elif developed and file not in developed:
            problems.append(Problem(file, f"the camera raw of {developed[0].name}, which is used"))
    readable = developed or known
    for file in readable[1:]:
        reason = f"shares its name, and so its caption, with {readable[0].name}: rename or remove one"
        problems.append(Problem(file, reason, False))
    return readable


def _read_caption(file: Path, first_line: bool, problems: list[Problem]) -> str | None:
    """What a caption file says; None if it cannot be read."""
    try:
        raw = file.read_bytes()
    except OSError as error:
        problems.append(Problem(file, f"cannot be read ({error.strerror}): check its permissions", False))
        return None
    wide = raw.startswith((b"\xff\xfe", b"\xfe\xff"))  # Notepad's "Unicode"
    try:
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", "replace")
        shown = _one_line(text)[:40]
        reason = f"not UTF-8, so read as Western European, {shown!r}: if that is wrong, save it as UTF-8"
        problems.append(Problem(file, reason, False))
    return _one_line(text.strip().partition("\n")[0] if first_line else text)


def _described(files: list[Path], problems: list[Problem]) -> dict[Path, tuple[str, str]]:
    """(file's name, text) for each picture that Hugging Face's metadata files describe; the nearest file counts."""
    sources = sorted((file for file in files if file.name in METADATA), key=lambda file: -len(file.parts))
    by_name = {unicodedata.normalize("NFC", str(file)): file for file in files} if sources else {}
    found = {}
    for source in sources:
        for row in _rows(source, problems):
            name, text = str(row.get("file_name")), _printable(str(row.get("text") or row.get("caption") or ""))
            picture = by_name.get(unicodedata.normalize("NFC", str(source.parent / name)))
            if picture is None or ".." in PurePosixPath(name).parts:
                reason = f"describes {name!r}, which is not there, or not in its folder: it does not count"
                problems.append(Problem(source, reason, False))
            elif found.setdefault(picture, (source.name, _one_line(text)))[1] != _one_line(text):
                problems.append(Problem(picture, f"described twice; {found[picture][0]} of its folder counts", False))
    return found


def _rows(file: Path, problems: list[Problem]) -> list[dict]:
    """The rows of a metadata file; those that cannot be read are reported."""
    rows = []
    try:
        lines = io.StringIO(file.read_text("utf-8-sig"))
        if file.suffix == ".csv":
            return list(csv.DictReader(lines))
        for line in lines:
            if line.strip():
                rows.append(dict(json.loads(line)))
    except (OSError, ValueError, TypeError, RecursionError, csv.Error) as error:
        reason = f"cannot be read after {_count(len(rows), 'row')} ({error}): mend it, or save it as UTF-8"
        problems.append(Problem(file, reason, False))
    return rows


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _quoted(source: str, text: str) -> str:
    return f"{text!r} ({source})" if text else "none"


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lorakit")


def _times(folder: Path, part: _Part) -> int:
    if isinstance(part.repeats, int):
        return part.repeats
    for named in (folder, *folder.parents) if part.repeats else ():
        name = _name(named, part.folder)
        if (times := part.repeats.get("" if name == "." else name)) is not None:
            return times
        if named == part.folder:
            break
    return _folder(folder, part.folder)[0]


def _folder(folder: Path, root: Path) -> tuple[int, str]:
    """(repeats, caption) by the name of the nearest folder that says, the root included; (1, "") if none does."""
    for named in (folder, *folder.parents):
        if match := REPEATS.fullmatch(named.name):
            return int(match[1]), unicodedata.normalize("NFC", _printable(match[2]))
        if named == root:
            break
    return 1, ""


def _walk(part: _Part, problems: list[Problem]) -> Iterator[Path]:
    """Yield the files of a part that are not hidden, and report the links that lead out of it."""
    folders = [part.folder]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            problems.append(Problem(folder, f"cannot be listed ({error.strerror}): check its permissions"))
            continue
        for entry in entries:
            path = Path(entry.path)
            if _ignored(entry.name):
                continue
            kind = path if entry.is_symlink() else entry  # which tells without asking the drive
            if kind is path and not Path(os.path.realpath(path)).is_relative_to(part.folder):
                problems.append(Problem(path, f"a link out of the folder, to {os.readlink(path)}: copy the file here"))
            elif kind is path and path.is_dir():
                problems.append(Problem(path, "a link to a folder that is read anyway: remove it"))
            elif kind.is_dir() and part.nested:
                folders.append(path)
                if re.match(r"\d{4,}_", entry.name):
                    reason = "read as a date, not as a number of repeats: give repeats= if you meant that"
                    problems.append(Problem(path, reason, False))
            elif kind.is_dir():
                problems.append(Problem(path, "a folder in a subset, not read by sd-scripts: make it a subset itself"))
            elif not kind.is_file():
                problems.append(Problem(path, "a broken link, a pipe or a device, not a file: remove it"))
            elif path.suffix.lower() in ARCHIVES:
                problems.append(Problem(path, "an archive in the folder is not read: unpack it, or give it itself"))
            else:
                yield path


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
