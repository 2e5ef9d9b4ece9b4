"""The training guide's checklist, filled in: pictures are made with a LoRA and without it, measured, and judged.

Each line is a figure, how it was measured, a verdict, and where that is bad the guide's cure. What needs a model that
sees (`eyes`) is left open where there is none, and the report says so; the rest is measured all the same.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from lorakit import base as bases
from lorakit import captions as words
from lorakit import compare, dataset, eyes, files, measures, metadata, plots, prepare, record, sample
from lorakit.eyes import Eyes

Verdict = Literal["good", "doubtful", "bad", "not measured"]
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
LIMITS = {  # figure → from where it is good, from where no longer bad; guesses: report_calibration.py has not set them
    "gain": (0.55, 0.3), "hits": (0.9, 0.6), "consistency": (0.2, 0.1), "adherence": (0.8, 0.6),
    "diversity": (0.6, 0.4), "copied": (0.05, 0.2), "shift": (12.0, 25.0), "clipped": (0.03, 0.1),
    "residue": (1.35, 1.8), "broken": (0.0, 0.02), "rises": (0.79, 0.4), "leak": (0.5, 0.75), "unrelated": (0.4, 0.7),
}  # fmt: skip
CURES = {  # the guide's
    "nothing": "the trigger in captions and prompt must agree: check its spelling; train longer",
    "wrong trigger": "the captions call it up and the trigger does not: use the words of the captions, or mend them",
    "undertrained": "train longer, or with a higher rank",
    "overfitted": "take an earlier checkpoint, train fewer steps, add regularisation pictures",
    "learning rate": "learning rate 5e-5, schedule cosine",
    "leaking": "regularisation pictures or prior_prediction; captions that name what shall not change",
}


@dataclass(frozen=True)
class Line:
    """One line of the checklist."""

    aspect: str  # as the guide calls it
    what: str
    figure: float | None
    method: str
    verdict: Verdict
    cure: str = ""

    @property
    def told(self) -> str:
        return "—" if self.figure is None else f"{self.figure:.2f}"


@dataclass(frozen=True)
class Mark:
    """A checkpoint, measured."""

    label: str
    step: int
    validation_loss: float | None
    gain: float | None
    adherence: float | None


@dataclass(frozen=True)
class Report:
    name: str
    trigger: str
    kind: str
    base: str
    lines: tuple[Line, ...]
    faults: tuple[str, ...]  # what is wrong, the gravest first; () where nothing is
    marks: tuple[Mark, ...]  # of checkpoints
    recommended: str | None  # checkpoint to keep
    why: str
    missing: tuple[str, ...]  # what could not be measured, and what for
    made: int  # pictures
    prompts: tuple[str, ...] = ()
    rows: tuple[tuple[Image.Image, ...], ...] = field(default=(), repr=False)  # a row a prompt, a column a strength
    copies: tuple[tuple[Image.Image, Image.Image, float], ...] = field(default=(), repr=False)  # made, trained, cosine

    @property
    def good(self) -> bool:
        return not self.faults

    def facts(self) -> dict:
        """For programs, fit for JSON. Names no path."""
        return {
            "name": self.name, "trigger": self.trigger, "kind": self.kind, "base": self.base, "pictures": self.made,
            "lines": [vars(line) for line in self.lines], "faults": list(self.faults),
            "checkpoints": [vars(mark) for mark in self.marks], "recommended": self.recommended, "why": self.why,
            "missing": list(self.missing),
        }  # fmt: skip

    def describe(self) -> str:
        """For a terminal."""
        head = f"{self.name} on {self.base}, {self.made} pictures: {', '.join(self.faults) or 'nothing wrong'}"
        lines = [f"{MARKS[line.verdict]} {line.aspect:<18} {line.told:>6}  {line.what}" for line in self.lines]
        cures = [f"  → {cure}" for cure in dict.fromkeys(line.cure for line in self.lines if line.cure)]
        best = [f"keep {self.recommended}: {self.why}"] if self.recommended else []
        return "\n".join([head, *lines, *cures, *best, *(f"not measured: {text}" for text in self.missing)])

    def html(self) -> str:
        """One page that holds its pictures, of any colour scheme."""
        return _page(self)

    def _repr_html_(self) -> str:
        return f'<div style="max-width:900px">{_body(self)}</div>'


MARKS = {"good": "✓", "doubtful": "?", "bad": "✗", "not measured": " "}


def report(
    source: str | Path, *, base: str | bases.Base | None = None, pictures: dataset.Dataset | None = None,
    trigger: str = "", kind: str = "", contexts: Sequence[str] = (), see: str | Eyes | None = "auto", seed: int = 1000,
    steps: int | None = None, guidance: float | None = None, most: int = 6, device: str = "auto",
    say: Callable[[str], None] = print, stop: threading.Event | None = None,
) -> Report:  # fmt: skip
    """Fill in the guide's checklist for a run or a LoRA file.

    Args:
        source: a run's folder, one of its checkpoints, or a file. Of a run, the newest weights are judged, and up to
            `most` checkpoints compared.
        base: as `base.open` takes it; None takes the run's, or that of the file's family.
        pictures: that it was trained on; None takes the run's. Without any, what needs them is left open.
        trigger, kind: None given, the run's, or what the file says.
        contexts: what the trigger is put into: 6 and more that differ; () takes those for the kind.
        see: model for `eyes.open`, or one that is open; "auto" is the embedded one for the embedded base, else CLIP;
            None does without.
        seed: of the first picture; not one that was looked at in training.
        steps, guidance: of the sampler; None takes the run's.
        device: as `base.choose_device` takes it.
        stop: set from elsewhere, ends it with a KeyboardInterrupt.

    Raises:
        FileNotFoundError, ValueError: no such run, nothing to judge, or a base that does not go with it.
    """
    found = compare.candidates(source)
    config, labels = found.config, list(found.paths)
    name = Path(source).stem if config is None else config.name
    usual, _ = compare.beginning(found)
    opened = base if isinstance(base, bases.Base) else compare.opened(base or usual, config)
    pictures = pictures or (prepare.scan(config) if config else None)
    lora = record.lora_of(found.paths[labels[-1]])
    trigger = trigger or (config.trigger if config else lora.metadata.get("modelspec.trigger_phrase", ""))
    kind = kind or (config.kind if config else "character")
    settings = {
        "steps": steps or (config.sample_steps if config else 25),
        "guidance": guidance or (config.sample_guidance if config else 7.0), "device": device,
        "clip_skip": config.clip_skip if config else 1, "quantize": config.quantize if config else "none",
        "precision": config.mixed_precision if config else "auto", "stop": stop,
    }  # fmt: skip
    if config:
        settings["size"] = (config.resolution, config.resolution)
    embedded = opened.name == compare.DEMO
    asked = _Asked.of(opened, pictures, trigger, kind, contexts or (SUBJECTS if embedded else CONTEXTS[kind]), embedded)
    seeing, missing = _open_eyes(see, embedded, device, say)
    if pictures is None:
        missing.append("likeness, copies and colours against the training pictures: give the run, or its pictures")

    def made(prompts: Sequence[str], seeds: Sequence[int], columns: Sequence[compare.Column]) -> list[list]:
        """Pictures, a row a prompt, a column a variant."""
        refused: list[str] = []
        chosen = compare.variants(opened, columns, found.paths, tell=refused.append)
        for text in refused:
            say(f"report    {text}")
        if any(column not in chosen for column in columns):
            raise ValueError(f"Not all can be judged on {opened.name}. {' '.join(refused)}")
        grid: list[list] = [[None] * len(columns) for _ in prompts]
        done = sample.stream(opened, prompts, [chosen[column] for column in columns], seeds=list(seeds), **settings)
        for row, column, picture in done:
            grid[row][column] = picture
        if stop and stop.is_set():
            raise KeyboardInterrupt
        return grid

    newest = labels[-1]
    every = [(None, 0.0)] + [(newest, value) for value in STRENGTHS[1:]]
    ends = [every[0], every[-1]]
    count = len(asked.prompts)
    say(f"report    {count} prompts with the trigger at {len(every)} strengths")
    shown = made(asked.prompts, range(seed, seed + count), every)
    others = [*asked.prompts, *asked.bare, *asked.unrelated, *asked.captions]
    say(f"report    {len(others)} prompts more, without the LoRA and with it")
    more = made(others, range(seed + count, seed + count + len(others)), ends)
    places = np.cumsum([0, count, len(asked.bare), len(asked.unrelated), len(asked.captions)])
    second, bare, unrelated, told = ([[row[c] for row in more[a:b]] for c in (0, 1)]
                                     for a, b in zip(places, places[1:], strict=False))  # fmt: skip
    size = settings.get("size") or (opened.resolution, opened.resolution)
    training = [_as_trained(picture, *size) for picture in pictures.pictures] if pictures else []
    figures, copies = _figures(
        asked, [list(column) for column in zip(*shown, strict=True)], second, bare, unrelated, told, training, seeing
    )
    marks: tuple[Mark, ...] = ()
    if config and len(labels) > 1:
        marks = _checkpoints(Path(source), found, made, asked, seed, most, training, seeing, say)
    recommended, why = recommend(marks)
    if marks and recommended is None and found.best:
        recommended, why = found.best, str(record.best_checkpoint(Path(source))[1])
    faults = diagnose(figures)
    total = sum(map(len, shown)) + sum(map(len, more)) + len(marks) * count
    return Report(
        name, trigger, kind, opened.name, lines(figures, faults), faults, marks, recommended, why, tuple(missing),
        total, tuple(asked.prompts), tuple(map(tuple, shown)), copies,
    )  # fmt: skip


def save(made: Report, folder: str | Path) -> tuple[Path, Path]:
    """Write report.html and report.json into a folder."""
    page, facts = Path(folder) / "report.html", Path(folder) / "report.json"
    with files.replacing(page) as partial:
        partial.write_text(made.html(), "utf-8")
    with files.replacing(facts) as partial:
        partial.write_text(json.dumps(made.facts(), indent=2, ensure_ascii=False) + "\n", "utf-8")
    return page, facts


# ── What is asked for ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Asked:
    contexts: list[str]  # alone, to be read
    prompts: list[str]  # with the trigger
    bare: list[str]  # the same without it
    unrelated: list[str]
    captions: list[str]  # some of the training pictures'

    @classmethod
    def of(cls, base, pictures, trigger: str, kind: str, contexts: Sequence[str], embedded: bool) -> "_Asked":
        own = [picture.caption for picture in pictures.pictures] if pictures else []
        phrase = _phrase(own, trigger)
        called = [f"{phrase}, {context}" if phrase else context for context in contexts]
        without = " ".join(word for word in phrase.replace(trigger, "").split() if word) if trigger else ""
        bare = [f"{without}, {c}" if without and kind != "style" else c for c in contexts]
        unrelated = [c for c in (SUBJECTS[::2] if embedded else UNRELATED) if kind != "style" or not embedded]
        spread = np.linspace(0, len(own) - 1, min(4, len(own))).round().astype(int) if own else []
        return cls(list(contexts), called, bare, unrelated, [own[i] for i in spread])


def _phrase(own: Sequence[str], trigger: str) -> str:
    """How captions say the trigger: the most frequent of their parts that has it ("a photo of sks person")."""
    if not trigger:
        return ""
    parts = Counter(part for caption in own for part in words.tags(caption) if trigger in part)
    part, times = parts.most_common(1)[0] if parts else ("", 0)
    return part if times > len(own) / 3 else trigger  # a part of one caption alone says what is on that picture


def _open_eyes(
    see: str | Eyes | None, embedded: bool, device: str, say: Callable[[str], None]
) -> tuple[Eyes | None, list[str]]:
    if isinstance(see, Eyes):
        return see, []
    if see is None:
        return None, ["what needs a model that sees: it was asked to do without"]
    try:
        return eyes.open(("demo" if embedded else "clip") if see == "auto" else see, device), []
    except (FileNotFoundError, ValueError) as error:
        say(f"report    {error}")  # which may name a folder: not for the page
        return None, ["likeness, adherence, diversity and copies: the model that sees could not be loaded"]


# ── What is measured ────────────────────────────────────────────────────────────────────────────────────────────────


def _figures(
    asked: _Asked, shown: list[list[Image.Image]], second: list[list[Image.Image]], bare: list[list[Image.Image]],
    unrelated: list[list[Image.Image]], told: list[list[Image.Image]], training: list[Image.Image], seeing: Eyes | None,
) -> tuple[dict[str, float], tuple[tuple[Image.Image, Image.Image, float], ...]]:  # fmt: skip
    """Figure by name; and the pictures that are copies of training pictures."""
    without, with_it = shown[0], shown[-1]
    coloured = measures.colour(training) if training else None
    fine = max(measures.residue(without), measures.residue(training) if training else 0)
    figures = {
        "broken": measures.broken(with_it + second[1]),
        "shift": measures.colour_shift(measures.colour(with_it), measures.colour(without), coloured),
        "clipped": measures.clipped(with_it)
        - max(measures.clipped(without), measures.clipped(training) if training else 0),
        "residue": measures.residue(with_it) / max(fine, 1e-6),
    }
    by_pixels = [measures.difference(column, without) for column in shown]
    if seeing is None:
        figures["rises"] = measures.rises(by_pixels)
        changed = max(by_pixels[-1], 1e-6)
        figures["leak"] = measures.difference(bare[1], bare[0]) / changed
        if unrelated[0]:
            figures["unrelated"] = measures.difference(unrelated[1], unrelated[0]) / changed
        return figures, ()
    columns = [seeing.see(column) for column in shown]
    first, last = columns[0], columns[-1]
    second_first, second_last = (seeing.see(column) for column in second)
    changed = max(measures.change(last, first), 1e-6)
    figures |= {
        "consistency": measures.consistency(last, first),
        "diversity": measures.change(last, second_last) / max(measures.change(first, second_first), 1e-6),
        "leak": measures.change(seeing.see(bare[1]), seeing.see(bare[0])) / changed,
    }  # fmt: skip
    if unrelated[0]:
        figures["unrelated"] = measures.change(seeing.see(unrelated[1]), seeing.see(unrelated[0])) / changed
    if seeing.reads:
        texts = seeing.read(asked.contexts)
        base_adherence = max(measures.adherence(first, texts), 1e-6)
        figures["adherence"] = measures.adherence(last, texts) / base_adherence
    copies: tuple = ()
    if len(training) > 2:
        trained = seeing.see(training)
        within, plain = measures.likeness_within(trained), measures.likeness(first, trained)
        liked = [measures.likeness(column, trained) for column in columns]
        figures["gain"] = measures.gain(liked[-1], plain, within)
        figures["hits"] = measures.hits(liked[-1], plain, within)
        figures["rises"] = measures.rises([values.mean() for values in liked])
        if told[0]:
            captioned = [measures.likeness(seeing.see(column), trained) for column in told]
            figures["caption gain"] = measures.gain(captioned[1], captioned[0], within)
        twins = np.sort(trained @ trained.T - 2 * np.eye(len(trained)), 1)[:, -1]
        near = max(0.97, float(np.quantile(twins, 0.98)))
        pictures, vectors = with_it + second[1], np.concatenate([last, second_last])
        places, cosines = measures.nearest(vectors, trained)
        taken = cosines > near
        figures["copied"] = float(taken.mean())
        copies = tuple(
            (pictures[i], training[places[i]], float(cosines[i])) for i in np.argsort(-cosines)[:4] if taken[i]
        )
    else:
        figures["rises"] = measures.rises([measures.change(column, first) for column in columns])
    return figures, copies


def _as_trained(picture: dataset.Picture, height: int, width: int) -> Image.Image:
    """A training picture at about the size that pictures are made in, so that fine detail can be compared."""
    image = dataset.open_picture(picture)
    share = (width * height / (image.width * image.height)) ** 0.5
    if share >= 1:
        return image
    smaller = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    return image.resize(smaller, Image.Resampling.LANCZOS)


def _checkpoints(source: Path, found, made, asked: _Asked, seed: int, most: int, training, seeing, say):
    """Up to `most` checkpoints of a run, spread over it, the last among them, with likeness and adherence."""
    labels = [label for label in found.paths if _sound(found.paths[label], say)]
    places = np.unique(np.linspace(0, len(labels) - 1, min(most, len(labels))).round().astype(int))
    chosen = [labels[i] for i in places]
    if found.best in labels and found.best not in chosen:
        chosen = sorted([*chosen, found.best], key=labels.index)
    say(f"report    {len(chosen)} checkpoints")
    grid = made(asked.prompts, range(seed, seed + len(asked.prompts)), [(None, 0.0), *((c, 1.0) for c in chosen)])
    columns = [list(column) for column in zip(*grid, strict=True)]
    log = source / "log.jsonl"
    marks = plots.read_log(log, lambda _: None) if log.is_file() else []
    judged = {line["step"]: line["validation_loss"] for line in marks if "validation_loss" in line}
    vectors = [seeing.see(column) for column in columns] if seeing else []
    trained = seeing.see(training) if seeing and len(training) > 2 else None
    texts = seeing.read(asked.contexts) if seeing and seeing.reads else None
    result = []
    for number, label in enumerate(chosen, 1):
        step = int(label.rpartition(" ")[2])
        near = min(judged, key=lambda s: abs(s - step), default=None)
        gain = adherence = None
        if trained is not None:
            within, plain = measures.likeness_within(trained), measures.likeness(vectors[0], trained)
            gain = measures.gain(measures.likeness(vectors[number], trained), plain, within)
        if texts is not None:
            adherence = measures.adherence(vectors[number], texts) / max(measures.adherence(vectors[0], texts), 1e-6)
        result.append(Mark(label, step, None if near is None else judged[near], gain, adherence))
    return tuple(result)


def _sound(path: Path, say: Callable[[str], None]) -> bool:
    try:
        record.lora_of(path)
    except (ValueError, OSError, FloatingPointError) as error:
        say(f"report    {error}")
        return False
    return True


# ── What is concluded ───────────────────────────────────────────────────────────────────────────────────────────────


def recommend(marks: Sequence[Mark]) -> tuple[str | None, str]:
    """The checkpoint to keep and why: the highest product of likeness and adherence; None where these are not measured.

    Of checkpoints whose product is within 3 % of the best, the earliest: less trained is less overfitted.
    """
    scored = [(max(m.gain, 0.0) * min(m.adherence, 1.0), m) for m in marks if None not in (m.gain, m.adherence)]
    if scored and max(score for score, _ in scored) > 0:
        best = max(score for score, _ in scored)
        score, mark = next((score, m) for score, m in scored if score >= 0.97 * best)
        return mark.label, (
            f"likeness to the training pictures {mark.gain:.2f} of what they have among themselves, and "
            f"{mark.adherence:.0%} of the bare base's adherence to prompts"
        )
    return None, ""


def diagnose(figures: Mapping[str, float]) -> tuple[str, ...]:
    """What is wrong by the figures, the gravest first, in the words of `CURES`; () where nothing is."""
    get, faults = figures.get, []
    ruined = get("broken", 0) > LIMITS["broken"][1] or get("residue", 1) > LIMITS["residue"][1]
    if ruined or get("shift", 0) > LIMITS["shift"][1] or get("clipped", 0) > LIMITS["clipped"][1]:
        faults.append("learning rate")
    if get("copied", 0) > LIMITS["copied"][1] or (
        get("adherence", 1) < LIMITS["adherence"][1] and "learning rate" not in faults
    ):
        faults.append("overfitted")
    if get("gain", 1) < LIMITS["gain"][1]:
        better = get("caption gain", 0) - get("gain", 0)
        faults.append("wrong trigger" if better > 0.25 else "undertrained" if get("gain", 1) > 0.1 else "nothing")
    if max(get("leak", 0), get("unrelated", 0)) > LIMITS["leak"][1] and get("gain", 1) >= LIMITS["gain"][1]:
        faults.append("leaking")
    return tuple(faults)


ROWS = (  # figure, the guide's aspect, what it is, how it is measured, the fault whose cure helps
    ("gain", "feature accuracy", "way from the bare base's likeness to the training pictures' own",
     "mean cosine to the nearest third of the training pictures", "undertrained"),
    ("hits", "feature accuracy", "share of pictures past half of that way", "the same, picture by picture",
     "undertrained"),
    ("consistency", "style consistency", "how alike the change is from subject to subject",
     "mean cosine of the changes of two pictures", "undertrained"),
    ("adherence", "flexibility", "adherence to prompts, against the bare base's",
     "cosine of pictures to their own prompts above that to the others'", "overfitted"),
    ("diversity", "flexibility", "difference between seeds, against the bare base's", "1 less the cosine of two seeds",
     "overfitted"),
    ("copied", "flexibility", "share of pictures that repeat a training picture",
     "nearest training picture, nearer than these are to each other", "overfitted"),
    ("shift", "no artifacts", "colours that neither base nor training pictures have, in levels of 255",
     "mean and spread of three opposed colours", "learning rate"),
    ("clipped", "no artifacts", "share of pixels with burned-in colours, beyond base and training pictures",
     "a colour at its limit while another is not", "learning rate"),
    ("residue", "no artifacts", "finest detail, against base and training pictures", "mean absolute Laplacian",
     "learning rate"),
    ("broken", "no artifacts", "share of pictures of a single colour", "spread of all pixels below 2 levels",
     "learning rate"),
    ("rises", "strength control", "whether likeness rises with strength",
     "pairs of the five strengths that rise, less those that fall", "overfitted"),
    ("leak", "leakage", "change without the trigger, against the change with it", "the same subjects, no trigger",
     "leaking"),
    ("unrelated", "leakage", "change of unrelated prompts, against the change with the trigger",
     "subjects of other kinds", "leaking"),
)  # fmt: skip
FALLING = ("copied", "shift", "clipped", "residue", "broken", "leak", "unrelated")  # figures of which less is better


def lines(figures: Mapping[str, float], faults: Sequence[str]) -> tuple[Line, ...]:
    """The checklist."""
    found = []
    for name, aspect, what, method, fault in ROWS:
        figure = figures.get(name)
        verdict = "not measured" if figure is None else _verdict(name, figure)
        own = next((other for other in faults if other in ("wrong trigger", "nothing")), fault)
        cure = CURES[own if fault == "undertrained" else fault] if verdict == "bad" else ""
        found.append(Line(aspect, what, None if figure is None else round(figure, 4), method, verdict, cure))
    return tuple(found)


def _verdict(name: str, figure: float) -> Verdict:
    good, bad = LIMITS[name]
    if name in FALLING:
        return "good" if figure <= good else "bad" if figure > bad else "doubtful"
    return "good" if figure >= good else "bad" if figure < bad else "doubtful"


# ── The page ────────────────────────────────────────────────────────────────────────────────────────────────────────

TONES = plots.TONES | {"doubtful": plots.TONES["warning"], "not measured": "#888888"}
STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em}"
    "@media(prefers-color-scheme:dark){body{background:#161616;color:#eee}}"
)


def _page(made: Report) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(made.name)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body>{_body(made)}</body></html>\n"
    )


def _body(made: Report) -> str:
    verdict = "nothing is wrong with it" if made.good else "; ".join(made.faults)
    parts = [
        f"<h1>{escape(made.name)}</h1><p>{escape(made.kind)}, trigger <b>{escape(made.trigger or 'none')}</b>, on "
        f"{escape(made.base)}; {made.made} pictures. <b>{escape(verdict)}</b></p>",
        *(f"<p><b>{escape(fault)}</b>: {escape(CURES[fault])}</p>" for fault in made.faults),
        _table([
            [f'<span style="color:{TONES[line.verdict]}">{MARKS[line.verdict]} {line.verdict}</span>',
             escape(line.aspect), line.told, f"{escape(line.what)}<br><small>{escape(line.method)}</small>"]
            for line in made.lines
        ], "verdict", "aspect", "figure", "what it is, how it was measured"),
    ]  # fmt: skip
    if made.marks:
        keep = f"<p>Keep <b>{escape(made.recommended)}</b>: {escape(made.why)}</p>" if made.recommended else ""
        figure = lambda value: "—" if value is None else f"{value:.3f}"  # noqa: E731
        rows = [[escape(m.label), figure(m.validation_loss), figure(m.gain), figure(m.adherence)] for m in made.marks]
        parts += ["<h2>Checkpoints</h2>", keep, _curves(made.marks)]
        parts.append(_table(rows, "checkpoint", "validation loss", "likeness", "adherence"))
    if made.rows:
        heads = ["", *("base" if s == 0 else f"strength {s:g}" for s in STRENGTHS)]
        rows = [[escape(p), *map(_image, row)] for p, row in zip(made.prompts, made.rows, strict=True)]
        parts += ["<h2>Pictures</h2>", _table(rows, *heads)]
    if made.copies:
        rows = [[_image(one), _image(other), f"{cosine:.3f}"] for one, other, cosine in made.copies]
        parts += ["<h2>Too near to a training picture</h2>", _table(rows, "made", "trained on", "cosine")]
    parts += [f"<p>Not measured: {escape(text)}</p>" for text in made.missing]
    return "".join(parts)


def _table(rows: Sequence[Sequence[str]], *heads: str) -> str:
    cell = 'style="padding:4px 8px;text-align:left;vertical-align:top"'
    head = "".join(f"<th {cell}>{name}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td {cell}>{value}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div style="overflow-x:auto"><table style="border-collapse:collapse"><tr>{head}</tr>{body}</table></div>'


def _image(picture: Image.Image, side: int = 128) -> str:
    return f'<img style="width:{side}px;display:block" alt="" src="{metadata.jpeg(picture, 2 * side)}">'


def _curves(marks: Sequence[Mark], width: int = 640, height: int = 200) -> str:
    """Validation loss, likeness and adherence over the steps, each from its lowest to its highest."""
    curves = (("validation loss", "validation_loss", plots.JUDGED), ("likeness", "gain", plots.ACCENT),
              ("adherence", "adherence", TONES["good"]))  # fmt: skip
    first, last = marks[0].step, max(marks[-1].step, marks[0].step + 1)
    parts, named = [], 0
    for name, key, colour in curves:
        points = [(mark.step, getattr(mark, key)) for mark in marks if getattr(mark, key) is not None]
        if len(points) < 2:
            continue
        low, high = min(value for _, value in points), max(value for _, value in points)
        at = [
            (10 + (step - first) / (last - first) * (width - 20),
             height - 30 - (value - low) / max(high - low, 1e-9) * (height - 60))
            for step, value in points
        ]  # fmt: skip
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{10 + 200 * named}" y="16" fill="{colour}">{name}: {low:.3g} to {high:.3g}</text>')
        named += 1
    ends = (
        f'<text x="10" y="{height - 6}">step {first}</text><text x="{width - 10}" y="{height - 6}" '
        f'text-anchor="end">step {last}</text>'
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px;width:100%" fill="currentColor" '
        f'font-size="12">{"".join(parts)}{ends}</svg>'
    )
