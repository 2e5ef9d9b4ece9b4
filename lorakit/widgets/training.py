"""Train a run in a notebook: watch it and steer it with buttons.

The panel shows the run's folder and its `Control`: it reads the log and the samples as they are written.
"""

import json
import math
import time
from collections import deque
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import torch
from IPython.display import HTML, display
from PIL import Image

from lorakit import page, plan, plots, run
from lorakit import train as training
from lorakit.config import Config
from lorakit.console import Console
from lorakit.device import choose_device, free_memory
from lorakit.run import Control, RunFolder
from lorakit.sample import prompt_of
from lorakit.widgets import supervise
from lorakit.widgets.parts import across, button, line, note, span

EVERY = 0.5  # seconds between two updates
PAUSE = 50  # times as long as it took to draw, the chart stays as it is
LOOK_FIRST = 1000  # the step of the guide's first test picture
KEEP_EVERY = 10  # seconds between two copies of the curve in the notebook file
SIDE = 160  # pixels of a sample
LINES = 200  # of the run's output


def phase(step: int) -> str:
    """What is learned around a step, by the training guide."""
    learned = "basic features, to 500" if step < 500 else "details, to 2000" if step < 2000 else "polish, to 5000"
    return learned + (f"; first look at {LOOK_FIRST}" if step < LOOK_FIRST else "")


class Training(widgets.VBox):
    """A panel that trains a run, or resumes one that was cut.

    `train` holds the cell, so that Run all waits; Interrupt and the button Stop save the run and end it after the
    current step. Closing the page does not stop it.

    Args:
        config: the settings.
        folder: as for `run.Run`.
    """

    def __init__(self, config: Config, folder: str | Path):
        self.config, self.folder, self.control, self.curves = config, RunFolder(Path(folder)), Control(), Curves()
        self.output: deque[str] = deque(maxlen=LINES)
        self.stage = ("", 0, 0)  # before the first step: what is done, how many are done, how many there are
        self.sampled: tuple[Path, int] | None = None  # the samples shown: their folder and number
        self.drawn, self.stored, self.figure = 0.0, 0.0, None
        self.chart_due, self.stale = 0.0, False
        self.bar = widgets.FloatProgress(max=1, layout=widgets.Layout(width="100%", height="20px"))
        self.head, self.figures, self.advice, self.samples, self.lines = (widgets.HTML() for _ in range(5))
        self.plot = widgets.HTML(layout=widgets.Layout(width="100%"))
        self.stop = button(
            "Stop", self.control.stop.set, "danger", "save and end after this step; run the cell again to resume"
        )
        self.save = button("Save now", self.control.save.set, tooltip="a checkpoint after this step")
        self.sample = button("Sample now", self.control.sample.set, tooltip="pictures after this step")
        self.rate = widgets.FloatText(config.learning_rate, step=config.learning_rate / 10)
        self.rate.layout = widgets.Layout(width="110px")
        self.prompts = widgets.Textarea("\n".join(config.sample_prompts), rows=3, placeholder="a prompt a line")
        self.prompts.layout = widgets.Layout(width="100%", max_width="640px")
        self.answer = widgets.HTML()  # to a requested change
        change = [
            across(widgets.Label("learning rate"), self.rate, button("Use it", self._use_rate)),
            widgets.Label("prompts of the samples, one a line"), self.prompts,
            across(button("Use them", self._use_prompts)), self.answer,
        ]  # fmt: skip
        folded = widgets.Accordion([widgets.VBox(change), self.lines], selected_index=None)
        folded.set_title(0, "Change while it runs")
        folded.set_title(1, "Output of the run")
        super().__init__([
            self.head, self.bar, self.figures, self.plot, self.advice, self.samples,
            across(self.stop, self.save, self.sample), folded,
        ])  # fmt: skip

    # ── Clicks set requests, nothing else ─────────────────────────────────────────────────────────────────────────

    def _use_rate(self) -> None:
        if 0 < self.rate.value < math.inf:
            self.control.learning_rate = self.rate.value
            self.answer.value = note(f"{self.rate.value:g} from the next step on", "good")
        else:
            self.answer.value = note("a learning rate is above 0", "bad")

    def _use_prompts(self) -> None:
        prompts = [text.strip() for text in self.prompts.value.splitlines() if text.strip()]
        self.control.prompts = prompts or None
        text = f"{len(prompts)} prompts" if prompts else "the settings' prompts"
        self.answer.value = note(f"{text} from the next samples on", "good")

    # ── The run ───────────────────────────────────────────────────────────────────────────────────────────────────

    def train(self, fork: str | Path | None = None) -> run.Result:
        """Show the panel and train to the end, or until it is stopped.

        Args, result and errors are those of `run.Run` and its `train`.
        """
        if supervise.WATCHED:
            raise BlockingIOError(
                "Pictures are being made in this notebook, and both together could fill the card. Stop them or wait "
                "for their end, then run this cell again."
            )
        display(self)
        # The panel is lost with the kernel; this figure stays in a saved notebook.
        self.figure = display(HTML(""), display_id=True)
        for event in (self.control.stop, self.control.save, self.control.sample):
            event.clear()
        self._enable(True)
        console = Console(self.output.append, self._progress)

        def work() -> run.Result:
            return run.Run(self.config, self.folder.path, console=console, control=self.control, fork=fork).train()

        start, result, error = time.monotonic(), None, None
        try:
            result = supervise.supervise(work, self.refresh, self.control.stop)
            return result
        except BaseException as raised:
            error = raised
            free_memory(choose_device(self.config.device))
            raise
        finally:
            self._enable(False)
            self._end(result, error, time.monotonic() - start)

    def _progress(self, what: str, done: int, total: int) -> None:
        self.stage = (what, done, total)

    def _enable(self, on: bool) -> None:
        for widget in (self.stop, self.save, self.sample):
            widget.disabled = not on

    def _end(self, result: run.Result | None, error: BaseException | None, seconds: float) -> None:
        """Show the outcome, and leave a figure in the notebook."""
        self.draw()
        if isinstance(error, KeyboardInterrupt):
            text = "stopped before the first step, or by the third Interrupt. Run the cell again"
            tone, style = "warning", "warning"
        elif error:
            text, tone, style = str(error) or type(error).__name__, "bad", "danger"
        elif result and result.lora:
            text = f"done: {result.lora.name}, {result.total} steps in {span(seconds)}"
            text = "\n".join([text, *(f"missing: {missing}" for missing in result.missing)])
            tone, style = ("warning", "warning") if result.missing else ("good", "success")
            self.bar.value = 1
        else:
            assert result
            text = f"stopped at step {result.steps} of {result.total}, saved. Run the cell again to resume."
            tone, style = "warning", "warning"
        self.head.value, self.bar.bar_style = note(text, tone), style
        if self.curves.steps and self.figure:
            self.figure.update(self.curves.chart(self.config.name))

    # ── Display ───────────────────────────────────────────────────────────────────────────────────────────────────

    def refresh(self) -> None:
        """Update the panel, at most twice a second; the chart so seldom that drawing it takes 2 % of the time."""
        if time.monotonic() - self.drawn >= EVERY:
            self.draw(time.monotonic() >= self.chart_due)
            self.drawn = time.monotonic()

    def draw(self, chart: bool = True) -> None:
        """Update the panel. Unchanged parts are not sent again."""
        control, curves = self.control, self.curves
        self.stale |= bool(control.total) and curves.read(self.folder.log_file, control.step)
        self._draw_progress()
        if self.stale and chart:
            start = time.monotonic()
            self.plot.value = curves.chart(self.config.name, control.total).svg(700, 230)
            self.stale, self.chart_due = False, time.monotonic() + PAUSE * (time.monotonic() - start)
            if self.figure and time.monotonic() - self.stored >= KEEP_EVERY:
                self.stored = time.monotonic()
                summary = f"loss until step {curves.steps[-1]}, kept in the notebook without the panel"
                self.figure.update(HTML(f"<details><summary>{summary}</summary>{self.plot.value}</details>"))
            self._draw_figures()
        self._draw_samples()
        text = escape("\n".join(self.output))
        self.lines.value = f'<pre style="white-space:pre-wrap;line-height:1.35;font-size:12px">{text}</pre>'

    def _draw_progress(self) -> None:
        control, (what, done, total) = self.control, self.stage
        if control.total and control.step < control.total:
            left = (control.total - control.step) * self.curves.pace
            pace = f" · {self.curves.pace:.2g} s a step · {span(left)} left" if self.curves.pace else ""
            text, share = f"step {control.step} of {control.total}{pace}", control.step / control.total
        elif total:
            text, share = f"{what}: {done} of {total}", done / total
        else:
            text, share = (self.output[-1].strip() if self.output else "starting …"), 0
        if control.stop.is_set():
            text += " · stopping after this step …"
        self.head.value, self.bar.value = note(f"{self.config.name}: {text}"), share

    def _draw_figures(self) -> None:
        """Loss, rate, epoch and memory in a row, and the advice of the validation loss."""
        curves, device = self.curves, choose_device(self.config.device)
        losses, validation = curves.losses, curves.validation
        figures = {"loss, smoothed": f"{plots.smooth(losses)[-1]:.4f}", "of the last step": f"{losses[-1]:.4f}"}
        if validation:
            gap = curves.last("overfit_gap")
            figures |= {"validation loss": f"{validation[-1][1]:.4f}", "overfit dial": f"{gap:.2f}"}
            advice = training.advise(*zip(*validation, strict=True))
            tone = {"rising": "bad", "plateau": "warning", "falling": "good"}.get(advice.state, "")
            self.advice.value = note(str(advice), tone)
        own = curves.last("own_rate")
        rate = f"{own:.1e} found by Prodigy" if own else f"{curves.last('learning_rate'):.2e}"
        figures |= {"learning rate": rate, "epoch": str(curves.last("epoch"))}
        if self.config.base != "demo":
            figures["phase, by the guide"] = phase(curves.steps[-1])
        assert self.control.prepared
        memory = plan.readable_bytes(self.control.prepared.prediction.peak)
        if device.type == "cuda":
            peak = plan.readable_bytes(torch.cuda.max_memory_allocated(device))
            figures["memory at its peak"] = f"{peak} of {memory} predicted"
        else:
            figures["memory, predicted"] = memory
        cells = "".join(
            f'<div style="min-width:96px">{line(name, "font-size:11px;opacity:.7")}'
            f"{line(value, 'font-size:15px;white-space:nowrap')}</div>"
            for name, value in figures.items()
        )
        self.figures.value = f'<div style="display:flex;flex-wrap:wrap;gap:6px 24px;margin:4px 0">{cells}</div>'

    def _draw_samples(self) -> None:
        """The newest folder of samples, once it is complete."""
        folders = sorted((self.folder.path / "samples").glob("step-[0-9]*"))
        prepared = self.control.prepared
        count = len(self.control.prompts or (prepared.prompts if prepared else ()))
        pictures = sorted(folders[-1].glob("*.png")) if folders else []
        if not pictures or len(pictures) < count or (shown := (folders[-1], len(pictures))) == self.sampled:
            return
        self.sampled = shown
        self.samples.value = (
            line(f"samples of step {int(folders[-1].name[5:])}", "margin:4px 0")
            + f'<div style="display:grid;grid-template-columns:repeat(auto-fill,minmax(112px,{SIDE}px));gap:8px">'
            f"{''.join(map(_sample, pictures))}</div>"
        )


def _sample(path: Path) -> str:
    """A sample above its prompt, as HTML that contains the picture."""
    with Image.open(path) as image:
        prompt = escape(prompt_of(image.info.get("parameters", "")))
        encoded = page.jpeg(image, 2 * SIDE)
    return (
        f'<figure style="margin:0"><img style="width:100%;height:auto;display:block" src="{encoded}" alt="{prompt}">'
        f'<figcaption style="font-size:11px;line-height:1.3;max-height:3.9em;overflow:hidden" title="{prompt}">'
        f"{prompt}</figcaption></figure>"
    )


class Curves:
    """The curves in a growing log.jsonl."""

    def __init__(self) -> None:
        self.place = 0  # bytes read
        self.entries: list[dict[str, Any]] = []

    def read(self, file: Path, step: int) -> bool:
        """Read new lines, and return whether there are any.

        Args:
            step: of the run. A log that ends at a later one is read again: its last steps are trained again.
        """
        if not file.is_file():
            return False
        if file.stat().st_size < self.place or (self.entries and self.entries[-1]["step"] > step):
            self.place, self.entries = 0, []
        with file.open("rb") as log:
            log.seek(self.place)
            lines = log.read().rpartition(b"\n")[0]
        self.place += len(lines) + 1 if lines else 0
        for text in lines.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a damaged line, which the run itself reports
                entry = json.loads(text)
                self.entries.append(entry | {"step": int(entry["step"]), "loss": float(entry["loss"])})
        return bool(lines)

    @property
    def steps(self) -> list[int]:
        return [entry["step"] for entry in self.entries]

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.entries]

    @property
    def validation(self) -> list[tuple[int, float]]:
        """Step and loss on held-out pictures."""
        return [(entry["step"], entry["validation_loss"]) for entry in self.entries if "validation_loss" in entry]

    def last(self, name: str) -> float:
        """The newest value of a name, 0 if there is none."""
        return next((entry[name] for entry in reversed(self.entries) if name in entry), 0)

    @property
    def pace(self) -> float:
        """Seconds a step, of the last 50 since the run's start; 0 if there is only one."""
        recent = self.entries[-50:]
        clock = [entry.get("seconds", 0.0) for entry in recent]
        first = max((i for i in range(1, len(clock)) if clock[i] < clock[i - 1]), default=0)  # another start's clock
        steps = recent[-1]["step"] - recent[first]["step"] if recent else 0
        return max(0.0, clock[-1] - clock[first]) / steps if steps > 0 else 0.0

    def chart(self, title: str, total: int | None = None) -> plots.Chart:
        return plots.loss(self.steps, self.losses, title=title, validation=self.validation, total=total)
