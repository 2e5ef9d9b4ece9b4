"""Save, verify and resume a run.

A checkpoint is one safetensors file: adapter, optimizer and scaler state, the average of the weights if there is one,
with the settings and a digest in its JSON metadata. Nothing is pickled or half-written, and a file whose digest is
wrong is never resumed from. The newest checkpoints are kept whole; older ones contain only adapter weights.
"""

import errno
import json
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
SHAPING = (  # settings that decide the number and meaning of weights
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
    plain: dict  # values of optimizer and scaler that are not tensors
    whole: bool = True  # False: contains only adapter weights; it can be exported but not resumed
    regular: bool = True  # False: saved between the regular ones, by the clock or because the run was stopped
    clean: bool = True  # no step was skipped shortly before
    about: dict | None = None  # the LoRA's family, algorithm, alphas and metadata


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of an optimizer's state; bitsandbytes nests dictionaries."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# ── Writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def save(path: Path, state: State, settings: dict, *, regular: bool = True, about: dict | None = None) -> Path:
    """Write a run's state.

    Args:
        settings: those that decide the result, compared when the run is resumed.
        regular: whether it is one of those to keep.
        about: the LoRA's "family" and "metadata", so that it can be exported without the base.

    Raises:
        OSError: no room or no right to write; then no file is left.
    """
    weights = state.adapter.state()
    tensors = {f"adapter.{name}": weight.detach() for name, weight in weights.items()} | {"skipped": state.skipped}
    if state.ema or hasattr(state.optimizer, "eval"):  # the weights to export differ from the trained ones
        with state.evaluated():
            tensors |= {f"average.{name}": weight.detach().clone() for name, weight in weights.items()}
    plain: dict[str, Any] = {"scaler": state.scaler.state_dict(), "rate_factor": state.rate_factor, "optimizer": {}}
    plain["asked_factor"] = state.asked_factor
    # Some optimizers keep values in the groups: Prodigy its rate, schedule-free AdamW its average's weight.
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
    """Reduce a checkpoint's file to the weights to sample and export, about a third of it."""
    averages = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("average.")}
    weights = averages or {k: v for k, v in checkpoint.tensors.items() if k.startswith("adapter.")}
    return _write(replace(checkpoint, tensors=weights, plain={}, whole=False))


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def read(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        ValueError: not a checkpoint, or damaged.
        OSError: the drive does not answer, or there is no right to read.
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
    """Whether a file has a checkpoint's metadata; it is not verified."""
    try:
        with safe_open(path, "pt") as file:
            return "lorakit" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def checkpoint_facts(path: Path) -> dict:
    """A checkpoint's step, settings and LoRA, from its metadata; they are not verified.

    Raises:
        ValueError, OSError: as `read`.
    """
    return _facts(path)[0]


def _facts(path: Path) -> tuple[dict, str | None]:
    """A checkpoint's metadata and digest, not verified."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        facts = json.loads(metadata["lorakit"]) if "lorakit" in metadata else None
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if facts is None:
        raise ValueError(f"{path.name} is no lorakit checkpoint: its metadata has no record of a run.")
    if not isinstance(facts, dict):
        raise _unreadable(path, "its record of the run is not a dictionary")
    if facts.get("format") != FORMAT:
        raise ValueError(f"{path.name} was written as {facts.get('format')!r}; this lorakit reads {FORMAT!r}.")
    if missing := WRITTEN - facts.keys():
        raise _unreadable(path, f"its record of the run lacks {', '.join(sorted(missing))}")
    return facts, metadata.get("digest")


def _unreadable(path: Path, why: Exception | str) -> Exception:
    """The error to raise. When a drive does not answer, the file may be fine: resuming without it would lose steps."""
    if isinstance(why, OSError) and why.errno in AWAY:
        return OSError(why.errno, f"{path.name} cannot be read now ({why.strerror}). Nothing was changed; try again")
    return ValueError(f"{path.name} cannot be read: {why}. It was cut off or damaged; use an older one.")


def newest(folder: Path, warn: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint in a folder that can be resumed; `warn` is called with a message for each bad one.

    Raises:
        OSError: one cannot be read at the moment; resuming from an older one would lose steps for no reason.
    """
    for path in checkpoint_paths(folder):
        try:
            return read_whole(path)
        except ValueError as error:
            warn(str(error))
    return None


def put_aside(folder: Path, log: Path) -> list[str]:
    """Rename checkpoints that cannot be resumed, and their log, so that a new start loses nothing."""
    paths = checkpoint_paths(folder)
    for path in paths:
        path.replace(path.with_name(f"{path.name}.aside"))
    if paths and log.exists():
        log.replace(log.with_name(f"{log.name}.aside"))
    return [path.name for path in paths]


def read_whole(path: Path) -> Checkpoint:
    """Read and verify a checkpoint to resume from.

    Raises:
        ValueError: as `read`; or it contains only adapter weights.
    """
    if not (checkpoint := read(path)).whole:
        raise ValueError(f"{path.name} contains only adapter weights; it can be exported but not resumed.")
    return checkpoint


def lora(checkpoint: Checkpoint) -> Lora:
    """The LoRA of a checkpoint, with the weights to sample and export: their average if there is one.

    Raises:
        ValueError: its metadata lacks the family.
    """
    about = checkpoint.about or {}
    if "family" not in about:
        raise ValueError(f"{checkpoint.path.name} does not say which family its base is of.")
    averaged = any(name.startswith("average.") for name in checkpoint.tensors)
    prefix = "average." if averaged else "adapter."
    modules: dict[str, tuple[dict[str, Tensor], float]] = {}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(prefix):
            module, _, part = name.removeprefix(prefix).rpartition(".")
            modules.setdefault(module, ({}, about["alphas"][module]))[0][part] = tensor
    metadata = about.get("metadata", {})
    return Lora(checkpoint.path.name, about["family"], metadata, modules, {})


def restore(state: State, checkpoint: Checkpoint) -> None:
    """Set a run's state (in place) to a checkpoint's."""
    weights, averages = (_under(checkpoint.tensors, prefix) for prefix in ("adapter.", "average."))
    state.adapter.load(weights)
    if state.ema:
        for name, average in zip(state.adapter.state(), state.ema.average, strict=True):
            average.copy_((averages or weights)[name])
    if checkpoint.plain["scaler"]:  # empty unless it was trained in float16
        state.scaler.load_state_dict(checkpoint.plain["scaler"])
    state.skipped = checkpoint.tensors["skipped"].to(state.skipped.device)
    state.rate_factor = checkpoint.plain["rate_factor"]
    state.asked_factor = checkpoint.plain["asked_factor"]
    state.step = checkpoint.step
    if checkpoint.plain["groups"] is None:  # a fork with another optimizer
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
    groups = [  # rates and decay come from the settings, which a fork may change
        group | {key: value for key, value in kept.items() if key not in ("lr", "ratio", "weight_decay")}
        for group, kept in zip(groups, checkpoint.plain["groups"], strict=True)
    ]
    state.optimizer.load_state_dict({"state": saved, "param_groups": groups})


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def fork(checkpoint: Checkpoint, folder: Path, settings: dict) -> Checkpoint:
    """Start a run with other settings from a checkpoint: write it into the new run's folder, and read it back.

    The optimizer's state is kept if the optimizer and the settings that group its weights are the same.

    Args:
        folder: for the new run's checkpoints.

    Raises:
        ValueError: the settings need other weights.
    """
    odd = [name for name in SHAPING if checkpoint.settings.get(name) != settings.get(name)]
    odd += [rate for rate in TEXT_RATES if bool(checkpoint.settings.get(rate)) != bool(settings.get(rate))]
    if odd:
        raise ValueError(
            f"{checkpoint.path.name} cannot be forked with other weights than it holds: "
            + "; ".join(f"{k} was {checkpoint.settings.get(k)!r}, is now {settings.get(k)!r}" for k in odd)
            + ". Start a new run for that."
        )
    grouping = ["optimizer", "learning_rate_ratio", "block_rates", "text_encoder_rate", "text_encoder_2_rate"]
    grouping += ["learning_rate"] * any(settings.get(rate) for rate in TEXT_RATES)  # their rates are relative to it
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


def checkpoint_paths(folder: Path) -> list[Path]:
    """A folder's checkpoints, the newest first, without files like "step-000500 (1).safetensors"."""
    paths = [path for path in folder.glob("step-*.safetensors") if path.stem.removeprefix("step-").isdecimal()]
    return sorted(paths, key=step_of, reverse=True)


def tidy(folder: Path, states: int, keep: int | None = None, spare: Collection[int] = ()) -> None:
    """Beyond the newest `states` checkpoints, reduce regular ones to their weights and remove the others.

    The newest regular one before any skipped step stays whole too: a run that diverges goes back to it. Unreadable
    files are left unchanged and do not count.

    Args:
        states: how many stay whole.
        keep: how many regular ones stay at all; None keeps all.
        spare: steps whose weights always stay.
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
            with suppress(ValueError):  # damaged since then: reported when it is read
                thin(read(path))


def make_room(folder: Path) -> None:
    """On a full disk, keep only the newest state that can be read, and the weights of the other regular checkpoints.

    A state is removed before its weights are written again: there may be no room for both.

    Raises:
        OSError: the drive does not answer, or there is no right to write.
    """
    verified = newest(folder, lambda _: None)
    kept = verified and verified.path
    del verified
    for path in reversed(checkpoint_paths(folder)) if kept else ():
        try:
            saved = read(path) if path != kept else None
        except ValueError:  # damaged: reported when it is read
            continue
        if saved and (saved.whole or not saved.regular):
            path.unlink()
            if saved.regular:
                thin(saved)


def every(
    steps: int, minutes: float, save: Callable[[bool], None], clock: Callable[[], float] = time.monotonic
) -> Callable[[Step], None]:
    """A listener that saves a run every so many steps, at the last one, and when so many minutes have passed.

    Args:
        minutes: since the last time; 0 saves by steps only.
        save: called with whether the checkpoint is a regular one.
        clock: seconds that never jump.
    """
    last = clock()

    def listener(step: Step) -> None:
        nonlocal last
        regular = step.number % steps == 0 or step.number == step.total
        if regular or (minutes and clock() - last >= 60 * minutes):
            save(regular)
            last = clock()

    return listener
