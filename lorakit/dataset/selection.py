"""A person's decisions about pictures: left out, fine as they are, replaced. The dataset's folder is only read."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorakit import storage
from lorakit.config import Config
from lorakit.dataset.folder import Dataset, Problem, is_remote, picture_name, scan
from lorakit.dataset.picture import open_picture

DEMO = Path(__file__).parents[1] / "demo" / "pictures"


@dataclass(frozen=True)
class Decisions:
    """Decisions about pictures, by name. They are kept with the run, not in the dataset's folder."""

    leave_out: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()  # seen, and fine: `check_quality` reports nothing about them
    replace: Mapping[str, str] = field(default_factory=dict)  # name → file that replaces the picture


def save_decisions(decisions: Decisions, path: str | Path, source: str | Path) -> None:
    """Write the decisions about a folder or archive into a file, which keeps those about others."""
    others = _read(path).get("of", {}) if Path(path).exists() else {}
    contents = {"last": _key(source), "of": others | {_key(source): vars(decisions)}}
    with storage.write_file(path) as partial:
        partial.write_text(json.dumps(contents, indent=2) + "\n", "utf-8")


def load_decisions(path: str | Path, source: str | Path) -> Decisions:
    """The decisions about a folder or archive; none if the file has only those about others.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has other contents.
    """
    try:
        entry = _read(path)["of"].get(_key(source)) or {"leave_out": (), "keep": (), "replace": {}}
        return Decisions(tuple(entry["leave_out"]), tuple(entry["keep"]), dict(entry["replace"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _foreign(path, error) from error


def last_source(path: str | Path) -> Path | None:
    """The folder or archive of the last decisions, if it still exists."""
    try:
        source = Path(_read(path)["last"])
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return source if source.exists() else None


def _read(path: str | Path) -> dict:
    try:
        return dict(json.loads(Path(path).read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise _foreign(path, error) from error


def _foreign(path: str | Path, error: Exception) -> ValueError:
    return ValueError(f"{path} has no decisions about pictures ({error!r}): delete it and decide again")


def _key(source: str | Path) -> str:
    return str(Path(source).expanduser().resolve())


def apply_decisions(dataset: Dataset, decisions: Decisions) -> Dataset:
    """The dataset after the decisions: pictures left out become problems. No file changes.

    A replaced picture keeps its caption and repeats.

    Raises:
        ValueError: no picture has a name, a replacement cannot be decoded, or all pictures are left out.
        FileNotFoundError: a replacement does not exist.
    """
    by_name = dataset.by_name
    for unknown in {*decisions.leave_out, *decisions.replace} - set(by_name):
        near = difflib.get_close_matches(unknown, by_name, 1)
        raise ValueError(f"no picture is named {unknown!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    for name, path in decisions.replace.items():
        width, height = open_picture(path).size
        digest, original = hashlib.sha256(Path(path).read_bytes()).hexdigest(), by_name[name]
        by_name[name] = replace(
            original, path=Path(path), width=width, height=height, digest=digest, instead_of=original.known_as
        )
    kept = tuple(picture for name, picture in by_name.items() if name not in decisions.leave_out)
    if not kept:
        raise ValueError(f"all {len(by_name)} pictures are left out: keep some")
    left_out = (Problem(dataset.root / name, "left out, as decided") for name in dict.fromkeys(decisions.leave_out))
    return replace(dataset, pictures=kept, problems=(*dataset.problems, *left_out))


def scan_dataset(config: Config) -> Dataset:
    """The run's pictures after the user's decisions; pictures on Google Drive are copied to local disk once.

    Masks and regularisation pictures in a folder inside the dataset are not learned as pictures of it.

    Raises:
        ValueError, FileNotFoundError: as `scan`, `load_decisions` and `apply_decisions`.
    """
    path = DEMO if config.dataset == "demo" else config.dataset
    pictures = scan(path, repeats=config.repeats, copy=is_remote(path))
    for name in ("mask", "regularisation"):
        pictures = _without(pictures, Path(path).expanduser().resolve(), getattr(config, name), name)
    if not config.decisions:
        return pictures
    decisions = load_decisions(config.decisions, path)
    names = pictures.by_name.keys()
    present = tuple(name for name in decisions.leave_out if name in names)  # missing ones are left out anyway
    return apply_decisions(pictures, replace(decisions, leave_out=present))


def _without(dataset: Dataset, source: Path, folder: str | None, setting: str) -> Dataset:
    """The dataset without a folder in it that a setting names.

    Args:
        source: the dataset's folder, of which `dataset` may be a copy.

    Raises:
        ValueError: no picture is left.
    """
    inner = Path(folder or "").expanduser().resolve()
    if not folder or inner == source or not inner.is_relative_to(source):
        return dataset
    start = f"{inner.relative_to(source).as_posix()}/"
    kept = tuple(p for p in dataset.pictures if not picture_name(p.known_as, dataset).startswith(start))
    if not kept:
        raise ValueError(f"all pictures of the dataset are in {start}, which is the setting `{setting}`: move them")
    problems = [p for p in dataset.problems if not picture_name(p.path, dataset).startswith(start)]
    count = len(dataset) - len(kept)
    problems.append(Problem(dataset.root / start, f"{count} pictures of the setting `{setting}`: not learned", True))
    return replace(dataset, pictures=kept, problems=tuple(problems))
