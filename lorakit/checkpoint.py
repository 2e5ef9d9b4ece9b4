"""Save, verify and resume a run.

A checkpoint is one safetensors file: adapter, optimizer and scaler state, with the settings and a digest in its JSON
metadata. Nothing is pickled, nothing is half-written, and a file whose digest does not hold is never resumed from.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorakit import files, optim
from lorakit.train import State, Step

FORMAT = "lorakit checkpoint 2"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    path: Path
    step: int
    settings: dict  # of the run that wrote it
    tensors: dict[str, Tensor]
    plain: dict  # optimizer and scaler values that are no tensors


def _digest(tensors: dict[str, Tensor], facts: dict) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of an optimizer's state: bitsandbytes keeps a dictionary within the dictionary."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def save(path: Path, state: State, settings: dict) -> Path:
    """Write a run's state.

    Args:
        settings: the run's config as plain values, kept to compare when resuming.

    Raises:
        OSError: no room or no right to write; no file is left then.
    """
    names = list(state.adapter.state())
    tensors = {f"adapter.{k}": v.detach() for k, v in state.adapter.state().items()} | {"skipped": state.skipped}
    if state.ema:
        tensors |= {f"ema.{name}": value for name, value in zip(names, state.ema.average, strict=True)}
    plain = {"scaler": state.scaler.state_dict(), "rate_factor": state.rate_factor, "optimizer": {}}
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
    tensors = {k: v.to("cpu", copy=False).contiguous() for k, v in tensors.items()}
    facts = {"format": FORMAT, "step": state.step, "settings": settings, "plain": plain}
    metadata = {"lorakit": json.dumps(facts, sort_keys=True), "digest": _digest(tensors, facts)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as partial:
        save_file(tensors, partial, metadata)
    return path


def read(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        ValueError: not a checkpoint, damaged, or its digest does not hold.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path.name} cannot be read: {error}. It was cut off or damaged; use an older one."
        ) from error
    if "lorakit" not in metadata:
        raise ValueError(f"{path.name} is no checkpoint of lorakit's: it has no record of a run in its metadata.")
    facts = json.loads(metadata["lorakit"])
    if facts.get("format") != FORMAT:
        raise ValueError(f"{path.name} was written as {facts.get('format')!r}; this lorakit reads {FORMAT!r}.")
    if _digest(tensors, facts) != metadata.get("digest"):
        raise ValueError(f"{path.name} is damaged: its digest does not match its contents. Use an older one.")
    return Checkpoint(path, facts["step"], facts["settings"], tensors, facts["plain"])


def restore(state: State, checkpoint: Checkpoint) -> None:
    """Put a run's state back (in place)."""
    prefix = "adapter."
    state.adapter.load({k[len(prefix) :]: v for k, v in checkpoint.tensors.items() if k.startswith(prefix)})
    saved: dict = {}
    ours = "optimizer."
    entries = {k[len(ours) :]: v for k, v in checkpoint.tensors.items() if k.startswith(ours)}
    for key, value in (entries | checkpoint.plain["optimizer"]).items():
        index, *path = key.split(".")
        place = saved.setdefault(int(index), {})
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = value
    if any("exp_avg_sq" in values for values in saved.values()) and optim.is_8bit(state.optimizer):
        saved = optim.to_8bit(state.optimizer, saved)
    groups = state.optimizer.state_dict()["param_groups"]
    if len(groups) != len(checkpoint.plain["groups"]):
        raise ValueError(
            f"{checkpoint.path.name} was written by an earlier lorakit, which grouped its weights otherwise for the "
            "optimizer. Finish that run with it, or begin a new one."
        )
    groups = [group | kept for group, kept in zip(groups, checkpoint.plain["groups"], strict=True)]
    state.optimizer.load_state_dict({"state": saved, "param_groups": groups})
    state.scaler.load_state_dict(checkpoint.plain["scaler"])
    state.skipped = checkpoint.tensors["skipped"].to(state.skipped.device)
    if state.ema:
        for name, average in zip(state.adapter.state(), state.ema.average, strict=True):
            average.copy_(checkpoint.tensors[f"ema.{name}"])
    state.rate_factor = checkpoint.plain["rate_factor"]
    state.step = checkpoint.step


def newest(folder: Path, warn: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint in a folder that can be trusted; each one passed over is told to `warn`."""
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            return read(path)
        except ValueError as error:
            warn(str(error))
    return None


def name(step: int) -> str:
    return f"step-{step:06d}.safetensors"


def every(steps: int, folder: Path, state: State, settings: dict) -> Callable[[Step], None]:
    """A listener that saves the run every so many steps, and at the last one."""

    def listener(step: Step) -> None:
        if step.number % steps == 0 or step.number == step.total:
            save(folder / name(step.number), state, settings)

    return listener
