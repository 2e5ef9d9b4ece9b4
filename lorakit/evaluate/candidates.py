"""Find the LoRAs to compare: a run's checkpoints, several runs', or files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorakit import base as bases
from lorakit import config as configs
from lorakit import named
from lorakit import run as running
from lorakit.base import Base
from lorakit.config import Config

DEMO = "lorakit/demo"  # the embedded base's name in files


@dataclass(frozen=True)
class Candidates:
    """LoRAs to choose from."""

    paths: dict[str, Path]  # label → checkpoint, file or folder, as `run.lora_of` reads it
    best: str | None = None  # the label of the checkpoint with the lowest validation loss
    config: Config | None = field(default=None, repr=False)  # of the run that they belong to
    problems: tuple[str, ...] = ()  # a message for each thing that cannot be read

    @property
    def first(self) -> list[str]:
        """Two labels to begin with: the best and the last; where these are one, also one from the middle."""
        labels = list(self.paths)
        chosen = {self.best or labels[-1], labels[-1]}
        chosen |= {labels[(len(labels) - 1) // 2]} if len(chosen) == 1 else set()
        return [label for label in labels if label in chosen]


def newest(runs: Path) -> Path | None:
    """The run in a folder of runs that saved a checkpoint last; None where none has one."""
    saved = runs.glob("*/checkpoints/step-*.safetensors")
    return max(((path.stat().st_mtime, path.parents[1]) for path in saved), default=(0, None))[1]


def find_candidates(sources: str | Path | Sequence[str | Path]) -> Candidates:
    """List what can be compared: a run's checkpoints, oldest first, or LoRA files. Only headers are read.

    Args:
        sources: a run's folder, a sweep's, a LoRA file, a folder of them, or several of these.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: nothing usable in it; the message says why.
    """
    given = [Path(source).expanduser() for source in ([sources] if isinstance(sources, str | Path) else sources)]
    places = [inner for source in given for inner in running.runs_in(source) or [source]]
    labelled: list[tuple[str, Path]] = []
    problems: list[str] = []
    config, best, single = None, None, len(places) == 1
    for source in places:
        if not source.exists():
            raise FileNotFoundError(f"There is no {source}. Give a run's folder, or LoRA files.")
        if running.is_run(source):
            settings = read_config(source, problems)
            config = config or settings
            saved = _checkpoints(source, problems)
            if not saved and settings and (file := source / f"{settings.name}.safetensors").is_file():
                saved = [(settings.name, file)]
            labelled += [(label if single else f"{source.name} {label}", path) for label, path in saved]
            nearest = running.RunFolder(source).best()[0] if single else None
            best = next((label for label, path in saved if nearest and path.name == nearest.name), None)
        elif source.is_dir() and (files := sorted(source.glob("*.safetensors"))):
            named = [(path.stem, path) for path in files if path.name != "adapter_model.safetensors"]
            labelled += named or [(source.name, source)]
        elif source.is_dir() and not any(source.glob("*/*.safetensors")):  # PEFT has a folder for each model
            problems.append(f"{source.name} contains neither a run nor a .safetensors file.")
        else:
            labelled.append((source.name.removesuffix(".safetensors"), source))
            run = running.run_of(source) if single else None
            config = config or (read_config(run, problems) if run else None)
    if not labelled:
        names = ", ".join(source.name for source in places) or "Nothing"
        why = " ".join(problems) or "A run saves one every `save_every` steps, and when it is stopped."
        raise ValueError(f"{names} has no checkpoint to compare yet. {why}")
    labels = distinct([label for label, _ in labelled], [_place(label, path) for label, path in labelled])
    paths = {label: path for label, (_, path) in zip(labels, labelled, strict=True)}
    return Candidates(paths, best, config, tuple(problems))


def distinct(names: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Names that differ: each that occurs twice gets its folder in front and, if that is not enough, a number."""
    long = [f"{where}/{name}" if names.count(name) > 1 else name for name, where in zip(names, folders, strict=True)]
    return [f"{name} ({long[:i].count(name) + 1})" if long.count(name) > 1 else name for i, name in enumerate(long)]


def _place(label: str, path: Path) -> str:
    """The folder of a file or of a checkpoint's run; where the label names the run, the folder around it."""
    folder = path.absolute().parents[path.parent.name == "checkpoints"]
    return (folder.parent if label.startswith(f"{folder.name} ") else folder).name


def read_config(folder: Path, problems: list[str]) -> Config | None:
    """The settings of a run; None where they cannot be read, with the reason added to `problems`."""
    try:
        return configs.load(folder / "config.json")
    except (OSError, ValueError) as error:
        problems.append(f"config.json: {error}")
        return None


def _checkpoints(folder: Path, problems: list[str]) -> list[tuple[str, Path]]:
    labelled = []
    for path in reversed(running.checkpoint_paths(folder / "checkpoints")):
        try:
            labelled.append((f"step {running.checkpoint_facts(path)['step']}", path))
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return labelled


def starting_point(candidates: Candidates) -> tuple[str, list[str]]:
    """The base, as `base.open` takes it, and prompts to begin with, from a run's settings or the files' metadata."""
    if config := candidates.config:
        return config.base, list(config.sample_prompts[:2]) or [config.trigger]
    for path in candidates.paths.values():
        try:
            lora = running.lora_of(path)
        except (OSError, ValueError, FloatingPointError):
            continue
        demo = lora.metadata.get("ss_sd_model_name") == DEMO
        base = "demo" if demo else named.OF_FAMILY[lora.family].reference if lora.family else ""
        return base, [lora.metadata.get("modelspec.trigger_phrase", "")]
    return "", []


def open_for(reference: str, config: Config | None) -> Base:
    """Open a base; a run's settings of prediction type and SNR are used only for the run's own base."""
    same = config and Path(reference).expanduser().resolve() == Path(config.base).expanduser().resolve()
    return bases.open(reference, *((config.prediction_type, config.zero_terminal_snr) if config and same else ()))
