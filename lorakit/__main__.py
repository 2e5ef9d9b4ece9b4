"""lorakit at a terminal: `python -m lorakit --help`."""

import dataclasses
import functools
import inspect
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from lorakit import named

if TYPE_CHECKING:
    from lorakit import sample as sampling
    from lorakit.adapter import Lora
    from lorakit.device import Compute
    from lorakit.run import Result

app = typer.Typer(
    help="Train Stable Diffusion LoRAs (SD 1.5, SD 2.x, SDXL).", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip

BASES = ", ".join(named.NAMED)
MISSING = 3  # exit status of a run that finished with something missing


def main() -> None:
    """Run a command; an expected error prints its message only (LORAKIT_DEBUG=1 shows the traceback)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed
            setattr(sys, name, io.StringIO())
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # characters that the terminal lacks
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


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a command; a parameter that is a dataclass becomes one option for each of its fields."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in groups:
            options = get_type_hints(groups[name], include_extras=True)
            parameters += [
                inspect.Parameter(
                    field.name, parameter.KEYWORD_ONLY, annotation=options[field.name], default=field.default
                )
                for field in dataclasses.fields(groups[name])
            ]
        else:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[name]))

    @functools.wraps(function)
    def call(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
        function(**values)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return app.command()(call)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


# ── Options that commands share ─────────────────────────────────────────────────────────────────────────────────────

AsJson = Annotated[bool, typer.Option("--json", help="print JSON for other programs")]
BaseName = Annotated[str, typer.Option(help="diffusers folder, checkpoint file, hub id or 'demo'")]
Kind = Annotated[str, typer.Option("--type", help="character, style, object or clothing")]
Trigger = Annotated[str, typer.Option(help="the trigger word")]


@dataclass(frozen=True)
class PictureOptions:
    """How pictures are made."""

    prediction_type: Annotated[str, typer.Option(help="auto, epsilon or v_prediction")] = "auto"
    negative: Annotated[str, typer.Option(help="negative prompt")] = ""
    seed: Annotated[int, typer.Option(min=0, help="of the first picture; the next ones count up")] = 0
    width: Annotated[int | None, typer.Option(help="pixels; the base's own by default")] = None
    height: Annotated[int | None, typer.Option(help="pixels; the base's own by default")] = None
    steps: int = 25
    guidance: float = 7.0
    scheduler: Annotated[str, typer.Option(help="euler, euler_a, dpm++_2m_karras, ddim, unipc or lcm")] = (
        "dpm++_2m_karras"
    )
    clip_skip: Annotated[int, typer.Option(min=1, max=4, help="as the LoRA was trained; 2 is usual for anime")] = 1

    def open(self, base: str) -> tuple[Any, "sampling.Sampling"]:
        """The base, and the settings of the sampler."""
        from lorakit import base as bases
        from lorakit.sample import Sampling

        opened = bases.open(base, self.prediction_type)
        height, width = (opened.resolution if side is None else side for side in (self.height, self.width))
        return opened, Sampling(
            self.negative, self.steps, self.guidance, self.scheduler, (height, width), self.clip_skip, self.seed
        )


@dataclass(frozen=True)
class FileOptions:
    """How a LoRA file is written."""

    dtype: Annotated[str | None, typer.Option(help="fp16, bf16 or fp32; of a merged base its own, else fp16")] = None
    layout: Annotated[str, typer.Option("--format", help="kohya, peft or diffusers")] = "kohya"

    def write(self, lora: "Lora", out: Path, text: str) -> None:
        """Write a LoRA, read it back and print the proof."""
        from lorakit import adapter

        adapter.save(lora, out, dtype=adapter.dtype_of(self.dtype or "fp16"), layout=self.layout)
        print(text)
        print(*adapter.prove(out, lora, layout=self.layout).lines(), sep="\n")


# ── Train ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@command
def demo(out: Annotated[Path, typer.Option(help="folder of the run")] = Path("runs/demo")) -> None:
    """Teach the embedded base a new style from 30 pictures, and show that it learned."""
    from lorakit.demo import config
    from lorakit.run import start

    _finish(start(config(), out))


@command
def train(
    config: Annotated[Path, typer.Argument(help="JSON file with the settings; `preset` writes one")],
    out: Annotated[Path | None, typer.Option(help="folder of the run; runs/NAME by default")] = None,
    fork: Annotated[
        Path | None, typer.Option(help="start from the newest checkpoint of the run in this folder")
    ] = None,
    backup: Annotated[str | None, typer.Option(help="where to keep copies: a folder, or hub:owner/name")] = None,
) -> None:
    """Train a LoRA, or resume a run that was cut.

    Exit status: 0 finished, 3 finished with something missing, 130 stopped, 1 an error.
    """
    from lorakit import config as configs
    from lorakit.run import start

    settings = configs.load(config)
    if backup is not None:
        settings = settings.with_(backup=backup)
    _finish(start(settings, out or Path("runs") / settings.name, fork=fork))


def _finish(result: "Result") -> None:
    """Print the path of the file; exit with 3 when something is missing, with 130 when the run was stopped."""
    if result.lora:
        print(f"done      {result.lora}" + ", with what is missing above" * bool(result.missing))
        sys.exit(MISSING if result.missing else 0)
    elif result.steps < result.total:
        sys.exit(130)


@command
def preset(
    kind: Annotated[
        str, typer.Argument(help="character, style, object, clothing, or the name of a preset of your own")
    ],
    base: Annotated[str | None, typer.Argument(help=f"{BASES}; by default sd15, or your preset's base")] = None,
    dataset: Annotated[str, typer.Option(help="folder or zip with the pictures")] = "dataset",
    trigger: Trigger = "",
    usual: Annotated[
        bool, typer.Option(help="rank, rates and schedule of kohya-colab for this base, instead of the guide's")
    ] = False,
    quick: Annotated[bool, typer.Option(help="half the steps, with cosine, LoCon, EVA … to make up for it")] = False,
    save_from: Annotated[
        Path | None, typer.Option(help="a run's folder or config file: keep its settings under the name")
    ] = None,
) -> None:
    """Print settings to start from, as JSON: `preset style > style.json`; or keep a run's as a preset of your own."""
    from lorakit import config as configs
    from lorakit import presets

    if save_from:
        settings = configs.load(save_from / "config.json" if save_from.is_dir() else save_from)
        file = presets.save_preset(kind, settings)
        print(f"kept      {kind} in {file.parent}: {', '.join(presets.kept(kind))}")
        return
    settings = presets.preset(kind, base, usual=usual, dataset=dataset, trigger=trigger)
    print((presets.quick(settings) if quick else settings).to_json(), end="")


@dataclass(frozen=True)
class PlanOptions:
    """Settings to plan with, in place of the config's."""

    resolution: Annotated[int | None, typer.Option(help="pixels; the base's own by default")] = None
    rank: Annotated[int | None, typer.Option(help="of the adapter")] = None
    batch_size: Annotated[int | None, typer.Option()] = None
    steps: Annotated[int | None, typer.Option(help="of the run")] = None
    quantize: Annotated[str, typer.Option(help="none, nf4 or int8: hold the frozen base in fewer bits")] = "none"
    checkpointing: Annotated[bool, typer.Option(help="gradient checkpointing from the start")] = False
    text_encoders: Annotated[bool, typer.Option(help="train the text encoders too")] = False

    def changes(self, settings: Any, own_config: bool) -> dict[str, Any]:
        """The settings that differ from the config's."""
        given = {name: getattr(self, name) for name in ("resolution", "rank", "batch_size", "steps")}
        changes = {name: value for name, value in given.items() if value is not None}
        if self.quantize != "none":
            changes["quantize"] = self.quantize
        if self.checkpointing:
            changes["gradient_checkpointing"] = True
        if self.text_encoders:
            changes["text_encoder_rate"] = settings.text_encoder_rate or settings.learning_rate
        if self.rank is not None and not own_config:
            changes["alpha"] = self.rank / 2
        return changes


@command
def plan(
    options: PlanOptions,
    base: Annotated[str, typer.Option(help=f"{BASES}, 'demo', a hub id, file or diffusers folder")] = "sd15",
    config: Annotated[Path | None, typer.Option(help="JSON file with the settings to plan")] = None,
    card: Annotated[list[str] | None, typer.Option(help="T4, A100, 1660, 2060, 3060 … 4090; all by default")] = None,
    methods: Annotated[bool, typer.Option(help="compare with DreamBooth, textual inversion, hypernetworks")] = False,
    largest: Annotated[bool, typer.Option(help="the largest resolution and batch of each card")] = False,
    as_json: AsJson = False,
) -> None:
    """Predict memory, file size and time for cards, and choose settings that fit; no named base is downloaded."""
    from lorakit import base as bases
    from lorakit import config as configs
    from lorakit import plan as plans

    opened = bases.known(base) if named.find(base) else bases.open(base)
    side = opened.resolution
    usual = configs.Config(steps=2000, resolution=side, bucket_step=min(64, side))
    settings = configs.load(config) if config else usual
    settings = settings.with_(**options.changes(settings, config is not None))
    if methods:
        import torch

        _print_methods(
            plans.compare_methods(opened, settings, dtype=torch.float16, store=plans.prediction_store()), as_json
        )
        return
    if largest:
        _print_largest(plans.largest(opened, settings, card), settings.resolution, as_json)
        return
    predictions = plans.plan_for_cards(opened, settings, card)
    if as_json:
        _print_json([prediction.facts() for prediction in predictions])
        return
    if entry := named.find(base):
        size = f", {entry.megabytes:,} MB to fetch" if entry.megabytes else ""
        print(f"{entry.title}{size}; licence: {entry.licence or 'see its page'}")
    print(predictions[0].requested.describe())
    for prediction in predictions:
        print(f"{prediction.card.name:<8}{prediction.describe()}")
    print("Predicted: what is allocated at the peak. Times are estimates from the work of a step and the card's rate.")


def _print_largest(answers: Any, resolution: int, as_json: bool) -> None:
    if as_json:
        _print_json({card: {"resolution": side, "batch": batch} for card, (side, batch) in answers.items()})
        return
    print(f"Predicted with these settings: the largest resolution with batch 1, the largest batch at {resolution} px:")
    for card, (side, batch) in answers.items():
        print(f"{card:<12}{f'{side} px' if side else 'none':<10}batch {batch or 'none'}")


def _print_methods(methods: Any, as_json: bool) -> None:
    facts = [
        {"method": m.name, "peak_gib": round(m.peak / 2**30, 3), "file_mb": round(m.file_size / 1e6, 3),
         "time": m.time, "works_with": m.works_with}
        for m in methods
    ]  # fmt: skip
    if as_json:
        _print_json(facts)
        return
    print("The same base, pictures, batch, optimizer and checkpointing; predicted:")
    for row in facts:
        size = f"{row['file_mb']:,.2f} MB"
        print(f"{row['method']:<18}{row['peak_gib']:>8.2f} GiB  {size:>13}  {row['time']:<10}  {row['works_with']}")
    print("The times are the training guide's. A file works with the bases in the last column.")


@command
def kohya(
    file: Annotated[
        Path, typer.Argument(help="sd-scripts' .toml, the GUI's .json, or a script (.sh, .bat, .ps1, .txt)")
    ],
) -> None:
    """Print kohya's settings as lorakit's, as JSON; settings that cannot be converted are named."""
    from lorakit import kohya as converter

    converted = converter.read(file)
    for note in converted.notes:
        _to_stderr(f"note: {note}")
    print(converted.config.to_json(), end="")


# ── Pictures and captions ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class CaptionOptions:
    """How captions are audited, drafted and edited."""

    trigger: Trigger = ""
    kind: Kind = "character"
    model: Annotated[
        str, typer.Option(help="of draft: blip, blip-large, blip2, florence2, smolvlm, qwen3-vl, wd14, folder, hub id")
    ] = "blip"
    regex: Annotated[bool, typer.Option(help="FIND is a pattern, and NEW may name its groups")] = False
    overwrite: Annotated[bool, typer.Option(help="draft captions that a person has written, too")] = False
    write: Annotated[bool, typer.Option(help="write the changes; by default they are only shown")] = False


@command
def caption(
    options: CaptionOptions,
    action: Annotated[str, typer.Argument(metavar="WHAT", help="audit, draft, template, replace, order or undo")],
    dataset: Annotated[str, typer.Argument(help="folder with the pictures")],
    words: Annotated[
        list[str] | None, typer.Argument(help="template: FORM; replace: FIND NEW; order: BASE, or kinds")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Audit, draft, reformat or edit captions; changes are shown before they are written, and can be undone."""
    from lorakit import dataset as datasets

    pictures = datasets.scan(dataset)
    if action == "undo":
        print(f"undone    {len(datasets.undo_captions(pictures.root))} captions are as before the last edit")
    elif action == "audit":
        report = datasets.audit_captions(pictures, options.trigger, kind=options.kind)
        _print_json(report.facts()) if as_json else print(report.describe())
    else:
        _edit_captions(action, words or [], pictures, options, as_json)


def _edit_captions(action: str, words: list[str], pictures: Any, options: CaptionOptions, as_json: bool) -> None:
    from lorakit import dataset as datasets

    old, root = pictures.captions, pictures.root
    if action == "draft":
        into = root if options.write else None
        new = datasets.draft_captions(pictures, options.model, into=into, overwrite=options.overwrite)
    elif action == "template" and len(words) < 2:
        new = datasets.apply_template(old, trigger=options.trigger, **dict(zip(["form"], words, strict=False)))
    elif action == "replace" and len(words) == 2:
        new = datasets.replace_text(old, *words, regex=options.regex)
    elif action == "order" and words:
        new = datasets.order_tags(old, named.tag_order(words), options.trigger)
    else:
        known = "audit, draft, template, replace, order or undo"
        raise ValueError(f"There is no {' '.join([action, *words])!r}: use {known}.")
    changes = datasets.caption_changes(old, new)
    if options.write and action != "draft":  # drafts are written as they are made
        datasets.write_captions(changes, root)
    if as_json:
        _print_json({change.name: [change.before, change.after] for change in changes})
    elif options.write:
        print(f"written   {len(changes)} captions; `caption undo` takes them back")
    else:
        print(datasets.describe_changes(changes))
        print("Nothing is written yet: add --write to write it.")


@dataclass(frozen=True)
class BucketOptions:
    """How pictures are fitted into buckets."""

    resolution: Annotated[int, typer.Option(help="training size in pixels")] = 512
    step: Annotated[int, typer.Option(help="pixels by which bucket sides differ")] = 64
    rule: Annotated[Any, typer.Option(help="kohya, no_upscale or least_crop", parser=str)] = "kohya"
    min_side: Annotated[int | None, typer.Option(help="shortest side of a bucket; half the resolution")] = None
    max_side: Annotated[int | None, typer.Option(help="longest side of a bucket; twice the resolution")] = None


@command
def check(
    buckets: BucketOptions,
    dataset: Annotated[str, typer.Argument(help="folder, zip or tar with the pictures")],
    kind: Kind = "character",
    trigger: Annotated[str, typer.Option(help="the trigger word, which every caption should have")] = "",
    as_json: AsJson = False,
) -> None:
    """Check pictures and captions before training: what is left out, what is wrong, and what to do about it."""
    from lorakit import dataset as datasets

    sides = buckets.min_side, buckets.max_side
    chosen = datasets.Buckets(buckets.resolution, buckets.step, buckets.rule, *sides)
    report = datasets.check_quality(datasets.scan(dataset), kind=kind, trigger=trigger, buckets=chosen)
    _print_json(report.facts()) if as_json else print(report.describe())


@command
def frames(
    video: Annotated[Path, typer.Argument(help="the video file")],
    folder: Annotated[Path, typer.Argument(help="for the pictures")],
    every: Annotated[float, typer.Option(help="seconds between pictures")] = 1.0,
    scenes: Annotated[bool, typer.Option(help="one picture of each scene's beginning instead")] = False,
    window: Annotated[float, typer.Option(help="seconds in which the sharpest frame is searched")] = 0.5,
    suffix: Annotated[str, typer.Option(help=".png or .jpg")] = ".png",
) -> None:
    """Extract the sharpest frames of a video as pictures to train on, none of them like an earlier one."""
    from lorakit import dataset as datasets

    pictures = datasets.extract_frames(video, folder, every=None if scenes else every, window=window, suffix=suffix)
    print(f"done      {len(pictures)} pictures in {folder}")


# ── Make pictures ───────────────────────────────────────────────────────────────────────────────────────────────────


@command
def sample(
    options: PictureOptions,
    prompts: Annotated[list[str], typer.Argument(help="one picture each")],
    base: BaseName = "demo",
    lora: Annotated[
        list[Path] | None, typer.Option(help="LoRA, run folder or checkpoint; may be given several times")
    ] = None,
    weight: Annotated[list[float] | None, typer.Option(help="of each LoRA, in their order; 1 by default")] = None,
    strength: Annotated[list[float] | None, typer.Option(help="of all LoRAs together; several make a sheet")] = None,
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("samples"),
) -> None:
    """Make pictures, with LoRAs at one strength or several; each is written as soon as it is made."""
    from lorakit import evaluate, plots
    from lorakit import sample as samples

    strengths, paths = strength or [1.0], lora or []
    weights = weight or [1.0] * len(paths)
    if len(weights) != len(paths):
        raise ValueError(f"{len(weights)} weights were given for {len(paths)} LoRAs. Give one each, or none.")
    opened, sampling = options.open(base)
    known: dict = {}
    used = [[(path, own * value) for path, own in zip(paths, weights, strict=True)] for value in strengths]
    variants = [evaluate.variant(opened, parts, known) for parts in used]
    rows: list[list] = [[None] * len(strengths) for _ in prompts]
    for row, column, picture in samples.stream(opened, prompts, variants, sampling):
        rows[row][column] = picture
        loras = [(path.name.removesuffix(".safetensors"), value) for path, value in used[column]]
        seed = options.seed + row
        text = samples.infotext(prompts[row], seed, picture.size[::-1], sampling, opened.name, loras)
        folder = out / f"strength-{strengths[column]:g}" if len(strengths) > 1 else out
        print(samples.write_picture(picture, folder / f"{row:02d}-seed-{seed}.png", text))
    if len(strengths) > 1:
        labels = plots.strength_labels(strengths)
        plots.grid(rows, row_labels=list(prompts), column_labels=labels, path=out / "sheet.png")
        print(out / "sheet.png")


@dataclass(frozen=True)
class GenerateOptions:
    """What pictures a base makes, and how many at once."""

    count: Annotated[int, typer.Option(min=1, help="pictures of each prompt")] = 1
    repeats: Annotated[int, typer.Option(help="times that each counts in an epoch")] = 1
    quantize: Annotated[str, typer.Option(help="none, nf4 or int8: hold the base in fewer bits")] = "none"
    batch: Annotated[int, typer.Option(min=1, help="pictures at once")] = 4

    def compute(self) -> "Compute":
        from lorakit.device import Compute

        return dataclasses.replace(Compute.choose(quantize=self.quantize), batch=self.batch)


@command
def generate(
    options: PictureOptions,
    more: GenerateOptions,
    prompts: Annotated[list[str], typer.Argument(help="what the pictures show; also their captions")],
    out: Annotated[Path, typer.Option(help="folder of the dataset; the pictures go into REPEATS_NAME/ in it")],
    name: Annotated[str, typer.Option(help="what they show in a word, such as 'woman'")],
    base: BaseName = "demo",
) -> None:
    """Make pictures with captions from a base, as regularisation or training data; called again, it continues."""
    from lorakit import sample as samples

    opened, sampling = options.open(base)
    sampling = dataclasses.replace(sampling, seeds=range(options.seed, options.seed + more.count))
    folder = samples.generate_pictures(
        opened, prompts, out, name, sampling, repeats=more.repeats, compute=more.compute()
    )
    print(f"done      {len(list(folder.glob('*.png')))} pictures in {folder}")


# ── LoRA files ──────────────────────────────────────────────────────────────────────────────────────────────────────


@command
def export(
    file: FileOptions,
    source: Annotated[Path, typer.Argument(help="a run folder, one of its checkpoints, or a LoRA file or folder")],
    out: Annotated[Path, typer.Option(help="the file to write; a folder with --format peft")],
    step: Annotated[str, typer.Option(help="of a run: newest, best, or a number")] = "newest",
) -> None:
    """Write a run's weights, or another program's LoRA, for other programs, and prove the file."""
    from lorakit.run import lora_of

    lora = lora_of(source, step)
    file.write(lora, out, f"export    {out} from {lora.name}, layout {file.layout}, {file.dtype or 'fp16'}")


@command
def merge(
    file: FileOptions,
    loras: Annotated[list[Path], typer.Argument(help="LoRA files, or folders of runs")],
    out: Annotated[Path, typer.Option(help="the LoRA file to write; with --base a new folder or file for the base")],
    strength: Annotated[list[float] | None, typer.Option(help="of each LoRA, in their order; 1 by default")] = None,
    rank: Annotated[int | None, typer.Option(help="of the result; by default the sum of all ranks, exactly")] = None,
    base: Annotated[str | None, typer.Option(help="merge into this base; with --rank, the base of DoRAs")] = None,
) -> None:
    """Merge several LoRAs into one, or LoRAs into a base."""
    from lorakit import adapter
    from lorakit import base as bases
    from lorakit.run import lora_of

    read = [lora_of(path) for path in loras]
    strengths = strength or [1.0] * len(read)
    opened = bases.open(base, half=False) if base else None
    if opened and rank is None:
        dtype = adapter.dtype_of(file.dtype) if file.dtype else None
        print(f"done      {adapter.merge_into_base(opened, read, strengths, out, dtype=dtype)}")
        return
    merged = adapter.merge(read, strengths, rank, opened)
    file.write(merged.lora, out, f"done      {out}: {merged.describe()}")


@command
def resize(
    file: FileOptions,
    lora: Annotated[Path, typer.Argument(help="a LoRA file, or the folder of a run")],
    out: Annotated[Path, typer.Option(help="the file to write")],
    rank: Annotated[int | None, typer.Option(help="at most this")] = None,
    energy: Annotated[float | None, typer.Option(help="share of each module's change to keep, 0 to 1")] = None,
) -> None:
    """Change a LoRA's rank."""
    from lorakit import adapter
    from lorakit.run import lora_of

    resized = adapter.resize(lora_of(lora), rank, energy)
    file.write(resized.lora, out, f"done      {out}: {resized.describe()}")


@dataclass(frozen=True)
class ExtractOptions:
    """What of the difference is kept."""

    rank: Annotated[int, typer.Option(help="at most this")] = 32
    energy: Annotated[float | None, typer.Option(help="share of each module's difference to keep, 0 to 1")] = None
    targets: Annotated[str, typer.Option(help="attention or attention+conv")] = "attention"
    text_encoders: Annotated[bool, typer.Option(help="their difference too")] = True


@command
def extract(
    file: FileOptions,
    options: ExtractOptions,
    tuned: Annotated[str, typer.Argument(help="the fine-tuned base: folder, checkpoint file or hub id")],
    original: Annotated[str, typer.Argument(help="the base that it was made of")],
    out: Annotated[Path, typer.Option(help="the LoRA file to write")],
) -> None:
    """Extract the difference between two checkpoints as a LoRA."""
    from lorakit import adapter
    from lorakit import base as bases

    after, before = (bases.open(name, half=False) for name in (tuned, original))
    extracted = adapter.extract(
        after, before, options.rank, energy=options.energy, targets=options.targets, text_encoders=options.text_encoders
    )
    file.write(extracted.lora, out, f"done      {out}: {extracted.describe()}")


@command
def upload(
    source: Annotated[Path, typer.Argument(help="a finished run's folder, or a LoRA file")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face Hub; made if there is none")],
    licence: Annotated[str | None, typer.Option(help="by the Hub's name; the base's usual one by default")] = None,
    public: Annotated[bool, typer.Option(help="make a new repository public")] = False,
    pictures: Annotated[bool, typer.Option(help="upload the dataset's pictures and captions too")] = False,
    comment: Annotated[str, typer.Option(help="a paragraph for the model card")] = "",
    overwrite: Annotated[bool, typer.Option(help="replace a README.md that lorakit did not write")] = False,
) -> None:
    """Upload a LoRA with a model card to the Hugging Face Hub; a new repository is private by default."""
    from lorakit import publish

    address = publish.upload(
        source, repository, licence=licence, private=not public, pictures=pictures, comment=comment, overwrite=overwrite
    )
    print(f"done      {address}")


def _readable(value: Any) -> str:
    """A fact for people: six digits, and of settings those that are not the default."""
    from lorakit.config import Config

    if isinstance(value, dict):
        usual = {name: field.get_default(call_default_factory=True) for name, field in Config.model_fields.items()}
        return ", ".join(f"{name}={setting!r}" for name, setting in value.items() if setting != usual.get(name))
    if isinstance(value, list):
        return ", ".join(str(x.get("file", x)) if isinstance(x, dict) else _readable(x) for x in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@command
def info(
    path: Annotated[Path, typer.Argument(help=f"a run folder, a checkpoint, a LoRA file, or a base: {BASES}")],
    as_json: AsJson = False,
) -> None:
    """Describe a run folder, a LoRA file or a named base."""
    from lorakit import adapter
    from lorakit.run import RunFolder, is_run

    entry = None if path.exists() else named.find(path.as_posix())
    if not (entry or path.exists()):
        raise FileNotFoundError(f"There is no {path}. Give a run folder, a .safetensors file or the name of a base.")
    facts: Any = entry.facts() if entry else None
    facts = facts or (RunFolder(path).describe() if is_run(path) else adapter.describe_file(path))
    if as_json:
        _print_json(facts)
        return
    for key, value in facts.items():
        if value not in (None, [], {}):
            print(f"{key:<14}{_readable(value)}")
    if not (entry or is_run(path) or facts["kind"] == "checkpoint"):
        print(adapter.norms_table(adapter.norms(adapter.load(path))))


# ── Judge ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ComparisonOptions:
    """Pictures of a comparison of runs."""

    prompt: Annotated[list[str] | None, typer.Option(help="the first run's own by default")] = None
    seed: Annotated[list[int] | None, typer.Option(help="of each prompt; 42 by default")] = None
    strength: Annotated[float, typer.Option(help="of the LoRAs")] = 1.0
    pictures: Annotated[bool, typer.Option(help="make pictures with every run, and with the bare base")] = True

    def made(self, base: str | None = None) -> Any:
        """The options of `evaluate.compare_runs`; False makes no pictures."""
        from lorakit import evaluate

        return self.pictures and evaluate.PictureOptions(self.prompt or (), self.seed or (42,), self.strength, base)


@command
def sweep(
    options: ComparisonOptions,
    config: Annotated[Path, typer.Argument(help="JSON file with the settings of all runs")],
    setting: Annotated[str, typer.Argument(help="the one in which they differ, such as rank")],
    values: Annotated[list[str], typer.Argument(help="its values; after -- if one begins with -")],
    out: Annotated[Path | None, typer.Option(help="folder of the runs; runs/NAME-SETTING by default")] = None,
) -> None:
    """Train runs that differ in one setting, and compare them; called again, it continues."""
    from lorakit import config as configs
    from lorakit import evaluate
    from lorakit.console import Console

    settings, console = configs.load(config), Console()
    folder = out or Path("runs") / f"{settings.name}-{setting}"
    comparison = evaluate.sweep(
        settings, setting, [_value(value) for value in values], folder, options.made(), console=console
    )
    print(comparison.describe())
    if console.stop.is_set():
        sys.exit(130)
    if comparison.missing:
        sys.exit(MISSING)


def _value(text: str) -> Any:
    """A setting's value in JSON; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@command
def compare(
    options: ComparisonOptions,
    runs: Annotated[list[Path], typer.Argument(help="folders of runs, or of a sweep")],
    base: Annotated[str | None, typer.Option(help="for the pictures; the first run's by default")] = None,
    out: Annotated[Path, typer.Option(help="folder for comparison.html")] = Path("comparison"),
    as_json: AsJson = False,
) -> None:
    """Compare runs side by side: settings that differ, curves, figures, the same prompts and seeds."""
    from lorakit import evaluate
    from lorakit.console import Console

    comparison = evaluate.compare_runs(runs, options.made(base), console=Console(_to_stderr))
    page, _ = evaluate.save_comparison(comparison, out)
    _print_json(comparison.facts()) if as_json else print(f"{comparison.describe()}\nlook at {page}")
    if comparison.missing:
        sys.exit(MISSING)


@dataclass(frozen=True)
class JudgeOptions:
    """What a report is about."""

    base: Annotated[str | None, typer.Option(help="diffusers folder, checkpoint file, hub id or 'demo'")] = None
    also: Annotated[str | None, typer.Option(help="another base of the family, to judge the LoRA on it too")] = None
    pictures: Annotated[str | None, typer.Option(help="that a file was trained on: folder or zip")] = None
    trigger: Annotated[str, typer.Option(help="the trigger word; the run's or file's by default")] = ""
    kind: Annotated[str, typer.Option("--type", help="character, style, object or clothing; the run's by default")] = ""
    see: Annotated[str, typer.Option(help="model that judges: auto, clip, clip-large, dinov2, a folder or none")] = (
        "auto"
    )
    seed: Annotated[int, typer.Option(help="of the first picture")] = 1000
    device: Annotated[str, typer.Option(help="auto, cuda, mps or cpu")] = "auto"


@command
def report(
    options: JudgeOptions,
    source: Annotated[Path, typer.Argument(help="a run folder, one of its checkpoints, or a LoRA file")],
    out: Annotated[Path | None, typer.Option(help="folder for the report; the run's by default")] = None,
    as_json: AsJson = False,
) -> None:
    """Make pictures with and without a LoRA, measure them, and fill in the guide's checklist."""
    from lorakit import dataset as datasets
    from lorakit import evaluate
    from lorakit.console import Console

    vision = None if options.see == "none" else options.see
    asked = evaluate.ReportOptions(options.trigger, options.kind, seed=options.seed, also=options.also, vision=vision)
    pictures = datasets.scan(options.pictures) if options.pictures else None
    made = evaluate.report(
        source, asked, base=options.base, pictures=pictures, device=options.device, console=Console(_to_stderr)
    )
    name = "report" if source.is_dir() else f"{source.name.removesuffix('.safetensors')}.report"
    page, _ = evaluate.save_report(made, out or (source if source.is_dir() else source.parent), name)
    _print_json(made.facts()) if as_json else print(f"{made.describe()}\nlook at {page}")


if __name__ == "__main__":
    main()
