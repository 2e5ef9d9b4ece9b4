"""The whole way, one folder a run: scan → buckets → memory plan → cache → train → checkpoints → samples → export.

    config.json · log.jsonl · tensorboard/ · loss.png · checkpoints/step-000500.safetensors · samples/step-000500/…png ·
    comparison.png · <name>.safetensors

Starting on a folder that already holds a run resumes it from the newest checkpoint whose digest holds, here or at the
run's second place.
"""

import errno
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from lorakit import adapter as adapters
from lorakit import (
    backup,
    board,
    cache,
    checkpoint,
    evaluate,
    export,
    files,
    initial,
    memory,
    plan,
    plots,
    prepare,
    processes,
    record,
    sample,
    train,
)
from lorakit import base as bases
from lorakit import config as configs
from lorakit import metadata as metadatas
from lorakit.cache import Progress
from lorakit.config import Config
from lorakit.live import Live, obeying, sampler
from lorakit.prepare import Prepared
from lorakit.record import Console
from lorakit.train import Step

PATIENCE = 600  # seconds that the end of a run waits for the second place
LEAST_FACTOR = 1 / 8  # of the learning rate: a run that diverges even then is given up
STRENGTHS = (0.0, 0.5, 0.7, 0.9, 1.0)  # the guide's, and the bare base


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
    missing: tuple[str, ...] = ()  # what could not be made, and why: a line each


@dataclass
class Shared:
    """What runs that follow one another have in common, so that nothing is encoded or loaded twice.

    One run at a time uses it, and hands models back as they were loaded.
    """

    cache: Path | None = None  # folder for what is encoded; None: one in each run's own
    loaded: dict[str, torch.nn.Module] = field(default_factory=dict, repr=False)  # "unet", and encoders in training
    origin: tuple = ()  # what decides their weights and where they are

    @property
    def held(self) -> int:
        """Bytes that the loaded models take."""
        tensors = [t for model in self.loaded.values() for t in (*model.parameters(), *model.buffers())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def suit(self, config: Config) -> None:
        """Free what a run with these settings has no use for."""
        device = bases.choose_device(config.device)
        origin = (config.base, bases.compute_dtype(config.mixed_precision, device), device, config.quantize)
        if origin != self.origin:
            self.release()
        self.origin = origin

    def models(self, base: bases.Base, config: Config) -> adapters.Models:
        """The UNet, and the text encoders that are trained: what is not there yet is loaded, the rest is freed."""
        self.suit(config)
        _, dtype, device, quantize = self.origin
        trained = config.text_rates(base.text_encoders)
        for which in self.loaded.keys() - {"unet", *trained}:
            del self.loaded[which]
        for which in trained:
            if which not in self.loaded:
                self.loaded[which] = bases.load_text_encoder(base, dtype, device, which)[0]
        if "unet" not in self.loaded:
            self.loaded["unet"] = bases.load_unet(base, dtype, device, quantize)
        return {which: self.loaded[which] for which in ("unet", *trained)}

    def restore(self) -> None:
        """Take out of the models what training has put into them."""
        adapters.eject(self.loaded)
        for which, model in self.loaded.items():
            model.requires_grad_(False).eval()
            if which == "unet":
                model.disable_gradient_checkpointing()

    def release(self) -> None:
        """Free the models."""
        self.loaded.clear()
        if self.origin:
            cache.free(self.origin[2])


# ── Resuming ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _come_down(config: Config, prepared: Prepared, saved: dict) -> Config:
    """The lower of what is predicted to fit now and what a run had come down to when it was saved."""
    ladder = plan.ladder(config)
    for place, lower in enumerate(ladder):
        if prepare.settings(lower, prepared) == saved:
            return ladder[max(place, ladder.index(prepared.config))]
    return prepared.config


def _as_of_now(saved: dict) -> dict:
    """The settings of a run begun before some of today's were known, which then were as they are by default."""
    unlike = prepare.FREE | {"steps", "epochs", "base", "dataset"}
    return json.loads(Config(steps=1).model_dump_json(exclude=unlike)) | saved


class OtherSettings(ValueError):
    """A folder holds a run that was begun with other settings.

    Attributes:
        changed: setting → what the run has, and what was asked for now.
    """

    def __init__(self, run: str, changed: dict[str, tuple]):
        self.changed = changed
        super().__init__(
            f"{run} was begun with other settings: "
            + "; ".join(f"{name} was {before!r}, is now {now!r}" for name, (before, now) in changed.items())
            + ". Put them back to go on, or name another folder for a new run: an empty one, or with --fork one that "
            "goes on from this run's newest checkpoint with the new settings."
        )


def is_finished(config: Config, folder: Path, prepared: Prepared) -> bool:
    """Whether a folder holds this very run, at its last step and with its file.

    Raises:
        OtherSettings: a run that was begun with other settings.
    """
    saved = checkpoint.newest(folder / "checkpoints", lambda _: None)
    if saved is None:
        return False
    _known(replace(saved, settings=_as_of_now(saved.settings)), config, folder, prepared)
    _, total = train.plan(prepared.pictures, prepared.repeats, prepared.config)
    return saved.step >= total and (folder / f"{config.name}.safetensors").is_file()


def _known(saved: checkpoint.Checkpoint, config: Config, folder: Path, prepared: Prepared) -> None:
    """Refuse to go on with a run that these settings do not come down to."""
    if saved.settings not in [prepare.settings(above, prepared) for above in plan.ladder(config)]:
        before, now = saved.settings, prepare.settings(prepared.config, prepared)
        names = sorted(before.keys() | now.keys())
        changed = {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}
        if changed:
            raise OtherSettings(folder.name, changed)


def claim(folder: Path) -> None:
    """Make the run folder, or check that it is one.

    Raises:
        ValueError: the folder holds something else.
        OSError: it cannot be made or written.
    """
    own = {"cache", "log.jsonl", "STOP"}  # before there is a config.json
    try:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file. Name a folder for the run.")
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        foreign = {name for name in there if not name.startswith(".")} - own
        if foreign and not {"config.json", "checkpoints"} & foreign:
            raise ValueError(f"{folder} holds other files and no run. Name a new or empty folder.")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror.lower() if error.strerror else error
        raise OSError(error.errno, f"the run folder {folder.name} cannot be made: {reason}. Choose another") from error


# ── The run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def start(
    config: Config, folder: str | Path, *, say: Callable[[str], None] = print, progress: bool | Progress = True,
    live: Live | None = None, listeners: Sequence[Callable[[Step], None]] = (),
    fork: str | Path | None = None, shared: Shared | None = None,
) -> Result:  # fmt: skip
    """Train a LoRA from pictures to finished file, or go on with a run that was cut.

    Args:
        folder: of the run; new, empty, or the folder of the same run.
        say: gets each line of what is done.
        progress: whether bars are drawn; or what is told, in their place, of what is done before training and after.
        live: to see and steer the run from elsewhere. Its `stop` ends it after the current step, as Ctrl-C, SIGTERM and
            a file named STOP do.
        listeners: called with every Step, after the run's own.
        fork: another run's folder: where this one has no checkpoint yet, it begins from the newest of that one.
        shared: what it has in common with runs before and after; its models stay loaded.

    Returns:
        What was made. A stopped run has no finished file yet; start again to go on.

    Raises:
        BlockingIOError: the folder is in use.
        OtherSettings: it holds a run of other settings.
        ValueError, FileNotFoundError, OSError, FloatingPointError: what is wrong and what to do.

    Of several processes (`accelerate launch`) every one calls this; each batch is shared out among them, and the first
    alone speaks, listens, writes and returns the finished file.
    """
    folder, live, team = Path(folder).absolute(), live or Live(), processes.join(config.device)
    if config.batch_size < team.size:
        raise ValueError(
            f"batch_size {config.batch_size} cannot be shared out among {team.size} processes: "
            f"set it to {team.size} or a multiple, with as much less gradient_accumulation_steps."
        )
    keep = shared or Shared()
    try:
        if not team.first:
            return _start(config, folder, Console(lambda _: None), False, live, (), None, team, keep)
        claim(folder)
        with files.claimed(folder):
            return _start(config, folder, Console(say), progress, live, listeners, fork and Path(fork), team, keep)
    finally:
        if shared:
            shared.restore()
        else:
            keep.release()


def _start(
    config: Config, folder: Path, say: Console, progress: bool | Progress, live: Live,
    listeners: Sequence[Callable[[Step], None]], fork: Path | None, team: processes.Team, keep: Shared,
) -> Result:  # fmt: skip
    """`start`, in a folder that is this run's alone."""
    # The computer's clock may jump; what has passed since the start does not.
    started, began, rungs = time.time(), time.monotonic(), plan.ladder(config)
    clock = lambda: started + time.monotonic() - began  # noqa: E731
    with team.in_turn():
        if team.first:
            files.sweep(folder)
            (folder / "STOP").unlink(missing_ok=True)
            prepared, saved = _ready(config, folder, team, say, progress, fork, live.stop, keep)
            _room(prepared, folder, say)
        else:  # as the first one has decided, from what it has encoded
            config = configs.load(folder / "config.json")
            asked = config.with_(fit_memory=False)
            prepared = prepare.run(asked, folder, say=say, progress=False, store=keep.cache)
            prepared = replace(prepared, config=config)
            saved = checkpoint.newest(folder / "checkpoints", warn=say)
    config, decided = prepared.config, prepare.settings(prepared.config, prepared)

    device = bases.choose_device(config.device)
    dtype = bases.compute_dtype(config.mixed_precision, device)
    bases.keep_freed_memory(device)
    if saved:
        say(f"resume    at step {saved.step}, from {saved.path.name}")
        before = ((saved.about or {}).get("metadata") or {}).get("ss_mixed_precision")
        if before not in (None, metadatas.precision(dtype)):
            say(f"          was trained in {before}, goes on in {metadatas.precision(dtype)}: not bit for bit the same")
    per_epoch, total = train.plan(prepared.pictures, prepared.repeats, config)
    losses: dict[int, float] = {}
    copier = None
    if config.backup and team.first:
        copier = backup.Copier(backup.place(config.backup, folder.name), config.keep_states)
    models = state = None
    while True:
        full = None
        try:
            if state is None:
                models = keep.models(prepared.base, config)
                state = _state(models, prepared, device, dtype, saved, team)
            at = _telling(config, prepared, state, per_epoch, saved, clock)
            _drain(
                models["unet"], prepared, state, config, folder, decided, at, total, say, progress, live, listeners,
                losses, team, copier, (saved.about or {}).get("log") if saved else None,
            )  # fmt: skip
            break
        except (RuntimeError, MemoryError) as error:
            below = rungs[rungs.index(config) + 1 :] if config in rungs else []
            if not bases.out_of_memory(error) or not below or team.size > 1:
                raise
            # Its words alone: the error itself holds on to what the step allocated.
            full = (str(error).splitlines() or ["MemoryError"])[0].split(". ")[0]
        except train.Diverged as error:
            factor = state.rate_factor / 2
            with team.in_turn():
                saved = _last_good(folder / "checkpoints")
            back = saved.step if saved else 0
            if copier:
                copier.back(back)
            if factor < LEAST_FACTOR:
                raise FloatingPointError(_hopeless(error, config)) from error
            state = _state(models, prepared, device, dtype, saved, team)
            state.rate_factor = factor
            say(f"back      {error} Going on from step {back} with {factor:g} of the learning rate.")
        if full:
            lower = below[0]
            if state:
                about = {"family": prepared.base.family, "metadata": at(state.step)}
                asked = prepare.settings(lower, prepared)
                saved = _saved_anyhow(folder / "checkpoints", state, lower, asked, about, say)
            models = state = None
            keep.release()
            back = f"step {saved.step}" if saved else "the beginning"
            say(f"memory    none left ({full}). Going on from {back} with {prepare.changes(config, lower)}.")
            prepared = prepare.run(lower, folder, say=say, progress=progress, rungs=below, store=keep.cache)
            config, decided = prepared.config, prepare.settings(prepared.config, prepared)
            _write(config, folder)
            per_epoch, total = train.plan(prepared.pictures, prepared.repeats, config)
    if not team.first:
        return Result(folder, config, state.step, total, [], None, None)
    adapter = state.adapter
    if state.step < total:
        _draw(say, "loss.png", lambda: _draw_loss(folder, config))
        _finish(copier, say)
        say(f"stopped   at step {state.step} of {total}, saved. Start again to go on from there.")
        done, best = [losses[step] for step in sorted(losses)], record.best_checkpoint(folder)[0]
        return Result(folder, config, state.step, total, done, None, None, best, say.end())

    thumbnail = record.thumbnail(folder / "samples" / f"step-{total:06d}")
    with state.evaluated():
        lora = export.save(
            adapter, prepared.base, folder / f"{config.name}.safetensors", metadata=at(total) | thumbnail
        )
        proof = export.prove(lora, adapter, prepared.base)
    say(f"export    {lora.name}, {lora.stat().st_size / 1e6:.1f} MB, kohya's format (A1111, Forge, ComfyUI, Civitai)")
    say(f"proof     read back: {proof.describe()}")
    _draw(say, "loss.png", lambda: _draw_loss(folder, config))
    best, advice = record.best_checkpoint(folder)
    if best:
        say(f"best      {best.name}. {advice}")
    del models, adapter, state
    keep.restore()  # what is loaded makes the sheet: a second copy might find no room
    cache.free(device)
    sheet = folder / "comparison.png"
    prompts, told = list(live.prompts or prepared.prompts), {"progress": progress, "stop": live.stop}
    here = {"loaded": keep.loaded, "store": keep.cache or folder / "cache"}
    comparison = _draw(say, sheet.name, lambda: compare(prepared.base, lora, prompts, config, sheet, **told, **here))
    if live.stop.is_set() and not comparison:
        say.failed(sheet.name, "stopped")
    if comparison:
        say(f"look      {sheet.name}: the bare base and strengths {', '.join(map(str, STRENGTHS[1:]))} side by side")
    if copier:
        made = [path for path in (lora, comparison) if path]
        copier.put(total, {f"{path.stem}-step-{total:06d}{path.suffix}": path for path in made})
        _finish(copier, say)
    done = [losses[step] for step in sorted(losses)]
    return Result(folder, config, total, total, done, lora, comparison, best, say.end())


def _ready(
    config: Config, folder: Path, team: processes.Team, say: Callable[[str], None], progress: bool | Progress,
    fork: Path | None, stop: threading.Event, keep: Shared,
) -> tuple[Prepared, checkpoint.Checkpoint | None]:  # fmt: skip
    """Prepare a run, or find where it goes on, and write down the settings it has."""
    if fork and (fork / "cache").is_dir() and not (folder / "cache").exists():
        shutil.copytree(fork / "cache", folder / "cache")  # nothing is encoded twice
    keep.suit(config)
    how = {"say": say, "progress": progress, "shared_by": team.size, "store": keep.cache, "held": keep.held}
    prepared = prepare.run(config, folder, stop=stop, **how)
    warn = lambda text: say(f"resume    {text}")  # noqa: E731
    saved, fetched = checkpoint.newest(folder / "checkpoints", warn), None
    if config.backup:
        place, here = backup.place(config.backup, folder.name), saved.step if saved else 0
        fetched = backup.newest(place, here, folder / "cache" / "fetched", checkpoint.read_whole, warn)
        if not fetched:
            say(f"backup    nothing newer than step {here} at the second place")
    if not (fetched or saved) and (aside := checkpoint.put_aside(folder / "checkpoints", folder / "log.jsonl")):
        say(f"resume    begins anew: none of {', '.join(aside)} can be gone on from. They stay as ….aside")
    if saved := fetched or saved:
        saved = replace(saved, settings=_as_of_now(saved.settings))
        lower = _come_down(config, prepared, saved.settings)
        _known(saved, config, folder, prepared)
        if lower != prepared.config:
            say(f"memory    goes on with {prepare.changes(config, lower)}, which the run had come down to")
            rungs = plan.ladder(config)
            below = rungs[rungs.index(lower) :]
            prepared = prepare.run(lower, folder, rungs=below, **how)
    if fetched:
        saved = replace(saved, path=_take_in(fetched.path, folder))
        say(f"resume    step {saved.step} comes from the second place")
    if fork and not saved:
        saved = _forked(fork, folder, prepared, warn)
        say(f"fork      begins where {fork.name} was at step {saved.step}")
    _write(prepared.config, folder)
    return prepared, saved


def _take_in(fetched: Path, folder: Path) -> Path:
    """Put a checkpoint that was fetched among the run's own, and its log in place of an older one."""
    log, path = fetched.with_name("log.jsonl"), folder / "checkpoints" / fetched.name
    path.parent.mkdir(exist_ok=True)
    if log.exists():
        log.replace(folder / "log.jsonl")
    return fetched.replace(path)


def _forked(origin: Path, folder: Path, prepared: Prepared, warn: Callable[[str], None]) -> checkpoint.Checkpoint:
    """The first checkpoint of a run that begins where another one is.

    Raises:
        ValueError: there is nothing to begin from, it is past this run's end, or its weights are for other modules.
    """
    saved = checkpoint.newest(origin / "checkpoints", warn)
    if saved is None:
        raise ValueError(f"{origin.name} has no checkpoint to fork from. Name the folder of a run that has saved one.")
    if saved.step >= (total := prepared.config.total_steps(prepared.batches)):
        raise ValueError(f"{origin.name} is at step {saved.step}: set steps above that, it is {total} now.")
    forked = checkpoint.fork(saved, folder / "checkpoints", prepare.settings(prepared.config, prepared))
    if (log := origin / "log.jsonl").exists():
        shutil.copyfile(log, folder / "log.jsonl")
    return forked


def _room(prepared: Prepared, folder: Path, say: Callable[[str], None]) -> None:
    """Say how much of the disk the run may take, and make sure that it can be saved at all.

    Raises:
        OSError: there is no room for two checkpoints, as replacing one needs, and the finished file.
    """
    config, prediction = prepared.config, prepared.prediction
    averaged = bool(config.ema_decay) or config.optimizer == "adamw_schedulefree"
    whole, weights = checkpoint.sizes(prediction.adapter, prediction.optimizer, averaged)
    regular = -(-config.total_steps(prepared.batches) // config.save_every)
    thinned = max(0, min(regular, config.keep_checkpoints or regular) - config.keep_states)
    least = 2 * whole + prediction.file_size
    most = (config.keep_states + 1) * whole + thinned * weights + prediction.file_size
    here = sum(path.stat().st_size for path in checkpoint.paths(folder / "checkpoints"))
    free = shutil.disk_usage(folder).free + here
    readable = memory.readable
    say(
        f"disk      {readable(most)} predicted for checkpoints ({readable(whole)} each, of all but the newest "
        f"{config.keep_states} the weights, {readable(weights)}) and the file; {readable(free)} free"
    )
    if free < least:
        raise OSError(
            errno.ENOSPC,
            f"no room for the run in {folder.name}: {least:,} bytes are needed at least, {free:,} are free. Make room "
            "or choose another folder",
        )
    if free < most:
        say(
            "          not enough for all: raise save_every, set keep_checkpoints or make room. What finds none is told"
        )


def _finish(copier: backup.Copier | None, say: Console) -> None:
    """Wait for the second place to have all that it shall, and say whether it has."""
    if copier:
        why = copier.close(PATIENCE)
        for text in copier.told():
            say(text)
        if why:
            say.failed("copies at the second place", why)


def _telling(
    config: Config, prepared: Prepared, state: train.State, per_epoch: int, saved: checkpoint.Checkpoint | None,
    clock: Callable[[], float],
) -> Callable[[int], dict[str, str]]:  # fmt: skip
    """What makes of a step the metadata of a LoRA that was trained until then."""
    said = ((saved.about or {}) if saved else {}).get("metadata", {})
    about = metadatas.of_run(
        config, prepared.base, prepared.dataset, adapter=state.adapter, batches=prepared.batches,
        started=float(said.get("ss_training_started_at", clock())), prior=prepared.prior_repeats,
    )  # fmt: skip
    return lambda step: about | metadatas.at_step(step, -(-step // per_epoch), clock())


def _write(config: Config, folder: Path) -> None:
    with files.replacing(folder / "config.json") as partial:
        partial.write_text(config.to_json(), encoding="utf-8")


def _saved_anyhow(
    folder: Path, state: train.State, config: Config, decided: dict, about: dict, say: Callable[[str], None]
) -> checkpoint.Checkpoint | None:  # fmt: skip
    """A checkpoint of the last whole step, written now; where an update was cut in its midst, the newest there is."""
    if state.updating:
        return checkpoint.newest(folder, say)
    path, regular = folder / checkpoint.name(state.step), state.step > 0 and state.step % config.save_every == 0
    try:
        return checkpoint.read(checkpoint.save(path, state, decided, regular=regular, about=about))
    except OSError as error:
        say(f"save      step {state.step} is not saved: {error}")
        return checkpoint.newest(folder, say)


def _state(
    models: dict[str, torch.nn.Module], prepared: Prepared, device, dtype, saved: checkpoint.Checkpoint | None,
    team: processes.Team,
) -> train.State:  # fmt: skip
    """A fresh adapter in the models, in place of any that is there, and the state around it as `saved` has it."""
    config, base = prepared.config, prepared.base
    adapters.eject(models)
    adapter = adapters.fresh(models, config)
    if config.start_from and not saved:
        export.begin_from(adapter, base, config.start_from)
    elif not saved:
        initial.begin(
            adapter, models["unet"], base, prepared.pictures, prepared.repeats, prepared.texts, config, team
        )  # fmt: skip
    state = train.start(adapter, config, device, dtype)
    if saved:
        checkpoint.restore(state, saved)
    return state


def _last_good(folder: Path) -> checkpoint.Checkpoint | None:
    """The newest regular checkpoint before any step of the bad row; newer ones are put aside as `….diverged`.

    Only regular ones: a run that was stopped in between goes back as far as one that was not.
    """
    for path in checkpoint.paths(folder):
        try:
            found = checkpoint.read_whole(path)
        except ValueError:
            continue
        if found.regular and found.clean:
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
    unet, prepared: Prepared, state: train.State, config: Config, folder: Path, decided: dict,
    at: Callable[[int], dict[str, str]], total: int, say: Console, progress: bool | Progress,
    live: Live, listeners: Sequence[Callable[[Step], None]], losses: dict[int, float], team: processes.Team,
    copier: backup.Copier | None, kept: str | None,
) -> None:  # fmt: skip
    """The training itself, with the run's own listeners; saves where it ends, puts down each step's loss."""
    loop = train.steps(unet, prepared.base, state, prepared.pictures, prepared.repeats, prepared.texts, config, team)
    if not team.first:
        train.run(loop, stop=live.stop, team=team)
        return
    live.prepared, live.step, live.total = prepared, state.step, total

    with tqdm(total=total, initial=state.step, desc="train", unit="step", disable=progress is not True) as line:

        def show(step: Step, loss: float) -> None:
            with suppress(OSError):  # a terminal that was closed
                line.set_postfix_str(f"loss {loss:.4f}, epoch {step.epoch}", refresh=False)
                line.update(step.number - line.n)

        log = record.Log(folder / "log.jsonl", state.step, prepared.names, show, say, losses, kept)
        about = lambda step: {"family": prepared.base.family, "metadata": at(step)}  # noqa: E731
        keeper = record.Keeper(folder, state, decided, config, about, log, copier, say)
        try:
            log.board = _board(folder / "tensorboard", state.step, say)
            keep = checkpoint.every(config.save_every, config.save_minutes, keeper)
            own = [  # the log before what saves it, and wishes before the state is saved that has them
                log, obeying(live, state, prepared, config, keeper, log, folder / "STOP", say, team), keep,
                sampler(unet, state, prepared, config, folder, live, say, log),
            ]  # fmt: skip
            if prepared.held_out:
                own_pictures = [picture for picture in prepared.pictures if not picture.prior]
                judge = evaluate.every(
                    config.validate_every, unet, state, prepared.base, prepared.held_out, own_pictures, prepared.texts,
                    config, lambda mark: log.marks.setdefault(mark.step, {}).update(mark.facts()),
                )  # fmt: skip
                own.insert(1, judge)
            train.run(loop, *own, *listeners, stop=live.stop, team=team)
            if state.step < total:  # at its end there is the finished file, which needs less room
                keeper.stopped()
        except BaseException as error:
            # A run that diverged goes back, and one that lacks memory is saved with the settings it comes down to.
            if not isinstance(error, train.Diverged) and not bases.out_of_memory(error):
                keeper.stopped(error)
            raise
        finally:
            log.close()
            keeper.listen()


def _board(folder: Path, resumed_at: int, say: Console) -> board.Board | None:
    try:
        return board.Board(folder, resumed_at)
    except OSError as error:
        say(f"board     no curves in TensorBoard: {error}. They are in log.jsonl")
        say.failed(record.ON_BOARD, error)
        return None
    except ImportError:
        say("board     tensorboard is not installed: the curves are in log.jsonl alone")
        return None


def _draw(say: Console, what: str, how: Callable[[], Path | None]) -> Path | None:
    """A picture of the run; what stands in its way is said, and undoes nothing."""
    try:
        return how()
    except Exception as error:  # a full disk or card too
        say(f"look      no {what}: {type(error).__name__}: {error}")
        say.failed(what, error)
        return None


def _draw_loss(folder: Path, config: Config) -> None:
    lines = plots.read_log(folder / "log.jsonl")
    if lines:
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        judged = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
        plots.loss(steps, losses, path=folder / "loss.png", title=config.name, validation=judged)


def compare(
    base: bases.Base, lora: Path, prompts: Sequence[str], config: Config, path: Path, *,
    strengths: Sequence[float] = STRENGTHS, progress: bool | Progress = True, stop: threading.Event | None = None,
    loaded: adapters.Models | None = None, store: Path | None = None,
) -> Path | None:  # fmt: skip
    """A sheet of pictures made with the exported file: a row a prompt, a column a strength, the same noise in each.

    Args:
        stop: set from elsewhere, ends it after the current denoising step.
        loaded: models of the base that are there already, as `sample.stream` takes them.
        store: folder of text embeddings; None keeps none.

    Returns:
        The sheet's path; None where it was stopped: nothing is written then.
    """
    own = export.load(lora)
    try:
        with prepare.bar(progress) as show:
            rows = sample.generate(
                base, prompts, seeds=config.seed, size=(config.resolution, config.resolution), strengths=strengths,
                attach=lambda models: export.inject(models, base, own), adapts=own.adapts,
                steps=config.sample_steps, guidance=config.sample_guidance, clip_skip=config.clip_skip,
                device=config.device, precision=config.mixed_precision, quantize=config.quantize,
                on_picture=lambda n: show("comparing", n, len(prompts) * len(strengths)), stop=stop, loaded=loaded,
                folder=store,
            )  # fmt: skip
    except KeyboardInterrupt:
        if stop and stop.is_set():
            return None
        raise
    labels = ["base" if s == 0 else f"strength {s:g}" for s in strengths]
    plots.grid(rows, row_labels=list(prompts), column_labels=labels, path=path)
    return path
