"""Measure what opening SDXL's components takes of memory: from one checkpoint file and from a diffusers folder.

    python tests/bench/opening.py WORK

WORK gets 14 GB of random weights in SDXL's shapes, in half precision, and keeps them for the next time. Each component
is opened as a run opens it, in the compute dtype of a T4 (fp16; the VAE, which overflows there, in float32), in one
process that frees it before the next. What counts is anonymous memory, which the process alone holds; pages of a
mapped file are the system's to drop, and are told beside.
"""

import argparse
import gc
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from base_quality import RESULTS, table, write

from lorakit import device as device_module
from lorakit.base import model as bases
from lorakit.base import names as base_names
from lorakit.base import single_file
from lorakit.device import Compute

COMPONENTS = ("text_encoder", "text_encoder_2", "vae", "unet")
GIB = 2**30


def shapes(component: str) -> dict[str, torch.Size]:
    """Name → shape of a component of SDXL, by its published config."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = bases.known("sdxl").configs[component]
    with init_empty_weights():
        model = {
            "unet": lambda: UNet2DConditionModel.from_config(config),
            "vae": lambda: AutoencoderKL.from_config(config),
            "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**config)),
            "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
        }[component]()
    return {name: weight.shape for name, weight in model.named_parameters()}


def write_folder(folder: Path) -> None:
    """SDXL as a diffusers folder."""
    from safetensors.torch import save_file

    for component in COMPONENTS:
        weights = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes(component).items()}
        (folder / component).mkdir(parents=True, exist_ok=True)
        name = "diffusion_pytorch_model" if component in ("unet", "vae") else "model"
        save_file(weights, folder / component / f"{name}.safetensors", metadata={"format": "pt"})
        del weights
    for component, config in bases.known("sdxl").configs.items():
        (folder / component).mkdir(exist_ok=True)
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        (folder / component / name).write_text(json.dumps(config))
    for tokenizer in ("tokenizer", "tokenizer_2"):
        (folder / tokenizer).symlink_to(bases.FAMILIES / "tokenizer")


def write_file(file: Path) -> None:
    """SDXL as one file in Stability's layout."""
    from safetensors.torch import save_file

    zeros = lambda shape: torch.zeros(shape, dtype=torch.float16)  # noqa: E731
    weights = {}
    for component, names in (("unet", base_names.unet_names()), ("vae", single_file._vae())):
        prefix, own = (single_file.UNET_PREFIX, single_file.VAE_PREFIX)[component == "vae"], {}
        for theirs, path in names.items():
            own.setdefault(path, theirs)
        for name, shape in shapes(component).items():
            path, _, leaf = name.rpartition(".")
            weights[f"{prefix}{own[path]}.{leaf}"] = zeros(shape)
    for name, shape in shapes("text_encoder").items():
        weights[f"{single_file.CLIP_L}text_model.{name.removeprefix('text_model.')}"] = zeros(shape)
    outside = {theirs: name for name, theirs in base_names.OPEN_CLIP.items()}
    inside = {theirs: name for name, theirs in base_names.OPEN_CLIP_LAYER.items()}
    for name, shape in shapes("text_encoder_2").items():
        name = name.removeprefix("text_model.")
        if name in outside:
            weights[single_file.OPEN_CLIP_G + outside[name]] = zeros(shape)
            continue
        _, _, layer, *leaf, kind = name.split(".")
        layer = f"{single_file.OPEN_CLIP_G}transformer.resblocks.{layer}"
        if ".q_proj." in name:
            weights[f"{layer}.attn.in_proj_{kind}"] = zeros((3 * shape[0], *shape[1:]))
        elif ".k_proj." not in name and ".v_proj." not in name:
            weights[f"{layer}.{inside['.'.join(leaf)]}.{kind}"] = zeros(shape)
    save_file(weights, file)


def held() -> tuple[int, int]:
    """Bytes of this process's resident memory: anonymous, and pages of mapped files. Linux."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))


def measure(reference: str) -> None:
    """Open each component, print what each holds and the most that was held meanwhile, in bytes over the start."""
    base, device = bases.open(reference), torch.device("cpu")
    device_module.quiet_libraries()
    import diffusers  # noqa: F401 - its own memory is not the component's
    import transformers  # noqa: F401

    load = {
        "unet": lambda: bases.load_unet(base, Compute(device, torch.float16)),
        "vae": lambda: bases.load_vae(base, Compute(device, torch.float16)),
        **{which: lambda which=which: bases.load_text_encoder(base, Compute(device, torch.float16), which) for which in
           base.text_encoders},
    }  # fmt: skip
    found = {}
    for component in COMPONENTS:
        gc.collect()
        start, peaks, done = held(), [0, 0], threading.Event()

        def watch(start=start, peaks=peaks, done=done) -> None:
            while not done.is_set():
                for place, (now, before) in enumerate(zip(held(), start, strict=True)):
                    peaks[place] = max(peaks[place], now - before)
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        opened = load[component]()
        done.set()
        watcher.join()
        model = opened[0] if isinstance(opened, tuple) else opened
        size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        found[component] = {"bytes": size, "anonymous": peaks[0], "mapped": peaks[1]}
        del opened, model
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--open", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "opening")
    options = parser.parse_args()
    if options.open:
        measure(options.open)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    file, folder = options.work / "sdxl.safetensors", options.work / "sdxl"
    if not file.exists():
        write_file(file)
    if not folder.exists():
        write_folder(folder)
    rows, facts = [], {}
    for kind, reference in (("one file", file), ("folder", folder)):
        command = [sys.executable, __file__, str(options.work), "--open", str(reference)]
        facts[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for component, found in facts[kind].items():
            over = found["anonymous"] - found["bytes"]
            cells = [f"{found[key] / GIB:.2f}" for key in ("bytes", "anonymous", "mapped")]
            rows.append([kind, component, *cells, f"{over / GIB:+.2f}", "yes" if over < GIB else "no"])
    heads = (
        "from",
        "component",
        "its weights, GiB",
        "held at the peak, GiB",
        "mapped beside",
        "over",
        "less than 1 GiB",
    )
    write(options.out, "Opening SDXL", [table(rows, *heads)], facts)


if __name__ == "__main__":
    main()
