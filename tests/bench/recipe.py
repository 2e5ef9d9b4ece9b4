"""Which settings help, and by how much? Every recipe teaches the embedded base several styles, and the truth judges.

    python tests/bench/recipe.py WORK [--recipes …] [--pairs …] [--part 0/2]       train, draw held-out subjects
    python tests/bench/recipe.py WORK --judge judge.safetensors                    judge, write the results

Each recipe differs from the centre in what its name says, and is compared with it on the same style, by the same seed:
on three pairs of these first, whatever it is; on all nine where it is worth it. What is made stays in WORK and is not
made again. "guide" has the training guide's settings and twice as many steps as the centre. The subjects are none of
those that lora_quality.py judges the demo's LoRA by, so that no recipe is chosen on its own exam.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import judge as judges
import numpy as np
import taught
from base_quality import RESULTS, table, write
from demo import emoji
from lora_quality import EXAM, held_out

from lorakit import demo
from lorakit.run import run

STYLES, SEEDS = ("flat", "sketch", "heat"), (0, 1, 2)
FEW = tuple(zip(STYLES, SEEDS, strict=True))
ALL = tuple((style, seed) for style in STYLES for seed in SEEDS)
STEPS = 120
CENTRE = {"learning_rate": 4e-3, "text_encoder_rate": 4e-3, "steps": STEPS}
GUIDE = CENTRE | {"schedule": "constant", "warmup_steps": 0, "targets": "attention", "steps": 2 * STEPS}
RATE = lambda rate: {"learning_rate": rate, "text_encoder_rate": rate}  # noqa: E731
BEST = {"initialisation": "eva", "caption_dropout": 0.1, "timestep_sampling": "logit_normal"}  # each helped alone
RECIPES = {
    "centre": {},
    "guide": GUIDE,
    "guide, rate 2e-3": GUIDE | RATE(2e-3),
    "guide, rate 1e-3": GUIDE | RATE(1e-3),
    "guide, half the steps": GUIDE | {"steps": STEPS},
    "half the steps": {"steps": STEPS // 2},
    "targets attention": {"targets": "attention"},
    "rank 8": {"rank": 8, "alpha": 4},
    "rank 64": {"rank": 64, "alpha": 32},
    "rate 2e-3": RATE(2e-3),
    "rate 8e-3": RATE(8e-3),
    "text encoder as it is": {"text_encoder_rate": 0.0},
    "LoRA+ 4": {"learning_rate_ratio": 4.0},
    "LoRA+ 16": {"learning_rate_ratio": 16.0},
    "LoRA+ 4, rate 2e-3": RATE(2e-3) | {"learning_rate_ratio": 4.0},
    "Min-SNR 5": {"min_snr_gamma": 5.0},
    "EMA 0.98": {"ema_decay": 0.98},
    "caption dropout 0.1": {"caption_dropout": 0.1},
    "orthogonal": {"initialisation": "orthogonal"},
    "EVA": {"initialisation": "eva"},
    "logit-normal": {"timestep_sampling": "logit_normal"},
    "logit-normal, shift 1": {"timestep_sampling": "logit_normal", "timestep_shift": 1.0},
    "constant": {"schedule": "constant_with_warmup"},
    "prior prediction": {"prior_prediction": True, "prior_weight": 0.5},
    "the best together": BEST,
    "the best together, half the steps": BEST | {"steps": STEPS // 2},
}  # fmt: skip


def make(work: Path, icons: Path, recipes: list[str], pairs: tuple, part: str) -> None:
    sets, known = emoji.packages(icons), {}
    exam, _, _ = held_out(emoji.subjects(sets), demo.PICTURES, 0)
    names, icon_names = zip(*taught.held_out(sets, {subject.name for subject in exam[:EXAM]}), strict=True)
    place, of = map(int, part.split("/"))
    (work / "made").mkdir(parents=True, exist_ok=True)
    for name, (style, seed) in [(recipe, pair) for recipe in recipes for pair in pairs][place::of]:
        file = work / "made" / f"{style} {seed} {name}.npz"
        if file.exists():
            continue
        changes = CENTRE | RECIPES[name]
        if changes.get("prior_prediction"):
            changes = changes | {"regularisation": str(taught.others(work / "class", sets))}
        config = demo.config(
            dataset=str(taught.dataset(work / "pictures" / style, sets, style)), seed=seed, save_minutes=0,
            save_every=10_000, sample_every=10_000, sample_prompts=(), **changes,
        )  # fmt: skip
        folder, quiet = work / "runs" / file.stem, {"say": lambda _: None}
        shutil.rmtree(folder, ignore_errors=True)
        began = time.process_time()
        done = run.start(config, folder, progress=False, **quiet)
        seconds = time.process_time() - began
        drawn = {
            word: taught.pictures({"lora": done.lora}, list(names), known, 8, config.sample_guidance, word)
            for word in (taught.TRIGGER, "")
        }
        arrays = {f"{'with' if word else 'bare'} {key}": made for word, of in drawn.items() for key, made in of.items()}
        arrays |= {
            "true": np.stack([taught.drawn(sets, style, icon) for icon in icon_names]),
            "names": np.array(names), "seconds": np.array(seconds),
        }  # fmt: skip
        partial = file.with_suffix(".partial")
        with partial.open("wb") as handle:
            np.savez_compressed(handle, **arrays)
        partial.rename(file)
        shutil.rmtree(folder)
        print(f"{file.stem}: {seconds:.0f} s", flush=True)


def judged(work: Path, judge: judges.Judge) -> dict[str, dict[str, dict]]:
    """Marks by recipe and pair."""
    found: dict[str, dict[str, dict]] = {}
    for file in sorted((work / "made").glob("*.npz")):
        style, seed, name = file.stem.split(" ", 2)
        with np.load(file) as arrays:
            true, own = arrays["true"], {key: arrays[key] for key in arrays.files}
        right = np.array(judge.subjects(own["with lora"])[0]) == own["names"]
        had = np.array(judge.subjects(own["bare base"])[0]) == own["names"]
        found.setdefault(name, {})[f"{style} {seed}"] = {
            "quality": taught.quality(judge, own["with lora"], own["with base"], true),
            "kept": float(right[had].mean()), "seconds": float(own["seconds"]),
            "leak": taught.quality(judge, own["bare lora"], own["bare base"], true),
        }  # fmt: skip
    return found


def rows(found: dict[str, dict[str, dict]]) -> list[list]:
    """A row a recipe, by what it adds to the centre's quality on the same pairs: not all are made on the same ones."""
    result = []
    for name, marks in found.items():
        mean = lambda key, of, pairs=marks: float(np.mean([found[of][pair][key] for pair in pairs]))  # noqa: E731
        more, told = more_than("centre", name, found)
        result.append((more, [
            name, " ".join(f"`{k}={json.dumps(v)}`" for k, v in RECIPES[name].items()), len(marks),
            f"{mean('quality', name):.3f}", told, more_than("guide", name, found)[1], f"{mean('kept', name):.0%}",
            f"{mean('leak', name):.2f}", f"{mean('seconds', name) / mean('seconds', 'centre'):.2f}×",
        ]))  # fmt: skip
    return [row for _, row in sorted(result, key=lambda marked: -marked[0])]


def more_than(other: str, name: str, found: dict[str, dict[str, dict]]) -> tuple[float, str]:
    """How much quality it adds to another's on the pairs that both have; and with the standard error, told."""
    pairs = found[name].keys() & found[other].keys()
    more = [found[name][pair]["quality"] - found[other][pair]["quality"] for pair in pairs]
    error = f" ± {np.std(more, ddof=1) / len(more) ** 0.5:.3f}" if len(more) > 1 else ""
    return float(np.mean(more)), "" if name == other else f"{np.mean(more):+.3f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--icons", type=Path, default=Path("~/.cache/lorakit/icons").expanduser())
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--pairs", choices=("few", "all"), default="few", help="of style and seed: three, or nine")
    parser.add_argument("--part", default="0/1", help="which of how many programs at once this is")
    parser.add_argument("--judge", type=Path, help="judge what is made, with what judge.py wrote")
    parser.add_argument("--out", type=Path, default=RESULTS / "recipe")
    options = parser.parse_args()
    if not options.judge:
        pairs = FEW if options.pairs == "few" else ALL
        make(options.work, options.icons, options.recipes, pairs, options.part)
        return
    found = judged(options.work, judges.load(options.judge))
    heads = ("recipe", "other than the centre", "pairs", "quality", "more than the centre", "more than the guide",
             "subject kept", "quality without the trigger", "seconds")  # fmt: skip
    centre = " ".join(f"`{k}={json.dumps(v)}`" for k, v in CENTRE.items())
    text = (
        f"The centre is the demo's recipe with {centre}. Quality: how much of the bare base's distance to the true "
        f"pictures of {taught.HELD} held-out subjects is gone, by the judge; ± is the standard error over pairs of"
        " style and seed. Seconds are the processor's.\n"
    )
    write(options.out, "Which settings help?", [text, table(rows(found), *heads)], {"recipes": found})


if __name__ == "__main__":
    main()
