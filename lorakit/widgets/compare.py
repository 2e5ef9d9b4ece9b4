"""Compare checkpoints and LoRA files in pictures, pick one, and export it."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from uuid import uuid4

import ipywidgets as widgets
from PIL import Image

from lorakit import evaluate, page, sample
from lorakit import run as running
from lorakit.console import Console
from lorakit.device import Compute
from lorakit.evaluate import Candidates, Column
from lorakit.sample import Sampling
from lorakit.widgets import supervise
from lorakit.widgets.export import BEST, Export
from lorakit.widgets.grid import SIDE, Grid, Request
from lorakit.widgets.parts import above, across, button, columns, explain, note, on_change, reporting, span

STRENGTHS = (0, 0.5, 0.7, 0.9, 1)


class Compare(widgets.VBox):
    """A panel that makes pictures with checkpoints or LoRA files, and exports the one that is picked.

    Args:
        sources: as for `evaluate.find_candidates`; opened at once.
        base: as for `base.open`; "" takes the one that the LoRAs are for.
        prompts, seeds: of the first grid; without prompts, the run's.
        strengths: of the first grid, as numbers or as a text such as "0, 0.5, 1".
        sampling: first values of the sampler's fields; None takes the run's.
        into: folder for exported files.
        copy_to: folder for second copies of them.
    """

    def __init__(
        self, sources: str | Path | Sequence[str | Path] = (), *, base: str = "", prompts: Sequence[str] = (),
        seeds: Sequence[int] = (42,), strengths: str | Sequence[float] = STRENGTHS,
        sampling: Sampling | None = None, into: str | Path = "exports", copy_to: str | Path = "",
    ):  # fmt: skip
        self.first = base, prompts, sampling
        self.usual = Sampling()  # the settings of the open run
        self.candidates: Candidates | None = None
        self.halt = threading.Event()
        self.finished: SimpleQueue[tuple[int, Column, Image.Image, str]] = SimpleQueue()
        self.problems: list[str] = []
        self.boxes: dict[str, widgets.Checkbox] = {}
        self.start = 0.0  # time.monotonic() of the grid
        mark = f"lk{uuid4().hex[:8]}"
        self.file = Export(into, copy_to)
        self.into, self.proof, self.export = self.file.into, self.file.proof, self.file.export
        self.grid = Grid(lambda label: setattr(self.file.label, "value", label), mark)
        sources = [sources] if isinstance(sources, str | Path) else list(sources)
        strengths = strengths if isinstance(strengths, str) else ", ".join(f"{value:g}" for value in strengths)
        self.sources = widgets.Textarea("\n".join(map(str, sources)), rows=2, continuous_update=False)
        self.message, self.progress = widgets.HTML(), widgets.HTML()
        self.runs = widgets.HTML(layout=widgets.Layout(width="auto", min_width="0px"))  # a comparison of several runs
        boxes = widgets.Layout(display="flex", flex_flow="row wrap", grid_gap="2px 16px", max_height="140px")
        self.choice = widgets.Box(layout=boxes)
        self.choice.layout.overflow = "auto"
        self.prompts = widgets.Textarea(rows=3)
        self.strengths, self.seeds = widgets.Text(strengths), widgets.Text(", ".join(map(str, seeds)))
        self.make_button = button("Make pictures", self.make, "primary")
        self.stop_button = button("Stop", self.stop, "danger", "after this denoising step; finished pictures stay")
        self.stop_button.disabled = True
        on_change(self._count, self.prompts, self.strengths, self.seeds)
        open_button = button("Open", lambda: self.read(self.sources.value.splitlines()))
        super().__init__([
            above("a run's folder, or LoRA files, one a line", self.sources),
            across(open_button, self.message), self.runs, self.choice,
            above("prompts, one a line", self.prompts),
            columns([above("strengths", self.strengths), above("seeds", self.seeds)], 130, 900), self._more(),
            across(self.make_button, self.stop_button, self.progress), self.grid, self.file,
        ], layout=widgets.Layout(grid_gap="8px"))  # fmt: skip
        self.add_class(mark)
        if sources:
            self.read(sources)

    def _more(self) -> widgets.Accordion:
        """The fields that are rarely changed, folded away."""
        first = self.first[2] or self.usual
        schedulers = [(sample.SAMPLERS[name], name) for name in sample.SCHEDULERS]
        self.base, self.negative = widgets.Text(), widgets.Text(first.negative)
        self.height, self.width = (widgets.IntText(side) for side in first.size or (0, 0))
        self.steps, self.guidance = widgets.IntText(first.steps), widgets.FloatText(first.guidance)
        self.scheduler = widgets.Dropdown(options=schedulers, value=first.scheduler)
        self.others = widgets.VBox()
        fields = {
            "width, 0: usual": self.width, "height, 0: usual": self.height, "steps": self.steps,
            "guidance": self.guidance, "sampler": self.scheduler, "negative prompt": self.negative,
        }  # fmt: skip
        named = columns([above(name, field) for name, field in fields.items()], 130, 900)
        add = across(button("Add a LoRA", self.add_other))
        hint = widgets.HTML(note("Used together with each of the above, at strengths of their own."))
        more = widgets.Accordion([
            widgets.VBox([above("base: folder, checkpoint file, hub id or demo", self.base), named]),
            widgets.VBox([hint, self.others, add]),
        ], selected_index=None)  # fmt: skip
        more.layout.margin = "0"
        more.set_title(0, "Base and sampler")
        more.set_title(1, "Together with other LoRAs")
        return more

    def add_other(self, path: str | Path = "", strength: float = 1.0) -> None:
        """Add a LoRA that is used together with each candidate."""

        def remove() -> None:
            self.others.children = [other for other in self.others.children if other is not row]

        place = widgets.Text(str(path), placeholder="LoRA file, run folder or checkpoint")
        place.layout = widgets.Layout(flex="1 1 200px", width="auto", max_width="600px")
        value = widgets.FloatText(strength, step=0.1, layout=widgets.Layout(width="80px"))
        row = across(place, value, button("Remove", remove))
        self.others.children = [*self.others.children, row]

    @property
    def picked(self) -> Path:
        """The checkpoint or file that will be exported; errors as `Export.picked`."""
        return self.file.picked

    @property
    def exported(self) -> Path | None:
        """The file or folder that was exported last."""
        return self.file.exported

    # ── Candidates ────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, sources: Sequence[str | Path]) -> None:
        """Open a run's folder or LoRA files, and remove the grid; refused while pictures are made."""
        if self.make_button.disabled:
            self.message.value = note("Not opened: pictures are being made. Open it again after that.", "warning")
            return
        self._clear()
        self.candidates, self.runs.value, self.boxes = None, "", {}
        places = [Path(text).expanduser() for source in sources if (text := str(source).strip())]
        with reporting(self.message):
            self.candidates = evaluate.find_candidates(places)
        self.file.offer(self.candidates)
        if self.candidates:
            self._fill(self.candidates)
            runs = [run for place in places for run in running.runs_in(place) or [place] if running.is_run(run)]
            if len(runs) > 1:
                self.runs.value = evaluate.compare_runs(runs, pictures=False)._repr_html_()
        self.choice.children = list(self.boxes.values())
        self._count()

    def _fill(self, candidates: Candidates) -> None:
        """Fill the fields with what suits the candidates."""
        (base, prompts, sampling), config = self.first, candidates.config
        own_base, own_prompts = evaluate.starting_point(candidates)
        self.base.value, self.prompts.value = base or own_base, "\n".join(prompts or own_prompts)
        self.usual = Sampling.of(config) if config else Sampling()
        sampling = sampling or self.usual
        self.steps.value, self.guidance.value = sampling.steps, sampling.guidance
        for label in candidates.paths:
            text = f"{label} ({BEST})" if label == candidates.best else label
            self.boxes[label] = widgets.Checkbox(label in candidates.first, description=text, indent=False)
            self.boxes[label].layout = widgets.Layout(width="auto", margin="0")
        on_change(self._count, *self.boxes.values())
        count = f"{len(candidates.paths)} {'checkpoints' if config else 'LoRAs'}"
        problems = [note(problem, "warning") for problem in candidates.problems]
        self.message.value = "".join([note(count, "good"), *problems])

    def request(self) -> Request:
        """The grid that the fields describe.

        Raises:
            ValueError: it would have no picture, or a field that should have numbers has others.
        """
        prompts = [line.strip() for line in self.prompts.value.splitlines() if line.strip()]
        seeds = [int(seed) for seed in numbers(self.seeds.value, "seeds", whole=True)]
        labels = [label for label, box in self.boxes.items() if box.value]
        strengths = numbers(self.strengths.value, "strengths")
        if not (self.candidates and prompts and seeds and strengths and labels):
            raise ValueError("Tick a checkpoint, and give a prompt, a strength and a seed at least.")
        size = self.height.value or self.width.value, self.width.value or self.height.value
        if self.steps.value < 1 or min(size) < 0:
            raise ValueError(f"{self.steps.value} steps at {size[1]}×{size[0]} make no picture.")
        rows = list(product(prompts, seeds))
        fields = {name: getattr(self, name).value for name in ("negative", "steps", "guidance", "scheduler")}
        sampling, chosen = self.first[2] or self.usual, size if all(size) else self.usual.size
        sampling = replace(sampling, **fields, size=chosen, seeds=[seed for _, seed in rows])
        given = [(row.children[0].value.strip(), row.children[1].value) for row in self.others.children]
        others = [(Path(path).expanduser(), strength) for path, strength in given if path]
        return Request(self.candidates, rows, labels, strengths, others, self.base.value.strip(), sampling)

    def _count(self) -> None:
        """Write the number of pictures on the button."""
        try:
            total = self.request().total
            self.make_button.description = f"Make {total} picture{'s' * (total > 1)}"
        except ValueError:
            self.make_button.description = "Make pictures"

    # ── Pictures ──────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Make the pictures and hold the cell until they are done, so that Run all waits; Interrupt stops it."""
        if not self._begin():
            return
        error = None
        try:
            supervise.supervise(self._work, self._refresh, self.halt)
        except Exception as raised:
            error = raised
        finally:
            self._end(error)

    def make(self) -> None:
        """Make the pictures, as a click does."""

        def refresh(outcome: "Future[None] | None") -> None:
            self._refresh()
            if outcome:
                self._end(outcome.exception())

        if self._begin():
            supervise.react(self._work, refresh, self.halt)

    def stop(self) -> None:
        """End after the current denoising step."""
        self.halt.set()
        self.progress.value = note("stopping …")

    def _begin(self) -> bool:
        """Start an empty grid, and return whether there is one to fill."""
        if self.make_button.disabled:
            return False
        with reporting(self.progress):
            request = self.request()
            if running.TRAINING:
                raise BlockingIOError(
                    f"{running.TRAINING[0]} is training in this notebook, and both together could fill the card. Stop "
                    "it or wait for its end, then make the pictures; its own samples show it meanwhile."
                )
            self._clear()
            self.halt = threading.Event()  # a new one, so that a worker abandoned by a third Interrupt stays stopped
            self.make_button.disabled, self.stop_button.disabled = True, False
            self.grid.lay_out(request)
            self.start, self.progress.value = time.monotonic(), note("loading the base …")
            return True
        return False

    def _clear(self) -> None:
        self.grid.clear()
        self.finished, self.problems, self.progress.value = SimpleQueue(), [], ""

    def _work(self) -> None:
        """Make the pictures in the worker's thread, which changes no widget."""
        request, finished, stop = self.grid.request, self.finished, self.halt
        config = request.candidates.config
        base = evaluate.open_for(request.base, config)
        self.grid.model = base.name
        paths, warn = request.candidates.paths, self.problems.append
        variants = evaluate.make_variants(base, request.columns, paths, request.others, warn)
        if len(self.problems) == len(request.labels):
            raise ValueError("None of them can be used with this base.")
        machine = (config.device, config.mixed_precision, config.quantize) if config else ()
        pictures = sample.stream(
            base, [prompt for prompt, _ in request.rows], list(variants.values()), request.sampling,
            compute=Compute.choose(*machine), console=Console.quiet(stop),
        )  # fmt: skip
        with closing(pictures):
            for row, column, picture in pictures:
                finished.put((row, list(variants)[column], picture, page.jpeg(picture, SIDE)))

    def _refresh(self) -> None:
        """Show the pictures finished since the last time."""
        pictures = [self.finished.get() for _ in range(self.finished.qsize())]
        if pictures:
            self.grid.add(pictures)
            done, total = len(self.grid.pictures), self.grid.request.total
            left = (time.monotonic() - self.start) / done * (total - done)
            self.progress.value = note(f"{done} of {total} pictures" + (f", about {span(left)} left" if left else ""))

    def _end(self, error: BaseException | None) -> None:
        self._refresh()
        request = self.grid.request
        text = f"{len(self.grid.pictures)} of {request.total} pictures in {span(time.monotonic() - self.start)}"
        if error:
            text, tone = explain(error), "bad"
        elif self.halt.is_set():
            text, tone = f"stopped, {text}", "warning"
        else:
            hint = ": point at one to see it at strength 0, click it to see it large" if 0 in request.strengths else ""
            text, tone = text + hint, "good"
        problems = [note(problem, "bad") for problem in dict.fromkeys(self.problems)]
        self.progress.value = "".join([note(text, tone), *problems])
        self.make_button.disabled, self.stop_button.disabled = False, True


def numbers(text: str, name: str, whole: bool = False) -> list[float]:
    """Numbers between commas or spaces, each once.

    Raises:
        ValueError: the text has other words, or a number is too large.
    """
    try:
        values = [(int if whole else float)(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"{name} are numbers with commas between them, not {text!r}.") from None
    if not all(abs(value) < 2**63 for value in values):
        raise ValueError(f"{name} are too large: {text!r}.")
    return list(dict.fromkeys(values))
