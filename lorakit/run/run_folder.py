"""A run's folder: recognise, describe and read it."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from PIL import Image

from lorakit import adapter as adapters
from lorakit import config as configs
from lorakit import plots, train
from lorakit.adapter import Lora
from lorakit.run import checkpoint


def read_log(path: str | Path, warn: Callable[[str], None] | None = None) -> list[dict]:
    """The lines of a run's `log.jsonl`. A last line that a crash tore is left out.

    Args:
        warn: told of other damaged lines, which are then left out as well.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another line is not a log's.
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


def best_checkpoint(folder: Path) -> tuple[Path | None, train.Advice | None]:
    """The saved checkpoint nearest to the lowest validation loss, and what the curve says; None where none was made."""
    file = folder / "log.jsonl"
    log = read_log(file, lambda _: None) if file.exists() else []
    marks = [(line["step"], line["validation_loss"]) for line in log if "validation_loss" in line]
    saved = {checkpoint.step_of(path): path for path in checkpoint.checkpoint_paths(folder / "checkpoints")}
    if not marks or not saved:
        return None, None
    advice = train.advise(*zip(*marks, strict=True))
    return saved[min(saved, key=lambda step: (abs(step - advice.best), -step))], advice


# ── Looking back ────────────────────────────────────────────────────────────────────────────────────────────────────


def thumbnail(samples: Path) -> dict[str, str]:
    """The first sample for the file's metadata, where there is one that can be read."""
    try:
        first = next(iter(sorted(samples.glob("*.png"))), None)
        if first is None:
            return {}
        with Image.open(first) as picture:
            return adapters.thumbnail(picture)
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
        lora = adapters.load(source)
        return replace(lora, metadata=adapters.public_metadata(lora.metadata))
    lora = checkpoint.lora(checkpoint.read(source))
    return replace(lora, metadata=lora.metadata | thumbnail(source.parents[1] / "samples" / source.stem))


def _saved_at(folder: Path, step: str | int) -> Path:
    """A run's checkpoint of a step, "newest" or "best"."""
    saved = {checkpoint.step_of(path): path for path in checkpoint.checkpoint_paths(folder / "checkpoints")}
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


def describe_run(folder: str | Path) -> dict:
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
    for path in reversed(checkpoint.checkpoint_paths(folder / "checkpoints")):
        try:
            found = checkpoint.read(path)
            checkpoints.append({"step": found.step, "file": path.name, "intact": True, "whole": found.whole})
        except (ValueError, OSError) as error:
            checkpoints.append({"file": path.name, "intact": False, "problem": str(error)})
    problems += [entry["problem"] for entry in checkpoints if not entry["intact"]]
    file = folder / "log.jsonl"
    log = read_log(file, problems.append) if file.exists() else []
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
