"""Compare the predicted memory of a step with a real one, on real architectures with random weights, on the CPU.

    python tests/bench/memory_truth.py

What is real is the profiler's own record of every allocation and release during one step, as in
tests/plan/test_memory.py, which does the same on narrower UNets. SD 1.5 takes up to 12 GB of memory and some minutes.
"""

import argparse
import gc
import sys
from pathlib import Path

import torch
from base_quality import RESULTS, table, write

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "plan"))
from test_memory import RealStep, make_base, make_config

from lorakit.plan import memory

CASES = [
    *(
        ("sd15", side, dtype, kept)
        for dtype in ("float32", "bfloat16")
        for side in (256, 512)
        for kept in (True, False)
    ),
    *(("narrow sdxl", 256, "float32", kept) for kept in (True, False)),
    *(("demo", 64, "float32", kept) for kept in (True, False)),
]
NAMES = {"sd15": "SD 1.5", "narrow sdxl": "SDXL, a tenth as wide", "demo": "the embedded base's form"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "memory_truth")
    options = parser.parse_args()
    rows, facts = [], []
    for name, side, precision, kept in CASES:
        config = make_config(rank=32, alpha=16, gradient_checkpointing=not kept)
        dtype = getattr(torch, precision)
        predicted = memory.count_step(make_base(name), config, size=(side, side), dtype=dtype, device="cpu")
        step = RealStep(name, dtype, config)
        step(side)  # makes the optimizer's state
        real = step.resident() + step.peak(side)
        off = predicted.peak / real - 1
        facts.append({
            "base": name, "side": side, "precision": precision, "checkpointing": not kept, "predicted": predicted.peak,
            "real": real,
        })  # fmt: skip
        rows.append([
            NAMES[name], side, precision, "no" if kept else "yes", f"{predicted.peak / 2**30:.3f}",
            f"{real / 2**30:.3f}", f"{off:+.2%}", "yes" if abs(off) < 0.05 else "no",
        ])  # fmt: skip
        print(*rows[-1], flush=True)
        del step
        gc.collect()
    heads = ("architecture", "px", "precision", "checkpointing", "predicted, GiB", "real, GiB", "off", "within 5 %")
    write(options.out, "Predicted and real memory of a step", [table(rows, *heads)], {"cases": facts})


if __name__ == "__main__":
    main()
