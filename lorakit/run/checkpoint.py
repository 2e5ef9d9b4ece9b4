"""Save, verify and resume a run.

A checkpoint is one safetensors file: adapter, optimizer and scaler state, the average of the weights where one is kept,
with the settings and a digest in its JSON metadata. Nothing is pickled, nothing is half-written, and a file whose
digest does not hold is never resumed from. The newest few are kept whole; older ones are thinned to their weights.
"""

import errno
import json
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorakit import storage, train
from lorakit.adapter import Lora
from lorakit.storage import digest_tensors, own_memory
from lorakit.train import State, Step

FORMAT = "lorakit checkpoint 3"
WRITTEN = {"step", "settings", "plain", "whole", "regular", "clean", "about"}
AWAY = (errno.EIO, errno.EACCES, errno.EPERM, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESTALE, errno.EMFILE)
SHAPING = (  # settings that decide what weights there are, and what they mean
    "algorithm", "rank", "alpha", "rank_stabilized", "targets", "conv_rank", "conv_alpha", "block_ranks", "lokr_factor",
    "train_unet",
)  # fmt: skip
TEXT_RATES = ("text_encoder_rate", "text_encoder_2_rate")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    path: Path
    step: int
    settings: dict  # of the run that wrote it
    tensors: dict[str, Tensor]
    plain: dict  # optimizer and scaler values that are no tensors
    whole: bool = True  # False: its weights alone, to sample and export, not to go on from
    regular: bool = True  # False: saved between the run's regular ones, because time had passed or it was stopped
    clean: bool = True  # no step was skipped shortly before
    about: dict | None = None  # of the LoRA: family, algorithm, alphas and metadata; and what the run came from


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of an optimizer's state: bitsandbytes keeps a dictionary within the dictionary."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# ── Writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def save(path: Path, state: State, settings: dict, *, regular: bool = True, about: dict | None = None) -> Path:
    """Write a run's state.

    Args:
        settings: the run's config as plain values, kept to compare when resuming.
        regular: whether it is one of those to be kept.
        about: the LoRA's "family" and "metadata", so that it can be exported without the base.

    Raises:
        OSError: no room or no right to write; no file is left then.
    """
    weights = state.adapter.state()
    tensors = {f"adapter.{name}": weight.detach() for name, weight in weights.items()} | {"skipped": state.skipped}
    if state.ema or hasattr(state.optimizer, "eval"):  # what is judged and exported differs from what is trained
        with state.evaluated():
            tensors |= {f"average.{name}": weight.detach().clone() for name, weight in weights.items()}
    plain = {"scaler": state.scaler.state_dict(), "rate_factor": state.rate_factor, "optimizer": {}}
    plain["asked_factor"] = state.asked_factor
    # Some optimizers keep figures of their own with the groups: Prodigy's rate, the schedule-free average's weight.
    plain["groups"] = [
        {k: v for k, v in group.items() if isinstance(v, int | float)} for group in state.optimizer.param_groups
    ]
    for index, values in state.optimizer.state_dict()["state"].items():
        for key, value in _flat(values):
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value.detach()
            else:
                plain["optimizer"][f"{index}.{key}"] = value
    lora = {"algorithm": state.adapter.algorithm, "alphas": state.adapter.alphas}
    clean = not bool(state.skipped.any())
    return _write(Checkpoint(path, state.step, settings, tensors, plain, True, regular, clean, lora | (about or {})))


def _write(checkpoint: Checkpoint) -> Path:
    facts = {name: value for name, value in vars(checkpoint).items() if name not in ("path", "tensors")}
    facts["format"] = FORMAT
    tensors = own_memory(checkpoint.tensors)
    metadata = {"lorakit": json.dumps(facts, sort_keys=True), "digest": digest_tensors(tensors, facts)}
    with storage.write_file(checkpoint.path, sum(tensor.nbytes for tensor in tensors.values())) as partial:
        save_file(tensors, partial, metadata)
    return checkpoint.path


def thin(checkpoint: Checkpoint) -> Path:
    """Leave of a checkpoint's file the weights to sample and export, about a third of it."""
    averages = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("average.")}
    weights = averages or {k: v for k, v in checkpoint.tensors.items() if k.startswith("adapter.")}
    return _write(replace(checkpoint, tensors=weights, plain={}, whole=False))


def sizes(adapter: int, optimizer: int, averaged: bool) -> tuple[int, int]:
    """Bytes of a whole checkpoint and of a thinned one, names and metadata not counted.

    Args:
        adapter, optimizer: bytes of the weights and of the optimizer's state.
        averaged: whether an average of the weights is kept.
    """
    return adapter * (1 + averaged) + optimizer, adapter


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def read(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        ValueError: not a checkpoint, damaged, or its digest does not hold.
        OSError: the drive does not answer, or may not be read.
    """
    facts, expected = _facts(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not mapped
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    if digest_tensors(tensors, facts) != expected:
        raise _unreadable(path, "its digest does not match its contents")
    return Checkpoint(path, tensors=tensors, **{key: value for key, value in facts.items() if key != "format"})


def is_one(path: Path) -> bool:
    """Whether a file says that it is a checkpoint: not verified."""
    try:
        with safe_open(path, "pt") as file:
            return "lorakit" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def checkpoint_facts(path: Path) -> dict:
    """What a checkpoint says of itself: its step, the settings that decide it, what it is a LoRA of. Not verified.

    Raises:
        ValueError, OSError: as `read`.
    """
    return _facts(path)[0]


def _facts(path: Path) -> tuple[dict, str | None]:
    """What a checkpoint says of itself, and its digest: not verified.

    Raises:
        ValueError: not a checkpoint, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        facts = json.loads(metadata["lorakit"]) if "lorakit" in metadata else None
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if facts is None:
        raise ValueError(f"{path.name} is no checkpoint of lorakit's: it has no record of a run in its metadata.")
    if not isinstance(facts, dict):
        raise _unreadable(path, "its record of the run is none")
    if facts.get("format") != FORMAT:
        raise ValueError(f"{path.name} was written as {facts.get('format')!r}; this lorakit reads {FORMAT!r}.")
    if missing := WRITTEN - facts.keys():
        raise _unreadable(path, f"its record of the run lacks {', '.join(sorted(missing))}")
    return facts, metadata.get("digest")


def _unreadable(path: Path, why: Exception | str) -> Exception:
    """What to raise: a drive that does not answer now says nothing of the file, and going on without it would."""
    if isinstance(why, OSError) and why.errno in AWAY:
        return OSError(why.errno, f"{path.name} cannot be read now ({why.strerror}). Nothing was changed; try again")
    return ValueError(f"{path.name} cannot be read: {why}. It was cut off or damaged; use an older one.")


def newest(folder: Path, warn: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint in a folder that can be trusted and gone on from; each passed over is told to `warn`.

    Raises:
        OSError: one cannot be read at the moment: an older one in its place would be a step back for no reason.
    """
    for path in checkpoint_paths(folder):
        try:
            return read_whole(path)
        except ValueError as error:
            warn(str(error))
    return None


def put_aside(folder: Path, log: Path) -> list[str]:
    """Rename checkpoints of which none can be gone on from, and their log, so that a new beginning loses nothing."""
    found = checkpoint_paths(folder)
    for path in found:
        path.replace(path.with_name(f"{path.name}.aside"))
    if found and log.exists():
        log.replace(log.with_name(f"{log.name}.aside"))
    return [path.name for path in found]


def read_whole(path: Path) -> Checkpoint:
    """Read and verify a checkpoint to go on from.

    Raises:
        ValueError: as `read`; or it was thinned to its weights.
    """
    if not (found := read(path)).whole:
        raise ValueError(f"{path.name} holds the weights alone: it can be exported, not gone on from.")
    return found


def lora(checkpoint: Checkpoint) -> Lora:
    """The LoRA that a checkpoint holds, with the weights to sample and export: the average where one is kept.

    Raises:
        ValueError: it was saved without saying what it is a LoRA of.
    """
    about = checkpoint.about or {}
    if "family" not in about:
        raise ValueError(f"{checkpoint.path.name} does not say which family its base is of.")
    averaged = any(name.startswith("average.") for name in checkpoint.tensors)
    prefix, modules = "average." if averaged else "adapter.", {}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(prefix):
            module, _, part = name.removeprefix(prefix).rpartition(".")
            modules.setdefault(module, ({}, about["alphas"][module]))[0][part] = tensor
    metadata = about.get("metadata", {})
    return Lora(checkpoint.path.name, about["family"], metadata, modules, {})


def restore(state: State, checkpoint: Checkpoint) -> None:
    """Put a run's state back (in place)."""
    weights, averages = (_under(checkpoint.tensors, prefix) for prefix in ("adapter.", "average."))
    state.adapter.load(weights)
    if state.ema:
        for name, average in zip(state.adapter.state(), state.ema.average, strict=True):
            average.copy_((averages or weights)[name])
    if checkpoint.plain["scaler"]:  # none where it was not trained in float16
        state.scaler.load_state_dict(checkpoint.plain["scaler"])
    state.skipped = checkpoint.tensors["skipped"].to(state.skipped.device)
    state.rate_factor = checkpoint.plain["rate_factor"]
    state.asked_factor = checkpoint.plain.get("asked_factor", 1.0)
    state.step = checkpoint.step
    if checkpoint.plain["groups"] is None:  # of a fork with another optimizer
        return
    saved: dict = {}
    for key, value in (_under(checkpoint.tensors, "optimizer.") | checkpoint.plain["optimizer"]).items():
        index, *path = key.split(".")
        place = saved.setdefault(int(index), {})
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = value
    if any("exp_avg_sq" in values for values in saved.values()) and train.is_8bit(state.optimizer):
        saved = train.to_8bit(state.optimizer, saved)
    groups = state.optimizer.state_dict()["param_groups"]
    if len(groups) != len(checkpoint.plain["groups"]):
        raise ValueError(
            f"{checkpoint.path.name} was written by an earlier lorakit, which grouped its weights otherwise for the "
            "optimizer. Finish that run with it, or begin a new one."
        )
    groups = [  # rates and decay are the settings', which a fork may change
        group | {key: value for key, value in kept.items() if key not in ("lr", "ratio", "weight_decay")}
        for group, kept in zip(groups, checkpoint.plain["groups"], strict=True)
    ]
    state.optimizer.load_state_dict({"state": saved, "param_groups": groups})


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def fork(checkpoint: Checkpoint, folder: Path, settings: dict) -> Checkpoint:
    """Begin a run of other settings from a checkpoint of one: written into its folder, and read back.

    The optimizer's state goes along where the optimizer and what it groups by are the same.

    Args:
        folder: for the new run's checkpoints.

    Raises:
        ValueError: settings that make other weights.
    """
    odd = [name for name in SHAPING if checkpoint.settings.get(name) != settings.get(name)]
    odd += [rate for rate in TEXT_RATES if bool(checkpoint.settings.get(rate)) != bool(settings.get(rate))]
    if odd:
        raise ValueError(
            f"{checkpoint.path.name} cannot be forked with other weights than it holds: "
            + "; ".join(f"{k} was {checkpoint.settings.get(k)!r}, is now {settings.get(k)!r}" for k in odd)
            + ". Begin a new run for that."
        )
    grouping = ["optimizer", "learning_rate_ratio", "block_rates", "text_encoder_rate", "text_encoder_2_rate"]
    grouping += ["learning_rate"] * any(settings.get(rate) for rate in TEXT_RATES)  # theirs are given against it
    kept = all(checkpoint.settings.get(name) == settings.get(name) for name in grouping)
    tensors, plain = checkpoint.tensors, checkpoint.plain | {"rate_factor": 1.0, "asked_factor": 1.0}
    if not kept:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")}
        plain = plain | {"groups": None, "optimizer": {}}
    path = folder / checkpoint.path.name
    return read(_write(replace(checkpoint, path=path, settings=settings, tensors=tensors, plain=plain, regular=True)))


# ── Keeping ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def name(step: int) -> str:
    return f"step-{step:06d}.safetensors"


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.stem.partition("-")[2])


def checkpoint_kind(path: Path) -> tuple[int, bool, bool]:
    """Step of a checkpoint, whether it is whole, and whether it is a regular one: as it says, not verified.

    Raises:
        ValueError: not a checkpoint, or damaged.
    """
    facts = _facts(path)[0]
    return facts["step"], facts["whole"], facts["regular"]


def checkpoint_paths(folder: Path) -> list[Path]:
    """A folder's checkpoints by their names, the newest first; "step-000500 (1).safetensors" and the like are none."""
    found = [path for path in folder.glob("step-*.safetensors") if path.stem.removeprefix("step-").isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def tidy(folder: Path, states: int, keep: int | None = None, spare: Collection[int] = ()) -> None:
    """Thin regular checkpoints to their weights and remove the others, beyond the newest `states`.

    The newest regular one before any skipped step stays whole besides: a run that diverges goes back to it. What
    cannot be read is left alone, and counts for nothing.

    Args:
        states: how many stay whole.
        keep: how many of the regular ones stay at all; None keeps all.
        spare: steps whose weights stay anyhow.
    """
    known = []
    for path in checkpoint_paths(folder):
        try:
            known.append((path, _facts(path)[0]))
        except (ValueError, OSError):
            continue
    whole = [path for path, facts in known if facts["whole"]]
    good = [path for path, facts in known if facts["whole"] and facts["regular"] and facts["clean"]]
    kept = {*whole[:states], *good[:1]}
    regular = [path for path, facts in known if facts["regular"]]
    old = set(regular[keep:]) if keep else set()
    others = [(path, facts) for path, facts in known if path not in kept]
    gone = {path for path, facts in others if not facts["regular"] or (path in old and facts["step"] not in spare)}
    for path in gone:  # first, because thinning needs room itself
        path.unlink(missing_ok=True)
    for path, facts in others:
        if facts["whole"] and path not in gone:
            with suppress(ValueError):  # damaged since: this is told when it is asked for
                thin(read(path))


def every(
    steps: int, minutes: float, save: Callable[[bool], None], clock: Callable[[], float] = time.monotonic
) -> Callable[[Step], None]:
    """A listener that has a run saved every so many steps, at the last one, and when so many minutes have passed.

    Args:
        minutes: since the last time; 0 leaves the clock alone.
        save: told whether it is one of the regular ones.
        clock: seconds, which never jump.
    """
    last = clock()

    def listener(step: Step) -> None:
        nonlocal last
        regular = step.number % steps == 0 or step.number == step.total
        if regular or (minutes and clock() - last >= 60 * minutes):
            save(regular)
            last = clock()

    return listener
