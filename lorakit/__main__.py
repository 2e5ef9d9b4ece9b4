"""lorakit at a terminal: `python -m lorakit --help`."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Train Stable Diffusion LoRAs (SD 1.5, SD 2.x, SDXL).", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip

MISSING = 3  # exit status of a run that finished, with something missing

Dtype = Annotated[str, typer.Option(help="fp16, bf16 or fp32")]
Layout = Annotated[str, typer.Option("--format", help="kohya, peft or diffusers")]


def main() -> None:
    """Run a command; a problem that was foreseen is told in words, without a traceback (LORAKIT_DEBUG=1 shows it)."""
    try:
        app()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("LORAKIT_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; nothing was left half-written", file=sys.stderr)
        sys.exit(130)


@app.command()
def demo(out: Annotated[Path, typer.Option(help="folder for the run")] = Path("runs/demo")) -> None:
    """Teach the embedded base a new style from 30 pictures, and show that it learned."""
    from lorakit.demo import config
    from lorakit.run import start

    finish(start(config(), out))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="JSON file with the settings; `preset` writes one")],
    out: Annotated[Path | None, typer.Option(help="folder for the run; runs/NAME when left out")] = None,
    fork: Annotated[Path | None, typer.Option(help="begin where the run in this folder is")] = None,
    backup: Annotated[str | None, typer.Option(help="second place: a folder, or hub:owner/name")] = None,
) -> None:
    """Train a LoRA, or go on with a run that was cut.

    Exit status: 0 finished, 3 finished with something missing, 130 stopped, 1 an error.
    """
    from lorakit import config as configs
    from lorakit.run import start

    settings = configs.load(config)
    if backup is not None:
        settings = settings.with_(backup=backup)
    finish(start(settings, out or Path("runs") / settings.name, fork=fork))


def finish(result) -> None:
    """Print where the file is; exit with 3 where something else is missing, with 130 where the run was stopped."""
    if result.lora:
        print(f"done      {result.lora}" + ", with what is missing above" * bool(result.missing))
        sys.exit(MISSING if result.missing else 0)
    elif result.steps < result.total:
        sys.exit(130)


@app.command()
def caption(
    what: Annotated[str, typer.Argument(help="audit, draft, template, replace or undo")],
    dataset: Annotated[str, typer.Argument(help="folder with the pictures")],
    words: Annotated[list[str] | None, typer.Argument(help="template: FORM; replace: FIND NEW")] = None,
    trigger: Annotated[str, typer.Option(help="the word that calls the LoRA up")] = "",
    kind: Annotated[str, typer.Option("--type", help="of audit: character, style, object or clothing")] = "character",
    model: Annotated[
        str, typer.Option(help="of draft: blip, blip-large, blip2, florence2, smolvlm, qwen3-vl, wd14, folder, hub id")
    ] = "blip",
    regex: Annotated[bool, typer.Option(help="FIND is a pattern, and NEW may name its groups")] = False,
    overwrite: Annotated[bool, typer.Option(help="draft for captions written by hand as well")] = False,
    write: Annotated[bool, typer.Option(help="do it; without, it is only shown")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Audit captions, draft them, put them into a form, replace text in them; seen first, and undone to the byte."""
    from lorakit import dataset as datasets

    pictures, words = datasets.scan(dataset), words or []
    old, root = datasets.captions_of(pictures), pictures.root
    if what == "undo":
        print(f"undone    {len(datasets.undo_captions(root))} captions are what they were before the last edit")
        return
    if what == "audit":
        from lorakit.dataset import audit_captions

        audited = audit_captions(pictures, trigger, kind=kind)
        print(json.dumps(audited.facts(), indent=2, ensure_ascii=False) if as_json else audited.describe())
        return
    if what == "draft":
        from lorakit.dataset import draft_captions

        new = draft_captions(pictures, model, into=root if write else None, overwrite=overwrite)
    elif what == "template" and len(words) < 2:
        new = datasets.apply_template(old, *words, trigger=trigger)
    elif what == "replace" and len(words) == 2:
        new = datasets.replace_text(old, *words, regex=regex)
    else:
        raise ValueError(f"There is no {' '.join([what, *words])!r}: use audit, draft, template, replace or undo.")
    found = datasets.changes(old, new)
    if write and what != "draft":  # drafts are written as they are made
        datasets.write_captions(found, root)
    if as_json:
        print(json.dumps({c.name: [c.before, c.after] for c in found}, indent=2, ensure_ascii=False))
    elif write:
        print(f"written   {len(found)} captions; `caption undo` takes them back")
    else:
        print(datasets.preview(found))
        print("Nothing is written yet: --write does it.")


@app.command()
def check(
    dataset: Annotated[str, typer.Argument(help="folder, zip or tar with the pictures")],
    kind: Annotated[str, typer.Option("--type", help="character, style, object or clothing")] = "character",
    resolution: Annotated[int, typer.Option(help="training size in pixels")] = 512,
    trigger: Annotated[str, typer.Option(help="the word that every caption should have")] = "",
    step: Annotated[int, typer.Option(help="pixels by which bucket sides differ")] = 64,
    rule: Annotated[str, typer.Option(help="of the buckets: kohya, no_upscale or least_crop")] = "kohya",
    min_side: Annotated[int | None, typer.Option(help="shortest side of a bucket; half the resolution")] = None,
    max_side: Annotated[int | None, typer.Option(help="longest side of a bucket; twice the resolution")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Check pictures and captions before training: what is left out, what is wrong, and what to do about it."""
    from lorakit import dataset as datasets

    report = datasets.check_quality(
        datasets.scan(dataset), kind=kind, resolution=resolution, trigger=trigger, step=step, rule=rule,
        sides=(min_side, max_side),
    )  # fmt: skip
    print(json.dumps(report.facts(), indent=2, ensure_ascii=False) if as_json else report.describe())


@app.command()
def preset(
    kind: Annotated[str, typer.Argument(help="character, style, object, clothing, or the name of one of your own")],
    family: Annotated[str | None, typer.Argument(help="sd15, sd2 or sdxl; sd15, or your own preset's base")] = None,
    dataset: Annotated[str, typer.Option(help="folder or zip with the pictures")] = "dataset",
    trigger: Annotated[str, typer.Option(help="the word that calls the LoRA up")] = "",
    quick: Annotated[
        bool, typer.Option(help="half the length, with what makes up for it: cosine, LoCon, EVA …")
    ] = False,
    save_from: Annotated[
        Path | None, typer.Option(help="a run's folder or config file whose settings are kept under the name")
    ] = None,
) -> None:
    """Print the settings to start from, as JSON: `preset style > style.json`; or keep a run's as one of your own."""
    from lorakit import config as configs
    from lorakit import presets

    if save_from:
        settings = configs.load(save_from / "config.json" if save_from.is_dir() else save_from)
        file = presets.save_preset(kind, settings)
        print(f"kept      {kind} in {file.parent}: {', '.join(presets.kept(kind))}")
        return
    settings = presets.preset(kind, family).with_(dataset=dataset, trigger=trigger)
    print((presets.quick(settings) if quick else settings).to_json(), end="")


@app.command()
def plan(
    base: Annotated[
        str, typer.Option(help="sd15, sd21, sd21-base, sdxl, a diffusers folder, a hub id or 'demo'")
    ] = "sd15",
    config: Annotated[Path | None, typer.Option(help="JSON file whose settings are planned")] = None,
    resolution: Annotated[int | None, typer.Option(help="pixels; the base's own when left out")] = None,
    rank: Annotated[int | None, typer.Option(help="of the adapter")] = None,
    batch_size: Annotated[int | None, typer.Option()] = None,
    steps: Annotated[int | None, typer.Option(help="of the run")] = None,
    card: Annotated[list[str] | None, typer.Option(help="T4, 3060, 3090, 4090, A100; all when left out")] = None,
    quantize: Annotated[str, typer.Option(help="none, nf4 or int8: the frozen base in fewer bits")] = "none",
    checkpointing: Annotated[bool, typer.Option(help="gradient checkpointing from the start")] = False,
    text_encoders: Annotated[bool, typer.Option(help="train the text encoders too")] = False,
    methods: Annotated[bool, typer.Option(help="compare DreamBooth and textual inversion of the same base")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Predict memory, file size and time for a card, and choose settings that fit; nothing is downloaded."""
    from lorakit import base as bases
    from lorakit import config as configs
    from lorakit import plan

    opened = bases.known(base) if base in (*bases.KNOWN, *bases.KNOWN.values()) else bases.open(base)
    settings = (
        configs.load(config)
        if config
        else configs.Config(steps=2000, resolution=opened.resolution, bucket_step=min(64, opened.resolution))
    )
    asked = {"resolution": resolution, "rank": rank, "batch_size": batch_size, "steps": steps}
    asked = {key: value for key, value in asked.items() if value is not None}
    if quantize != "none":
        asked["quantize"] = quantize
    if checkpointing:
        asked["gradient_checkpointing"] = True
    if text_encoders:
        asked["text_encoder_rate"] = settings.text_encoder_rate or settings.learning_rate
    if rank is not None and config is None:
        asked["alpha"] = rank / 2
    if methods:
        import torch

        found = plan.compare_methods(
            opened, settings.with_(**asked), dtype=torch.float16, store=plan.prediction_store()
        )
        facts = [
            {"method": m.name, "peak_gib": round(m.peak / 2**30, 3), "file_mb": round(m.file_size / 1e6, 3)}
            for m in found
        ]
        if as_json:
            print(json.dumps(facts, indent=2))
            return
        print("The same base, pictures, batch, optimizer and checkpointing; predicted:")
        for row in facts:
            print(f"{row['method']:<18}{row['peak_gib']:>8.2f} GiB   leaves a file of {row['file_mb']:,.2f} MB")
        return
    planned = plan.plan_for_cards(opened, settings.with_(**asked), card)
    if as_json:
        print(json.dumps([row.facts() for row in planned], indent=2, ensure_ascii=False))
        return
    print(planned[0].asked.describe())
    for row in planned:
        print(f"{row.card.name:<8}{row.describe()}")
    print("Predicted: what is allocated at the peak. Times are estimates from the work of a step and the card's rate.")


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(help="JSON file with the settings of all runs")],
    setting: Annotated[str, typer.Argument(help="the one in which they differ, as rank")],
    values: Annotated[list[str], typer.Argument(help="its values; after -- where one begins with -")],
    out: Annotated[Path | None, typer.Option(help="folder for the runs; runs/NAME-SETTING when left out")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="to compare with; the settings' own when left out")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="of each prompt; 42 when left out")] = None,
    strength: Annotated[float, typer.Option(help="of the LoRAs")] = 1.0,
    pictures: Annotated[bool, typer.Option(help="in the comparison")] = True,
) -> None:
    """Train runs that differ in one setting and compare them; called again, it goes on."""
    import threading

    from lorakit import config as configs
    from lorakit import evaluate

    settings, stop = configs.load(config), threading.Event()
    made = evaluate.sweep(
        settings, setting, [_value(value) for value in values], out or Path("runs") / f"{settings.name}-{setting}",
        prompts=prompt or (), seeds=seed or (42,), strength=strength, pictures=pictures, stop=stop,
    )  # fmt: skip
    print(made.describe())
    if stop.is_set():
        sys.exit(130)
    if made.missing:
        sys.exit(MISSING)


def _value(text: str):
    """A setting's value as JSON has it; what is no JSON is a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs, or of a sweep")],
    prompt: Annotated[list[str] | None, typer.Option(help="the first run's own when left out")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="of each prompt; 42 when left out")] = None,
    strength: Annotated[float, typer.Option(help="of the LoRAs")] = 1.0,
    pictures: Annotated[bool, typer.Option(help="the same of every run, and of the base alone")] = True,
    base: Annotated[str | None, typer.Option(help="for the pictures; the first run's when left out")] = None,
    out: Annotated[Path, typer.Option(help="folder for comparison.html")] = Path("comparison"),
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Put runs beside each other: settings that differ, curves, figures, the same prompts and seeds."""
    from lorakit import evaluate

    made = evaluate.compare_runs(
        runs, prompts=prompt or (), seeds=seed or (42,), strength=strength, pictures=pictures, base=base,
        say=lambda text: print(text, file=sys.stderr),
    )  # fmt: skip
    page, _ = evaluate.save_comparison(made, out)
    print(json.dumps(made.facts(), indent=2, ensure_ascii=False) if as_json else f"{made.describe()}\nlook at {page}")
    if made.missing:
        sys.exit(MISSING)


@app.command()
def kohya(
    file: Annotated[Path, typer.Argument(help="sd-scripts' .toml, the GUI's .json, or a text with a command line")],
) -> None:
    """Print settings of kohya's as lorakit's own, as JSON; what cannot be taken over is told beside."""
    from lorakit import kohya

    imported = kohya.read(file)
    for note in imported.notes:
        print(f"note: {note}", file=sys.stderr)
    print(imported.config.to_json(), end="")


@app.command()
def sample(
    prompts: Annotated[list[str], typer.Argument(help="one picture each")],
    base: Annotated[str, typer.Option(help="diffusers folder, checkpoint file, hub id or 'demo'")] = "demo",
    prediction_type: Annotated[str, typer.Option(help="auto, epsilon or v_prediction")] = "auto",
    lora: Annotated[list[Path] | None, typer.Option(help="LoRA, run folder or checkpoint; several at once")] = None,
    weight: Annotated[list[float] | None, typer.Option(help="of each LoRA, in their order; 1 when left out")] = None,
    strength: Annotated[list[float] | None, typer.Option(help="of all LoRAs together; several make a sheet")] = None,
    negative: Annotated[str, typer.Option(help="what to steer away from")] = "",
    seed: Annotated[int, typer.Option(help="of the first picture")] = 0,
    width: Annotated[int | None, typer.Option(help="pixels; the base's own when left out")] = None,
    height: Annotated[int | None, typer.Option(help="pixels; the base's own when left out")] = None,
    steps: int = 25,
    guidance: float = 7.0,
    scheduler: Annotated[
        str, typer.Option(help="euler, euler_a, dpm++_2m_karras, ddim, unipc, lcm")
    ] = "dpm++_2m_karras",
    clip_skip: Annotated[int, typer.Option(min=1, max=4, help="as the LoRA was trained: 2 is usual for anime")] = 1,
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("samples"),
) -> None:
    """Make pictures, with LoRAs at one strength or several; each is written as soon as it is made."""
    from lorakit import base as bases
    from lorakit import evaluate, plots, sample

    strengths, paths = strength or [1.0], lora or []
    weights = weight or [1.0] * len(paths)
    if len(weights) != len(paths):
        raise ValueError(f"{len(weights)} weights were given for {len(paths)} LoRAs. Give one each, or none.")
    opened, known = bases.open(base, prediction_type), {}
    used = [[(path, own * value) for path, own in zip(paths, weights, strict=True)] for value in strengths]
    variants = [evaluate.variant(opened, parts, known) for parts in used]
    size = (height or opened.resolution, width or opened.resolution)
    made_with = {"negative": negative, "steps": steps, "guidance": guidance, "scheduler_name": scheduler,
                 "clip_skip": clip_skip}  # fmt: skip
    rows: list[list] = [[None] * len(strengths) for _ in prompts]
    for row, column, picture in sample.stream(opened, prompts, variants, seeds=seed, size=size, **made_with):
        rows[row][column] = picture
        named = [(path.name.removesuffix(".safetensors"), value) for path, value in used[column]]
        told = sample.infotext(prompts[row], seed + row, size, model=opened.name, loras=named, **made_with)
        folder = out / f"strength-{strengths[column]:g}" if len(strengths) > 1 else out
        print(sample.write_picture(picture, folder / f"{row:02d}-seed-{seed + row}.png", told))
    if len(strengths) > 1:
        labels = ["base" if value == 0 else f"strength {value:g}" for value in strengths]
        plots.grid(rows, row_labels=list(prompts), column_labels=labels, path=out / "sheet.png")
        print(out / "sheet.png")


@app.command()
def frames(
    video: Annotated[Path, typer.Argument(help="the film")],
    folder: Annotated[Path, typer.Argument(help="for the pictures")],
    every: Annotated[float, typer.Option(help="seconds from picture to picture")] = 1.0,
    scenes: Annotated[bool, typer.Option(help="of each scene's beginning one, whatever --every says")] = False,
    window: Annotated[float, typer.Option(help="seconds in which the sharpest frame is looked for")] = 0.5,
    suffix: Annotated[str, typer.Option(help=".png or .jpg")] = ".png",
) -> None:
    """Take the sharpest frames of a video as pictures to train on; none that looks like one before."""
    from lorakit import dataset as datasets

    found = datasets.extract_frames(video, folder, every=None if scenes else every, window=window, suffix=suffix)
    print(f"done      {len(found)} pictures in {folder}")


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="what the pictures show; their captions")],
    out: Annotated[Path, typer.Option(help="folder of the dataset; they go into REPEATS_NAME/ in it")],
    name: Annotated[str, typer.Option(help="what they show in a word, as 'woman'")],
    base: Annotated[str, typer.Option(help="diffusers folder, checkpoint file, hub id or 'demo'")] = "demo",
    prediction_type: Annotated[str, typer.Option(help="auto, epsilon or v_prediction")] = "auto",
    count: Annotated[int, typer.Option(min=1, help="pictures of each prompt")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="of the first; the next ones count up")] = 0,
    repeats: Annotated[int, typer.Option(help="times that each counts an epoch")] = 1,
    negative: Annotated[str, typer.Option(help="what to steer away from")] = "",
    width: Annotated[int | None, typer.Option(help="pixels; the base's own when left out")] = None,
    height: Annotated[int | None, typer.Option(help="pixels; the base's own when left out")] = None,
    steps: int = 25,
    guidance: float = 7.0,
    scheduler: Annotated[str, typer.Option(help="euler, euler_a, dpm++_2m_karras, ddim, unipc")] = "dpm++_2m_karras",
    clip_skip: Annotated[int, typer.Option(min=1, max=4, help="1 takes the text encoder's last layer")] = 1,
    quantize: Annotated[str, typer.Option(help="none, nf4 or int8: the base in fewer bits")] = "none",
    batch: Annotated[int, typer.Option(min=1, help="pictures at once")] = 4,
) -> None:
    """Let a base make pictures with captions, as regularisation or training data; called again, it goes on."""
    from lorakit import base as bases
    from lorakit import sample

    opened = bases.open(base, prediction_type)
    folder = sample.generate_pictures(
        opened, prompts, out, name=name, repeats=repeats, seeds=range(seed, seed + count), negative=negative,
        size=(height or opened.resolution, width or opened.resolution), steps=steps, guidance=guidance,
        scheduler_name=scheduler, clip_skip=clip_skip, quantize=quantize, batch=batch,
    )  # fmt: skip
    print(f"done      {len(list(folder.glob('*.png')))} pictures in {folder}")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="a run folder, one of its checkpoints, or a LoRA file or folder")],
    out: Annotated[Path, typer.Option(help="the file to write; a folder of layout peft")],
    layout: Layout = "kohya",
    dtype: Dtype = "fp16",
    step: Annotated[str, typer.Option(help="of a run: newest, best, or a number")] = "newest",
) -> None:
    """Write a run's weights, or a LoRA that others made, for other programs, and prove the file."""
    from lorakit import adapter as adapters
    from lorakit.run import lora_of

    lora = lora_of(source, step)
    adapters.save(lora, out, dtype=adapters.dtype_of(dtype), layout=layout)
    print(f"export    {out} from {lora.name}, layout {layout}, {dtype}")
    print(f"proof     read back: {adapters.prove(out, lora, layout=layout).describe()}")


@app.command()
def merge(
    loras: Annotated[list[Path], typer.Argument(help="LoRA files, or folders of runs")],
    out: Annotated[Path, typer.Option(help="the LoRA file to write; with --base a new folder or file for the base")],
    strength: Annotated[list[float] | None, typer.Option(help="of each LoRA, in their order; 1 when left out")] = None,
    rank: Annotated[int | None, typer.Option(help="of the result; left out, all are put side by side, exactly")] = None,
    base: Annotated[str | None, typer.Option(help="merge into this base; with --rank, what DoRAs are taken of")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp16, bf16 or fp32; of a base its own when left out")] = None,
    layout: Layout = "kohya",
) -> None:
    """Make one LoRA of several, or put LoRAs into a base."""
    from lorakit import adapter as adapters
    from lorakit import base as bases
    from lorakit.run import lora_of

    found = [lora_of(path) for path in loras]
    strengths = strength or [1.0] * len(found)
    opened = bases.open(base) if base else None
    if opened and rank is None:
        made = adapters.merge_into_base(
            opened, found, strengths, out, dtype=adapters.dtype_of(dtype) if dtype else None
        )
        print(f"done      {made}")
        return
    _write(adapters.merge(found, strengths, rank, opened), out, dtype or "fp16", layout)


@app.command()
def resize(
    lora: Annotated[Path, typer.Argument(help="a LoRA file, or the folder of a run")],
    out: Annotated[Path, typer.Option(help="the file to write")],
    rank: Annotated[int | None, typer.Option(help="at most this")] = None,
    energy: Annotated[float | None, typer.Option(help="share of each module's change to keep, 0 to 1")] = None,
    dtype: Dtype = "fp16",
    layout: Layout = "kohya",
) -> None:
    """Bring a LoRA to another rank."""
    from lorakit import adapter as adapters
    from lorakit.run import lora_of

    _write(adapters.resize(lora_of(lora), rank, energy), out, dtype, layout)


@app.command()
def extract(
    tuned: Annotated[str, typer.Argument(help="the fine-tuned base: folder, checkpoint file or hub id")],
    original: Annotated[str, typer.Argument(help="the base that it was made of")],
    out: Annotated[Path, typer.Option(help="the LoRA file to write")],
    rank: Annotated[int, typer.Option(help="at most this")] = 32,
    energy: Annotated[float | None, typer.Option(help="share of each module's difference to keep, 0 to 1")] = None,
    targets: Annotated[str, typer.Option(help="attention or attention+conv")] = "attention",
    text_encoders: Annotated[bool, typer.Option(help="their difference too")] = True,
    dtype: Dtype = "fp16",
    layout: Layout = "kohya",
) -> None:
    """Make a LoRA of what parts two bases."""
    from lorakit import adapter as adapters
    from lorakit import base as bases

    made = adapters.extract(
        bases.open(tuned), bases.open(original), rank, energy=energy, targets=targets, text_encoders=text_encoders
    )
    _write(made, out, dtype, layout)


def _write(made, out: Path, dtype: str, layout: str) -> None:
    """Write and prove a LoRA that was made of others."""
    from lorakit import adapter as adapters

    adapters.save(made.lora, out, dtype=adapters.dtype_of(dtype), layout=layout)
    print(f"done      {out}: {made.describe()}")
    print(f"proof     read back: {adapters.prove(out, made.lora, layout=layout).describe()}")


@app.command()
def upload(
    source: Annotated[Path, typer.Argument(help="a finished run's folder, or a LoRA file")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face Hub; made where there is none")],
    licence: Annotated[str | None, typer.Option(help="as the Hub names it; the base's usual one when left out")] = None,
    public: Annotated[bool, typer.Option(help="a repository that is made is for everybody to see")] = False,
    pictures: Annotated[bool, typer.Option(help="the dataset's pictures and captions too")] = False,
    comment: Annotated[str, typer.Option(help="a paragraph for the model card")] = "",
    overwrite: Annotated[bool, typer.Option(help="replace a README.md that lorakit did not write")] = False,
) -> None:
    """Put a LoRA with a model card on the Hugging Face Hub, private unless told otherwise."""
    from lorakit import publish

    address = publish.upload(
        source, repository, licence=licence, private=not public, pictures=pictures, comment=comment, overwrite=overwrite
    )
    print(f"done      {address}")


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="a run folder, one of its checkpoints, or a LoRA file")],
    out: Annotated[Path | None, typer.Option(help="folder for the report; the run's by default")] = None,
    base: Annotated[str | None, typer.Option(help="diffusers folder, checkpoint file, hub id or 'demo'")] = None,
    pictures: Annotated[str | None, typer.Option(help="that a file was trained on: folder or zip")] = None,
    trigger: Annotated[str, typer.Option(help="the word that calls it up; else what the run or file says")] = "",
    kind: Annotated[str, typer.Option("--type", help="character, style, object or clothing; else the run's")] = "",
    see: Annotated[str, typer.Option(help="what judges: auto, clip, clip-large, dinov2, a folder, or none")] = "auto",
    seed: Annotated[int, typer.Option(help="of the first picture")] = 1000,
    device: Annotated[str, typer.Option(help="auto, cuda, mps or cpu")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Make pictures with a LoRA and without, measure them, and fill in the guide's checklist."""
    from lorakit import dataset as datasets
    from lorakit import evaluate

    made = evaluate.report(
        source, base=base, pictures=datasets.scan(pictures) if pictures else None, trigger=trigger, kind=kind,
        see=None if see == "none" else see, seed=seed, device=device, say=lambda text: print(text, file=sys.stderr),
    )  # fmt: skip
    page, _ = evaluate.save_report(
        made, out or (source if source.is_dir() else source.parent),
        "report" if source.is_dir() else f"{source.name.removesuffix('.safetensors')}.report",
    )  # fmt: skip
    print(json.dumps(made.facts(), indent=2, ensure_ascii=False) if as_json else f"{made.describe()}\nlook at {page}")


@app.command()
def info(
    path: Annotated[Path, typer.Argument(help="a run folder, a checkpoint or a LoRA file")],
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Tell what a run folder or a LoRA file is, from its own records."""
    from lorakit import adapter as adapters
    from lorakit.run import describe_run, is_run

    if not path.exists():
        raise FileNotFoundError(f"There is no {path}. Give a run folder or a .safetensors file.")
    if is_run(path):
        facts, table = describe_run(path), ""
    else:
        facts = adapters.describe_file(path)
        table = "" if facts["kind"] == "checkpoint" else adapters.norms_table(adapters.norms(adapters.load(path)))
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}={v!r}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(str(v.get("file", v)) if isinstance(v, dict) else str(v) for v in value)
        print(f"{key:<12} {value}")
    if table:
        print(f"\nWhat it changes, by the norm of its updates:\n{table}")


if __name__ == "__main__":
    main()
