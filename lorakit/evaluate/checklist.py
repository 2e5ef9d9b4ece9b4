"""Fill in the training guide's checklist for a LoRA: make pictures with it and without, measure and judge them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lorakit import base as bases
from lorakit import dataset as datasets
from lorakit import page, plots, storage
from lorakit.console import Console
from lorakit.evaluate import candidates, metrics, vision
from lorakit.evaluate.figures import ARTIFACTS, LIMITS, Copy, Vectors, measure
from lorakit.evaluate.pictures import FEWEST, STRENGTHS, Known, PictureSet, ReportOptions, make_pictures
from lorakit.evaluate.vision import VisionModel

Verdict = Literal["good", "doubtful", "bad", "not measured"]

MARKS = {"good": "✓", "doubtful": "?", "bad": "✗", "not measured": " "}
CURES = {  # the guide's
    "wrong trigger": "few captions contain the trigger: check its spelling, use the captions' words, or edit them",
    "undertrained": "train longer, or with a higher rank; the trigger in captions and prompt must agree",
    "overfitted": "take an earlier checkpoint, train fewer steps, add regularisation pictures",
    "learning rate": "learning rate 5e-5, schedule cosine",
    "leaking": "regularisation pictures or prior_prediction; captions that name what must not change",
    "works on its base only": "train on the base that others were made from (SD 1.5, SDXL, Illustrious), fewer steps",
}
ELSEWHERE = ("gain", "adherence", "rises", "holds")  # of CHECKS, on another base
LEAST_ADHERENCE = 0.3  # below, no checkpoint is worth keeping
LEAST_TRIGGER_SHARE = 0.5  # share of captions with the trigger; below, the trigger is wrong
CHECKS = {  # figure → the guide's aspect, meaning, method, and the fault whose cure helps
    "gain": ("feature accuracy", "likeness to the training pictures: 0 as the bare base, 1 as they are to each other",
     "mean cosine to the nearest third of the training pictures", "undertrained"),
    "hits": ("feature accuracy", "share of pictures with a likeness above 0.5", "the same, for each picture",
     "undertrained"),
    "chance": ("feature accuracy", "probability of this gain if the LoRA does nothing",
     "the pairs of pictures with and without the LoRA, shuffled", "undertrained"),
    "unevenness": ("style consistency", "how much likeness differs between subjects",
     "standard deviation of the likeness", "undertrained"),
    "adherence": ("flexibility", "adherence to prompts, relative to the bare base",
     "cosine of pictures to their own prompts above that to the others'", "overfitted"),
    "variety": ("flexibility", "how different pictures are from each other, relative to the training pictures",
     "mean of 1 less the cosine over all pairs of prompts and seeds", "overfitted"),
    "copied": ("flexibility", "share of pictures that repeat a training picture",
     "nearer to one than training pictures are to each other, and than the bare base's pictures are", "overfitted"),
    "gap": ("flexibility", "what was learned for the training pictures only",
     "loss on held-out and training pictures under the same noise", "overfitted"),
    "shift": ("no artifacts", "colours beyond those of base and training pictures, in standard deviations",
     "mean and spread of three opponent colours", "learning rate"),
    "clipped": ("no artifacts", "share of pixels with burned-in colours, beyond base and training pictures",
     "a colour at its limit while another is not", "learning rate"),
    "residue": ("no artifacts", "finest detail, relative to base and training pictures", "mean absolute Laplacian",
     "learning rate"),
    "broken": ("no artifacts", "share of pictures of a single colour", "spread of every colour below 2 levels",
     "learning rate"),
    "rises": ("strength control", "whether likeness rises with strength",
     "pairs of the five strengths that rise, less those that fall", "overfitted"),
    "holds": ("strength control", "highest strength up to which nothing breaks",
     "artifacts and adherence at each strength", "learning rate"),
    "leak": ("leakage", "likeness without the trigger, relative to likeness with it",
     "the same subjects and seeds, no trigger", "leaking"),
    "unrelated": ("leakage", "change of unrelated prompts, relative to the change by another seed",
     "mean of 1 less the cosine", "leaking"),
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """A line of the checklist."""

    aspect: str
    what: str
    figure: float | None
    method: str
    verdict: Verdict
    cure: str = ""

    @property
    def number(self) -> str:
        return page.text(self.figure, ".2f")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of the run, measured."""

    label: str
    step: int
    validation_loss: float | None
    gain: float | None
    adherence: float | None


@dataclass(frozen=True)
class Report(page.Page):
    """The checklist of a LoRA, filled in. Prints as text and shows itself in a notebook."""

    pictures: PictureSet = field(repr=False)
    checks: tuple[Check, ...]
    faults: tuple[str, ...]  # keys of CURES, the gravest first; () where nothing is wrong
    checkpoints: tuple[Checkpoint, ...]
    recommended: str | None  # label of the checkpoint to keep
    reason: str
    missing: tuple[str, ...]  # a line for each thing that could not be measured
    copies: tuple[Copy, ...] = field(default=(), repr=False)  # pictures that repeat a training picture
    elsewhere: "Report | None" = field(default=None, repr=False)  # on another base

    @property
    def name(self) -> str:
        return self.pictures.name

    title = name

    @property
    def verdict(self) -> str:
        """The faults, in a few words."""
        bad = sum(check.verdict == "bad" for check in self.checks)
        doubts = f"no fault, but {bad} of {len(self.checks)} checks are bad"
        return "; ".join(self.faults) or (doubts if bad else "no fault")

    def facts(self) -> dict[str, Any]:
        shown = self.pictures
        return {
            "name": shown.name, "trigger": shown.trigger, "kind": shown.kind, "base": shown.base,
            "pictures": shown.count, "lines": [asdict(check) for check in self.checks], "faults": list(self.faults),
            "checkpoints": [asdict(checkpoint) for checkpoint in self.checkpoints], "recommended": self.recommended,
            "why": self.reason, "missing": list(self.missing),
            "elsewhere": self.elsewhere.facts() if self.elsewhere else None,
        }  # fmt: skip

    def describe(self) -> str:
        head = f"{self.name} on {self.pictures.base}, {self.pictures.count} pictures: {self.verdict}"
        lines = [f"{MARKS[check.verdict]} {check.aspect:<18} {check.number:>6}  {check.what}" for check in self.checks]
        cures = [f"  → {cure}" for cure in dict.fromkeys(check.cure for check in self.checks if check.cure)]
        best = [f"keep {self.recommended or 'none'}: {self.reason}"] if self.reason else []
        return "\n".join([head, *lines, *cures, *best, *(f"not measured: {text}" for text in self.missing)])

    def body(self) -> str:
        shown = self.pictures
        facts = f"{shown.kind}, trigger {shown.trigger or 'none'}, on {shown.base}; {shown.count} pictures"
        parts = [f"<p><b>{escape(self.name)}</b>: {escape(facts)}. <b>{escape(self.verdict)}</b></p>"]
        parts += [f"<p><b>{escape(fault)}</b>: {escape(CURES[fault])}</p>" for fault in self.faults]
        parts.append(page.table(map(_row, self.checks), "verdict", "aspect", "figure", "meaning, measurement"))
        prompts = [escape(prompt) for prompt in shown.prompts.triggered]
        if self.checkpoints:
            labels = [checkpoint.label for checkpoint in self.checkpoints]
            chart = _curves(self.checkpoints)
            keep = f"<p>Keep <b>{escape(self.recommended or 'none')}</b>: {escape(self.reason)}</p>"
            parts += ["<h2>Checkpoints</h2>", keep if self.reason else ""]
            parts += [chart.svg(height=140)] if chart.panels else []  # nothing could be measured
            figures = [(c.label, c.validation_loss, c.gain, c.adherence) for c in self.checkpoints]
            rows = [[page.text(value, ".3f") for value in row] for row in figures]
            parts.append(page.table(rows, "checkpoint", "validation loss", "likeness", "adherence"))
            parts.append(page.pictures(prompts, zip(*shown.checkpoints.values(), strict=True), labels))
        strengths = page.pictures(prompts, zip(*shown.strengths, strict=True), plots.strength_labels(STRENGTHS))
        parts += ["<h2>With the trigger</h2>", strengths]
        if self.elsewhere:
            columns = zip(*self.elsewhere.pictures.strengths, strict=True)
            grid = page.pictures(prompts, columns, plots.strength_labels(STRENGTHS))
            parts += [f"<h2>With the trigger, on {escape(self.elsewhere.pictures.base)}</h2>", grid]
        if shown.prompts.untriggered:
            pairs = zip(*(shown.untriggered[end] + shown.unrelated[end] for end in (0, 1)), strict=True)
            others = map(escape, shown.prompts.untriggered + shown.prompts.unrelated)
            parts += ["<h2>Without the trigger</h2>", page.pictures(others, pairs, plots.strength_labels([0, 1]))]
        if self.copies:
            rows = [[page.image(one), page.image(other), f"{cosine:.3f}"] for one, other, cosine in self.copies]
            parts += ["<h2>Too near to a training picture</h2>", page.table(rows, "made", "trained on", "cosine")]
        return "".join([*parts, *(f"<p>Not measured: {escape(text)}</p>" for text in self.missing)])


def _row(check: Check) -> list[str]:
    """A check's cells in the page's table."""
    mark = f'<span style="color:{page.TONES[check.verdict]}">{MARKS[check.verdict]} {check.verdict}</span>'
    meaning = f"{escape(check.what)}<br><small>{escape(check.method)}</small>"
    return [mark, escape(check.aspect), check.number, meaning + (f"<br>→ {escape(check.cure)}" if check.cure else "")]


def _curves(checkpoints: Sequence[Checkpoint]) -> plots.Chart:
    """Validation loss, likeness and adherence over the steps; those with two values at least."""
    panels = []
    for name, key, colour in (("validation loss", "validation_loss", plots.JUDGED), ("likeness", "gain", plots.ACCENT),
                              ("adherence", "adherence", page.TONES["good"])):  # fmt: skip
        points = [(c.step, value) for c in checkpoints if (value := getattr(c, key)) is not None]
        if len(points) > 1:
            x, y = np.array(points, float).T
            panels.append(plots.Panel(name, [plots.Series(name, x, y, {"color": colour} | plots.DOTS)]))
    return plots.Chart(panels)


# ── Report ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def report(
    source: str | Path, options: ReportOptions | None = None, *, base: str | bases.Base | None = None,
    pictures: datasets.Dataset | None = None, device: str = "auto", known: Known | None = None,
    console: Console | None = None,
) -> Report:  # fmt: skip
    """Fill in the guide's checklist for a run or a LoRA file.

    Args:
        source: a run's folder, one of its checkpoints, or a LoRA file. Of a run, the newest weights are judged and its
            checkpoints compared; a checkpoint or the finished file is judged with its run's settings.
        base: as for `base.open`; None takes the run's, or that of the file's family.
        pictures: the training pictures; None takes the run's. Without any, what needs them is left open.
        known: the bare base's pictures from reports with the same base and sampler; they are not made again, and new
            ones are added.
        console: its `stop` ends the report with a KeyboardInterrupt; None prints.

    Raises:
        FileNotFoundError, ValueError: no such run, vision model, kind or other base; nothing to judge; or an unsuitable
            base.
    """
    options, console = options or ReportOptions(), console or Console()
    if isinstance(options.vision, str) and options.vision not in ("auto", "demo"):
        storage.locate_model(options.vision, vision.MODELS)  # report a wrong name before pictures are made
    other = bases.open(options.also, console=console) if options.also else None  # a wrong name is reported here
    measured = make_pictures(source, options, base=base, pictures=pictures, device=device, known=known, console=console)
    model, missing = _open_vision(options.vision, measured.base == candidates.DEMO, device, console)
    judged = judge(measured, model, missing)
    if other is None:
        return judged
    contexts = options.contexts or measured.prompts.contexts
    also = replace(options, checkpoints=0, contexts=contexts)
    there = make_pictures(source, also, base=other, pictures=pictures, device=device, console=console)
    return _with_other(judged, judge(there, model, missing))


def _with_other(here: Report, there: Report) -> Report:
    """A report with the figures of another base, judged by the same limits.

    Bad ones count as a fault of their own where the LoRA is good on its own base.
    """
    first, second = (dict(zip(CHECKS, report.checks, strict=True)) for report in (here, there))
    fault, checks, faults = "works on its base only", [], list(here.faults)
    for name in ELSEWHERE:
        check = second[name]
        carried = check.verdict != "bad" or first[name].verdict == "bad"
        what = f"{check.what}, on {there.pictures.base}"
        checks.append(replace(check, aspect="other checkpoints", what=what, cure="" if carried else CURES[fault]))
        faults += [] if carried or fault in faults else [fault]
    missing = [f"on {there.pictures.base}: {text}" for text in there.missing if text not in here.missing]
    return replace(
        here, checks=(*here.checks, *checks), faults=tuple(faults), missing=(*here.missing, *missing), elsewhere=there
    )


def save_report(report: Report, folder: str | Path, name: str = "report") -> tuple[Path, Path]:
    """Write NAME.html and NAME.json into a folder."""
    return report.save(folder, name)


def _open_vision(
    model: str | VisionModel | None, embedded: bool, device: str, console: Console
) -> tuple[VisionModel | None, list[str]]:
    """The vision model, or None and what is missing without it."""
    if model is None or isinstance(model, VisionModel):
        return model, [] if model else ["what needs a vision model: none was wanted"]
    try:
        return vision.open(("demo" if embedded else "clip") if model == "auto" else model, device), []
    except (FileNotFoundError, ValueError) as error:
        console.say(f"report    {error}")  # it may name a folder: not for the page
        return None, ["likeness, adherence, diversity and copies: the vision model could not be loaded"]


def judge(pictures: PictureSet, model: VisionModel | None, missing: Sequence[str] = ()) -> Report:
    """Measure pictures and draw the conclusions; without a model, what needs one is left open.

    Args:
        missing: what is left open already, and why.
    """
    vectors = Vectors.of(pictures, model) if model else None
    figures, copies = measure(pictures, vectors)
    checkpoints = _measure_checkpoints(pictures, vectors)
    recommended, reason = recommend(checkpoints)
    if recommended is None and not reason and pictures.best:
        recommended, reason = pictures.best
    missing = [*pictures.missing, *missing]
    if len(pictures.training) < FEWEST:
        missing.append(f"likeness, copies and variety: give the run, or at least {FEWEST} of its pictures")
    elif vectors and not vectors.has_likeness:
        missing.append("likeness: the base's pictures are as like the training pictures as these are to each other")
    if model and model.reads_texts and vectors and vectors.texts is None:
        missing.append("adherence: by this vision model, the bare base follows no prompt")
    if not pictures.trigger:
        missing.append("leakage: no trigger is known; give it, if there is one")
    faults = diagnose(figures)
    checks = fill_in(figures, faults, _substitutes(vectors))
    return Report(pictures, checks, faults, checkpoints, recommended, reason, tuple(missing), copies)


def _measure_checkpoints(pictures: PictureSet, vectors: Vectors | None) -> tuple[Checkpoint, ...]:
    checkpoints = []
    for step in pictures.checkpoints:
        gain = adherence = None
        if vectors and vectors.has_likeness:
            likeness, base = map(vectors.likeness, (vectors.checkpoints[step], vectors.strengths[0]))
            gain = metrics.gain(likeness, base, vectors.within)
        if vectors and vectors.texts is not None:
            adherence = vectors.adherence(vectors.checkpoints[step])
        checkpoints.append(Checkpoint(f"step {step}", step, pictures.losses.get(step), gain, adherence))
    return tuple(checkpoints)


def _substitutes(vectors: Vectors | None) -> dict[str, tuple[str, str]]:
    """Meaning and method of the figures that are measured otherwise where likeness cannot be."""
    if vectors and vectors.has_likeness:
        return {}
    how = "mean of 1 less the cosine" if vectors else "mean absolute difference of pixels"
    return {
        "rises": ("whether pictures change more with strength", f"{how}, against the bare base's"),
        "leak": ("change without the trigger, relative to the change with it", f"{how}; the same subjects and seeds"),
        "unrelated": (CHECKS["unrelated"][1], how),
    }


# ── Conclusions ─────────────────────────────────────────────────────────────────────────────────────────────────────


def recommend(checkpoints: Sequence[Checkpoint]) -> tuple[str | None, str]:
    """The checkpoint to keep and why: the highest product of likeness and adherence, neither counting above 1.

    Of those within 3 % of the highest it is the last: the end of a schedule refines, and overfitting would cost
    adherence. None where these are not measured, and where no checkpoint follows prompts.
    """
    scores = {
        checkpoint: min(max(checkpoint.gain, 0.0), 1.0) * min(checkpoint.adherence, 1.0)
        for checkpoint in checkpoints
        if checkpoint.gain is not None and checkpoint.adherence is not None
    }
    fit = {one: score for one, score in scores.items() if score > 0 and (one.adherence or 0) >= LEAST_ADHERENCE}
    if not fit:
        return None, "no checkpoint is both like the training pictures and follows prompts" if scores else ""
    best = [checkpoint for checkpoint, score in fit.items() if score >= 0.97 * max(fit.values())][-1]
    return best.label, (
        f"likeness to the training pictures {best.gain:.2f} of theirs to each other, adherence to prompts "
        f"{best.adherence:.0%} of the bare base's"
    )


def diagnose(figures: Mapping[str, float]) -> tuple[str, ...]:
    """What is wrong by the figures, as keys of `CURES`, the gravest first.

    Pictures that neither follow the prompt nor look like the training pictures are ruined by too high a learning rate;
    those that look like them and do not follow it are overfitted. Then undertraining does not count. Where likeness was
    not measured, it is open whether enough was learned to leak.
    """
    bad = {name for name in LIMITS.keys() & figures.keys() if _verdict(name, figures[name]) == "bad"}
    faults, unlike = [], bad & {"gain", "hits"}
    if bad & {*ARTIFACTS} or (unlike and "adherence" in bad):
        faults.append("learning rate")
    if "copied" in bad or ("adherence" in bad and not faults):
        faults.append("overfitted")
    if unlike and not faults:
        faults.append("wrong trigger" if figures.get("called", 1) < LEAST_TRIGGER_SHARE else "undertrained")
    learned = "gain" in figures and not unlike  # what little was learned shows without the trigger as well
    if learned and bad & {"leak", "unrelated"}:
        faults.append("leaking")
    return tuple(faults)


def fill_in(
    figures: Mapping[str, float], faults: Sequence[str], substitutes: Mapping[str, tuple[str, str]] | None = None
) -> tuple[Check, ...]:
    """The checklist; `substitutes` are meanings and methods of figures where they are not those of CHECKS."""
    checks = []
    for name, (aspect, *usual, fault) in CHECKS.items():
        what, method = (substitutes or {}).get(name, usual)
        figure = figures.get(name)
        verdict = "not measured" if figure is None else _verdict(name, figure)
        fault = "wrong trigger" if fault == "undertrained" and "wrong trigger" in faults else fault
        cure = CURES[fault] if verdict == "bad" else ""
        checks.append(Check(aspect, what, None if figure is None else round(figure, 4), method, verdict, cure))
    return tuple(checks)


def _verdict(name: str, figure: float) -> Verdict:
    good, bad = LIMITS[name]
    if good < bad:  # less is better
        figure, good, bad = -figure, -good, -bad
    return "good" if figure >= good else "bad" if figure < bad else "doubtful"
