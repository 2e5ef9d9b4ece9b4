"""Runs in processes of their own that are killed, starved and damaged: shared by a short test and a long bench."""

import json
import multiprocessing
import os
import random
import signal
from pathlib import Path

from safetensors.torch import load_file

from lorakit.config import Config
from lorakit.run import checkpoint, run_folder

OF_8_BITS = 128  # rank from which on 8-bit optimizers hold states of the small base in 8 bits: 4,096 weights a tensor
SLICES = 8  # that a checkpoint is written in, each a moment to be killed at
# Everything heavy is imported once; each process is forked from there and begins within milliseconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([
    "lorakit.run", "peft", "diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl",
    "transformers.models.clip.modeling_clip", "tensorboard.summary.writer.record_writer",
])  # fmt: skip


def child(settings: str, folder: str, at: int | None, told: str) -> None:
    """Train. Every write, sync and rename counts; before number `at` the process is gone without a word."""
    import gc

    import torch

    from lorakit.run import run
    from lorakit.storage import files

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
    gc.freeze()  # every run looks through what is imported several times
    torch.set_num_threads(1)
    count = 0

    def tick() -> None:
        nonlocal count
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def counted(function):
        return lambda *arguments, **more: (tick(), function(*arguments, **more))[1]

    def in_slices(tensors, path, metadata):
        from safetensors.torch import save

        raw = save(tensors, metadata)
        size = -(-len(raw) // SLICES)
        with open(path, "wb", buffering=0) as stream:
            for start in range(0, len(raw), size):
                tick()
                left = memoryview(raw)[start : start + size]
                while left:
                    left = left[stream.write(left) :]

    checkpoint.save_file = in_slices
    files.os = type("os", (), {**vars(os), "fsync": counted(os.fsync), "replace": counted(os.replace)})
    files.append_lines = counted(files.append_lines)
    lines = []
    result = run.start(Config(**json.loads(settings)), folder, say=lines.append, progress=False)
    Path(told).write_text(json.dumps({"operations": count, "lora": str(result.lora), "said": lines}))


def begin(settings: Config, folder: Path, told: Path, at: int | None = None):
    """A run in a new process; what it said is in `told` once it is finished."""
    told.unlink(missing_ok=True)
    process = processes.Process(target=child, args=(settings.to_json(), str(folder), at, str(told)))
    process.start()
    return process


def finished(settings: Config, folder: Path, told: Path) -> dict:
    """What a run that nobody disturbs says, and how many operations it counted."""
    process = begin(settings, folder, told)
    process.join()
    assert process.exitcode == 0 and told.exists()
    return json.loads(told.read_text())


def readable(folder: Path) -> dict[int, bool]:
    """Step → whether it is whole, of every checkpoint whose digest holds."""
    found = {}
    for path in checkpoint.checkpoint_paths(folder / "checkpoints"):
        try:
            found[checkpoint.step_of(path)] = checkpoint.read(path).whole
        except ValueError:
            continue
    return found


def nothing_lost(before: dict[int, bool], folder: Path, save_every: int) -> dict[int, bool]:
    """Check a folder whose run was killed, against what it held before."""
    after = readable(folder)
    assert len(after) == len(checkpoint.checkpoint_paths(folder / "checkpoints")), "a checkpoint is half-written"
    for step in before:
        assert step in after or step % save_every, f"the regular checkpoint of step {step} is gone"
    newest = [max((step for step, whole in some.items() if whole), default=0) for some in (before, after)]
    assert newest[0] <= newest[1], f"what could be gone on from was step {newest[0]}, and is step {newest[1]}"
    if after or (folder / "config.json").exists():
        told = run_folder.RunFolder(folder).describe()
        assert not told["problems"], told["problems"]
    return after


def has_8_bits(saved: checkpoint.Checkpoint) -> bool:
    """Whether a checkpoint's optimizer state holds numbers of 8 bits."""
    return any(key.startswith("optimizer.") and tensor.dtype.itemsize == 1 for key, tensor in saved.tensors.items())


def same_weights(a: Path, b: Path) -> bool:
    """Whether two LoRA files hold the same numbers, to the bit."""
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all((first[key] == second[key]).all() for key in first)


def damage(file: Path, chance: random.Random) -> str:
    """Cut a file off somewhere, or flip a bit of it."""
    raw = file.read_bytes()
    at = chance.randrange(max(1, len(raw)))
    if not raw or chance.random() < 0.5:
        file.write_bytes(raw[:at])
        return f"cut off at {at} of {len(raw)}"
    flipped = bytes([raw[at] ^ (1 << chance.randrange(8))])
    file.write_bytes(raw[:at] + flipped + raw[at + 1 :])
    return f"a bit of byte {at} flipped"
