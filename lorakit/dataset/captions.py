"""Captions: what a text encoder is told of a picture, and what is varied of it from one step to the next.

Many are edited at once by pure functions, {name: caption} → {name: caption}; `changes` shows what they would do,
`write` does it and keeps what was there, and `undo` brings that back to the byte. A name is a picture's path relative
to the dataset's root, as in "5_cat/1.png".
"""

import base64
import hashlib
import json
import os
import re
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorakit import storage

SUFFIXES = (".txt", ".caption")  # of caption files: where a picture has both, the first is used
# Faces among the booru tags, whose underscores are no spaces.
KAOMOJI = {"0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@", "^_^"}
KAOMOJI |= {"o_o", "u_u", "x_x", "|_|", "||_||"}
LETTER = r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"  # of scripts that part words by spaces


def tags(caption: str) -> list[str]:
    """The comma-separated parts of a caption, without empty ones."""
    return [tag for tag in (part.strip() for part in caption.split(",")) if tag]


def caption_variants(
    caption: str, count: int, *, shuffle: bool = False, keep_tokens: int = 0, tag_dropout: float = 0.0, seed: int = 0
) -> tuple[str, ...]:
    """The forms of a caption that a run draws from, each encoded once.

    Args:
        count: how many; one is enough, and given, where nothing is varied.
        shuffle: put the tags into another order in each.
        keep_tokens: so many tags in front keep their place and are never dropped: the trigger's, most of all. The
            name is sd-scripts'; what it counts is tags there too.
        tag_dropout: the probability that a tag is left out.
        seed: with the caption's own words, all that chance depends on.
    """
    fixed, free = tags(caption)[:keep_tokens], tags(caption)[keep_tokens:]
    if not free or not (tag_dropout or (shuffle and len(free) > 1)):
        return (caption,)
    own = int(hashlib.sha256(caption.encode()).hexdigest()[:16], 16)
    found = []
    for number in range(count):
        random = np.random.default_rng([seed, own, number])
        keys, kept = random.random(len(free)), random.random(len(free)) >= tag_dropout
        order = np.argsort(keys, kind="stable") if shuffle else np.arange(len(free))
        found.append(", ".join(fixed + [free[i] for i in order if kept[i]]))
    return tuple(found)


def trigger_pattern(trigger: str) -> re.Pattern:
    """What finds the trigger as words of their own, whatever its capitals; Chinese, Japanese, Korean may touch it."""
    return re.compile(rf"(?<!{LETTER}){re.escape(trigger)}(?!{LETTER})", re.IGNORECASE)


def without_trigger(caption: str, trigger: str, class_word: str) -> str:
    """The caption of the class: the trigger exchanged for the word of what it is one of, which is not said twice."""
    if not trigger or not trigger_pattern(trigger).search(caption):
        return caption
    beside = rf"(?:\s+{re.escape(class_word)}(?!{LETTER}))?" if class_word else ""
    return " ".join(
        re.sub(trigger_pattern(trigger).pattern + beside, lambda _: class_word, caption, flags=re.IGNORECASE).split()
    )


# ── Many at once ────────────────────────────────────────────────────────────────────────────────────────────────────


def captions_of(pictures) -> dict[str, str]:
    """The captions of a dataset's pictures (a `dataset.Dataset`), by name."""
    return {p.known_as.relative_to(pictures.root).as_posix(): p.caption for p in pictures.pictures}


def apply_template(
    captions: Mapping[str, str], form: str = "a photo of {trigger}, {caption}", trigger: str = ""
) -> dict[str, str]:
    """Captions put into a form; one that has it already stays as it is. "red, {caption}" is a prefix.

    Raises:
        ValueError: the form has another field than {caption} and {trigger}, or asks for a trigger that is not given.
    """
    fields = set(re.findall("{(.*?)}", form)) - {"caption"}
    if fields - {"trigger"} or (fields and not trigger):
        raise ValueError(f"form {form!r}: nothing is known of {', '.join(fields)}. Use {{caption}}; give a trigger.")
    before, has_caption, after = form.replace("{trigger}", trigger).partition("{caption}")
    bare, found = (before + after).strip(" ,"), {}
    for name, caption in captions.items():
        formed = caption == bare or (caption and caption.startswith(before) and caption.endswith(after))
        full = (before + caption + after).strip(" ,")
        found[name] = bare if not has_caption else caption if formed else full
    return found


def replace_text(captions: Mapping[str, str], find: str, by: str, *, regex: bool = False) -> dict[str, str]:
    r"""Captions with each occurrence of a text exchanged.

    Args:
        find: as it stands, capitals included; with `regex` a pattern of Python's `re`.
        by: the new text; with `regex` it may name groups: \1, \g<name>.

    Raises:
        ValueError: nothing to find, or the pattern is broken.
    """
    if not find:
        raise ValueError("There is no text to find: give at least one character.")
    try:
        pattern = re.compile(find if regex else re.escape(find))
        return {name: pattern.sub(by if regex else lambda _: by, caption) for name, caption in captions.items()}
    except (re.error, IndexError) as error:  # an unknown group's name is an IndexError
        raise ValueError(f"{find!r} → {by!r} cannot be used: {error}. Write \\ before each of . ( [ + ? *") from error


def spaced(tag: str) -> str:
    """A booru tag as words, "long_hair" → "long hair"; a face such as ^_^ is kept."""
    return tag if tag in KAOMOJI else tag.replace("_", " ")


def retag(
    captions: Mapping[str, str], *, add: Sequence[str] = (), remove: Sequence[str] = (), keep: int = 0,
    spaces: bool = False, lower: bool = False, unique: bool = False, sort: bool = False,
) -> dict[str, str]:  # fmt: skip
    """Captions with their tags, the parts between commas, edited; in this order:

    Args:
        keep: so many tags in front, the trigger's most of all, are neither removed nor sorted.
        spaces: underscores become spaces.
        lower: capitals become small letters.
        remove: tags to leave out, whatever their capitals.
        add: tags to put at the end of a caption that has not got them.
        unique: each tag stays where it comes first, and nowhere else.
        sort: by the alphabet.
    """
    unwanted = {tag.strip().lower() for tag in remove}

    def edited(caption: str) -> str:
        found = [spaced(tag) if spaces else tag for tag in tags(caption)]
        found = [tag.lower() if lower else tag for tag in found]
        kept, rest = found[:keep], [tag for tag in found[keep:] if tag.lower() not in unwanted]
        rest += [tag for tag in add if tag not in kept + rest]
        if unique:
            rest = [tag for tag in dict.fromkeys(rest) if tag not in kept]
        return ", ".join(kept + (sorted(rest, key=str.lower) if sort else rest))

    return {name: edited(caption) for name, caption in captions.items()}


# ── Seen before it is done, and undone ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Change:
    name: str
    before: str
    after: str


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[Change]:
    """What differs, in the order of `after`; names of which nothing was known before count as without a caption."""
    pairs = [Change(name, before.get(name, ""), caption) for name, caption in after.items()]
    return [change for change in pairs if change.before != change.after]


def preview(found: Sequence[Change], most: int = 20) -> str:
    """Changes as text, three lines each, the first `most` of them."""
    lines = [f"{len(found)} caption{'s' * (len(found) != 1)} would change" + ":" * bool(found)]
    lines += [f"{change.name}\n  - {change.before}\n  + {change.after}" for change in found[:most]]
    return "\n".join(lines + [f"… and {len(found) - most} more"] * (len(found) > most))


def store() -> Path:
    """Where old captions and drafts are kept for this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit" / "captions"


def write_captions(
    found: Sequence[Change], root: Path, *, into: Path | None = None, history: Path | None = None, edit: str = ""
) -> list[Path]:
    """Write changed captions, all of them or none, and keep what was there for `undo`.

    Args:
        root: of the dataset.
        into: folder that gets the files, in subfolders as in the root; by default the root: beside the pictures.
        history: file that keeps the old captions; by default one for each root, in `store`.
        edit: what is done, for writes that are to be undone together.

    Returns:
        The files written.

    Raises:
        ValueError: a caption file does not hold what is to be changed any more, or is shared by two pictures.
        OSError: one cannot be written; the others are as they were.
    """
    if not found:
        return []
    places = caption_files([change.name for change in found], Path(into or root).absolute())
    old = {path: path.read_bytes() if path.exists() else None for path in places.values()}
    said = {path: {caption_text(raw), caption_text(raw, first_line=True)} if raw else {""} for path, raw in old.items()}
    stale = [c.name for c in found if not said[places[c.name]] & {c.before, c.after, ""}]
    if stale:
        raise ValueError(f"Captions were edited meanwhile: {', '.join(stale[:10])}. Nothing is written; scan again.")
    new = {places[change.name]: change.after + "\n" for change in found}
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


def undo_captions(root: Path, *, history: Path | None = None) -> list[Path]:
    """Bring back what was there before the last edit that `write` was told of, to the byte; again: the one before.

    Returns:
        The files brought back; those that did not exist are removed.

    Raises:
        ValueError: there is nothing to undo, or a caption has been edited since, which would be lost.
    """
    history = history or _history(root)
    lines = lines_of(history)
    if not lines:
        raise ValueError(f"Nothing is known of earlier captions of {Path(root).name}: there is nothing to undo.")
    last = [line["edit"] == lines[-1]["edit"] for line in lines]
    return _take_back(history, next((i for i, same in enumerate(reversed(last)) if not same), len(last)))


def _take_back(history: Path, count: int) -> list[Path]:
    """Undo the last so many lines of a history, and forget them."""
    lines = lines_of(history)
    known: dict[Path, list[bytes | None]] = {}  # what a file held, oldest first, and holds now
    for line in lines[-count:]:
        for path, (old, new) in line["files"].items():
            known.setdefault(Path(path), [None if old is None else base64.b64decode(old)]).append(new.encode())
    edited = [path.name for path, held in known.items() if path.exists() and path.read_bytes() not in held]
    if edited:
        raise ValueError(
            f"Captions were edited after they were written: {', '.join(edited[:10])}. Undoing would lose that, so "
            "nothing is done; remove or move those files, then undo again."
        )
    for path, held in known.items():
        _put(path, held[0])
    with storage.write_file(history) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines[:-count]), encoding="utf-8")
    return list(known)


def _put(path: Path, raw: bytes | None) -> None:
    """Let a file hold this, whole; None: let there be none."""
    if raw is None:
        path.unlink(missing_ok=True)
    elif not path.exists() or path.read_bytes() != raw:
        with storage.write_file(path) as partial:
            partial.write_bytes(raw)


def _history(root: Path) -> Path:
    root = Path(root).resolve()
    return store() / f"{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:16]}.jsonl"


def lines_of(path: Path) -> list[dict]:
    """The lines of a JSON lines file, without one that a killed machine left unfinished; [] if there is no file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def caption_files(names: Iterable[str], folder: Path) -> dict[str, Path]:
    """The caption file of each picture, one that is there or else the `.txt` to make.

    Args:
        names: of pictures.
        folder: that the names are relative to.

    Raises:
        ValueError: two pictures share a file.
    """
    names = list(names)
    there = {}
    for parent in {Path(folder, name).parent for name in names}:
        for file in parent.iterdir() if parent.is_dir() else ():
            if (suffix := file.suffix.lower()) in SUFFIXES:
                there[_stem(file), suffix] = file
    found, owner = {}, {}
    for name in names:
        picture = Path(folder, name)
        candidates = [there[_stem(picture), suffix] for suffix in SUFFIXES if (_stem(picture), suffix) in there]
        found[name] = candidates[0] if candidates else picture.with_suffix(".txt")
        if owner.setdefault(found[name], name) != name:
            raise ValueError(f"{owner[found[name]]} and {name} share the caption {found[name].name}: rename one.")
    return found


def caption_text(raw: bytes, first_line: bool = False) -> str:
    """A caption file's bytes as `dataset.scan` reads them: one line, UTF-8, else UTF-16 by its mark, else cp1252."""
    wide = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        said = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        said = raw.decode("cp1252", "replace")
    return " ".join((said.strip().partition("\n")[0] if first_line else said).split())


def _stem(file: Path) -> tuple[Path, str]:
    return file.parent, unicodedata.normalize("NFC", file.stem)  # macOS takes accents apart, other systems do not
