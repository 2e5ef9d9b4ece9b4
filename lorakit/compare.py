"""What a comparison is made of: a run's checkpoints or LoRA files beside each other, alone or together with others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorakit import adapter as adapters
from lorakit import backup, checkpoint, export, files, merge, record, sample
from lorakit import base as bases
from lorakit import config as configs
from lorakit.base import Base
from lorakit.config import HUB_BASES, Config
from lorakit.lora import FAMILIES, Lora

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


def candidates(sources: str | Path | Sequence[str | Path]) -> Candidates:
    """What can be compared: a run's checkpoints, oldest first, or LoRA files; by headers, nothing is verified yet.

    Args:
        sources: a run's folder, or a sweep's; a LoRA file, or a folder of them; or several of all these.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: nothing in it that could be used; says what is wrong.
    """
    given = [Path(source).expanduser() for source in ([sources] if isinstance(sources, str | Path) else sources)]
    sources = [inner for source in given for inner in record.runs_in(source) or [source]]
    found, problems, config, best = [], [], None, None
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"There is no {source}. Give a run's folder, or LoRA files.")
        if record.is_run(source):
            own = _config(source, problems)
            config = config or own
            whole = _checkpoints(source, problems)
            if not whole and own and (file := source / f"{own.name}.safetensors").is_file():
                whole = [(own.name, file)]
            found += [(f"{source.name} {label}" if len(sources) > 1 else label, path) for label, path in whole]
            nearest = record.best_checkpoint(source)[0] if len(sources) == 1 else None
            best = next((label for label, path in whole if path == nearest), None)
        elif source.is_dir() and (inside := sorted(source.glob("*.safetensors"))):
            found += [(path.stem, path) for path in inside if path.name != "adapter_model.safetensors"] or [
                (source.name, source)
            ]
        elif source.is_dir() and not any(source.glob("*/*.safetensors")):  # PEFT's has a folder for each model
            problems.append(f"{source.name} holds neither a run nor a .safetensors file.")
        else:
            found.append((source.name.removesuffix(".safetensors"), source))
            run = record.run_of(source) if len(sources) == 1 else None
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
    for path in reversed(checkpoint.paths(folder / "checkpoints")):
        try:
            found.append((f"step {checkpoint.kind(path)[0]}", path))
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return found


def beginning(found: Candidates) -> tuple[str, list[str]]:
    """What to begin with, from a run's settings or what files say: the base, as `base.open` takes it, and prompts."""
    if config := found.config:
        return config.base, list(config.sample_prompts[:2]) or [config.trigger]
    for path in found.paths.values():
        try:
            lora = record.lora_of(path)
        except (OSError, ValueError, FloatingPointError):
            continue
        demo = lora.metadata.get("ss_sd_model_name") == DEMO
        return "demo" if demo else HUB_BASES.get(lora.family, ""), [lora.metadata.get("modelspec.trigger_phrase", "")]
    return "", []


def opened(reference: str, config: Config | None) -> Base:
    """A base as `base.open` gives it; what a run's settings say of its base holds for that one alone."""
    own = config and Path(reference).expanduser().resolve() == Path(config.base).expanduser().resolve()
    return bases.open(reference, *((config.prediction_type, config.zero_terminal_snr) if own else ()))


Column = tuple[str | None, float]  # which candidate, None at strength 0; its strength


def columns(labels: Sequence[str], strengths: Sequence[float]) -> list[Column]:
    """What is to be made of each prompt: every candidate at every strength, and strength 0 once for all of them."""
    bare = [(None, 0.0)] if 0 in strengths else []
    return bare + [(label, value) for label in labels for value in dict.fromkeys(strengths) if value]


def variants(
    base: Base, wanted: Sequence[Column], paths: Mapping[str, Path], others: Sequence[tuple[Path, float]] = (),
    tell: Callable[[str], None] = print,
) -> dict[Column, sample.Variant]:  # fmt: skip
    """Columns as `sample.stream` makes them. One LoRA at a time is in memory: each is read again when it is its turn.

    Args:
        paths: of the candidates.
        others: LoRAs that are used together with each candidate, at strengths of their own; at strength 0 they alone.
        tell: told of candidates that cannot be used here; they are left out.

    Raises:
        ValueError, OSError: one of the others cannot be used.
    """
    found: dict[Column, sample.Variant] = {}
    for path, _ in others:
        _fitting(record.lora_of(path), base)
    known: Known = {}
    unfit: set[str] = set()
    for label, strength in wanted:
        if label in unfit:
            continue
        own = [] if label is None else [(paths[label], strength)]
        try:
            found[label, strength] = variant(base, [*own, *others], known)
        except (ValueError, OSError, FloatingPointError) as error:
            unfit.add(label)
            tell(str(error))
    return found


Known = dict[object, tuple[sample.Attach, tuple[str, ...]]]


def variant(base: Base, parts: Sequence[tuple[str | Path, float]], known: Known | None = None) -> sample.Variant:
    """The base with LoRAs of any kind in it, each at its strength; the bare base where all strengths are 0.

    Args:
        parts: what `record.lora_of` reads, and its strength.
        known: adapters that were made before, to which this one is added: one LoRA alone has the same at any strength.

    Raises:
        ValueError, OSError, FloatingPointError: one cannot be read, or is for another family.
    """
    parts, known = tuple((path, strength) for path, strength in parts if strength), {} if known is None else known
    if not parts:
        return sample.Variant()
    (first, factor), *more = parts
    key = parts if more else first
    if key not in known:
        adapts = {which for path, _ in parts for which in _fitting(record.lora_of(path), base).adapts}

        def attach(models: adapters.Models) -> adapters.Adapter:
            if not more:
                return export.inject(models, base, record.lora_of(first))
            return _together(models, base, [(record.lora_of(path), strength) for path, strength in parts])

        known[key] = attach, tuple(sorted(adapts))
    return sample.Variant(*known[key], 1.0 if more else factor)


def _together(models: adapters.Models, base: Base, parts: Sequence[tuple[Lora, float]]) -> adapters.Adapter:
    """Put several LoRAs into models (in place). All that are plain make one, which costs no more than one."""
    kinds = [{adapters.algorithm(own) for own in lora.parts.values()} for lora, _ in parts]
    plain = [part for part, kind in zip(parts, kinds, strict=True) if kind == {"lora"}]
    others = [part for part, kind in zip(parts, kinds, strict=True) if kind != {"lora"}]
    if plain:
        others.insert(0, (merge.merge(*zip(*plain, strict=True)).lora, 1.0))
    found = []
    for lora, value in others:
        own = {which: model for which, model in models.items() if which in lora.adapts}
        if own:
            adapter = export.inject(own, base, lora)
            adapters.eject(own)
            adapters.use(adapter, value)
            found.append(adapter)
    return adapters.stack(models, found)


def _fitting(lora: Lora, base: Base) -> Lora:
    if lora.family not in (None, base.family):
        raise ValueError(
            f"{lora.name} is an {FAMILIES[lora.family]} LoRA, the base {base.name} is {FAMILIES[base.family]}: "
            "the two do not go together."
        )
    return lora


def copy(path: Path, folder: Path) -> list[Path]:
    """Copy a file, or a folder of files, to another place, read it back there and compare. Nothing is replaced.

    Returns:
        The copies; those that were there already, with the same contents, among them.

    Raises:
        FileExistsError: another file has the name there.
        OSError: it cannot be written there, or did not arrive as it was sent.
    """
    place = backup.Folder(folder)
    names = {path: path.name} if path.is_file() else {
        file: file.relative_to(path.parent).as_posix() for file in sorted(path.rglob("*")) if file.is_file()
    }  # fmt: skip
    for file, name in names.items():
        there = folder / name
        if not there.exists():
            place.put(file, name)
        elif files.sha256(there) != files.sha256(file):
            raise FileExistsError(f"{name} is there already with other contents. Export under another name.")
    return [folder / name for name in names.values()]
