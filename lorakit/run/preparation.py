"""Prepare a run: scan pictures, hold some out, choose buckets and settings that fit, encode pictures and captions."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from lorakit import adapter as adapters
from lorakit import base as bases
from lorakit import dataset as datasets
from lorakit import named, plan, storage, train
from lorakit.base import Base, Encoded, Text
from lorakit.config import Config
from lorakit.console import Console
from lorakit.dataset import Dataset, Fit, Mask, Picture, scan_dataset
from lorakit.device import Compute
from lorakit.run.models import Shared
from lorakit.train import Examples

# Settings that may change between two starts of one run: they do not decide the weights.
FREE = {
    "name", "decisions", "trigger", "device", "fit_memory", "save_every", "save_minutes", "keep_states",
    "keep_checkpoints", "backup", "validate_every", "sample_every", "sample_prompts", "sample_steps", "sample_guidance",
}  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs except the models."""

    config: Config  # as given, or with the changes that make it fit into memory
    base: Base
    dataset: Dataset
    examples: Examples  # trained on, regularisation pictures last
    held_out: list[Encoded]  # not trained on
    names: list[str]  # of the examples' pictures
    prompt_texts: dict[str, Text]  # of `prompts` and of the empty prompt
    prompts: list[str]  # sampled while training and at the end
    contents: dict[str, str]  # digests of files that settings name
    prediction: plan.StepCost
    chunks: int = 1  # of 75 tokens that are read of each caption

    def predicting(self, kind: str) -> "Prepared":
        """The same with another prediction type of the base, and in the config."""
        base, config = bases.predicting(self.base, kind), self.config.with_(prediction_type=kind)
        return replace(self, base=base, config=config, examples=replace(self.examples, config=config))

    @property
    def prior_repeats(self) -> int:
        """Regularisation pictures in an epoch, with repeats."""
        pictures, repeats = self.examples.pictures, self.examples.repeats
        return sum(times for picture, times in zip(pictures, repeats, strict=True) if picture.prior)


def prepare(
    config: Config, folder: Path, console: Console | None = None, *, shared: Shared | None = None,
    processes: int = 1, rungs: Sequence[Config] = (),
) -> Prepared:  # fmt: skip
    """Check everything that can be checked, then encode pictures and captions into the run's cache.

    When the run is predicted not to fit into memory, its settings are reduced until it does, if the config allows it.

    Args:
        folder: of the run.
        shared: models that are loaded, and the cache's folder; by default the cache is in the run's folder.
        processes: that share each batch.
        rungs: settings to try, the config first; () takes `plan.ladder`'s.

    Raises:
        ValueError: settings that do not suit the base, or no usable picture.
        FileNotFoundError: no such base or dataset.
        KeyboardInterrupt: the console's `stop` was set.
    """
    console, shared = console or Console(), shared or Shared()
    compute, base = Compute.of(config), open_base(config, console)
    selection = _select(config, console)
    selection.chunks = _chunks(config, base, selection, console)
    config, fits, prediction = _fit(rungs or plan.ladder(config), base, selection, console, shared.held, processes)
    prompts = list(config.sample_prompts) or _prompts(config, selection.dataset)
    began, cache = time.monotonic(), shared.cache or folder / "cache"
    pictures = bases.encode_pictures(
        base, selection.pictures, fits, cache, compute, masks=selection.masks, flip=config.flip, console=console
    )
    for place, picture in enumerate(pictures):
        lines = _lines(selection.pictures[place], config)
        pictures[place] = replace(
            picture, caption=datasets.plain_caption(lines, config), variants=datasets.caption_variants(lines, config),
            prior=place >= len(selection.dataset),
        )  # fmt: skip
    selection.contents["base"] = bases.identity(base)
    texts = bases.encode_texts(
        base, train.captions_of(pictures, config), cache, compute, config.clip_skip, console, selection.chunks
    )
    prompt_texts = bases.encode_prompts(base, [*prompts, ""], cache, compute, config.clip_skip, console)
    if console.stop.is_set():
        raise KeyboardInterrupt("stopped before training; encoded pictures and captions are kept")
    seconds = time.monotonic() - began
    console.say(f"cache     {len(pictures)} pictures and {len(texts)} texts ready in {seconds:.1f} s")
    examples = Examples([pictures[i] for i in selection.trained], selection.repeats, texts, config)
    if config.warmup_steps >= examples.total_steps:
        console.say(
            f"warm-up   {config.warmup_steps:g} steps, but the run has {examples.total_steps}: the rate stays low"
        )
    names = [selection.pictures[i].known_as.name for i in selection.trained]
    return Prepared(
        config, base, selection.dataset, examples, [pictures[i] for i in selection.held_out], names, prompt_texts,
        prompts, selection.contents, prediction, selection.chunks,
    )  # fmt: skip


def open_base(config: Config, console: Console) -> Base:
    """The run's base, checked against the settings.

    Raises:
        ValueError: resolution or buckets that do not suit the base.
    """
    base = bases.open(config.base, config.prediction_type, config.zero_terminal_snr, Compute.of(config).half, console)
    step = buckets(config, base).step
    if step % base.step or config.resolution % step:
        raise ValueError(
            f"resolution {config.resolution} and bucket_step {config.bucket_step} do not suit {base.name}, "
            f"whose picture sides are multiples of {base.step} pixels."
        )
    encoders = config.text_rates(base.text_encoders)
    console.say(f"base      {base.name}: {base.family}, made for {base.resolution} px, predicts {base.prediction_type}")
    if "diffusers" not in adapters.ALGORITHMS[config.algorithm].layouts:
        console.say(f"adapter   {config.algorithm}: A1111, Forge and ComfyUI read its files, diffusers does not")
    if encoders:
        rates = ", ".join(f"{name} at {rate:g}" for name, rate in encoders.items())
        console.say(f"text      {rates}: trained too{'' if config.train_unet else ', the UNet is not'}")
    return base


def buckets(config: Config, base: Base) -> datasets.Buckets:
    """The run's buckets; their sides are multiples of the base's step too."""
    limits = config.min_bucket_side, config.max_bucket_side
    return datasets.Buckets(config.resolution, max(config.bucket_step, base.step), config.bucket_rule, *limits)


# ── Pictures ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Selection:
    """The pictures of a run, and which of them are trained on."""

    dataset: Dataset
    pictures: list[Picture]  # the dataset's, then the regularisation pictures
    held_out: list[int]  # places among them
    trained: list[int]
    repeats: list[int]  # of the trained ones
    masks: list[Mask | None] = field(default_factory=list)  # of all pictures; [] without masks
    contents: dict[str, str] = field(default_factory=dict)
    chunks: int = 1  # of 75 tokens that are read of each caption


def _select(config: Config, console: Console) -> _Selection:
    """Scan the dataset, hold pictures out, and add regularisation pictures and masks."""
    dataset = scan_dataset(config)
    console.say("pictures  " + dataset.describe().replace("\n", "\n          "))
    held_out = _hold_out(config, dataset, console)
    trained = [place for place in range(len(dataset)) if place not in held_out]
    repeats = [dataset.pictures[place].repeats for place in trained]
    selection = _Selection(dataset, list(dataset.pictures), held_out, trained, repeats)
    if held_out:
        selection.contents["held_out"] = settings_digest(sorted(dataset.pictures[place].digest for place in held_out))
    if config.regularisation:
        _add_prior(selection, config.regularisation, console)
    if config.start_from:
        file = Path(config.start_from)
        if not file.is_file():
            raise FileNotFoundError(f"start_from: there is no file {file.name}. Give a LoRA's .safetensors file.")
        selection.contents["start_from"] = storage.sha256(file)[:16]
    if config.mask:
        _add_masks(selection, config.mask, console)
    return selection


def _prompts(config: Config, dataset: Dataset) -> list[str]:
    """Prompts of samples: the first captions, with the quality tags that the base was trained with."""
    entry = named.find(config.base)
    form = entry.prompt if entry else "{}"
    captions = [datasets.plain_caption(_lines(picture, config), config) for picture in dataset.pictures[:4]]
    return [form.format(bases.escape(caption)) for caption in captions]


def _lines(picture: Picture, config: Config) -> tuple[str, ...]:
    """The lines of a caption to draw from; one if they are joined."""
    return picture.lines if config.caption_lines == "random" and picture.lines else (picture.caption,)


def _longest(picture: Picture, config: Config) -> Sequence[str]:
    """Texts of which one has the most tokens of all variants: shuffling and dropping add none."""
    varied = config.caption_lines == "random" or config.caption_choices
    return datasets.caption_variants(_lines(picture, config), config) if varied else [picture.caption]


def _chunks(config: Config, base: Base, selection: _Selection, console: Console) -> int:
    """How many chunks of 75 tokens are read of each caption: as set, or what the longest one needs; at most 3."""
    captions, limit = [_longest(picture, config) for picture in selection.pictures], bases.token_limit(base)
    if config.asks_class:
        captions += [
            [datasets.without_trigger(text, config.trigger, config.class_word) for text in texts] for texts in captions
        ]
    tokens = bases.tokens_needed(base, set(chain(*captions)))
    counts = [max(tokens.get(text, 0) for text in texts) for texts in captions]
    needed = min(3, -(-max(counts, default=0) // limit)) or 1
    chunks = config.max_token_length // 75 if config.max_token_length else needed
    long, cut = (sum(count > most for count in counts) for most in (limit, chunks * limit))
    if long:
        end = f", and {cut} are cut off" if cut else ""
        console.say(f"captions  {long} have more than {limit} tokens; {chunks * limit} are read{end}")
    return chunks


def _hold_out(config: Config, dataset: Dataset, console: Console) -> list[int]:
    """The places of the pictures that are kept from training."""
    traits = train.traits(dataset.pictures)
    chosen = train.hold_out([p.digest for p in dataset.pictures], config.validation_share, config.seed, traits)
    held_out = sorted({*chosen, *_places_of(config.validation_pictures, dataset)})
    if held_out:
        names = ", ".join(dataset.pictures[place].known_as.name for place in held_out)
        console.say(f"held out  {len(held_out)} of {len(dataset)} pictures, for validation: {names}")
    if chosen:
        console.say("          " + train.representative(chosen, traits))
    return held_out


def _places_of(names: Sequence[str], dataset: Dataset) -> list[int]:
    """The places of pictures by their file names, with or without suffix.

    Raises:
        ValueError: no such picture, or nothing is left to train on.
    """
    places: list[int] = []
    for name in names:
        matches = [i for i, p in enumerate(dataset.pictures) if name in (p.known_as.name, p.known_as.stem)]
        if not matches:
            raise ValueError(f"validation_pictures: {dataset.root.name} holds no picture {name!r}.")
        places += matches
    if len(set(places)) == len(dataset):
        raise ValueError("validation_pictures names all pictures: none is left to train on.")
    return places


def _add_prior(selection: _Selection, folder: str, console: Console) -> None:
    """Add regularisation pictures (in place), balanced as sd-scripts does: as many an epoch as pictures."""
    prior = datasets.scan(folder, copy=datasets.is_remote(folder))
    console.say("class     " + prior.describe().replace("\n", "\n          "))
    total, count = sum(selection.repeats), len(prior)
    selection.trained += range(len(selection.pictures), len(selection.pictures) + count)
    selection.pictures += prior.pictures
    selection.repeats += [total // count + (place < total % count) for place in range(count)]
    selection.contents["regularisation"] = settings_digest([[p.digest, p.caption] for p in prior.pictures])


def _add_masks(selection: _Selection, source: str, console: Console) -> None:
    """Add masks (in place)."""
    pictures = selection.dataset.pictures
    masks = datasets.find_masks(pictures, source, selection.dataset.root, copy=datasets.is_remote(source))
    without = [p.known_as.name for p, mask in zip(pictures, masks, strict=True) if mask is None]
    selection.masks = [*masks, *[None] * (len(selection.pictures) - len(masks))]
    selection.contents["mask"] = settings_digest([mask and [mask.digest, mask.alpha] for mask in selection.masks])
    missing = "; not: " + ", ".join(without[:5]) + " …" * (len(without) > 5) if without else ""
    console.say(f"masks     {len(pictures) - len(without)} of {len(pictures)} pictures have one{missing}")


# ── Settings that fit ───────────────────────────────────────────────────────────────────────────────────────────────


def _fit(
    rungs: Sequence[Config], base: Base, selection: _Selection, console: Console, held: int, processes: int
) -> tuple[Config, list[Fit], plan.StepCost]:  # fmt: skip
    """The first settings that are predicted to fit into memory; the first of all when none do.

    Args:
        held: bytes of the device that loaded models take, which the run will use.

    Returns:
        The settings, each picture's bucket, and the prediction.
    """
    compute = Compute.of(rungs[0])
    free, tried = plan.free_memory_bytes(compute.device), []
    free = None if free is None else free + held
    for config in rungs:
        fits = buckets(config, base).fit([(picture.width, picture.height) for picture in selection.pictures])
        largest = max({fit.size for fit in fits}, key=lambda size: size[0] * size[1])[::-1]
        tokens = 75 * selection.chunks
        share = config.with_(batch_size=-(-config.batch_size // processes), max_token_length=tokens)
        prediction = plan.step_cost(
            base, share, size=largest, dtype=compute.dtype, device=compute.device.type, store=plan.prediction_store()
        )
        tried.append((config, fits, prediction, plan.verdict(prediction, free)))
        if tried[-1][-1].fits is not False:
            break
    chosen = tried[-1] if tried[-1][-1].fits is not False else tried[0]
    config, fits, prediction, verdict = chosen
    counts = [f"{w}×{h}: {sum(fit.size == (w, h) for fit in fits)}" for w, h in sorted({fit.size for fit in fits})]
    console.say(f"buckets   {', '.join(counts)}")
    console.say("length    " + _length(selection, fits, config))
    if chosen is not tried[0]:
        peak = plan.readable_bytes(tried[0][2].peak)
        console.say(f"memory    {peak} predicted, which does not fit. Reduced: {changes(rungs[0], config)}")
    console.say("memory    " + prediction.describe().replace("\n", "\n          "))
    console.say("          " + str(verdict).replace("\n", "\n          "))
    return config, fits, prediction


def changes(before: Config, after: Config) -> str:
    """The settings in which `after` differs, in words."""
    old, new = before.model_dump(), after.model_dump()
    return ", ".join(f"{name} {new[name]}" for name in new if new[name] != old[name])


def _length(selection: _Selection, fits: Sequence[Fit], config: Config) -> str:
    """The length of the run, counted in kohya's way, in one line."""
    count = len(selection.dataset) - len(selection.held_out)
    repeats, prior = selection.repeats[:count], selection.repeats[count:]
    sizes = [fits[place].size for place in selection.trained]
    batches = datasets.steps_per_epoch(sizes, selection.repeats, config.batch_size)
    times = f"{repeats[0]} repeats" if len(set(repeats)) == 1 else "their repeats"
    of_class = f", + {sum(prior)} of the class" if prior else ""
    accumulation = config.gradient_accumulation_steps
    accumulated = f" / accumulation {accumulation}" if accumulation > 1 else ""
    updates, total = -(-batches // accumulation), config.total_steps(batches)
    return (
        f"{count} pictures × {times} = {sum(repeats)}{of_class}, / batch {config.batch_size}"
        f"{accumulated} = {updates} steps an epoch; {total} steps = {total / updates:.3g} epochs"
    )


# ── Settings that decide the result ─────────────────────────────────────────────────────────────────────────────────


def settings_digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def settings(config: Config, prepared: Prepared) -> dict:
    """The settings that decide the result, as plain values without any path of this machine."""
    random = prepared.config.caption_lines == "random"
    pictures = settings_digest(
        [
            [p.digest, p.caption, p.repeats, *([p.lines] if random and len(p.lines) > 1 else [])]
            for p in prepared.dataset.pictures
        ]
    )
    free = FREE - {"trigger"} if config.asks_class else FREE  # the trigger is replaced by the class word there
    values = {k: v for k, v in config.model_dump(mode="json").items() if k not in free}
    return values | {"dataset": pictures, "prediction_type": prepared.base.prediction_type} | prepared.contents
