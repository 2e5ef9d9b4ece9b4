"""Time training steps of SD 1.5's architecture with random weights on the CPU, as a run does them.

    python tests/bench/speed.py WORK

WORK gets 2 GB of random weights in an ordinary diffusers folder, and one run folder a case. Each case is run once to
fill its cache of latents and texts, then in a process of its own: seconds a step (the median after the first two), the
process's peak memory, and seconds from the command to the end of the first step, with the files still in memory.

The limit is what the hardware could do: the counted operations of the step over the rate of a matrix product of
4096 x 4096 in the same precision, measured in between.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from base_quality import RESULTS, table, write
from PIL import Image

from lorakit.base import model
from lorakit.config import parse
from lorakit.plan import memory

CASES = [(side, precision, kept) for side in (256, 512) for precision in ("no", "bf16") for kept in (True, False)]
BARS = {(256, "no"): 1.5, (256, "bf16"): 1.7, (512, "no"): 1.2, (512, "bf16"): 1.45}  # without checkpointing
STEPS = 6


def write_base(folder: Path) -> None:
    """SD 1.5 by its published configs, random weights in half precision."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    configs = model.known("sd15").configs
    torch.manual_seed(0)
    make = {
        "unet": lambda config: UNet2DConditionModel.from_config(config),
        "vae": lambda config: AutoencoderKL.from_config(config),
        "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
    }
    for component, config in configs.items():
        (folder / component).mkdir(parents=True, exist_ok=True)
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        (folder / component / name).write_text(json.dumps(config))
        if component in make:
            weights = {k: w.half().contiguous() for k, w in make[component](config).state_dict().items()}
            file = "model" if component == "text_encoder" else "diffusion_pytorch_model"
            save_file(weights, folder / component / f"{file}.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer").symlink_to(model.FAMILIES / "tokenizer")
    index = {"_class_name": "StableDiffusionPipeline"} | {component: ["", ""] for component in configs}
    (folder / "model_index.json").write_text(json.dumps(index))


def settings(work: Path, side: int, precision: str, kept: bool, steps: int) -> dict:
    return {
        "base": str(work / "sd15"), "dataset": str(work / "pictures"), "name": "speed", "resolution": side,
        "steps": steps, "rank": 32, "alpha": 16, "mixed_precision": precision, "gradient_checkpointing": not kept,
        "device": "cpu", "fit_memory": False, "sample_every": 10**6, "save_every": 10**6, "seed": 0,
        "sample_prompts": ["a thing"],
    }  # fmt: skip


def child(file: Path, folder: Path, began: float) -> None:
    """Train, and print when each step was done, in seconds after `began`, and the most memory that was held."""
    from lorakit import config
    from lorakit.run import run

    ends = []

    def note(step) -> None:
        float(step.loss)
        ends.append(time.time() - began)
        if step.number == step.total - 1:
            print(json.dumps({"ends": ends, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
            sys.stdout.flush()
            os._exit(0)  # what follows the last step is not measured

    run.start(config.load(file), folder, say=lambda text: None, progress=False, listeners=[note])


def gemm(dtype: torch.dtype, seconds: float = 3.0) -> float:
    """Operations a second of a large matrix product."""
    a, b = (torch.randn(4096, 4096, dtype=dtype) for _ in range(2))
    a @ b
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * 4096**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="cases whose name holds this, like '512 bf16'")
    parser.add_argument("--out", type=Path, default=RESULTS / "speed")
    options = parser.parse_args()
    if options.child:
        child(Path(options.child[0]), Path(options.child[1]), float(options.child[2]))
        return
    work = options.work
    if not (work / "sd15" / "model_index.json").exists():
        write_base(work / "sd15")
    (work / "pictures").mkdir(exist_ok=True)
    for n in range(2):
        pixels = np.random.default_rng(n).integers(0, 256, (512, 512, 3), np.uint8)
        Image.fromarray(pixels).save(work / "pictures" / f"{n}.png")
        (work / "pictures" / f"{n}.txt").write_text(f"a thing, {n}")
    facts = known(options.out)
    for side, precision, kept in CASES:
        name = f"{side} {precision} {'kept' if kept else 'checkpointed'}"
        if options.only not in name:
            continue
        facts[name] = measure(work, name, side, precision, kept)
        print(*row(name, facts[name]), flush=True)
    names = [f"{side} {precision} {'kept' if kept else 'checkpointed'}" for side, precision, kept in CASES]
    rows = [row(name, facts[name]) for name in names if name in facts]
    heads = ("px", "precision", "checkpointing", "s a step", "of the limit", "bar", "peak GiB", "s to the first step",
             "TFLOP a step", "GFLOP/s of a product")  # fmt: skip
    write(options.out, "Speed of a step on two CPU cores", [table(rows, *heads)], {"cases": facts})


def known(out: Path) -> dict[str, dict]:
    """The cases that were measured before; a new measurement takes its own's place."""
    file = out.with_suffix(".json")
    return json.loads(file.read_text())["cases"] if file.exists() else {}


def measure(work: Path, name: str, side: int, precision: str, kept: bool) -> dict:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    found = {}
    for steps in (2, STEPS):
        file, folder = work / f"{name}.json", work / "runs" / f"{name} {steps}"
        file.write_text(json.dumps(settings(work, side, precision, kept, steps)))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if steps == STEPS:
            (work / "runs" / f"{name} 2" / "cache").rename(folder / "cache")
        command = [sys.executable, __file__, str(work), "--child", str(file), str(folder), str(time.time())]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(out.strip().splitlines()[-1])
    ends, config = found["ends"], parse(settings(work, side, precision, kept, STEPS))
    flops = memory.count_step(model.known("sd15"), config, size=(side, side), dtype=dtype, device="cpu").flops
    a_step, rate = statistics.median(b - a for a, b in zip(ends[1:], ends[2:], strict=False)), gemm(dtype)
    return {"side": side, "precision": precision, "kept": kept, "step": a_step, "peak": found["peak"],
            "first": ends[0], "flops": flops, "gemm": rate}  # fmt: skip


def row(name: str, facts: dict) -> list:
    bar = BARS[facts["side"], facts["precision"]] if facts["kept"] else None
    return [
        facts["side"], {"no": "fp32"}.get(facts["precision"], facts["precision"]), "no" if facts["kept"] else "yes",
        f"{facts['step']:.2f}", f"{facts['step'] * facts['gemm'] / facts['flops']:.2f}×", f"≤ {bar}×" if bar else "",
        f"{facts['peak'] / 2**30:.2f}", f"{facts['first']:.1f}", f"{facts['flops'] / 1e12:.2f}",
        f"{facts['gemm'] / 1e9:.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
