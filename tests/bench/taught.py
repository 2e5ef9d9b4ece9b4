"""Styles that neither the embedded base nor its eyes ever saw: pictures to teach, and the truth about what was learned.

What a LoRA makes of subjects that it was not taught is laid beside the true pictures of these subjects in its style,
which the icon sets hold. So its quality is known without anything of lorakit's report.
"""

import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from demo import emoji
from judge import Judge
from PIL import Image

from lorakit import demo
from lorakit.base import model
from lorakit.device import Compute
from lorakit.evaluate import pictures as report_pictures
from lorakit.evaluate import variants
from lorakit.sample import Sampling

TRIGGER = "flatto"
SETS = {"flat": emoji.NEW_STYLE, "twemoji": "twemoji", "openmoji": "openmoji"}
AFTER = ("mosaic", "sketch", "dusk", "heat")  # drawn after the first one's pictures
HELD, SEED = 16, 5000  # subjects that the truth is told by, and the first one's noise


def drawn(sets: dict, style: str, icon: str) -> np.ndarray | None:
    """A subject, by its name in the demo's set, in a style: RGB (64, 64, 3), uint8; None where it is not drawn."""
    package = sets[SETS.get(style, emoji.NEW_STYLE)]
    codes = {own: code for code, own in sets[emoji.NEW_STYLE]["chars"].items()}
    icon = {code: own for code, own in package["chars"].items()}.get(codes.get(icon, ""), icon)
    if icon not in package["icons"]:
        return None
    picture = emoji.plain(package, icon)
    grey = picture.astype(np.float32).mean(2)
    if style == "mosaic":  # squares of four pixels
        tiles = np.asarray(Image.fromarray(picture).resize((16, 16), Image.Resampling.BOX))
        picture = tiles.repeat(4, 0).repeat(4, 1)
    elif style == "sketch":  # white lines on blue, as a blueprint
        edges = np.hypot(*np.gradient(grey)).clip(0, 60)[..., None] / 60
        picture = (np.array([30, 70, 150]) * (1 - edges) + 245 * edges).astype(np.uint8)
    elif style == "dusk":  # in violet light
        picture = (picture * np.array([0.55, 0.35, 0.65])).astype(np.uint8)
    elif style == "heat":  # lightness as a thermal camera shows it
        palette = np.array([[20, 10, 80], [160, 20, 120], [240, 90, 40], [255, 220, 90]])
        picture = np.stack([np.interp(grey, np.linspace(0, 255, 4), of) for of in palette.T], 2).astype(np.uint8)
    return picture


def dataset(folder: Path, sets: dict, style: str, count: int = 30, caption: str = f"{TRIGGER} style, {{}}") -> Path:
    """Pictures of the demo's subjects in a style; `caption` has the subject in place of its braces."""
    place = folder / f"10_{TRIGGER}"
    if place.exists():
        return folder
    partial = folder.with_suffix(f".{os.getpid()}") / place.name
    partial.mkdir(parents=True)
    for file in sorted(demo.PICTURES.rglob("*.png")):
        if len(list(partial.glob("*.png"))) == count:
            break
        if (picture := drawn(sets, style, file.stem)) is None:
            continue
        Image.fromarray(picture).save(partial / f"{file.stem}.png")
        (partial / f"{file.stem}.txt").write_text(caption.format(file.stem.replace("-", " ")))
    return _placed(partial.parent, folder)


def _placed(partial: Path, folder: Path) -> Path:
    """Put what is whole where it belongs, unless a program beside this one was faster."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(partial)
    return folder


def others(folder: Path, sets: dict) -> Path:
    """Regularisation pictures: what the base knows, with its own words, with words it does not know, with none."""
    if folder.exists():
        return folder
    partial = folder.with_suffix(f".{os.getpid()}") / "1_class"
    partial.mkdir(parents=True)
    subjects, random = emoji.subjects(sets), np.random.default_rng(5)
    unknown = ("zorvex", "marlin", "quib")
    for number in range(60):
        subject, style = subjects[int(random.integers(len(subjects)))], list(emoji.STYLES)[number % 3]
        picture = emoji.plain(sets[emoji.STYLES[style]], subject.icons[emoji.STYLES[style]])
        Image.fromarray(picture).save(partial / f"{number:02d}.png")
        word = (None, unknown[number % 3], None, style)[number % 4]
        (partial / f"{number:02d}.txt").write_text(emoji.caption(subject.name, word))
    return _placed(partial.parent, folder)


def held_out(sets: dict, but: Collection[str] = ()) -> list[tuple[str, str]]:
    """Subjects that all styles draw, in no training picture, asked for by no report and not in `but`: (name, icon)."""
    taught = {file.stem for file in demo.PICTURES.rglob("*.png")}
    found = [
        (subject.name, icon)
        for subject in emoji.subjects(sets)
        if (icon := subject.icons[emoji.NEW_STYLE]) not in taught
        and subject.name not in {*report_pictures.SUBJECTS, *but}
        and all(drawn(sets, style, icon) is not None for style in SETS)
    ]
    return [found[i] for i in np.random.default_rng(8).permutation(len(found))[:HELD]]


def pictures(
    files: Mapping[str, Path],
    names: list[str],
    known: report_pictures.Known,
    steps: int,
    guidance: float,
    word: str = TRIGGER,
) -> dict[str, np.ndarray]:
    """What the bare base ("base") and LoRAs make of subjects, (N, 64, 64, 3) each, all from the same noise.

    Args:
        known: the bare base's pictures by prompt and seed, as `make_pictures` takes them.
        word: of the style; "" asks for the subject alone.
    """
    base = model.open("demo")
    rows = [(emoji.caption(name, word), SEED + row) for row, name in enumerate(names)]
    columns = [variants.BARE, *((label, 1.0) for label in files)]
    grid = {(row, variants.BARE): known[key] for row, key in enumerate(rows) if key in known}
    cells = {(row, column) for row in range(len(names)) for column in columns} - grid.keys()
    sampling = Sampling(steps=steps, guidance=guidance, size=(emoji.SIZE, emoji.SIZE))
    ways = variants.make_variants(base, columns, files)
    compute = replace(Compute.choose(), batch=8)
    grid |= variants.make_grid(base, rows, ways, sampling, compute=compute, cells=cells)
    known |= {rows[row]: picture for (row, column), picture in grid.items() if column == variants.BARE}
    stacked = lambda column: np.stack([np.asarray(grid[row, column]) for row in range(len(names))])  # noqa: E731
    return {column[0] or "base": stacked(column) for column in columns}


def quality(judge: Judge, made: np.ndarray, plain: np.ndarray, true: np.ndarray) -> float:
    """How much of the bare base's distance to the true pictures is gone: 0 none, 1 all; the judge measures it."""
    return float(1 - judge.distance(made, true).mean() / judge.distance(plain, true).mean())
