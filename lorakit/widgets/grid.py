"""A grid of pictures: a block for each prompt and seed, a row for each LoRA, a column for each strength."""

import base64
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

import ipywidgets as widgets
from PIL import Image

from lorakit import evaluate, sample
from lorakit.evaluate import Candidates, Column
from lorakit.plots import ACCENT
from lorakit.sample import Sampling
from lorakit.widgets.export import BEST, file_name
from lorakit.widgets.parts import across, button, line, note

SIDE = 256  # pixels of a thumbnail's longer side
STRIPS = 40  # places across a large picture where strength 0 can end
BARE: Column = (None, 0.0)
LOOKS = """
.panel .jupyter-button,.panel .widget-html{margin:0}
.panel .widget-html-content{min-width:0;max-width:100%}
.panel .lk-cell,.panel .lk-cell:hover,.panel .lk-cell:focus{padding:0;min-width:0;line-height:1;border-radius:3px;
background:center/cover no-repeat rgba(128,128,128,.15);box-shadow:none;cursor:pointer}
.panel .lk-cell:focus-visible{outline:2px solid currentColor}
.panel .lk-chosen{outline:3px solid ACCENT!important;outline-offset:-1px}
.panel .lk-prompt{line-height:1.3;margin-top:4px;overflow-wrap:anywhere}
.panel .lk-wipe{position:relative;max-width:100%;line-height:0;cursor:col-resize;overflow:hidden}
.panel .lk-wipe img{width:100%;max-width:none;margin:0}
.panel .lk-wipe img+i~img{position:absolute;inset:0;clip-path:inset(0 100% 0 0);pointer-events:none}
.panel .lk-wipe i{position:absolute;top:0;bottom:0;z-index:1}
""".replace("ACCENT", ACCENT) + "".join(
    f".panel .lk-wipe i:nth-of-type({n}):hover~img{{clip-path:inset(0 {100 - 100 * n / STRIPS:.1f}% 0 0)!important;"
    "border-right:0}"
    for n in range(1, STRIPS + 1)
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """The settings of a grid."""

    candidates: Candidates  # others may be open by the time that the grid is clicked
    rows: list[tuple[str, int]]  # prompt, seed
    labels: list[str]  # of the candidates in the grid
    strengths: list[float]
    others: list[tuple[Path, float]]  # LoRAs used together with each, and their strengths
    base: str
    sampling: Sampling

    @property
    def columns(self) -> list[Column]:
        return evaluate.columns(self.labels, self.strengths)

    @property
    def total(self) -> int:
        """Number of pictures; strength 0 is the same for all candidates."""
        return len(self.rows) * len(self.columns)


class Grid(widgets.VBox):
    """Thumbnails that appear as they are made; a click shows one large, with strength 0 under the pointer.

    Args:
        pick: called with the label of a candidate that the user picks.
        mark: CSS class of the panel, which the grid's styles apply to.
    """

    def __init__(self, pick: Callable[[str], None], mark: str):
        self.pick, self.mark = pick, mark
        self.request: Request  # from `lay_out` on
        self.model = ""  # name of the base
        self.pictures: dict[tuple[int, Column], Image.Image] = {}
        self.cells: dict[tuple[int, Column], list[widgets.Button]] = {}
        self.chosen: tuple[int, Column] | None = None  # shown large
        self.chosen_label = ""
        looks = widgets.HTML(f"<style>{LOOKS.replace('.panel', '.' + mark)}</style>")
        self.styles, self.blocks = widgets.VBox([looks], layout=widgets.Layout(display="none")), widgets.VBox()
        self.large = widgets.HTML(layout=widgets.Layout(width="auto", min_width="0px"))
        self.pick_button = button("Pick", lambda: self.pick(self.chosen_label), "primary")
        self.pick_button.layout.display = "none"
        bottom = across(self.pick_button)
        super().__init__([self.styles, self.blocks, self.large, bottom], layout=widgets.Layout(grid_gap="8px"))

    def clear(self) -> None:
        """Remove the thumbnails and the large picture."""
        old = (*self.styles.children[1:], *self.blocks.children, *sum(self.cells.values(), []))
        self.styles.children, self.blocks.children = self.styles.children[:1], ()
        for widget in old:
            widget.close()
        self.pictures, self.cells, self.chosen = {}, {}, None
        self.large.value, self.pick_button.layout.display = "", "none"

    def lay_out(self, request: Request) -> None:
        """Replace the grid by an empty one."""
        self.clear()
        self.request = request
        height, width = request.sampling.size or (1, 1)
        self._add_style(f".{self.mark} .lk-cell{{aspect-ratio:{width}/{height}}}")
        several = len({seed for _, seed in request.rows}) > 1
        plain = widgets.Layout(margin="0", min_width="0px")
        table = widgets.Layout(
            grid_template_columns=f"minmax(76px, 110px) repeat({len(request.strengths)}, minmax(60px, 180px))",
            display="grid", grid_gap="4px", overflow="auto", align_items="center", margin="0 0 8px 0",
        )  # fmt: skip
        look = {"layout": widgets.Layout(width="auto", height="auto", margin="0"), "style": widgets.ButtonStyle()}
        heads = [line(f"strength {value:g}", "text-align:center;white-space:normal") for value in request.strengths]
        blocks: list[widgets.Widget] = []
        for row, (prompt, seed) in enumerate(request.rows):
            cells: list[widgets.Widget] = [widgets.HTML(head, layout=plain) for head in ("", *heads)]
            for label in request.labels:
                best = note(BEST, "good") if label == request.candidates.best else ""
                cells.append(widgets.HTML(note(label) + best, layout=plain))
                cells += [self._cell(row, label, value, look) for value in request.strengths]
            title = escape(f"{prompt}, seed {seed}" if several else prompt)
            blocks += [widgets.HTML(f'<div class="lk-prompt">{title}</div>'), widgets.Box(cells, layout=table)]
        self.blocks.children = blocks

    def _cell(self, row: int, label: str, strength: float, look: dict[str, widgets.Widget]) -> widgets.Button:
        column = (label, strength) if strength else BARE
        tooltip = f"{label} at strength {strength:g}, seed {self.request.rows[row][1]}"
        cell = widgets.Button(tooltip=tooltip, **look)  # one layout and style for all cells: the page gets fewer models
        for name in ("lk-cell", self._class(row, column), *([f"{self.mark}r{row}"] if strength else [])):
            cell.add_class(name)
        cell.on_click(lambda _: self.look(row, label, strength))
        self.cells.setdefault((row, column), []).append(cell)
        return cell

    def _class(self, row: int, column: Column) -> str:
        return f"{self.mark}p{row}-{self.request.columns.index(column)}"

    def _add_style(self, rules: str) -> None:
        self.styles.children = [*self.styles.children, widgets.HTML(f"<style>{rules}</style>")]

    def add(self, pictures: Iterable[tuple[int, Column, Image.Image, str]]) -> None:
        """Show finished pictures: row, column, picture, and the data URI of its thumbnail."""
        rules = []
        for row, column, picture, thumbnail in pictures:
            self.pictures[row, column] = picture
            cells = f".{self.mark} .{self._class(row, column)}"
            if column == BARE:  # strength 0 replaces any picture of its row that the pointer is on
                cells += f",.{self.mark} .{self.mark}r{row}:hover"
            rules.append(f"{cells}{{background-image:url({thumbnail})!important}}")
        if rules:
            self._add_style("".join(rules))

    def look(self, row: int, label: str, strength: float) -> None:
        """Show a picture large, with strength 0 under it, so that `label` can be picked."""
        place = row, (label, strength) if strength else BARE
        if place not in self.pictures:
            return
        for cell in self.cells.get(self.chosen or place, ()):
            cell.remove_class("lk-chosen")
        for cell in self.cells.get(place, ()):
            cell.add_class("lk-chosen")
        self.chosen, self.chosen_label = place, label
        prompt, seed = self.request.rows[row]
        under = [self._png(row, BARE)] if strength and (row, BARE) in self.pictures else []
        text = note(f"{prompt}\n{label} at strength {strength:g}, seed {seed}")
        self.large.value = wipe(self.pictures[place].size, self._png(*place), *under) + text
        self.pick_button.description, self.pick_button.layout.display = f"Pick {label}", ""

    def _png(self, row: int, column: Column) -> str:
        """A picture as the data URI of a PNG with its settings, which the user can save from the page."""
        request, picture, (label, strength) = self.request, self.pictures[row, column], column
        loras = [(path.name.removesuffix(".safetensors"), value) for path, value in request.others]
        if label:
            loras.insert(0, (file_name(request.candidates, label), strength))
        prompt, seed = request.rows[row]
        infotext = sample.infotext(prompt, seed, picture.size[::-1], request.sampling, self.model, loras)
        return "data:image/png;base64," + base64.b64encode(sample.png_bytes(picture, infotext)).decode()


def wipe(size: tuple[int, int], picture: str, bare: str | None = None) -> str:
    """A large picture that the pointer replaces by another, from the left; plain CSS, as Colab runs no script.

    Args:
        size: (width, height) in pixels; small pictures are enlarged.
        picture, bare: addresses.
    """
    width = max(size[0], 384 if size[0] >= size[1] else 384 * size[0] // size[1])
    image = '<img alt="" src="{}">'
    strips = "".join(f'<i style="left:{100 * n / STRIPS:.1f}%;width:{100 / STRIPS:.1f}%"></i>' for n in range(STRIPS))
    under = strips + image.format(bare) if bare else ""
    hint = note("Move the pointer across: strength 0 is left of it.") if bare else ""
    return f'<div class="lk-wipe" style="width:{width}px">{image.format(picture)}{under}</div>{hint}'
