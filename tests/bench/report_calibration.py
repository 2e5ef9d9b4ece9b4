"""Does the report name the right fault? LoRAs that are known to be good or bad in one way, judged.

    python tests/bench/report_calibration.py WORK [--seeds 0 1 2] [--part 0/2]     train, make the pictures, keep them
    python tests/bench/report_calibration.py WORK --judge judge.safetensors        judge what is kept, write the results

Trains on the embedded base, on styles that neither it nor its eyes ever saw: good runs, and runs with one fault each.
What is finished stays in WORK and is not made again, so that it can be cut, gone on with, and judged anew in seconds
after a change of the report. Half of the styles and seeds are for setting the report's limits; the results are those
of the other half, and of both. The rule that names a fault is `checklist.diagnose`; the first fault named counts. Every
checkpoint's true quality is what judge.py's judge says of held-out subjects beside their true pictures.
"""

import argparse
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import judge as judges
import numpy as np
import taught
from base_quality import RESULTS, counted, table, write
from demo import emoji
from PIL import Image

from lorakit import demo
from lorakit.config import Config
from lorakit.console import Console
from lorakit.evaluate import candidates, checklist, figures, vision
from lorakit.evaluate import pictures as pictures_module
from lorakit.evaluate.pictures import PictureSet, Prompts, ReportOptions
from lorakit.run import run

WRONG = "brumo"  # asked for in place of the trigger
STYLES = ("flat", *taught.AFTER)
TUNE = {("flat", 0), ("mosaic", 1), ("sketch", 0), ("dusk", 1), ("heat", 0)}  # limits are set with these


KINDS = ("good", "undertrained", "overfitted", "learning rate", "leaking")  # and the good one, asked wrongly


def kinds(work: Path, sets: dict, style: str, seed: int) -> dict[str, Config]:
    """Settings of a run with each fault; "good" has none."""
    pictures = taught.dataset(work / "pictures" / style, sets, style)
    few = taught.dataset(work / "few" / style, sets, style, 4, f"{taught.TRIGGER} style")
    unnamed = taught.dataset(work / "unnamed" / style, sets, style, caption="{}")
    good = demo.config(
        dataset=str(pictures), seed=seed, sample_every=10_000, sample_prompts=(f"{taught.TRIGGER} style, pizza",),
        sample_steps=8, steps=250, save_every=50, validation_share=0.1, validate_every=50, save_minutes=0,
        learning_rate=4e-3, text_encoder_rate=4e-3, prior_prediction=True, prior_weight=0.5,
        regularisation=str(taught.others(work / "class", sets)),
    )  # fmt: skip
    alone = good.with_(regularisation=None, prior_prediction=False)
    ever = {"schedule": "constant_with_warmup"}
    return {
        "good": good,
        "undertrained": good.with_(learning_rate=2e-3, text_encoder_rate=2e-3, steps=60, save_every=30,
                                   validate_every=30),
        "overfitted": alone.with_(dataset=str(few), validation_share=0, steps=240, save_every=60, **ever),
        "learning rate": good.with_(learning_rate=2e-2, text_encoder_rate=2e-2, max_grad_norm=0, steps=60,
                                    save_every=20, validate_every=20, warmup_steps=5, **ever),
        "leaking": alone.with_(dataset=str(unnamed), learning_rate=2e-3, text_encoder_rate=0.0, steps=120,
                               save_every=30, validate_every=30),
    }  # fmt: skip


# ── Pictures, kept ──────────────────────────────────────────────────────────────────────────────────────────────────

# name in files → field
COLUMNS = {"shown": "strengths", "second": "reseeded", "bare": "untriggered", "unrelated": "unrelated"}


def keep(made: PictureSet, file: Path, fault: str, held: dict[str, np.ndarray]) -> None:
    """Write what was made as arrays, with all else as JSON; `held` as it is."""
    stacked = lambda column: np.stack([np.asarray(picture) for picture in column]) if column else np.zeros(0)  # noqa: E731
    arrays = {f"{key} {i}": stacked(c) for key, name in COLUMNS.items() for i, c in enumerate(getattr(made, name))}
    arrays |= {f"step {step}": stacked(column) for step, column in made.checkpoints.items()}
    arrays |= {"training": stacked(made.training)} | {f"held {name}": pictures for name, pictures in held.items()}
    facts = {name: getattr(made, name) for name in ("name", "trigger", "kind", "base", "losses", "gap", "best")}
    facts |= {"asked": asdict(made.prompts), "fault": fault}
    partial = file.with_suffix(".partial")
    with partial.open("wb") as handle:
        np.savez_compressed(handle, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **arrays)
    partial.rename(file)


def kept(file: Path) -> tuple[PictureSet, str, dict[str, np.ndarray]]:
    """What `keep` wrote: the pictures, the fault they were made with, those of held-out subjects."""
    with np.load(file) as arrays:
        facts = json.loads(bytes(arrays["facts"]))
        column = lambda name: [Image.fromarray(one) for one in arrays[name]] if arrays[name].ndim == 4 else []  # noqa: E731
        number = lambda name: sum(key.startswith(f"{name} ") for key in arrays.files)  # noqa: E731
        columns = {name: [column(f"{key} {i}") for i in range(number(key))] for key, name in COLUMNS.items()}
        steps = {int(key[5:]): column(key) for key in arrays.files if key.startswith("step ")}
        training = column("training")
        held = {key[5:]: arrays[key] for key in arrays.files if key.startswith("held ")}
    fault, prompts = facts.pop("fault"), Prompts(*facts.pop("asked").values())
    facts["losses"] = {int(step): loss for step, loss in facts["losses"].items()}
    facts["best"] = facts["best"] and tuple(facts["best"])
    return PictureSet(**facts, prompts=prompts, **columns, training=training, checkpoints=steps), fault, held


def make(work: Path, icons: Path, seeds: list[int], styles: list[str], part: str) -> None:
    sets, known = emoji.packages(icons), {}
    names, icon_names = zip(*taught.held_out(sets), strict=True)
    (work / "made").mkdir(parents=True, exist_ok=True)
    place, of = map(int, part.split("/"))
    wanted = [(style, seed, fault) for seed in seeds for style in styles for fault in KINDS]
    for style, seed, fault in wanted[place::of]:
        true = np.stack([taught.drawn(sets, style, icon) for icon in icon_names])
        config = kinds(work, sets, style, seed)[fault]
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
        made = pictures_module.make_pictures(
            done.folder, ReportOptions(checkpoints=4), known=known, console=Console.quiet()
        )
        paths = candidates.find_candidates(done.folder).paths
        steps = {str(step): paths[label] for label in paths if (step := int(label.split()[-1])) in made.checkpoints}
        held = taught.pictures(steps, list(names), known, config.sample_steps, config.sample_guidance)
        keep(made, file, fault, {"true": true, **held})
        if fault == "good":
            asked = pictures_module.make_pictures(
                done.folder, ReportOptions(WRONG, checkpoints=1), known=known, console=Console.quiet()
            )
            keep(replace(asked, name=f"{made.name} asked as {WRONG}"), wrong, "wrong trigger", {})
        shutil.rmtree(folder / "cache", ignore_errors=True)
        print(f"{file.stem}: made", flush=True)


def judged(work: Path, judge: judges.Judge) -> list[dict]:
    model, found = vision.open("demo"), []
    for file in sorted((work / "made").glob("*.npz")):
        made, fault, held = kept(file)
        style, seed = file.stem.split(" ")[:2]
        measured, _ = figures.measure(made, figures.Vectors.of(made, model))
        facts = checklist.judge(made, model).facts()
        true, plain = (held.pop(name, None) for name in ("true", "base"))
        found.append({
            "run": file.stem, "fault": fault, "named": (facts["faults"] or ["good"])[0], "all": facts["faults"],
            "half": "tune" if (style, int(seed)) in TUNE else "test", "recommended": facts["recommended"],
            "quality": {step: round(taught.quality(judge, made, plain, true), 4) for step, made in held.items()},
            "figures": {name: round(value, 4) for name, value in measured.items()}, "marks": facts["checkpoints"],
        })  # fmt: skip
    return found


def named(found: list[dict]) -> list[list]:
    """Rows: how many of each kind are named so."""
    rows = []
    for fault in dict.fromkeys(one["fault"] for one in found):
        own = [one for one in found if one["fault"] == fault]
        right = sum(one["named"] == fault for one in own)
        otherwise = ", ".join(sorted({one["named"] for one in own} - {fault}))
        rows.append([fault, counted(right, len(own)), otherwise])
    faulty = [one for one in found if one["fault"] != "good"]
    right = sum(one["named"] == one["fault"] for one in faulty)
    return [*rows, ["all with a fault", counted(right, len(faulty)), ""]]


def recommended(found: list[dict]) -> list[list]:
    """Rows: how often the recommended checkpoint is, by true quality, within 5 % of the best, in which kinds."""
    rows = []
    chosen = [one for one in found if len(one["quality"]) > 1 and max(one["quality"].values()) > WORTH]
    for fault in ("", *dict.fromkeys(one["fault"] for one in chosen)):
        own = [one for one in chosen if one["fault"].startswith(fault)]
        share = lambda pick, own=own: counted(  # noqa: E731
            sum((value := pick(one)) is not None and value >= 0.95 * max(one["quality"].values()) for one in own),
            len(own),
        )
        rows.append([
            fault or "all", share(lambda one: one["quality"].get((one["recommended"] or "").rpartition(" ")[2])),
            share(lambda one: list(one["quality"].values())[-1]),
            share(by_loss),
        ])  # fmt: skip
    return rows


def by_loss(one: dict) -> float | None:
    """True quality of the checkpoint with the lowest validation loss."""
    marks = [mark for mark in one["marks"] if mark["validation_loss"] is not None]
    return one["quality"][str(min(marks, key=lambda mark: mark["validation_loss"])["step"])] if marks else None


WORTH = 0.1  # true quality from which a run has a checkpoint to keep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--icons", type=Path, default=Path("~/.cache/lorakit/icons").expanduser())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--styles", nargs="+", default=STYLES)
    parser.add_argument("--part", default="0/1", help="which of how many programs at once this is")
    parser.add_argument("--judge", type=Path, help="judge what is kept, with what judge.py wrote")
    parser.add_argument("--out", type=Path, default=RESULTS / "report_calibration")
    options = parser.parse_args()
    if not options.judge:
        make(options.work, options.icons, options.seeds, list(options.styles), options.part)
        return
    found = judged(options.work, judges.load(options.judge))
    parts = []
    for title, half in (("The half that the limits were not set with", "test"), ("All", "")):
        own = [one for one in found if one["half"].startswith(half)]
        parts += [f"{title}:\n", table(named(own), "made to be", "named so", "else named")]
    heads = ("made to be", "the recommended checkpoint", "the last", "the lowest validation loss")
    parts += [f"Within 5 % of the best checkpoint's true quality, of runs where that is {WORTH} and more:\n",
              table(recommended(found), *heads)]  # fmt: skip
    write(options.out, "Does the report name the right fault?", parts, {"runs": found})


if __name__ == "__main__":
    main()
