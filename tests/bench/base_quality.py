"""Measure the embedded base: does it draw what it is asked for, does its autoencoder hold, is it quick?

    python tests/bench/base_quality.py BASE --icons ICONS --judge judge.safetensors

Samples with diffusers' own pipeline and asks the judge (judge.py), so nothing of lorakit's sampling is involved.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import diffusers
import judge as judges
import numpy as np
import torch
from demo import emoji
from demo.pretrain import CHANNELS_LAST, generator
from PIL import Image, ImageDraw

RESULTS = Path(__file__).parent / "results"
SCHEDULERS = {"ddim": diffusers.DDIMScheduler, "dpm": diffusers.DPMSolverMultistepScheduler}


def load_pipeline(base: Path, scheduler: str):
    """The base as diffusers runs it: the shipped weights, computed in fp32."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, safety_checker=None)
    pipeline.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=CHANNELS_LAST)
    pipeline.vae.to(memory_format=CHANNELS_LAST)
    return pipeline


def sample(pipeline, prompts: list[str], seed: int, steps: int, guidance: float, batch: int) -> np.ndarray:
    """One picture a prompt, the i-th from noise that (seed, i) alone decides. RGB (N, 64, 64, 3), uint8."""
    cells = pipeline.unet.config.sample_size
    pictures = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        noise = [torch.randn(4, cells, cells, generator=generator(seed, start + i)) for i in range(len(some))]
        drawn = pipeline(
            some, latents=torch.stack(noise), num_inference_steps=steps, guidance_scale=guidance, output_type="np"
        )
        pictures.append((drawn.images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share. Source: Wilson 1927, JASA 22(158)."""
    if not total:
        return 0.0, 1.0
    share, spread = hits / total, z * z / total
    middle = share + spread / 2
    half = (spread * (share * (1 - share) + spread / 4)) ** 0.5
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)


def counted(hits, total: int) -> str:
    """`91.0 % (87.2–93.7 %, 273/300)`."""
    low, high = wilson(int(hits), total)
    return f"{hits / max(total, 1):.1%} ({low:.1%}–{high:.1%}, {int(hits)}/{total})"


def table(rows: list, *heads: str) -> str:
    """Rows of cells as a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def write(stem: Path, title: str, parts: list[str], figures: dict) -> None:
    """Print the report and write it as STEM.md, and the figures as STEM.json, with the command that made them."""
    # Folders of this machine are nobody's business, and not where the reader's are.
    command = shlex.join(["python", *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv)])
    made = f"`{command}` with torch {torch.__version__}, diffusers {diffusers.__version__}"
    report = "\n".join([f"# {title}\n", made + "\n", *parts])
    print("\n" + report)
    stem.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.md").write_text(report, encoding="utf-8")
    Path(f"{stem}.json").write_text(json.dumps({"command": command, **figures}, indent=1) + "\n")


def sheet(file: Path, cells: list[list[tuple[np.ndarray, str, bool]]], scale: int = 2) -> None:
    """Pictures in a grid, each with a line below it; the line is red where `fine` is False."""
    side, line = emoji.SIZE * scale, 14
    image = Image.new("RGB", (side * max(map(len, cells)), (side + line) * len(cells)), "white")
    pen = ImageDraw.Draw(image)
    for y, row in enumerate(cells):
        for x, (picture, words, fine) in enumerate(row):
            at = (x * side, y * (side + line))
            image.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), at)
            pen.text((at[0] + 2, at[1] + side), words[: side // 6], "black" if fine else "red")
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def measure_samples(pipeline, judge, subjects: list, options) -> tuple[list, list[str], dict]:
    """Ask for subjects in styles, and the judge what came. Returns rows of the table, further text, figures."""
    pairs = [(s.name, style) for s in subjects for style, package in emoji.STYLES.items() if package in s.icons]
    picks = np.random.default_rng(options.seed).choice(len(pairs), min(options.samples, len(pairs)), replace=False)
    asked = [pairs[i] for i in picks]
    prompts = [emoji.caption(name, style) for name, style in asked]
    pictures = sample(pipeline, prompts, options.seed, options.steps, options.guidance, options.batch)
    seen, _ = judge.subjects(pictures)
    chances = judge.styles(pictures)
    called = [judge.style_names[i] for i in chances[:, : len(emoji.STYLES)].argmax(1)]
    flat = (chances.argmax(1) == judge.style_names.index(judges.NEW)).sum()
    right = np.array([a == b for (a, _), b in zip(asked, seen, strict=True)])
    fitting = np.array([a == b for (_, a), b in zip(asked, called, strict=True)])
    per_style = []
    for style in emoji.STYLES:
        of = np.array([wanted == style for _, wanted in asked])
        share = [f"{np.mean([c == other for c in np.array(called)[of]]):.0%}" for other in emoji.STYLES]
        per_style.append([style, counted(right[of].sum(), of.sum()), counted(fitting[of].sum(), of.sum()), *share])
    grid = [
        (picture, f"{style[:2]} {name}", bool(r and f))
        for picture, (name, style), r, f in zip(pictures, asked, right, fitting, strict=True)
    ][:60]
    sheet(Path(f"{options.out}.png"), [grid[i : i + 10] for i in range(0, len(grid), 10)])
    n = len(asked)
    rows = [
        ["subject nearest to the one asked for", "≥ 90 %", counted(right.sum(), n), right.mean() >= 0.9],
        ["style, of the four, is the one asked for", "≥ 95 %", counted(fitting.sum(), n), fitting.mean() >= 0.95],
    ]
    text = [f"{n} samples drawn from {len(pairs)} pairs of {len(subjects)} subjects and {len(emoji.STYLES)} styles.\n"]
    text += [table(per_style, "asked", "subject right", "style right", *(f"called {style}" for style in emoji.STYLES))]
    text += [f"{flat} of {n} samples look most like the fifth style, {judges.NEW}, which the base never saw.\n"]
    wrong = [
        [f"{style} {name}", f"{c} {s}"]
        for (name, style), s, c, r, f in zip(asked, seen, called, right, fitting, strict=True)
        if not (r and f)
    ]
    text += ["Not as asked:\n", table(wrong, "asked", "called")]
    figures = {"samples": n, "subject": right.mean(), "style": fitting.mean(), "called_new_style": int(flat)}
    return rows, text, figures


def measure_autoencoder(vae, sets: dict, count: int = 300) -> tuple[list, list[str], dict]:
    """PSNR in dB of plain pictures in styles the autoencoder never saw: the mean over pictures, then over styles."""
    figures = {}
    for package in emoji.UNSEEN:
        names = sorted({name for code, name in sets[package]["chars"].items() if emoji.allowed(code)})
        names = np.random.default_rng(0).permutation(names)[:count]
        pictures = np.stack([emoji.plain(sets[package], str(name)) for name in names])
        decibels = []
        for some in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(50):
            x = (some.float() / 127.5 - 1).contiguous(memory_format=CHANNELS_LAST)
            with torch.inference_mode():
                y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
            decibels.append(-10 * torch.log10(((x - y) / 2).square().mean((1, 2, 3))))
        figures[package] = float(torch.cat(decibels).mean())
    mean = float(np.mean(list(figures.values())))
    text = [table([[p, f"{v:.2f}"] for p, v in figures.items()], "style never seen", "PSNR, dB")]
    return [["PSNR of pictures in unseen styles", "≥ 26 dB", f"{mean:.2f} dB", mean >= 26]], text, {"psnr": figures}


def measure_seconds(pipeline, options) -> tuple[list, list[str], dict]:
    """Time one picture from prompt to pixels, the median of five after a warm-up."""
    times = []
    for i in range(6):
        began = time.perf_counter()
        sample(pipeline, ["noto style, red apple"], i, options.steps, options.guidance, 1)
        times.append(time.perf_counter() - began)
    median = statistics.median(times[1:])
    spread = f"{median:.2f} s ({min(times[1:]):.2f}–{max(times[1:]):.2f})"
    what = f"{options.steps} steps of one picture, {torch.get_num_threads()} threads"
    return [[what, "< 1.5 s", spread, median < 1.5]], [], {"seconds": median}


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that both measurements of a base share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="diffusers folder")
    parser.add_argument("--icons", type=Path, default=Path("~/.cache/lorakit/icons").expanduser(), help="icon sets")
    parser.add_argument("--judge", type=Path, default=Path("judge.safetensors"), help="what judge.py wrote")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="ddim")
    parser.add_argument("--batch", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=RESULTS / "base_quality", help="writes OUT.md, OUT.json, OUT.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline = load_pipeline(options.base, options.scheduler)
    sets = emoji.packages(options.icons)
    rows, texts, figures = [], [], {}
    for part in options.parts:
        if part == "samples":
            got = measure_samples(pipeline, judges.load(options.judge), emoji.subjects(sets), options)
        elif part == "autoencoder":
            got = measure_autoencoder(pipeline.vae, sets)
        else:
            got = measure_seconds(pipeline, options)
        rows += got[0]
        texts += got[1]
        figures |= got[2]
    rows = [[*cells, "yes" if reached else "no"] for *cells, reached in rows]
    write(options.out, "The embedded base", [table(rows, "measure", "bar", "measured", "reached"), *texts], figures)


PARTS = ("samples", "autoencoder", "seconds")

if __name__ == "__main__":
    main()
