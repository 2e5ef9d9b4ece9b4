"""The training guide's checklist, filled in: pictures are made with a LoRA and without it, measured, and judged.

Each line is a figure, how it was measured, a verdict, and where that is bad the guide's cure. What needs a model that
sees (`eyes`) is left open where there is none, and the report says so; the rest is measured all the same.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from lorakit import base as bases
from lorakit import dataset as datasets
from lorakit import plots, storage
from lorakit.evaluate import candidates, metrics, vision
from lorakit.evaluate.pictures import FEWEST, STRENGTHS, Known, Made, make_pictures
from lorakit.evaluate.vision import Eyes
from lorakit.page import STYLE, TONES, image, table

Verdict = Literal["good", "doubtful", "bad", "not measured"]

LIMITS = {  # figure → from where it is good, from where no longer bad: tests/bench/report_calibration.py
    "gain": (0.75, 0.5), "chance": (0.01, 0.05), "hits": (0.9, 0.8), "unevenness": (0.4, 0.6), "adherence": (0.75, 0.6),
    "variety": (0.7, 0.5), "copied": (0.05, 0.15), "gap": (0.7, 1.0), "shift": (0.5, 0.75), "clipped": (0.03, 0.1),
    "residue": (1.1, 1.3), "broken": (0.0, 0.02), "rises": (0.79, 0.4), "holds": (1.0, 0.7), "leak": (0.4, 0.75),
    "unrelated": (0.3, 0.6),
}  # fmt: skip
CURES = {  # the guide's
    "wrong trigger": "few captions hold the trigger: check its spelling, use the words of the captions, or mend them",
    "undertrained": "train longer, or with a higher rank; the trigger in captions and prompt must agree",
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
    untriggered: tuple[tuple[str, Image.Image, Image.Image], ...] = field(default=(), repr=False)  # prompt, base, LoRA
    steps: tuple[tuple[Image.Image, ...], ...] = field(default=(), repr=False)  # a row a prompt, a column a checkpoint
    copies: tuple[tuple[Image.Image, Image.Image, float], ...] = field(default=(), repr=False)  # made, trained, cosine

    @property
    def verdict(self) -> str:
        """In a word."""
        bad = sum(line.verdict == "bad" for line in self.lines)
        doubts = f"no fault, and {bad} of {len(self.lines)} lines that are bad"
        return "; ".join(self.faults) or (doubts if bad else "nothing is wrong with it")

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
        head = f"{self.name} on {self.base}, {self.made} pictures: {self.verdict}"
        lines = [f"{MARKS[line.verdict]} {line.aspect:<18} {line.told:>6}  {line.what}" for line in self.lines]
        cures = [f"  → {cure}" for cure in dict.fromkeys(line.cure for line in self.lines if line.cure)]
        best = [f"keep {self.recommended or 'none'}: {self.why}"] if self.why else []
        return "\n".join([head, *lines, *cures, *best, *(f"not measured: {text}" for text in self.missing)])

    def html(self) -> str:
        """One page that holds its pictures, of any colour scheme."""
        return _page(self)

    def _repr_html_(self) -> str:
        return f'<div style="max-width:900px">{_body(self)}</div>'


MARKS = {"good": "✓", "doubtful": "?", "bad": "✗", "not measured": " "}


def report(
    source: str | Path, *, base: str | bases.Base | None = None, pictures: datasets.Dataset | None = None,
    trigger: str = "", kind: str = "", contexts: Sequence[str] = (), see: str | Eyes | None = "auto", seed: int = 1000,
    steps: int | None = None, guidance: float | None = None, most: int = 6, device: str = "auto",
    say: Callable[[str], None] = print, stop: threading.Event | None = None, known: Known | None = None,
) -> Report:  # fmt: skip
    """Fill in the guide's checklist for a run or a LoRA file.

    Args:
        source: a run's folder, one of its checkpoints, or a file. Of a run, the newest weights are judged, and up to
            `most` checkpoints compared; a checkpoint or the finished file is judged with its run's settings.
        base: as `base.open` takes it; None takes the run's, or that of the file's family.
        pictures: that it was trained on; None takes the run's. Without any, what needs them is left open.
        trigger, kind: "" takes the run's, else the trigger that the file says, and a character. Without any trigger,
            leakage is left open.
        contexts: what the trigger is put into: 6 and more that differ; () takes those for the kind.
        see: model for `eyes.open`, or one that is open; "auto" is the embedded one for the embedded base, else CLIP.
            What cannot be loaded is done without, and told; None does without.
        seed: of the first picture; not one that was looked at in training.
        steps, guidance: of the sampler; None takes the run's.
        device: as `base.choose_device` takes it.
        stop: set from elsewhere, ends it with a KeyboardInterrupt.
        known: the bare base's pictures from reports with the same base and sampler: not made again, new ones are added.

    Raises:
        FileNotFoundError, ValueError: no such run, model or kind; nothing to judge; or a base that does not go with it.
    """
    if isinstance(see, str) and see not in ("auto", "demo"):
        storage.locate_model(see, vision.MODELS)  # a wrong name is told before pictures are made
    made = make_pictures(
        source, base=base, pictures=pictures, trigger=trigger, kind=kind, contexts=contexts, seed=seed, steps=steps,
        guidance=guidance, most=most, device=device, say=say, stop=stop, known=known,
    )  # fmt: skip
    seeing, missing = _open_eyes(see, made.base == candidates.DEMO, device, say)
    return judge(made, seeing, missing)


def save_report(made: Report, folder: str | Path, name: str = "report") -> tuple[Path, Path]:
    """Write NAME.html and NAME.json into a folder."""
    page, facts = Path(folder) / f"{name}.html", Path(folder) / f"{name}.json"
    with storage.write_file(page) as partial:
        partial.write_text(made.html(), "utf-8")
    with storage.write_file(facts) as partial:
        partial.write_text(json.dumps(made.facts(), indent=2, ensure_ascii=False) + "\n", "utf-8")
    return page, facts


def _open_eyes(
    see: str | Eyes | None, embedded: bool, device: str, say: Callable[[str], None]
) -> tuple[Eyes | None, list[str]]:
    if isinstance(see, Eyes):
        return see, []
    if see is None:
        return None, ["what needs a model that sees: it was asked to do without"]
    try:
        return vision.open(("demo" if embedded else "clip") if see == "auto" else see, device), []
    except (FileNotFoundError, ValueError) as error:
        say(f"report    {error}")  # which may name a folder: not for the page
        return None, ["likeness, adherence, diversity and copies: the model that sees could not be loaded"]


# ── What is measured ────────────────────────────────────────────────────────────────────────────────────────────────


def judge(made: Made, seeing: Eyes | None, missing: Sequence[str] = ()) -> Report:
    """Measure the pictures and conclude.

    Args:
        seeing: None leaves open what needs a model that sees.
        missing: what is left open, and why, to be told.
    """
    seen = Seen.of(made, seeing) if seeing else None
    figures, copies = _figures(made, seen)
    marks = _marks(made, seen)
    recommended, why = recommend(marks)
    if recommended is None and not why and made.best:
        recommended, why = made.best
    missing = [*made.missing, *missing]
    if len(made.training) < FEWEST:
        missing.append(f"likeness, copies and variety: give the run, or its pictures, {FEWEST} at least")
    elif seen and not seen.parted:
        missing.append("likeness: the bare base's pictures are as near to the training pictures as these to each other")
    if seeing and seeing.reads and seen.texts is None:
        missing.append("adherence: to what judges here, the bare base follows no prompt")
    if not made.trigger:
        missing.append("leakage: no trigger is known; give it, where there is one")
    faults = diagnose(figures)
    untriggered = zip(made.asked.bare + made.asked.unrelated, *(
        made.bare[end] + made.unrelated[end] for end in (0, 1)
    ), strict=True)  # fmt: skip
    told = lines(figures, faults, _otherwise(seen))
    rows = tuple(zip(*made.shown, strict=True))
    by_step = tuple(zip(*made.checkpoints.values(), strict=True))
    return Report(
        made.name, made.trigger, made.kind, made.base, told, faults, marks, recommended, why, tuple(missing),
        made.count, tuple(made.asked.prompts), rows, tuple(untriggered), by_step, copies,
    )  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What the eyes make of the pictures: unit vectors, a row a picture."""

    shown: list[np.ndarray]
    second: list[np.ndarray]
    bare: list[np.ndarray]  # empty without a trigger, this and the next
    unrelated: list[np.ndarray]
    checkpoints: dict[int, np.ndarray]
    training: np.ndarray | None  # None where there are too few
    texts: np.ndarray | None  # of the contexts; None where they are no measure

    @classmethod
    def of(cls, made: Made, seeing: Eyes) -> "Seen":
        shown = [seeing.see(column) for column in made.shown]
        pairs = [[seeing.see(column) for column in own if column] for own in (made.second, made.bare, made.unrelated)]
        steps = {
            step: shown[-1] if column is made.shown[-1] else seeing.see(column)
            for step, column in made.checkpoints.items()
        }
        trained = seeing.see(made.training) if len(made.training) >= FEWEST else None
        texts = seeing.read(made.asked.contexts) if seeing.reads else None
        deaf = texts is not None and metrics.adherence(shown[0], texts) <= DEAF_BASE
        return cls(shown, *pairs, steps, trained, None if deaf else texts)

    @property
    def without(self) -> np.ndarray:
        """All that the bare base made of prompts with the trigger."""
        return np.concatenate([self.shown[0], self.second[0]])

    @property
    def with_it(self) -> np.ndarray:
        """The same with the LoRA at strength 1."""
        return np.concatenate([self.shown[-1], self.second[1]])

    @property
    def parted(self) -> bool:
        """Whether the bare base's pictures are less like the training pictures than these are like each other."""
        if self.training is None:
            return False
        plain = metrics.likeness(self.without, self.training).mean()
        return bool(metrics.likeness_within(self.training).mean() - plain > NO_WAY)

    def adherence(self, vectors: np.ndarray) -> float:
        """Of pictures, against that of the bare base."""
        return metrics.adherence(vectors, self.texts) / metrics.adherence(self.shown[0], self.texts)


Copies = tuple[tuple[Image.Image, Image.Image, float], ...]


def _figures(made: Made, seen: Seen | None) -> tuple[dict[str, float], Copies]:
    """Figure by name; and the pictures that are copies of training pictures."""
    figures = _by_pixels(made)
    said = {"gap": made.gap, "called": made.asked.called}
    figures |= {name: value for name, value in said.items() if value is not None}
    copies: Copies = ()
    if seen:
        figures |= _by_change(seen)
        if seen.texts is not None:
            figures |= {
                f"adherence {s:g}": seen.adherence(column) for s, column in zip(STRENGTHS, seen.shown, strict=True)
            }
            figures["adherence"] = figures["adherence 1"]
        if seen.parted:
            figures |= _by_likeness(seen)
        if seen.training is not None:
            figures["variety"] = metrics.spread(seen.with_it) / max(metrics.spread(seen.training), 1e-6)
            figures["copied"], copies = _copied(made, seen)
    figures["holds"] = _holds(figures)
    return figures, copies


def _by_pixels(made: Made) -> dict[str, float]:
    """What needs no model that sees; artifacts at each strength, too."""
    without, figures = made.shown[0], {}
    coloured = metrics.colours(made.training) if made.training else None
    plain, clip = metrics.colours(without + made.second[0]), metrics.clipped(without)
    fine = max(metrics.residue(without), metrics.residue(made.training) if made.training else 0, 1e-6)
    clip = max(clip, metrics.clipped(made.training) if made.training else 0)
    for strength, column in zip(STRENGTHS, made.shown, strict=True):
        seen = column + made.second[1] if strength == 1 else column
        figures |= {
            f"broken {strength:g}": metrics.broken(seen),
            f"shift {strength:g}": metrics.colour_shift(metrics.colours(seen), plain, coloured),
            f"clipped {strength:g}": metrics.clipped(seen) - clip,
            f"residue {strength:g}": metrics.residue(seen) / fine,
        }
    figures |= {name: figures[f"{name} 1"] for name in ARTIFACTS}
    changes = [metrics.difference(column, without) for column in made.shown]
    figures["rises"] = metrics.rises(changes)
    if made.asked.bare:
        figures["leak"] = metrics.difference(*made.bare) / max(changes[-1], 1e-6)
        figures["unrelated"] = metrics.difference(*made.unrelated) / max(
            metrics.difference(without, made.second[0]), 1e-6
        )
    return figures


def _by_change(seen: Seen) -> dict[str, float]:
    """What needs no training pictures."""
    first, last = seen.shown[0], seen.shown[-1]
    figures = {"rises": metrics.rises([metrics.change(column, first) for column in seen.shown])}
    if seen.bare:
        figures["leak"] = metrics.change(*seen.bare) / max(metrics.change(last, first), 1e-6)
        figures["unrelated"] = metrics.change(*seen.unrelated) / max(metrics.change(first, seen.second[0]), 1e-6)
    return figures


def _by_likeness(seen: Seen) -> dict[str, float]:
    """What needs training pictures that the bare base's are not like."""
    within = metrics.likeness_within(seen.training)
    liked = [metrics.likeness(column, seen.training) for column in seen.shown]
    plain, found = (metrics.likeness(column, seen.training) for column in (seen.without, seen.with_it))
    figures = {
        "gain": metrics.gain(found, plain, within), "hits": metrics.hits(found, plain, within),
        "chance": metrics.chance(found, plain), "unevenness": metrics.unevenness(found, plain, within),
        "rises": metrics.rises([values.mean() for values in liked]),
    }  # fmt: skip
    if seen.bare:
        untriggered = (metrics.likeness(column, seen.training) for column in reversed(seen.bare))
        figures["leak"] = metrics.leak(liked[-1], liked[0], *untriggered, within)
    return figures


def _copied(made: Made, seen: Seen) -> tuple[float, Copies]:
    """Share of pictures that repeat a training picture; the nearest four of them."""
    pictures = made.shown[-1] + made.second[1]
    places, cosines = metrics.nearest(seen.with_it, seen.training)
    taken = cosines > metrics.too_near(seen.training, seen.without)
    return float(taken.mean()), tuple(
        (pictures[i], made.training[places[i]], float(cosines[i])) for i in np.argsort(-cosines)[:4] if taken[i]
    )


def _otherwise(seen: Seen | None) -> dict[str, tuple[str, str]]:
    """What figures are, and how they were measured, where likeness to the training pictures was not."""
    if seen and seen.parted:
        return {}
    how = "mean of 1 less the cosine" if seen else "mean absolute difference of pixels"
    return {
        "rises": ("whether pictures change more with strength", f"{how}, against the bare base's"),
        "leak": ("change without the trigger, against that with it", f"{how}; the same subjects and seeds"),
        "unrelated": (next(row[2] for row in ROWS if row[0] == "unrelated"), how),
    }


def _holds(figures: Mapping[str, float]) -> float:
    """The highest strength up to which nothing breaks."""
    held = 0.0
    for strength in STRENGTHS[1:]:
        spoiled = any(figures[f"{name} {strength:g}"] > LIMITS[name][1] for name in ARTIFACTS)
        if spoiled or figures.get(f"adherence {strength:g}", 1.0) < LIMITS["adherence"][1]:
            break
        held = strength
    return held


def _marks(made: Made, seen: Seen | None) -> tuple[Mark, ...]:
    """The checkpoints with likeness and adherence."""
    gains, adherences = {}, {}
    if seen and seen.parted:
        within, plain = metrics.likeness_within(seen.training), metrics.likeness(seen.shown[0], seen.training)
        gains = {
            step: metrics.gain(metrics.likeness(vectors, seen.training), plain, within)
            for step, vectors in seen.checkpoints.items()
        }
    if seen and seen.texts is not None:
        adherences = {step: seen.adherence(vectors) for step, vectors in seen.checkpoints.items()}
    return tuple(
        Mark(f"step {step}", step, made.losses.get(step), gains.get(step), adherences.get(step))
        for step in made.checkpoints
    )


# ── What is concluded ───────────────────────────────────────────────────────────────────────────────────────────────


def recommend(marks: Sequence[Mark]) -> tuple[str | None, str]:
    """The checkpoint to keep and why: the highest product of likeness and adherence, neither counting above 1.

    Of those within 3 % of the highest the last: the end of a schedule refines, and what it overfits costs adherence.
    None where these are not measured, and where no checkpoint follows prompts.
    """
    scores = {
        mark: min(max(mark.gain, 0.0), 1.0) * min(mark.adherence, 1.0)
        for mark in marks
        if None not in (mark.gain, mark.adherence)
    }
    fit = {mark: score for mark, score in scores.items() if score > 0 and mark.adherence >= DEAF}
    if not fit:
        return None, "no checkpoint is both like the training pictures and follows prompts" if scores else ""
    mark = [mark for mark, score in fit.items() if score >= 0.97 * max(fit.values())][-1]
    return mark.label, (
        f"likeness to the training pictures {mark.gain:.2f} of what they have among themselves, and "
        f"{mark.adherence:.0%} of the bare base's adherence to prompts"
    )


def diagnose(figures: Mapping[str, float]) -> tuple[str, ...]:
    """What is wrong by the figures, the gravest first, in the words of `CURES`; () where nothing is.

    Pictures that neither follow the prompt nor look like the training pictures are ruined by too high a learning rate;
    those that look like them and do not follow it are overfitted. What little was learned counts no more then. Where
    likeness was not measured, it is open whether enough was learned to be called leaking.
    """
    get, faults = figures.get, []
    bad = lambda name: name in figures and _verdict(name, figures[name]) == "bad"  # noqa: E731
    unlike = bad("gain") or bad("hits")
    if any(map(bad, ARTIFACTS)) or (bad("adherence") and unlike):
        faults.append("learning rate")
    if bad("copied") or (bad("adherence") and not faults):
        faults.append("overfitted")
    if unlike and not faults:
        faults.append("wrong trigger" if get("called", 1) < CALLED else "undertrained")
    learned = "gain" in figures and not unlike  # what little was learned shows without the trigger as well
    if learned and (bad("leak") or bad("unrelated")):
        faults.append("leaking")
    return tuple(faults)


DEAF = 0.3  # adherence below which no checkpoint is worth keeping
DEAF_BASE = 0.005  # the bare base's own, up to which it is no measure
NO_WAY = 0.01  # from the base's likeness to the training pictures' own, up to which there is nothing to learn

CALLED = 0.5  # share of captions with the trigger, from where it is their word
ARTIFACTS = ("broken", "shift", "clipped", "residue")
ROWS = (  # figure, the guide's aspect, what it is, how it is measured, the fault whose cure helps
    ("gain", "feature accuracy", "way from the bare base's likeness to the training pictures' own",
     "mean cosine to the nearest third of the training pictures", "undertrained"),
    ("hits", "feature accuracy", "share of pictures past half of that way", "the same, picture by picture",
     "undertrained"),
    ("chance", "feature accuracy", "how probable that is if the LoRA does nothing",
     "the same with and without it shuffled, pair by pair", "undertrained"),
    ("unevenness", "style consistency", "how much likeness differs from subject to subject",
     "its spread, as a share of the whole way", "undertrained"),
    ("adherence", "flexibility", "adherence to prompts, against the bare base's",
     "cosine of pictures to their own prompts above that to the others'", "overfitted"),
    ("variety", "flexibility", "how different pictures of other prompts and seeds are, against the training pictures",
     "mean of 1 less the cosine over all pairs", "overfitted"),
    ("copied", "flexibility", "share of pictures that repeat a training picture",
     "nearest training picture, nearer than these are to each other and than the bare base comes", "overfitted"),
    ("gap", "flexibility", "what was learned that holds for the training pictures alone",
     "loss on held-out and trained pictures under the same noise", "overfitted"),
    ("shift", "no artifacts", "colours beyond base and training pictures, in standard deviations of these",
     "mean and spread of three opposed colours", "learning rate"),
    ("clipped", "no artifacts", "share of pixels with burned-in colours, beyond base and training pictures",
     "a colour at its limit while another is not", "learning rate"),
    ("residue", "no artifacts", "finest detail, against base and training pictures", "mean absolute Laplacian",
     "learning rate"),
    ("broken", "no artifacts", "share of pictures of a single colour", "spread of every colour below 2 levels",
     "learning rate"),
    ("rises", "strength control", "whether likeness rises with strength",
     "pairs of the five strengths that rise, less those that fall", "overfitted"),
    ("holds", "strength control", "highest strength up to which nothing breaks",
     "artifacts and adherence at each strength", "learning rate"),
    ("leak", "leakage", "likeness without the trigger, against that with it", "the same subjects and seeds, no trigger",
     "leaking"),
    ("unrelated", "leakage", "change of unrelated prompts, against what another seed changes",
     "mean of 1 less the cosine", "leaking"),
)  # fmt: skip
FALLING = (
    "chance",
    "unevenness",
    "copied",
    "gap",
    "shift",
    "clipped",
    "residue",
    "broken",
    "leak",
    "unrelated",
)  # figures of which less is better


def lines(
    figures: Mapping[str, float], faults: Sequence[str], otherwise: Mapping[str, tuple[str, str]] | None = None
) -> tuple[Line, ...]:
    """The checklist.

    Args:
        otherwise: what a figure is and how it was measured, where that is not as in ROWS.
    """
    found = []
    for name, aspect, *usual, fault in ROWS:
        what, method = (otherwise or {}).get(name, usual)
        figure = figures.get(name)
        verdict = "not measured" if figure is None else _verdict(name, figure)
        own = "wrong trigger" if fault == "undertrained" and "wrong trigger" in faults else fault
        cure = CURES[own] if verdict == "bad" else ""
        found.append(Line(aspect, what, None if figure is None else round(figure, 4), method, verdict, cure))
    return tuple(found)


def _verdict(name: str, figure: float) -> Verdict:
    good, bad = LIMITS[name]
    if name in FALLING:
        return "good" if figure <= good else "bad" if figure > bad else "doubtful"
    return "good" if figure >= good else "bad" if figure < bad else "doubtful"


def _page(made: Report) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(made.name)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body>{_body(made)}</body></html>\n"
    )


def _body(made: Report) -> str:
    parts = [
        f"<h1>{escape(made.name)}</h1><p>{escape(made.kind)}, trigger <b>{escape(made.trigger or 'none')}</b>, on "
        f"{escape(made.base)}; {made.made} pictures. <b>{escape(made.verdict)}</b></p>",
        *(f"<p><b>{escape(fault)}</b>: {escape(CURES[fault])}</p>" for fault in made.faults),
        table([
            [f'<span style="color:{TONES[line.verdict]}">{MARKS[line.verdict]} {line.verdict}</span>',
             escape(line.aspect), line.told, f"{escape(line.what)}<br><small>{escape(line.method)}</small>"
             + (f"<br>→ {escape(line.cure)}" if line.cure else "")]
            for line in made.lines
        ], "verdict", "aspect", "figure", "what it is, how it was measured"),
    ]  # fmt: skip
    if made.marks:
        keep = f"<p>Keep <b>{escape(made.recommended or 'none')}</b>: {escape(made.why)}</p>" if made.why else ""
        figure = lambda value: "—" if value is None else f"{value:.3f}"  # noqa: E731
        rows = [[escape(m.label), figure(m.validation_loss), figure(m.gain), figure(m.adherence)] for m in made.marks]
        parts += ["<h2>Checkpoints</h2>", keep, _curves(made.marks)]
        parts.append(table(rows, "checkpoint", "validation loss", "likeness", "adherence"))
        rows = [[escape(p), *map(image, row)] for p, row in zip(made.prompts, made.steps, strict=True)]
        parts.append(table(rows, "", *(mark.label for mark in made.marks)))
    if made.rows:
        heads = ["", *("base" if s == 0 else f"strength {s:g}" for s in STRENGTHS)]
        rows = [[escape(p), *map(image, row)] for p, row in zip(made.prompts, made.rows, strict=True)]
        parts += ["<h2>With the trigger</h2>", table(rows, *heads)]
    if made.untriggered:
        rows = [[escape(prompt), image(bare), image(own)] for prompt, bare, own in made.untriggered]
        parts += ["<h2>Without the trigger</h2>", table(rows, "", "base", "strength 1")]
    if made.copies:
        rows = [[image(one), image(other), f"{cosine:.3f}"] for one, other, cosine in made.copies]
        parts += ["<h2>Too near to a training picture</h2>", table(rows, "made", "trained on", "cosine")]
    parts += [f"<p>Not measured: {escape(text)}</p>" for text in made.missing]
    return "".join(parts)


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
        parts.append(f'<text x="{10 + 213 * named}" y="16" fill="{colour}">{name}: {low:.3g} to {high:.3g}</text>')
        named += 1
    ends = (
        f'<text x="10" y="{height - 6}">step {first}</text><text x="{width - 10}" y="{height - 6}" '
        f'text-anchor="end">step {last}</text>'
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px;width:100%" fill="currentColor" '
        f'font-size="12">{"".join(parts)}{ends}</svg>'
    )
