"""What a comparison is made of: a run's checkpoints or LoRA files beside each other, alone or together with others."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorakit import base as bases
from lorakit import config as configs
from lorakit import run as running
from lorakit.base import Base
from lorakit.config import HUB_BASES, Config

DEMO = "lorakit/demo"  # what the embedded base is called in files


@dataclass(frozen=True)
class Candidates:
    """LoRAs to choose from."""

    paths: dict[str, Path]  # label → checkpoint, file or folder, as `record.lora_of` reads it
    best: str | None = None  # the label of the checkpoint with the lowest validation loss
    config: Config | None = field(default=None, repr=False)  # of the run that they are of
    problems: tuple[str, ...] = ()  # what cannot be read

    @property
    def first(self) -> list[str]:
        """Two to begin with: the best and the last, or one in the middle beside what is both."""
        labels = list(self.paths)
        chosen = {self.best or labels[-1], labels[-1]}
        chosen |= {labels[(len(labels) - 1) // 2]} if len(chosen) == 1 else set()
        return [label for label in labels if label in chosen]


def newest(runs: Path) -> Path | None:
    """The run that saved last, among those in a folder; None where none has a checkpoint."""
    saved = runs.glob("*/checkpoints/step-*.safetensors")
    return max(((path.stat().st_mtime, path.parents[1]) for path in saved), default=(0, None))[1]


def find_candidates(sources: str | Path | Sequence[str | Path]) -> Candidates:
    """What can be compared: a run's checkpoints, oldest first, or LoRA files; by headers, nothing is verified yet.

    Args:
        sources: a run's folder, or a sweep's; a LoRA file, or a folder of them; or several of all these.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: nothing in it that could be used; says what is wrong.
    """
    given = [Path(source).expanduser() for source in ([sources] if isinstance(sources, str | Path) else sources)]
    sources = [inner for source in given for inner in running.runs_in(source) or [source]]
    found, problems, config, best = [], [], None, None
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"There is no {source}. Give a run's folder, or LoRA files.")
        if running.is_run(source):
            own = _config(source, problems)
            config = config or own
            whole = _checkpoints(source, problems)
            if not whole and own and (file := source / f"{own.name}.safetensors").is_file():
                whole = [(own.name, file)]
            found += [(f"{source.name} {label}" if len(sources) > 1 else label, path) for label, path in whole]
            nearest = running.best_checkpoint(source)[0] if len(sources) == 1 else None
            best = next((label for label, path in whole if path == nearest), None)
        elif source.is_dir() and (inside := sorted(source.glob("*.safetensors"))):
            found += [(path.stem, path) for path in inside if path.name != "adapter_model.safetensors"] or [
                (source.name, source)
            ]
        elif source.is_dir() and not any(source.glob("*/*.safetensors")):  # PEFT's has a folder for each model
            problems.append(f"{source.name} holds neither a run nor a .safetensors file.")
        else:
            found.append((source.name.removesuffix(".safetensors"), source))
            run = running.run_of(source) if len(sources) == 1 else None
            config = config or (run and _config(run, problems))
    paths = _labelled(found)
    if not paths:
        names = ", ".join(source.name for source in sources) or "Nothing"
        why = " ".join(problems) or "A run saves one every `save_every` steps, and when it is stopped."
        raise ValueError(f"{names} has no checkpoint to compare yet. {why}")
    return Candidates(paths, best, config, tuple(problems))


def _labelled(found: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    """Labels that tell them apart: those that are alike with the folder that their run or file lies in, or a number."""
    labels = [label for label, _ in found]
    long = [f"{_place(label, path)}/{label}" if labels.count(label) > 1 else label for label, path in found]
    numbered = [f"{own} ({long[:i].count(own) + 1})" if long.count(own) > 1 else own for i, own in enumerate(long)]
    return {label: path for label, (_, path) in zip(numbered, found, strict=True)}


def _place(label: str, path: Path) -> str:
    """The folder of a file or of a checkpoint's run; where the label says the run already, that which the run is in."""
    folder = path.absolute().parents[path.parent.name == "checkpoints"]
    return (folder.parent if label.startswith(f"{folder.name} ") else folder).name


def _config(folder: Path, problems: list[str]) -> Config | None:
    try:
        return configs.load(folder / "config.json")
    except (OSError, ValueError) as error:
        problems.append(f"config.json: {error}")
        return None


def _checkpoints(folder: Path, problems: list[str]) -> list[tuple[str, Path]]:
    found = []
    for path in reversed(running.checkpoint_paths(folder / "checkpoints")):
        try:
            found.append((f"step {running.checkpoint_kind(path)[0]}", path))
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return found


def starting_point(found: Candidates) -> tuple[str, list[str]]:
    """What to begin with, from a run's settings or what files say: the base, as `base.open` takes it, and prompts."""
    if config := found.config:
        return config.base, list(config.sample_prompts[:2]) or [config.trigger]
    for path in found.paths.values():
        try:
            lora = running.lora_of(path)
        except (OSError, ValueError, FloatingPointError):
            continue
        demo = lora.metadata.get("ss_sd_model_name") == DEMO
        return "demo" if demo else HUB_BASES.get(lora.family, ""), [lora.metadata.get("modelspec.trigger_phrase", "")]
    return "", []


def open_for(reference: str, config: Config | None) -> Base:
    """A base as `base.open` gives it; what a run's settings say of its base holds for that one alone."""
    own = config and Path(reference).expanduser().resolve() == Path(config.base).expanduser().resolve()
    return bases.open(reference, *((config.prediction_type, config.zero_terminal_snr) if own else ()))
