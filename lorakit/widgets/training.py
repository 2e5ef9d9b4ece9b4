"""Train a run in a notebook: seen while it goes on, steered by buttons.

The panel is a view of the run's folder and of `Live`: it reads the log and the samples as they come, and decides
nothing.
"""

import json
import math
import time
from collections import deque
from collections.abc import Sequence
from html import escape
from pathlib import Path

import ipywidgets as widgets
import torch
from IPython.display import HTML, display
from PIL import Image

from lorakit import page, plan, plots, run
from lorakit import train as training
from lorakit.config import Config
from lorakit.device import choose_device, free_memory
from lorakit.run import Live
from lorakit.widgets import supervise
from lorakit.widgets.parts import button, note

EVERY = 0.5  # seconds between two drawings
KEPT = 10  # seconds between two copies of the curve in the notebook itself
SIDE = 160  # pixels of a sample shown
LINES = 200  # of what the run said
ROW = widgets.Layout(display="flex", flex_flow="row wrap", align_items="center", grid_gap="8px")


class Training(widgets.VBox):
    """A panel that trains a run, or goes on with one that was cut.

    `train` does it and holds the cell, so that Run all waits; Interrupt and the button Stop end it after the step at
    work, saved. Closing the page does not.

    Args:
        config: the settings.
        folder: of the run, as `run.start` takes it.
    """

    def __init__(self, config: Config, folder: str | Path):
        self.config, self.folder, self.live, self.curves = config, Path(folder), Live(), Curves()
        self.said: deque[str] = deque(maxlen=LINES)
        self.doing, self.sampled, self.drawn, self.stored, self.kept = ("", 0, 0), None, 0.0, 0.0, None
        self.bar = widgets.FloatProgress(max=1, layout=widgets.Layout(width="100%", height="20px"))
        self.head, self.figures, self.advice, self.samples, self.lines = (widgets.HTML() for _ in range(5))
        self.plot = widgets.HTML(layout=widgets.Layout(width="100%"))
        self.stop = button("Stop", self._stop, "danger", "end after this step, saved; the cell goes on from there")
        self.save = button("Save now", self.live.save.set, tooltip="a checkpoint after this step")
        self.sample = button("Sample now", self.live.sample.set, tooltip="pictures after this step")
        self.rate = widgets.FloatText(config.learning_rate, step=config.learning_rate / 10)
        self.rate.layout = widgets.Layout(width="110px")
        self.prompts = widgets.Textarea("\n".join(config.sample_prompts), rows=3, placeholder="a prompt a line")
        self.prompts.layout = widgets.Layout(width="100%", max_width="640px")
        self.asked = widgets.HTML()
        change = [
            widgets.Box([widgets.Label("learning rate"), self.rate, button("Use it", self._rate)], layout=ROW),
            widgets.Label("prompts of the samples, one a line"), self.prompts,
            widgets.Box([button("Use them", self._prompts)], layout=ROW), self.asked,
        ]  # fmt: skip
        folded = widgets.Accordion([widgets.VBox(change), self.lines], selected_index=None)
        folded.set_title(0, "Change while it runs")
        folded.set_title(1, "What the run said")
        super().__init__([
            self.head, self.bar, self.figures, self.plot, self.advice, self.samples,
            widgets.Box([self.stop, self.save, self.sample], layout=ROW), folded,
        ])  # fmt: skip

    # ── What a click does: wishes, nothing else ───────────────────────────────────────────────────────────────────

    def _stop(self) -> None:
        self.live.stop.set()

    def _rate(self) -> None:
        if 0 < self.rate.value < math.inf:
            self.live.learning_rate = self.rate.value
            self.asked.value = note(f"{self.rate.value:g} from the next step on", "good")
        else:
            self.asked.value = note("a learning rate is above 0", "bad")

    def _prompts(self) -> None:
        lines = [line.strip() for line in self.prompts.value.splitlines() if line.strip()]
        self.live.prompts = lines or None
        told = f"{len(lines)} prompts" if lines else "the settings' own prompts"
        self.asked.value = note(f"{told} from the next samples on", "good")

    # ── The run ───────────────────────────────────────────────────────────────────────────────────────────────────

    def train(self, fork: str | Path | None = None) -> run.Result:
        """Show the panel and train until the end, or until it is stopped.

        Returns and raises what `run.start` does.
        """
        display(self)
        # What the panel shows is lost with the kernel; this stays in a notebook that is saved.
        self.kept = display(HTML(""), display_id=True)
        for event in (self.live.stop, self.live.save, self.live.sample):
            event.clear()
        self._able(True)

        def work() -> run.Result:
            return run.start(
                self.config, self.folder, say=self.said.append, progress=self._progress, live=self.live, fork=fork
            )

        began, result, failed = time.monotonic(), None, None
        try:
            result = supervise.supervise(work, self.refresh, self.live.stop)
            return result
        except BaseException as error:
            failed = error
            free_memory(choose_device(self.config.device))
            raise
        finally:
            self._able(False)
            self._ended(result, failed, time.monotonic() - began)

    def _progress(self, what: str, done: int, of: int) -> None:
        self.doing = (what, done, of)

    def _able(self, able: bool) -> None:
        for clicked in (self.stop, self.save, self.sample):
            clicked.disabled = not able

    def _ended(self, result: run.Result | None, failed: BaseException | None, seconds: float) -> None:
        """The last state, and a figure that stays in the notebook when the panel is gone."""
        self.draw()
        if isinstance(failed, KeyboardInterrupt):
            self.head.value = note(
                "stopped before the first step, or at the third Interrupt. Run the cell again", "warning"
            )
            self.bar.bar_style = "warning"
        elif failed:
            told = str(failed) or type(failed).__name__
            self.head.value, self.bar.bar_style = note(told, "bad"), "danger"
        elif result.lora:
            told = f"done: {result.lora.name}, {result.total} steps in {_span(seconds)}"
            told = "\n".join([told, *(f"missing: {text}" for text in result.missing)])
            tone, style = ("warning", "warning") if result.missing else ("good", "success")
            self.head.value, self.bar.bar_style, self.bar.value = note(told, tone), style, 1
        else:
            told = f"stopped at step {result.steps} of {result.total}, saved. Run the cell again to go on from there."
            self.head.value, self.bar.bar_style = note(told, "warning"), "warning"
        if self.curves.steps and self.kept:
            self.kept.update(self.curves.figure(self.config.name))

    # ── What is seen ──────────────────────────────────────────────────────────────────────────────────────────────

    def refresh(self) -> None:
        """Draw, at most twice a second."""
        if time.monotonic() - self.drawn >= EVERY:
            self.draw()
            self.drawn = time.monotonic()

    def draw(self) -> None:
        """Bring the panel up to date. What has not changed is not sent again."""
        new = self.curves.read(self.folder / "log.jsonl", self.live.step) if self.live.total else False
        self._draw_progress()
        if new:
            self.plot.value = self.curves.svg(self.config.name, self.live.total)
            if self.kept and time.monotonic() - self.stored >= KEPT:
                self.stored = time.monotonic()
                told = f"loss until step {self.curves.steps[-1]}, which stays when the panel is gone"
                self.kept.update(HTML(f"<details><summary>{told}</summary>{self.plot.value}</details>"))
            self.figures.value = self._cards()
            if marks := self.curves.validation:
                advice = training.advise(*zip(*marks, strict=True))
                colour = {"rising": "bad", "plateau": "warning", "falling": "good"}.get(advice.state, "")
                self.advice.value = note(str(advice), colour)
        self._draw_samples()
        text = "\n".join(self.said)
        self.lines.value = f'<pre style="white-space:pre-wrap;line-height:1.35;font-size:12px">{escape(text)}</pre>'

    def _draw_progress(self) -> None:
        live, (what, done, of) = self.live, self.doing
        if live.total and live.step < live.total:
            left = (live.total - live.step) * self.curves.pace
            pace = f" · {self.curves.pace:.2g} s a step · {_span(left)} left" if self.curves.pace else ""
            told, share = f"step {live.step} of {live.total}{pace}", live.step / live.total
        elif of:
            told, share = f"{what}: {done} of {of}", done / of
        else:
            told, share = (self.said[-1].strip() if self.said else "beginning …"), 0
        if live.stop.is_set():
            told += " · stopping after this step …"
        self.head.value, self.bar.value = note(f"{self.config.name}: {told}"), share

    def _cards(self) -> str:
        """The figures of now, side by side."""
        curves = self.curves
        cards = [("loss, smoothed", f"{curves.smoothed[-1]:.4f}"), ("of the last step", f"{curves.losses[-1]:.4f}")]
        if curves.validation:
            cards += [("validation loss", f"{curves.validation[-1][1]:.4f}"), ("overfit dial", f"{curves.gap:.2f}")]
        cards += [("learning rate", f"{curves.rate:.2e}"), ("epoch", str(curves.epoch))]
        return cards_html([*cards, *self._memory()])

    def _memory(self) -> Sequence[tuple[str, str]]:
        """What is allocated at the peak, and what was predicted."""
        predicted, device = self.live.prepared.prediction.peak, choose_device(self.config.device)
        if device.type != "cuda":
            return [("memory, predicted", plan.readable_bytes(predicted))]
        used = torch.cuda.max_memory_allocated(device)
        return [("memory at its peak", f"{plan.readable_bytes(used)} of {plan.readable_bytes(predicted)} predicted")]

    def _draw_samples(self) -> None:
        """The newest folder of samples, once it is complete."""
        folders = sorted((self.folder / "samples").glob("step-[0-9]*"))
        wanted = len(self.live.prompts or (self.live.prepared.prompts if self.live.prepared else ()))
        pictures = sorted(folders[-1].glob("*.png")) if folders else []
        if not pictures or len(pictures) < wanted or (shown := (folders[-1], len(pictures))) == self.sampled:
            return
        self.sampled = shown
        images = "".join(_picture(path) for path in pictures)
        self.samples.value = (
            f'<div style="margin:4px 0">samples of step {int(folders[-1].name[5:])}</div>'
            f'<div style="display:grid;grid-template-columns:repeat(auto-fill,minmax(112px,{SIDE}px));gap:8px">'
            f"{images}</div>"
        )


class Curves:
    """What log.jsonl says, read on from where it was read to."""

    def __init__(self):
        self._forget()

    def _forget(self) -> None:
        self.place, self.epoch, self.rate, self.gap, self.pace = 0, 0, 0.0, 0.0, 0.0
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self.smoothed: list[float] = []
        self.times: deque[tuple[int, float]] = deque(maxlen=50)

    def read(self, file: Path, step: int) -> bool:
        """Read what is new; says whether there is something.

        Args:
            step: that the run is at. A log that ends later is one of steps that are trained again, and is read anew.
        """
        if not file.is_file():
            return False
        if file.stat().st_size < self.place or (self.steps and self.steps[-1] > step):
            self._forget()
        with file.open("rb") as log:
            log.seek(self.place)
            whole = log.read().rpartition(b"\n")[0]
        self.place += len(whole) + 1 if whole else 0
        for text in whole.splitlines():
            try:
                self._take(json.loads(text))
            except (ValueError, KeyError, TypeError):  # a damaged line, of which the run itself tells
                continue
        if whole:
            self.smoothed = plots.smooth(self.losses)
            (first, then), (last, now) = (self.times[0], self.times[-1]) if self.times else ((0, 0.0), (0, 0.0))
            self.pace = max(0.0, (now - then) / (last - first)) if last > first else 0.0
        return bool(whole)

    def _take(self, line: dict) -> None:
        self.steps.append(int(line["step"]))
        self.losses.append(float(line["loss"]))
        self.rate, self.epoch = line.get("learning_rate", self.rate), line.get("epoch", self.epoch)
        seconds = line.get("seconds", 0.0)
        if self.times and seconds < self.times[-1][1]:  # the clock of another start
            self.times.clear()
        self.times.append((self.steps[-1], seconds))
        if "validation_loss" in line:
            self.validation.append((self.steps[-1], float(line["validation_loss"])))
            self.gap = line.get("overfit_gap", 0.0)

    def svg(self, title: str, total: int) -> str:
        return plots.loss_svg(
            self.steps, self.losses, width=700, height=230, total=total, title=title, validation=self.validation
        )

    def figure(self, title: str):
        """The curves as a figure of matplotlib's."""
        return plots.loss(self.steps, self.losses, title=title, validation=self.validation)


def cards_html(cards: Sequence[tuple[str, str]]) -> str:
    """Names above figures, as many in a row as there is room for."""
    each = "".join(
        f'<div style="min-width:96px"><div style="font-size:11px;opacity:.7;line-height:1.3">{escape(name)}</div>'
        f'<div style="font-size:15px;line-height:1.3;white-space:nowrap">{escape(value)}</div></div>'
        for name, value in cards
    )
    return f'<div style="display:flex;flex-wrap:wrap;gap:6px 24px;margin:4px 0">{each}</div>'


def _picture(path: Path) -> str:
    """A sample with its prompt below, as HTML that holds the picture itself."""
    with Image.open(path) as image:
        prompt = image.info.get("parameters", "").partition("\n")[0].partition(" <lora:")[0]
        encoded = page.jpeg(image, 2 * SIDE)
    return (
        f'<figure style="margin:0"><img style="width:100%;height:auto;display:block" '
        f'src="{encoded}" alt="{escape(prompt)}">'
        f'<figcaption style="font-size:11px;line-height:1.3;max-height:3.9em;overflow:hidden" '
        f'title="{escape(prompt)}">{escape(prompt)}</figcaption></figure>'
    )


def _span(seconds: float) -> str:
    """A time in words: 45 s, 12 min, 1 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
