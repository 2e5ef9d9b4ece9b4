"""Convert settings of kohya's sd-scripts, or of its GUI, to a lorakit config.

Three forms are read: the TOML of `--config_file`, a command line, and the GUI's JSON presets. Known settings are
converted; for every other setting that is switched on, a note says why it was left out.
"""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from lorakit import config as configs
from lorakit.config import Config


@dataclass(frozen=True)
class Imported:
    """A converted config."""

    config: Config
    notes: tuple[str, ...]  # a line for each setting that has another meaning, or none, in lorakit


def read(path: str | Path) -> Imported:
    """Read a settings file: `.toml` of sd-scripts, `.json` of the GUI, or any other file as a command line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read as its suffix says, or its values are not valid settings.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} with kohya's settings.")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".toml":
        return convert(_from_toml(text, path))
    if path.suffix.lower() == ".json":
        return convert(_from_gui(text, path))
    return from_command(text)


def from_command(line: str) -> Imported:
    """Read a command line such as `accelerate launch train_network.py --network_dim=32 …`.

    Raises:
        ValueError: no option in the line, or values that are not valid settings.
    """
    words = [word for word in _split(line.replace("\\\n", " ").replace("^\n", " ")) if word.strip()]
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), -1)
    settings: dict[str, Any] = {"script": Path(words[script]).name} if script >= 0 else {}
    name = None
    for word in words[script + 1 :]:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            settings[name] = _value(value, name) if has_value else True
        elif name is not None:
            before = settings[name]
            value = _value(word, name)
            settings[name] = value if before is True else [*(before if isinstance(before, list) else [before]), value]
    if name is None:
        raise ValueError("There is no option (--network_dim=32 …) in this command line of kohya's.")
    return convert(settings)


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


TEXTS = ("pretrained_model_name_or_path", "train_data_dir", "reg_data_dir", "output_name", "network_weights")


def _value(text: str, name: str = "") -> Any:
    if name in TEXTS:  # the name "2024_05" would be a number in Python
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _tables(text: str, path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name} is not valid TOML: {error}.") from error


def _from_toml(text: str, path: Path) -> dict[str, Any]:
    tables = _tables(text, path)
    if "datasets" in tables:
        raise ValueError(
            f"{path.name} describes datasets, not a training run. Give the --config_file or the command line of the "
            "run; this file can be the run's `dataset`."
        )
    settings: dict[str, Any] = {}
    for key, value in tables.items():  # sd-scripts ignores the names of tables
        settings |= value if isinstance(value, dict) else {key: value}
    return settings


def _from_gui(text: str, path: Path) -> dict[str, Any]:
    try:
        preset: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}.") from error
    if not isinstance(preset, dict):
        raise ValueError(f"{path.name} contains a {type(preset).__name__}, not the GUI's settings in {{…}}.")
    names = {key: GUI.get(key, key) for key in preset}
    settings = {names[key]: _value(v, names[key]) if isinstance(v, str) else v for key, v in preset.items()}
    unused = []
    if not settings.get("text_encoder_lr") and not settings.get("unet_lr"):  # empty: the run's rate for both
        unused += ["text_encoder_lr", "unet_lr"]
    if settings.get("gui_lora_type") == "Standard":  # the GUI also saves the hidden fields of other types
        unused += ["conv_dim", "conv_alpha", "dora_wd", "factor", "algo", "preset"]
    percent = settings.pop("gui_warmup_percent", None)  # of the run
    if percent:
        settings.setdefault("lr_warmup_steps", float(percent) / 100)
    return {key: value for key, value in settings.items() if key not in unused}


GUI = {  # the GUI's names → sd-scripts'
    "max_resolution": "resolution", "epoch": "max_train_epochs", "optimizer": "optimizer_type",
    "lr_warmup": "gui_warmup_percent", "LoRA_type": "gui_lora_type", "LyCORIS_preset": "preset",
    "lora_network_weights": "network_weights",
}  # fmt: skip

# ── Known settings ──────────────────────────────────────────────────────────────────────────────────────────────────

SAME = {  # sd-scripts' name → lorakit's, where the value has the same meaning
    **{name: name for name in (
        "gradient_accumulation_steps", "gradient_checkpointing", "zero_terminal_snr", "conv_alpha",
        "max_grad_norm", "min_snr_gamma", "noise_offset", "multires_noise_iterations",
        "multires_noise_discount", "min_timestep", "max_timestep", "keep_tokens", "clip_skip", "seed",
    )},
    "pretrained_model_name_or_path": "base",
    "train_data_dir": "dataset",
    "output_name": "name",
    "train_batch_size": "batch_size",
    "network_weights": "start_from",
    "network_dim": "rank",
    "network_alpha": "alpha",
    "conv_dim": "conv_rank",
    "lr_warmup_steps": "warmup_steps",
    "lr_scheduler_num_cycles": "schedule_cycles",
    "lr_scheduler_power": "schedule_power",
    "debiased_estimation_loss": "debiased",
    "ip_noise_gamma": "input_perturbation",
    "huber_c": "huber_delta",
    "caption_dropout_rate": "caption_dropout",
    "flip_aug": "flip",
    "shuffle_caption": "shuffle_captions",
    "caption_tag_dropout_rate": "tag_dropout",
    "reg_data_dir": "regularisation",
    "prior_loss_weight": "prior_weight",
    "bucket_reso_steps": "bucket_step",
    "min_bucket_reso": "min_bucket_side",
    "max_bucket_reso": "max_bucket_side",
    "save_every_n_steps": "save_every",
    "sample_every_n_steps": "sample_every",
}  # fmt: skip
DEFAULTS = {  # of sd-scripts, where they differ from lorakit's
    "network_dim": 4, "network_alpha": 1, "learning_rate": 2e-6, "optimizer_type": "AdamW", "lr_scheduler": "constant",
    "max_train_steps": 1600, "min_snr_gamma": None, "resolution": 512, "train_batch_size": 1,
}  # fmt: skip
OFF_AT_0 = {  # the GUI writes 0 for an empty field
    "conv_rank", "conv_alpha", "min_snr_gamma", "save_every", "sample_every", "schedule_cycles", "schedule_power",
    "multires_noise_discount", "clip_skip", "huber_delta", "max_timestep", "bucket_step",
    "min_bucket_side", "max_bucket_side",
}  # fmt: skip
OPTIMIZERS = {
    "adamw": "adamw", "adamw8bit": "adamw8bit", "pagedadamw8bit": "paged_adamw8bit", "adafactor": "adafactor",
    "prodigy": "prodigy", "lion": "lion", "adamwschedulefree": "adamw_schedulefree",
    "schedulefree.adamwschedulefree": "adamw_schedulefree", "prodigyopt.prodigy": "prodigy",
}  # fmt: skip
LOSSES = {"l2": "mse", "huber": "huber", "smooth_l1": "smooth_l1"}
NOT_NEEDED = {  # lorakit always does this, detects it, or it does not change the weights
    **dict.fromkeys(("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs",
                     "cache_text_encoder_outputs_to_disk", "vae_batch_size", "max_data_loader_n_workers",
                     "persistent_data_loader_workers", "num_cpu_threads_per_process"),
                    "pictures and captions are always encoded once, before training"),
    **dict.fromkeys(("xformers", "sdpa", "mem_eff_attn"), "torch's fused attention is always used"),
    **dict.fromkeys(("enable_bucket",), "buckets are always used"),
    **dict.fromkeys(("v2", "sdxl", "sdxl_checkbox"), "the family is read from the base"),
    **dict.fromkeys(("no_half_vae",), "a VAE that overflows in half precision runs in float32"),
    **dict.fromkeys(("save_model_as", "save_precision"), "`export` chooses format and precision; only safetensors"),
    **dict.fromkeys(("output_dir", "logging_dir", "log_with", "log_prefix", "save_state", "save_last_n_steps"),
                    "one run folder contains everything: `train CONFIG --out FOLDER`; it resumes by itself"),
    **dict.fromkeys(("caption_extension",), ".txt and .caption are both read"),
    **dict.fromkeys(("script", "gui_lora_type", "network_module", "lowram", "highvram",
                     "training_comment", "metadata_title", "metadata_author"), ""),
}  # fmt: skip


@dataclass
class _Settings:
    """Settings by sd-scripts' names; records which of them were used, and notes for the user."""

    given: dict[str, Any]
    used: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def take(self, key: str, default: Any = None) -> Any:
        self.used.add(key)
        return self.given.get(key, DEFAULTS.get(key, default))

    def note(self, key: str, text: str) -> None:
        self.notes.append(f"{key}={self.take(key)}: {text}")


def convert(settings: dict[str, Any]) -> Imported:
    """Convert settings by sd-scripts' names.

    Raises:
        ValueError: values that are not valid settings.
    """
    given = {key: value for key, value in settings.items() if value is not None and value != ""}
    for item in _listed(given.pop("network_args", ())) + _listed(given.pop("optimizer_args", ())):
        key, _, text = item.partition("=")
        given[key.strip()] = _value(text.strip())
    kohya = _Settings(given)
    ours: dict[str, Any] = {}
    for key, name in SAME.items():
        value = kohya.take(key)
        if name in ("base", "dataset", "name", "regularisation", "start_from") and value is not None:
            value = str(value)
        if value == 0 and name in OFF_AT_0:
            value = None
        if value is not None or name == "min_snr_gamma":
            ours[name] = value
    # In sd-scripts, epochs take precedence over steps.
    epochs, steps = kohya.take("max_train_epochs"), kohya.take("max_train_steps")
    ours |= {"epochs": int(epochs)} if epochs else {"steps": int(steps)}
    ours |= _rates(kohya) | _size(kohya) | _choices(kohya)
    if kohya.take("v_parameterization"):
        ours["prediction_type"] = "v_prediction"
    if ours.get("conv_rank"):
        ours["targets"] = "attention+conv"
    ours |= _algorithm(kohya)
    ours |= _blocks(kohya, "conv" in ours.get("targets", ""))
    for key in sorted(given.keys() - kohya.used):
        if key in NOT_NEEDED:
            if NOT_NEEDED[key] and given[key]:
                kohya.notes.append(f"{key}: not needed, {NOT_NEEDED[key]}")
        elif given[key] not in (False, 0, "0", [], {}):  # settings that are off change nothing
            kohya.note(key, "left out, lorakit has no such setting")
    return Imported(configs.parse(ours, "kohya's settings"), tuple(kohya.notes))


def _listed(value: Any) -> list[str]:
    """`["a=1", "b=2"]`, or the GUI's `a=1 b=2`."""
    return shlex.split(value) if isinstance(value, str) else [str(item) for item in value or ()]


PLAIN = {  # values that mean a LoRA
    "algo": ("lora", "locon"), "gui_lora_type": ("standard", "kohya locon", "lycoris/locon", "lora"),
    "network_module": ("networks.lora", "lycoris.kohya", "locon.locon_kohya"),
}  # fmt: skip


def _algorithm(kohya: _Settings) -> dict[str, Any]:
    """From LyCORIS's `algo`, sd-scripts' network modules, and the GUI's names of both."""
    ours: dict[str, Any] = {}
    types = {key: str(kohya.take(key) or "").lower() for key in PLAIN}
    for key, value in types.items():
        name = next((name for name in ("loha", "lokr") if re.split(r"[/.]", value)[-1] == name), "")
        if name:
            ours["algorithm"] = name
            break
        if value and value not in PLAIN[key]:
            kohya.note(key, "converted to a LoRA; lorakit trains LoRA, LoCon, DoRA, LoHa and LoKr")
    factor = int(float(kohya.take("factor") or kohya.take("lokr_factor") or -1))
    if ours.get("algorithm") == "lokr":
        ours["lokr_factor"] = factor if factor > 1 else None
        for key, setting in (("network_dim", "rank"), ("conv_dim", "conv_rank")):
            if (kohya.take(key) or 0) > 1024:
                ours[setting] = 1024
                kohya.note(key, "1024, lorakit's maximum; both mean whole matrices")
    if kohya.take("dora_wd"):
        if "algorithm" in ours:
            kohya.notes.append(f"dora_wd: left out, lorakit has no DoRA of {ours['algorithm']}")
        else:
            ours["algorithm"] = "dora"
            if kohya.take("wd_on_output") is not False:
                kohya.notes.append("dora_wd: by columns, which all programs read alike; LyCORIS uses rows by default")
    lycoris = any(types[key].startswith("lycoris") for key in ("network_module", "gui_lora_type"))
    # LyCORIS adapts the convolutions unless its preset excludes them.
    if lycoris and not any(word in str(kohya.take("preset") or "full") for word in ("attn", "transformer", "lin")):
        ours["targets"] = "attention+conv"
    return ours


def _places(convolutions: bool) -> dict[str, int]:
    """SD 1.x and 2.x: place in the UNet → index among sd-scripts' 25 blocks: 12 down, 1 in the middle, 12 up."""
    downs, ups = [(i, j) for i in range(4) for j in range(2)], [(i, j) for i in range(4) for j in range(3)]
    places = {f"down_blocks.{i}.attentions.{j}": 1 + 3 * i + j for i, j in downs if i < 3} | {"mid_block": 12}
    places |= {f"up_blocks.{i}.attentions.{j}": 13 + 3 * i + j for i, j in ups if i > 0}
    if convolutions:
        places |= {f"down_blocks.{i}.resnets.{j}": 1 + 3 * i + j for i, j in downs}
        places |= {f"down_blocks.{i}.downsamplers": 3 + 3 * i for i in range(3)}
        places |= {f"up_blocks.{i}.resnets.{j}": 13 + 3 * i + j for i, j in ups}
        places |= {f"up_blocks.{i}.upsamplers": 15 + 3 * i for i in range(3)}
    return places


def _blocks(kohya: _Settings, convolutions: bool) -> dict[str, Any]:
    """Ranks and rates by block, from sd-scripts' network_args."""
    counts = {"block_dims": 25, "down_lr_weight": 12, "mid_lr_weight": 1, "up_lr_weight": 12}
    given = {key: str(value).split(",") if not isinstance(value, list) else value
             for key in counts if (value := kohya.take(key)) is not None}  # fmt: skip
    try:
        numbers = {key: [float(value) for value in values] for key, values in given.items()}
    except ValueError:  # "sine", "cosine" …
        numbers = None
    sdxl = "sdxl" in str(kohya.take("script") or "") or kohya.take("sdxl") or kohya.take("sdxl_checkbox")
    if numbers is None or sdxl or any(len(values) != counts[key] for key, values in numbers.items()):
        for key in given:
            kohya.note(key, "only the 25 blocks of SD 1.x and 2.x are read; use block_ranks, block_rates")
        return {}
    ours: dict[str, Any] = {}
    places = _places(convolutions)
    if dims := numbers.get("block_dims"):
        ours["block_ranks"] = {place: int(dims[index]) for place, index in places.items()}
        if conv_rank := int(kohya.take("conv_dim") or 0):
            ours["block_ranks"] |= dict.fromkeys(_convolutions(places), conv_rank)
        if kohya.take("block_alphas"):
            kohya.notes.append("block_alphas: left out, alpha / rank is the same in all blocks")
    _, *sides = counts
    weights = sum((numbers.get(key, [1.0] * counts[key]) for key in sides), [])
    rates = {place: weights[index] for place, index in places.items()}
    if set(rates.values()) != {1.0}:
        ours["block_rates"] = {place: rate for place, rate in rates.items() if rate != 1.0}
    return ours


def _convolutions(places: dict[str, int]) -> Iterator[str]:
    """The 3×3 convolutions of places, whose rank is conv_dim in every block."""
    for place in places:
        if "attentions" not in place and place != "mid_block":
            yield from (f"{place}.conv1", f"{place}.conv2") if "resnets" in place else (place,)
    yield from (f"mid_block.resnets.{j}.conv{k}" for j in (0, 1) for k in (1, 2))


def _rates(kohya: _Settings) -> dict[str, Any]:
    rate, unet, text = (kohya.take(key) for key in ("learning_rate", "unet_lr", "text_encoder_lr"))
    text_only, unet_only = (kohya.take(f"network_train_{part}_only") for part in ("text_encoder", "unet"))
    if unet == 0 and text != 0 and not unet_only:  # in sd-scripts and its GUI, a rate of 0 trains nothing
        text_only, unet = True, None
    if text_only and unet_only:
        raise ValueError("network_train_unet_only and network_train_text_encoder_only leave nothing to train.")
    # sd-scripts trains text encoders by default, at the run's rate if they have none.
    rates = [float(value) for value in (text if isinstance(text, list) else [rate if text is None else text])]
    if unet_only or kohya.take("cache_text_encoder_outputs"):
        rates = [0.0]
    ours = {"learning_rate": float(unet or rate), "text_encoder_rate": rates[0], "train_unet": not text_only}
    if len(rates) > 1 and rates[1] != rates[0]:
        ours["text_encoder_2_rate"] = rates[1]
    ratio = kohya.take("loraplus_lr_ratio") or kohya.take("loraplus_unet_lr_ratio") or 1.0
    return ours | {"learning_rate_ratio": float(ratio)}


def _size(kohya: _Settings) -> dict[str, Any]:
    value = kohya.take("resolution")
    sides = [int(float(side)) for side in (value if isinstance(value, list) else str(value).split(","))]
    side = round((sides[0] * sides[-1]) ** 0.5)  # buckets keep the area
    step = int(kohya.take("bucket_reso_steps") or 64)
    resolution = max(step, round(side / step) * step)
    if resolution != sides[0] or len(set(sides)) > 1:
        kohya.note("resolution", f"buckets have the area of {resolution}×{resolution}")
    ours: dict[str, Any] = {"resolution": resolution, "bucket_step": step}
    no_upscale = kohya.take("bucket_no_upscale")
    if not kohya.take("enable_bucket", True):  # then sd-scripts ignores the other settings of buckets
        kohya.note("enable_bucket", "pictures are put into buckets by shape, not cropped to squares")
    elif no_upscale:
        ours["bucket_rule"] = "no_upscale"
    elif kohya.take("enable_bucket") and 256 <= resolution <= 1024:  # sd-scripts' default limits
        ours["min_bucket_side"] = int(kohya.take("min_bucket_reso") or 256)
        ours["max_bucket_side"] = int(kohya.take("max_bucket_reso") or 1024)
    return ours


def _choices(kohya: _Settings) -> dict[str, Any]:
    ours: dict[str, Any] = {}
    for key, name, known in (("optimizer_type", "optimizer", OPTIMIZERS), ("loss_type", "loss", LOSSES)):
        value = kohya.take(key)
        if str(value).lower() in known:
            ours[name] = known[str(value).lower()]
        elif value is not None:
            kohya.note(key, f"lorakit has {', '.join(dict.fromkeys(known.values()))}; the first is used")
    if kohya.take("use_8bit_adam"):
        ours["optimizer"] = "adamw8bit"
    schedule = str(kohya.take("lr_scheduler"))
    if schedule in get_args(Config.model_fields["schedule"].annotation):
        ours["schedule"] = schedule
    else:
        kohya.note("lr_scheduler", "unknown; 'constant' is used")
    if ours.get("schedule") == "constant" and kohya.take("lr_warmup_steps"):
        ours["warmup_steps"] = 0
        kohya.notes.append("lr_warmup_steps with lr_scheduler=constant: left out, as sd-scripts ignores it")
    if (decay := kohya.take("weight_decay")) is not None:
        ours["weight_decay"] = float(decay)
    if (precision := kohya.take("mixed_precision")) in ("no", "fp16", "bf16"):
        ours["mixed_precision"] = precision
    prompts = kohya.take("sample_prompts")
    if isinstance(prompts, str):
        kohya.notes.append("sample_prompts: left out, they are in kohya's format; give `sample_prompts` as a list")
    elif prompts:
        ours["sample_prompts"] = tuple(str(prompt) for prompt in prompts)
    return ours


# ── Datasets ────────────────────────────────────────────────────────────────────────────────────────────────────────


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
    tables = _tables(path.read_text(encoding="utf-8-sig"), path)
    folders, notes = [], []
    try:
        for dataset in tables["datasets"]:
            for subset in dataset["subsets"]:
                given = tables.get("general", {}) | dataset | subset
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
    if key in NOT_NEEDED:
        return ""
    if key == "metadata_file":
        return f"{key}={value}: its captions are not read; write them into .txt files next to the pictures"
    others = {"resolution": "resolution", "batch_size": "batch_size", "bucket_no_upscale": "bucket_rule"}
    if name := others.get(key) or SAME.get(key):
        return f"{key}={value}: left out, in lorakit this is the run's setting `{name}`"
    return f"{key}={value}: left out, lorakit has no such setting for a folder"
