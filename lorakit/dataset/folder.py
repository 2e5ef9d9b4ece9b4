"""A folder or archive → pictures with captions, and every problem with them. The folder itself is only read.

Reads kohya's tree (`5_name/` contains pictures to show 5 times per epoch), one flat folder, nested folders, a zip or
tar of any of these, and the dataset TOML of sd-scripts. A caption is the `.txt` or `.caption` file next to the picture
with the same stem, or the picture's text in Hugging Face's `metadata.jsonl` or `metadata.csv`.
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
from lorakit.dataset import captions
from lorakit.dataset.captions import one_line
from lorakit.dataset.gallery import Note, gallery, text_lines
from lorakit.dataset.picture import FOREIGN, PICTURES, RAW, Mask, Picture, has_alpha, measure, register_formats

METADATA = ("metadata.jsonl", "metadata.csv")
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz")
REPEATS = re.compile(r"(\d{1,3})_(.*)")  # more digits are a date: nobody means 2024_holiday 2024 times
MASK = "-masklabel"  # what OneTrainer adds to a picture's name for its mask
PROJECT = ("reg", "model", "models", "log", "logs", "sample", "samples")  # next to img/ in projects of kohya's GUI
MOUNTS = Path("/proc/mounts")


@dataclass(frozen=True)
class Problem:
    path: Path
    reason: str  # what is wrong, and what to do
    left_out: bool = True  # False: the picture is used, but a person should look at it


@dataclass(frozen=True, repr=False)
class Dataset:
    """Pictures with captions, and the problems with them. `print` shows it as text, a notebook with thumbnails."""

    root: Path
    pictures: tuple[Picture, ...]
    problems: tuple[Problem, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def epoch_size(self) -> int:
        """Pictures shown in one epoch, repeats counted."""
        return sum(picture.repeats for picture in self.pictures)

    @property
    def by_name(self) -> dict[str, Picture]:
        """The pictures by name: the path relative to the root, as in "5_cat/1.png"."""
        return {picture_name(picture.known_as, self): picture for picture in self.pictures}

    @property
    def captions(self) -> dict[str, str]:
        """The captions by the pictures' names."""
        return {name: picture.caption for name, picture in self.by_name.items()}

    def describe(self) -> str:
        """The number of pictures, the sources of the captions, and the problems, in a few lines."""
        groups = Counter((picture.group, picture.repeats) for picture in self.pictures)
        repeats = {repeats for _, repeats in groups}
        times = f" × {_count(repeats.pop(), 'repeat')}" if len(repeats) == 1 else ""
        lines = [f"{_count(len(self), 'picture')}{times} = {self.epoch_size} per epoch"]
        if len(groups) > 1:
            lines += _listed(f"{group or '.'}: {n} × {repeats}" for (group, repeats), n in groups.items())
        without = {name: picture for name, picture in self.by_name.items() if not picture.has_own_caption}
        sources = Counter((p.caption_source, "" if p.has_own_caption else p.caption) for p in self.pictures)
        counted = [
            f"{source} {captions.excerpt(text, 80)!r} × {n}" if text else f"{source} × {n}"
            for (source, text), n in sources.items()
        ]
        lines.append("captions from: " + "; ".join(_shortened(counted, 5)))
        if several := sum(len(picture.lines) > 1 for picture in self.pictures):
            lines.append(f"{several} of several lines: joined, unless caption_lines is 'random'")
        if 0 < len(without) < len(self):
            lines.append(f"{len(without)} without a caption of their own:")
            lines += _listed(f"{n}: {_quoted(p.caption_source, p.caption)} is used" for n, p in without.items())
        for title, left_out in (("left out", True), ("to look at", False)):
            if problems := [problem for problem in self.problems if problem.left_out is left_out]:
                lines += [f"{len(problems)} {title}:", *_listed(_lines(problems, self.root))]
        return storage.printable("\n".join(lines))

    def _repr_html_(self) -> str:
        notes: dict[Path, list[Note]] = defaultdict(list)
        for problem in self.problems:
            notes[problem.path].append(("warning", problem.reason))
        cards = [(p, name, [("info", p.caption or "no caption"), *notes[p.path]]) for name, p in self.by_name.items()]
        return storage.printable(text_lines([("info", self.describe())]) + gallery(cards))

    def __repr__(self) -> str:
        return self.describe()


def picture_name(path: Path, dataset: Dataset) -> str:
    """A picture's name: its path relative to the dataset's root, with slashes on every system."""
    return path.relative_to(dataset.root).as_posix() if path.is_relative_to(dataset.root) else path.name


def scan(
    path: str | os.PathLike[str], *, repeats: int | Mapping[str, int] | None = None, caption: str | None = None,
    first_line: bool = False, regularisation: bool = False, copy: bool = False, fresh: bool = False,
    cache: Path | None = None,
) -> Dataset:  # fmt: skip
    """Every picture under a folder, in an archive or of sd-scripts' dataset TOML, in natural order of its path.

    Each file is read and decoded completely, so every picture of the dataset can be trained on. A picture without its
    own caption gets `caption`, else the name of its folder after the repeats, as in kohya's trainer ("5_sks dog" →
    "sks dog"), else "". Unlike there, all lines of a caption count, joined by spaces.

    The next scan reads only files whose size, inode or times have changed; their measurements are kept in an index. A
    file changed without any of these (Linux and macOS do not allow that) is listed as it was; `open_picture` compares
    the bytes and refuses it, and `fresh` reads it again.

    Args:
        path: folder; zip or tar, also gzip, bzip2 or xz; or TOML, whose folders are relative to its own.
        repeats: times per epoch for every picture, or by folder ("cats/indoors"; "" is all); by default the number in
            the name of the nearest folder (`5_name`) or in the TOML, else 1.
        caption: for pictures without their own.
        first_line: use only the first line of a caption file, as kohya's trainer does.
        regularisation: of a TOML, read its regularisation pictures (`is_reg`) instead of the others.
        copy: read a copy of the folder on local disk, which is made or updated first: for Drive.
        fresh: read all files again.
        cache: folder for unpacked archives, copies and the index; by default the user's cache folder.

    Raises:
        FileNotFoundError: `path` does not exist; the message lists similar names.
        ValueError: no picture can be used (the message lists the files), or the archive or TOML is damaged.
        OSError: the disk is full.
    """
    for times in repeats.values() if isinstance(repeats, Mapping) else [repeats]:
        if times is not None and times < 1:
            raise ValueError(f"repeats={times} would show no picture: give 1 or more, or None for the folders' numbers")
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(storage.printable(_missing(path.absolute())))
    reader = _Reader(path.resolve(), Path(cache or storage.user_cache()), first_line)
    parts = reader.parts(repeats, one_line(caption or ""), regularisation)
    parts = [replace(part, files=reader.walk(part)) for part in parts]
    root = Path(os.path.commonpath([part.folder for part in parts] or [reader.path.parent]))
    if copy and parts and not root.is_relative_to(reader.cache.resolve()):  # else unpacked there
        root, parts = reader.copied(root, parts)
    pictures = reader.pictures(root, parts, fresh)
    reader.report_kinds(root, parts)
    problems = sorted(dict.fromkeys(reader.problems), key=lambda problem: _natural(_name(problem.path, root)))
    if not pictures:
        files = [file for part in parts for file in part.files]
        raise ValueError(storage.printable(_nothing(reader.path, root, files, problems)))
    return Dataset(root, tuple(pictures), tuple(problems))


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a folder or file is on Google Drive as Colab mounts it, where opening a file downloads it."""
    try:
        mounts = [line.split()[:3] for line in MOUNTS.read_text().splitlines()]
    except OSError:  # not Linux
        return False
    path = Path(path).expanduser().resolve()
    return any(name == "drive" and kind.startswith("fuse") and path.is_relative_to(to) for name, to, kind in mounts)


def find_masks(
    pictures: Sequence[Picture], source: str | os.PathLike[str], root: Path, *, copy: bool = False,
    cache: Path | None = None,
) -> list[Mask | None]:  # fmt: skip
    """The mask of each picture; None if it has none, and all of it is trained on.

    Args:
        source: "alpha" for the pictures' own transparency, or a folder with masks named as the pictures, in the same
            subfolder or directly in it.
        root: of the pictures.
        copy, cache: as in `scan`, of a folder with masks.

    Raises:
        ValueError: no picture has a mask.
        FileNotFoundError: no such folder.
        OSError: the disk is full, or a mask cannot be copied.
    """
    if source == "alpha":
        masks = [Mask(p.path, p.digest, True) if has_alpha(p.path) else None for p in pictures]
    else:
        files = _mask_files(pictures, Path(source).expanduser().resolve(), root, copy, cache)
        masks = [Mask(file, storage.sha256(file), False) if file else None for file in files]
    if not any(masks):
        reason = "no picture is transparent" if source == "alpha" else "it contains no picture with one of their names"
        raise ValueError(
            storage.printable(f"mask {str(source)!r} masks nothing: {reason}. Set mask to null, or mask some.")
        )
    return masks


def _mask_files(
    pictures: Sequence[Picture], folder: Path, root: Path, copy: bool, cache: Path | None
) -> list[Path | None]:
    """The mask's file of each picture, errors as `find_masks`."""
    if not folder.is_dir():
        raise FileNotFoundError(storage.printable(_missing(folder)))
    own = {picture.known_as for picture in pictures}
    files = [f for f in folder.rglob("*") if f.suffix.lower() in PICTURES and not _ignored(f.name) and f not in own]
    files.sort(key=lambda file: (file.stem.endswith(MASK), file))  # OneTrainer's names last: they are used
    by_name = {(f.parent.relative_to(folder).as_posix(), captions.stem(f)[1].removesuffix(MASK)): f for f in files}
    local, failed = folder, dict[Path, str]()
    if copy:  # not among the copies of datasets: a folder may be both
        local, failed = storage.mirror_folder(files, folder, Path(cache or storage.user_cache()) / "masks")
    masks = []
    for picture in pictures:
        group, stem = picture.known_as.parent.relative_to(root).as_posix(), captions.stem(picture.known_as)[1]
        file = by_name.get((group, stem)) or by_name.get((".", stem))
        if file in failed:  # else the whole picture would be learned
            raise OSError(f"The mask {file} {failed[file]}")
        masks.append(local / file.relative_to(folder) if file else None)
    return masks


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Part:
    """A folder to read, and what the caller or a TOML sets for its pictures."""

    folder: Path
    repeats: int | Mapping[str, int] | None  # None: by the names of folders
    caption: str = ""  # for pictures without their own
    suffixes: tuple[str, ...] = captions.SUFFIXES  # of caption files, the first before the next
    nested: bool = True
    files: tuple[Path, ...] = ()

    def times(self, folder: Path) -> int:
        """Repeats of the pictures directly in a folder."""
        if isinstance(self.repeats, int):
            return self.repeats
        for parent in self._upwards(folder) if self.repeats else ():
            name = _name(parent, self.folder)
            if (times := (self.repeats or {}).get("" if name == "." else name)) is not None:
                return times
        return self.named(folder)[0]

    def named(self, folder: Path) -> tuple[int, str]:
        """(repeats, caption) by the name of the nearest folder like "5_sks dog"; (1, "") if there is none."""
        for parent in self._upwards(folder):
            if match := REPEATS.fullmatch(parent.name):
                return int(match[1]), unicodedata.normalize("NFC", storage.printable(match[2]))
        return 1, ""

    def _upwards(self, folder: Path) -> Iterator[Path]:
        """The folder and its parents, up to that of the part."""
        while folder != self.folder:
            yield folder
            folder = folder.parent
        yield folder


class _Reader:
    """Reads the parts of a dataset, and collects the problems."""

    def __init__(self, path: Path, cache: Path, first_line: bool):
        self.path, self.cache, self.first_line = path, cache, first_line
        self.problems: list[Problem] = []

    def _leave_out(self, path: Path, reason: str) -> None:
        self.problems.append(Problem(path, reason))

    def _report(self, path: Path, reason: str) -> None:
        self.problems.append(Problem(path, reason, left_out=False))

    # ── Files ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def parts(self, repeats: int | Mapping[str, int] | None, caption: str, regularisation: bool) -> list[_Part]:
        """The folders to read.

        Raises:
            ValueError: `repeats` names a folder that does not exist.
        """
        if self.path.is_dir():
            parts = [_Part(self.path, repeats, caption)]
        elif self.path.suffix.lower() == ".toml":
            parts = self._toml_parts(repeats, caption, regularisation)
        else:
            folder, refused = storage.unpack(self.path, self.cache / "unpacked")
            self.problems += [Problem(self.path, reason) for reason in refused]
            parts = [_Part(folder, repeats, caption)]
        names = repeats if isinstance(repeats, Mapping) else ()
        for folder, name in [(part.folder / name, name) for part in parts for name in names]:
            if not folder.is_dir():
                raise ValueError(f"repeats names a folder {name!r}: {_missing(folder)}")
        return parts

    def _toml_parts(self, repeats: int | Mapping[str, int] | None, caption: str, regularisation: bool) -> list[_Part]:
        subsets, notes = kohya.subsets(self.path)
        self.problems += [Problem(self.path, note, False) for note in notes]
        parts = {}
        for subset in subsets:
            folder = Path(os.path.abspath(subset.folder))
            if not folder.is_dir():
                self._leave_out(folder, _missing(folder))
            elif subset.regularisation is not regularisation:
                kind = "regularisation pictures" if subset.regularisation else "pictures to learn"
                self._report(folder, f"{kind}, which this scan does not read")
            elif folder in parts:
                self._report(folder, f"named twice in {self.path.name}: the first is used")
            else:
                suffixes = tuple(dict.fromkeys((subset.extension or ".txt", *captions.SUFFIXES)))
                times, text = subset.repeats if repeats is None else repeats, caption or one_line(subset.caption)
                parts[folder] = _Part(folder.resolve(), times, text, suffixes, nested=False)
        return list(parts.values())

    def walk(self, part: _Part) -> tuple[Path, ...]:
        """The files of a part that are not hidden, in natural order; others are reported."""
        files, folders = [], [part.folder]
        while folders:
            folder = folders.pop()
            if folder != part.folder and re.match(r"\d{4,}_", folder.name):
                self._report(folder, "read as a date, not as a number of repeats: give repeats= if you meant that")
            try:
                entries = [entry for entry in os.scandir(folder) if not _ignored(entry.name)]
            except OSError as error:
                self._leave_out(folder, f"cannot be listed ({error.strerror}): check its permissions")
                continue
            project = folder == part.folder and any(entry.name == "img" and entry.is_dir() for entry in entries)
            for entry in entries:
                if reason := _unread(entry, part, project):
                    self._leave_out(Path(entry.path), reason)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                else:
                    files.append(Path(entry.path))
        return tuple(sorted(files, key=lambda file: _natural(_name(file, part.folder))))

    def copied(self, root: Path, parts: list[_Part]) -> tuple[Path, list[_Part]]:
        """The root and the parts in one copy on local disk, where the files have the same names relative to it.

        Files that are never opened are named, not copied.
        """
        opened = dict.fromkeys(  # each once: two parts may be links to one folder
            file for part in parts for file in part.files
            if file.suffix.lower() in (*PICTURES, *part.suffixes) or file.name in METADATA
        )  # fmt: skip
        local, failed = storage.mirror_folder(list(opened), root, self.cache / "copies", [p.folder for p in parts])
        self.problems += [Problem(file, reason) for file, reason in failed.items()]
        files = [tuple(local / f.relative_to(root) for f in part.files if f not in failed) for part in parts]
        folders = [local / part.folder.relative_to(root) for part in parts]
        return local, [replace(p, folder=at, files=f) for p, at, f in zip(parts, folders, files, strict=True)]

    def report_kinds(self, root: Path, parts: list[_Part]) -> None:
        """Report the files that are neither pictures nor captions, in a line for each kind."""
        kinds = defaultdict(list)
        for part in parts:
            for file in part.files:
                if file.suffix.lower() not in PICTURES | FOREIGN | {*part.suffixes} and file.name not in METADATA:
                    kinds[file.suffix.lower()].append(file)
        for suffix, files in kinds.items():
            what = f"{suffix} is no kind of picture or caption" if suffix else "without a suffix"
            more = f", and {len(files) - 1} more like it" if len(files) > 1 else ""
            self._report(files[0], f"not read, {what}{more}")

    def pictures(self, root: Path, parts: list[_Part], fresh: bool) -> list[Picture]:
        """The pictures that can be used."""
        chosen: dict[Path, tuple[_Part, str, str]] = {}  # file → part, caption source, caption
        for part in parts:
            texts = self.captions(part)
            chosen |= {file: (part, *texts[file]) for file in part.files if file in texts}
        register_formats.cache_clear()  # a library may have been installed since the last scan
        register_formats()  # now, because Pillow's lazy start is not safe in threads
        store = self.cache / "index" / f"{hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]}.json"
        measured = storage.measure_files(list(chosen), measure, store, f"2, Pillow {PIL.__version__}", fresh)
        pictures, first = [], dict[str, Path]()
        for (file, (part, source, text)), values in zip(chosen.items(), measured, strict=True):
            times = part.times(file.parent)
            if isinstance(values, str):
                self._leave_out(file, values)
            elif times < 1:
                self._leave_out(file, f"{times} repeats are set, by folder or TOML: change that to use it")
            else:
                width, height, digest = values
                if (same := first.setdefault(digest, file)) != file:
                    self._report(file, f"the same picture as {_name(same, root)}, which so counts twice: remove one")
                group = _name(file.parent, root) if file.parent != root else ""
                lines = tuple(line for line in text.splitlines() if line.strip(" ,"))
                caption = " ".join(text.splitlines())
                pictures.append(Picture(file, caption, source, times, width, height, digest, group, lines=lines))
        return pictures

    # ── Captions ──────────────────────────────────────────────────────────────────────────────────────────────────

    def captions(self, part: _Part) -> dict[Path, tuple[str, str]]:
        """(source, text) for each picture to read."""
        by_stem, texts, described = defaultdict(list), {}, self._described(part.files)
        pictures_of = _pictures_by_name(part.files)
        for file in part.files:
            by_stem[captions.stem(file)].append(file)
        for key, same in list(by_stem.items()):  # a caption of A.PNG may be a.txt or A.PNG.txt
            owner = pictures_of.get(captions.folded(key[0], same[0].stem))
            if owner and owner != key and not any(file.suffix.lower() in PICTURES | FOREIGN for file in same):
                by_stem[owner] += by_stem.pop(key)
        for same in by_stem.values():
            pictures = [file for file in same if file.suffix.lower() in PICTURES | FOREIGN]
            files = [file for suffix in part.suffixes for file in same if file.suffix.lower() == suffix]
            if not pictures:
                self.problems += [Problem(file, "a caption without a picture of that name", False) for file in files]
                continue
            own = [(file, file.suffix.lower(), self._read_caption(file)) for file in files]
            for file in self._readable(pictures):
                others = [(file, "given", part.caption), (file, "folder", part.named(file.parent)[1])]
                own_texts = [*own, (file, *described[file])] if file in described else own
                texts[file] = self._choose(own_texts, others)
        return texts

    def _choose(
        self, own: Sequence[tuple[Path, str, str | None]], others: Sequence[tuple[Path, str, str]]
    ) -> tuple[str, str]:
        """(source, text) of the first (file, source, text) with a text; the picture's own with another are reported."""
        source, text = next(((source, text) for _, source, text in (*own, *others) if text), ("none", ""))
        for file, other, differing in own:
            if differing == "":
                self._report(file, f"an empty caption: {_quoted(source, one_line(text))} is used. Write one")
            elif differing and one_line(differing) != one_line(text):
                start = one_line(differing)[:40]
                self._report(file, f"{source} is used, and {other} has another text, {start!r}: keep one")
        return source, text

    def _readable(self, pictures: list[Path]) -> list[Path]:
        """Those pictures of one stem that are read."""
        known = [file for file in pictures if file.suffix.lower() in PICTURES]
        developed = [file for file in known if file.suffix.lower() not in RAW]
        for file in pictures:
            if file not in known:
                self._leave_out(file, f"{file.suffix} files are not read: save it as PNG or JPEG")
            elif developed and file not in developed:
                self._leave_out(file, f"the camera raw of {developed[0].name}, which is used")
        readable = developed or known
        for file in readable[1:]:
            self._report(file, f"shares its name, and so its caption, with {readable[0].name}: rename or remove one")
        return readable

    def _read_caption(self, file: Path) -> str | None:
        """The text of a caption file, with its lines, if it has several; None if it cannot be read."""
        try:
            raw = file.read_bytes()
        except OSError as error:
            self._report(file, f"cannot be read ({error.strerror}): check its permissions")
            return None
        text, encoding = captions.decode(raw)
        if encoding == "unknown":
            self._report(file, "not a text in a known encoding (Shift-JIS, GBK …?), so not used: save it as UTF-8")
            return None
        if encoding == "cp1252":
            start = one_line(text)[:40]
            self._report(file, f"not UTF-8, so read as Western European, {start!r}: if that is wrong, save it as UTF-8")
        lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
        return one_line(text, True) if self.first_line or not one_line(text) else "\n".join(lines)

    def _described(self, files: Sequence[Path]) -> dict[Path, tuple[str, str]]:
        """(file's name, text) for each picture in Hugging Face's metadata files; the nearest file is used."""
        sources = sorted((file for file in files if file.name in METADATA), key=lambda file: -len(file.parts))
        by_name = {unicodedata.normalize("NFC", str(file)): file for file in files} if sources else {}
        texts: dict[Path, tuple[str, str]] = {}
        for source in sources:
            for row in self._rows(source):
                name = str(row.get("file_name"))
                text = self._row_text(source, row, name)
                picture = by_name.get(unicodedata.normalize("NFC", str(source.parent / name)))
                if picture is None or ".." in PurePosixPath(name).parts:
                    self._report(source, f"describes {name!r}, which is not in its folder: it is ignored")
                elif texts.setdefault(picture, (source.name, text))[1] != text:
                    self._report(picture, f"described twice: {texts[picture][0]} of the nearest folder is used")
        return texts

    def _row_text(self, source: Path, row: dict, name: str) -> str:
        """The text of a row, in its column text or caption; another kind of value, and neither column, are reported."""
        text = row.get("text") or row.get("caption") or ""
        if isinstance(text, str) and {"text", "caption"} & row.keys():
            return storage.printable(one_line(text))
        what = f"a {type(text).__name__} as text of {name!r}" if text else f"no text of {name!r}"
        self._report(source, f"{what}: the column text or caption is read, and it has {', '.join(map(str, row))}")
        return ""

    def _rows(self, file: Path) -> list[dict]:
        """The rows of a metadata file, up to the first that cannot be read, which is reported."""
        rows: list[dict] = []
        try:
            lines = io.StringIO(file.read_text("utf-8-sig"))
            if file.suffix == ".csv":
                return list(csv.DictReader(lines))
            for line in filter(str.strip, lines):
                rows.append(dict(json.loads(line)))
        except (OSError, ValueError, TypeError, RecursionError, csv.Error) as error:
            read = _count(len(rows), "row")
            self._report(file, f"cannot be read after {read} ({error}): correct it, or save it as UTF-8")
        return rows


def _pictures_by_name(files: Iterable[Path]) -> dict[tuple[Path, str], tuple[Path, str]]:
    """A picture's name, with suffix or without and whatever its case → its stem."""
    pictures = [file for file in files if file.suffix.lower() in PICTURES | FOREIGN]
    stems = {captions.folded(file.parent, file.stem): captions.stem(file) for file in pictures}
    return stems | {captions.folded(file.parent, file.name): captions.stem(file) for file in pictures}


def _unread(entry: os.DirEntry[str], part: _Part, project: bool) -> str:
    """Why a file or folder is not read; "" if it is.

    Args:
        project: the entry is in the main folder of a project of kohya's GUI.
    """
    path, linked = Path(entry.path), entry.is_symlink()
    kind = path if linked else entry  # an entry knows its kind without a request to the drive
    if linked and path.is_dir():  # a link to a file is followed; archives are unpacked without links
        if Path(os.path.realpath(path)).is_relative_to(part.folder):
            return "a link to a folder that is read anyway: remove it"
        return f"a link to a folder outside, {os.readlink(path)}: copy its pictures here"
    if kind.is_dir() and project and path.name.lower() in PROJECT:
        return "not read: in a project of kohya's GUI, img/ has the pictures to learn"
    if kind.is_dir():
        return "" if part.nested else "a folder in a subset, not read by sd-scripts: make it a subset itself"
    if not kind.is_file():
        return "a broken link, a pipe or a device, not a file: remove it"
    if path.stem.lower().endswith(MASK):
        return "a mask of OneTrainer's, not learned: set `mask` to its folder to use it"
    if path.suffix.lower() in ARCHIVES:
        return "an archive in the folder is not read: unpack it, or scan the archive"
    return ""


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")


# ── Words ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _quoted(source: str, text: str) -> str:
    return f"{captions.excerpt(text, 80)!r} ({source})" if text else "none"


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _natural(name: str) -> tuple:
    """Sort key: folder by folder, 2.png before 10.png, upper and lower case together."""
    parts = [enumerate(re.split(r"(\d+)", part.casefold())) for part in name.split("/")]
    return [[int(text) if i % 2 else text for i, text in part] for part in parts], name


def _missing(path: Path) -> str:
    parent = next(folder for folder in path.parents if folder.is_dir())
    names = sorted(name for name in os.listdir(parent) if not _ignored(name)) if os.access(parent, os.R_OK) else []
    near = difflib.get_close_matches(path.relative_to(parent).parts[0], names, 1)
    listed = ", ".join(_shortened([repr(name) for name in names], 8)) or "nothing"
    return f"{path} does not exist. {parent} contains {listed}." + (f" Did you mean {near[0]!r}?" if near else "")


def _nothing(path: Path, root: Path, files: list[Path], problems: list[Problem]) -> str:
    kinds = Counter(file.suffix.lower() or "no suffix" for file in files).most_common(8)
    counted = f"{_count(len(files), 'file')} ({', '.join(f'{kind} × {n}' for kind, n in kinds)})"
    first = f"{path} has no picture to train on; it contains {counted if files else 'no files'}."
    return "\n".join([first, *_listed(_lines(problems, root)), "Give a folder or zip with PNG, JPEG or WebP pictures."])


def _lines(problems: Iterable[Problem], root: Path) -> list[str]:
    return [f"{_name(problem.path, root)}: {problem.reason}" for problem in problems]


def _shortened(items: list[str], most: int) -> list[str]:
    return items if len(items) <= most else [*items[: most - 1], f"… and {len(items) - most + 1} more"]


def _listed(items: Iterable[str]) -> list[str]:
    return [f"  {item}" for item in _shortened(list(items), 10)]


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("s" if n != 1 else "")
