"""A run's metadata for its LoRA file, under kohya's and ModelSpec's names."""

import datetime
import json
from collections import Counter
from itertools import chain, count
from pathlib import Path
from typing import Any

from lorakit import dataset as datasets
from lorakit import storage, train
from lorakit.adapter import Adapter, adapter_metadata, check_private, names_machine, precision_name
from lorakit.base import Base
from lorakit.config import Config
from lorakit.dataset import Dataset
from lorakit.run import preparation


def run_metadata(
    config: Config, base: Base, dataset: Dataset, *, adapter: Adapter, started: float, batches: int | None = None,
    prior: int = 0, chunks: int = 1,
) -> dict[str, str]:  # fmt: skip
    """The metadata of a run, under kohya's and ModelSpec's names; unused settings are "None", as kohya writes them.

    `step_metadata` adds how far the run came. Pictures are counted with repeats, tags without, both as kohya does.
    Folders are given by name only.

    Args:
        started: seconds since 1970.
        batches: in an epoch; None counts them from the dataset.
        prior: regularisation pictures in an epoch, with repeats.
        chunks: of 75 tokens that are read of each caption.
    """
    buckets, sizes = _buckets(config, base, dataset)
    repeats = [picture.repeats for picture in dataset.pictures]
    if batches is None:
        batches = datasets.steps_per_epoch(sizes, repeats, config.batch_size)
    total = config.total_steps(batches)
    length = {
        "ss_training_started_at": started, "ss_max_train_steps": total,
        "ss_num_epochs": -(-total // -(-batches // config.gradient_accumulation_steps)),
        "ss_num_batches_per_epoch": batches, "ss_num_train_images": sum(repeats), "ss_num_reg_images": prior,
        "ss_max_token_length": 75 * chunks if chunks > 1 else None, "ss_mixed_precision": precision_name(adapter.dtype),
        "ss_text_encoder_lr": list(config.text_rates(base.text_encoders).values()) or None,
    }  # fmt: skip
    facts = length | _settings(config) | buckets | _captions(config, dataset)
    if config.trigger:
        facts["modelspec.trigger_phrase"] = config.trigger
    metadata = adapter_metadata(adapter, base) | {key: str(value) for key, value in facts.items()}
    check_private(metadata)
    return metadata


def _settings(config: Config) -> dict[str, Any]:
    optimizer = ".".join(train.OPTIMIZERS[config.optimizer])
    return {
        "ss_output_name": config.name, "modelspec.title": config.name,
        "ss_learning_rate": config.learning_rate, "ss_unet_lr": config.learning_rate if config.train_unet else None,
        "ss_optimizer": f"{optimizer}(weight_decay={config.weight_decay})",
        "ss_lr_scheduler": config.schedule, "ss_lr_warmup_steps": config.warmup_steps,
        "ss_max_grad_norm": config.max_grad_norm, "ss_min_snr_gamma": config.min_snr_gamma,
        "ss_loss_type": {"mse": "l2"}.get(config.loss, config.loss), "ss_debiased_estimation": config.debiased,
        "ss_multires_noise_iterations": config.multires_noise_iterations or None,
        "ss_multires_noise_discount": config.multires_noise_discount,
        "ss_ip_noise_gamma": config.input_perturbation or None, "ss_noise_offset": config.noise_offset or None,
        "ss_caption_dropout_rate": config.caption_dropout, "ss_prior_loss_weight": config.prior_weight,
        "ss_batch_size_per_device": config.batch_size,
        "ss_total_batch_size": config.batch_size * config.gradient_accumulation_steps,
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_full_fp16": False, "ss_seed": config.seed, "ss_clip_skip": config.clip_skip,
        "modelspec.encoder_layer": config.clip_skip, "ss_cache_latents": True, "ss_flip_aug": config.flip,
        "ss_shuffle_caption": config.shuffle_captions, "ss_keep_tokens": config.keep_tokens,
        "ss_caption_tag_dropout_rate": config.tag_dropout, "ss_masked_loss": bool(config.mask),
        "ss_resolution": (config.resolution, config.resolution),
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
    }  # fmt: skip


def _buckets(config: Config, base: Base, dataset: Dataset) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """The metadata of buckets, and the bucket size of each picture."""
    buckets, unlimited = preparation.buckets(config, base), config.bucket_rule == "no_upscale"
    allowed, pictures = buckets.sizes(), dataset.pictures
    sizes = [fit.size for fit in buckets.fit([(p.width, p.height) for p in pictures])]
    errors = [abs(w / h - p.width / p.height) for (w, h), p in zip(sizes, pictures, strict=True)]
    counts: Counter[tuple[int, int]] = Counter()
    for size, picture in zip(sizes, pictures, strict=True):
        counts[size] += picture.repeats
    filled = {i: {"resolution": size, "count": counts[size]} for i, size in enumerate(sorted(counts))}
    return {
        "ss_enable_bucket": True, "ss_bucket_no_upscale": unlimited,
        "ss_min_bucket_reso": None if unlimited else min(map(min, allowed)),
        "ss_max_bucket_reso": None if unlimited else max(map(max, allowed)),
        "ss_bucket_info": json.dumps({"buckets": filled, "mean_img_ar_error": sum(errors) / len(errors)}),
    }, sizes  # fmt: skip


def _captions(config: Config, dataset: Dataset) -> dict[str, Any]:
    """The metadata of folders and tags."""
    names = _folders(dataset, config)
    tags: dict[str, Counter[str]] = {name: Counter() for name in names.values()}
    folders = {name: {"n_repeats": 1, "img_count": 0} for name in names.values()}
    for picture in dataset.pictures:
        name = names[picture.group]
        words = (tag.strip().lower() for tag in picture.caption.split(","))
        tags[name].update(tag for tag in words if tag and not names_machine(tag))  # a caption may contain a path
        folders[name] = {"n_repeats": picture.repeats, "img_count": folders[name]["img_count"] + 1}
    return {
        "ss_dataset_dirs": json.dumps(folders), "ss_reg_dataset_dirs": "{}", "ss_tag_frequency": json.dumps(tags),
    }  # fmt: skip


def _folders(dataset: Dataset, config: Config) -> dict[str, str]:
    """Group → its folder's name, numbered when two are the same, as kohya does.

    Pictures in no folder get a name made of the run's, because the root's name may reveal something of this machine.
    """
    names: dict[str, str] = {}
    for group, repeats in {p.group: p.repeats for p in dataset.pictures}.items():
        name = storage.printable(Path(group).name) or f"{repeats}_{config.name}"
        candidates = chain([name], (f"{name} ({number})" for number in count(2)))
        names[group] = next(candidate for candidate in candidates if candidate not in names.values())
    return names


def step_metadata(steps: int, epochs: int, finished: float) -> dict[str, str]:
    """How far a run came, as metadata.

    Args:
        steps, epochs: so far.
        finished: seconds since 1970.
    """
    date = datetime.datetime.fromtimestamp(int(finished), datetime.timezone.utc).isoformat()
    facts = {"ss_steps": steps, "ss_epoch": epochs, "ss_training_finished_at": finished, "modelspec.date": date}
    return {key: str(value) for key, value in facts.items()}
