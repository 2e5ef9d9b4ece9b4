"""Read, edit and write captions, and generate their training variants.

Many captions are edited at once by pure functions, {name: caption} → {name: caption}; `caption_changes` lists the
differences, `write_captions` writes them and keeps the old files, and `undo_captions` restores these byte for byte. A
name is a picture's path relative to the dataset's root, as in "5_cat/1.png".
"""

import base64
import hashlib
import json
import math
import os
import re
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from lorakit import storage
from lorakit.config import Config
from lorakit.dataset.picture import PICTURES

SUFFIXES = (".txt", ".caption")  # of caption files: if a picture has both, the first with a text is used
# Faces among the booru tags, whose underscores are not spaces.
KAOMOJI = {"0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@", "^_^"}
KAOMOJI |= {"o_o", "u_u", "x_x", "|_|", "||_||"}
LITERAL = "which is learned to the letter: a caption is plain text"
CHOICE = re.compile(r"(\{\{|\}\}|\{[^{}]+\})")
MARKUP = {  # signs of other programs, which a text encoder reads as they stand
    "choices (caption_choices draws one)": re.compile(r"\{[^{}]*\|[^{}]*\}"),
    "a tag of A1111": re.compile(r"<(?:lora|lyco|hypernet):[^>]*>"),
    "a weight": re.compile(r"\([^()]+:\d*\.?\d+\)"),
    "an HTML escape": re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#\d+);"),
    "JSON": re.compile(r"\s*(?:\{\s*\"|\[\s*[\[{\"]).*[\]}]\s*", re.DOTALL),
}
CONTROL = re.compile(r"[\0-\x08\x0e-\x1f\x7f]")  # no text has these
WESTERN = re.compile(  # letters with accents come single or in pairs; other encodings have longer runs of such bytes
    rb"(?:[\t\n\r\f -~]|[\xc0-\xd6\xd8-\xf6\xf8-\xff\x85\x91-\x97\xa0\xa1\xa9\xab\xb0\xbb\xbf]{1,2}(?![\x80-\xff]))*"
)
LETTER = r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"  # of scripts that separate words by spaces


def split_tags(caption: str) -> list[str]:
    """The comma-separated parts of a caption, without empty ones."""
    return [tag for tag in (part.strip() for part in caption.split(",")) if tag]


def markup(captions: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Signs of other programs that would be learned to the letter, as "a weight, '(red:1.3)'" → names of captions."""
    names: dict[str, list[str]] = {}
    for name, caption in captions.items():
        for kind, pattern in MARKUP.items():
            match = pattern.fullmatch(caption) if kind == "JSON" else pattern.search(caption)
            if match:
                names.setdefault(f"{kind}, {match[0][:40]!r}", []).append(name)
    return {sign: tuple(found) for sign, found in names.items()}


# ── For training ────────────────────────────────────────────────────────────────────────────────────────────────────


def caption_variants(lines: Sequence[str], config: Config) -> tuple[str, ...]:
    """The variants of a caption that a run draws from, each encoded once; one if nothing varies.

    A variant is one of the lines, with one text of each choice {a|b}, tags shuffled and dropped, and separators
    replaced, as the config asks. Lines, and texts of choices, occur equally often where `caption_variants` allows it.

    Args:
        lines: of the caption; one if the config joins them.

    Source: sd-scripts (`enable_wildcard`, `keep_tokens_separator`, `secondary_separator`, `keep_tokens`).
    """
    forms = [_choices(line, config) for line in lines]
    free = _sections(lines[0], config)[1]
    shuffled = config.tag_dropout and free or (config.shuffle_captions and len(free) > 1)
    if not (shuffled or len(forms) > 1 or any(len(texts) > 1 for texts in forms[0])):
        return (plain_caption(lines, config),)
    digest = int(hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16], 16)
    turns, variants = max(1, config.caption_variants // len(forms)), []
    for number in range(max(config.caption_variants, len(forms))):
        seeds = [config.seed, digest, number]
        text = _chosen(forms[number % len(forms)], number // len(forms), turns, np.random.default_rng([*seeds, 1]))
        variants.append(_formed(text, config, np.random.default_rng(seeds)))
    return tuple(variants)


def plain_caption(lines: Sequence[str], config: Config) -> str:
    """The caption without chance: the first line, the first text of each choice, all tags in their order."""
    return _formed("".join(texts[0] for texts in _choices(lines[0], config)), config)


def _choices(line: str, config: Config) -> list[list[str]]:
    """The parts of a line, each with the texts to choose from; {{ and }} stand for braces."""
    if not config.caption_choices:
        return [[line]]
    braces = {"{{": ["{"], "}}": ["}"]}
    return [
        braces.get(part) or (part[1:-1].split("|") if place % 2 else [part])
        for place, part in enumerate(CHOICE.split(line))
    ]


def _chosen(form: Sequence[Sequence[str]], turn: int, turns: int, random: np.random.Generator) -> str:
    """A line with its choices made: all combinations in turn if there are enough turns, else one at random."""
    combinations = math.prod(map(len, form))
    rest = turn % combinations if combinations <= turns else int(random.integers(combinations))
    chosen = []
    for texts in form:
        rest, place = divmod(rest, len(texts))
        chosen.append(texts[place])
    return "".join(chosen)


def _sections(text: str, config: Config) -> tuple[list[str], list[str], list[str]]:
    """The tags that keep their place in front, those that are shuffled and dropped, and those that stay at the end."""
    if (separator := config.keep_tokens_separator) and separator in text:
        first, _, rest = text.partition(separator)
        middle, _, last = rest.partition(separator)
        return split_tags(first), split_tags(middle), split_tags(last)
    tags = split_tags(text)
    return tags[: config.keep_tokens], tags[config.keep_tokens :], []


def _formed(text: str, config: Config, random: np.random.Generator | None = None) -> str:
    """A text with its tags shuffled and dropped, if `random` is given, and with its separators replaced."""
    first, free, last = _sections(text, config)
    if random and (config.shuffle_captions or config.tag_dropout):
        keys, kept = random.random(len(free)), random.random(len(free)) >= config.tag_dropout
        order = np.argsort(keys, kind="stable") if config.shuffle_captions else np.arange(len(free))
        free = [free[i] for i in order if kept[i]]
    elif not any(sign and sign in text for sign in (config.keep_tokens_separator, config.secondary_separator)):
        return text
    joined = ", ".join(first + free + last)
    return ", ".join(split_tags(joined.replace(sign, ","))) if (sign := config.secondary_separator) else joined


def trigger_pattern(trigger: str) -> re.Pattern[str]:
    """Matches the trigger as whole words in any case; Chinese, Japanese and Korean letters may touch it."""
    return re.compile(rf"(?<!{LETTER}){re.escape(trigger)}(?!{LETTER})", re.IGNORECASE)


def without_trigger(caption: str, trigger: str, class_word: str) -> str:
    """The caption of the class: the trigger replaced by the class word, which is not repeated after it."""
    if not trigger or not trigger_pattern(trigger).search(caption):
        return caption
    repeated = rf"(?:\s+{re.escape(class_word)}(?!{LETTER}))?" if class_word else ""
    pattern = trigger_pattern(trigger).pattern + repeated
    return one_line(re.sub(pattern, lambda _: class_word, caption, flags=re.IGNORECASE))


# ── Many at once ────────────────────────────────────────────────────────────────────────────────────────────────────


def apply_template(
    captions: Mapping[str, str], form: str = "a photo of {trigger}, {caption}", trigger: str = ""
) -> dict[str, str]:
    """The captions in a form; one that already has it is unchanged. "red, {caption}" is a prefix.

    Raises:
        ValueError: the form has another field than {caption} and {trigger}, or no trigger is given for it.
    """
    fields = set(re.findall("{(.*?)}", form)) - {"caption"}
    if fields - {"trigger"} or (fields and not trigger):
        raise ValueError(f"form {form!r}: there is no value for {', '.join(fields)}. Use {{caption}}; give a trigger.")
    before, has_caption, after = form.replace("{trigger}", trigger).partition("{caption}")
    bare = (before + after).strip(" ,")

    def formed(caption: str) -> str:
        if not has_caption:
            return bare
        complete = caption == bare or (caption and caption.startswith(before) and caption.endswith(after))
        return caption if complete else (before + caption + after).strip(" ,")

    return {name: formed(caption) for name, caption in captions.items()}


def replace_text(captions: Mapping[str, str], find: str, by: str, *, regex: bool = False) -> dict[str, str]:
    r"""The captions with each occurrence of a text replaced.

    Args:
        find: the text, in its case; with `regex` a pattern of Python's `re`.
        by: the new text; with `regex` it may name groups: \1, \g<name>.

    Raises:
        ValueError: `find` is empty, or the pattern is invalid.
    """
    if not find:
        raise ValueError("There is no text to find: give at least one character.")
    try:
        pattern = re.compile(find if regex else re.escape(find))
        return {name: pattern.sub(by if regex else lambda _: by, caption) for name, caption in captions.items()}
    except (re.error, IndexError) as error:  # an unknown group's name is an IndexError
        raise ValueError(f"{find!r} → {by!r} cannot be used: {error}. Write \\ before each of . ( [ + ? *") from error


def spaced(tag: str) -> str:
    """A booru tag as words, "long_hair" → "long hair"; faces such as ^_^ are unchanged."""
    return tag if tag in KAOMOJI else tag.replace("_", " ")


def retag(
    captions: Mapping[str, str], *, add: Sequence[str] = (), remove: Sequence[str] = (), keep: int = 0,
    spaces: bool = False, lower: bool = False, unique: bool = False, sort: bool = False,
) -> dict[str, str]:  # fmt: skip
    """The captions with their tags, the parts between commas, edited; in this order:

    Args:
        keep: so many tags in front, usually the trigger, are neither removed nor sorted.
        spaces: replace underscores by spaces.
        lower: write tags in lower case.
        remove: leave out these tags, in any case.
        add: append these tags to captions that lack them.
        unique: keep only the first occurrence of each tag.
        sort: sort alphabetically.
    """
    unwanted = {tag.strip().lower() for tag in remove}

    def edited(caption: str) -> str:
        tags = [spaced(tag) if spaces else tag for tag in split_tags(caption)]
        tags = [tag.lower() if lower else tag for tag in tags]
        kept, rest = tags[:keep], [tag for tag in tags[keep:] if tag.lower() not in unwanted]
        rest += [tag for tag in add if tag not in kept + rest]
        if unique:
            rest = [tag for tag in dict.fromkeys(rest) if tag not in kept]
        return ", ".join(kept + (sorted(rest, key=str.lower) if sort else rest))

    return {name: edited(caption) for name, caption in captions.items()}


# ── Changes: shown, written, undone ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Change:
    name: str
    before: str
    after: str


def caption_changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[Change]:
    """The captions that differ, in the order of `after`; a name that `before` lacks counts as without a caption."""
    pairs = [Change(name, before.get(name, ""), caption) for name, caption in after.items()]
    return [change for change in pairs if change.before != change.after]


def describe_changes(changes: Sequence[Change], most: int = 20) -> str:
    """Changes as text, three lines each, the first `most` of them."""
    lines = [f"{len(changes)} caption{'s' * (len(changes) != 1)} would change" + ":" * bool(changes)]
    for change in changes[:most]:
        common = len(os.path.commonprefix([change.before, change.after]))
        old, new = (excerpt(text, from_=common - 80) for text in (change.before, change.after))
        lines.append(f"{change.name}\n  - {old}\n  + {new}")
    return "\n".join(lines + [f"… and {len(changes) - most} more"] * (len(changes) > most))


def excerpt(text: str, most: int = 300, from_: int = 0) -> str:
    """A text of any length for people: `most` characters of a long one, from a place on."""
    start = max(0, from_) if len(text) > most else 0
    return "…" * (start > 0) + text[start : start + most] + "…" * (len(text) > start + most)


def store() -> Path:
    """The folder with this user's old captions and drafts."""
    return storage.user_cache() / "captions"


def write_captions(
    changes: Sequence[Change], root: Path, *, into: Path | None = None, history: Path | None = None, edit: str = ""
) -> list[Path]:
    """Write changed captions, all of them or none, and keep the old files for `undo_captions`.

    Args:
        root: of the dataset.
        into: folder for the files, in the root's subfolders; by default the root, next to the pictures.
        history: file that keeps the old captions; by default one for each root, in `store`.
        edit: name of the edit; writes with the same name are undone together.

    Returns:
        The files written.

    Raises:
        ValueError: a caption file was edited since it was read, or is shared by two pictures.
        OSError: a file cannot be written; all others are unchanged.
    """
    if not changes:
        return []
    places = caption_files([change.name for change in changes], Path(into or root).absolute())
    old = {path: path.read_bytes() if path.exists() else None for path in places.values()}
    texts = {path: {caption_text(raw or b""), caption_text(raw or b"", True)} for path, raw in old.items()}
    stale = [change.name for change in changes if not texts[places[change.name]] & {change.before, change.after, ""}]
    if stale:
        raise ValueError(f"Captions were edited meanwhile: {', '.join(stale[:10])}. None is written; scan again.")
    new = {path: _in_lines(old[path] or b"", change) + "\n" for change in changes for path in [places[change.name]]}
    kept = {str(p): [None if raw is None else base64.b64encode(raw).decode(), new[p]] for p, raw in old.items()}
    history = history or _history(root)
    history.parent.mkdir(parents=True, exist_ok=True)
    storage.append_lines(history, json.dumps({"edit": edit or f"{time.time_ns()}", "files": kept}) + "\n")
    try:
        for path, caption in new.items():
            _put(path, caption.encode())
    except BaseException:
        _take_back(history, 1)
        raise
    return list(new)


def _in_lines(raw: bytes, change: Change) -> str:
    """A changed caption in lines as the file has them: a line ends after the same words as before."""
    lines = [line for line in map(one_line, decode(raw)[0].splitlines()) if line]
    if len(lines) > 1 and change.before == lines[0]:  # only the first one is used
        return "\n".join([change.after, *lines[1:]])
    words, after = change.before.split(), change.after.split()
    if len(lines) < 2 or " ".join(lines) != change.before or not after:
        return change.after
    ends, steps = [], SequenceMatcher(None, words, after, autojunk=False).get_opcodes()
    for end in accumulate(len(line.split()) for line in lines[:-1]):
        kind, start, _, new_start, new_end = next(step for step in steps if step[1] < end <= step[2])
        ends.append(new_start + end - start if kind == "equal" else new_end)
    pieces = [after[a:b] for a, b in pairwise([0, *ends, len(after)])]
    return "\n".join(" ".join(piece) for piece in pieces if piece)


def undo_captions(root: Path, *, history: Path | None = None) -> list[Path]:
    """Restore the files, byte for byte, from before the last edit by `write_captions`; again: from the edit before.

    Returns:
        The restored files; those that did not exist are removed.

    Raises:
        ValueError: there is no edit to undo, or a caption was edited since, which would be lost.
    """
    history = history or _history(root)
    lines = lines_of(history)
    if not lines:
        raise ValueError(f"There are no earlier captions of {Path(root).name}: there is nothing to undo.")
    last = [line["edit"] == lines[-1]["edit"] for line in lines]
    return _take_back(history, next((i for i, same in enumerate(reversed(last)) if not same), len(last)))


def _take_back(history: Path, count: int) -> list[Path]:
    """Undo the last so many lines of a history, and remove them from it."""
    lines = lines_of(history)
    versions: dict[Path, list[bytes | None]] = {}  # contents of each file, oldest first
    for line in lines[-count:]:
        for path, (old, new) in line["files"].items():
            versions.setdefault(Path(path), [None if old is None else base64.b64decode(old)]).append(new.encode())
    edited = [path.name for path, known in versions.items() if path.exists() and path.read_bytes() not in known]
    if edited:
        raise ValueError(
            f"Captions were edited after they were written: {', '.join(edited[:10])}. Undoing would lose these edits, "
            "so no file is changed; remove or move those files, then undo again."
        )
    for path, known in versions.items():
        _put(path, known[0])
    with storage.write_file(history) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines[:-count]), encoding="utf-8")
    return list(versions)


def _put(path: Path, raw: bytes | None) -> None:
    """Write a file's contents; None removes it."""
    if raw is None:
        path.unlink(missing_ok=True)
    elif not path.exists() or path.read_bytes() != raw:
        with storage.write_file(path) as partial:
            partial.write_bytes(raw)


def _history(root: Path) -> Path:
    root = Path(root).resolve()
    return store() / f"{root.name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.jsonl"


def lines_of(path: Path) -> list[dict]:
    """The lines of a JSON lines file, without one that a killed program left incomplete; [] if there is no file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def caption_files(names: Iterable[str], folder: Path) -> dict[str, Path]:
    """The caption file of each picture: the existing one, else the `.txt` to write.

    Args:
        names: of pictures, relative to `folder`.

    Raises:
        ValueError: two pictures share a file.
    """
    pictures = {name: Path(folder, name) for name in names}
    existing: dict[tuple[tuple[Path, str], str], Path] = {}
    for parent in {picture.parent for picture in pictures.values()}:
        files_here = sorted(parent.iterdir()) if parent.is_dir() else []
        stems = {stem(file) for file in files_here if file.suffix.lower() in PICTURES}
        for file in files_here:
            existing[stem(file), file.suffix.lower()] = file
            if stem(file) not in stems:  # else it is that picture's
                existing.setdefault((folded(file.parent, file.stem), file.suffix.lower()), file)
    files: dict[str, Path] = {}
    owner: dict[Path, str] = {}
    for name, picture in pictures.items():
        own = (stem(picture), folded(picture.parent, picture.stem), folded(picture.parent, picture.name))
        keys = [(key, suffix) for key in own for suffix in SUFFIXES if (key, suffix) in existing]
        files[name] = existing[keys[0]] if keys else picture.with_suffix(".txt")
        if owner.setdefault(files[name], name) != name:
            raise ValueError(f"{owner[files[name]]} and {name} share the caption {files[name].name}: rename one.")
    return files


def stem(file: Path) -> tuple[Path, str]:
    """A file's folder, and its name without suffix: macOS decomposes accents, other systems do not."""
    return file.parent, unicodedata.normalize("NFC", file.stem)


def folded(folder: Path, name: str) -> tuple[Path, str]:
    """A folder, and a name in it whatever its case; a character that no file name has keeps it apart from `stem`."""
    return folder, "/" + unicodedata.normalize("NFC", name).casefold()


def decode(raw: bytes) -> tuple[str, str]:
    """A caption file's text and encoding: UTF-8; UTF-16 and UTF-32, with their mark or without; Western European.

    For others (Shift-JIS, GBK …), and for files that are no text, the encoding is "unknown" and the text empty: a wrong
    guess would be learned.
    """
    marks = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    marked = [encoding for mark, encoding in marks.items() if raw.startswith(mark)][:1]
    order = (
        "be" if raw[::2].count(0) > raw[1::2].count(0) else "le"
    )  # letters of Latin text have a NUL in front, or after
    for encoding in marked or ["utf-8-sig", "utf-32-le", "utf-32-be", f"utf-16-{order}"]:
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            continue
        certain = marked or encoding == "utf-8-sig" or b"\0" in raw  # else any two letters would be a Chinese one
        if certain and not ("\0" in text if encoding == "utf-8-sig" else CONTROL.search(text)):
            return text, encoding
    return (raw.decode("cp1252"), "cp1252") if WESTERN.fullmatch(raw) else ("", "unknown")


def one_line(text: str, first_line: bool = False) -> str:
    """A text, or only its first line, with single spaces; "" if it has nothing but commas."""
    line = " ".join((text.strip().partition("\n")[0] if first_line else text).split())
    return line if line.strip(" ,") else ""


def caption_text(raw: bytes, first_line: bool = False) -> str:
    """The caption in a caption file's bytes, as `scan` reads it."""
    return one_line(decode(raw)[0], first_line)
