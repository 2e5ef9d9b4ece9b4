"""What a LoRA file says of itself, under kohya's and ModelSpec's names, and nothing of the machine it was made on."""

import base64
import datetime
import io
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

import torch
from PIL import Image

from lorakit import buckets, optim, quantize
from lorakit.adapter import Adapter
from lorakit.base import Base
from lorakit.config import Config
from lorakit.dataset import Dataset
from lorakit.lora import usual

LOCAL = re.compile(
    r"""(^|(?<=[\s"'=(,]))(/\w[\w.+@-]+/[\w.]|~[/\\]|[A-Za-z]:[/\\]\w|\\\\\w+\\)|^/\w|file://|\bhf_\w{20}"""
)
"""An absolute path (/a/b, ~/a, C:\\a, \\\\host\\a), or a hub token."""


def tells(text: str) -> bool:
    """Whether a text tells of this machine or its user."""
    user = re.escape(os.path.basename(os.path.expanduser("~")))
    return bool(LOCAL.search(text) or (user and re.search(rf"[/\\]{user}([/\\]|$)", text)))


def private(metadata: dict[str, str]) -> None:
    """Refuse metadata that tells of this machine: a LoRA file is made to be shared.

    Raises:
        ValueError: a path or a token. TypeError: a value that is no string.
    """
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise TypeError(f"metadata {key} is {value!r}; readers expect strings alone: give {str(value)!r}.")
        plain = value.replace(r"\\", "\\")  # JSON writes one backslash as two
        if key != "modelspec.thumbnail" and (tells(value) or tells(plain)):
            raise ValueError(
                f"metadata {key} holds a path or token of this machine, and the file is made to be shared: "
                f"{value[:80]!r}. Take it out."
            )


def public(metadata: dict[str, str]) -> dict[str, str]:
    """What of another program's metadata may be written again: all that does not tell of a machine, as `private`."""
    kept = {}
    for key, value in metadata.items():
        try:
            private({key: value})
        except ValueError:
            continue
        kept[key] = value
    return kept


def precision(dtype: torch.dtype) -> str:
    """What kohya calls the precision of a run that computes in a dtype."""
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "no")


def of_adapter(adapter: Adapter, base: Base) -> dict[str, str]:
    """What base and adapter alone say about a file. A1111 tells families apart by the first two."""
    v, xl = base.prediction_type == "v_prediction", base.family == "sdxl"
    version = {"sd15": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[base.family]
    architecture = {"sd15": "v1", "sd2": "v2-768-v" if v else "v2-512", "sdxl": "xl-v1-base"}[base.family]
    shapes = {module: quantize.shape(layer.get_base_layer()) for module, layer in adapter.layers.items()}
    wide = [module for module in adapter.layers if _wide(shapes[module])]
    narrow = [module for module in adapter.layers if not _wide(shapes[module])] or wide
    lycoris = {"lora": {}, "dora": {"algo": "lora", "dora_wd": "True"}}.get(
        adapter.algorithm, {"algo": adapter.algorithm}
    )
    facts = {
        "ss_base_model_version": version + "_v" * (v and not xl), "ss_v2": str(base.family == "sd2"),
        "ss_sd_model_name": base.name, "ss_network_module": "lycoris.kohya" if lycoris else "networks.lora",
        "ss_network_dim": f"{usual(adapter.ranks[m] for m in narrow)}",
        "ss_network_alpha": f"{usual(adapter.alphas[m] for m in narrow):g}",
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"stable-diffusion-{architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if xl else "diffusers",
        "modelspec.prediction_type": "v" if v else base.prediction_type,
    }  # fmt: skip
    arguments = lycoris
    if wide:
        dim, alpha = usual(adapter.ranks[m] for m in wide), usual(adapter.alphas[m] for m in wide)
        arguments = arguments | {"conv_dim": f"{dim}", "conv_alpha": f"{alpha:g}"}
    if arguments:
        facts["ss_network_args"] = json.dumps(arguments)
    return facts


def _wide(shape: Sequence[int]) -> bool:
    """Whether a weight or down matrix is that of a convolution over more than one pixel."""
    return max(shape[2:], default=1) > 1


def of_run(
    config: Config, base: Base, dataset: Dataset, *, adapter: Adapter, started: float, batches: int | None = None,
    prior: int = 0,
) -> dict[str, str]:  # fmt: skip
    """The metadata of a run, under kohya's and ModelSpec's names; what is not used is "None", as kohya writes it.

    How far it came is told by `at_step`.

    Pictures are counted with their repeats, tags without, both as kohya does. Folders are given by name only.

    Args:
        started: seconds since 1970.
        batches: an epoch; None counts them from the dataset.
        prior: regularisation pictures an epoch, repeats counted.
    """
    step, own = max(config.bucket_step, base.step), config.bucket_rule == "no_upscale"  # which knows no limits
    limits = {"minimum": config.min_bucket_side, "maximum": config.max_bucket_side}
    sizes = buckets.sizes(config.resolution, step=step, **limits)
    dimensions = [(p.width, p.height) for p in dataset.pictures]
    fits = buckets.fits(dimensions, config.resolution, step=step, rule=config.bucket_rule, **limits)
    chosen = [fit.size for fit in fits]
    repeats = [p.repeats for p in dataset.pictures]
    if batches is None:
        batches = buckets.steps_per_epoch(chosen, repeats, config.batch_size)
    total = config.total_steps(batches)
    skewed = [abs(w / h - p.width / p.height) for (w, h), p in zip(chosen, dataset.pictures, strict=True)]
    filled = {
        size: sum(times for own, times in zip(chosen, repeats, strict=True) if own == size)
        for size in sorted(set(chosen))
    }
    folders = _folders(dataset, config)
    tags = {folder: Counter() for folder in folders.values()}
    dirs = {folder: {"n_repeats": 1, "img_count": 0} for folder in folders.values()}
    for picture in dataset.pictures:
        folder, said = folders[picture.group], (tag.strip().lower() for tag in picture.caption.split(","))
        tags[folder].update(tag for tag in said if tag and not tells(tag))  # a caption may hold a path, the file not
        dirs[folder] = {"n_repeats": picture.repeats, "img_count": dirs[folder]["img_count"] + 1}
    facts = {
        "ss_output_name": config.name, "ss_training_started_at": started,
        "ss_learning_rate": config.learning_rate, "ss_unet_lr": config.learning_rate if config.train_unet else None,
        "ss_text_encoder_lr": list(config.text_rates(base.text_encoders).values()) or None,
        "ss_optimizer": f"{'.'.join(optim.OPTIMIZERS[config.optimizer])}(weight_decay={config.weight_decay})",
        "ss_lr_scheduler": config.schedule, "ss_lr_warmup_steps": config.warmup_steps,
        "ss_max_grad_norm": config.max_grad_norm, "ss_min_snr_gamma": config.min_snr_gamma,
        "ss_loss_type": {"mse": "l2"}.get(config.loss, config.loss), "ss_debiased_estimation": config.debiased,
        "ss_multires_noise_iterations": config.multires_noise_iterations or None,
        "ss_multires_noise_discount": config.multires_noise_discount,
        "ss_ip_noise_gamma": config.input_perturbation or None,
        "ss_noise_offset": config.noise_offset or None, "ss_caption_dropout_rate": config.caption_dropout,
        "ss_max_train_steps": total,
        "ss_num_epochs": -(-total // -(-batches // config.gradient_accumulation_steps)),
        "ss_num_batches_per_epoch": batches, "ss_num_train_images": sum(repeats), "ss_num_reg_images": prior,
        "ss_prior_loss_weight": config.prior_weight,
        "ss_batch_size_per_device": config.batch_size,
        "ss_total_batch_size": config.batch_size * config.gradient_accumulation_steps,
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_mixed_precision": precision(adapter.dtype),
        "ss_full_fp16": False, "ss_seed": config.seed, "ss_clip_skip": config.clip_skip,
        "ss_cache_latents": True, "ss_flip_aug": config.flip, "ss_shuffle_caption": config.shuffle_captions,
        "ss_keep_tokens": config.keep_tokens, "ss_caption_tag_dropout_rate": config.tag_dropout,
        "ss_masked_loss": bool(config.mask),
        "ss_resolution": (config.resolution, config.resolution), "ss_enable_bucket": True,
        "ss_bucket_no_upscale": own,
        "ss_min_bucket_reso": None if own else min(map(min, sizes)),
        "ss_max_bucket_reso": None if own else max(map(max, sizes)),
        "ss_bucket_info": json.dumps({
            "buckets": {i: {"resolution": size, "count": n} for i, (size, n) in enumerate(filled.items())},
            "mean_img_ar_error": sum(skewed) / len(skewed),
        }),
        "ss_dataset_dirs": json.dumps(dirs), "ss_reg_dataset_dirs": "{}", "ss_tag_frequency": json.dumps(tags),
        "modelspec.title": config.name, "modelspec.resolution": f"{config.resolution}x{config.resolution}",
        "modelspec.encoder_layer": config.clip_skip,
    }  # fmt: skip
    if config.trigger:
        facts["modelspec.trigger_phrase"] = config.trigger
    metadata = of_adapter(adapter, base) | {key: str(value) for key, value in facts.items()}
    private(metadata)
    return metadata


def _folders(dataset: Dataset, config: Config) -> dict[str, str]:
    """A name for each of the dataset's groups: its folder's, numbered where two agree, as kohya does.

    Pictures beside no folder get one made of the run's name: the root's own name is a matter of this machine.
    """
    names: dict[str, str] = {}
    for group, repeats in {p.group: p.repeats for p in dataset.pictures}.items():
        own = Path(group).name or f"{repeats}_{config.name}"
        numbered = (f"{own} ({number})" for number in count(2))
        names[group] = next(name for name in chain([own], numbered) if name not in names.values())
    return names


def at_step(steps: int, epochs: int, finished: float) -> dict[str, str]:
    """What of a run's metadata tells how far it came.

    Args:
        steps, epochs: that the weights have been trained for.
        finished: seconds since 1970.
    """
    date = datetime.datetime.fromtimestamp(int(finished), datetime.timezone.utc).isoformat()
    facts = {"ss_steps": steps, "ss_epoch": epochs, "ss_training_finished_at": finished, "modelspec.date": date}
    return {key: str(value) for key, value in facts.items()}


def thumbnail(picture: Image.Image) -> dict[str, str]:
    """A picture that the LoRA made, for the file: JPEG of at most 256 pixels a side."""
    return {"modelspec.thumbnail": jpeg(picture, 256)}


def jpeg(picture: Image.Image, most: int) -> str:
    """A picture as a data URI: JPEG of at most so many pixels a side."""
    small, stream = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((most, most))
    small.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
