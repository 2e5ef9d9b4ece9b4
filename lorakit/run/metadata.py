"""What a run writes into its LoRA file's metadata, under kohya's and ModelSpec's names."""

import datetime
import json
from collections import Counter
from itertools import chain, count
from pathlib import Path

from lorakit import dataset as datasets
from lorakit import train
from lorakit.adapter import Adapter, adapter_metadata, check_private, names_machine, precision_name
from lorakit.base import Base
from lorakit.config import Config
from lorakit.dataset import Dataset


def run_metadata(
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
    sizes = datasets.bucket_sizes(config.resolution, step=step, **limits)
    dimensions = [(p.width, p.height) for p in dataset.pictures]
    fits = datasets.fit_all(dimensions, config.resolution, step=step, rule=config.bucket_rule, **limits)
    chosen = [fit.size for fit in fits]
    repeats = [p.repeats for p in dataset.pictures]
    if batches is None:
        batches = datasets.steps_per_epoch(chosen, repeats, config.batch_size)
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
        tags[folder].update(
            tag for tag in said if tag and not names_machine(tag)
        )  # a caption may hold a path, the file not
        dirs[folder] = {"n_repeats": picture.repeats, "img_count": dirs[folder]["img_count"] + 1}
    facts = {
        "ss_output_name": config.name, "ss_training_started_at": started,
        "ss_learning_rate": config.learning_rate, "ss_unet_lr": config.learning_rate if config.train_unet else None,
        "ss_text_encoder_lr": list(config.text_rates(base.text_encoders).values()) or None,
        "ss_optimizer": f"{'.'.join(train.OPTIMIZERS[config.optimizer])}(weight_decay={config.weight_decay})",
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
        "ss_mixed_precision": precision_name(adapter.dtype),
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
    metadata = adapter_metadata(adapter, base) | {key: str(value) for key, value in facts.items()}
    check_private(metadata)
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


def step_metadata(steps: int, epochs: int, finished: float) -> dict[str, str]:
    """What of a run's metadata tells how far it came.

    Args:
        steps, epochs: that the weights have been trained for.
        finished: seconds since 1970.
    """
    date = datetime.datetime.fromtimestamp(int(finished), datetime.timezone.utc).isoformat()
    facts = {"ss_steps": steps, "ss_epoch": epochs, "ss_training_finished_at": finished, "modelspec.date": date}
    return {key: str(value) for key, value in facts.items()}
