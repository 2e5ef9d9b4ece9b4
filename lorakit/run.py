"""The whole way, one folder a run: scan → buckets → memory plan → cache → train → checkpoints → samples → export.

    config.json · log.jsonl · tensorboard/ · loss.png · checkpoints/step-000500.safetensors · samples/step-000500/…png ·
    comparison.png · <name>.safetensors

Starting on a folder that already holds a run resumes it from the newest checkpoint whose digest holds.
"""

import gc
import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from lorakit import adapter as adapters
from lorakit import base as bases
from lorakit import (
    board,
    buckets,
    cache,
    captions,
    checkpoint,
    dataset,
    evaluate,
    export,
    files,
    memory,
    plan,
    plots,
    processes,
    sample,
    train,
)
from lorakit import config as configs
from lorakit.cache import Encoded, Text
from lorakit.config import Config
from lorakit.train import Step

DEMO = Path(__file__).parent / "demo" / "pictures"
LEAST_FACTOR = 1 / 8  # of the learning rate: a run that diverges even then is given up
STRENGTHS = (0.0, 0.5, 0.7, 0.9, 1.0)  # the guide's, and the bare base
# What may change between two starts of one run: it does not decide the weights.
FREE = {
    "name",
    "trigger",
    "device",
    "fit_memory",
    "save_every",
    "validate_every",
    "sample_every",
    "sample_prompts",
    "sample_steps",
    "sample_guidance",
}


@dataclass(frozen=True)
class Result:
    """What a run left."""

    folder: Path
    config: Config
    steps: int  # done
    total: int
    losses: list[float] = field(repr=False)  # of the steps of this start
    lora: Path | None  # the finished file; None when the run was stopped before its end
    comparison: Path | None  # base and strengths side by side
    best: Path | None = None  # the checkpoint nearest to the lowest validation loss, where pictures are held out


@dataclass(frozen=True)
class Prepared:
    """Everything the loop needs but the UNet."""

    config: Config  # as asked for, or what the run came down to for want of memory
    base: bases.Base
    dataset: dataset.Dataset
    pictures: list[Encoded]  # trained on, regularisation pictures last
    held_out: list[Encoded]  # not trained on
    names: list[str]  # of the pictures trained on
    texts: dict[str, Text]
    repeats: list[int]
    prompts: list[str]  # sampled while training and at the end
    batches: int  # an epoch
    contents: dict[str, str]  # what stands for masks and regularisation pictures among the settings

    @property
    def prior_repeats(self) -> int:
        """Regularisation pictures an epoch, repeats counted."""
        return sum(times for picture, times in zip(self.pictures, self.repeats, strict=True) if picture.prior)


def scan(config: Config) -> dataset.Dataset:
    """The run's pictures."""
    return dataset.scan(DEMO if config.dataset == "demo" else config.dataset, repeats=config.repeats)


def prepare(
    config: Config, folder: Path, *, say: Callable[[str], None] = print, progress: bool = True, shared_by: int = 1,
    rungs: Sequence[Config] = (),
) -> Prepared:  # fmt: skip
    """Check everything that can be checked, then encode pictures and captions into the run's cache.

    Where the run is predicted not to fit, it comes down to settings that do, if the config lets it.

    Args:
        shared_by: processes that share each batch.
        rungs: settings to come down to, the config first; () takes `plan.ladder`'s.

    Raises:
        ValueError: settings that do not suit the base, or no usable picture.
        FileNotFoundError: no such base or dataset.
    """
    device = bases.choose_device(config.device)
    dtype = bases.compute_dtype(config.mixed_precision, device)
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
    pictures = scan(config)
    say("pictures  " + pictures.describe().replace("\n", "\n          "))
    held_out = evaluate.hold_out([p.digest for p in pictures.pictures], config.validation_share, config.seed)
    held_out = sorted({*held_out, *_named(config.validation_pictures, pictures)})
    kept = [place for place in range(len(pictures)) if place not in held_out]
    if held_out:
        names = [pictures.pictures[place].path.name for place in held_out]
        say(f"held out  {len(names)} of {len(pictures)} pictures, to judge by: {', '.join(names)}")
    repeats, everything = [pictures.pictures[place].repeats for place in kept], list(pictures.pictures)
    contents = {}
    if config.regularisation:
        prior = dataset.scan(config.regularisation)
        say("class     " + prior.describe().replace("\n", "\n          "))
        kept += range(len(everything), len(everything) + len(prior))
        everything += prior.pictures
        repeats += evenly(sum(repeats), len(prior))
        contents["regularisation"] = _digest([[p.digest, p.caption] for p in prior.pictures])
    if config.start_from:
        file = Path(config.start_from)
        if not file.is_file():
            raise FileNotFoundError(f"start_from: there is no file {file.name}. Give a LoRA's .safetensors file.")
        contents["start_from"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    masks = []
    if config.mask:
        masks = dataset.masks(pictures.pictures, config.mask, pictures.root)
        masks += [None] * (len(everything) - len(masks))
        contents["mask"] = _digest([mask and [mask.digest, mask.alpha] for mask in masks])
        bare = [p.path.name for p, mask in zip(pictures.pictures, masks, strict=False) if mask is None]
        say(f"masks     {len(pictures) - len(bare)} of {len(pictures)} pictures have one" + "; not: " * bool(bare)
            + ", ".join(bare[:5]) + " …" * (len(bare) > 5))  # fmt: skip
    config, fits, batches = _fitting(
        rungs or plan.ladder(config), base, everything, kept, repeats, len(pictures) - len(held_out), step, device,
        dtype, say, shared_by,
    )  # fmt: skip
    prompts = list(config.sample_prompts) or [p.caption for p in pictures.pictures[:4]]
    began = time.monotonic()
    with bar(progress) as show:
        store = folder / "cache"
        encoded = cache.encode_pictures(
            base, everything, fits, store, device=device, dtype=dtype, flip=config.flip, masks=masks, progress=show
        )
        for place, picture in enumerate(encoded):
            varied = captions.variants(
                picture.caption, config.caption_variants, shuffle=config.shuffle_captions,
                keep_tokens=config.keep_tokens, tag_dropout=config.tag_dropout, seed=config.seed,
            )  # fmt: skip
            encoded[place] = replace(picture, variants=varied, prior=place >= len(pictures))
        wanted = [*train.prompts(encoded, config), *prompts]
        texts = cache.encode_texts(
            base, wanted, store, device=device, dtype=dtype, clip_skip=config.clip_skip, progress=show
        )
    say(f"cache     {len(encoded)} pictures and {len(texts)} texts ready in {time.monotonic() - began:.1f} s")
    return Prepared(
        config, base, pictures, [encoded[i] for i in kept], [encoded[i] for i in held_out],
        [everything[i].path.name for i in kept], texts, repeats, prompts, batches, contents,
    )  # fmt: skip


def _fitting(
    rungs: Sequence[Config], base: bases.Base, everything: Sequence, kept: Sequence[int], repeats: Sequence[int],
    own: int, step: int, device: torch.device, dtype: torch.dtype, say: Callable[[str], None], shared_by: int,
) -> tuple[Config, list[buckets.Fit], int]:  # fmt: skip
    """The first settings down the ladder that are predicted to fit; none does: those asked for.

    Returns:
        The settings, each picture's bucket, and the batches of an epoch.
    """
    free, tried = memory.available(device), []
    for lower in rungs:
        sizes = buckets.sizes(lower.resolution, step=step)
        fits = [buckets.fit(p.width, p.height, sizes) for p in everything]
        largest = max({fit.size for fit in fits}, key=lambda size: size[0] * size[1])[::-1]
        store = plan.default_store()
        share = lower.with_(batch_size=-(-lower.batch_size // shared_by))  # this process's
        prediction = plan.predict(base, share, size=largest, dtype=dtype, device=device.type, store=store)
        tried.append((lower, fits, prediction, memory.verdict(prediction, free)))
        if tried[-1][-1].fits is not False:
            break
    asked, chosen = tried[0], tried[-1] if tried[-1][-1].fits is not False else tried[0]
    lower, fits, prediction, verdict = chosen
    used = sorted({fit.size for fit in fits})
    counts = [f"{w}×{h}: {sum(fit.size == (w, h) for fit in fits)}" for w, h in used]
    say(f"buckets   {', '.join(counts)}")
    batches = buckets.steps_per_epoch([fits[place].size for place in kept], repeats, lower.batch_size)
    say("length    " + length(own, repeats, batches, lower))
    if chosen is not asked:
        peak = memory.readable(asked[2].peak)
        say(f"memory    {peak} predicted as asked for, which does not fit. Comes down to {_changes(rungs[0], lower)}")
    say("memory    " + prediction.describe().replace("\n", "\n          "))
    say("          " + str(verdict).replace("\n", "\n          "))
    return lower, fits, batches


def _changes(asked: Config, lower: Config) -> str:
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


def _named(names: Sequence[str], pictures: dataset.Dataset) -> list[int]:
    """The places of pictures by their file names, with or without suffix.

    Raises:
        ValueError: no such picture, or nothing is left to train on.
    """
    places = []
    for name in names:
        found = [i for i, p in enumerate(pictures.pictures) if name in (p.path.name, p.path.stem)]
        if not found:
            raise ValueError(f"validation_pictures: {pictures.root.name} holds no picture {name!r}.")
        places += found
    if len(set(places)) == len(pictures):
        raise ValueError("validation_pictures names all pictures: none is left to train on.")
    return places


def _digest(values) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


@contextmanager
def bar(visible: bool) -> Iterator[cache.Progress]:
    """A progress bar that says itself what it counts: show(what, done, of)."""
    with tqdm(disable=not visible, leave=False) as line:

        def show(what: str, done: int, of: int) -> None:
            line.set_description(what, refresh=False)
            line.total, line.n = of, done
            line.refresh()

        yield show


# ── Resuming ────────────────────────────────────────────────────────────────────────────────────────────────────────


def settings(config: Config, prepared: Prepared) -> dict:
    """What decides the result, as plain values that name no path of this machine."""
    pictures = _digest([[p.digest, p.caption, p.repeats] for p in prepared.dataset.pictures])
    values = {k: v for k, v in config.model_dump(mode="json").items() if k not in FREE}
    return values | {"base": prepared.base.name, "dataset": pictures} | prepared.contents


def _come_down(config: Config, prepared: Prepared, saved: dict) -> Config:
    """The lower of what is predicted to fit now and what a run had come down to when it was saved."""
    ladder = plan.ladder(config)
    for place, lower in enumerate(ladder):
        if settings(lower, prepared) == saved:
            return ladder[max(place, ladder.index(prepared.config))]
    return prepared.config


def _as_of_now(saved: dict) -> dict:
    """The settings of a run begun before some of today's were known, which then were as they are by default."""
    return json.loads(Config(steps=1).model_dump_json(exclude=FREE | {"steps", "epochs", "base", "dataset"})) | saved


def _same(saved: dict, wanted: dict, folder: Path) -> None:
    """Refuse to go on with other settings than a run was begun with."""
    changed = [k for k in sorted(saved.keys() | wanted.keys()) if saved.get(k) != wanted.get(k)]
    if changed:
        raise ValueError(
            f"{folder.name} was begun with other settings: "
            + "; ".join(f"{k} was {saved.get(k)!r}, is now {wanted.get(k)!r}" for k in changed)
            + ". Put them back to go on, or name another folder for a new run."
        )


def claim(folder: Path) -> None:
    """Make the run folder, or check that it is one.

    Raises:
        ValueError: the folder holds something else.
        OSError: it cannot be made or written.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file. Name a folder for the run.")
    foreign = folder.is_dir() and {path.name for path in folder.iterdir()} - {"cache"}
    if foreign and "config.json" not in foreign:
        raise ValueError(f"{folder} holds other files and no run. Name a new or empty folder.")
    folder.mkdir(parents=True, exist_ok=True)


# ── Listeners ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Log:
    """A listener that writes log.jsonl, a line a step; losses are fetched from the device in tens.

    Args:
        names: of the pictures, to tell which ones a skipped step saw.
        on_board: draws the same curves in TensorBoard, where that is installed.
        losses: gets each step's, by its number.
    """

    def __init__(
        self, file: Path, resumed_at: int, names: Sequence[str], show: Callable[[Step, float], None],
        say: Callable[[str], None], on_board: board.Board | None, losses: dict[int, float],
    ):  # fmt: skip
        self.file, self.names, self.show, self.say, self.board = file, names, show, say, on_board
        self.waiting, self.losses, self.marks = [], losses, {}
        self.began = time.monotonic()
        kept = [line for line in plots.read_log(file) if line["step"] <= resumed_at] if file.exists() else []
        with files.replacing(file) as partial:  # steps after the checkpoint are trained again
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def __call__(self, step: Step) -> None:
        if len(self.waiting) == 10:  # not yet this one, to which others may still add marks
            self.flush()
        self.waiting.append((step, time.monotonic() - self.began))

    def flush(self) -> None:
        if not self.waiting:
            return
        losses = torch.stack([step.loss for step, _ in self.waiting]).tolist()
        finite = torch.stack([step.finite for step, _ in self.waiting]).tolist()
        with self.file.open("a") as log:
            for (step, seconds), value, fine in zip(self.waiting, losses, finite, strict=True):
                line = {"step": step.number, "loss": round(value, 6), "learning_rate": step.learning_rate}
                line |= {"epoch": step.epoch, "seconds": round(seconds, 3)} | self.marks.pop(step.number, {})
                if not fine:
                    seen = sorted({self.names[i] for i in step.examples})
                    line["skipped"] = seen
                    self.say(f"skipped   step {step.number}: loss or gradients not finite; it saw {', '.join(seen)}")
                log.write(json.dumps(line) + "\n")
                if self.board:
                    curves = {k: v for k, v in line.items() if isinstance(v, float) and k != "seconds"}
                    self.board.figures(step.number, **curves)
        if self.board:
            self.board.flush()
        self.losses.update((step.number, value) for (step, _), value in zip(self.waiting, losses, strict=True))
        self.show(self.waiting[-1][0], losses[-1])
        self.waiting = []


def sampler(
    unet, state: train.State, prepared: Prepared, config: Config, folder: Path, say: Callable[[str], None],
    on_board: board.Board | None = None,
) -> Callable[[Step], None]:  # fmt: skip
    """A listener that samples the run's prompts every so many steps. A failure is said and never ends training."""

    def listener(step: Step) -> None:
        if step.number % config.sample_every and step.number != step.total:
            return
        try:
            with sample.borrowed(unet), state.evaluated():
                seeds = list(range(config.seed, config.seed + len(prepared.prompts)))
                texts = [prepared.texts[prompt] for prompt in (*prepared.prompts, "")]
                *asked, empty = cache.encode_anew(prepared.base, state.adapter.encoders, texts, config.clip_skip)
                latents = sample.latents(
                    unet, prepared.base, asked, empty, seeds,
                    size=(config.resolution, config.resolution), steps=config.sample_steps,
                    guidance=config.sample_guidance, batch=_at_once(config),
                )  # fmt: skip
                vae = bases.load_vae(prepared.base, unet.dtype, unet.device)
                pictures = sample.decode(vae, latents)
                del vae
                cache.free(unet.device)
            sample.save(pictures, folder / "samples" / f"step-{step.number:06d}", prepared.prompts, seeds)
            for prompt, picture in zip(prepared.prompts, pictures, strict=True):
                if on_board:
                    on_board.picture(step.number, prompt, picture)
        except Exception as error:  # anything, a full disk or card too: the LoRA matters more than its preview
            say(f"samples   none at step {step.number}: {type(error).__name__}: {error}")

    return listener


def _at_once(config: Config) -> int:
    """Pictures sampled together: one, so that samples need no more memory than training; small ones go in eights."""
    return 8 if config.resolution < 256 else 1


# ── The run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def start(
    config: Config, folder: str | Path, *, say: Callable[[str], None] = print, progress: bool = True,
    stop: threading.Event | None = None, listeners: Sequence[Callable[[Step], None]] = (),
) -> Result:  # fmt: skip
    """Train a LoRA from pictures to finished file, or go on with a run that was cut.

    Args:
        folder: of the run; new, empty, or the folder of the same run.
        say: gets each line of what is done.
        progress: whether bars are drawn.
        stop: set it from anywhere to end after the current step; Ctrl-C and a file named STOP do the same.
        listeners: called with every Step, after the run's own.

    Returns:
        What was made. A stopped run has no finished file yet; start again to go on.

    Raises:
        ValueError, FileNotFoundError, OSError, FloatingPointError: what is wrong and what to do.

    Of several processes (`accelerate launch`) every one calls this; each batch is shared out among them, and the first
    alone speaks, listens, writes and returns the finished file.
    """
    folder, started, stop, team = Path(folder), time.time(), stop or threading.Event(), processes.join(config.device)
    rungs = plan.ladder(config)
    if config.batch_size < team.size:
        raise ValueError(
            f"batch_size {config.batch_size} cannot be shared out among {team.size} processes: "
            f"set it to {team.size} or a multiple, with as much less gradient_accumulation_steps."
        )
    if not team.first:
        say, progress, listeners = lambda _: None, False, ()
    with team.in_turn():
        if team.first:
            claim(folder)
            (folder / "STOP").unlink(missing_ok=True)
            prepared, saved = _ready(config, folder, team, say, progress)
        else:  # as the first one has decided, from what it has encoded
            config = configs.load(folder / "config.json")
            prepared = prepare(config.with_(fit_memory=False), folder, say=say, progress=False)
            prepared = replace(prepared, config=config)
            saved = checkpoint.newest(folder / "checkpoints", warn=say)
    config, decided = prepared.config, settings(prepared.config, prepared)

    device = bases.choose_device(config.device)
    dtype = bases.compute_dtype(config.mixed_precision, device)
    bases.keep_freed_memory(device)
    if saved:
        say(f"resume    at step {saved.step}, from {saved.path.name}")
    per_epoch, total = train.plan(prepared.pictures, prepared.repeats, config)
    losses: dict[int, float] = {}
    models = state = None
    while True:
        full = None
        try:
            if state is None:
                models = _models(prepared.base, config, dtype, device)
                state = _state(models, prepared.base, config, device, dtype, saved)
            _drain(
                models["unet"], prepared, state, config, folder, decided, total, say, progress, stop, listeners, losses,
                team,
            )  # fmt: skip
            break
        except (RuntimeError, MemoryError) as error:
            below = rungs[rungs.index(config) + 1 :] if config in rungs else []
            if not train.out_of_memory(error) or not below or team.size > 1:
                raise
            # Its words alone: the error itself holds on to what the step allocated.
            full = (str(error).splitlines() or ["MemoryError"])[0].split(". ")[0]
        except train.Diverged as error:
            factor = state.rate_factor / 2
            with team.in_turn():
                saved = _last_good(folder / "checkpoints", config.save_every)
            back = saved.step if saved else 0
            if factor < LEAST_FACTOR:
                raise FloatingPointError(_hopeless(error, config)) from error
            state = _state(models, prepared.base, config, device, dtype, saved)
            state.rate_factor = factor
            say(f"back      {error} Going on from step {back} with {factor:g} of the learning rate.")
        if full:
            lower = below[0]
            if state:
                saved = _saved_anyhow(folder / "checkpoints", state, settings(lower, prepared))
            models = state = None
            gc.collect()
            cache.free(device)
            back = f"step {saved.step}" if saved else "the beginning"
            say(f"memory    none left ({full}). Going on from {back} with {_changes(config, lower)}.")
            prepared = prepare(lower, folder, say=say, progress=progress, rungs=below)
            config, decided = prepared.config, settings(prepared.config, prepared)
            _write(config, folder)
            per_epoch, total = train.plan(prepared.pictures, prepared.repeats, config)
    if not team.first:
        return Result(folder, config, state.step, total, [], None, None)
    adapter = state.adapter
    _draw_loss(folder, config)
    if state.step < total:
        say(f"stopped   at step {state.step} of {total}, saved. Start again to go on from there.")
        done = [losses[step] for step in sorted(losses)]
        return Result(folder, config, state.step, total, done, None, None, best_checkpoint(folder)[0])

    metadata = export.run_metadata(
        config, prepared.base, prepared.dataset, steps=total, epochs=-(-total // per_epoch), started=started,
        finished=time.time(), adapter=adapter, batches=prepared.batches,
        prior=prepared.prior_repeats, thumbnail=_thumbnail(folder / "samples" / f"step-{total:06d}"),
    )  # fmt: skip
    with state.evaluated():
        lora = export.save(adapter, prepared.base, folder / f"{config.name}.safetensors", metadata=metadata)
        proof = export.prove(lora, adapter, prepared.base)
    say(f"export    {lora.name}, {lora.stat().st_size / 1e6:.1f} MB, kohya's format (A1111, Forge, ComfyUI, Civitai)")
    say(f"proof     read back: {proof.describe()}")
    best, advice = best_checkpoint(folder)
    if best:
        say(f"best      {best.name}. {advice}")
    del models, adapter, state
    cache.free(device)
    comparison = compare(prepared.base, lora, prepared.prompts, config, folder / "comparison.png", progress=progress)
    say(f"look      {comparison.name}: the bare base and strengths {', '.join(map(str, STRENGTHS[1:]))} side by side")
    return Result(folder, config, total, total, [losses[step] for step in sorted(losses)], lora, comparison, best)


def _ready(
    config: Config, folder: Path, team: processes.Team, say: Callable[[str], None], progress: bool
) -> tuple[Prepared, checkpoint.Checkpoint | None]:
    """Prepare a run, or find where it goes on, and write down the settings it has."""
    prepared = prepare(config, folder, say=say, progress=progress, shared_by=team.size)
    saved = checkpoint.newest(folder / "checkpoints", warn=lambda text: say(f"resume    {text}"))
    if saved:
        saved = replace(saved, settings=_as_of_now(saved.settings))
        lower = _come_down(config, prepared, saved.settings)
        if saved.settings not in [settings(above, prepared) for above in plan.ladder(config)]:
            _same(saved.settings, settings(prepared.config, prepared), folder)
        if lower != prepared.config:
            say(f"memory    goes on with {_changes(config, lower)}, which the run had come down to")
            rungs = plan.ladder(config)
            below = rungs[rungs.index(lower) :]
            prepared = prepare(lower, folder, say=say, progress=progress, shared_by=team.size, rungs=below)
    _write(prepared.config, folder)
    return prepared, saved


def _write(config: Config, folder: Path) -> None:
    with files.replacing(folder / "config.json") as partial:
        partial.write_text(config.to_json(), encoding="utf-8")


def _saved_anyhow(folder: Path, state: train.State, decided: dict) -> checkpoint.Checkpoint | None:
    """A checkpoint of the last whole step, written now; where an update was cut in its midst, the newest there is."""
    if state.updating:
        return checkpoint.newest(folder)
    return checkpoint.read(checkpoint.save(folder / checkpoint.name(state.step), state, decided))


def _models(base: bases.Base, config: Config, dtype: torch.dtype, device: torch.device) -> dict[str, torch.nn.Module]:
    """The UNet, and those text encoders that are trained."""
    trained = config.text_rates(base.text_encoders)
    encoders = {which: bases.load_text_encoder(base, dtype, device, which)[0] for which in trained}
    return {"unet": bases.load_unet(base, dtype, device, config.quantize)} | encoders


def _state(
    models: dict[str, torch.nn.Module], base: bases.Base, config: Config, device, dtype,
    saved: checkpoint.Checkpoint | None,
) -> train.State:  # fmt: skip
    """A fresh adapter in the models, in place of any that is there, and the state around it as `saved` has it."""
    adapters.eject(models)
    adapter = adapters.fresh(models, config)
    if config.start_from and not saved:
        export.begin_from(adapter, base, config.start_from)
    state = train.start(adapter, config, device, dtype)
    if saved:
        checkpoint.restore(state, saved)
    return state


def _last_good(folder: Path, every: int) -> checkpoint.Checkpoint | None:
    """The newest regular checkpoint before any step of the bad row; newer ones are put aside as `….diverged`.

    Only regular ones, at multiples of `every`: a run that was stopped in between goes back as far as one that was not.
    """
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            found = checkpoint.read(path)
        except ValueError:
            continue
        if found.step % every == 0 and not found.tensors["skipped"].any():
            return found
        path.replace(path.with_suffix(".diverged"))
    return None


def _hopeless(error: Exception, config: Config) -> str:
    return (
        f"{error} The learning rate was halved {round(math.log2(1 / LEAST_FACTOR))} times, and it happened again. "
        f"Start anew with a lower learning_rate than {config.learning_rate:g}, or mixed_precision 'bf16' or 'no'; a "
        "picture that every skipped step saw may be the cause: see log.jsonl."
    )


def _drain(
    unet,
    prepared,
    state,
    config,
    folder,
    decided,
    total,
    say,
    progress,
    stop,
    listeners,
    losses: dict[int, float],
    team: processes.Team,
) -> None:
    """The training itself, with the run's own listeners; saves where it is stopped, puts down each step's loss."""
    loop = train.steps(unet, prepared.base, state, prepared.pictures, prepared.repeats, prepared.texts, config, team)
    if not team.first:
        train.run(loop, stop=stop, team=team)
        return
    stop_file = folder / "STOP"

    def watch(step: Step) -> None:
        if stop_file.exists():
            stop.set()

    with tqdm(total=total, initial=state.step, desc="train", unit="step", disable=not progress) as line:

        def show(step: Step, loss: float) -> None:
            line.set_postfix_str(f"loss {loss:.4f}, epoch {step.epoch}", refresh=False)
            line.update(step.number - line.n)

        on_board = _board(folder / "tensorboard", state.step, say)
        log = Log(folder / "log.jsonl", state.step, prepared.names, show, say, on_board, losses)
        keep = checkpoint.every(config.save_every, folder / "checkpoints", state, decided)

        def safely(step: Step) -> None:
            if step.number % config.save_every == 0:
                log.flush()  # what a checkpoint goes on from is on disk before it
            keep(step)

        try:
            own = [log, safely, sampler(unet, state, prepared, config, folder, say, on_board), watch]
            if prepared.held_out:
                own_pictures = [picture for picture in prepared.pictures if not picture.prior]
                judge = evaluate.every(
                    config.validate_every, unet, state, prepared.base, prepared.held_out, own_pictures, prepared.texts,
                    config, lambda mark: log.marks.update({mark.step: mark.facts()}),
                )  # fmt: skip
                own.insert(1, judge)
            done = train.run(loop, *own, *listeners, stop=stop, team=team)
        finally:
            log.flush()
            if on_board:
                on_board.close()
        if done and done[-1].number < total:
            checkpoint.save(folder / "checkpoints" / checkpoint.name(state.step), state, decided)


def _board(folder: Path, resumed_at: int, say: Callable[[str], None]) -> board.Board | None:
    try:
        return board.Board(folder, resumed_at)
    except ImportError:
        say("board     tensorboard is not installed: the curves are in log.jsonl alone")
        return None


def best_checkpoint(folder: Path) -> tuple[Path | None, evaluate.Advice | None]:
    """The saved checkpoint nearest to the lowest validation loss, and what the curve says; None where none was made."""
    log = plots.read_log(folder / "log.jsonl") if (folder / "log.jsonl").exists() else []
    marks = [(line["step"], line["validation_loss"]) for line in log if "validation_loss" in line]
    saved = {int(path.stem.removeprefix("step-")): path for path in (folder / "checkpoints").glob("step-*.safetensors")}
    if not marks or not saved:
        return None, None
    advice = evaluate.advise(*zip(*marks, strict=True))
    return saved[min(saved, key=lambda step: (abs(step - advice.best), -step))], advice


def _thumbnail(samples: Path) -> Image.Image | None:
    first = next(iter(sorted(samples.glob("*.png"))), None)
    return Image.open(first) if first else None


def _draw_loss(folder: Path, config: Config) -> None:
    lines = plots.read_log(folder / "log.jsonl")
    if lines:
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        plots.loss(steps, losses, path=folder / "loss.png", title=config.name)


def compare(
    base: bases.Base, lora: Path, prompts: Sequence[str], config: Config, path: Path, *,
    strengths: Sequence[float] = STRENGTHS, progress: bool = True,
) -> Path:  # fmt: skip
    """A sheet of pictures made with the exported file: a row a prompt, a column a strength, the same noise in each."""
    loaded = export.load(lora)
    with bar(progress) as show:
        rows = sample.generate(
            base, prompts, seeds=config.seed, size=(config.resolution, config.resolution), strengths=strengths,
            attach=lambda models: export.inject(models, base, loaded), adapts=loaded.adapts, steps=config.sample_steps,
            guidance=config.sample_guidance, clip_skip=config.clip_skip, device=config.device,
            precision=config.mixed_precision, quantize=config.quantize, batch=_at_once(config),
            on_picture=lambda n: show("comparing", n, len(prompts) * len(strengths)),
        )  # fmt: skip
    labels = ["base" if s == 0 else f"strength {s:g}" for s in strengths]
    plots.grid(rows, row_labels=list(prompts), column_labels=labels, path=path)
    return path


def describe(folder: str | Path) -> dict:
    """What a run folder is and how far it came, from its own files.

    Raises:
        FileNotFoundError, ValueError: no run there.
    """
    folder = Path(folder)
    config = configs.load(folder / "config.json")
    checkpoints = []
    for path in sorted((folder / "checkpoints").glob("step-*.safetensors")):
        try:
            checkpoints.append({"step": checkpoint.read(path).step, "file": path.name, "intact": True})
        except ValueError as error:
            checkpoints.append({"file": path.name, "intact": False, "problem": str(error)})
    log = plots.read_log(folder / "log.jsonl") if (folder / "log.jsonl").exists() else []
    lora = folder / f"{config.name}.safetensors"
    best, advice = best_checkpoint(folder)
    return {
        "kind": "run", "name": config.name, "steps": log[-1]["step"] if log else 0,
        "loss": plots.smooth([line["loss"] for line in log])[-1] if log else None,
        "checkpoints": checkpoints, "best": best.name if best else None,
        "advice": str(advice) if advice else None, "finished": lora.name if lora.exists() else None,
        "config": config.model_dump(mode="json"),
    }  # fmt: skip
