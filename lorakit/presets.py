"""Presets: settings to start from, the training guide's and the user's own."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any, get_args

from lorakit import storage
from lorakit.config import HUB_BASES, Config, Kind, is_place, parse

_GUIDE: dict[str, dict[str, Any]] = {
    "character": {"rank": 32, "alpha": 16, "steps": 3000},
    "style": {"rank": 32, "alpha": 16, "steps": 2000},
    "object": {"rank": 16, "alpha": 8, "steps": 2500},
    "clothing": {"rank": 32, "alpha": 16, "steps": 3000},
}
_FAMILY: dict[str, dict[str, Any]] = {
    "sd15": {"base": HUB_BASES["sd15"], "resolution": 512},
    "sd2": {"base": HUB_BASES["sd2"], "resolution": 768},
    "sdxl": {"base": HUB_BASES["sdxl"], "resolution": 1024, "rank": 128, "alpha": 64, "gradient_checkpointing": True},
}

PRESETS: dict[tuple[str, str], Config] = {
    (kind, family): Config(**({"kind": kind, "name": f"my_{kind}_v1"} | of_kind | of_family))
    for kind, of_kind in _GUIDE.items()
    for family, of_family in _FAMILY.items()
}


def preset(kind: str, family: str | None = None) -> Config:
    """The preset for what is taught on a family of bases, or one of the user's own.

    Args:
        kind: what is taught, or the name of an own preset.
        family: None is sd15, and of an own preset the base that it names.

    Raises:
        ValueError: no such preset or family; an own one is damaged, or not valid any more.
    """
    if built_in := PRESETS.get((kind, family or "sd15")):
        return built_in
    own = own_presets()
    if kind in own and (family or "sd15") in HUB_BASES:
        settings = kept(kind)
        if family:  # what it says of its own base does not hold for another
            settings = {key: value for key, value in settings.items() if key not in OF_BASE}
        own_base = {"base": HUB_BASES[family or "sd15"]} | settings
        return Config(**own_base | {"name": f"my_{kind}_v1"})
    kinds, families = (sorted({key[i] for key in PRESETS}) for i in (0, 1))
    raise ValueError(
        f"There is no preset for {kind!r} on {family or 'sd15'!r}. Kinds: {', '.join(kinds)}; bases: "
        f"{', '.join(families)}; your own: {', '.join(own) or 'none yet'}."
    )


QUICK: dict[str, Any] = {
    "schedule": "cosine", "targets": "attention+conv", "initialisation": "eva", "caption_dropout": 0.1,
    "timestep_sampling": "logit_normal",
}  # fmt: skip


def quick(config: Config) -> Config:
    """The settings for a run of half the length, with what makes up for the other half.

    Measured on the embedded base, on three styles, and untried on larger ones: tests/bench/results/recipe.md.

    Raises:
        ValueError: they contradict other settings of the config; says which.
    """
    length = {name: max(1, value // 2) for name in ("steps", "epochs") if (value := getattr(config, name))}
    return config.with_(**QUICK, **length)


# ── Presets of the user's own ───────────────────────────────────────────────────────────────────────────────────────

NOT_KEPT = {  # it belongs to one dataset, run or machine
    "dataset", "decisions", "name", "trigger", "class_word", "sample_prompts", "validation_pictures", "mask",
    "regularisation", "start_from", "backup", "device",
    "prior_prediction",  # needs trigger and class word, or pictures of the class
}  # fmt: skip
OF_BASE = {"base", "prediction_type", "zero_terminal_snr"}


def home() -> Path:
    """The folder for what a user keeps: $LORAKIT_HOME, else lorakit's among the system's folders for settings."""
    if own := os.environ.get("LORAKIT_HOME"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming") / "lorakit"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "lorakit"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "lorakit"


def own_presets() -> list[str]:
    """The names of the presets that were saved."""
    return sorted(path.stem for path in (home() / "presets").glob("*.json") if _may_be_called(path.stem))


def save_preset(name: str, config: Config) -> Path:
    """Keep what is worth keeping of a run's settings under a name; one of that name is replaced.

    What belongs to one dataset, run or machine is left out, and so is a base that is a folder or file: a preset may be
    given to others.

    Returns:
        The file.

    Raises:
        ValueError: a name that is none, or a built-in preset's.
        OSError: it cannot be written.
    """
    if name.lower() in get_args(Kind):
        raise ValueError(f"{name!r} is a built-in preset. Give yours another name.")
    if not _may_be_called(name):
        raise ValueError(
            f"A preset cannot be called {name!r}. Give up to 64 letters, digits, blanks and . + - _, and begin and end "
            "with a letter or digit."
        )
    left_out = NOT_KEPT | (OF_BASE if is_place(config.base) else set())
    file = home() / "presets" / f"{name}.json"
    with storage.write_file(file) as partial:
        partial.write_text(config.model_dump_json(indent=2, exclude=left_out) + "\n", "utf-8")
    return file


def kept(name: str) -> dict[str, Any]:
    """The settings that one of the user's own presets keeps; all others are the run's own.

    Raises:
        ValueError: no such preset; it is damaged, or not valid any more: says what is wrong.
    """
    if name not in own_presets():
        raise ValueError(f"There is no preset {name!r} of your own. There is {', '.join(own_presets()) or 'none yet'}.")
    file, advice = home() / "presets" / f"{name}.json", "Save it anew, or mend or remove the file."
    try:
        settings = json.loads(file.read_text("utf-8-sig"))
        if not isinstance(settings, dict):
            raise ValueError(f"it holds a {type(settings).__name__}, not settings in {{…}}")
    except (OSError, ValueError) as error:
        raise ValueError(f"Your preset {name!r} cannot be read: {error}. {advice}") from error
    try:
        parse(settings, where=f"Your preset {name!r} is not valid")
    except ValueError as error:
        raise ValueError(f"{error} {advice}") from None
    return settings


def _may_be_called(name: str) -> bool:
    return bool(re.fullmatch(r"\w[\w .+-]{0,63}", name)) and name[-1] not in " ." and name not in get_args(Kind)
