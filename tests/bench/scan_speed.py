"""How fast a folder is scanned and checked, against what its pictures take to be decoded and nothing else.

    python tests/bench/scan_speed.py WORK [--side 32 --pictures 20000 --rounds 1 --out FILE]

Makes PNG, JPEG and WebP pictures of 1024 × 1024 pixels, or of another side, with captions in kohya's tree: a few dozen
that differ, each written many times with a few bytes after its end, so that no two files are the same. Every
measurement is a process of its own, and its peak memory is the process's. What is compared takes turns, because others
use the machine too.
"""

import argparse
import io
import json
import multiprocessing
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from lorakit.dataset import folder as folders
from lorakit.dataset import quality
from lorakit.storage import index

FORMATS = {".png": {}, ".jpg": {"quality": 92}, ".webp": {"quality": 85}}
DIFFERENT = 24


def draw(random: np.random.Generator, side: int) -> Image.Image:
    """A picture about as hard to decode as a photograph: shapes of all sizes, and some grain."""
    pixels = random.normal(0, 2, (side, side, 3))
    for coarse, share in ((4, 0.5), (16, 0.25), (64, 0.15), (256, 0.1)):
        noise = Image.fromarray(random.integers(0, 256, (coarse, coarse, 3), np.uint8))
        pixels += share * np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make(folder: Path, count: int, side: int) -> None:
    random, encoded = np.random.default_rng(0), []
    for suffix, options in FORMATS.items():
        for _ in range(DIFFERENT):
            stream = io.BytesIO()
            draw(random, side).save(stream, Image.registered_extensions()[suffix], **options)
            encoded.append((suffix, stream.getvalue()))
    for number in range(count):
        suffix, contents = encoded[number * DIFFERENT % len(encoded) + number // len(FORMATS) % DIFFERENT]
        file = folder / f"{number % 10 + 1}_group {number % 10}" / f"{number}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents + number.to_bytes(8, "little"))
        file.with_suffix(".txt").write_text(f"picture {number}, of group {number % 10}")


def decode(file: str) -> None:
    with Image.open(file) as image:
        image.load()


def measure(part: str, folder: Path, workers: int, cache: Path) -> None:
    """Do one thing, and print seconds, seconds of the processor and peak MiB as JSON."""
    files = sorted(str(file) for file in folder.rglob("*") if file.suffix in FORMATS)
    index.WORKERS = workers
    began = time.perf_counter()
    if part == "threads":
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(decode, files))
    elif part == "processes":
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            list(pool.map(decode, files, chunksize=16))
    else:
        found = folders.scan(folder, cache=cache)
        assert len(found) == len(files) and not found.problems
        if part == "check":
            quality.check_quality(found)
    seconds, used = time.perf_counter() - began, 0.0
    for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used += sum(resource.getrusage(whose)[:2])
    # getrusage's own peak would be that of the process that started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1024
    print(json.dumps({"seconds": seconds, "processor": used, "peak_mib": peak}))


def run(part: str, folder: Path, workers: int, cache: Path) -> dict:
    command = [sys.executable, __file__, str(folder), "--part", part, "--workers", str(workers), "--cache", str(cache)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--pictures", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--rounds", type=int, nargs="+", default=[3, 1], help="for each number of pictures")
    parser.add_argument("--side", type=int, default=1024, help="of the pictures, in pixels")
    parser.add_argument("--workers", type=int, default=index.WORKERS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scan_speed")
    options = parser.parse_args()
    if options.part:
        measure(options.part, options.work, options.workers, options.cache)
        return
    from base_quality import table, write

    rows, facts = [], {}
    for count, rounds in zip(options.pictures, options.rounds, strict=True):
        folder = options.work / f"{count} of {options.side}"
        if not folder.exists():
            make(folder, count, options.side)
            time.sleep(index.RECENT / 1e9)  # the index does not trust files that young
        found = {part: [] for part in ("threads", "processes", "first scan", "second scan", "check")}
        for _ in range(rounds):
            cache = Path(tempfile.mkdtemp())
            for part, times in found.items():
                times.append(run(part, folder, options.workers, cache))
                print(f"{count} {part}: {times[-1]['seconds']:.1f} s", file=sys.stderr)
            shutil.rmtree(cache)
        facts[count] = found
        best = {part: {key: min(run[key] for run in runs) for key in runs[0]} for part, runs in found.items()}
        for part, least in best.items():
            ratio = [min(run["seconds"], other["seconds"]) / scan["seconds"] for run, other, scan in
                     zip(found["threads"], found["processes"], found["first scan"], strict=True)]  # fmt: skip
            of_limit = f"{median(ratio):.0%}" if part == "first scan" else ""
            speed = f"{count / least['seconds']:,.1f}"
            cells = [f"{least['seconds']:.2f}", f"{least['processor']:.2f}", f"{least['peak_mib']:.0f}"]
            rows.append([f"{count:,}", part, *cells, speed, of_limit])
    heads = ("pictures", "what", "least s", "least s of the processor", "peak MiB", "pictures/s", "of decoding's rate")
    told = f"{options.workers} workers, {options.side} pixels a side; a check after a scan. The rate is that of the "
    told += "faster decoding of the same round, the median of rounds."
    write(options.out, "Scanning a folder", [table(rows, *heads), told], facts)


if __name__ == "__main__":
    main()
