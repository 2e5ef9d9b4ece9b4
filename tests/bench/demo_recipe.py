"""Search for the demo's recipe: train the demo with settings changed, and let the judge mark each LoRA.

    python tests/bench/demo_recipe.py BASE --judge judge.safetensors --work runs/recipes \\
        "learning_rate=1e-3" "learning_rate=1e-3 steps=600" "targets=attention+conv"

Marks are given on 60 subjects that are neither among the training pictures nor among the 120 that lora_quality.py
judges by, so that a recipe is not chosen on its own exam. A recipe that stands in OUT.json is not tried again.
"""

import json
import time
from pathlib import Path

import judge as judges
import numpy as np
import torch
from base_quality import RESULTS, arguments, load_pipeline, sample, table, write
from lora_quality import held_out, read_lora, set_strength

from lorakit import demo, run
from lorakit.config import parse
from lorakit.demo import emoji

EXAM = 120  # of the held-out subjects, the ones lora_quality.py looks at
STRENGTHS = (0.0, 0.5, 1.0)


def settings(recipe: str, base: Path) -> dict:
    """`learning_rate=1e-3 steps=600` over the demo's own, as plain values."""
    changes = dict(word.split("=", 1) for word in recipe.split())
    plain = demo.config().model_dump() | {"base": str(base), "sample_prompts": (), "sample_every": 10**6}
    return plain | {
        k: json.loads(v) if v[:1].isdigit() or v in ("null", "true", "false") else v for k, v in changes.items()
    }


def mark(pipeline, judge, lora: Path, names: list[str], options) -> dict:
    """What the judge says of pictures of `names` at each strength."""
    draw = lambda prompts: sample(  # noqa: E731
        pipeline, prompts, options.seed + 1, options.steps, options.guidance, options.batch
    )
    changes = read_lora(lora, pipeline)
    new, truth = judge.style_names.index(judges.NEW), np.array(names)
    bare = truth == np.array(judge.subjects(draw(names))[0])
    marks = {"bare_right": int(bare.sum())}
    for strength in STRENGTHS:
        set_strength(changes, strength)
        pictures = draw([emoji.caption(name, demo.TRIGGER) for name in names])
        chances, right = judge.styles(pictures), truth == np.array(judge.subjects(pictures)[0])
        marks |= {
            f"called_{strength}": float((chances.argmax(1) == new).mean()),
            f"score_{strength}": float(chances[:, new].mean()),
            f"kept_{strength}": float(right[bare].mean()) if bare.any() else 0.0,
        }
    set_strength(changes, 0)
    return marks


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("recipes", nargs="+", help="each a few settings: 'learning_rate=1e-3 steps=600'")
    parser.add_argument("--work", type=Path, default=Path("runs/recipes"), help="folder for the runs")
    parser.add_argument("--subjects", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS / "demo_recipe", help="writes OUT.md and OUT.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    judge, pipeline = judges.load(options.judge), load_pipeline(options.base, options.scheduler)
    chosen, _, _ = held_out(emoji.subjects(emoji.packages(options.icons)), demo.PICTURES, options.seed)
    names = [s.name for s in chosen[EXAM : EXAM + options.subjects]]
    file = Path(f"{options.out}.json")
    tried = json.loads(file.read_text())["recipes"] if file.exists() else {}
    for recipe in options.recipes:
        if recipe in tried:
            continue
        folder = options.work / "".join(c if c.isalnum() or c in "=.-" else "_" for c in recipe)
        began = time.monotonic()
        result = run.start(parse(settings(recipe, options.base)), folder, say=lambda _: None, progress=False)
        seconds = time.monotonic() - began
        tried[recipe] = {"seconds": round(seconds, 1)} | mark(pipeline, judge, result.lora, names, options)
        print(recipe, {k: round(v, 3) for k, v in tried[recipe].items()}, flush=True)
        rows = [
            [
                f"`{recipe}`", f"{m['seconds']:.0f}",
                " → ".join(f"{m[f'score_{s}']:.2f}" for s in STRENGTHS),
                *(f"{m[f'called_{s}']:.0%}" for s in (0.0, 1.0)), f"{m['kept_1.0']:.0%} of {m['bare_right']}",
            ]
            for recipe, m in tried.items()
        ]  # fmt: skip
        heads = ("changed", "seconds", "style score at 0, 0.5, 1", "called new at 0", "at 1", "subject kept at 1")
        text = f"Over the demo's settings; marks on {len(names)} subjects that are neither trained on nor the exam's.\n"
        write(options.out, "The demo's recipe", [text, table(rows, *heads)], {"recipes": tried})


if __name__ == "__main__":
    main()
