"""Settings written for kohya's sd-scripts, or its GUI, as a lorakit config.

Three forms: the TOML of `--config_file`, a command line, and the GUI's JSON presets. What is understood is mapped;
everything else that was set to something is named, with why: nothing is dropped in silence.
"""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit import config as configs
from lorakit.config import Config


@dataclass(frozen=True)
class Imported:
    """What was made of kohya's settings."""

    config: Config
    notes: tuple[str, ...]  # a line for each setting that means something else here, or nothing


def read(path: str | Path) -> Imported:
    """Read a settings file: `.toml` of sd-scripts, `.json` of the GUI, or any other text as a command line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read as what its name says, or its values do not make a run.
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
        ValueError: no option in it, or values that do not make a run.
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
    """The words of a command line: quotes hold together, as a backslash before a space does; others are Windows'.

    Raises:
        ValueError: a quote is not closed.
    """
    words = shlex.shlex(re.sub(r"\\ (?!-)", "\0", line), posix=True, punctuation_chars=False)
    words.whitespace_split, words.escape, words.commenters = True, "", ""
    try:
        return [word.replace("\0", " ") for word in words]
    except ValueError as error:
        raise ValueError(
            f"This command line of kohya's cannot be read: {error}. Close or leave out the quote."
        ) from None


TEXTS = ("pretrained_model_name_or_path", "train_data_dir", "reg_data_dir", "output_name", "network_weights")


def _value(text: str, name: str = "") -> Any:
    if name in TEXTS:  # "2024_05" is a name, and a number to Python
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _tables(text: str, path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name} is not valid TOML: {error}.") from error


def _from_toml(text: str, path: Path) -> dict[str, Any]:
    tables = _tables(text, path)
    if "datasets" in tables:
        raise ValueError(
            f"{path.name} describes datasets, not a training run. Give the --config_file of the run, "
            "or its command line; this file itself can be the run's `dataset`."
        )
    settings = {}
    for key, value in tables.items():  # sd-scripts ignores the names of tables
        settings |= value if isinstance(value, dict) else {key: value}
    return settings


def _from_gui(text: str, path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path.name} holds a {type(settings).__name__}, not the GUI's settings in {{…}}.")
    renamed = {key: GUI.get(key, key) for key in settings}
    found = {renamed[key]: _value(v, renamed[key]) if isinstance(v, str) else v for key, v in settings.items()}
    if not found.get("text_encoder_lr") and not found.get("unet_lr"):  # left empty: the run's rate for both
        found.pop("text_encoder_lr", None)
        found.pop("unet_lr", None)
    if found.get("gui_lora_type") == "Standard":  # the GUI keeps what it shows for other types alone
        for key in ("conv_dim", "conv_alpha", "dora_wd", "factor", "algo", "preset"):
            found.pop(key, None)
    if found.get("gui_warmup_percent"):  # the GUI has it in percent of the run
        found.setdefault("lr_warmup_steps", float(found["gui_warmup_percent"]) / 100)
    found.pop("gui_warmup_percent", None)
    return found


GUI = {  # the GUI's names -> sd-scripts'
    "max_resolution": "resolution",
    "epoch": "max_train_epochs",
    "optimizer": "optimizer_type",
    "lr_warmup": "gui_warmup_percent",
    "LoRA_type": "gui_lora_type",
    "LyCORIS_preset": "preset",
    "lora_network_weights": "network_weights",
    "vae_batch_size": "vae_batch_size",
}

# ── What is understood ──────────────────────────────────────────────────────────────────────────────────────────────

SAME = {  # sd-scripts' name -> ours, where the value means the same
    "pretrained_model_name_or_path": "base",
    "train_data_dir": "dataset",
    "output_name": "name",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "zero_terminal_snr": "zero_terminal_snr",
    "network_weights": "start_from",
    "network_dim": "rank",
    "network_alpha": "alpha",
    "conv_dim": "conv_rank",
    "conv_alpha": "conv_alpha",
    "max_grad_norm": "max_grad_norm",
    "lr_warmup_steps": "warmup_steps",
    "lr_scheduler_num_cycles": "schedule_cycles",
    "lr_scheduler_power": "schedule_power",
    "min_snr_gamma": "min_snr_gamma",
    "debiased_estimation_loss": "debiased",
    "noise_offset": "noise_offset",
    "multires_noise_iterations": "multires_noise_iterations",
    "multires_noise_discount": "multires_noise_discount",
    "ip_noise_gamma": "input_perturbation",
    "huber_c": "huber_delta",
    "min_timestep": "min_timestep",
    "max_timestep": "max_timestep",
    "caption_dropout_rate": "caption_dropout",
    "flip_aug": "flip",
    "shuffle_caption": "shuffle_captions",
    "keep_tokens": "keep_tokens",
    "caption_tag_dropout_rate": "tag_dropout",
    "reg_data_dir": "regularisation",
    "prior_loss_weight": "prior_weight",
    "bucket_reso_steps": "bucket_step",
    "min_bucket_reso": "min_bucket_side",
    "max_bucket_reso": "max_bucket_side",
    "clip_skip": "clip_skip",
    "seed": "seed",
    "save_every_n_steps": "save_every",
    "sample_every_n_steps": "sample_every",
}
DEFAULTS = {  # sd-scripts' own, where they are not ours
    "network_dim": 4, "network_alpha": 1, "learning_rate": 2e-6, "optimizer_type": "AdamW", "lr_scheduler": "constant",
    "max_train_steps": 1600, "min_snr_gamma": None, "resolution": 512, "train_batch_size": 1,
}  # fmt: skip
OFF_AT_0 = {  # what the GUI writes where a field was left empty
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
NOT_NEEDED = {  # what each of them asks for is always so here, is found out, or changes no weight
    **dict.fromkeys(("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs",
                     "cache_text_encoder_outputs_to_disk", "vae_batch_size", "max_data_loader_n_workers",
                     "persistent_data_loader_workers", "num_cpu_threads_per_process"),
                    "pictures and captions are always encoded once, before training"),
    **dict.fromkeys(("xformers", "sdpa", "mem_eff_attn"), "torch's own fused attention is always used"),
    **dict.fromkeys(("enable_bucket",), "buckets are always used"),
    **dict.fromkeys(("v2", "sdxl", "sdxl_checkbox"), "the base itself tells its family"),
    **dict.fromkeys(("no_half_vae",), "a VAE that overflows in half precision is run in float32"),
    **dict.fromkeys(("save_model_as", "save_precision"), "`export` chooses format and precision; safetensors alone"),
    **dict.fromkeys(("output_dir", "logging_dir", "log_with", "log_prefix", "save_state", "save_last_n_steps"),
                    "one run folder holds everything: `train CONFIG --out FOLDER`; it resumes by itself"),
    **dict.fromkeys(("caption_extension",), ".txt and .caption are both read"),
    **dict.fromkeys(("script", "gui_lora_type", "network_module", "lowram", "highvram",
                     "training_comment", "metadata_title", "metadata_author"), ""),
}  # fmt: skip


def convert(settings: dict[str, Any]) -> Imported:
    """Map sd-scripts' settings, by their own names, to a config.

    Raises:
        ValueError: values that do not make a run.
    """
    given = {key: value for key, value in settings.items() if value is not None and value != ""}
    for item in _listed(given.pop("network_args", ())) + _listed(given.pop("optimizer_args", ())):
        key, _, value = item.partition("=")
        given[key.strip()] = _value(value.strip())
    taken, notes, ours = set(), [], {}

    def take(key: str, default: Any = None) -> Any:
        taken.add(key)
        return given.get(key, DEFAULTS.get(key, default))

    for key, name in SAME.items():
        value = take(key)
        if name in ("base", "dataset", "name", "regularisation", "start_from") and value is not None:
            value = str(value)
        if value == 0 and name in OFF_AT_0:
            value = None
        if value is not None or name == "min_snr_gamma":
            ours[name] = value
    ours |= _length(take, notes) | _rates(take, notes) | _size(take, notes) | _choices(take, notes)
    if take("v_parameterization"):
        ours["prediction_type"] = "v_prediction"
    if ours.get("conv_rank"):
        ours["targets"] = "attention+conv"
    ours |= _algorithm(take, notes)
    ours |= _blocks(take, notes, "conv" in ours.get("targets", ""))
    for key in sorted(given.keys() - taken):
        if key in NOT_NEEDED:
            if NOT_NEEDED[key] and given[key]:
                notes.append(f"{key}: not needed, {NOT_NEEDED[key]}")
        elif given[key] not in (False, 0, "0", [], {}):  # switched off changes nothing
            notes.append(f"{key}={given[key]}: lorakit has no such setting; it was left out")
    return Imported(configs.parse(ours, "kohya's settings"), tuple(notes))


def _listed(value: Any) -> list[str]:
    """`["a=1", "b=2"]`, or the GUI's `a=1 b=2`."""
    return shlex.split(value) if isinstance(value, str) else [str(item) for item in value or ()]


PLAIN = {  # what asks for a LoRA, by any of its names
    "algo": ("lora", "locon"), "gui_lora_type": ("standard", "kohya locon", "lycoris/locon", "lora"),
    "network_module": ("networks.lora", "lycoris.kohya", "locon.locon_kohya"),
}  # fmt: skip


def _algorithm(take: Callable, notes: list[str]) -> dict:
    """LyCORIS's `algo`, sd-scripts' network modules, and the GUI's names of both."""
    ours: dict[str, Any] = {}
    said = {key: str(take(key) or "").lower() for key in PLAIN}
    for key, value in said.items():
        name = next((name for name in ("loha", "lokr") if re.split(r"[/.]", value)[-1] == name), "")
        if name:
            ours["algorithm"] = name
            break
        if value and value not in PLAIN[key]:
            notes.append(f"{key}={take(key)}: lorakit trains LoRA, LoCon, DoRA, LoHa and LoKr; this became a LoRA")
    factor = int(float(take("factor") or take("lokr_factor") or -1))
    if ours.get("algorithm") == "lokr":
        ours["lokr_factor"] = factor if factor > 1 else None
        for key, setting in (("network_dim", "rank"), ("conv_dim", "conv_rank")):
            if (take(key) or 0) > 1024:
                ours[setting] = 1024
                notes.append(f"{key}={take(key)}: 1024 here, the most; it asks for whole matrices, and is as good")
    if take("dora_wd"):
        if "algorithm" in ours:
            notes.append(f"dora_wd: left out, lorakit has no DoRA of {ours['algorithm']}")
        else:
            ours["algorithm"] = "dora"
            if take("wd_on_output") is not False:
                notes.append("dora_wd: by columns here, which all programs read alike; LyCORIS takes rows by default")
    lycoris = said["network_module"].startswith("lycoris") or said["gui_lora_type"].startswith("lycoris")
    # LyCORIS adapts the convolutions unless its preset says otherwise.
    if lycoris and not any(word in str(take("preset") or "full") for word in ("attn", "transformer", "lin")):
        ours["targets"] = "attention+conv"
    return ours


def _places(convolutions: bool) -> dict[str, int]:
    """SD 1.x and 2.x: a place in the UNet → its number among sd-scripts' 25 blocks, 12 down, 1 in the middle, 12 up."""
    downs, ups = [(i, j) for i in range(4) for j in range(2)], [(i, j) for i in range(4) for j in range(3)]
    places = {f"down_blocks.{i}.attentions.{j}": 1 + 3 * i + j for i, j in downs if i < 3} | {"mid_block": 12}
    places |= {f"up_blocks.{i}.attentions.{j}": 13 + 3 * i + j for i, j in ups if i > 0}
    if convolutions:
        places |= {f"down_blocks.{i}.resnets.{j}": 1 + 3 * i + j for i, j in downs}
        places |= {f"down_blocks.{i}.downsamplers": 3 + 3 * i for i in range(3)}
        places |= {f"up_blocks.{i}.resnets.{j}": 13 + 3 * i + j for i, j in ups}
        places |= {f"up_blocks.{i}.upsamplers": 15 + 3 * i for i in range(3)}
    return places


def _blocks(take: Callable, notes: list[str], convolutions: bool) -> dict:
    """Ranks and rates by block, as sd-scripts' network_args have them."""
    keys = ("block_dims", "down_lr_weight", "mid_lr_weight", "up_lr_weight")
    given = {key: str(value).split(",") if not isinstance(value, list) else value
             for key in keys if (value := take(key)) is not None}  # fmt: skip
    try:
        numbers = {key: [float(value) for value in values] for key, values in given.items()}
    except ValueError:  # "sine", "cosine" …
        numbers = None
    sdxl = "sdxl" in str(take("script") or "") or take("sdxl") or take("sdxl_checkbox")
    wanted = {"block_dims": 25, "down_lr_weight": 12, "mid_lr_weight": 1, "up_lr_weight": 12}
    if numbers is None or sdxl or any(len(values) != wanted[key] for key, values in numbers.items()):
        notes.extend(f"{key}={take(key)}: read as 25 blocks of SD 1.x and 2.x alone; use block_ranks, block_rates"
                     for key in given)  # fmt: skip
        return {}
    ours: dict[str, Any] = {}
    places = _places(convolutions)
    if dims := numbers.get("block_dims"):
        ours["block_ranks"] = {place: int(dims[number]) for place, number in places.items()}
        wide = int(take("conv_dim") or 0)  # which the 3×3 convolutions keep
        for place in [place for place in places if wide and "attentions" not in place and place != "mid_block"]:
            inner = (".conv1", ".conv2") if "resnets" in place else ("",)
            ours["block_ranks"] |= {place + name: wide for name in inner}
        if wide:
            ours["block_ranks"] |= {f"mid_block.resnets.{j}.conv{k}": wide for j in (0, 1) for k in (1, 2)}
        if take("block_alphas"):
            notes.append("block_alphas: left out, alpha / rank is the same in all blocks here")
    weights = [numbers.get(key, [1.0] * wanted[key]) for key in keys[1:]]
    rates = {place: sum(weights, [])[number] for place, number in places.items()}
    if set(rates.values()) != {1.0}:
        ours["block_rates"] = {place: rate for place, rate in rates.items() if rate != 1.0}
    return ours


def _length(take: Callable, notes: list[str]) -> dict:
    epochs, steps = take("max_train_epochs"), take("max_train_steps")
    return {"epochs": int(epochs)} if epochs else {"steps": int(steps)}  # as in sd-scripts, epochs go first


def _rates(take: Callable, notes: list[str]) -> dict:
    rate, unet, text = take("learning_rate"), take("unet_lr"), take("text_encoder_lr")
    text_only, unet_only = take("network_train_text_encoder_only"), take("network_train_unet_only")
    if unet == 0 and text != 0 and not unet_only:  # a rate of 0 trains nothing, in sd-scripts and its GUI
        text_only, unet = True, None
    if text_only and unet_only:
        raise ValueError("network_train_unet_only and network_train_text_encoder_only leave nothing to train.")
    # sd-scripts trains text encoders unless it is told not to, at the run's rate where they have none of their own.
    own = [float(value) for value in (text if isinstance(text, list) else [rate if text is None else text])]
    if unet_only or take("cache_text_encoder_outputs"):
        own = [0.0]
    ours = {"learning_rate": float(unet or rate), "text_encoder_rate": own[0], "train_unet": not text_only}
    if len(own) > 1 and own[1] != own[0]:
        ours["text_encoder_2_rate"] = own[1]
    ratio = take("loraplus_lr_ratio") or take("loraplus_unet_lr_ratio") or 1.0
    return ours | {"learning_rate_ratio": float(ratio)}


def _size(take: Callable, notes: list[str]) -> dict:
    value = take("resolution")
    sides = [int(float(side)) for side in (value if isinstance(value, list) else str(value).split(","))]
    side = round((sides[0] * sides[-1]) ** 0.5)  # buckets keep the area
    step = int(take("bucket_reso_steps") or 64)
    fitting = max(step, round(side / step) * step)
    if fitting != sides[0] or len(set(sides)) > 1:
        notes.append(f"resolution={value}: buckets keep the area of {fitting}×{fitting} here")
    ours, own = {"resolution": fitting, "bucket_step": step}, take("bucket_no_upscale")
    if not take("enable_bucket", True):  # then sd-scripts asks for none of the others
        notes.append("enable_bucket=False: pictures go into buckets by their shape here, and are not cut to squares")
    elif own:
        ours["bucket_rule"] = "no_upscale"
    elif take("enable_bucket") and 256 <= fitting <= 1024:  # the limits that sd-scripts has where none are given
        ours["min_bucket_side"] = int(take("min_bucket_reso") or 256)
        ours["max_bucket_side"] = int(take("max_bucket_reso") or 1024)
    return ours


def _choices(take: Callable, notes: list[str]) -> dict:
    ours: dict[str, Any] = {}
    for key, name, known in (("optimizer_type", "optimizer", OPTIMIZERS), ("loss_type", "loss", LOSSES)):
        value = take(key)
        if value is not None:
            if str(value).lower() in known:
                ours[name] = known[str(value).lower()]
            else:
                notes.append(
                    f"{key}={value}: lorakit has {', '.join(dict.fromkeys(known.values()))}; the first is used"
                )
    if take("use_8bit_adam"):
        ours["optimizer"] = "adamw8bit"
    schedule = str(take("lr_scheduler"))
    if schedule in Config.model_fields["schedule"].annotation.__args__:
        ours["schedule"] = schedule
    else:
        notes.append(f"lr_scheduler={schedule}: unknown here; 'constant' is used")
    if ours.get("schedule") == "constant" and take("lr_warmup_steps"):
        ours["warmup_steps"] = 0
        notes.append("lr_warmup_steps with lr_scheduler=constant: left out, as sd-scripts ignores it")
    if (decay := take("weight_decay")) is not None:
        ours["weight_decay"] = float(decay)
    precision = take("mixed_precision")
    if precision in ("no", "fp16", "bf16"):
        ours["mixed_precision"] = precision
    prompts = take("sample_prompts")
    if isinstance(prompts, str):
        notes.append("sample_prompts: in kohya's own form; put the prompts into `sample_prompts` as a list")
    elif prompts:
        ours["sample_prompts"] = tuple(str(prompt) for prompt in prompts)
    return ours


# ── Datasets ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Subset:
    """A folder of sd-scripts' dataset TOML, whose subfolders are not read."""

    folder: Path
    repeats: int
    caption: str  # for pictures without a caption file: `class_tokens`
    extension: str  # of caption files, ".txt"; "" where it is not said
    regularisation: bool


def subsets(path: Path) -> tuple[list[Subset], list[str]]:
    """The folders that sd-scripts' dataset TOML names, and a line for each setting that is not taken over from it.

    Relative folders are meant from the TOML's own folder.

    Raises:
        ValueError: it is no such TOML, or a value in it is not what it must be.
    """
    tables = _tables(path.read_text(encoding="utf-8-sig"), path)
    found, notes = [], []
    try:
        for dataset in tables["datasets"]:
            for subset in dataset["subsets"]:
                given = tables.get("general", {}) | dataset | subset
                extension = str(given.get("caption_extension", ""))
                found.append(
                    Subset(
                        folder=path.parent / Path(given["image_dir"]).expanduser(),
                        repeats=int(given.get("num_repeats", 1)),
                        caption=str(given.get("class_tokens", "")),
                        extension=extension and "." + extension.lstrip("."),
                        regularisation=bool(given.get("is_reg", False)),
                    )
                )
                notes += [_not_taken(key, value) for key, value in given.items() if key not in TAKEN and value]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        form = "[[datasets]] with [[datasets.subsets]], each with an image_dir"
        raise ValueError(f"{path.name} is no dataset TOML of sd-scripts ({error!r}): it must have {form}.") from error
    return found, [note for note in dict.fromkeys(notes) if note]


TAKEN = ("image_dir", "num_repeats", "class_tokens", "caption_extension", "is_reg", "subsets")


def _not_taken(key: str, value: Any) -> str:
    if key in NOT_NEEDED:
        return ""
    if key == "metadata_file":
        return f"{key}={value}: its captions are not read; write them beside the pictures, into .txt files"
    others = {"resolution": "resolution", "batch_size": "batch_size", "bucket_no_upscale": "bucket_rule"}
    name = others.get(key) or SAME.get(key)
    if name:
        return f"{key}={value}: a setting of the run here, `{name}`"
    return f"{key}={value}: lorakit has no such setting for a folder; it was left out"
