"""What a person decided about pictures: left out, fine as they are, replaced. The user's folder stays as it is."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorakit import files
from lorakit.dataset import Dataset, Problem, open_picture


@dataclass(frozen=True)
class Decisions:
    """What to do about pictures, by name. Kept beside the run: the dataset's folder stays as it is."""

    leave_out: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()  # seen, and fine: `check` takes it
    replace: Mapping[str, str] = field(default_factory=dict)  # name: file that takes the picture's place


def save(decisions: Decisions, path: str | Path) -> None:
    with files.replacing(path) as partial:
        partial.write_text(json.dumps(vars(decisions), indent=2) + "\n", "utf-8")


def load(path: str | Path) -> Decisions:
    """Read what was saved.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        read = json.loads(Path(path).read_text("utf-8"))
        return Decisions(tuple(read["leave_out"]), tuple(read["keep"]), dict(read["replace"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no decisions about pictures ({error!r}): delete it and decide again") from error


def decide(dataset: Dataset, decisions: Decisions) -> Dataset:
    """The dataset as decided, in which pictures left out are problems that say so. No file changes.

    A picture that is replaced keeps its caption and repeats.

    Raises:
        ValueError: a name that no picture has, a replacement that cannot be decoded, or nothing is left.
        FileNotFoundError: a replacement is not there.
    """
    by_name = {name_of(picture.known_as, dataset): picture for picture in dataset.pictures}
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
    return decide(dataset, Decisions(leave_out=tuple(names)))


def name_of(path: Path, dataset: Dataset) -> str:
    """A picture's name: its path relative to the dataset, with slashes on every system."""
    return path.relative_to(dataset.root).as_posix() if path.is_relative_to(dataset.root) else path.name
