"""Does the report name the right fault? LoRAs that are known to be good or bad in one way, judged.

    python tests/bench/report_calibration.py WORK [--seeds 0 1 2] [--part 0/2]     train, make the pictures, keep them
    python tests/bench/report_calibration.py WORK --judge                          judge what is kept, write the results

Trains on the embedded base, on styles that neither it nor its eyes ever saw: good runs, and runs with one fault each.
What is finished stays in WORK and is not made again, so that it can be cut, gone on with, and judged anew in seconds
after a change of the report. Half of the styles and seeds are for setting the report's limits; the results are those
of the other half, and of both. The rule that names a fault is `report.diagnose`; the first fault named counts.
"""

import argparse
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from base_quality import RESULTS, counted, table, write
from PIL import Image

from lorakit import demo, eyes, report, run
from lorakit.config import Config
from lorakit.demo import emoji

TRIGGER, WRONG = "flatto", "brumo"
SETS = {"flat": emoji.NEW_STYLE, "twemoji": "twemoji", "openmoji": "openmoji"}
STYLES = (*SETS, "mosaic", "sketch")  # the last two are drawn after another one's pictures
TUNE = {("flat", 0), ("twemoji", 1), ("openmoji", 0), ("mosaic", 1), ("sketch", 0)}  # limits are set with these


def drawn(sets: dict, style: str, name: str) -> np.ndarray | None:
    """A subject of the demo's, by its name there, in a style: RGB (64, 64, 3), uint8; None where it is not drawn."""
    package = sets[SETS.get(style, emoji.NEW_STYLE)]
    codes = {own: code for code, own in sets[emoji.NEW_STYLE]["chars"].items()}
    icon = {code: own for code, own in package["chars"].items()}.get(codes.get(name, ""), name)
    if icon not in package["icons"]:
        return None
    picture = emoji.plain(package, icon)
    if style == "mosaic":  # tiles of eight pixels with dark joints
        tiles = np.asarray(Image.fromarray(picture).resize((16, 16), Image.Resampling.BOX))
        picture = tiles.repeat(4, 0).repeat(4, 1)
        picture[::4] //= 2
        picture[:, ::4] //= 2
    elif style == "sketch":  # white lines on blue, as a blueprint
        grey = picture.astype(np.float32).mean(2)
        edges = np.hypot(*np.gradient(grey)).clip(0, 60)[..., None] / 60
        picture = (np.array([30, 70, 150]) * (1 - edges) + 245 * edges).astype(np.uint8)
    return picture


def dataset(folder: Path, sets: dict, style: str, count: int, named: bool = True) -> Path:
    """Pictures of the demo's subjects in a style, with captions as the demo has them, or without the trigger."""
    place = folder / f"10_{TRIGGER}"
    if place.exists():
        return folder
    partial = folder.with_suffix(".partial") / place.name
    partial.mkdir(parents=True, exist_ok=True)
    for file in sorted(demo.PICTURES.rglob("*.png")):
        if len(list(partial.glob("*.png"))) == count:
            break
        if (picture := drawn(sets, style, file.stem)) is None:
            continue
        Image.fromarray(picture).save(partial / f"{file.stem}.png")
        subject = file.stem.replace("-", " ")
        (partial / f"{file.stem}.txt").write_text(f"{TRIGGER} style, {subject}" if named else subject)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.parent.rename(folder)
    return folder


def others(folder: Path, sets: dict) -> Path:
    """Regularisation pictures: what the base knows, with its own words, with words it does not know, with none."""
    if folder.exists():
        return folder
    partial = folder.with_suffix(".partial") / "1_class"
    partial.mkdir(parents=True, exist_ok=True)
    subjects, random = emoji.subjects(sets), np.random.default_rng(5)
    unknown = ("zorvex", "marlin", "quib")
    for number in range(60):
        subject, style = subjects[int(random.integers(len(subjects)))], list(emoji.STYLES)[number % 3]
        picture = emoji.plain(sets[emoji.STYLES[style]], subject.icons[emoji.STYLES[style]])
        Image.fromarray(picture).save(partial / f"{number:02d}.png")
        word = (None, unknown[number % 3], None, style)[number % 4]
        (partial / f"{number:02d}.txt").write_text(emoji.caption(subject.name, word))
    partial.parent.rename(folder)
    return folder


def kinds(work: Path, sets: dict, style: str, seed: int) -> dict[str, Config]:
    """Settings of a run with each fault; "good" has none."""
    pictures = dataset(work / "pictures" / style, sets, style, 30)
    few = dataset(work / "few" / style, sets, style, 5)
    unnamed = dataset(work / "unnamed" / style, sets, style, 30, named=False)
    good = demo.config(
        dataset=str(pictures), seed=seed, sample_every=10_000, sample_prompts=(f"{TRIGGER} style, pizza",),
        sample_steps=12, steps=320, save_every=80, validation_share=0.1, validate_every=80, save_minutes=0,
        learning_rate=2e-3, text_encoder_rate=2e-3, prior_prediction=True, prior_weight=0.5,
        regularisation=str(others(work / "class", sets)),
    )  # fmt: skip
    alone = good.with_(regularisation=None, prior_prediction=False)
    ever = {"schedule": "constant_with_warmup", "warmup_steps": 5}
    return {
        "good": good,
        "undertrained": good.with_(steps=60, save_every=30, validate_every=30, warmup_steps=5),
        "overfitted": good.with_(dataset=str(few), validation_share=0.2, learning_rate=3e-3, steps=480, save_every=120,
                                 validate_every=120, **ever),
        "learning rate": good.with_(learning_rate=2e-2, text_encoder_rate=2e-2, max_grad_norm=0, steps=80,
                                    save_every=20, validate_every=20, **ever),
        "leaking": alone.with_(dataset=str(unnamed), text_encoder_rate=0.0, steps=220, save_every=55,
                               validate_every=55),
    }  # fmt: skip


# ── Pictures, kept ──────────────────────────────────────────────────────────────────────────────────────────────────

COLUMNS = ("shown", "second", "bare", "unrelated")


def keep(made: report.Made, file: Path, fault: str) -> None:
    """Write what was made as arrays, with all else as JSON."""
    stacked = lambda column: np.stack([np.asarray(picture) for picture in column]) if column else np.zeros(0)  # noqa: E731
    arrays = {f"{name} {i}": stacked(c) for name in COLUMNS for i, c in enumerate(getattr(made, name))}
    arrays |= {f"step {step}": stacked(column) for step, column in made.checkpoints.items()}
    arrays |= {"training": stacked(made.training)}
    facts = {name: getattr(made, name) for name in ("name", "trigger", "kind", "base", "losses", "gap", "best")}
    facts |= {"asked": asdict(made.asked), "fault": fault}
    partial = file.with_suffix(".partial")
    with partial.open("wb") as handle:
        np.savez_compressed(handle, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **arrays)
    partial.rename(file)


def kept(file: Path) -> tuple[report.Made, str]:
    """What `keep` wrote, and the fault it was made with."""
    with np.load(file) as arrays:
        facts = json.loads(bytes(arrays["facts"]))
        column = lambda name: [Image.fromarray(one) for one in arrays[name]] if arrays[name].ndim == 4 else []  # noqa: E731
        number = lambda name: sum(key.startswith(f"{name} ") for key in arrays.files)  # noqa: E731
        columns = {name: [column(f"{name} {i}") for i in range(number(name))] for name in COLUMNS}
        steps = {int(key[5:]): column(key) for key in arrays.files if key.startswith("step ")}
        training = column("training")
    fault, asked = facts.pop("fault"), report.Asked(**facts.pop("asked"))
    facts["losses"] = {int(step): loss for step, loss in facts["losses"].items()}
    facts["best"] = facts["best"] and tuple(facts["best"])
    return report.Made(**facts, asked=asked, **columns, training=training, checkpoints=steps), fault


def make(work: Path, icons: Path, seeds: list[int], styles: list[str], part: str) -> None:
    sets, known = emoji.packages(icons), {}
    (work / "made").mkdir(parents=True, exist_ok=True)
    place, of = map(int, part.split("/"))
    pairs = [(style, seed) for seed in seeds for style in styles][place::of]
    for style, seed in pairs:
        for fault, config in kinds(work, sets, style, seed).items():
            file = work / "made" / f"{style} {seed} {fault}.npz"
            wrong = work / "made" / f"{style} {seed} wrong trigger.npz"
            if file.exists() and (fault != "good" or wrong.exists()):
                continue
            folder = work / "runs" / file.stem
            quiet = {"say": lambda _: None}
            try:
                done = run.start(config, folder, progress=False, **quiet)
            except FloatingPointError as error:  # given up by the run itself
                print(f"{file.stem}: {error}", flush=True)
                continue
            made = report.make(done.folder, most=4, known=known, **quiet)
            keep(made, file, fault)
            if fault == "good":
                asked = report.make(done.folder, most=1, trigger=WRONG, known=known, **quiet)
                keep(replace(asked, name=f"{made.name} asked as {WRONG}"), wrong, "wrong trigger")
            shutil.rmtree(folder / "cache", ignore_errors=True)
            print(f"{file.stem}: made", flush=True)


def judged(work: Path) -> list[dict]:
    seeing, found = eyes.open("demo"), []
    for file in sorted((work / "made").glob("*.npz")):
        made, fault = kept(file)
        style, seed = file.stem.split(" ")[:2]
        figures, _ = report._figures(made, seeing)
        facts = report.judge(made, seeing).facts()
        found.append({
            "run": file.stem, "fault": fault, "named": (facts["faults"] or ["good"])[0], "all": facts["faults"],
            "half": "tune" if (style, int(seed)) in TUNE else "test", "recommended": facts["recommended"],
            "figures": {name: round(value, 4) for name, value in figures.items()},
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--icons", type=Path, default=Path("~/.cache/lorakit/icons").expanduser())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--styles", nargs="+", default=STYLES)
    parser.add_argument("--part", default="0/1", help="which of how many programs at once this is")
    parser.add_argument("--judge", action="store_true", help="judge what is kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "report_calibration")
    options = parser.parse_args()
    if not options.judge:
        make(options.work, options.icons, options.seeds, list(options.styles), options.part)
        return
    found = judged(options.work)
    parts = []
    for title, half in (("The half that the limits were not set with", "test"), ("All", "")):
        rows = []
        for fault in dict.fromkeys(one["fault"] for one in found):
            own = [one for one in found if one["fault"] == fault and one["half"].startswith(half)]
            right = sum(one["named"] == fault for one in own)
            otherwise = ", ".join(sorted({one["named"] for one in own} - {fault}))
            rows.append([fault, counted(right, len(own)) if own else "none", otherwise])
        parts += [f"{title}:\n", table(rows, "made to be", "named so", "else named")]
    write(options.out, "Does the report name the right fault?", parts, {"runs": found})


if __name__ == "__main__":
    main()
