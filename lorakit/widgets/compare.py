"""Compare checkpoints and LoRA files in pictures, pick one, export it and take it along."""

import base64
import os
import re
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from html import escape
from itertools import product
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple
from uuid import uuid4

import ipywidgets as widgets
from IPython.utils.capture import capture_output
from PIL import Image

from lorakit import adapter as adapters
from lorakit import evaluate, hosts, page, sample, storage
from lorakit import run as running
from lorakit.evaluate import Candidates, Column
from lorakit.widgets import supervise
from lorakit.widgets.parts import button, note

SIDE = 256  # pixels of a thumbnail's longer side
STRIPS = 40  # places across a large picture where strength 0 can end
LAYOUTS = (("A1111, Forge, ComfyUI (kohya's)", "kohya"), ("diffusers", "diffusers"), ("PEFT (a folder)", "peft"))
STRENGTHS = (0, 0.5, 0.7, 0.9, 1)
BEST = "lowest validation loss"
ROW = widgets.Layout(display="flex", flex_flow="row wrap", align_items="center", grid_gap="8px")
FIELDS = widgets.Layout(
    display="grid", grid_template_columns="repeat(auto-fit, minmax(130px, 1fr))", grid_gap="8px", max_width="900px"
)
FULL = widgets.Layout(width="auto", margin="0")
WIDE = widgets.Layout(width="auto", margin="0", max_width="900px")


class Asked(NamedTuple):
    """A grid that is to be made."""

    found: Candidates  # that its labels are of, whatever is opened later
    rows: list[tuple[str, int]]  # prompt and seed of each
    labels: list[str]
    strengths: list[float]
    others: list[tuple[Path, float]]
    base: str
    size: tuple[int, int] | None  # (height, width) in pixels; None is the run's, or the base's own
    settings: dict  # for the sampler

    @property
    def columns(self) -> list[Column]:
        return evaluate.columns(self.labels, self.strengths)


class Compare(widgets.VBox):
    """A panel that makes pictures with checkpoints or LoRA files, and exports the one that is picked.

    Args:
        sources: a run's folder or LoRA files, as `compare.candidates` takes them; opened at once where they are given.
        base: as `base.open` takes it; "" is the one that they are for.
        prompts, negative, seeds, strengths: of the first grid; strengths as numbers, or a text such as "0, 0.5, 1".
        others: LoRAs that are used together with each, at strengths of their own.
        steps, guidance: of the sampler; None takes the run's.
        into: folder that exported files go to.
        copy_to: folder for second copies of them.
    """

    def __init__(
        self, sources: str | Path | Sequence[str | Path] = (), *, base: str = "", prompts: Sequence[str] = (),
        negative: str = "", seeds: Sequence[int] = (42,), strengths: str | Sequence[float] = STRENGTHS,
        others: Sequence[tuple[str | Path, float]] = (), steps: int | None = None, guidance: float | None = None,
        into: str | Path = "exports", copy_to: str | Path = "",
    ):  # fmt: skip
        self.into, self.given = Path(into), (base, tuple(prompts), steps, guidance)
        self.found: Candidates | None = None
        self.exported: Path | None = None
        self.halt, self.done, self.problems = threading.Event(), SimpleQueue(), []
        self.pictures: dict[tuple[int, Column], Image.Image] = {}
        self.cells: dict[tuple[int, Column], list[widgets.Button]] = {}
        self.asked: Asked | None = None
        self.looked: tuple[int, Column] | None = None
        self.model, self.began, self.mark = "", 0.0, f"lk{uuid4().hex[:8]}"
        sources = [sources] if isinstance(sources, str | Path) else list(sources)
        self._form(sources, negative, seeds, strengths, copy_to)
        for path, strength in others:
            self._another(str(path), strength)
        if sources:
            self.read(sources)

    def _form(self, sources, negative, seeds, strengths, copy_to) -> None:
        """All that is seen."""
        field = widgets.Textarea
        self.sources = field("\n".join(map(str, sources)), rows=2, layout=WIDE, continuous_update=False)
        self.told, self.boxes = widgets.HTML(), {}
        self.across = widgets.HTML(layout=widgets.Layout(width="auto", min_width="0px"))  # of several runs
        self.candidates = widgets.Box(
            layout=widgets.Layout(display="flex", flex_flow="row wrap", grid_gap="2px 16px", max_height="140px")
        )
        self.candidates.layout.overflow = "auto"
        self.prompts, self.negative = field(rows=3, layout=WIDE), widgets.Text(negative, layout=FULL)
        strengths = strengths if isinstance(strengths, str) else ", ".join(f"{value:g}" for value in strengths)
        self.strengths = widgets.Text(strengths, layout=FULL)
        self.seeds = widgets.Text(", ".join(map(str, seeds)), layout=FULL)
        self.base = widgets.Text(layout=FULL)
        self.width, self.height = (widgets.IntText(0, layout=FULL) for _ in range(2))
        self.steps, self.guidance = widgets.IntText(25, layout=FULL), widgets.FloatText(7.0, layout=FULL)
        self.scheduler = widgets.Dropdown(
            options=[(sample.SAMPLERS[name], name) for name in sample.SCHEDULERS],
            value=sample.DEFAULT_SCHEDULER,
            layout=FULL,
        )
        self.beside = widgets.VBox()
        more = widgets.Accordion([
            widgets.VBox([
                note_above("base: folder, checkpoint file, hub id or demo", self.base),
                widgets.Box([
                    note_above("width, 0: usual", self.width), note_above("height, 0: usual", self.height),
                    note_above("steps", self.steps), note_above("guidance", self.guidance),
                    note_above("sampler", self.scheduler), note_above("negative prompt", self.negative),
                ], layout=FIELDS),
            ]),
            widgets.VBox([
                widgets.HTML(note("Used together with each of the above, at a strength of its own.")), self.beside,
                widgets.Box([button("Add a LoRA", lambda: self._another("", 1.0))], layout=ROW),
            ]),
        ], selected_index=None)  # fmt: skip
        more.layout.margin = "0"
        more.set_title(0, "Base and sampler")
        more.set_title(1, "Together with other LoRAs")
        self.make_button = button("Make pictures", self.make, "primary")
        self.stop_button = button("Stop", self.stop, "danger", "after this denoising step; what is made stays")
        self.stop_button.disabled = True
        self.progress = widgets.HTML()
        self.grid, self.styles = widgets.VBox(), widgets.VBox(layout=widgets.Layout(display="none"))
        self.large = widgets.HTML(layout=widgets.Layout(width="auto", min_width="0px"))
        self.pick_button = button("Pick it", self._pick, "primary")
        self.pick_button.layout.display = "none"
        for watched in (self.prompts, self.strengths, self.seeds):
            watched.observe(lambda _: self._count(), "value")
        made = [
            note_above("a run's folder, or LoRA files, one a line", self.sources),
            widgets.Box([button("Open", lambda: self.read(self.sources.value.splitlines())), self.told], layout=ROW),
            self.across, self.candidates, note_above("prompts, one a line", self.prompts),
            widgets.Box([note_above("strengths", self.strengths), note_above("seeds", self.seeds)], layout=FIELDS),
            more, widgets.Box([self.make_button, self.stop_button, self.progress], layout=ROW),
            self.styles, self.grid, self.large, widgets.Box([self.pick_button], layout=ROW),
        ]  # fmt: skip
        super().__init__([*made, *self._take_along(copy_to)], layout=widgets.Layout(grid_gap="8px"))
        self.add_class(self.mark)
        self.styles.children = [widgets.HTML(f"<style>{LOOKS.replace('.here', '.' + self.mark)}</style>")]

    def _take_along(self, copy_to) -> list[widgets.Widget]:
        """The lower part: what is picked, as a file."""
        two = widgets.Layout(
            display="grid", grid_template_columns="repeat(auto-fit, minmax(240px, 1fr))", grid_gap="8px",
            max_width="720px",
        )  # fmt: skip
        self.what = widgets.Dropdown(layout=FULL)
        self.form = widgets.Dropdown(options=LAYOUTS, layout=FULL)
        self.dtype = widgets.Dropdown(options=list(adapters.DTYPES), layout=FULL)
        self.name, self.named = widgets.Text(layout=FULL), ""
        self.proof, self.copied = widgets.HTML(), widgets.HTML()
        # JupyterLab knows where a link leads in an Output alone; Notebook 6 in plain HTML, and it fails at an Output.
        self.link = widgets.HTML() if widgets.__version__.startswith("7.") else widgets.Output()
        self.folder = widgets.Text(str(copy_to), placeholder="a folder, such as one on Drive")
        self.folder.layout = widgets.Layout(width="300px")
        self.what.observe(lambda _: self._picked(), "value")
        self.download_button = button("Download", self.download)
        self.copy_button = button("Copy it there", self.copy)
        return [
            widgets.HTML('<div style="font-weight:600;margin-top:12px">Take it along</div>'),
            widgets.Box([
                note_above("which", self.what), note_above("name of the file", self.name),
                note_above("for", self.form), note_above("precision", self.dtype),
            ], layout=two),
            widgets.Box([button("Export", self.export, "success"), self.proof], layout=ROW),
            widgets.Box([self.download_button, self.folder, self.copy_button, self.copied], layout=ROW), self.link,
        ]  # fmt: skip

    # ── What there is ─────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, sources: Sequence[str | Path]) -> None:
        """Open a run's folder or LoRA files; the grid of those that were open goes. Not while pictures are made."""
        if self.make_button.disabled:
            self.told.value = note("Not opened: pictures were being made. Open it again once they are done.", "warning")
            return
        self._clear()
        sources = [text for source in sources if (text := str(source).strip())]
        base, prompts, steps, guidance = self.given
        self.found, self.boxes, self.what.options, self.across.value = None, {}, [], ""
        try:
            self.found = found = evaluate.find_candidates(sources)
        except (ValueError, OSError) as error:
            self.told.value = note(str(error), "bad")
            self._candidates(())
            return
        config, (own_base, own_prompts) = found.config, evaluate.starting_point(found)
        self.base.value, self.prompts.value = base or own_base, "\n".join(prompts or own_prompts)
        self.steps.value = steps or (config.sample_steps if config else 25)
        self.guidance.value = guidance or (config.sample_guidance if config else 7.0)
        self._candidates(found.first)
        of_run = f"{len(found.paths)} checkpoints" if found.config else f"{len(found.paths)} LoRAs"
        problems = [note(problem, "warning") for problem in found.problems]
        self.told.value = note(of_run, "good") + "".join(problems)
        shown = [(f"{label}, {BEST}" if label == found.best else label, label) for label in found.paths]
        self.what.options, self.what.value = shown, found.best or list(found.paths)[-1]
        places = [Path(source).expanduser() for source in sources]
        runs = [run for place in places for run in running.runs_in(place) or [place] if running.is_run(run)]
        if len(runs) > 1:
            self.across.value = evaluate.compare_runs(runs, pictures=False)._repr_html_()

    def _candidates(self, chosen: Sequence[str]) -> None:
        paths = self.found.paths if self.found else ()
        for label in paths:
            said = f"{label} ({BEST})" if label == self.found.best else label
            self.boxes[label] = widgets.Checkbox(label in chosen, description=said, indent=False)
            self.boxes[label].layout = widgets.Layout(width="auto", margin="0")
            self.boxes[label].observe(lambda _: self._count(), "value")
        self.candidates.children = list(self.boxes.values())
        self._count()

    def _another(self, path: str, strength: float) -> None:
        """A row for a LoRA that is used beside."""
        place = widgets.Text(path, placeholder="LoRA file, run folder or checkpoint")
        place.layout = widgets.Layout(flex="1 1 200px", width="auto", max_width="600px")
        value = widgets.FloatText(strength, step=0.1, layout=widgets.Layout(width="80px"))
        row = widgets.Box([place, value, button("Remove", lambda: self._without(row))], layout=ROW)
        self.beside.children = [*self.beside.children, row]

    def _without(self, row: widgets.Box) -> None:
        self.beside.children = [other for other in self.beside.children if other is not row]

    def ask(self) -> Asked:
        """What the fields ask for.

        Raises:
            ValueError: they ask for nothing, or for what is no number.
        """
        prompts = [line.strip() for line in self.prompts.value.splitlines() if line.strip()]
        seeds = [int(seed) for seed in numbers(self.seeds.value, "seeds", whole=True)]
        labels = [label for label, box in self.boxes.items() if box.value]
        strengths = numbers(self.strengths.value, "strengths")
        if not (prompts and seeds and strengths and labels):
            raise ValueError("Tick a checkpoint, and give a prompt, a strength and a seed at least.")
        others = [
            (place.value.strip(), value.value) for place, value, _ in (row.children for row in self.beside.children)
        ]
        size = (self.height.value or self.width.value, self.width.value or self.height.value)
        settings = {"negative": self.negative.value, "steps": self.steps.value, "guidance": self.guidance.value}
        settings["scheduler_name"] = self.scheduler.value
        settings["clip_skip"] = self.found.config.clip_skip if self.found.config else 1
        if self.steps.value < 1 or min(size) < 0:
            raise ValueError(f"{self.steps.value} steps at {size[1]}×{size[0]} make no picture.")
        return Asked(
            self.found, list(product(prompts, seeds)), labels, strengths,
            [(Path(path).expanduser(), strength) for path, strength in others if path], self.base.value.strip(),
            size if all(size) else None, settings,
        )  # fmt: skip

    def _count(self) -> None:
        try:
            asked = self.ask()
            count = len(asked.rows) * len(asked.columns)
            self.make_button.description = f"Make {count} picture{'s' * (count > 1)}"
        except ValueError:
            self.make_button.description = "Make pictures"

    # ── Making ────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Make the pictures and hold the cell until they are done, so that Run all waits; Interrupt stops it."""
        if not self._begin():
            return
        failed = None
        try:
            supervise.supervise(self._work, self._refresh, self.halt)
        except Exception as error:
            failed = error
        finally:
            self._ended(failed)

    def make(self) -> None:
        """Make the pictures, as a click does."""

        def refresh(outcome) -> None:
            self._refresh()
            if outcome:
                self._ended(outcome.exception())

        if self._begin():
            supervise.react(self._work, refresh, self.halt)

    def stop(self) -> None:
        """End after the current denoising step."""
        self.halt.set()
        self.progress.value = note("stopping …")

    def _begin(self) -> bool:
        if self.make_button.disabled:
            return False
        try:
            self.asked = self.ask()
        except ValueError as error:
            self.progress.value = note(str(error), "bad")
            return False
        self._clear()
        self.halt = threading.Event()  # its own: work that was left alone after a third Interrupt stays stopped
        self.make_button.disabled, self.stop_button.disabled = True, False
        self._lay_out(self.asked)
        self.began, self.progress.value = time.monotonic(), note("loading the base …")
        return True

    def _work(self) -> None:
        """In a thread of its own: it touches no widget."""
        asked, done, stop = self.asked, self.done, self.halt
        config = asked.found.config
        opened = evaluate.open_for(asked.base, config)
        self.model = opened.name
        variants = evaluate.make_variants(opened, asked.columns, asked.found.paths, asked.others, self.problems.append)
        if len(self.problems) == len(asked.labels):
            raise ValueError("None of them can be used with this base.")
        side = config.resolution if config else opened.resolution
        size = asked.size or (side, side)
        machine = {}
        if config:
            machine = {"device": config.device, "precision": config.mixed_precision, "quantize": config.quantize}
        prompts, seeds = zip(*asked.rows, strict=True)
        pictures = sample.stream(
            opened, prompts, list(variants.values()), seeds=seeds, size=size, stop=stop, **asked.settings, **machine,
        )  # fmt: skip
        columns = list(variants)
        with closing(pictures):
            for row, column, picture in pictures:
                done.put((row, columns[column], picture, small(picture)))

    def _refresh(self) -> None:
        """Show what has been made since the last time."""
        rules = []
        try:
            while True:
                row, column, picture, thumbnail = self.done.get_nowait()
                self.pictures[row, column] = picture
                here = f".{self.mark} .{self._class(row, column)}"
                if column[0] is None:  # strength 0 lies under all pictures of its row
                    here += f",.{self.mark} .{self.mark}r{row}:hover"
                rules.append(f"{here}{{background-image:url({thumbnail})!important}}")
        except Empty:
            pass
        if not rules:
            return
        self.styles.children = [*self.styles.children, widgets.HTML(f"<style>{''.join(rules)}</style>")]
        done, total = len(self.pictures), len(self.asked.rows) * len(self.asked.columns)
        seconds = (time.monotonic() - self.began) / done
        left = f", about {span(seconds * (total - done))} left" if done < total else ""
        self.progress.value = note(f"{done} of {total} pictures{left}")

    def _ended(self, error: BaseException | None) -> None:
        self._refresh()
        done, total = len(self.pictures), len(self.asked.rows) * len(self.asked.columns)
        told = f"{done} of {total} pictures in {span(time.monotonic() - self.began)}"
        if error:
            self.progress.value = note(said(error), "bad")
        elif self.halt.is_set():
            self.progress.value = note(f"stopped, {told}", "warning")
        else:
            hint = (
                ": point at one to see it at strength 0, click it to see it large" if 0 in self.asked.strengths else ""
            )
            self.progress.value = note(told + hint, "good")
        self.progress.value += "".join(note(problem, "bad") for problem in dict.fromkeys(self.problems))
        self.make_button.disabled, self.stop_button.disabled = False, True

    # ── The grid ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _class(self, row: int, column: Column) -> str:
        return f"{self.mark}p{row}-{self.asked.columns.index(column)}"

    def _clear(self) -> None:
        """Take away the grid, its pictures and what was looked at."""
        gone = (*self.styles.children[1:], *self.grid.children, *sum(self.cells.values(), []))
        self.styles.children, self.grid.children, self.cells = self.styles.children[:1], (), {}
        for widget in gone:
            widget.close()
        self.done, self.problems, self.pictures, self.looked = SimpleQueue(), [], {}, None
        self.progress.value, self.large.value, self.pick_button.layout.display = "", "", "none"

    def _lay_out(self, asked: Asked) -> None:
        """A block for each prompt and seed: a row a candidate, a column a strength."""
        height, width = asked.size or (1, 1)
        shape = f".{self.mark} .lk-cell{{aspect-ratio:{width}/{height}}}"
        self.styles.children = [*self.styles.children, widgets.HTML(f"<style>{shape}</style>")]
        several = len({seed for _, seed in asked.rows}) > 1
        plain = widgets.Layout(margin="0", min_width="0px")
        across = widgets.Layout(
            grid_template_columns=f"minmax(76px, 110px) repeat({len(asked.strengths)}, minmax(60px, 180px))",
            display="grid", grid_gap="4px", overflow="auto", align_items="center", margin="0 0 8px 0",
        )  # fmt: skip
        layout, style = widgets.Layout(width="auto", height="auto", margin="0"), widgets.ButtonStyle()
        blocks = []
        for row, (prompt, seed) in enumerate(asked.rows):
            told = f"{prompt}, seed {seed}" if several else prompt
            cells = [widgets.HTML(layout=plain)]
            cells += [widgets.HTML(centred(f"strength {value:g}"), layout=plain) for value in asked.strengths]
            for label in asked.labels:
                best = label == asked.found.best
                cells.append(widgets.HTML(note(label) + (note(BEST, "good") if best else ""), layout=plain))
                for value in asked.strengths:
                    cells.append(self._cell(row, label, value, seed, layout, style))
            blocks += [widgets.HTML(f'<div class="lk-prompt">{escape(told)}</div>'), widgets.Box(cells, layout=across)]
        self.grid.children = blocks

    def _cell(self, row: int, label: str, strength: float, seed: int, layout, style) -> widgets.Button:
        column = (label, strength) if strength else (None, 0.0)
        tooltip = f"{label} at strength {strength:g}, seed {seed}"
        made = widgets.Button(layout=layout, style=style, tooltip=tooltip)
        for name in ("lk-cell", self._class(row, column), *([f"{self.mark}r{row}"] if strength else [])):
            made.add_class(name)
        made.on_click(lambda _: self.look(row, label, strength))
        self.cells.setdefault((row, column), []).append(made)
        return made

    def look(self, row: int, label: str, strength: float) -> None:
        """Show a picture large, with strength 0 under it; `label` can be picked then."""
        column, bare = (label, strength) if strength else (None, 0.0), (None, 0.0)
        if (row, column) not in self.pictures:
            return
        for place in (self.looked, (row, column)):
            for cell in self.cells.get(place, ()):
                (cell.add_class if place == (row, column) else cell.remove_class)("lk-chosen")
        self.looked, self.pointed = (row, column), label
        prompt, seed = self.asked.rows[row]
        under = [self._png(row, bare)] if strength and (row, bare) in self.pictures else []
        self.large.value = wipe(self.pictures[row, column].size, self._png(row, column), *under) + note(
            f"{prompt}\n{label} at strength {strength:g}, seed {seed}"
        )
        self.pick_button.description, self.pick_button.layout.display = f"Pick {label}", ""

    def _png(self, row: int, column: Column) -> str:
        """A picture as it was made, with its settings in it: it can be saved from the page."""
        prompt, seed = self.asked.rows[row]
        own = [(file_name(self.asked.found, column[0]), column[1])] if column[0] else []
        loras = own + [(path.name.removesuffix(".safetensors"), value) for path, value in self.asked.others]
        picture = self.pictures[row, column]
        told = sample.infotext(
            prompt, seed, picture.size[::-1], model=self.model, loras=loras, **self.asked.settings
        )  # fmt: skip
        return uri(sample.png_bytes(picture, told), "png")

    def _pick(self) -> None:
        self.what.value = self.pointed

    # ── The file ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def picked(self) -> Path:
        """The checkpoint or file that is to be exported.

        Raises:
            ValueError: none is there.
        """
        if not self.found or self.what.value is None:
            raise ValueError("There is nothing to export yet: open a run's folder or a LoRA file.")
        return self.found.paths[self.what.value]

    def _picked(self) -> None:
        """Propose a name, unless one was written by hand."""
        if self.found and self.what.value and self.name.value == self.named:
            self.name.value = self.named = file_name(self.found, self.what.value)

    def export(self) -> None:
        """Write the file and prove it."""
        self.exported, self.copied.value, self.proof.value = None, "", note("writing …")
        self._link(())
        try:
            lora, layout = running.lora_of(self.picked), self.form.value
            name = Path(self.name.value.strip() or "lora").name.removesuffix(".safetensors")
            path = self.into / (name if layout == "peft" else f"{name}.safetensors")
            adapters.save(lora, path, dtype=adapters.dtype_of(self.dtype.value), layout=layout)
            proof = adapters.prove(path, lora, layout=layout)
        except Exception as error:
            self.proof.value = note(said(error), "bad")
            return
        self.exported = path
        held = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in held) / 1e6
        self.proof.value = note(f"{here(path)}, {size:,.1f} MB\nread back: {proof.describe()}", "good")

    def download(self) -> None:
        """Bring the exported file to the person's machine; a folder as a zip."""
        self._link(())
        try:
            path = self._there()
            if path.is_dir():
                path = Path(shutil.make_archive(str(path), "zip", path))
            if hosts.here() is hosts.COLAB:
                hosts.download(path)
                return
            with capture_output(stdout=False, stderr=False) as caught:  # what a callback displays may show nowhere
                hosts.download(path)
            self._link([shown.data for shown in caught.outputs])
        except Exception as error:
            self.copied.value = note(said(error), "bad")

    def _link(self, shown: Sequence[dict]) -> None:
        if isinstance(self.link, widgets.HTML):
            self.link.value = "".join(data.get("text/html", "") for data in shown)
        else:
            self.link.outputs = tuple({"output_type": "display_data", "data": d, "metadata": {}} for d in shown)

    def copy(self) -> None:
        """Copy the exported file to a folder, and compare."""
        self.copied.value = note("copying …")
        try:
            if not self.folder.value.strip():
                raise ValueError("Name the folder to copy it to.")
            made = storage.copy_verified(self._there(), Path(self.folder.value.strip()).expanduser())
        except Exception as error:
            self.copied.value = note(said(error), "bad")
            return
        self.copied.value = note(
            f"{made[0].name if len(made) == 1 else f'{len(made)} files'} copied, read back: the same", "good"
        )

    def _there(self) -> Path:
        if not self.exported:
            raise ValueError("Export it first.")
        return self.exported


# ── Looks ───────────────────────────────────────────────────────────────────────────────────────────────────────────

LOOKS = """
.here .jupyter-button,.here .widget-html{margin:0}
.here .widget-html-content{min-width:0;max-width:100%}
.here .lk-cell,.here .lk-cell:hover,.here .lk-cell:focus{padding:0;min-width:0;line-height:1;border-radius:3px;
background:center/cover no-repeat rgba(128,128,128,.15);box-shadow:none;cursor:pointer}
.here .lk-cell:focus-visible{outline:2px solid currentColor}
.here .lk-chosen{outline:3px solid #4c8bf5!important;outline-offset:-1px}
.here .lk-prompt{line-height:1.3;margin-top:4px;overflow-wrap:anywhere}
.here .lk-wipe{position:relative;max-width:100%;line-height:0;cursor:col-resize;overflow:hidden}
.here .lk-wipe img{width:100%;max-width:none;margin:0}
.here .lk-wipe img+i~img{position:absolute;inset:0;clip-path:inset(0 100% 0 0);pointer-events:none}
.here .lk-wipe i{position:absolute;top:0;bottom:0;z-index:1}
""" + "".join(
    f".here .lk-wipe i:nth-of-type({n}):hover~img{{clip-path:inset(0 {100 - 100 * n / STRIPS:.1f}% 0 0)!important;"
    "border-right:0}"
    for n in range(1, STRIPS + 1)
)  # fmt: skip


def note_above(text: str, field: widgets.Widget) -> widgets.VBox:
    """A field under its name, which is never cut off."""
    name = widgets.HTML(f'<div style="line-height:1.3;font-size:12px;opacity:.8">{escape(text)}</div>')
    name.layout = widgets.Layout(margin="0")
    return widgets.VBox([name, field], layout=widgets.Layout(min_width="0px"))


def centred(text: str) -> str:
    return f'<div style="text-align:center;line-height:1.3;white-space:normal">{escape(text)}</div>'


def wipe(size: tuple[int, int], picture: str, bare: str | None = None) -> str:
    """A large picture; left of the pointer another is seen in its place. Plain CSS: Colab runs no script in widgets.

    Args:
        size: (width, height); small pictures are shown larger.
        picture, bare: addresses.
    """
    width = max(size[0], 384 if size[0] >= size[1] else 384 * size[0] // size[1])
    image = '<img alt="" src="{}">'
    strips = "".join(f'<i style="left:{100 * n / STRIPS:.1f}%;width:{100 / STRIPS:.1f}%"></i>' for n in range(STRIPS))
    under = strips + image.format(bare) if bare else ""
    hint = note("Move the pointer across: strength 0 is left of it.") if bare else ""
    return f'<div class="lk-wipe" style="width:{width}px">{image.format(picture)}{under}</div>{hint}'


def small(picture: Image.Image) -> str:
    """The address of a thumbnail."""
    return page.jpeg(picture, SIDE)


def uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def numbers(text: str, what: str, whole: bool = False) -> list[float]:
    """Numbers between commas or blanks, each once.

    Raises:
        ValueError: something else is among them.
    """
    try:
        found = [(int if whole else float)(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"{what} are numbers with commas between them, not {text!r}.") from None
    if not all(abs(number) < 2**63 for number in found):
        raise ValueError(f"{what} are too large: {text!r}.")
    return list(dict.fromkeys(found))


def span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def said(error: BaseException) -> str:
    """What went wrong, in words: without its type where it was foreseen."""
    if "OutOfMemory" in type(error).__name__:
        return "The card has no room for this: make the pictures smaller, or end other notebooks that use the card."
    foreseen = isinstance(error, ValueError | OSError | FloatingPointError | ImportError)
    return str(error) if foreseen and str(error) else f"{type(error).__name__}: {error}"


def file_name(found: Candidates, label: str) -> str:
    """What a candidate's file is called, without its suffix; of several runs' checkpoints it holds the run's name."""
    path = found.paths[label]
    if path.parent.name != "checkpoints":
        return path.name.removesuffix(".safetensors")
    if len({other.parent for other in found.paths.values() if other.parent.name == "checkpoints"}) > 1:
        return re.sub(r"[^\w.+=-]+", "-", label).strip("-")
    return f"{found.config.name}-{path.stem}" if found.config else path.stem


def here(path: Path) -> str:
    """A path as it is said: from the working directory where it lies below it."""
    return os.path.relpath(path) if path.absolute().is_relative_to(Path.cwd()) else path.name
