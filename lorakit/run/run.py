"""A training run in a folder of its own: prepare → train → checkpoints and samples → finished file and comparison.

    config.json · log.jsonl · tensorboard/ · loss.png · checkpoints/step-000500.safetensors · samples/step-000500/…png ·
    comparison.png · <name>.safetensors

A run whose folder holds checkpoints continues from the newest one whose digest is right, here or at the backup place.
"""

import errno
import math
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path

from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from lorakit import adapter as adapters
from lorakit import base as bases
from lorakit import config as configs
from lorakit import page, plan, sample, storage, train
from lorakit.adapter import Lora
from lorakit.base import Base
from lorakit.config import Config
from lorakit.console import Console, Progress
from lorakit.device import Compute, free_memory, keep_freed_memory, out_of_memory
from lorakit.run import checkpoint, finish, preparation, resume, run_folder
from lorakit.run import metadata as run_metadata
from lorakit.run.checkpoint import Checkpoint
from lorakit.run.control import Control, Requests, Sampler
from lorakit.run.log import ON_BOARD, Board, Log
from lorakit.run.models import Shared
from lorakit.run.preparation import Prepared
from lorakit.run.run_folder import RunFolder
from lorakit.run.saver import Saver
from lorakit.run.session import Session
from lorakit.sample import Grid, Loaded, Sampling
from lorakit.train import Step

PATIENCE = 600  # seconds that the end of a run waits for the backup place
TRAINING: list[str] = []  # names of the runs that train in this process
LEAST_FACTOR = 1 / 8  # of the learning rate: a run that diverges even then is given up

Listener = Callable[[Step], None]


@dataclass(frozen=True)
class Result:
    """The outcome of a run."""

    folder: Path
    config: Config
    steps: int  # done
    total: int
    losses: list[float] = field(repr=False)  # of the steps of this start
    lora: Path | None  # the finished file; None when the run was stopped before its end
    comparison: Path | None  # pictures of the base and of the LoRA at several strengths
    best: Path | None = None  # the checkpoint nearest to the lowest validation loss, where pictures are held out
    missing: tuple[str, ...] = ()  # what could not be made, and why: a line each


class Run:
    """A LoRA's training run in one folder. Iterating over it trains, and resumes what was cut.

        for step in Run(config, "runs/style"):
            print(step.number, step.loss)

    Leaving the loop saves the run; another loop continues it. At its last step the run writes the finished file.

    Args:
        folder: of the run; new, empty, or the folder of the same run.
        console: where lines and progress bars go, and the wish to stop, unless `control` is given.
        control: to follow, steer and stop the run from another thread.
        fork: the folder of another run, from whose newest checkpoint this one starts.
        shared: caches and models shared with runs before and after; the models stay loaded.

    Attributes:
        result: the outcome of the last loop.
    """

    def __init__(
        self, config: Config, folder: str | Path, *, console: Console | None = None, control: Control | None = None,
        fork: str | Path | None = None, shared: Shared | None = None,
    ):  # fmt: skip
        self.config, self.folder = config, RunFolder(folder)
        self.control = control or Control()
        console = console or Console()
        if control is None:
            self.control.stop = console.stop
        self.console = replace(console, stop=self.control.stop, failures={})
        self.fork = Path(fork) if fork else None
        self.shared, self._keeps_models = shared or Shared(), shared is not None
        self.result: Result | None = None
        self._loop: Callable[[], Generator[Step, None, None] | None] = lambda: None
        self._base: Base | None = None
        self._used = False

    # ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────

    def __iter__(self) -> Iterator[Step]:
        """Train, yielding after each optimizer update.

        Raises:
            BlockingIOError: the folder is in use.
            OtherSettings: the folder holds a run of other settings.
            ValueError, FileNotFoundError, OSError, FloatingPointError: what is wrong and what to do.
        """
        self._begin()
        steps = self._train(())
        self._loop = weakref.ref(steps)  # only the caller's loop holds it: leaving the loop closes it, which saves
        return steps

    def train(self, *listeners: Listener) -> Result:
        """Train to the end, or until it is stopped.

        Args:
            listeners: called with every Step, after the run's own.

        Raises:
            As iterating does.
        """
        self._begin()
        for _ in self._train(listeners):
            pass
        assert self.result
        return self.result

    def _begin(self) -> None:
        """End a loop that is still open, as an exception's traceback keeps it, and forget what the last one noted."""
        if steps := self._loop():
            steps.close()  # which saves
        if self._used:  # a stop before the first loop is meant for it
            self.control.stop.clear()
        self._used, self.result = True, None
        self.console.failures.clear()

    def stop(self) -> None:
        """Save and end after the current step. May be called from any thread."""
        self.control.stop.set()

    def _train(self, listeners: Sequence[Listener]) -> Generator[Step, None, None]:
        """The run in each of its processes; only the first one shows text, calls listeners and writes."""
        team = train.join_team(self.config.device)
        if self.config.batch_size < team.size:
            raise ValueError(
                f"batch_size {self.config.batch_size} cannot be shared out among {team.size} processes: "
                f"set it to {team.size} or a multiple, with as much less gradient_accumulation_steps."
            )
        try:
            if not team.first:
                yield from _Training(self, Console.quiet(self.console.stop), team).steps(())
                return
            self.folder.make()
            with storage.claim_folder(self.folder.path):
                yield from _Training(self, self.console, team).steps(listeners)
        finally:
            if self._keeps_models:
                self.shared.restore()
            else:
                self.shared.release()

    # ── Before and after ──────────────────────────────────────────────────────────────────────────────────────────

    def plan(self) -> plan.Prediction:
        """Memory, time and file size, predicted without loading the base."""
        return plan.predict(self.config)

    @property
    def base(self) -> Base:
        """The base, opened but not loaded."""
        if self._base is None:
            config = self.config
            self._base = bases.open(config.base, config.prediction_type, config.zero_terminal_snr, self.compute.half)
        return self._base

    @property
    def lora(self) -> Lora:
        """The LoRA of the finished file, or else of the newest checkpoint."""
        finished = self.folder.lora_file(self.config)
        return run_folder.lora_of(finished if finished.is_file() else self.folder.path)

    @property
    def sampling(self) -> Sampling:
        """The settings of sample pictures."""
        return Sampling.of(self.config)

    @property
    def compute(self) -> Compute:
        return Compute.of(self.config)

    def sample(self, prompts: Sequence[str], strengths: Sequence[float] = finish.STRENGTHS) -> Grid:
        """Make pictures of prompts without the LoRA and with it at several strengths."""
        return sample.grid(self, prompts, strengths, console=replace(self.console, stop=threading.Event()))

    def export(
        self, path: str | Path, step: str | int = "newest", *, dtype: str = "fp16", layout: str = "kohya"
    ) -> Path:  # fmt: skip
        """Write the LoRA of a step for other programs, and prove the file.

        Args:
            step: "newest", "best" (by validation loss), or a number.
            dtype: "fp16", "bf16" or "fp32".
            layout: "kohya", "diffusers" or "peft".
        """
        lora = run_folder.lora_of(self.folder.path, step)
        written = adapters.save(lora, Path(path), dtype=adapters.dtype_of(dtype), layout=layout)
        self.console.say(f"export    {written} from {lora.name}, layout {layout}, {dtype}")
        for line in adapters.prove(written, lora, layout=layout).lines():
            self.console.say(line)
        return written

    def describe(self) -> str:
        """How far the run came, in a few words."""
        if not self.folder.is_run:
            return f"{self.folder.name}: not started"
        saved, finished = self.folder.saved(), self.folder.lora_file(self.config)
        state = f"finished: {finished.name}" if finished.is_file() else "not finished"
        return f"{self.folder.name}: saved at step {max(saved, default=0)}, {state}"

    __str__ = describe

    def _repr_html_(self) -> str:
        picture = self.folder.comparison if self.folder.comparison.is_file() else self.folder.loss_figure
        if not picture.is_file():
            return f"<p>{escape(self.describe())}</p>"
        with Image.open(picture) as image:
            return f"<p>{escape(self.describe())}</p>{page.image(image, max(image.size))}"


def start(
    config: Config, folder: str | Path, *, say: Callable[[str], None] = print, progress: bool | Progress = True,
    control: Control | None = None, listeners: Sequence[Listener] = (), fork: str | Path | None = None,
    shared: Shared | None = None,
) -> Result:  # fmt: skip
    """Train a LoRA from pictures to finished file, or resume a run that was cut: `Run(config, folder, …).train()`.

    Args:
        say: called with each line of text.
        progress: True draws progress bars; a function is called instead, with a name, the number done and the total.
    """
    run = Run(config, folder, console=Console(say, progress), control=control, fork=fork, shared=shared)
    return run.train(*listeners)


# ── One loop over a run ─────────────────────────────────────────────────────────────────────────────────────────────


class _Training:
    """One loop over a run: its sessions, one after the other, with what has to change between them."""

    def __init__(self, run: Run, console: Console, team: train.Team):
        self.run, self.folder, self.control, self.shared = run, run.folder, run.control, run.shared
        self.console, self.team = console, team
        self.started, self.began = time.time(), time.monotonic()
        self.losses: dict[int, float] = {}
        self.copier: storage.Copier | None = None

    def clock(self) -> float:
        """Seconds since 1970; the computer's clock may jump, the time since the start does not."""
        return self.started + time.monotonic() - self.began

    def steps(self, listeners: Sequence[Listener]) -> Generator[Step, None, None]:
        TRAINING.append(self.folder.name)
        try:
            yield from self._steps(listeners)
        finally:
            TRAINING.remove(self.folder.name)
            if self.copier:
                self.copier.close(0)  # its thread ends once everything is copied

    def _steps(self, listeners: Sequence[Listener]) -> Generator[Step, None, None]:
        prepared, saved = self._prepare()
        keep_freed_memory(Compute.of(prepared.config).device)
        if saved:
            self._say_resumed(saved, prepared.config)
        if prepared.config.backup and self.team.first:
            place = storage.backup_place(prepared.config.backup, self.folder.name)
            self.copier = storage.Copier(place, prepared.config.keep_states)
        session: Session | None = None
        while True:
            full = None
            try:
                session = session or self._session(prepared, saved)
                yield from self._session_steps(session, listeners, saved)
                break
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or not self._rungs_below(prepared.config) or self.team.size > 1:
                    raise
                prepared = session.prepared if session else prepared
                # Only its words: the error itself holds on to what the step allocated.
                full = (str(error).splitlines() or ["MemoryError"])[0].split(". ")[0]
            except train.Diverged as error:
                assert session
                saved = self._go_back(session, error)
            if full:
                saved = self._save_reduced(session, prepared) if session else saved
                session = None
                prepared = self._reduce(prepared, saved, full)
        assert session
        self._end(session)

    # ── Between sessions ──────────────────────────────────────────────────────────────────────────────────────────

    def _prepare(self) -> tuple[Prepared, Checkpoint | None]:
        """Prepare the run; other processes take over what the first one has decided and encoded."""
        folder, config = self.folder, self.run.config
        with self.team.in_turn():
            if self.team.first:
                storage.remove_partial(folder.path)
                folder.stop_file.unlink(missing_ok=True)
                prepared, saved = resume.find_start(
                    config, folder, self.console, fork=self.run.fork, shared=self.shared, team=self.team
                )
                _check_room(prepared, folder, self.console)
                return prepared, saved
            config = configs.load(folder.config_file)
            prepared = preparation.prepare(
                config.with_(fit_memory=False), folder.path, self.console, shared=self.shared
            )
            prepared = replace(prepared, config=config, examples=replace(prepared.examples, config=config))
            return prepared, checkpoint.newest(folder.checkpoints, warn=self.console.say)

    def _say_resumed(self, saved: Checkpoint, config: Config) -> None:
        self.console.say(f"resume    at step {saved.step}, from {saved.path.name}")
        precision = adapters.precision_name(Compute.of(config).dtype)
        before = ((saved.about or {}).get("metadata") or {}).get("ss_mixed_precision")
        if before not in (None, precision):
            self.console.say(f"          trained in {before} so far, now in {precision}: not bit for bit the same")

    def _session(self, prepared: Prepared, saved: Checkpoint | None) -> Session:
        """Models, a fresh adapter in them, and the state as it was saved."""
        models = self.shared.load(prepared.base, prepared.config)
        prepared = self._probed(prepared, models["unet"])
        state = self._state(models, prepared, saved)
        metadata = self._metadata(prepared, state.adapter, saved)
        return Session(
            self.folder, prepared, models, state, self.console, metadata, self.losses, self.copier, self.team
        )

    def _probed(self, prepared: Prepared, unet: nn.Module) -> Prepared:
        """The prepared run with the prediction type that the base's UNet has.

        Raises:
            ValueError: it contradicts the config, or the base is a rectified flow.
        """
        base, asked = prepared.base, prepared.config.prediction_type
        answer = train.probe(unet, base, prepared.examples)
        if answer.kind in (None, base.prediction_type):
            return prepared
        found = f"{base.name} answers with {answer.kind} (relative errors: {answer.describe()})"
        if answer.kind == "flow":
            raise ValueError(f"{found}: it is a rectified flow, which lorakit cannot train. Use another base.")
        if asked != "auto":
            raise ValueError(f"{found}, not with {asked}. Set prediction_type to {answer.kind!r} or 'auto'.")
        self.console.say(f"base      {found}, though its files say {base.prediction_type}: {answer.kind} is used")
        prepared = prepared.predicting(answer.kind)
        if self.team.first:
            self.folder.write_config(prepared.config)
        return prepared

    def _state(self, models: adapters.Models, prepared: Prepared, saved: Checkpoint | None) -> train.State:
        config, compute = prepared.config, Compute.of(prepared.config)
        adapters.eject(models)
        adapter = adapters.inject(models, adapters.run_specs(models, config), config.seed)
        if config.start_from and not saved:
            adapters.copy_weights(adapter, prepared.base, config.start_from)
        elif not saved:
            train.initialise(adapter, models["unet"], prepared.base, prepared.examples, self.team)
        state = train.initial_state(adapter, config, compute.device, compute.dtype)
        if saved:
            checkpoint.restore(state, saved)
        return state

    def _metadata(
        self, prepared: Prepared, adapter: adapters.Adapter, saved: Checkpoint | None
    ) -> Callable[[int], dict[str, str]]:
        """Makes the metadata of a LoRA that was trained until a step."""
        before = ((saved.about or {}) if saved else {}).get("metadata", {})
        constant = run_metadata.run_metadata(
            prepared.config, prepared.base, prepared.dataset, adapter=adapter,
            batches=prepared.examples.batches_per_epoch,
            started=float(before.get("ss_training_started_at", self.clock())), prior=prepared.prior_repeats,
            chunks=prepared.chunks,
        )  # fmt: skip
        per_epoch = prepared.examples.steps_per_epoch
        return lambda step: constant | run_metadata.step_metadata(step, -(-step // per_epoch), self.clock())

    def _rungs_below(self, config: Config) -> Sequence[Config]:
        """Settings that need less memory."""
        rungs = plan.ladder(self.run.config.with_(prediction_type=config.prediction_type))
        return rungs[rungs.index(config) + 1 :] if config in rungs else []

    def _save_reduced(self, session: Session, prepared: Prepared) -> Checkpoint | None:
        """The last whole step, saved with the reduced settings; the newest checkpoint when that cannot be."""
        state, folder = session.state, self.folder.checkpoints
        lower = self._rungs_below(prepared.config)[0]
        if state.updating:
            return checkpoint.newest(folder, self.console.say)
        regular = state.step > 0 and state.step % lower.save_every == 0
        settings, about = preparation.settings(lower, prepared), session.about(state.step)
        path = self.folder.checkpoint(state.step)
        try:
            return checkpoint.read(checkpoint.save(path, state, settings, regular=regular, about=about))
        except OSError as error:
            self.console.say(f"save      step {state.step} is not saved: {error}")
            return checkpoint.newest(folder, self.console.say)

    def _reduce(self, prepared: Prepared, saved: Checkpoint | None, full: str) -> Prepared:
        """Prepare the run again, with settings that need less memory."""
        rungs = self._rungs_below(prepared.config)
        self.shared.release()
        start, changed = f"step {saved.step}" if saved else "the start", preparation.changes(prepared.config, rungs[0])
        self.console.say(f"memory    none left ({full}). Continues from {start} with {changed}.")
        prepared = preparation.prepare(rungs[0], self.folder.path, self.console, shared=self.shared, rungs=rungs)
        self.folder.write_config(prepared.config)
        return prepared

    def _go_back(self, session: Session, error: train.Diverged) -> Checkpoint | None:
        """Put the session (in place) back to the last good checkpoint, with half the learning rate.

        Raises:
            FloatingPointError: the learning rate was halved too often.
        """
        factor = session.state.rate_factor / 2
        with self.team.in_turn():
            saved = resume.last_good(self.folder.checkpoints)
        step = saved.step if saved else 0
        if self.copier:
            self.copier.back(step)
        if factor < LEAST_FACTOR:
            raise FloatingPointError(
                f"{error} The learning rate was halved {round(math.log2(1 / LEAST_FACTOR))} times, and it happened "
                f"again. Start again with a lower learning_rate than {session.config.learning_rate:g}, or with "
                "mixed_precision 'bf16' or 'no'; a picture that every skipped step saw may be the cause: see log.jsonl."
            ) from error
        session.state = self._state(session.models, session.prepared, saved)
        session.metadata = self._metadata(session.prepared, session.state.adapter, saved)
        session.state.rate_factor = factor
        self.console.say(f"back      {error} Continues from step {step} with {factor:g} of the learning rate.")
        return saved

    # ── In a session ──────────────────────────────────────────────────────────────────────────────────────────────

    def _session_steps(
        self, session: Session, listeners: Sequence[Listener], saved: Checkpoint | None
    ) -> Generator[Step, None, None]:
        """Train with the run's own listeners; saves where it ends."""
        loop = train.steps(session.unet, session.prepared.base, session.state, session.prepared.examples, self.team)
        if not self.team.first:
            yield from train.watched(loop, (), self.console.stop, self.team)
            return
        control, config = self.control, session.config
        control.prepared, control.step, control.total = session.prepared, session.state.step, session.total
        with self._bar(session) as show:
            log = Log(session, show, ((saved.about or {}) if saved else {}).get("log"))
            saver = Saver(session, log)
            try:
                log.board = self._board(session)
                # The log before what saves it, and requests before the state that they change is saved.
                own: list[Listener] = [
                    log, *self._validation(session, log), Requests(session, control, saver, log),
                    checkpoint.every(config.save_every, config.save_minutes, saver), Sampler(session, control, log),
                ]  # fmt: skip
                yield from train.watched(loop, (*own, *listeners), self.console.stop, self.team)
                if session.state.step < session.total:  # at its end there is the finished file, which needs less room
                    saver.stopped()
            except GeneratorExit:  # whoever iterates has left the loop
                saver.left()
                raise
            except BaseException as error:
                # A run that diverged goes back, and one that lacks memory is saved with the reduced settings.
                if not isinstance(error, train.Diverged) and not out_of_memory(error):
                    saver.stopped(error)
                raise
            finally:
                log.close()
                saver.report_copies()

    def _validation(self, session: Session, log: Log) -> list[Listener]:
        held_out, examples = session.prepared.held_out, session.prepared.examples
        if not held_out:
            return []
        note = lambda mark: log.marks.setdefault(mark.step, {}).update(mark.facts())  # noqa: E731
        every, base = session.config.validate_every, session.prepared.base
        return [train.validate_every(every, session.unet, base, session.state, examples, held_out, note)]

    @contextmanager
    def _bar(self, session: Session) -> Iterator[Callable[[Step, float], None]]:
        """A progress bar of the steps: called with a step and its loss."""
        drawn, state = self.console.progress is True, session.state
        with tqdm(total=session.total, initial=state.step, desc="train", unit="step", disable=not drawn) as line:

            def show(step: Step, loss: float) -> None:
                with suppress(OSError):  # a terminal that was closed
                    rate = "" if step.own_rate is None else f", Prodigy's rate {step.own_rate:.1e}"
                    line.set_postfix_str(f"loss {loss:.4f}, epoch {step.epoch}{rate}", refresh=False)
                    line.update(step.number - line.n)

            yield show

    def _board(self, session: Session) -> Board | None:
        try:
            return Board(self.folder.tensorboard, session.state.step)
        except OSError as error:
            self.console.say(f"board     no curves in TensorBoard: {error}. They are in log.jsonl")
            self.console.failed(ON_BOARD, error)
        except ImportError:
            self.console.say("board     tensorboard is not installed: the curves are only in log.jsonl")
        return None

    # ── The end ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _end(self, session: Session) -> None:
        """Finish a run that came to its last step or was stopped, and set its result."""
        config, state, total = session.config, session.state, session.total
        if not self.team.first:
            self.run.result = Result(self.folder.path, config, state.step, total, [], None, None)
            return
        losses = [self.losses[step] for step in sorted(self.losses)]
        lora = comparison = None
        if state.step == total:
            lora = finish.export(session)
        finish.attempt(self.console, "loss.png", lambda: finish.draw_loss(self.folder, config))
        best, advice = self.folder.best()
        if lora:
            if best:
                self.console.say(f"best      {best.name}. {advice}")
            prepared, step = session.prepared, state.step
            del session.models, session.state, state  # the adapter is freed before the sheet is made
            comparison = self._comparison(prepared, lora)
            self._close_copier(step, [path for path in (lora, comparison) if path])
        else:
            step = state.step
            self._close_copier(step, [])
            self.console.say(f"stopped   at step {step} of {total}, saved. Start again to continue from there.")
        self.run.result = Result(
            self.folder.path, config, step, total, losses, lora, comparison, best, self.console.end()
        )

    def _comparison(self, prepared: Prepared, lora: Path) -> Path | None:
        """Make the sheet of prompts × strengths with the finished file and the models that are loaded."""
        self.shared.restore()  # a second copy of the models might find no room
        free_memory(Compute.of(prepared.config).device)
        path, prompts = self.folder.comparison, list(self.control.prompts or prepared.prompts)
        loaded = Loaded(self.shared.models, self.shared.cache or self.folder.cache)
        finished = finish.Finished(prepared.base, lora, prepared.config)  # with the settings that fitted

        comparison = finish.attempt(
            self.console, path.name,
            lambda: finish.draw_comparison(finished, prompts, path, loaded=loaded, console=self.console),
        )  # fmt: skip
        if self.console.stop.is_set() and not comparison:
            self.console.failed(path.name, "stopped")
        if comparison:
            strengths = ", ".join(map(str, finish.STRENGTHS[1:]))
            self.console.say(f"look      {path.name}: the bare base and strengths {strengths} side by side")
        return comparison

    def _close_copier(self, step: int, files: Sequence[Path]) -> None:
        """Let the copier finish, with these files of the run's end, and say whether all is at the backup place."""
        if not self.copier:
            return
        if files:
            self.copier.put(step, {f"{path.stem}-step-{step:06d}{path.suffix}": path for path in files})
        why = self.copier.close(PATIENCE)
        for text in self.copier.messages():
            self.console.say(text)
        if why:
            self.console.failed("copies at the second place", why)


def _check_room(prepared: Prepared, folder: RunFolder, console: Console) -> None:
    """Say how much of the disk the run may take, and check that it can be saved at all.

    Raises:
        OSError: no room for two checkpoints, which replacing one takes, and the finished file.
    """
    config, prediction = prepared.config, prepared.prediction
    averaged = bool(config.ema_decay) or config.optimizer == "adamw_schedulefree"
    weights = prediction.adapter  # of a thinned checkpoint; names and metadata are not counted
    whole = weights * (1 + averaged) + prediction.optimizer
    regular = -(-prepared.examples.total_steps // config.save_every)
    thinned = max(0, min(regular, config.keep_checkpoints or regular) - config.keep_states)
    least = 2 * whole + prediction.file_size
    most = (config.keep_states + 1) * whole + thinned * weights + prediction.file_size
    free = shutil.disk_usage(folder.path).free + sum(path.stat().st_size for path in folder.saved().values())
    readable = plan.readable_bytes
    console.say(
        f"disk      {readable(most)} predicted for checkpoints (the newest {config.keep_states} take {readable(whole)} "
        f"each, older ones {readable(weights)}) and the file; {readable(free)} free"
    )
    if free < least:
        raise OSError(
            errno.ENOSPC,
            f"no room for the run in {folder.name}: it needs at least {least:,} bytes, {free:,} are free. Make room "
            "or choose another folder",
        )
    if free < most:
        console.say("          not enough for all of them: raise save_every, set keep_checkpoints or make room")
