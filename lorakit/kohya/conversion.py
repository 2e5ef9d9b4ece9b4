"""Convert settings by sd-scripts' names to a lorakit config.

Known settings are converted. A value that lorakit does not have becomes the nearest one that it has; every other
setting that is switched on is left out. Notes say both, those that change the result first.
"""

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from lorakit import config as configs
from lorakit.config import Config
from lorakit.kohya import blocks, tables
from lorakit.kohya.given import Given

TEXTS = ("pretrained_model_name_or_path", "train_data_dir", "reg_data_dir", "output_name", "network_weights")
SAFE_RATE = 1e-4  # for an optimizer whose own rate lorakit lacks: that of most published recipes
HIGHEST_RATE = 1e-2  # a higher one destroys a LoRA unless the optimizer finds its rate itself
SELF_TUNING = ("dadapt", "prodigy")  # optimizers that find the rate themselves, and multiply it by the one given
SEEDS = 2**32
OFF: tuple[Any, ...] = (False, 0, "0", [], {})  # a setting that is not known and off changes nothing
HANDLED = ("script", "preset", "config_file", "dataset_config", "noise_offset_type", "warmup_init", "scale_parameter")


@dataclass(frozen=True)
class Imported:
    """A converted config."""

    config: Config
    notes: tuple[str, ...]  # a line for each setting that has another meaning, or none, in lorakit


def convert(settings: Mapping[str, Any]) -> Imported:
    """Convert settings by sd-scripts' names.

    Raises:
        ValueError: nothing that is known, another program's or another model's settings, nothing to train, or an
            unknown optimizer at a rate that would destroy the LoRA.
    """
    given = {key: value for key, value in settings.items() if value is not None and value != ""}
    _check_kind(given)
    for key in ("network_args", "optimizer_args"):
        given |= _arguments(given.pop(key, ()))
    kohya = Given(given, {*HANDLED})
    ours = _same(kohya) | _size(kohya) | _choices(kohya)
    ours |= _rates(kohya)
    ours |= _optimizer(kohya, ours)
    ours |= _length(kohya) | _masks(kohya)
    if kohya.flag("v_parameterization"):
        ours["prediction_type"] = "v_prediction"
    if ours.get("conv_rank"):
        ours["targets"] = "attention+conv"
    ours |= _algorithm(kohya)
    ours |= blocks.by_block(kohya, "conv" in ours.get("targets", ""))
    _settle(kohya, ours)
    if not given.keys() & (kohya.used | tables.NOT_NEEDED):
        raise ValueError("There is no setting of kohya's sd-scripts or its GUI in it.")
    _note_rest(kohya)
    return Imported(configs.parse(ours, "kohya's settings"), tuple(kohya.notes))


def value_of(text: str, name: str = "") -> Any:
    """A text as a number, True, False or None where it says one; the settings in TEXTS stay texts."""
    text = text.strip()
    if name in TEXTS:  # the name "2024_05" would be a number in Python
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _arguments(value: Any) -> dict[str, Any]:
    """The items of network_args or optimizer_args: `["a=1", "b=2"]`, the GUI's `a=1 b=2`, or a table."""
    if isinstance(value, Mapping):
        return dict(value)
    try:
        items = shlex.split(value) if isinstance(value, str) else [str(item) for item in value or ()]
    except (TypeError, ValueError):
        items = str(value).split()
    pairs = (item.partition("=") for item in items)
    return {key.strip(): value_of(text) for key, _, text in pairs if key.strip()}


def _check_kind(given: Mapping[str, Any]) -> None:
    """Refuse settings of other programs and other models."""
    for names, program in tables.OTHER_TRAINERS.items():
        if all(name in given for name in names):
            raise ValueError(f"These are settings of {program}; lorakit reads those of kohya's sd-scripts and its GUI.")
    kinds = " ".join(str(given.get(key, "")) for key in ("network_module", "script", "gui_lora_type")).lower()
    for word, model in tables.OTHER_MODELS.items():
        if word in kinds or any(given.get(f"{name}_checkbox") is True for name in (word, f"{word}1", f"{word}_image")):
            raise ValueError(f"These settings train {model}; lorakit trains Stable Diffusion 1.x, 2.x and XL.")


# ── Numbers, texts and switches ─────────────────────────────────────────────────────────────────────────────────────


def _same(kohya: Given) -> dict[str, Any]:
    """Settings that have the same meaning under another name."""
    ours: dict[str, Any] = {"min_snr_gamma": None}
    for key, name in tables.SAME.items():
        kinds = {
            kind for kind in get_args(Config.model_fields[name].annotation) or (Config.model_fields[name].annotation,)
        }
        if key not in kohya.settings and key not in tables.DEFAULTS:
            continue
        if str in kinds:
            value: Any = kohya.text(key)
        elif bool in kinds:
            value = kohya.flag(key)
        else:
            value = _number(kohya, key, name, whole=int in kinds)
        if value is not None:
            ours[name] = value
    if "name" in ours:
        ours["name"] = re.sub(r"[^\w .+-]", "_", ours["name"]).lstrip(" .+-") or "lora"
        if ours["name"] != kohya.text("output_name"):
            kohya.note("output_name", f"{ours['name']!r} is used, which can be a file's name everywhere")
    if kohya.take("network_alpha") == 0:
        ours["alpha"] = ours.get("rank", tables.DEFAULTS["network_dim"])  # as in sd-scripts
    return ours


def _number(kohya: Given, key: str, name: str, whole: bool) -> int | float | None:
    """A number within the limits of a setting of ours; the nearest one if it is beyond them, which is noted."""
    value = kohya.number(key)
    if value is None or (value == 0 and (name in tables.OFF_AT_0 or key == "network_alpha")):
        return None
    if name == "seed" and not 0 <= value < SEEDS:
        kohya.note(key, f"{int(value) % SEEDS} is used; seeds are below {SEEDS:,}")
        return int(value) % SEEDS
    value = int(value) if whole else value
    limits = {bound: getattr(rule, bound) for rule in Config.model_fields[name].metadata
              for bound in ("ge", "gt", "le", "lt") if hasattr(rule, bound)}  # fmt: skip
    low, high = limits.get("ge", limits.get("gt", -math.inf)), limits.get("le", limits.get("lt", math.inf))
    if value < low or ("gt" in limits and value == low):
        nearest = low if value > 0 else None
    elif value > high or ("lt" in limits and value == high):
        nearest = high if "le" in limits else None
    else:
        return value
    nearest = tables.DEFAULTS.get(key) if nearest is None else nearest
    what = "left out" if nearest is None else f"{nearest:g} is used"
    kohya.note(key, f"{what}, lorakit has {_range(limits)}")
    return nearest


def _range(limits: Mapping[str, float]) -> str:
    words = {"ge": "{:g} or more", "gt": "more than {:g}", "le": "at most {:g}", "lt": "less than {:g}"}
    return " and ".join(words[bound].format(limit) for bound, limit in limits.items())


def _length(kohya: Given) -> dict[str, Any]:
    """Epochs or steps, by the first that is set: max_train_epochs, max_train_steps, the GUI's epoch."""
    own_steps = "max_train_steps" in kohya.settings
    epochs, steps, usual = (kohya.number(key) for key in ("max_train_epochs", "max_train_steps", "epoch"))
    if epochs and epochs >= 1:
        return {"epochs": int(epochs)}
    if steps and steps >= 1 and own_steps:
        return {"steps": int(steps)}
    if usual and usual >= 1:
        return {"epochs": int(usual)}
    return {"steps": tables.DEFAULTS["max_train_steps"]}


def _size(kohya: Given) -> dict[str, Any]:
    sides = [side for side in kohya.numbers("resolution") if side > 0][:2] or [tables.DEFAULTS["resolution"]]
    side = min(max(round((sides[0] * sides[-1]) ** 0.5), 64), 4096)  # buckets keep the area
    asked = kohya.number("bucket_reso_steps") or 64
    step = int(min(max(asked, 8), 512))
    if step != asked:
        kohya.note("bucket_reso_steps", f"{step} is used, pictures are cropped to whole latents")
    resolution = max(step, round(side / step) * step)
    if resolution != sides[0] or len(set(sides)) > 1:
        kohya.note("resolution", f"buckets have the area of {resolution}×{resolution}")
    ours: dict[str, Any] = {"resolution": resolution, "bucket_step": step}
    low, high = kohya.number("min_bucket_reso"), kohya.number("max_bucket_reso")
    no_upscale = kohya.flag("bucket_no_upscale")
    if not kohya.take("enable_bucket", True):  # then sd-scripts ignores the other settings of buckets
        kohya.note("enable_bucket", "pictures are put into buckets by shape, not cropped to squares")
        return ours
    if no_upscale:
        ours["bucket_rule"] = "no_upscale"
    elif kohya.flag("enable_bucket") and 256 <= resolution <= 1024:  # sd-scripts' default limits
        low, high = low or 256, high or 1024
    if low and low >= 1:
        ours["min_bucket_side"] = int(min(low, resolution))
    if high and high >= 1:
        ours["max_bucket_side"] = int(max(high, resolution))
    for key, value, name in (("min_bucket_reso", low, "min_bucket_side"), ("max_bucket_reso", high, "max_bucket_side")):
        if value and ours.get(name) != value:
            kohya.note(key, f"{ours.get(name)} is used, buckets have the area of the resolution")
    return ours


def _masks(kohya: Given) -> dict[str, Any]:
    if kohya.flag("alpha_mask"):
        return {"mask": "alpha"}
    folder = kohya.text("conditioning_data_dir")
    if kohya.flag("masked_loss"):
        if folder:
            return {"mask": folder}
        kohya.note("masked_loss", "left out, the masks are not named: set `mask` to their folder, or to 'alpha'")
    return {}


# ── Choices ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _choices(kohya: Given) -> dict[str, Any]:
    ours: dict[str, Any] = {}
    loss = str(kohya.take("loss_type", "l2")).lower()
    if loss not in tables.LOSSES:
        kohya.note("loss_type", f"lorakit has {', '.join(tables.LOSSES.values())}; the first is used")
    elif loss != "l2":
        ours["loss"] = tables.LOSSES[loss]
    schedule = str(kohya.take("lr_scheduler"))
    if schedule in get_args(Config.model_fields["schedule"].annotation):
        ours["schedule"] = schedule
    elif not schedule.startswith("adafactor"):  # which is that of its relative steps
        kohya.note("lr_scheduler", "lorakit has no such schedule; 'constant' is used")
    if kohya.take("lr_scheduler_type"):
        kohya.note("lr_scheduler_type", f"left out, lorakit has no such schedule; {ours.get('schedule')!r} is used")
    tokens = kohya.number("max_token_length")
    if tokens in (75, 150, 225):
        ours["max_token_length"] = int(tokens)
    elif tokens:
        kohya.note("max_token_length", "left out, it is 75, 150 or 225")
    if kohya.flag("enable_wildcard"):
        ours |= {"caption_lines": "random", "caption_choices": True}
    if (precision := kohya.take("mixed_precision")) in ("no", "fp16", "bf16"):
        ours["mixed_precision"] = precision
    return ours | _prompts(kohya)


def _prompts(kohya: Given) -> dict[str, Any]:
    prompts = kohya.take("sample_prompts")
    if isinstance(prompts, str) and prompts.lower().endswith((".txt", ".toml", ".json")):
        kohya.note("sample_prompts", "left out, give the file's prompts as a list")
        return {}
    lines = prompts.splitlines() if isinstance(prompts, str) else prompts if isinstance(prompts, list) else []
    texts = [str(line).partition(" --")[0].strip() for line in lines if not str(line).startswith("#")]
    return {"sample_prompts": tuple(filter(None, texts))} if any(texts) else {}


def _optimizer(kohya: Given, ours: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer, and other rates where it finds its rate itself."""
    given = str(kohya.take("optimizer_type"))
    name = "adamw8bit" if kohya.flag("use_8bit_adam") else "lion" if kohya.flag("use_lion_optimizer") else given.lower()
    short, rate = name.rpartition(".")[2], ours["learning_rate"]
    if name in tables.OPTIMIZERS:
        optimizer = tables.OPTIMIZERS[name]
    elif short.startswith(SELF_TUNING):
        optimizer = "prodigy"
        kohya.note("optimizer_type", "prodigy is used, which finds the learning rate itself too")
    elif short in tables.NEAREST_OPTIMIZERS or short in tables.OPTIMIZERS:
        optimizer = tables.NEAREST_OPTIMIZERS.get(short) or tables.OPTIMIZERS[short]
        kohya.note("optimizer_type", f"{optimizer} is used, the nearest that lorakit has")
    else:
        known = ", ".join(dict.fromkeys(tables.OPTIMIZERS.values()))
        if rate > HIGHEST_RATE:
            raise ValueError(
                f"optimizer_type={given} with a learning rate of {rate:g}: lorakit has {known}. With most of them this "
                "rate destroys the LoRA. Set optimizer_type to Prodigy, or to AdamW with a rate such as 1e-4."
            )
        optimizer = "adamw"
        kohya.note("optimizer_type", f"adamw is used; lorakit has {known}")
    if optimizer == "adafactor" and kohya.take("relative_step", True) is not False:
        kohya.notes.append(
            f"relative_step: {SAFE_RATE:g} is used, lorakit's Adafactor has a fixed rate; sd-scripts' default for it "
            "does not use the learning rate"
        )
        text = SAFE_RATE if ours["text_encoder_rate"] else 0.0
        return {"optimizer": optimizer, "learning_rate": SAFE_RATE, "text_encoder_rate": text,
                "text_encoder_2_rate": None}  # fmt: skip
    if optimizer != "prodigy" and rate > HIGHEST_RATE:
        kohya.note("learning_rate", f"far too high for {optimizer}: expect nothing but noise; 1e-4 is usual")
    return {"optimizer": optimizer}


def _rates(kohya: Given) -> dict[str, Any]:
    rate, unet = (kohya.number(key) for key in ("learning_rate", "unet_lr"))
    text = kohya.numbers("text_encoder_lr")
    text_only, unet_only = (kohya.flag(f"network_train_{part}_only") for part in ("text_encoder", "unet"))
    if unet == 0 and text != [0] and not unet_only:  # in sd-scripts and its GUI, a rate of 0 trains nothing
        text_only, unet = True, None
    if text_only and unet_only:
        raise ValueError("network_train_unet_only and network_train_text_encoder_only leave nothing to train.")
    # sd-scripts trains text encoders by default, at the run's rate if they have none.
    usual = rate if rate and rate > 0 else tables.DEFAULTS["learning_rate"]
    rates = [min(max(value, 0.0), 1.0) for value in text or [usual]]
    if unet_only or kohya.flag("cache_text_encoder_outputs"):
        rates = [0.0]
    first = unet if unet and unet > 0 else usual
    if first > 1:
        kohya.note("unet_lr" if unet else "learning_rate", "1 is used, the highest rate that lorakit has")
    ours = {"learning_rate": min(first, 1.0), "text_encoder_rate": rates[0], "train_unet": not text_only}
    if len(rates) > 1 and rates[1] != rates[0]:
        ours["text_encoder_2_rate"] = rates[1]
    if text_only and not any(rates):
        raise ValueError("network_train_text_encoder_only with text_encoder_lr=0 leaves nothing to train.")
    ratio = kohya.number("loraplus_lr_ratio") or kohya.number("loraplus_unet_lr_ratio") or 1.0
    return ours | {"learning_rate_ratio": ratio if ratio > 0 else 1.0}


def _algorithm(kohya: Given) -> dict[str, Any]:
    """From LyCORIS's `algo`, sd-scripts' network modules, and the GUI's names of both."""
    ours: dict[str, Any] = {}
    types = {key: str(kohya.take(key) or "").lower() for key in tables.PLAIN}
    for key, value in types.items():
        name = next((name for name in ("loha", "lokr") if re.split(r"[/.]", value)[-1] == name), "")
        if name:
            ours["algorithm"] = name
            break
        if value and value not in tables.PLAIN[key]:
            kohya.note(key, "converted to a LoRA; lorakit trains LoRA, LoCon, DoRA, LoHa and LoKr")
    factor = int(kohya.number("factor") or kohya.number("lokr_factor") or -1)
    if ours.get("algorithm") == "lokr":
        ours["lokr_factor"] = factor if factor > 1 else None
    if kohya.flag("dora_wd"):
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


# ── Settings that do not go together ────────────────────────────────────────────────────────────────────────────────


def _settle(kohya: Given, ours: dict[str, Any]) -> None:
    """Change settings that lorakit does not combine, and note each by kohya's name."""
    warmup = ours.get("warmup_steps", 0)
    if warmup and ours.get("schedule", "constant") == "constant":
        kohya.notes.append("lr_warmup_steps with lr_scheduler=constant: left out, as sd-scripts ignores it")
        ours["warmup_steps"] = 0
    elif warmup > 1:
        ours["warmup_steps"] = round(warmup)
    if ours.get("debiased") and ours.get("min_snr_gamma"):
        ours["debiased"] = False
        kohya.notes.append("debiased_estimation_loss: left out, min_snr_gamma is used; lorakit does not combine them")
    if ours.get("min_timestep", 0) >= ours.get("max_timestep", 1000):
        ours |= {"min_timestep": 0, "max_timestep": 1000}
        kohya.notes.append("min_timestep, max_timestep: left out, they leave no timestep")
    if ours["optimizer"] == "adamw_schedulefree" and not ours.get("schedule", "constant").startswith("constant"):
        ours["schedule"] = "constant_with_warmup" if warmup else "constant"
        kohya.note("lr_scheduler", f"{ours['schedule']!r} is used; the optimizer has a schedule of its own")
    if ours["optimizer"] == "prodigy":
        _settle_prodigy(kohya, ours)


def _settle_prodigy(kohya: Given, ours: dict[str, Any]) -> None:
    """Prodigy has one rate for all weights, about 1."""
    if ours["learning_rate"] < 0.1:
        kohya.note(
            "unet_lr" if kohya.number("unet_lr") else "learning_rate",
            "1 is used; Prodigy multiplies its own rate by it",
        )
        ours["learning_rate"] = 1.0
    rate = ours["learning_rate"]
    for name in ("text_encoder_rate", "text_encoder_2_rate"):
        if ours.get(name) not in (None, 0, rate):
            if kohya.take("text_encoder_lr"):
                kohya.note("text_encoder_lr", f"{rate:g} is used; Prodigy has one rate for all weights")
            ours[name] = rate
    if ours["learning_rate_ratio"] != 1 or ours.get("block_rates"):
        kohya.notes.append("loraplus_lr_ratio, *_lr_weight: left out; Prodigy has one rate for all weights")
        ours |= {"learning_rate_ratio": 1.0, "block_rates": {}}


# ── What is left ────────────────────────────────────────────────────────────────────────────────────────────────────


def _note_rest(kohya: Given) -> None:
    """Note the settings that were not used: a line for each that could change the result, one for all others."""
    rest = sorted(key for key in kohya.settings.keys() - kohya.used if kohya.settings[key] not in OFF)
    for key in rest:
        if key not in tables.NOT_NEEDED:
            kohya.note(key, "left out, lorakit has no such setting")
    if idle := [key for key in rest if key in tables.NOT_NEEDED]:
        kohya.notes.append(
            f"{', '.join(idle)}: not needed, lorakit does this anyway, finds it out, or the LoRA stays the same"
        )
