"""Kill, damage and starve runs, and see whether anything is lost: the long form of tests/run/test_killed.py.

    python tests/bench/killed.py

Every run is one of real classes with few weights, in a process of its own. It is killed at random: half of the times
before one of its own writes, syncs and renames (a checkpoint is written in slices, each of which counts), half of the
times at any moment; and started again until it ends. After every kill the folder is opened, every checkpoint in it
verified and compared with what was there before; at the end the weights are compared with those of a run that nobody
disturbed. Then files are cut off or changed by a bit, and, for the superuser under Linux, runs are begun on file
systems that are too small. Half an hour on two cores.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from base_quality import RESULTS, table, write

sys.path.insert(0, str(Path(__file__).parents[1]))
import killing
import numpy as np
from conftest import write_base
from PIL import Image

from lorakit.config import Config
from lorakit.run import checkpoint, run_folder

KINDS = {  # what a run may keep, and how it may train
    "AdamW, EMA, text encoder, dropout": {"ema_decay": 0.9, "text_encoder_rate": 5e-4, "caption_dropout": 0.3},
    "8-bit AdamW, flips, held-out pictures": {
        "optimizer": "adamw8bit",
        "rank": killing.OF_8_BITS,
        "flip": True,
        "validation_share": 0.2,
    },
    "Prodigy, accumulation": {"optimizer": "prodigy", "learning_rate": 1.0, "gradient_accumulation_steps": 2},
    "schedule-free AdamW": {"optimizer": "adamw_schedulefree", "schedule": "constant_with_warmup", "warmup_steps": 2},
    "Lion, LoKr, LoCon": {"optimizer": "lion", "algorithm": "lokr", "targets": "attention+conv"},
    "Adafactor, DoRA, cosine": {"optimizer": "adafactor", "algorithm": "dora", "schedule": "cosine"},
    "SDXL, both text encoders": {"family": "sdxl", "text_encoder_rate": 5e-4, "text_encoder_2_rate": 1e-3},
    "copies at a second place": {"backup": "drive"},
}


def make(work: Path, kind: str) -> Config:
    """A run of some seconds: two picture sizes, two epochs and a half, saved at every other step and in between."""
    changes = dict(KINDS[kind])
    family = changes.pop("family", "sd15")
    if not (work / family).exists():
        write_base(work / family, family)
    pictures = work / "pictures" / "2_sks thing"
    if not pictures.exists():
        pictures.mkdir(parents=True)
        random_numbers = np.random.default_rng(0)
        for number in range(6):
            size = (24, 48, 3) if number > 3 else (32, 32, 3)
            Image.fromarray(random_numbers.integers(0, 255, size, np.uint8)).save(pictures / f"{number}.png")
            (pictures / f"{number}.txt").write_text(f"sks thing, number {number}")
    if "backup" in changes:
        changes["backup"] = str(work / "drive")
    return Config(
        **{
            "base": str(work / family), "dataset": str(pictures.parent), "name": "thing", "resolution": 32,
            "bucket_step": 8, "rank": 4, "alpha": 2, "batch_size": 2, "steps": 15, "learning_rate": 1e-3,
            "save_every": 2, "save_minutes": 1e-4, "keep_states": 2, "validate_every": 4, "sample_every": 5,
            "sample_prompts": ("sks thing",), "sample_steps": 2, "device": "cpu", "mixed_precision": "no",
        } | changes
    )  # fmt: skip


def kill(work: Path, kills: int, chance: random.Random) -> list[list]:
    """Kill runs of every kind, until so many kills are done."""
    rows = []
    for number, kind in enumerate(KINDS):
        settings, told = make(work, kind), work / "told.json"
        began = time.monotonic()
        wanted = kills // len(KINDS) + (number < kills % len(KINDS))
        expected = killing.finished(settings, work / "whole", told)
        seconds = time.monotonic() - began
        newest = checkpoint.read(checkpoint.checkpoint_paths(work / "whole" / "checkpoints")[0])
        assert killing.has_8_bits(newest) == ("8bit" in settings.optimizer)
        done = runs = within = 0
        while done < wanted:
            folder, before, ended = work / "cut", {}, False
            while not ended:
                at = chance.randrange(expected["operations"]) if chance.random() < 0.5 and done < wanted else None
                process = killing.begin(settings, folder, told, at)
                if at is None:
                    process.join(chance.uniform(0, seconds) if done < wanted else None)
                    process.kill()
                process.join()
                ended = told.exists()
                done += not ended
                within += bool(list((folder / "checkpoints").glob(".*.partial")))
                before = killing.nothing_lost(before, folder, settings.save_every)
            runs += 1
            log = [line["step"] for line in run_folder.read_log(folder / "log.jsonl")]
            assert log == list(range(1, settings.steps + 1)), log
            same = killing.same_weights(folder / "thing.safetensors", work / "whole" / "thing.safetensors")
            assert same, f"{kind}: the weights differ from those of a run that was not disturbed"
            shutil.rmtree(folder)
            shutil.rmtree(work / "drive" / "cut", ignore_errors=True)
        shutil.rmtree(work / "whole")
        rows.append([kind, done, within, runs, "yes"])
        print(*rows[-1], sep=" | ", flush=True)
    return rows


def spoil(work: Path, times: int, chance: random.Random) -> list[list]:
    """Damage a file of a stopped run, one at a time, and let it go on."""
    kind = next(iter(KINDS))
    settings, told, done = make(work, kind), work / "told.json", Counter()
    killing.finished(settings, work / "whole", told)
    process = killing.begin(settings, work / "sound", told, at=None)
    while not (work / "sound" / "checkpoints" / checkpoint.name(8)).exists():
        time.sleep(0.01)
    (work / "sound" / "STOP").touch()
    process.join()
    kept = sorted(path.relative_to(work / "sound") for path in (work / "sound").rglob("*") if path.is_file())
    kept = [path for path in kept if path.name != ".lock"]
    for number in range(times):
        shutil.rmtree(work / "cut", ignore_errors=True)
        shutil.copytree(work / "sound", work / "cut")
        victim = work / "cut" / kept[number % len(kept)]
        how = killing.damage(victim, chance)
        place = kept[number % len(kept)].parts[0]
        problems = run_folder.RunFolder(work / "cut").describe()["problems"]
        facts = killing.finished(settings, work / "cut", told)
        same = killing.same_weights(work / "cut" / "thing.safetensors", work / "whole" / "thing.safetensors")
        assert same, f"{victim.name}, {how}: the weights differ"
        done[place, "files"] += 1
        done[place, "told"] += any(victim.name in line for line in [*facts["said"], *problems])
    shutil.rmtree(work / "whole")
    shutil.rmtree(work / "sound")
    shutil.rmtree(work / "cut", ignore_errors=True)
    places = sorted({place for place, _ in done})
    return [[place, done[place, "files"], done[place, "told"], "yes"] for place in places]


def starve(work: Path) -> list[list]:
    """Begin runs on file systems of limited size, then give them room."""
    settings, told, rows = make(work, next(iter(KINDS))), work / "told.json", []
    killing.finished(settings, work / "whole", told)
    size = sum(path.stat().st_size for path in (work / "whole").rglob("*") if path.is_file())
    small = work / "small"
    small.mkdir()
    for share in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
        limit = int(size * share) // 4096 * 4096
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={limit}", "tmpfs", small], check=True)
        try:
            process = killing.begin(settings, small / "run", told)
            process.join()
            ended = "finished" if told.exists() else "stopped with advice"
            if (small / "run" / "config.json").exists():
                problems = run_folder.RunFolder(small / "run").describe()["problems"]
                assert not problems, problems
            found = killing.readable(small / "run")
            subprocess.run(["mount", "-o", "remount,size=1g", small], check=True)
            killing.finished(settings, small / "run", told)
            same = killing.same_weights(small / "run" / "thing.safetensors", work / "whole" / "thing.safetensors")
            assert same, f"{limit} bytes: the weights differ"
        finally:
            subprocess.run(["umount", small], check=True)
        rows.append([f"{limit / 2**20:.1f} of {size / 2**20:.1f} MiB", ended, max(found, default=0), "yes"])
        print(*rows[-1], sep=" | ", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "killed")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        killed = kill(work, options.kills, chance)
        spoilt = spoil(work, options.damages, chance)
        starved = starve(work) if sys.platform == "linux" and os.geteuid() == 0 else []
    tables = [
        table(killed, "run", "kills", "of them within a save", "runs ended", "weights as if not killed, nothing lost"),
        table(spoilt, "damaged", "times", "told by name, by `info` or the run", "went on to the same weights"),
    ]
    if starved:
        tables.append(table(starved, "file system", "the run", "newest step saved", "with room, the same weights"))
    write(options.out, "Runs that were killed, damaged and starved", tables,
          {"killed": killed, "damaged": spoilt, "starved": starved})  # fmt: skip


if __name__ == "__main__":
    main()
