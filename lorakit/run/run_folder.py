"""A run's folder: where its files are, and what is in them."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from PIL import Image

from lorakit import adapter as adapters
from lorakit import config as configs
from lorakit import plots, storage, train
from lorakit.adapter import Lora
from lorakit.config import Config
from lorakit.run import checkpoint


def read_log(path: str | Path, warn: Callable[[str], None] | None = None) -> list[dict]:
    """The lines of a run's `log.jsonl`, without a last line that a crash cut off.

    Args:
        warn: called with a message for each other damaged line, which is then left out too.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is damaged, and there is no `warn`.
    """
    path, lines = Path(path), []
    if not path.is_file():
        raise FileNotFoundError(f"There is no log {path}. A run writes log.jsonl into its folder as it goes.")
    texts = path.read_bytes().rstrip().split(b"\n")
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        figures = [line.get(key, 0) for key in ("step", "loss", "validation_loss")] if isinstance(line, dict) else [""]
        if "step" in (line or ()) and all(isinstance(figure, int | float) for figure in figures):
            lines.append(line)
        elif number < len(texts):
            if warn is None:
                shown = text[:40].decode(errors="replace")
                raise ValueError(f"Line {number} of {path} is not a log's: {shown!r}. Remove it, or give a run's log.")
            warn(f"line {number} of {path.name} is damaged and left out")
    return lines


class RunFolder:
    """The files of a run.

    Attributes:
        cache: encoded pictures and texts.
        stop_file: a file that stops the run when somebody makes it.
        comparison: pictures of the base and of the LoRA at several strengths.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().absolute()
        self.name = self.path.name
        self.config_file, self.log_file = self.path / "config.json", self.path / "log.jsonl"
        self.checkpoints, self.cache = self.path / "checkpoints", self.path / "cache"
        self.tensorboard, self.stop_file = self.path / "tensorboard", self.path / "STOP"
        self.loss_figure, self.comparison = self.path / "loss.png", self.path / "comparison.png"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / checkpoint.name(step)

    def samples(self, step: int) -> Path:
        return self.path / "samples" / f"step-{step:06d}"

    def lora_file(self, config: Config) -> Path:
        """The finished file."""
        return self.path / f"{config.name}.safetensors"

    # ── What is in it ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def is_run(self) -> bool:
        """Whether the folder holds a run."""
        return self.config_file.is_file() or self.checkpoints.is_dir()

    def make(self) -> None:
        """Make the folder, or check that it is empty or a run's.

        Raises:
            ValueError: the folder holds something else.
            OSError: it cannot be made or written.
        """
        early = {"cache", "log.jsonl", "STOP"}  # written before config.json
        try:
            if self.path.exists() and not self.path.is_dir():
                raise ValueError(f"{self.path} is a file. Name a folder for the run.")
            names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
            foreign = {name for name in names if not name.startswith(".")} - early
            if foreign and not {"config.json", "checkpoints"} & foreign:
                raise ValueError(f"{self.path} holds other files and no run. Name a new or empty folder.")
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror.lower() if error.strerror else error
            raise OSError(
                error.errno, f"the run folder {self.name} cannot be made: {reason}. Choose another"
            ) from error

    def write_config(self, config: Config) -> None:
        with storage.write_file(self.config_file) as partial:
            partial.write_text(config.to_json(), encoding="utf-8")

    def log(self, warn: Callable[[str], None] = lambda _: None) -> list[dict]:
        """The lines of log.jsonl; none when there is no file."""
        return read_log(self.log_file, warn) if self.log_file.exists() else []

    def saved(self) -> dict[int, Path]:
        """Step → checkpoint, by the files' names."""
        return {checkpoint.step_of(path): path for path in checkpoint.checkpoint_paths(self.checkpoints)}

    def best(self) -> tuple[Path | None, train.Advice | None]:
        """The checkpoint nearest to the lowest validation loss, and what the curve advises; None without validation."""
        marks = [(line["step"], line["validation_loss"]) for line in self.log() if "validation_loss" in line]
        saved = self.saved()
        if not marks or not saved:
            return None, None
        advice = train.advise(*zip(*marks, strict=True))
        best = advice.best or 0  # with marks there is one
        return saved[min(saved, key=lambda step: (abs(step - best), -step))], advice

    def checkpoint_at(self, step: str | int) -> Path:
        """The checkpoint of a step, "newest" or "best" (by validation loss).

        Raises:
            FileNotFoundError, ValueError: there is none.
        """
        saved = self.saved()
        if not saved:
            raise FileNotFoundError(f"{self.name} has no checkpoint yet.")
        if step == "best":
            best, _ = self.best()
            if best is None:
                raise ValueError(f"{self.name} held out no pictures, so that no checkpoint is best. Give a step.")
            return best
        number = max(saved) if step == "newest" else int(step) if str(step).isdigit() else None
        if number not in saved:
            steps = ", ".join(map(str, sorted(saved)))
            raise ValueError(f"{self.name} has no checkpoint of step {step}. It has {steps}.")
        return saved[number]

    def describe(self) -> dict:
        """The state of the run, as plain values: how far it came, its checkpoints, loss, advice and problems.

        Raises:
            FileNotFoundError: no run there.
        """
        if not self.is_run:
            raise FileNotFoundError(f"{self.path} is no run folder: it holds neither config.json nor checkpoints.")
        problems: list[str] = []
        config = None
        try:
            config = configs.load(self.config_file)
        except (OSError, ValueError) as error:
            problems.append(f"config.json: {error}")
        checkpoints = []
        for path in reversed(self.saved().values()):
            try:
                file = checkpoint.read(path)
                checkpoints.append({"step": file.step, "file": path.name, "intact": True, "whole": file.whole})
            except (ValueError, OSError) as error:
                checkpoints.append({"file": path.name, "intact": False, "problem": str(error)})
                problems.append(str(error))
        log = self.log(problems.append)
        losses = [line["loss"] for line in log if "loss" in line]
        best, advice = self.best()
        return {
            "kind": "run", "name": config.name if config else self.name, "steps": log[-1]["step"] if log else 0,
            "loss": plots.smooth(losses)[-1] if losses else None,
            "checkpoints": checkpoints, "best": best.name if best else None,
            "advice": str(advice) if advice else None,
            "finished": self.lora_file(config).name if config and self.lora_file(config).exists() else None,
            "problems": problems, "config": config.model_dump(mode="json") if config else None,
        }  # fmt: skip


def is_run(path: str | Path) -> bool:
    """Whether a path is a run's folder."""
    return RunFolder(path).is_run


def runs_in(folder: Path) -> list[Path]:
    """The runs in a folder such as a sweep's, rank=8 before rank=16; none when it is a run or holds a LoRA itself."""
    numbers = lambda path: [  # noqa: E731
        (0, float(part), "") if re.fullmatch(r"[\d.]*\d", part) else (1, 0.0, part)
        for part in re.split(r"(\d+(?:\.\d+)?)", path.name)
    ]
    if not folder.is_dir() or is_run(folder) or any(folder.glob("*.safetensors")):
        return []
    return sorted((path for path in folder.iterdir() if path.is_dir() and is_run(path)), key=numbers)


def run_of(path: str | Path) -> Path | None:
    """The folder of the run that a checkpoint or a finished file belongs to; None when it belongs to none."""
    path = Path(path).expanduser().absolute()
    of_checkpoint = path.parent.name == "checkpoints"
    folder = path.parents[1] if of_checkpoint else path.parent
    try:
        name = configs.load(folder / "config.json").name
    except (OSError, ValueError):
        return None
    return folder if of_checkpoint or path.name == f"{name}.safetensors" else None


def lora_of(source: str | Path, step: str | int = "newest") -> Lora:
    """The LoRA of a run, of one of its checkpoints, or of a LoRA file or folder of another program.

    Args:
        step: of a run: "newest", "best" (by validation loss), or a number.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or none that can be read.
    """
    source = Path(source).expanduser().absolute()
    if is_run(source):
        source = RunFolder(source).checkpoint_at(step)
    if not source.is_file() or not checkpoint.is_one(source):
        lora = adapters.load(source)
        return replace(lora, metadata=adapters.public_metadata(lora.metadata))
    lora = checkpoint.lora(checkpoint.read(source))
    return replace(lora, metadata=lora.metadata | thumbnail(source.parents[1] / "samples" / source.stem))


def thumbnail(samples: Path) -> dict[str, str]:
    """The first sample picture as metadata of a LoRA file; {} when none can be read."""
    for first in sorted(samples.glob("*.png"))[:1]:
        with suppress(Exception), Image.open(first) as picture:  # a damaged PNG raises SyntaxError, too
            return adapters.thumbnail(picture)
    return {}
