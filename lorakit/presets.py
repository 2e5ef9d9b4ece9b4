"""Presets: settings to start from, those of the training guide and the user's own."""

import os
import re
import sys
from pathlib import Path
from typing import Any

from lorakit import named, storage
from lorakit.config import Config, is_place, parse, read_settings

_GUIDE: dict[str, dict[str, Any]] = {
    "character": {"rank": 32, "alpha": 16, "steps": 3000},
    "style": {"rank": 32, "alpha": 16, "steps": 2000},
    "object": {"rank": 16, "alpha": 8, "steps": 2500},
    "clothing": {"rank": 32, "alpha": 16, "steps": 3000},
}
_FAMILY: dict[str, dict[str, Any]] = {
    "sd15": {"resolution": 512},
    "sd2": {"resolution": 768},
    "sdxl": {"resolution": 1024, "rank": 128, "alpha": 64, "gradient_checkpointing": True},
}
QUICK: dict[str, Any] = {
    "schedule": "cosine", "targets": "attention+conv", "initialisation": "eva", "caption_dropout": 0.1,
    "timestep_sampling": "logit_normal",
}  # fmt: skip


def preset(kind: str, base: str | None = None, *, usual: bool = False, **changes: Any) -> Config:
    """The preset for a kind of LoRA and a base, or one of the user's own.

    Args:
        kind: "character", "style", "object", "clothing", or the name of an own preset.
        base: a family ("sd15", "sd2", "sdxl") or a name of `named.NAMED`; None is sd15, or the base of an own preset.
        usual: rank, rates and schedule that another trainer uses for the base's family, instead of the guide's.
        changes: settings that replace the preset's.

    Raises:
        ValueError: no such preset or base; an own preset is damaged or no longer valid; invalid changes.
    """
    chosen = named.find(base or "sd15")
    if chosen is None or kind not in (*_GUIDE, *own_presets()):
        raise ValueError(
            f"There is no preset for {kind!r} on {base or 'sd15'!r}. Kinds: {', '.join(sorted(_GUIDE))}; bases: "
            f"{', '.join(named.NAMED)}; your own: {', '.join(own_presets()) or 'none yet'}."
        )
    if usual and chosen.usual is None:
        raise ValueError(f"No settings of other trainers are known for {chosen.title}: leave out `usual`.")
    of_base = {"base": chosen.reference, **chosen.settings}
    if kind in _GUIDE:
        settings = {"kind": kind} | _GUIDE[kind] | _FAMILY[chosen.family] | of_base
    elif base:  # chosen here, so the settings of the preset's base do not apply
        settings = {key: value for key, value in kept(kind).items() if key not in OF_BASE} | of_base
    else:
        settings = of_base | kept(kind)
    settings |= chosen.usual.settings if usual and chosen.usual else {}
    return parse(settings | {"name": f"my_{kind}_v1"}).with_(**changes)


def quick(config: Config) -> Config:
    """The config with half the steps, and with settings that make up for the other half.

    Measured on the embedded base with three styles, untested on larger ones: tests/bench/results/recipe.md.

    Raises:
        ValueError: these settings contradict others of the config.
    """
    length = {name: max(1, value // 2) for name in ("steps", "epochs") if (value := getattr(config, name))}
    return config.with_(**QUICK, **length)


# ── The user's own presets ──────────────────────────────────────────────────────────────────────────────────────────

NOT_KEPT = {  # settings of one dataset, run or machine
    "dataset", "decisions", "name", "trigger", "class_word", "sample_prompts", "validation_pictures", "mask",
    "regularisation", "start_from", "backup", "device",
    "prior_prediction",  # needs trigger and class word, or pictures of the class
}  # fmt: skip
OF_BASE = {"base", "prediction_type", "zero_terminal_snr"}


def home() -> Path:
    """The folder of the user's own files: $LORAKIT_HOME, else `lorakit` in the system's folder for settings."""
    if folder := os.environ.get("LORAKIT_HOME"):
        return Path(folder).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or storage.home() / "AppData" / "Roaming") / "lorakit"
    if sys.platform == "darwin":
        return storage.home() / "Library" / "Application Support" / "lorakit"
    return Path(os.environ.get("XDG_CONFIG_HOME") or storage.home() / ".config") / "lorakit"


def own_presets() -> list[str]:
    """The names of the user's own presets."""
    return sorted(path.stem for path in (home() / "presets").glob("*.json") if _is_name(path.stem))


def save_preset(name: str, config: Config) -> Path:
    """Save a run's settings as an own preset, replacing one of the same name.

    Settings of one dataset, run or machine are left out, and a base that is a folder or file, so that the preset can
    be given to others.

    Returns:
        The file.

    Raises:
        ValueError: an invalid name, or that of a built-in preset.
        OSError: the file cannot be written.
    """
    if name.lower() in _GUIDE:
        raise ValueError(f"{name!r} is a built-in preset. Choose another name.")
    if not _is_name(name):
        raise ValueError(
            f"{name!r} cannot be the name of a preset. Use up to 64 letters, digits, spaces and . + - _, with a letter "
            "or digit at both ends."
        )
    file = home() / "presets" / f"{name}.json"
    with storage.write_file(file) as partial:
        excluded = NOT_KEPT | (OF_BASE if is_place(config.base) else set())
        partial.write_text(config.model_dump_json(indent=2, exclude=excluded) + "\n", "utf-8")
    return file


def kept(name: str) -> dict[str, Any]:
    """The settings in one of the user's own presets.

    Raises:
        ValueError: no such preset, or it is damaged or no longer valid.
    """
    if name not in own_presets():
        raise ValueError(f"You have no preset {name!r}. You have {', '.join(own_presets()) or 'none yet'}.")
    try:
        settings = read_settings(home() / "presets" / f"{name}.json")
        parse(settings, where="it has settings that are not valid")
    except (OSError, ValueError) as error:
        advice = "Save it again, or correct or delete the file."
        raise ValueError(f"Your preset {name!r} cannot be used: {str(error).rstrip('.')}. {advice}") from error
    return settings


def _is_name(name: str) -> bool:
    return bool(re.fullmatch(r"\w[\w .+-]{0,63}", name)) and name[-1] not in " ." and name not in _GUIDE
