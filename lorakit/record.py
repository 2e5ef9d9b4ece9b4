"""What a run leaves behind while it goes on: its log, its checkpoints, and copies of both at a second place.

None of these ever ends training: what cannot be written now is told, kept, and tried again.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image

from lorakit import backup, board, checkpoint, evaluate, export, files, plots
from lorakit import config as configs
from lorakit import metadata as metadatas
from lorakit.config import Config
from lorakit.lora import Lora
from lorakit.train import State, Step

ON_BOARD, LAST_LINES = "curves in TensorBoard", "last lines of log.jsonl"  # what may be missing at the end


@dataclass
class Console:
    """Where a run's words go, and the list of what it could not make."""

    show: Callable[[str], None]
    failures: dict[str, tuple[list[int], str]] = field(default_factory=dict)  # what → steps, the last one's reason

    def __call__(self, text: str) -> None:
        with suppress(OSError):  # a terminal that was closed
            self.show(text)

    def failed(self, what: str, error: Exception | str, step: int | None = None) -> None:
        """Note that something could not be made, and why."""
        steps, _ = self.failures.get(what, ([], ""))
        steps += [] if step is None or step in steps else [step]
        text = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else error
        self.failures[what] = steps, (text.splitlines() or [""])[0]

    def made(self, what: str) -> None:
        """Note that something was made after all."""
        self.failures.pop(what, None)

    @property
    def missing(self) -> tuple[str, ...]:
        """A line for each thing that could not be made: what, at which steps, and why."""
        return tuple(f"{what}{_at(steps)}: {why}" for what, (steps, why) in self.failures.items())

    def end(self) -> tuple[str, ...]:
        """Say what is missing, as a run's last lines."""
        for text in self.missing:
            self(f"missing   {text}")
        return self.missing


def _at(steps: Sequence[int]) -> str:
    """The steps at which something failed, in a few words."""
    if len(steps) < 2:
        return "".join(f" of step {step}" for step in steps)
    few = ", ".join(map(str, steps)) if len(steps) <= 5 else f"{steps[0]} to {steps[-1]}, {len(steps)} of them"
    return f" of steps {few}"


class Log:
    """A listener that writes log.jsonl, a line a step; losses are fetched from the device in tens, or every 2 seconds.

    Args:
        names: of the pictures, to tell which ones a skipped step saw.
        losses: gets each step's, by its number.
        expected: digest of the file up to `resumed_at`, where one was kept.

    Its `board` draws the same curves in TensorBoard, where that is installed.
    """

    def __init__(
        self, file: Path, resumed_at: int, names: Sequence[str], show: Callable[[Step, float], None],
        say: Console, losses: dict[int, float], expected: str | None = None,
    ):  # fmt: skip
        self.file, self.names, self.show, self.say, self.board = file, names, show, say, None
        self.waiting, self.unwritten, self.losses, self.marks = [], "", losses, {}
        self.began = time.monotonic()
        damaged = lambda text: say(f"log       {text}")  # noqa: E731
        kept = [x for x in plots.read_log(file, damaged) if x["step"] <= resumed_at] if file.exists() else []
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if expected and hashlib.sha256(text.encode()).hexdigest() != expected:
            say(f"log       {file.name} was changed or damaged after it was saved: its curves may be wrong")
        with files.replacing(file) as partial:  # steps after the checkpoint are trained again
            partial.write_text(text)

    def __call__(self, step: Step) -> None:
        now = time.monotonic() - self.began
        if self.waiting and (len(self.waiting) == 10 or now - self.waiting[0][1] > 2):
            self.flush()  # not yet this one, to which others may still add marks
        self.waiting.append((step, now))

    def flush(self) -> None:
        """Bring what is waiting to the disk; where there is no room for it, it goes on waiting."""
        if self.waiting:
            losses = torch.stack([step.loss for step, _ in self.waiting]).tolist()
            finite = torch.stack([step.finite for step, _ in self.waiting]).tolist()
            for (step, seconds), value, fine in zip(self.waiting, losses, finite, strict=True):
                self.unwritten += json.dumps(self._line(step, seconds, value, fine)) + "\n"
            self.losses.update((step.number, value) for (step, _), value in zip(self.waiting, losses, strict=True))
            self.show(self.waiting[-1][0], losses[-1])
            self.waiting = []
        try:
            files.append(self.file, self.unwritten)
            self.unwritten = ""
            self.say.made(LAST_LINES)
        except OSError as error:
            self.say(f"log       not written: {error}. Training goes on")
            self.say.failed(LAST_LINES, error)
        self.draw(lambda board: board.flush())

    def _line(self, step: Step, seconds: float, loss: float, finite: bool) -> dict:
        line = {"step": step.number, "loss": round(loss, 6), "learning_rate": step.learning_rate}
        line |= {"epoch": step.epoch, "seconds": round(seconds, 3)} | self.marks.pop(step.number, {})
        if not finite:
            seen = line["skipped"] = sorted({self.names[i] for i in step.examples})
            self.say(f"skipped   step {step.number}: loss or gradients not finite; it saw {', '.join(seen)}")
        curves = {k: v for k, v in line.items() if isinstance(v, float) and k != "seconds"}
        self.draw(lambda board: board.figures(step.number, **curves))
        return line

    def draw(self, how: Callable[[board.Board], None]) -> None:
        """Draw on the board, where there is one and as long as its file can be written."""
        try:
            if self.board:
                how(self.board)
        except OSError as error:
            with suppress(OSError):
                self.board.close()
            self.board = None
            self.say(f"board     no more curves in TensorBoard: {error}. They are in log.jsonl")
            self.say.failed(ON_BOARD, error)

    def close(self) -> None:
        """Flush, and write no more."""
        self.flush()
        self.draw(lambda board: board.close())


class Keeper:
    """Saves a run so that it can be gone on from: the log first, then a checkpoint, then copies at the second place.

    Args:
        folder: of the run.
        settings: that decide its result, as `checkpoint.save` takes them.
        about: makes of a step what a checkpoint says of its LoRA.
        copier: to the second place, where there is one.
    """

    def __init__(
        self, folder: Path, state: State, settings: dict, config: Config, about: Callable[[int], dict], log: Log,
        copier: backup.Copier | None, say: Console,
    ):  # fmt: skip
        self.folder, self.checkpoints, self.state, self.settings = folder, folder / "checkpoints", state, settings
        self.config, self.about, self.log, self.copier, self.say = config, about, log, copier, say
        self.saved = state.step  # the newest on disk

    def __call__(self, regular: bool) -> None:
        """Save if that can be; else say why, and let training go on."""
        try:
            self.save(regular)
        except OSError as error:
            self.say(f"save      step {self.state.step} is not saved: {error}. Training goes on")
            if regular:
                self.say.failed("checkpoint", error, self.state.step)
        self.listen()

    def save(self, regular: bool) -> None:
        """Save the state as it is now. On a full disk the optimizer states of older checkpoints make room.

        Raises:
            OSError: no room all the same, or no right to write.
        """
        self.log.flush()
        step = self.state.step
        path, about = self.checkpoints / checkpoint.name(step), self.about(step)
        if self.log.file.is_file() and not self.log.unwritten:
            about["log"] = files.sha256(self.log.file)
        try:
            checkpoint.save(path, self.state, self.settings, regular=regular, about=about)
        except OSError as error:
            if error.errno not in files.FULL:
                raise
            self.tidy(1)
            checkpoint.save(path, self.state, self.settings, regular=regular, about=about)
        self.saved = step
        self.tidy(self.config.keep_states)
        if self.copier:
            self.copier.put(step, self.copies(step))

    def tidy(self, states: int) -> None:
        try:
            checkpoint.tidy(self.checkpoints, states, self.config.keep_checkpoints, self.spared())
        except OSError as error:
            self.say(f"save      older checkpoints stay as they are: {error}")

    def spared(self) -> Collection[int]:
        """The step of the best checkpoint so far, which is kept anyhow."""
        best, _ = best_checkpoint(self.folder)
        return [] if best is None else [checkpoint.step_of(best)]

    def copies(self, step: int) -> dict[str, backup.Source]:
        """What belongs at the second place now: regular checkpoints, the newest one, and the log up to it."""
        found = {}
        for path in checkpoint.paths(self.checkpoints):  # the newest first: it is what matters most
            try:
                own, whole, regular = checkpoint.kind(path)
            except (ValueError, OSError):  # damaged: told when it is asked for
                continue
            if regular or own == step:
                found[backup.names(own, whole, regular)] = path
        if self.log.file.is_file():
            found[backup.log_name(step)] = self.log.file.read_bytes()
        return found

    def listen(self) -> None:
        """Pass on what the copier has to say."""
        for text in self.copier.told() if self.copier else ():
            self.say(text)

    def stopped(self, error: BaseException | None = None) -> None:
        """Save where the loop was stopped, or an error has ended it, unless that state is on disk or is none.

        Raises:
            OSError: it cannot be saved; where there is an error already, that is told instead.
        """
        if self.state.step == self.saved or self.state.updating:
            return
        if error is None:
            self.save(False)
            return
        try:
            self.save(False)
            self.say(f"save      step {self.state.step} is saved, in spite of: {type(error).__name__}")
        except Exception as trouble:  # a broken device as well; the first error is the one to be seen
            self.say(f"save      step {self.state.step} is not saved: {trouble}")


def best_checkpoint(folder: Path) -> tuple[Path | None, evaluate.Advice | None]:
    """The saved checkpoint nearest to the lowest validation loss, and what the curve says; None where none was made."""
    file = folder / "log.jsonl"
    log = plots.read_log(file, lambda _: None) if file.exists() else []
    marks = [(line["step"], line["validation_loss"]) for line in log if "validation_loss" in line]
    saved = {checkpoint.step_of(path): path for path in checkpoint.paths(folder / "checkpoints")}
    if not marks or not saved:
        return None, None
    advice = evaluate.advise(*zip(*marks, strict=True))
    return saved[min(saved, key=lambda step: (abs(step - advice.best), -step))], advice


# ── Looking back ────────────────────────────────────────────────────────────────────────────────────────────────────


def thumbnail(samples: Path) -> dict[str, str]:
    """The first sample for the file's metadata, where there is one that can be read."""
    try:
        first = next(iter(sorted(samples.glob("*.png"))), None)
        if first is None:
            return {}
        with Image.open(first) as picture:
            return metadatas.thumbnail(picture)
    except Exception:  # a damaged PNG raises SyntaxError, too
        return {}


def is_run(path: Path) -> bool:
    """Whether it is a run's folder, by the files in it."""
    return (path / "config.json").is_file() or (path / "checkpoints").is_dir()


def runs_in(folder: Path) -> list[Path]:
    """The runs in a folder that is none itself and holds no LoRA, as a sweep's: rank=8 before rank=16."""
    numbers = lambda path: [  # noqa: E731
        (0, float(part), "") if re.fullmatch(r"[\d.]*\d", part) else (1, 0.0, part)
        for part in re.split(r"(\d+(?:\.\d+)?)", path.name)
    ]
    if not folder.is_dir() or is_run(folder) or any(folder.glob("*.safetensors")):
        return []
    return sorted((path for path in folder.iterdir() if path.is_dir() and is_run(path)), key=numbers)


def run_of(path: str | Path) -> Path | None:
    """The folder of the run that a checkpoint or a finished file lies in; None where it is none of a run."""
    path = Path(path).expanduser().absolute()
    of_checkpoint = path.parent.name == "checkpoints"
    folder = path.parents[1] if of_checkpoint else path.parent
    try:
        name = configs.load(folder / "config.json").name
    except (OSError, ValueError):
        return None
    return folder if of_checkpoint or path.name == f"{name}.safetensors" else None


def lora_of(source: str | Path, step: str | int = "newest") -> Lora:
    """The LoRA of a run, of one of its checkpoints, or of a file or folder that others made.

    Args:
        source: a run folder, a checkpoint, or what `lora.load` reads.
        step: of a run: "newest", "best" (by validation loss), or a number.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or none that can be read.
    """
    source = Path(source).expanduser().absolute()
    if is_run(source):
        source = _saved_at(source, step)
    if not source.is_file() or not checkpoint.is_one(source):
        lora = export.load(source)
        return replace(lora, metadata=metadatas.public(lora.metadata))
    lora = checkpoint.lora(checkpoint.read(source))
    return replace(lora, metadata=lora.metadata | thumbnail(source.parents[1] / "samples" / source.stem))


def _saved_at(folder: Path, step: str | int) -> Path:
    """A run's checkpoint of a step, "newest" or "best"."""
    saved = {checkpoint.step_of(path): path for path in checkpoint.paths(folder / "checkpoints")}
    if not saved:
        raise FileNotFoundError(f"{folder.name} has no checkpoint yet.")
    if step == "best":
        best, _ = best_checkpoint(folder)
        if best is None:
            raise ValueError(f"{folder.name} held no pictures out, so that no checkpoint is best. Give a step.")
        return best
    wanted = max(saved) if step == "newest" else int(step) if str(step).isdigit() else step
    if wanted not in saved:
        there = ", ".join(map(str, sorted(saved)))
        raise ValueError(f"{folder.name} has no checkpoint of step {step}. It has {there}.")
    return saved[wanted]


def describe(folder: str | Path) -> dict:
    """What a run folder is and how far it came, from its own files; what is damaged is said.

    Raises:
        FileNotFoundError: no run there.
    """
    folder, problems, config = Path(folder), [], None
    if not is_run(folder):
        raise FileNotFoundError(f"{folder} is no run folder: it holds neither config.json nor checkpoints.")
    try:
        config = configs.load(folder / "config.json")
    except (OSError, ValueError) as error:
        problems.append(f"config.json: {error}")
    checkpoints = []
    for path in reversed(checkpoint.paths(folder / "checkpoints")):
        try:
            found = checkpoint.read(path)
            checkpoints.append({"step": found.step, "file": path.name, "intact": True, "whole": found.whole})
        except (ValueError, OSError) as error:
            checkpoints.append({"file": path.name, "intact": False, "problem": str(error)})
    problems += [entry["problem"] for entry in checkpoints if not entry["intact"]]
    file = folder / "log.jsonl"
    log = plots.read_log(file, problems.append) if file.exists() else []
    losses = [line["loss"] for line in log if "loss" in line]
    lora = folder / f"{config.name}.safetensors" if config else None
    best, advice = best_checkpoint(folder)
    return {
        "kind": "run", "name": config.name if config else folder.name, "steps": log[-1]["step"] if log else 0,
        "loss": plots.smooth(losses)[-1] if losses else None,
        "checkpoints": checkpoints, "best": best.name if best else None,
        "advice": str(advice) if advice else None, "finished": lora.name if lora and lora.exists() else None,
        "problems": problems, "config": config.model_dump(mode="json") if config else None,
    }  # fmt: skip
