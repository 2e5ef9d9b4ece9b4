"""Make the pictures that a report is measured on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from lorakit import base as bases
from lorakit import dataset as datasets
from lorakit import run
from lorakit.console import Console
from lorakit.device import Compute
from lorakit.evaluate import candidates
from lorakit.evaluate.variants import BARE, Column, make_grid, make_variants
from lorakit.evaluate.vision import VisionModel
from lorakit.sample import Sampling

STRENGTHS = (0.0, 0.5, 0.7, 0.9, 1.0)  # the guide's, and the bare base
CONTEXTS = {  # what the trigger is combined with, for each kind of LoRA
    "character": (
        "on a beach", "in a snowy forest", "in a city street at night", "close-up portrait", "full body, standing",
        "sitting in a café", "from the side", "oil painting",
    ),
    "style": (
        "a cat", "a city street", "a mountain lake", "a portrait of a woman", "a bowl of fruit", "a sailing ship",
        "a castle", "a tree in a field",
    ),
    "object": (
        "on a wooden table", "on grass", "in a shop window", "in the snow", "seen from above", "held in a hand",
        "on a white background", "in the dark",
    ),
    "clothing": (
        "worn by a woman", "worn by a man", "on a hanger", "on a beach", "in a city street", "close-up", "from behind",
        "full body, walking",
    ),
}  # fmt: skip
UNRELATED = ("a bowl of fruit", "a city street at night", "a mountain lake", "a portrait of an old man")
SUBJECTS = ("rocket", "red apple", "panda", "guitar", "house", "crab", "wrapped gift", "pizza")  # the embedded base's
NAMED = ("noto style, rocket", "fluent style, panda", "ink style, guitar", "noto style, house")  # its unrelated ones
FEWEST, MOST = 3, 300  # training pictures that suffice to measure what they have in common; that are looked at

Known = dict[tuple[str, int], Image.Image]  # the bare base's pictures, by prompt and seed
Pictures = list[Image.Image]


@dataclass(frozen=True)
class ReportOptions:
    """What a report measures, and on which pictures; without a vision model, what needs one is left open."""

    trigger: str = ""  # "" takes the run's or the file's; without any, leakage is not measured
    kind: str = ""  # one of CONTEXTS; "" takes the run's, or "character"
    contexts: Sequence[str] = ()  # what the trigger is combined with: 6 or more that differ; () takes the kind's
    seed: int = 1000  # of the first picture; not one of the run's samples
    steps: int | None = None  # of the sampler, like guidance; None takes the run's
    guidance: float | None = None
    checkpoints: int = 6  # of a run, how many are compared at most
    also: str | None = None  # another base of the family, on which the LoRA is judged too
    vision: str | VisionModel | None = "auto"  # open or for `vision.open`; "auto": "demo" for its base, else "clip"


@dataclass(frozen=True)
class Prompts:
    """Prompts for pictures with the LoRA and without."""

    contexts: list[str]  # without a trigger: adherence is measured by them
    triggered: list[str]  # trigger and context
    untriggered: list[str]  # the same without the trigger; empty where there is none, like `unrelated`
    unrelated: list[str]  # nothing to do with what was trained
    trigger_share: float | None  # of the training captions; None where none are known

    @classmethod
    def of(
        cls, dataset: datasets.Dataset | None, trigger: str, kind: str, contexts: Sequence[str], embedded: bool,
        class_word: str = "",
    ) -> "Prompts":  # fmt: skip
        """The prompts for a trigger, in the words of the training captions."""
        captions = [picture.caption for picture in dataset.pictures] if dataset else []
        if not trigger:
            return cls(list(contexts), [bases.escape(context) for context in contexts], [], [], None)
        phrase, pattern = _phrase(captions, trigger), datasets.trigger_pattern(trigger)
        triggered = [bases.escape(f"{phrase}, {context}") for context in contexts]
        without = "" if kind == "style" else datasets.without_trigger(phrase, trigger, class_word)
        untriggered = [bases.escape(f"{without}, {context}" if without else context) for context in contexts]
        share = sum(bool(pattern.search(text)) for text in captions) / len(captions) if any(captions) else None
        return cls(list(contexts), triggered, untriggered, list(NAMED if embedded else UNRELATED), share)

    def rows(self, seed: int) -> list[tuple[str, str, int]]:
        """Set, prompt and seed of each picture. Untriggered prompts have the seeds of the triggered ones."""
        first = [("triggered", prompt, seed + i) for i, prompt in enumerate(self.triggered)]
        bare = [("untriggered", prompt, seed + i) for i, prompt in enumerate(self.untriggered)]
        rest = [("reseeded", prompt) for prompt in self.triggered]
        rest += [("unrelated", prompt) for prompt in self.unrelated]
        return first + bare + [(*row, seed + i) for i, row in enumerate(rest, len(first))]


def _phrase(captions: Sequence[str], trigger: str) -> str:
    """The part of a caption that has the trigger and occurs most often, such as "a photo of sks person"."""
    pattern = datasets.trigger_pattern(trigger)
    parts = Counter(part for caption in captions for part in datasets.split_tags(caption) if pattern.search(part))
    part, times = parts.most_common(1)[0] if parts else ("", 0)
    return part if times > len(captions) / 3 else trigger  # a part of few captions describes their pictures only


@dataclass(frozen=True)
class Subject:
    """The LoRA that is judged, with its base, its run's settings and its training pictures."""

    source: Path
    found: candidates.Candidates
    labels: list[str]  # of the candidates that can be read, oldest first
    base: bases.Base
    kind: str
    trigger: str
    sampling: Sampling
    dataset: datasets.Dataset | None
    missing: tuple[str, ...]  # what could not be read

    @property
    def of_run(self) -> bool:
        return run.is_run(self.source)

    @property
    def name(self) -> str:
        config, stem = self.found.config, self.source.stem
        if self.of_run:
            return config.name if config else self.source.name
        return f"{config.name}-{stem}" if config and stem.startswith("step-") else stem

    def checkpoints(self, most: int) -> list[str]:
        """Up to `most` checkpoints of a run, spread over it; the last and the best among them."""
        if not (most and self.of_run) or len(self.labels) < 2:
            return []
        chosen = {self.labels[i] for i in _spread(len(self.labels), most)} | {self.found.best}
        return [label for label in self.labels if label in chosen]

    def log(self, name: str) -> dict[int, float]:
        """Step → a figure of the run's log."""
        lines = run.RunFolder(self.source).log() if self.of_run else []
        return {line["step"]: line[name] for line in lines if np.isfinite(line.get(name, np.nan))}


def open_subject(
    source: Path, options: ReportOptions, base: str | bases.Base | None, dataset: datasets.Dataset | None,
    console: Console,
) -> Subject:  # fmt: skip
    """Read what `report` is to judge; raises as it does."""
    found, missing = candidates.find_candidates(source), []
    config = found.config
    kind = options.kind or (config.kind if config else "character")
    if kind not in CONTEXTS:
        raise ValueError(f"There is no kind {kind!r}. Use one of {', '.join(CONTEXTS)}.")
    if len(found.paths) > 1 and not run.is_run(source):
        raise ValueError(f"{source.name} contains {len(found.paths)} LoRAs: give one of them.")
    problems, loras = list(found.problems), {}
    for label, path in found.paths.items():
        try:
            loras[label] = run.lora_of(path).metadata
        except (ValueError, OSError, FloatingPointError) as error:
            problems.append(str(error))
    for problem in problems:
        console.say(f"report    {problem}")
    if not loras:
        raise ValueError(f"{source.name} contains nothing that can be judged. {' '.join(problems)}")
    if not isinstance(base, bases.Base):
        base = candidates.open_for(base or candidates.starting_point(found)[0], config)
    try:
        dataset = dataset or (run.scan_dataset(config) if config else None)
    except (OSError, ValueError) as error:
        console.say(f"report    the run's pictures cannot be read: {error}")  # it names a folder: not for the page
        missing.append("the pictures of the run's dataset could not be read")
    metadata = list(loras.values())[-1]
    trigger = options.trigger or (config.trigger if config else metadata.get("modelspec.trigger_phrase", ""))
    skip = metadata.get("ss_clip_skip", "")
    usual = Sampling.of(config) if config else Sampling(clip_skip=int(skip) if skip in ("1", "2", "3", "4") else 1)
    sampling = replace(usual, steps=options.steps or usual.steps, guidance=options.guidance or usual.guidance)
    return Subject(source, found, list(loras), base, kind, trigger, sampling, dataset, tuple(missing))


@dataclass(frozen=True)
class PictureSet:
    """The pictures of a report, one for each prompt, and the facts of their LoRA."""

    name: str
    trigger: str
    kind: str
    base: str
    prompts: Prompts
    strengths: list[Pictures]  # of the triggered prompts, at each of STRENGTHS
    reseeded: tuple[Pictures, Pictures]  # of these prompts with other seeds, without the LoRA and with it
    untriggered: tuple[Pictures, Pictures]  # without the LoRA and with it; both empty without a trigger
    unrelated: tuple[Pictures, Pictures]  # as untriggered
    training: Pictures  # pictures the LoRA was trained on, at most MOST; [] where they are not known
    checkpoints: dict[int, Pictures] = field(default_factory=dict)  # step → of the triggered prompts at strength 1
    losses: dict[int, float] = field(default_factory=dict)  # step → validation loss
    gap: float | None = None  # overfit gap at the end
    best: tuple[str, str] | None = None  # checkpoint by validation loss, and why
    missing: tuple[str, ...] = ()  # what could not be read

    @property
    def count(self) -> int:
        """Pictures that were made; the last checkpoint's are those of the LoRA at strength 1."""
        pairs = (*self.reseeded, *self.untriggered, *self.unrelated)
        others = [pictures for pictures in self.checkpoints.values() if pictures is not self.strengths[-1]]
        return sum(map(len, [*self.strengths, *pairs, *others]))


def make_pictures(
    source: str | Path, options: ReportOptions | None = None, *, base: str | bases.Base | None = None,
    pictures: datasets.Dataset | None = None, device: str = "auto", known: Known | None = None,
    console: Console | None = None,
) -> PictureSet:  # fmt: skip
    """Make the pictures that `judge` measures, loading the base once. Arguments and errors as for `report`."""
    options, console = options or ReportOptions(), console or Console()
    known = {} if known is None else known
    subject = open_subject(Path(source).expanduser(), options, base, pictures, console)
    config, newest, embedded = subject.found.config, subject.labels[-1], subject.base.name == candidates.DEMO
    contexts = options.contexts or (SUBJECTS if embedded else CONTEXTS[subject.kind])
    class_word = config.class_word if config else ""
    prompts = Prompts.of(subject.dataset, subject.trigger, subject.kind, contexts, embedded, class_word)
    chosen = subject.checkpoints(options.checkpoints)
    strengths: list[Column] = [BARE, *((newest, value) for value in STRENGTHS[1:])]
    ends = (BARE, strengths[-1])
    columns = strengths + [(label, 1.0) for label in chosen if label != newest]
    refused: list[str] = []
    variants = make_variants(subject.base, columns, subject.found.paths, warn=refused.append)
    if any(column not in variants for column in columns):
        raise ValueError(f"Not every LoRA can be judged on {subject.base.name}. {' '.join(refused)}")
    rows, count = prompts.rows(options.seed), len(prompts.triggered)
    keys = [(prompt, seed) for _, prompt, seed in rows]
    cells = {(i, c) for i, (part, *_) in enumerate(rows) for c in columns if part == "triggered" or c in ends}
    grid = {(i, BARE): known[key] for i, key in enumerate(keys) if key in known}
    console.say(
        f"report    {len(cells) - len(grid)} pictures: {count} prompts with the trigger at {len(STRENGTHS)} strengths, "
        f"{len(rows) - count} others without and with the LoRA, {len(chosen)} checkpoints"
    )
    compute = Compute.choose(device, *((config.mixed_precision, config.quantize) if config else ()))
    grid |= make_grid(
        subject.base, keys, variants, subject.sampling, compute=compute, cells=cells - grid.keys(), console=console,
    )  # fmt: skip
    known |= {keys[i]: picture for (i, column), picture in grid.items() if column == BARE}
    if console.stop.is_set():
        raise KeyboardInterrupt

    def part(name: str, column: Column) -> Pictures:
        return [grid[i, column] for i, row in enumerate(rows) if row[0] == name]

    by_strength = [part("triggered", column) for column in strengths]
    reseeded, untriggered, unrelated = (
        (part(name, ends[0]), part(name, ends[1])) for name in ("reseeded", "untriggered", "unrelated")
    )
    by_step = {
        int(label.rpartition(" ")[2]): by_strength[-1] if label == newest else part("triggered", (label, 1.0))
        for label in chosen
    }
    best = subject.found.best
    why = (best, str(run.RunFolder(subject.source).best()[1])) if best in subject.labels else None
    trained = subject.dataset.pictures if subject.dataset else []
    training = [_as_trained(trained[i], by_strength[0][0]) for i in _spread(len(trained), MOST)]
    gap = next(reversed(subject.log("overfit_gap").values()), None)
    return PictureSet(
        subject.name, subject.trigger, subject.kind, subject.base.name, prompts, by_strength, reseeded, untriggered,
        unrelated, training, by_step, subject.log("validation_loss"), gap, why, subject.missing,
    )  # fmt: skip


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` of so many places, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()


def _as_trained(picture: datasets.Picture, like: Image.Image) -> Image.Image:
    """A training picture, reduced to about the area of a made one, so that fine detail can be compared."""
    image = datasets.open_picture(picture)
    share = (like.width * like.height / (image.width * image.height)) ** 0.5
    smaller = [max(1, round(side * share)) for side in image.size]
    return image if share >= 1 else image.resize(smaller, Image.Resampling.LANCZOS)
