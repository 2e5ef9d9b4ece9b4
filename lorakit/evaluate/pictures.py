"""The pictures that a report is made from."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from lorakit import base as bases
from lorakit import dataset as datasets
from lorakit import run, sample
from lorakit.evaluate import candidates
from lorakit.evaluate import variants as variants_module

STRENGTHS = (0.0, 0.5, 0.7, 0.9, 1.0)  # the guide's, and the bare base
CONTEXTS = {  # what the trigger is put into, by what is taught
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


Known = dict[tuple[str, int], Image.Image]  # the bare base's pictures by prompt and seed
Column = list[Image.Image]


# ── What is asked for, and made ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Asked:
    """Prompts, to be made with the LoRA and without."""

    contexts: list[str]  # alone, to be read
    prompts: list[str]  # with the trigger
    bare: list[str]  # the same without it
    unrelated: list[str]
    called: float | None  # share of the training captions that have the trigger; None where none are known

    @classmethod
    def of(
        cls, pictures: datasets.Dataset | None, trigger: str, kind: str, contexts: Sequence[str], embedded: bool,
        class_word: str = "",
    ) -> "Asked":  # fmt: skip
        own = [picture.caption for picture in pictures.pictures] if pictures else []
        if not trigger:
            return cls(list(contexts), [bases.escape(context) for context in contexts], [], [], None)
        phrase, said = _phrase(own, trigger), datasets.trigger_pattern(trigger)
        called = [bases.escape(f"{phrase}, {context}") for context in contexts]
        without = "" if kind == "style" else datasets.without_trigger(phrase, trigger, class_word)
        bare = [bases.escape(f"{without}, {context}" if without else context) for context in contexts]
        share = sum(bool(said.search(text)) for text in own) / len(own) if any(own) else None
        return cls(list(contexts), called, bare, list(NAMED if embedded else UNRELATED), share)

    def rows(self, seed: int) -> list[tuple[str, int]]:
        """Every prompt with its seed: with the trigger twice, and without it by the noise of the first time."""
        first = [*zip(self.prompts, range(seed, seed + len(self.prompts)), strict=True)]
        rest = [*self.prompts, *self.unrelated]
        bare = [(prompt, own) for prompt, (_, own) in zip(self.bare, first, strict=False)]
        return [*first, *bare, *zip(rest, range(seed + len(first), seed + len(first) + len(rest)), strict=True)]


@dataclass(frozen=True)
class Made:
    """Pictures that are to be judged; a column is made with one strength of one LoRA, a picture a prompt."""

    name: str
    trigger: str
    kind: str
    base: str
    asked: Asked
    shown: list[Column]  # with the trigger, at each of STRENGTHS
    second: tuple[Column, Column]  # the same by other noise, without the LoRA and with it
    bare: tuple[Column, Column]  # both empty without a trigger, these and the next
    unrelated: tuple[Column, Column]
    training: Column  # pictures it was trained on, at most MOST; () where these are not known
    checkpoints: dict[int, Column] = field(default_factory=dict)  # step → with the trigger at strength 1
    losses: dict[int, float] = field(default_factory=dict)  # step → validation loss
    gap: float | None = None  # the overfit dial at the end
    best: tuple[str, str] | None = None  # the checkpoint by validation loss, and why
    missing: tuple[str, ...] = ()  # what could not be had

    @property
    def count(self) -> int:
        pairs = (self.second, self.bare, self.unrelated)
        whole = sum(map(len, self.shown)) + sum(len(column) for pair in pairs for column in pair)
        return whole + sum(len(c) for c in self.checkpoints.values() if c is not self.shown[-1])


def make_pictures(
    source: str | Path, *, base: str | bases.Base | None = None, pictures: datasets.Dataset | None = None,
    trigger: str = "", kind: str = "", contexts: Sequence[str] = (), seed: int = 1000, steps: int | None = None,
    guidance: float | None = None, most: int = 6, device: str = "auto", say: Callable[[str], None] = print,
    stop: threading.Event | None = None, known: Known | None = None,
) -> Made:  # fmt: skip
    """Make the pictures that `judge` looks at; all with one loading of the base. Arguments as for `report`."""
    source, known, missing = Path(source).expanduser(), {} if known is None else known, []
    found, of_run = candidates.find_candidates(source), run.is_run(source)
    config, usual = found.config, candidates.starting_point(found)[0]
    kind = kind or (config.kind if config else "character")
    if kind not in CONTEXTS:
        raise ValueError(f"There is no kind {kind!r}. Use one of {', '.join(CONTEXTS)}.")
    if len(found.paths) > 1 and not of_run:
        raise ValueError(f"{source.name} holds {len(found.paths)} LoRAs: give one of them.")
    problems = list(found.problems)
    labels = [label for label, path in found.paths.items() if _sound(path, problems)]
    for problem in problems:
        say(f"report    {problem}")
    if not labels:
        raise ValueError(f"{source.name} holds nothing that can be judged. {' '.join(problems)}")
    opened = base if isinstance(base, bases.Base) else candidates.open_for(base or usual, config)
    try:
        pictures = pictures or (run.scan_dataset(config) if config else None)
    except (OSError, ValueError) as error:
        say(f"report    the run's pictures cannot be read: {error}")  # which names a folder: not for the page
        missing.append("the pictures of the run's dataset: they could not be read")
    about = run.lora_of(found.paths[labels[-1]]).metadata
    trigger = trigger or (config.trigger if config else about.get("modelspec.trigger_phrase", ""))
    skip = about.get("ss_clip_skip", "")
    settings = {
        "steps": steps or (config.sample_steps if config else 25),
        "guidance": guidance or (config.sample_guidance if config else 7.0), "device": device,
        "clip_skip": config.clip_skip if config else int(skip) if skip in ("1", "2", "3", "4") else 1,
        "quantize": config.quantize if config else "none",
        "precision": config.mixed_precision if config else "auto", "stop": stop,
    }  # fmt: skip
    size = (config.resolution, config.resolution) if config else (opened.resolution, opened.resolution)
    embedded = opened.name == candidates.DEMO
    asked = Asked.of(pictures, trigger, kind, contexts or (SUBJECTS if embedded else CONTEXTS[kind]), embedded,
                     config.class_word if config else "")  # fmt: skip
    rows, count, newest = asked.rows(seed), len(asked.prompts), labels[-1]
    chosen = _checkpoints(labels, found.best, most) if of_run and len(labels) > 1 else []
    columns = [(None, 0.0), *((newest, value) for value in STRENGTHS[1:])]
    ends = (0, len(columns) - 1)
    columns += [(label, 1.0) for label in chosen if label != newest]
    refused: list[str] = []
    variants = variants_module.make_variants(opened, columns, found.paths, tell=refused.append)
    if any(column not in variants for column in columns):
        raise ValueError(f"Not all can be judged on {opened.name}. {' '.join(refused)}")
    cells = {
        (row, column) for row in range(len(rows)) for column in range(len(columns)) if row < count or column in ends
    }
    grid = {(row, 0): known[key] for row, key in enumerate(rows) if key in known}
    say(f"report    {len(cells) - len(grid)} pictures: {count} prompts with the trigger at {len(STRENGTHS)} strengths, "
        f"{len(rows) - count} more without the LoRA and with it, {len(chosen)} checkpoints")  # fmt: skip
    prompts, seeds = zip(*rows, strict=True)
    done = sample.stream(
        opened, prompts, [variants[column] for column in columns], seeds=seeds, size=size, cells=cells - grid.keys(),
        **settings,
    )  # fmt: skip
    for row, column, picture in done:
        grid[row, column] = picture
        if column == 0:
            known[rows[row]] = picture
    if stop and stop.is_set():
        raise KeyboardInterrupt
    marks = np.cumsum([0, count, len(asked.bare), count, len(asked.unrelated)])
    part = lambda place, column: [grid[row, column] for row in range(marks[place], marks[place + 1])]  # noqa: E731
    pair = lambda place: (part(place, ends[0]), part(place, ends[1]))  # noqa: E731
    shown = [part(0, column) for column in range(len(STRENGTHS))]
    labelled = {label: part(0, place) for place, (label, _) in enumerate(columns) if place > ends[1]} | {
        newest: shown[-1]
    }
    log = _log(source) if of_run else []
    told = lambda name: {line["step"]: line[name] for line in log if np.isfinite(line.get(name, np.nan))}  # noqa: E731
    best = (found.best, str(run.best_checkpoint(source)[1])) if found.best in labels else None
    if not of_run:
        name = f"{config.name}-{source.stem}" if config and source.stem.startswith("step-") else source.stem
    else:
        name = config.name if config else source.name
    own = pictures.pictures if pictures else []
    trained = [_as_trained(own[i], *size) for i in _spread(len(own), MOST)]
    return Made(
        name, trigger, kind, opened.name, asked, shown, pair(2), pair(1), pair(3), trained,
        {_step(label): labelled[label] for label in chosen}, told("validation_loss"),
        next(reversed(told("overfit_gap").values()), None), best, tuple(missing),
    )  # fmt: skip


def _log(folder: Path) -> list[dict]:
    file = folder / "log.jsonl"
    return run.read_log(file, lambda _: None) if file.is_file() else []


def _step(label: str) -> int:
    return int(label.rpartition(" ")[2])


def _checkpoints(labels: Sequence[str], best: str | None, most: int) -> list[str]:
    """Up to `most` checkpoints of a run, spread over it; the last and the best among them."""
    chosen = {labels[i] for i in _spread(len(labels), most)} | {best}
    return [label for label in labels if label in chosen]


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` places of so many, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()


def _sound(path: Path, problems: list[str]) -> bool:
    try:
        run.lora_of(path)
    except (ValueError, OSError, FloatingPointError) as error:
        problems.append(str(error))
        return False
    return True


def _phrase(own: Sequence[str], trigger: str) -> str:
    """How captions say the trigger: the most frequent of their parts that has it ("a photo of sks person")."""
    if not trigger:
        return ""
    said = datasets.trigger_pattern(trigger)
    parts = Counter(part for caption in own for part in datasets.tags(caption) if said.search(part))
    part, times = parts.most_common(1)[0] if parts else ("", 0)
    return part if times > len(own) / 3 else trigger  # a part of one caption alone says what is on that picture


def _as_trained(picture: datasets.Picture, height: int, width: int) -> Image.Image:
    """A training picture at about the size that pictures are made in, so that fine detail can be compared."""
    image = datasets.open_picture(picture)
    share = (width * height / (image.width * image.height)) ** 0.5
    if share >= 1:
        return image
    smaller = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    return image.resize(smaller, Image.Resampling.LANCZOS)


FEWEST, MOST = 3, 300  # training pictures that say what they have in common; that are looked at
