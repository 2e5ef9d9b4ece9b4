"""What a person decided about pictures: left out, fine as they are, replaced. The user's folder stays as it is."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorakit import storage
from lorakit.dataset.folder import Dataset, Problem
from lorakit.dataset.picture import open_picture


@dataclass(frozen=True)
class Decisions:
    """What to do about pictures, by name. Kept beside the run: the dataset's folder stays as it is."""

    leave_out: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()  # seen, and fine: `check` takes it
    replace: Mapping[str, str] = field(default_factory=dict)  # name: file that takes the picture's place


def save_decisions(decisions: Decisions, path: str | Path, source: str | Path) -> None:
    """Keep what was decided about a folder or archive, beside what was about others."""
    read = _read(path) if Path(path).exists() else {}
    own = {_key(source): vars(decisions)}
    with storage.write_file(path) as partial:
        text = json.dumps({"last": _key(source), "of": read.get("of", {}) | own}, indent=2, ensure_ascii=False)
        partial.write_text(text + "\n", "utf-8")


def load_decisions(path: str | Path, source: str | Path) -> Decisions:
    """What was decided about a folder or archive; nothing, where the file is about others alone.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds something else.
    """
    try:
        own = _read(path)["of"].get(_key(source))
        return Decisions(tuple(own["leave_out"]), tuple(own["keep"]), dict(own["replace"])) if own else Decisions()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _foreign(path, error) from error


def last_source(path: str | Path) -> Path | None:
    """The folder or archive that was decided about last, if it is still there."""
    try:
        found = Path(_read(path)["last"])
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return found if found.exists() else None


def _read(path: str | Path) -> dict:
    try:
        return dict(json.loads(Path(path).read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise _foreign(path, error) from error


def _foreign(path: str | Path, error: Exception) -> ValueError:
    return ValueError(f"{path} holds no decisions about pictures ({error!r}): delete it and decide again")


def _key(source: str | Path) -> str:
    return str(Path(source).expanduser().resolve())


def apply_decisions(dataset: Dataset, decisions: Decisions) -> Dataset:
    """The dataset as decided, in which pictures left out are problems that say so. No file changes.

    A picture that is replaced keeps its caption and repeats.

    Raises:
        ValueError: a name that no picture has, a replacement that cannot be decoded, or nothing is left.
        FileNotFoundError: a replacement is not there.
    """
    by_name = {picture_name(picture.known_as, dataset): picture for picture in dataset.pictures}
    for unknown in {*decisions.leave_out, *decisions.replace} - set(by_name):
        near = difflib.get_close_matches(unknown, by_name, 1)
        raise ValueError(f"no picture is named {unknown!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    for name, path in decisions.replace.items():
        width, height = open_picture(path).size
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        by_name[name] = replace(
            by_name[name], path=Path(path), width=width, height=height, digest=digest,
            instead_of=by_name[name].known_as,
        )  # fmt: skip
    kept = tuple(picture for name, picture in by_name.items() if name not in decisions.leave_out)
    if not kept:
        raise ValueError(f"all {len(by_name)} pictures are left out: keep some")
    left = tuple(Problem(dataset.root / name, "left out, as decided") for name in dict.fromkeys(decisions.leave_out))
    return replace(dataset, pictures=kept, problems=dataset.problems + left)


def leave_out(dataset: Dataset, names: Iterable[str]) -> Dataset:
    """The dataset without some pictures, as `decide`."""
    return apply_decisions(dataset, Decisions(leave_out=tuple(names)))


def picture_name(path: Path, dataset: Dataset) -> str:
    """A picture's name: its path relative to the dataset, with slashes on every system."""
    return path.relative_to(dataset.root).as_posix() if path.is_relative_to(dataset.root) else path.name
