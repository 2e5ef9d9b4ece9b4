"""The folders that sd-scripts' dataset TOML names, or a settings file of LoRA_Easy_Training_Scripts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.kohya import tables
from lorakit.kohya.files import tables_of


@dataclass(frozen=True)
class Subset:
    """A folder in sd-scripts' dataset TOML. Its subfolders are not read."""

    folder: Path
    repeats: int
    caption: str  # for pictures without a caption file: `class_tokens`
    extension: str  # of caption files, ".txt"; "" if not given
    regularisation: bool


def subsets(path: Path) -> tuple[list[Subset], list[str]]:
    """The folders in sd-scripts' dataset TOML, and a note for each setting that is left out.

    Relative folders start at the TOML's folder.

    Raises:
        ValueError: not a dataset TOML, or a value of the wrong type.
    """
    contents = tables_of(path.read_text(encoding="utf-8-sig"), path.name)
    folders, notes = [], []
    try:
        for dataset in contents.get("datasets") or [{"subsets": contents["subsets"]}]:
            for subset in dataset["subsets"]:
                given = contents.get("general", {}) | dataset | subset
                extension = str(given.get("caption_extension", ""))
                folders.append(
                    Subset(
                        folder=path.parent / Path(given["image_dir"]).expanduser(),
                        repeats=int(given.get("num_repeats", 1)),
                        caption=str(given.get("class_tokens", "")),
                        extension=extension and "." + extension.lstrip("."),
                        regularisation=bool(given.get("is_reg", False)),
                    )
                )
                notes += [_left_out(key, value) for key, value in given.items() if key not in TAKEN and value]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        form = "[[datasets]] with [[datasets.subsets]], each with an image_dir"
        raise ValueError(f"{path.name} is not a dataset TOML of sd-scripts ({error!r}): it needs {form}.") from error
    return folders, [note for note in dict.fromkeys(notes) if note]


TAKEN = ("image_dir", "num_repeats", "class_tokens", "caption_extension", "is_reg", "subsets")


def _left_out(key: str, value: Any) -> str:
    if key in tables.NOT_NEEDED:
        return ""
    if key == "metadata_file":
        return f"{key}={value}: its captions are not read; write them into .txt files next to the pictures"
    others = {
        "resolution": "resolution", "batch_size": "batch_size", "bucket_no_upscale": "bucket_rule",
        "bucket_reso_steps": "bucket_step", "min_bucket_reso": "min_bucket_side", "max_bucket_reso": "max_bucket_side",
    }  # fmt: skip
    if name := others.get(key) or tables.SAME.get(key):
        return f"{key}={value}: left out, in lorakit this is the run's setting `{name}`"
    return f"{key}={value}: left out, lorakit has no such setting for a folder"
