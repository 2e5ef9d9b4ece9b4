"""Does the report name the right fault? LoRAs that are known to be good or bad in one way, judged.

    python tests/bench/report_calibration.py WORK [--seeds 0 1] [--styles fluent-emoji-flat twemoji openmoji]

Trains on the embedded base: good runs, and runs with one fault each, over styles that the base never saw and over
seeds. What is finished is kept in WORK and not made again, so that it can be cut and gone on with. The rule that names
a fault is `report.diagnose`; the first fault named counts.
"""

import argparse
import json
import shutil
from pathlib import Path

from base_quality import RESULTS, counted, table, write

from lorakit import demo, report, run
from lorakit.config import Config
from lorakit.demo import emoji

STYLES = ("fluent-emoji-flat", "twemoji", "openmoji")
TRIGGER = "flatto"


def dataset(folder: Path, icons: Path, style: str, count: int, named: bool = True) -> Path:
    """Pictures of the demo's subjects in a style, with captions as the demo has them, or without the trigger."""
    place = folder / f"10_{TRIGGER}"
    if place.exists():
        return folder
    sets = emoji.packages(icons)
    codes = {name: code for code, name in sets[emoji.NEW_STYLE]["chars"].items()}
    by_code = {code: name for code, name in sets[style]["chars"].items()}
    partial = folder.with_suffix(".partial") / place.name
    partial.mkdir(parents=True, exist_ok=True)
    made = 0
    for file in sorted(demo.PICTURES.rglob("*.png")):
        icon = by_code.get(codes.get(file.stem, ""), file.stem)
        if icon not in sets[style]["icons"] or made == count:
            continue
        made += 1
        from PIL import Image

        Image.fromarray(emoji.plain(sets[style], icon)).save(partial / f"{file.stem}.png")
        subject = file.stem.replace("-", " ")
        (partial / f"{file.stem}.txt").write_text(f"{TRIGGER} style, {subject}" if named else subject)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.parent.rename(folder)
    return folder


def kinds(work: Path, icons: Path, style: str, seed: int) -> dict[str, tuple[Config, dict]]:
    """Name → settings of a run with that fault, and what the report is told besides. "good" has none."""
    pictures = dataset(work / "pictures" / style, icons, style, 30)
    few = dataset(work / "few" / style, icons, style, 5)
    unnamed = dataset(work / "unnamed" / style, icons, style, 30, named=False)
    usual = demo.config(
        dataset=str(pictures), seed=seed, sample_every=10_000, sample_prompts=(f"{TRIGGER} style, pizza",),
        sample_steps=20, save_every=75, steps=300, validation_share=0.1, validate_every=25,
    )  # fmt: skip
    return {
        "good": (usual, {}),
        "undertrained": (usual.with_(steps=15, save_every=15, warmup_steps=5), {}),
        "overfitted": (usual.with_(dataset=str(few), steps=700, validation_share=0.0, learning_rate=2e-3), {}),
        "wrong trigger": (usual, {"trigger": "zorvex"}),
        "learning rate": (usual.with_(learning_rate=3e-2, max_grad_norm=0, schedule="constant_with_warmup"), {}),
        "leaking": (usual.with_(dataset=str(unnamed)), {}),
    }


def judged(work: Path, name: str, fault: str, config: Config, told: dict) -> dict:
    """The report's facts on one run, made where it is not there yet."""
    file = work / "judged" / f"{name}.json"
    if file.exists():
        return json.loads(file.read_text())
    folder = work / "runs" / name.replace("wrong trigger", "good")  # the same run, asked by another word
    try:
        result = run.start(config, folder, say=lambda _: None, progress=False)
        facts = report.report(result.folder, say=lambda _: None, most=4, **told)
        report.save(facts, folder)
        facts = facts.facts()
    except FloatingPointError as error:  # given up by the run itself
        facts = {"faults": ["learning rate"], "lines": [], "given up": str(error)}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(facts | {"fault": fault}, indent=1))
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--icons", type=Path, default=Path("~/.cache/lorakit/icons").expanduser())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--styles", nargs="+", default=STYLES)
    parser.add_argument("--out", type=Path, default=RESULTS / "report_calibration")
    options = parser.parse_args()
    found: dict[str, list[dict]] = {}
    for seed in options.seeds:
        for style in options.styles:
            for fault, (config, told) in kinds(options.work, options.icons, style, seed).items():
                facts = judged(options.work, f"{style} {fault} {seed}", fault, config, told)
                figures = {line["what"][:24]: line["figure"] for line in facts["lines"]}
                print(f"{style} {seed} {fault}: {facts['faults']}  {figures}", flush=True)
                found.setdefault(fault, []).append(facts)
    rows = []
    for fault, runs in found.items():
        right = sum((run["faults"][:1] or ["good"]) == [fault] for run in runs)
        others = sorted({(run["faults"][:1] or ["good"])[0] for run in runs} - {fault})
        rows.append([fault, counted(right, len(runs)), ", ".join(others)])
    write(
        options.out,
        "Does the report name the right fault?",
        [table(rows, "made to be", "named so", "else named")],
        found,
    )


if __name__ == "__main__":
    main()
