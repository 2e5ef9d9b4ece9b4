"""Measure what a LoRA of the new style does to subjects it never saw.

    python tests/bench/lora_quality.py BASE LORA.safetensors --icons ICONS --judge judge.safetensors \\
        --training FOLDER --trigger WORD

The file is read by the tests' own reader, after kohya's rules, and added to the weights of diffusers' pipeline, so that
neither lorakit's adapter nor its exporter judges itself.
"""

import re
import sys
from pathlib import Path

import judge as judges
import numpy as np
import torch
from base_quality import RESULTS, arguments, counted, load_pipeline, sample, sheet, table, write
from demo import emoji
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import readers

STRENGTHS = (0.0, 0.5, 0.7, 0.9, 1.0)
EXAM = 120  # of the held-out subjects, those that LoRAs are judged on


def read_lora(file: Path, pipeline) -> list[tuple[torch.nn.Parameter, Tensor, Tensor]]:
    """What a kohya file changes at strength 1: (weight, its value in the base, what is added to it).

    Raises:
        ValueError: the file holds keys that are none of the base's modules, or no LoRA at all.
    """
    modules = {f"lora_unet_{n.replace('.', '_')}": m for n, m in pipeline.unet.named_modules()}
    for name, module in pipeline.text_encoder.named_modules():
        name = name if name.startswith("text_model.") else f"text_model.{name}"  # newer transformers dropped it
        modules[f"lora_te_{name.replace('.', '_')}"] = module
    updates = readers.updates(file)
    unknown = [name for name in updates if name not in modules]
    if unknown or not updates:
        raise ValueError(
            f"{len(unknown)} of {len(updates)} modules in {file} are not in the base: {', '.join(unknown[:3])} …\n"
            "Measure a LoRA on the base it was trained on, in kohya's format."
        )
    weights = {name: modules[name].weight for name in sorted(updates)}
    return [(w, w.detach().clone(), readers.change(w.detach(), updates[name])) for name, w in weights.items()]


@torch.no_grad()
def set_strength(changes: list, strength: float) -> None:
    """Put base + strength x change into the weights; 0 restores the base exactly."""
    for weight, before, change in changes:
        weight.copy_(before + strength * change)


def trained_on(folder: Path, names: list[str]) -> set[str]:
    """Subjects whose name stands in a training picture's file name or caption.

    Raises:
        ValueError: none does, so held-out subjects cannot be told from the others.
    """
    texts = [file.stem for file in folder.rglob("*") if file.is_file()]
    texts += [file.read_text(encoding="utf-8") for file in [*folder.rglob("*.txt"), *folder.rglob("*.caption")]]
    words = " | ".join(re.sub(r"[\W_]+", " ", text.lower()) for text in texts)
    found = {name for name in names if re.search(rf"(?<!\w){re.escape(name)}s?(?!\w)", words)}
    if not found:
        raise ValueError(
            f"No caption or file name in {folder} names a subject the base knows.\n"
            "Give --training the folder whose pictures the LoRA learned from."
        )
    return found


def held_out(known: list, training: Path, seed: int) -> tuple[list, int, int]:
    """Subjects that the training pictures do not show, in an order drawn from `seed`; how many, and how many they do.

    Whoever searches for a recipe looks at others than the first `EXAM`.
    """
    seen = trained_on(training, [s.name for s in known])
    unseen = [s for s in known if s.name not in seen]
    order = np.random.default_rng(seed).permutation(len(unseen))
    return [unseen[i] for i in order], len(unseen), len(seen)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("lora", type=Path, help="kohya safetensors file")
    parser.add_argument("--trigger", required=True, help="the new style's word: prompts say `WORD style, red apple`")
    parser.add_argument("--training", type=Path, required=True, help="training pictures with captions: left out")
    parser.add_argument("--subjects", type=int, default=EXAM)
    parser.add_argument("--out", type=Path, default=RESULTS / "lora_quality", help="writes OUT.md, OUT.json, OUT.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    judge = judges.load(options.judge)
    sets = emoji.packages(options.icons)
    chosen, unseen, seen = held_out(emoji.subjects(sets), options.training, options.seed)
    chosen = chosen[: options.subjects]
    names, n = [s.name for s in chosen], len(chosen)
    truth = np.stack([emoji.plain(sets[emoji.NEW_STYLE], s.icons[emoji.NEW_STYLE]) for s in chosen])

    pipeline = load_pipeline(options.base, options.scheduler)
    changes = read_lora(options.lora, pipeline)
    draw = lambda prompts: sample(  # noqa: E731
        pipeline, prompts, options.seed, options.steps, options.guidance, options.batch
    )
    bare = draw(names)
    pictures = {}
    for strength in STRENGTHS:
        set_strength(changes, strength)
        pictures[strength] = draw([emoji.caption(name, options.trigger) for name in names])
        print(f"strength {strength} drawn", flush=True)
    set_strength(changes, 0)

    new = judge.style_names.index(judges.NEW)
    right = {s: np.array(names) == np.array(judge.subjects(p)[0]) for s, p in pictures.items()}
    bare_right = np.array(names) == np.array(judge.subjects(bare)[0])
    chances = {s: judge.styles(p) for s, p in pictures.items()}
    called = {s: (c.argmax(1) == new).sum() for s, c in chances.items()}
    scores = {s: float(c[:, new].mean()) for s, c in chances.items()}
    pixels = lambda p: np.sqrt(((p / 255.0 - truth / 255.0) ** 2).mean((1, 2, 3)))  # noqa: E731
    far = {s: (pixels(p), judge.distance(p, truth)) for s, p in pictures.items()}
    rising = list(scores.values()) == sorted(set(scores.values()))
    kept, kept_triggered = (right[1.0] & had for had in (bare_right, right[0.0]))

    bars = [
        ["called the new style at strength 1.0", "≥ 80 %", counted(called[1.0], n), called[1.0] >= 0.8 * n],
        ["called the new style at strength 0", "< 10 %", counted(called[0.0], n), called[0.0] < 0.1 * n],
        [
            "subject kept at 1.0 where the bare base, asked without the trigger, had it", "≥ 80 %",
            counted(kept.sum(), bare_right.sum()), kept.sum() >= 0.8 * bare_right.sum() > 0,
        ],
        [
            "subject kept at 1.0 where strength 0 had it", "",
            counted(kept_triggered.sum(), right[0.0].sum()), "",
        ],
        ["style score rises with strength", "yes", " → ".join(f"{v:.3f}" for v in scores.values()), rising],
    ]  # fmt: skip
    bars = [[*cells, reached if reached == "" else "yes" if reached else "no"] for *cells, reached in bars]
    by_strength = [
        [
            s, counted(called[s], n), f"{scores[s]:.3f}", counted(right[s].sum(), n), f"{far[s][0].mean():.3f}",
            f"{far[s][1].mean():.3f}", f"{(far[s][1] < far[0.0][1]).mean():.0%}",
        ]
        for s in STRENGTHS
    ]  # fmt: skip
    heads = (
        "strength", "called the new style", "style score", "subject right", "pixel RMSE to the true picture",
        "judge's distance to it", "nearer to it than at 0",
    )  # fmt: skip
    votes = {s: np.eye(len(judge.style_names))[c.argmax(1)].mean(0) for s, c in chances.items()}
    shares = [[s, *(f"{share:.0%}" for share in vote)] for s, vote in votes.items()]
    intro = (
        f"{n} subjects of {unseen} that are not among the {seen} in the training pictures; the same noise at"
        f" every strength; prompts like `{emoji.caption(names[0], options.trigger)}`. The bare base, asked for"
        f" `{names[0]}` alone, draws the subject in {counted(bare_right.sum(), n)}.\n"
    )
    grid = [
        [(truth[i], names[i], True)]
        + [(pictures[s][i], f"{s}: {chances[s][i, new]:.2f}", bool(right[s][i])) for s in STRENGTHS]
        for i in range(min(16, n))
    ]
    sheet(Path(f"{options.out}.png"), grid)
    parts = [intro, table(bars, "measure", "bar", "measured", "reached"), table(by_strength, *heads)]
    parts += ["Called, by strength:\n", table(shares, "strength", *judge.style_names)]
    figures = {
        "subjects": n,
        "called": {s: int(v) for s, v in called.items()},
        "scores": scores,
        "right": {s: int(v.sum()) for s, v in right.items()},
        "bare_right": int(bare_right.sum()),
        "kept": int(kept.sum()),
        "pixel_rmse": {s: float(v[0].mean()) for s, v in far.items()},
        "distance": {s: float(v[1].mean()) for s, v in far.items()},
    }
    write(options.out, "What the LoRA does", parts, figures)


if __name__ == "__main__":
    main()
