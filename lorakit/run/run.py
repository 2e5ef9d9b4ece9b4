"""The whole way, one folder a run: scan → buckets → memory plan → cache → train → checkpoints → samples → export.

    config.json · log.jsonl · tensorboard/ · loss.png · checkpoints/step-000500.safetensors · samples/step-000500/…png ·
    comparison.png · <name>.safetensors

Starting on a folder that already holds a run resumes it from the newest checkpoint whose digest holds, here or at the
run's second place.
"""

import errno
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
from lorakit import config as configs
from lorakit import plan, storage, train
from lorakit.base import Progress
from lorakit.config import Config
from lorakit.device import choose_device, compute_dtype, free_memory, keep_freed_memory, out_of_memory
from lorakit.run import checkpoint, finish, preparation, run_folder, saver
from lorakit.run import log as log_module
from lorakit.run import metadata as run_metadata
from lorakit.run.control import Live, obeying, sampler
from lorakit.run.finish import STRENGTHS
from lorakit.run.log import Console
from lorakit.run.models import Shared
from lorakit.run.preparation import Prepared
from lorakit.run.resume import _as_of_now, _come_down, _forked, _known, _last_good, _saved_anyhow, _take_in, claim
from lorakit.train import Step

PATIENCE = 600  # seconds that the end of a run waits for the second place
LEAST_FACTOR = 1 / 8  # of the learning rate: a run that diverges even then is given up


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
    folder, live, team = Path(folder).absolute(), live or Live(), train.join_team(config.device)
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
        with storage.claim_folder(folder):
            return _start(config, folder, Console(say), progress, live, listeners, fork and Path(fork), team, keep)
    finally:
        if shared:
            shared.restore()
        else:
            keep.release()


def _start(
    config: Config, folder: Path, say: Console, progress: bool | Progress, live: Live,
    listeners: Sequence[Callable[[Step], None]], fork: Path | None, team: train.Team, keep: Shared,
) -> Result:  # fmt: skip
    """`start`, in a folder that is this run's alone."""
    # The computer's clock may jump; what has passed since the start does not.
    started, began, rungs = time.time(), time.monotonic(), plan.ladder(config)
    clock = lambda: started + time.monotonic() - began  # noqa: E731
    with team.in_turn():
        if team.first:
            storage.remove_partial(folder)
            (folder / "STOP").unlink(missing_ok=True)
            prepared, saved = _ready(config, folder, team, say, progress, fork, live.stop, keep)
            _room(prepared, folder, say)
        else:  # as the first one has decided, from what it has encoded
            config = configs.load(folder / "config.json")
            asked = config.with_(fit_memory=False)
            prepared = preparation.prepare(asked, folder, say=say, progress=False, store=keep.cache)
            prepared = replace(prepared, config=config)
            saved = checkpoint.newest(folder / "checkpoints", warn=say)
    config, decided = prepared.config, preparation.settings(prepared.config, prepared)

    device = choose_device(config.device)
    dtype = compute_dtype(config.mixed_precision, device)
    keep_freed_memory(device)
    if saved:
        say(f"resume    at step {saved.step}, from {saved.path.name}")
        before = ((saved.about or {}).get("metadata") or {}).get("ss_mixed_precision")
        if before not in (None, adapters.precision_name(dtype)):
            say(
                f"          was trained in {before}, goes on in {adapters.precision_name(dtype)}: "
                "not bit for bit the same"
            )
    per_epoch, total = train.plan_epochs(prepared.pictures, prepared.repeats, config)
    losses: dict[int, float] = {}
    copier = None
    if config.backup and team.first:
        copier = storage.Copier(storage.backup_place(config.backup, folder.name), config.keep_states)
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
            if not out_of_memory(error) or not below or team.size > 1:
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
                asked = preparation.settings(lower, prepared)
                saved = _saved_anyhow(folder / "checkpoints", state, lower, asked, about, say)
            models = state = None
            keep.release()
            back = f"step {saved.step}" if saved else "the beginning"
            say(f"memory    none left ({full}). Going on from {back} with {preparation.changes(config, lower)}.")
            prepared = preparation.prepare(lower, folder, say=say, progress=progress, rungs=below, store=keep.cache)
            config, decided = prepared.config, preparation.settings(prepared.config, prepared)
            _write(config, folder)
            per_epoch, total = train.plan_epochs(prepared.pictures, prepared.repeats, config)
    if not team.first:
        return Result(folder, config, state.step, total, [], None, None)
    adapter = state.adapter
    if state.step < total:
        finish.draw(say, "loss.png", lambda: finish.draw_loss(folder, config))
        _finish(copier, say)
        say(f"stopped   at step {state.step} of {total}, saved. Start again to go on from there.")
        done, best = [losses[step] for step in sorted(losses)], run_folder.best_checkpoint(folder)[0]
        return Result(folder, config, state.step, total, done, None, None, best, say.end())

    thumbnail = run_folder.thumbnail(folder / "samples" / f"step-{total:06d}")
    with state.evaluated():
        lora = adapters.save_adapter(
            adapter, prepared.base, folder / f"{config.name}.safetensors", metadata=at(total) | thumbnail
        )
        proof = adapters.prove(lora, adapter, prepared.base)
    say(f"export    {lora.name}, {lora.stat().st_size / 1e6:.1f} MB, kohya's format (A1111, Forge, ComfyUI, Civitai)")
    say(f"proof     read back: {proof.describe()}")
    finish.draw(say, "loss.png", lambda: finish.draw_loss(folder, config))
    best, advice = run_folder.best_checkpoint(folder)
    if best:
        say(f"best      {best.name}. {advice}")
    del models, adapter, state
    keep.restore()  # what is loaded makes the sheet: a second copy might find no room
    free_memory(device)
    sheet = folder / "comparison.png"
    prompts, told = list(live.prompts or prepared.prompts), {"progress": progress, "stop": live.stop}
    here = {"loaded": keep.loaded, "store": keep.cache or folder / "cache"}
    comparison = finish.draw(
        say, sheet.name, lambda: finish.draw_comparison(prepared.base, lora, prompts, config, sheet, **told, **here)
    )
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
    config: Config, folder: Path, team: train.Team, say: Callable[[str], None], progress: bool | Progress,
    fork: Path | None, stop: threading.Event, keep: Shared,
) -> tuple[Prepared, checkpoint.Checkpoint | None]:  # fmt: skip
    """Prepare a run, or find where it goes on, and write down the settings it has."""
    if fork and (fork / "cache").is_dir() and not (folder / "cache").exists():
        shutil.copytree(fork / "cache", folder / "cache")  # nothing is encoded twice
    keep.suit(config)
    how = {"say": say, "progress": progress, "shared_by": team.size, "store": keep.cache, "held": keep.held}
    prepared = preparation.prepare(config, folder, stop=stop, **how)
    warn = lambda text: say(f"resume    {text}")  # noqa: E731
    saved, fetched = checkpoint.newest(folder / "checkpoints", warn), None
    if config.backup:
        place, here = storage.backup_place(config.backup, folder.name), saved.step if saved else 0
        fetched = storage.newest_backup(place, here, folder / "cache" / "fetched", checkpoint.read_whole, warn)
        if not fetched:
            say(f"backup    nothing newer than step {here} at the second place")
    if not (fetched or saved) and (aside := checkpoint.put_aside(folder / "checkpoints", folder / "log.jsonl")):
        say(f"resume    begins anew: none of {', '.join(aside)} can be gone on from. They stay as ….aside")
    if saved := fetched or saved:
        saved = replace(saved, settings=_as_of_now(saved.settings))
        lower = _come_down(config, prepared, saved.settings)
        _known(saved, config, folder, prepared)
        if lower != prepared.config:
            say(f"memory    goes on with {preparation.changes(config, lower)}, which the run had come down to")
            rungs = plan.ladder(config)
            below = rungs[rungs.index(lower) :]
            prepared = preparation.prepare(lower, folder, rungs=below, **how)
    if fetched:
        saved = replace(saved, path=_take_in(fetched.path, folder))
        say(f"resume    step {saved.step} comes from the second place")
    if fork and not saved:
        saved = _forked(fork, folder, prepared, warn)
        say(f"fork      begins where {fork.name} was at step {saved.step}")
    _write(prepared.config, folder)
    return prepared, saved


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
    here = sum(path.stat().st_size for path in checkpoint.checkpoint_paths(folder / "checkpoints"))
    free = shutil.disk_usage(folder).free + here
    readable = plan.readable_bytes
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


def _finish(copier: storage.Copier | None, say: Console) -> None:
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
    about = run_metadata.run_metadata(
        config, prepared.base, prepared.dataset, adapter=state.adapter, batches=prepared.batches,
        started=float(said.get("ss_training_started_at", clock())), prior=prepared.prior_repeats,
    )  # fmt: skip
    return lambda step: about | run_metadata.step_metadata(step, -(-step // per_epoch), clock())


def _write(config: Config, folder: Path) -> None:
    with storage.write_file(folder / "config.json") as partial:
        partial.write_text(config.to_json(), encoding="utf-8")


def _state(
    models: dict[str, torch.nn.Module], prepared: Prepared, device, dtype, saved: checkpoint.Checkpoint | None,
    team: train.Team,
) -> train.State:  # fmt: skip
    """A fresh adapter in the models, in place of any that is there, and the state around it as `saved` has it."""
    config, base = prepared.config, prepared.base
    adapters.eject(models)
    adapter = adapters.fresh(models, config)
    if config.start_from and not saved:
        adapters.copy_weights(adapter, base, config.start_from)
    elif not saved:
        train.initialise(
            adapter, models["unet"], base, prepared.pictures, prepared.repeats, prepared.texts, config, team
        )  # fmt: skip
    state = train.initial_state(adapter, config, device, dtype)
    if saved:
        checkpoint.restore(state, saved)
    return state


def _hopeless(error: Exception, config: Config) -> str:
    return (
        f"{error} The learning rate was halved {round(math.log2(1 / LEAST_FACTOR))} times, and it happened again. "
        f"Start anew with a lower learning_rate than {config.learning_rate:g}, or mixed_precision 'bf16' or 'no'; a "
        "picture that every skipped step saw may be the cause: see log.jsonl."
    )


def _drain(
    unet, prepared: Prepared, state: train.State, config: Config, folder: Path, decided: dict,
    at: Callable[[int], dict[str, str]], total: int, say: Console, progress: bool | Progress,
    live: Live, listeners: Sequence[Callable[[Step], None]], losses: dict[int, float], team: train.Team,
    copier: storage.Copier | None, kept: str | None,
) -> None:  # fmt: skip
    """The training itself, with the run's own listeners; saves where it ends, puts down each step's loss."""
    loop = train.steps(unet, prepared.base, state, prepared.pictures, prepared.repeats, prepared.texts, config, team)
    if not team.first:
        train.drain(loop, stop=live.stop, team=team)
        return
    live.prepared, live.step, live.total = prepared, state.step, total

    with tqdm(total=total, initial=state.step, desc="train", unit="step", disable=progress is not True) as line:

        def show(step: Step, loss: float) -> None:
            with suppress(OSError):  # a terminal that was closed
                line.set_postfix_str(f"loss {loss:.4f}, epoch {step.epoch}", refresh=False)
                line.update(step.number - line.n)

        log = log_module.Log(folder / "log.jsonl", state.step, prepared.names, show, say, losses, kept)
        about = lambda step: {"family": prepared.base.family, "metadata": at(step)}  # noqa: E731
        keeper = saver.Keeper(folder, state, decided, config, about, log, copier, say)
        try:
            log.board = _board(folder / "tensorboard", state.step, say)
            keep = checkpoint.every(config.save_every, config.save_minutes, keeper)
            own = [  # the log before what saves it, and wishes before the state is saved that has them
                log, obeying(live, state, prepared, config, keeper, log, folder / "STOP", say, team), keep,
                sampler(unet, state, prepared, config, folder, live, say, log),
            ]  # fmt: skip
            if prepared.held_out:
                own_pictures = [picture for picture in prepared.pictures if not picture.prior]
                judge = train.validate_every(
                    config.validate_every, unet, state, prepared.base, prepared.held_out, own_pictures, prepared.texts,
                    config, lambda mark: log.marks.setdefault(mark.step, {}).update(mark.facts()),
                )  # fmt: skip
                own.insert(1, judge)
            train.drain(loop, *own, *listeners, stop=live.stop, team=team)
            if state.step < total:  # at its end there is the finished file, which needs less room
                keeper.stopped()
        except BaseException as error:
            # A run that diverged goes back, and one that lacks memory is saved with the settings it comes down to.
            if not isinstance(error, train.Diverged) and not out_of_memory(error):
                keeper.stopped(error)
            raise
        finally:
            log.close()
            keeper.listen()


def _board(folder: Path, resumed_at: int, say: Console) -> log_module.Board | None:
    try:
        return log_module.Board(folder, resumed_at)
    except OSError as error:
        say(f"board     no curves in TensorBoard: {error}. They are in log.jsonl")
        say.failed(log_module.ON_BOARD, error)
        return None
    except ImportError:
        say("board     tensorboard is not installed: the curves are in log.jsonl alone")
        return None
