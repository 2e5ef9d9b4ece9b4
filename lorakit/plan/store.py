"""Predictions that are kept on disk: every card, every run and every notebook asks for the same step."""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from lorakit import base as bases
from lorakit import storage
from lorakit.config import Config
from lorakit.plan import memory
from lorakit.plan.memory import StepCost

UNRELATED = {  # settings that do not change the cost of a step of known size, dtype and device
    "base", "prediction_type", "zero_terminal_snr",  # the base's configs are part of the key
    "dataset", "decisions", "name", "kind", "trigger", "class_word", "validation_share", "validation_pictures",
    "resolution", "bucket_step", "bucket_rule", "min_bucket_side", "max_bucket_side",  # the size is part of the key
    "repeats", "flip", "caption_dropout", "shuffle_captions", "keep_tokens", "tag_dropout", "caption_variants",
    "steps", "epochs", "learning_rate", "learning_rate_ratio", "weight_decay", "block_rates", "max_grad_norm", "seed",
    "schedule", "schedule_cycles", "schedule_power", "warmup_steps",
    "min_timestep", "max_timestep", "timestep_sampling", "timestep_shift",
    "device", "mixed_precision", "fit_memory",  # device and dtype are part of the key
    "save_every", "save_minutes", "keep_states", "keep_checkpoints", "backup", "validate_every",
    "sample_every", "sample_prompts", "sample_steps", "sample_guidance",
}  # fmt: skip
PACKAGES = ("torch", "diffusers", "peft", "transformers", "accelerate", "bitsandbytes")
CODE = ("adapter", "base", "plan", "train", "device.py", "config.py")


def step_cost(
    base: bases.Base, config: Config, *, size: tuple[int, int], dtype: torch.dtype, device: str,
    store: Path | None = None,
) -> StepCost:  # fmt: skip
    """The cost of a training step: `memory.count_step`, or an earlier result of it.

    Args:
        size: (height, width) in pixels.
        dtype, device: as for `memory.count_step`.
        store: folder of earlier results; None counts again.

    Raises:
        ValueError: as for `memory.count_step`.
    """
    if store is None:
        return memory.count_step(base, config, size=size, dtype=dtype, device=device)
    file = store / f"{_key(base, config, size, dtype, device)}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):  # missing or damaged
        kept = json.loads(file.read_text(encoding="utf-8"))
        return StepCost(**(kept | {"size": tuple(kept["size"])}))
    cost = memory.count_step(base, config, size=size, dtype=dtype, device=device)
    with suppress(OSError), storage.write_file(file) as partial:  # on a full disk, the next call counts again
        partial.write_text(json.dumps(asdict(cost)), encoding="utf-8")
    return cost


def _key(base: bases.Base, config: Config, size: tuple[int, int], dtype: torch.dtype, device: str) -> str:
    """A digest of all that `memory.count_step` depends on."""
    inputs = {
        "base": base.configs, "family": base.family, "size": size, "dtype": str(dtype), "device": device,
        "config": config.model_dump(mode="json", exclude=UNRELATED),
        "versions": [version(name) for name in PACKAGES if find_spec(name)], "code": _code(),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]


@cache
def _code() -> str:
    """A digest of lorakit's files that a prediction depends on."""
    paths = [Path(__file__).parents[1] / name for name in CODE]
    files = [file for path in paths for file in (sorted(path.glob("*.py")) if path.is_dir() else [path])]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def prediction_store() -> Path:
    """The folder of this user's predictions."""
    return storage.user_cache() / "predictions"
