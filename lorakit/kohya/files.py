"""Read settings files: sd-scripts' TOML, the GUI's JSON, command lines of every shell, scripts that hold one."""

import json
import re
import shlex
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

from lorakit.config import Config
from lorakit.kohya import tables
from lorakit.kohya.conversion import Imported, convert, value_of

VARIABLE = re.compile(r"[$@]\{?[\w:]+(\[[@*]\])?\}?|%\w+%")
DATASET_OF_RUN = {  # settings in a dataset TOML that lorakit has for the whole run → sd-scripts' name of it
    **{name: name for name in (
        "resolution", "enable_bucket", "bucket_no_upscale", "bucket_reso_steps", "min_bucket_reso", "max_bucket_reso",
        "flip_aug", "shuffle_caption", "keep_tokens", "keep_tokens_separator", "secondary_separator",
        "enable_wildcard", "caption_dropout_rate", "caption_tag_dropout_rate",
        "validation_split", "alpha_mask", "conditioning_data_dir",
    )},
    "batch_size": "train_batch_size",
}  # fmt: skip


def read(path: str | Path) -> Imported:
    """Read a settings file: `.toml` of sd-scripts, `.json` of the GUI, or any other file as a script.

    Raises:
        FileNotFoundError: no such file, or one that it names is missing.
        ValueError: the file cannot be read as its suffix says, is of another program, or contains no setting.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} with kohya's settings.")
    text = _decode(path.read_bytes())
    if path.suffix.lower() == ".toml":
        return convert(_with_files(_from_toml(text, path), path.parent))
    if path.suffix.lower() == ".json" or text.lstrip().startswith("{"):
        return convert(_with_files(_from_gui(text, path), path.parent))
    return from_command(text, path.parent)


def from_command(text: str, folder: str | Path = ".") -> Imported:
    """Read a command line such as `accelerate launch train_network.py --network_dim=32 …`, or a script that holds one.

    Args:
        folder: where files that it names are looked for.

    Raises:
        FileNotFoundError: `--config_file` or `--dataset_config` is missing.
        ValueError: no option in the text, several commands, or values that are not valid settings.
    """
    return convert(_with_files(_options(_command(text)), Path(folder)))


def _decode(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):  # PowerShell's
        return content.decode("utf-16", errors="replace")
    return content.decode("utf-8-sig", errors="replace")


# ── Command lines ───────────────────────────────────────────────────────────────────────────────────────────────────


def _command(text: str) -> str:
    """The training command in a script, with its variables filled in.

    Raises:
        ValueError: none, or several.
    """
    lines = [line for line in text.splitlines() if not re.match(r"\s*(#|::|@?rem\b)", line, re.IGNORECASE)]
    # A line continues after \ (bash), ^ (cmd) or ` (PowerShell).
    joined = re.sub(r"[\\^`][ \t]*(\n|$)", " ", "\n".join(lines)).splitlines()
    variables = {}
    for line in joined:
        if match := re.match(r"\s*(?:set\s+|export\s+|\$(?:env:)?)?\"?(\w+)\s*=\s*(.*)", line, re.IGNORECASE):
            variables[match[1]] = re.sub(r"\s+#.*", "", match[2]).strip().strip("\"'")
    commands = [line for line in joined if re.search(r"\btrain\w*\.py|\w*_train\w*\.py|fine_tune\.py", line)]
    commands = commands or [line for line in joined if re.search(r"(^|\s)--\w", line)]
    if any(".py" in line for line in commands[1:]):
        raise ValueError(f"There are {len(commands)} training commands here. Keep the one to convert.")
    line = " ".join(commands)
    for name in sorted(variables, key=len, reverse=True):
        reference = rf"\$\{{{name}\}}|\$(?:env:)?{name}\b|%{name}%"
        line = re.sub(rf"(\"?)(?:{reference})", partial(_filled, variables[name]), line)
    return line


def _filled(value: str, match: re.Match[str]) -> str:
    return match[1] + value if match[1] or " " not in value else f'"{value}"'


def _options(line: str) -> dict[str, Any]:
    words = [word for word in _split(line) if word.strip()]
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), -1)
    settings: dict[str, Any] = {"script": PureWindowsPath(words[script]).name} if script >= 0 else {}
    name = None
    for word in words[script + 1 :]:
        if word.startswith("--") and len(word) > 2:
            name, has_value, value = word[2:].partition("=")
            settings[name] = value_of(value, name) if has_value else True
        elif VARIABLE.fullmatch(word):  # set nowhere in the text: noted as a setting that is left out
            settings[word] = "not set here"
        elif name is not None:
            before = settings[name]
            value = value_of(word, name)
            settings[name] = value if before is True else [*(before if isinstance(before, list) else [before]), value]
    if name is None:
        raise ValueError("There is no option (--network_dim=32 …) in this command line of kohya's.")
    return settings


def _split(line: str) -> list[str]:
    """The words of a command line. Quotes and a backslash before a space join words; other backslashes are Windows'.

    Raises:
        ValueError: a quote is not closed.
    """
    words = shlex.shlex(re.sub(r"\\ (?!-)", "\0", line), posix=True, punctuation_chars=False)
    words.whitespace_split, words.escape, words.commenters = True, "", ""
    try:
        return [word.replace("\0", " ") for word in words]
    except ValueError as error:
        raise ValueError(f"This command line of kohya's cannot be read: {error}. Close or delete the quote.") from None


# ── TOML and JSON ───────────────────────────────────────────────────────────────────────────────────────────────────


def tables_of(text: str, name: str) -> dict[str, Any]:
    """The tables of a TOML; ValueError names the file that is not valid."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{name} is not valid TOML: {error}.") from error


def _from_toml(text: str, path: Path) -> dict[str, Any]:
    contents = tables_of(text, path.name)
    if "datasets" in contents:
        raise ValueError(
            f"{path.name} describes datasets, not a training run. Give the --config_file or the command line of the "
            "run; this file can be the run's `dataset`."
        )
    settings: dict[str, Any] = {}
    for key, value in contents.items():  # sd-scripts ignores the names of tables
        inner = value.get("args", value) if isinstance(value, dict) else {key: value}  # LoRA_Easy_Training_Scripts'
        settings |= inner if isinstance(inner, dict) else {key: inner}
    folders = settings.pop("subsets", None)  # of LoRA_Easy_Training_Scripts: the file is also the dataset's
    if isinstance(folders, list) and folders and isinstance(folders[0], dict):
        settings |= _of_dataset(path, folders[0])
    return settings


def _of_dataset(file: Path, *parts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run whose dataset is described in a TOML, by parts of it; later ones come first."""
    merged = {key: value for part in parts for key, value in part.items()}
    ours = {ours: merged[name] for name, ours in DATASET_OF_RUN.items() if name in merged}
    return ours | {"train_data_dir": str(file), "reg_data_dir": None}


def _from_gui(text: str, path: Path) -> dict[str, Any]:
    try:
        preset: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}.") from error
    if not isinstance(preset, dict):
        raise ValueError(f"{path.name} contains a {type(preset).__name__}, not the GUI's settings in {{…}}.")
    _check_own(preset, path.name)
    names = {key: tables.GUI.get(key, key) for key in preset}
    settings = {names[key]: value_of(v, names[key]) if isinstance(v, str) else v for key, v in preset.items()}
    unused = []
    if not settings.get("text_encoder_lr") and not settings.get("unet_lr"):  # empty: the run's rate for both
        unused += ["text_encoder_lr", "unet_lr"]
    if settings.get("gui_lora_type") == "Standard":
        unused += tables.STANDARD_IGNORES
    if settings.get("noise_offset_type") == "Multires":
        unused += ["noise_offset", "adaptive_noise_scale"]
    elif settings.get("noise_offset_type") == "Original":
        unused += ["multires_noise_iterations", "multires_noise_discount"]
    percent = settings.get("gui_warmup_percent")
    if isinstance(percent, int | float):  # of the run
        unused.append("gui_warmup_percent")
        settings["lr_warmup_steps"] = settings.get("lr_warmup_steps") or min(percent / 100, 0.99)
    more = settings.pop("additional_parameters", None)
    settings = {key: value for key, value in settings.items() if key not in unused}
    return settings | (_options(str(more)) if more and "--" in str(more) else {})


def _check_own(preset: Mapping[str, Any], name: str) -> None:
    own = preset.keys() & Config.model_fields
    if {"base", "rank"} & own and len(own) > len(preset) / 2:
        raise ValueError(f"{name} has lorakit's own settings: train with them, `python -m lorakit train {name}`.")


def _with_files(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings with those of the files that they name: the run's come first, then a dataset's as in sd-scripts."""
    if config := settings.get("config_file"):
        file = _named("config_file", config, folder)
        settings = _from_toml(_decode(file.read_bytes()), file) | settings
    if dataset := settings.get("dataset_config"):
        file = _named("dataset_config", dataset, folder)
        contents = tables_of(_decode(file.read_bytes()), file.name)
        first = (contents.get("datasets") or [{}])[0] if isinstance(contents.get("datasets"), list) else {}
        subset = first["subsets"][0] if isinstance(first, dict) and isinstance(first.get("subsets"), list) else {}
        parts = [part for part in (contents.get("general"), first, subset) if isinstance(part, dict)]
        settings |= _of_dataset(file, *parts)
    return settings


def _named(key: str, value: Any, folder: Path) -> Path:
    """A file that settings name: as they name it, or of the same name in the folder."""
    places = [folder / str(value), folder / PureWindowsPath(str(value)).name]
    for place in places:
        if place.is_file():
            return place
        if place.with_suffix(".toml").is_file():  # sd-scripts adds it
            return place.with_suffix(".toml")
    raise FileNotFoundError(f"{key}={value} is not in {folder.name or 'this folder'}. Put it there, and convert again.")
