"""Everything the loop needs but the UNet: scan → what is held out → buckets → memory plan → cache."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from lorakit import base as bases
from lorakit import dataset as datasets
from lorakit import plan, storage, train
from lorakit.base import Encoded, Text
from lorakit.config import Config
from lorakit.dataset import Dataset
from lorakit.device import choose_device, compute_dtype

DEMO = Path(__file__).parents[1] / "demo" / "pictures"
# What may change between two starts of one run: it does not decide the weights.
FREE = {
    "name",
    "decisions",
    "trigger",
    "device",
    "fit_memory",
    "save_every",
    "save_minutes",
    "keep_states",
    "keep_checkpoints",
    "backup",
    "validate_every",
    "sample_every",
    "sample_prompts",
    "sample_steps",
    "sample_guidance",
}


@dataclass(frozen=True)
class Prepared:
    """Everything the loop needs but the UNet."""

    config: Config  # as asked for, or what the run came down to for want of memory
    base: bases.Base
    dataset: Dataset
    pictures: list[Encoded]  # trained on, regularisation pictures last
    held_out: list[Encoded]  # not trained on
    names: list[str]  # of the pictures trained on
    texts: dict[str, Text]  # captions, to the letter
    said: dict[str, Text]  # the samples' prompts, as `prompting` reads them
    repeats: list[int]
    prompts: list[str]  # sampled while training and at the end
    batches: int  # an epoch
    contents: dict[str, str]  # what stands for masks and regularisation pictures among the settings
    prediction: plan.Prediction

    @property
    def prior_repeats(self) -> int:
        """Regularisation pictures an epoch, repeats counted."""
        return sum(times for picture, times in zip(self.pictures, self.repeats, strict=True) if picture.prior)


def scan_dataset(config: Config) -> datasets.Dataset:
    """The run's pictures, as they were decided about; those on Drive from a local copy, fetched once.

    Raises:
        ValueError, FileNotFoundError: as `dataset.scan`, `decisions.load` and `decisions.decide`.
    """
    path = DEMO if config.dataset == "demo" else config.dataset
    found = datasets.scan(path, repeats=config.repeats, copy=datasets.is_remote(path))
    if not config.decisions:
        return found
    decided = datasets.load_decisions(config.decisions, path)
    here = {datasets.picture_name(picture.known_as, found) for picture in found.pictures}
    still = tuple(name for name in decided.leave_out if name in here)  # what is gone is out anyway
    return datasets.apply_decisions(found, replace(decided, leave_out=still))


def prepare(
    config: Config, folder: Path, *, say: Callable[[str], None] = print, progress: bool | bases.Progress = True,
    shared_by: int = 1, rungs: Sequence[Config] = (), stop: threading.Event | None = None, store: Path | None = None,
    held: int = 0,
) -> Prepared:  # fmt: skip
    """Check everything that can be checked, then encode pictures and captions into the run's cache.

    Where the run is predicted not to fit, it comes down to settings that do, if the config lets it.

    Args:
        shared_by: processes that share each batch.
        rungs: settings to come down to, the config first; () takes `plan.ladder`'s.
        stop: set from elsewhere, ends it between two pictures or batches of captions.
        store: the cache's folder; None is `cache` in the run's.
        held: bytes of the device that models take which the run finds loaded.

    Raises:
        ValueError: settings that do not suit the base, or no usable picture.
        FileNotFoundError: no such base or dataset.
        KeyboardInterrupt: `stop` was set.
    """
    device = choose_device(config.device)
    dtype = compute_dtype(config.mixed_precision, device)
    base = bases.open(config.base, config.prediction_type, config.zero_terminal_snr)
    step = max(config.bucket_step, base.step)
    if step % base.step or config.resolution % step:
        raise ValueError(
            f"resolution {config.resolution} and bucket_step {config.bucket_step} do not suit {base.name}, "
            f"whose picture sides are multiples of {base.step} pixels."
        )
    encoders = config.text_rates(base.text_encoders)
    say(f"base      {base.name}: {base.family}, made for {base.resolution} px, predicts {base.prediction_type}")
    if config.algorithm != "lora":
        say(f"adapter   {config.algorithm}: A1111, Forge and ComfyUI read its files, diffusers does not")
    if encoders:
        learn = [f"{which} at {rate:g}" for which, rate in encoders.items()]
        say(f"text      {', '.join(learn)}: trained too{'' if config.train_unet else ', the UNet is not'}")
    pictures = scan_dataset(config)
    say("pictures  " + pictures.describe().replace("\n", "\n          "))
    kinds = train.traits(pictures.pictures)
    chosen = train.hold_out([p.digest for p in pictures.pictures], config.validation_share, config.seed, kinds)
    held_out = sorted({*chosen, *_named(config.validation_pictures, pictures)})
    kept = [place for place in range(len(pictures)) if place not in held_out]
    if held_out:
        names = [pictures.pictures[place].known_as.name for place in held_out]
        say(f"held out  {len(names)} of {len(pictures)} pictures, to judge by: {', '.join(names)}")
    if chosen:
        say("          " + train.representative(chosen, kinds))
    repeats, everything = [pictures.pictures[place].repeats for place in kept], list(pictures.pictures)
    contents = {}
    if held_out:
        contents["held_out"] = settings_digest(sorted(pictures.pictures[place].digest for place in held_out))
    if config.regularisation:
        prior = datasets.scan(config.regularisation, copy=datasets.is_remote(config.regularisation))
        say("class     " + prior.describe().replace("\n", "\n          "))
        kept += range(len(everything), len(everything) + len(prior))
        everything += prior.pictures
        repeats += evenly(sum(repeats), len(prior))
        contents["regularisation"] = settings_digest([[p.digest, p.caption] for p in prior.pictures])
    if config.start_from:
        file = Path(config.start_from)
        if not file.is_file():
            raise FileNotFoundError(f"start_from: there is no file {file.name}. Give a LoRA's .safetensors file.")
        contents["start_from"] = storage.sha256(file)[:16]
    masks = []
    if config.mask:
        masks = datasets.find_masks(pictures.pictures, config.mask, pictures.root, copy=datasets.is_remote(config.mask))
        masks += [None] * (len(everything) - len(masks))
        contents["mask"] = settings_digest([mask and [mask.digest, mask.alpha] for mask in masks])
        bare = [p.known_as.name for p, mask in zip(pictures.pictures, masks, strict=False) if mask is None]
        say(f"masks     {len(pictures) - len(bare)} of {len(pictures)} pictures have one" + "; not: " * bool(bare)
            + ", ".join(bare[:5]) + " …" * (len(bare) > 5))  # fmt: skip
    config, fits, batches, prediction = _fitting(
        rungs or plan.ladder(config), base, everything, kept, repeats, len(pictures) - len(held_out), step, device,
        dtype, say, shared_by, held,
    )  # fmt: skip
    prompts = list(config.sample_prompts) or [bases.escape(p.caption) for p in pictures.pictures[:4]]
    began = time.monotonic()
    with bar(progress) as draw:

        def show(*seen) -> None:
            draw(*seen)
            if stop and stop.is_set():
                raise KeyboardInterrupt("stopped while pictures and captions were encoded; what is done is kept")

        store = store or folder / "cache"
        encoded = bases.encode_pictures(
            base, everything, fits, store, device=device, dtype=dtype, flip=config.flip, masks=masks, progress=show,
            say=say,
        )  # fmt: skip
        for place, picture in enumerate(encoded):
            varied = datasets.caption_variants(
                picture.caption, config.caption_variants, shuffle=config.shuffle_captions,
                keep_tokens=config.keep_tokens, tag_dropout=config.tag_dropout, seed=config.seed,
            )  # fmt: skip
            encoded[place] = replace(picture, variants=varied, prior=place >= len(pictures))
        how = {"device": device, "dtype": dtype, "clip_skip": config.clip_skip, "progress": show, "say": say}
        texts = bases.encode_texts(base, train.batch_prompts(encoded, config), store, **how)
        said = bases.encode_prompts(base, [*prompts, ""], store, **how)
    say(f"cache     {len(encoded)} pictures and {len(texts)} texts ready in {time.monotonic() - began:.1f} s")
    return Prepared(
        config, base, pictures, [encoded[i] for i in kept], [encoded[i] for i in held_out],
        [everything[i].known_as.name for i in kept], texts, said, repeats, prompts, batches, contents,
        prediction,
    )  # fmt: skip


def _fitting(
    rungs: Sequence[Config], base: bases.Base, everything: Sequence, kept: Sequence[int], repeats: Sequence[int],
    own: int, step: int, device: torch.device, dtype: torch.dtype, say: Callable[[str], None], shared_by: int,
    held: int,
) -> tuple[Config, list[datasets.Fit], int, plan.Prediction]:  # fmt: skip
    """The first settings down the ladder that are predicted to fit; none does: those asked for.

    Returns:
        The settings, each picture's bucket, the batches of an epoch, and what is predicted.
    """
    free, tried = plan.free_memory_bytes(device), []
    free = None if free is None else free + held
    for lower in rungs:
        fits = datasets.fit_all(
            [(p.width, p.height) for p in everything], lower.resolution, step=step, rule=lower.bucket_rule,
            minimum=lower.min_bucket_side, maximum=lower.max_bucket_side,
        )  # fmt: skip
        largest = max({fit.size for fit in fits}, key=lambda size: size[0] * size[1])[::-1]
        store = plan.prediction_store()
        share = lower.with_(batch_size=-(-lower.batch_size // shared_by))  # this process's
        prediction = plan.predict_cached(base, share, size=largest, dtype=dtype, device=device.type, store=store)
        tried.append((lower, fits, prediction, plan.verdict(prediction, free)))
        if tried[-1][-1].fits is not False:
            break
    asked, chosen = tried[0], tried[-1] if tried[-1][-1].fits is not False else tried[0]
    lower, fits, prediction, verdict = chosen
    used = sorted({fit.size for fit in fits})
    counts = [f"{w}×{h}: {sum(fit.size == (w, h) for fit in fits)}" for w, h in used]
    say(f"buckets   {', '.join(counts)}")
    batches = datasets.steps_per_epoch([fits[place].size for place in kept], repeats, lower.batch_size)
    say("length    " + length(own, repeats, batches, lower))
    if chosen is not asked:
        peak = plan.readable_bytes(asked[2].peak)
        say(f"memory    {peak} predicted as asked for, which does not fit. Comes down to {changes(rungs[0], lower)}")
    say("memory    " + prediction.describe().replace("\n", "\n          "))
    say("          " + str(verdict).replace("\n", "\n          "))
    return lower, fits, batches, prediction


def changes(asked: Config, lower: Config) -> str:
    before, after = asked.model_dump(), lower.model_dump()
    return ", ".join(f"{name} {after[name]}" for name in after if after[name] != before[name])


def length(pictures: int, repeats: Sequence[int], batches: int, config: Config) -> str:
    """The arithmetic of the run's length, kohya's way, in one line.

    Args:
        pictures: how many of those that repeats are given for are the dataset's own; the rest is regularisation.
    """
    times = f"{repeats[0]} repeats" if len(set(repeats[:pictures])) == 1 else "their repeats"
    of_class = f", + {sum(repeats[pictures:])} of the class" * (len(repeats) > pictures)
    updates = -(-batches // config.gradient_accumulation_steps)
    total = config.total_steps(batches)
    accumulated = f" / accumulation {config.gradient_accumulation_steps}" * (config.gradient_accumulation_steps > 1)
    return (
        f"{pictures} pictures × {times} = {sum(repeats[:pictures])}{of_class}, / batch {config.batch_size}"
        f"{accumulated} = {updates} steps an epoch; {total} steps = {total / updates:.3g} epochs"
    )


def evenly(wanted: int, pictures: int) -> list[int]:
    """Repeats that show so many pictures `wanted` times in all, as sd-scripts balances regularisation pictures."""
    return [wanted // pictures + (place < wanted % pictures) for place in range(pictures)]


def _named(names: Sequence[str], pictures: datasets.Dataset) -> list[int]:
    """The places of pictures by their file names, with or without suffix.

    Raises:
        ValueError: no such picture, or nothing is left to train on.
    """
    places = []
    for name in names:
        found = [i for i, p in enumerate(pictures.pictures) if name in (p.known_as.name, p.known_as.stem)]
        if not found:
            raise ValueError(f"validation_pictures: {pictures.root.name} holds no picture {name!r}.")
        places += found
    if len(set(places)) == len(pictures):
        raise ValueError("validation_pictures names all pictures: none is left to train on.")
    return places


def settings_digest(values) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


@contextmanager
def bar(progress: bool | bases.Progress) -> Iterator[bases.Progress]:
    """A progress bar that says itself what it counts: show(what, done, of). False draws none, a function stands in."""
    if callable(progress):
        yield progress
        return
    with tqdm(disable=not progress, leave=False) as line:

        def show(what: str, done: int, of: int) -> None:
            line.set_description(what, refresh=False)
            line.total, line.n = of, done
            line.refresh()

        yield show


def settings(config: Config, prepared: Prepared) -> dict:
    """What decides the result, as plain values that name no path of this machine."""
    pictures = settings_digest([[p.digest, p.caption, p.repeats] for p in prepared.dataset.pictures])
    free = FREE - {"trigger"} if config.asks_class else FREE  # by which the class is asked for
    values = {k: v for k, v in config.model_dump(mode="json").items() if k not in free}
    return values | {"base": prepared.base.name, "dataset": pictures} | prepared.contents
