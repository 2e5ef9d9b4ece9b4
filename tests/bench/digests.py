"""Record what lorakit's commands make, as digests, to show that a rebuilt library makes the same to the bit.

    python tests/bench/digests.py WORK before.json --tree OTHER_CHECKOUT
    python tests/bench/digests.py WORK after.json
    python tests/bench/digests.py WORK after.json --against before.json

Every command runs in a process of its own, on small bases with random weights, drawn pictures and the embedded base. A
digest covers a LoRA's tensors, a picture's pixels, or the printed JSON. Digests hold for one processor and one set of
packages: record both on the same machine. Takes about 15 minutes on two cores.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

BASIC = {
    "name": "thing", "trigger": "sks thing", "resolution": 32, "bucket_step": 8, "rank": 4, "alpha": 2, "batch_size": 2,
    "steps": 6, "learning_rate": 1e-3, "save_every": 3, "sample_every": 4, "sample_prompts": ["sks thing"],
    "sample_steps": 2, "device": "cpu", "mixed_precision": "no", "base": "sd15",
}  # fmt: skip
WIDE = {"base": "demo", "resolution": 64, "bucket_step": 16, "rank": 32, "alpha": 16, "steps": 3}
TEXT = {"text_encoder_rate": 5e-4}
CASES = {
    **{f"family {family}": {"base": family} for family in ("sd15", "sd2", "sdxl")},
    **{f"text encoders {family}": {"base": family} | TEXT for family in ("sd15", "sdxl")},
    "second text encoder": {"base": "sdxl", "text_encoder_2_rate": 1e-3},
    "text encoder alone": TEXT | {"train_unet": False},
    **{
        f"{algorithm}, {targets}{', text' * bool(text)}": {"algorithm": algorithm, "targets": targets} | text
        for algorithm in ("lora", "dora", "loha", "lokr")
        for targets in ("attention", "attention+conv")
        for text in ({}, TEXT)
    },
    "sdxl dora": {"base": "sdxl", "algorithm": "dora", "targets": "attention+conv"} | TEXT,
    "lokr factor": {"algorithm": "lokr", "lokr_factor": 4},
    "lokr whole": {"algorithm": "lokr", "rank": 64, "targets": "attention+conv"},
    **{f"optimizer {name}": {"optimizer": name} for name in ("adamw", "adafactor", "lion")},
    **{f"optimizer {name}": {"optimizer": name, **WIDE} for name in ("adamw8bit", "paged_adamw8bit")},
    "optimizer prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "optimizer adamw_schedulefree": {"optimizer": "adamw_schedulefree"},
    **{f"initialisation {name}": {"initialisation": name} for name in ("orthogonal", "eva")},
    **{f"quantize {name}": {"quantize": name, **WIDE} for name in ("nf4", "int8")},
    "quantize nf4 dora": {"quantize": "nf4", "algorithm": "dora", **WIDE},
    **{
        f"schedule {name}": {"schedule": name, "warmup_steps": 2, "schedule_cycles": 2, "schedule_power": 2.0}
        for name in ("constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial")
    },
    "ranks and rates": {
        "block_ranks": {"mid_block": 2, "down_blocks.0": 8}, "block_rates": {"up_blocks": 0.5},
        "learning_rate_ratio": 4.0, "conv_rank": 2, "conv_alpha": 1, "targets": "attention+conv",
        "rank_stabilized": True,
    },
    "noise": {
        "noise_offset": 0.05, "multires_noise_iterations": 4, "input_perturbation": 0.1,
        "timestep_sampling": "logit_normal", "timestep_shift": 0.5, "min_timestep": 20, "max_timestep": 900,
    },
    "huber": {"loss": "huber", "min_snr_gamma": None, "debiased": True},
    "smooth l1": {"loss": "smooth_l1", "ema_decay": 0.9},
    "captions": {
        "caption_dropout": 0.3, "shuffle_captions": True, "keep_tokens": 1, "tag_dropout": 0.2, "clip_skip": 2,
        "caption_variants": 3, "flip": True,
    },
    "mask": {"mask": "alpha", "unmasked_weight": 0.2},
    "prior": {"regularisation": "pictures/2_sks thing", "prior_weight": 0.5},
    "prior prediction": {"prior_prediction": True, "class_word": "toy"},
    "validation": {"validation_share": 0.3, "validate_every": 2},
    "batches": {"batch_size": 4, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "steps": None, "epochs": 2},
    "checkpointing": {"gradient_checkpointing": True, "bucket_rule": "no_upscale"},
    "bf16": {"mixed_precision": "bf16", **WIDE},
}  # fmt: skip
SCHEDULERS = ("euler", "euler_a", "dpm++_2m_karras", "ddim", "unipc", "lcm")


def draw(folder: Path) -> None:
    """Twelve pictures of two sizes, with captions of several tags; some are partly transparent."""
    from PIL import Image

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(8):
        size = (32, 32) if number < 5 else (48, 24)
        pixels = random.integers(0, 255, (size[1], size[0], 4), np.uint8)
        pixels[..., 3] = 255 if number % 2 else np.tile([255, 0], size[0] * size[1] // 2).reshape(size[::-1])
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"sks thing, number {number}, red, (large:1.2), on a table")


class Commands:
    """lorakit's commands of one checkout, run in a folder of their own."""

    def __init__(self, tree: Path, folder: Path):
        self.folder = folder
        self.environment = os.environ | {
            "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "LORAKIT_HOME": str(folder / "home"),
        }  # fmt: skip

    def start(self, *arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "lorakit", *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __call__(self, *arguments: object) -> str:
        process = self.start(*arguments)
        out, error = process.communicate()
        if process.returncode not in (0, 3):
            raise RuntimeError(f"{arguments} ended with {process.returncode}:\n{out[-3000:]}\n{error[-3000:]}")
        return out


def tensors(file: Path) -> str:
    """A digest of a file's names and tensors, whatever its metadata."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(file, "pt") as opened:
        for name in sorted(opened.keys()):
            tensor = opened.get_tensor(name).contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()[:16]


def pixels(folder: Path) -> str:
    from PIL import Image

    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.png")):
        if file.name not in ("comparison.png", "loss.png", "sheet.png"):
            digest.update(file.relative_to(folder).as_posix().encode() + Image.open(file).convert("RGB").tobytes())
    return digest.hexdigest()[:16]


def losses(folder: Path) -> str:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kept = {"step", "loss", "learning_rate", "validation_loss", "training_loss", "grad_norm"}
    rows = [{k: v for k, v in row.items() if k in kept} for row in rows]
    rows = [row for row in rows if len(row) > 1]
    assert rows
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def of_run(folder: Path) -> dict[str, str]:
    found = {"lora": tensors(next(folder.glob("*.safetensors"))), "log": losses(folder)}
    return found | {"samples": pixels(folder / "samples")} if (folder / "samples").is_dir() else found


def trained(lorakit: Commands, name: str, changes: dict) -> dict[str, str]:
    folder = lorakit.folder / "runs" / name
    file = lorakit.folder / f"{name}.json"
    settings = BASIC | {"dataset": "pictures"} | changes
    file.write_text(json.dumps({k: v for k, v in settings.items() if v is not None or k in changes}))
    if name == "resumed":
        process = lorakit.start("train", file, "--out", folder)
        while not (folder / "log.jsonl").exists() and process.poll() is None:
            time.sleep(0.02)
        (folder / "STOP").touch()
        process.communicate()
        assert process.returncode == 130, "the run was not stopped in time"
    lorakit("train", file, "--out", folder)
    return of_run(folder)


def after_training(lorakit: Commands) -> dict[str, dict[str, str] | str]:
    """What is made of trained LoRAs: pictures, files in other layouts, merged ones; and what is printed as JSON."""
    folder, found = lorakit.folder, {}
    lora, other = "runs/family sd15", "runs/lora, attention, text"
    for scheduler in SCHEDULERS:
        lorakit(
            "sample", "sks thing, (red:1.3) [table]", "a house", "--base", "sd15", "--lora", lora, "--lora", other,
            "--weight", 1, "--weight", 0.5, "--strength", 0, "--strength", 0.8, "--negative", "blue", "--seed", 3,
            "--steps", 4, "--scheduler", scheduler, "--clip-skip", 2, "--out", f"sampled/{scheduler}",
        )  # fmt: skip
        found[f"sample {scheduler}"] = {"pixels": pixels(folder / "sampled" / scheduler)}
    for layout in ("kohya", "diffusers", "peft"):
        for dtype in ("fp16", "bf16", "fp32"):
            out = folder / f"{layout}-{dtype}{'.safetensors' if layout != 'peft' else ''}"
            lorakit("export", other, "--out", out, "--format", layout, "--dtype", dtype)
            files = sorted(out.rglob("*.safetensors")) if out.is_dir() else [out]
            found[f"export {layout} {dtype}"] = {"lora": " ".join(map(tensors, files))}
    made = {
        "merged": ("merge", lora, other, "--strength", 0.7, "--strength", 0.5),
        "merged rank": ("merge", lora, "runs/dora, attention", "--rank", 6, "--base", "sd15"),
        "merged base": ("merge", lora, other, "--base", "sd15"),
        "resized": ("resize", other, "--rank", 2),
        "resized energy": ("resize", other, "--energy", 0.9),
        "extracted": ("extract", "merged base", "sd15", "--rank", 4),
    }
    for name, command in made.items():
        out = folder / (name if name == "merged base" else f"{name}.safetensors")
        lorakit(*command, "--out", out)
        files = sorted(out.rglob("*.safetensors")) if out.is_dir() else [out]
        found[name] = {"lora": " ".join(map(tensors, files))}
    lorakit(
        "generate", "a house", "a (red:1.2) car", "--out", "generated", "--name", "thing", "--base", "sd15",
        "--count", 2, "--steps", 3, "--negative", "blue",
    )  # fmt: skip
    found["generate"] = {"pixels": pixels(folder / "generated")}
    printed = {
        "check": ("check", "pictures", "--resolution", 32, "--step", 8, "--trigger", "sks thing", "--json"),
        "audit": ("caption", "audit", "pictures", "--trigger", "sks thing", "--json"),
        "info": ("info", "kohya-fp16.safetensors", "--json"),
        **{f"plan {base}": ("plan", "--base", base, "--json") for base in ("sd15", "sd21", "sdxl", "demo")},
        "methods": ("plan", "--base", "sd15", "--methods", "--json"),
        **{f"preset {kind} {base}": ("preset", kind, base, "--quick") for kind in
           ("character", "style", "object", "clothing") for base in ("sd15", "sd2", "sdxl")},
        "compare": ("compare", lora, other, "--no-pictures", "--json"),
    }  # fmt: skip
    return found | {name: lorakit(*command) for name, command in printed.items()}


def prepared(tree: Path, work: Path) -> Commands:
    from conftest import write_base

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for family, kind in {"sd15": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}.items():
        write_base(work / family, family, kind)
    draw(work / "pictures" / "2_sks thing")
    return Commands(tree, work)


def record(lorakit: Commands, only: str = "") -> dict:
    """The digests of all cases, or of the training cases whose names a pattern finds."""
    work = lorakit.folder
    if only:
        chosen = {name: changes for name, changes in CASES.items() if re.search(only, name)}
        return {name: trained(lorakit, name, changes) for name, changes in chosen.items()}
    cases = CASES | {"resumed": CASES["family sd15"] | {"steps": 60}, "whole": CASES["family sd15"] | {"steps": 60}}
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(cases, pool.map(lambda case: trained(lorakit, *case), cases.items()), strict=True))
    assert {k: v for k, v in found["resumed"].items() if k != "log"} == {
        k: v for k, v in found["whole"].items() if k != "log"
    }
    found["resumed"].pop("log")  # it tells of the stop as well
    found["started from"] = trained(lorakit, "started from", {"start_from": "runs/family sd15/thing.safetensors"})
    found |= after_training(lorakit)
    lorakit.environment["OMP_NUM_THREADS"] = "2"
    lorakit("demo", "--out", "demo-run")
    return found | {"demo": of_run(work / "demo-run")}


def same(value):
    """Without what differs from call to call: seconds, and the bytes of a file whose metadata has a date."""
    return re.sub(r'"(seconds_a_step|file_mb|bytes)": [0-9.]+', "", value) if isinstance(value, str) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path, help="folder that is emptied and used")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout whose lorakit is run")
    parser.add_argument("--only", default="", help="train only the cases whose names this pattern finds")
    parser.add_argument("--against", type=Path, help="compare with this record")
    options = parser.parse_args()
    if not options.out.exists():
        found = record(prepared(options.tree.resolve(), options.work.resolve()), options.only)
        options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    found = json.loads(options.out.read_text())
    if options.against:
        before = json.loads(options.against.read_text())
        before = {name: value for name, value in before.items() if name in found or not options.only}
        other = [name for name in before if same(before[name]) != same(found.get(name))]
        for name in other:
            print(f"{name}: {before[name]}\n    is now {found.get(name)}")
        print(f"{len(before) - len(other)} of {len(before)} as before")
        sys.exit(bool(other))


if __name__ == "__main__":
    main()
