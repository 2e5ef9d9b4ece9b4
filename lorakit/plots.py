"""Charts of losses, and sheets of labelled pictures.

Nothing here touches pyplot, its open figures or a notebook's backend.
"""

import html
import io
import math
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lorakit import storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCENT = "#2f7fe0"  # the smoothed loss: legible on white pages and on dark ones
JUDGED = "#d9822b"  # the validation loss
TONES = {"good": "#2e9e5b", "warning": "#c77d00", "bad": "#d64545", "": "inherit"}  # legible on white and on black
COLOURS = (  # of runs in one chart: distinct from each other, on white and on black
    ACCENT, JUDGED, TONES["good"], TONES["bad"], "#8d6fd1", "#1b9aaa", "#b8860b", "#c2569b",
)  # fmt: skip
FAINT = {"color": "#555555", "alpha": 0.4, "linewidth": 0.8}  # in an SVG, the colour of the page's text
DOTS = {"marker": "o"}
SETTINGS: dict[Any, Any] = {  # of matplotlib
    "svg.fonttype": "none", "svg.hashsalt": "lorakit", "font.sans-serif": ["DejaVu Sans"],
    "path.simplify_threshold": 1.0,
}  # fmt: skip
DRAWING = Lock()  # matplotlib's settings belong to all threads: a panel draws while the run saves its chart
WIDEST = 2400  # pixels of a sheet
SMALLEST = 128  # pixels of a cell's shorter side
UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML 1.0 cannot hold


def smooth(losses: Sequence[float], half_life: float | None = None) -> list[float]:
    """Exponential moving average, without the usual pull towards zero at the start; as many values as losses.

    Args:
        losses: NaN, infinity and None do not count; their average is NaN.
        half_life: entries after which a loss weighs half, above 0; None takes a 25th of the length.

    Source: Kingma & Ba 2014, arXiv:1412.6980, section 3 (bias correction).
    """
    if half_life is not None and not half_life > 0:
        raise ValueError(f"half_life is {half_life}: give a number of entries above 0, or None.")
    keep = 0.5 ** (1 / (half_life or max(1, len(losses) / 25)))
    average, weight, averages = 0.0, 0.0, []
    for loss in np.array(losses, float).tolist():
        if math.isfinite(loss):
            weight = keep * weight + 1
            average += (loss - average) / weight
            averages.append(average)
        else:
            averages.append(math.nan)
    return averages


class Series(NamedTuple):
    """One curve."""

    name: str
    x: np.ndarray  # steps, (N,)
    y: np.ndarray  # values, (N,); NaN leaves a gap
    look: dict[str, Any]  # of the line, in matplotlib's words


class Panel(NamedTuple):
    """Curves on common axes; values outside `low` and `high` are cut off."""

    name: str
    series: list[Series]
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Chart:
    """Curves over the steps of training. Shows itself in a notebook."""

    panels: list[Panel] = field(repr=False)
    title: str = ""
    status: str = ""  # a line below the title
    end: int | None = None  # the last step of the axis; None ends it at the last point

    def figure(self, width: float = 8, height: float = 3) -> "Figure":
        """The chart as a figure of matplotlib: inches of its width and of each panel's height."""
        from matplotlib import style
        from matplotlib.figure import Figure

        curves = self.panels[0].series
        columns = 1 if any(len(series.name) > 20 for series in curves) else 3
        head = textwrap.wrap(_plain(self.title), int(10 * width), max_lines=3, placeholder=" …")
        head += [self.status] if self.status else []
        with style.context("default"):  # whatever style the user has set
            tall = height * len(self.panels) + 0.2 * (len(head) + math.ceil(len(curves) / columns))
            figure = Figure(figsize=(width, tall), dpi=120, layout="constrained")
            rows = figure.subplots(len(self.panels), sharex=True, squeeze=False)[:, 0]
            for axes, panel in zip(rows, self.panels, strict=True):
                for name, x, y, look in panel.series:
                    marker = "." if len(x) < 50 else ""  # a single step makes no line
                    axes.plot(x, y, label=_label(name), **{"marker": marker, "linewidth": 2} | look)
                axes.margins(x=0.02)
                axes.set_ylim(panel.low, panel.high)
                axes.set_ylabel(panel.name)
                axes.grid(alpha=0.25)
                axes.spines[["top", "right"]].set_visible(False)
            if len(curves) > 1:
                legend = figure.legend(*rows[0].get_legend_handles_labels(), loc="outside lower left", ncols=columns,
                                       frameon=False)  # fmt: skip
                for text in legend.get_texts():
                    text.set_parse_math(False)  # a name may contain a $
            rows[0].set_title("\n".join(head), loc="left", size=10, parse_math=False)
            rows[-1].set_xlabel("step")
            rows[-1].xaxis.get_major_locator().set_params(integer=True)
            if self.end:
                rows[-1].set_xlim(right=max(self.end, rows[-1].get_xlim()[1]))
        return figure

    def _drawn(self, *size: float, **options: Any) -> bytes:
        """The figure as a file's bytes, the same each time."""
        from matplotlib import style

        buffer = io.BytesIO()
        with DRAWING, style.context(["default", SETTINGS]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # the letter is drawn as a box
            self.figure(*size).savefig(buffer, **options)
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self._drawn(format="png", facecolor="white", metadata={"Software": None})

    def save(self, path: Path) -> None:
        """Write the figure as PNG."""
        with storage.write_file(Path(path)) as partial:
            partial.write_bytes(self._repr_png_())

    def svg(self, width: int = 640, height: int = 240) -> str:
        """The chart as one self-contained `<svg>`, for a page of any colour.

        Args:
            width: pixels.
            height: pixels of each panel.
        """
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        text = self._drawn(width / 96, height / 96, format="svg", transparent=True, metadata=nothing).decode()
        text = re.sub("<style.*?</style>|<!--.*?-->", "", text[text.index("<svg ") :], flags=re.DOTALL)
        label = html.escape(f"{_plain(self.title)} {self.status}".strip() or self.panels[0].name)
        look = f'role="img" aria-label="{label}" fill="currentColor" style="max-width:100%;height:auto"'
        return f"<svg {look} " + re.sub("(?<=: )#(000000|555555)", "currentColor", text.removeprefix("<svg "))


def _label(name: str) -> str:
    short = textwrap.shorten(_plain(name), 60, placeholder=" …")
    return f" {short}" if short.startswith("_") else short  # matplotlib hides names that begin with _


def _limits(values: np.ndarray, highest: float = 1.0) -> tuple[float, float]:
    """The ends of an axis that shows values up to a quantile, with a margin."""
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = np.quantile(values, (0, highest))
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return float(low - margin), float(high + margin)


class Curve(NamedTuple):
    """The losses of a run that is drawn with others."""

    name: str
    steps: Sequence[int]
    losses: Sequence[float]
    validation: Sequence[tuple[int, float]] = ()  # (step, loss on held-out pictures)


def _validation(name: str, marks: Sequence[tuple[int, float]], look: dict[str, Any]) -> Series:
    finite = np.array([mark for mark in marks if math.isfinite(mark[1])], float).reshape(-1, 2)
    return Series(name, finite[:, 0], finite[:, 1], look | DOTS)


def loss(
    steps: Sequence[int], losses: Sequence[float], *, validation: Sequence[tuple[int, float]] = (),
    title: str = "", total: int | None = None,
) -> Chart:  # fmt: skip
    """A chart of a run's loss, raw and smoothed.

    Args:
        losses: NaN, infinity and None leave a gap.
        validation: (step, loss on held-out pictures).
        total: steps of the whole run, which the axis then shows; None ends it at the last step.

    Raises:
        ValueError: not as many losses as steps.
    """
    if len(losses) != len(steps):
        raise ValueError(f"There are {len(steps)} steps and {len(losses)} losses. Give one for each step.")
    x, raw = np.array(steps, float), np.array(losses, float)
    raw[~np.isfinite(raw)] = np.nan
    average, judged = np.array(smooth(losses), float), _validation("validation", validation, {"color": JUDGED})
    counted = raw[np.isfinite(raw)]
    # A few extreme batches must not flatten the curve.
    low, high = _limits(np.concatenate([np.quantile(counted, (0.01, 0.99)), average]) if len(counted) else raw)
    series = [Series("each step", x, raw, FAINT), Series("smoothed", x, average, {"color": ACCENT})]
    status = f"step {steps[-1]}{f' of {total}' if total else ''}, loss {average[-1]:#.3g}" if len(x) else "no step yet"
    if len(judged.y):
        margin = 0.03 * np.ptp([low, high, *judged.y])
        low, high = min(low, judged.y.min() - margin), max(high, judged.y.max() + margin)
        series.append(judged)
        status += f", validation {judged.y[-1]:#.3g}"
    return Chart([Panel("loss", series, float(low), float(high))], title, status, total)


def losses(curves: Sequence[Curve]) -> Chart:
    """A chart of several runs' losses, smoothed alike, and of their validation losses where there are any."""
    half_life = max(1.0, max((len(curve.losses) for curve in curves), default=0) / 25)
    trained, judged = [], []
    for place, curve in enumerate(curves):
        look = {"color": COLOURS[place % len(COLOURS)], "linestyle": "--" if place >= len(COLOURS) else "-"}
        average = np.array(smooth(curve.losses, half_life), float)
        trained.append(Series(curve.name, np.array(curve.steps, float), average, look))
        judged.append(_validation(curve.name, curve.validation, look))
    panels = []
    for name, series in (("training loss, smoothed", trained), ("validation loss", judged)):
        values = np.concatenate([one.y for one in series] or [np.empty(0)])
        if len(values) or series is trained:
            panels.append(Panel(name, series, *_limits(values, 0.995)))  # a first loss, no average yet, may lie far off
    return Chart(panels)


# ── Sheets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def strength_labels(strengths: Sequence[float]) -> list[str]:
    """The names of a sheet's columns: the base, and the LoRA at each strength."""
    return ["base" if strength == 0 else f"strength {strength:g}" for strength in strengths]


def grid(
    rows: Sequence[Sequence[Image.Image | None]], *, row_labels: Sequence[str], column_labels: Sequence[str],
    path: Path | None = None,
) -> Image.Image:  # fmt: skip
    """Pictures on one white sheet with a label for each row and column; labels are wrapped or shrunk, never cut.

    Small pictures are enlarged by a whole factor until a cell has 128 pixels; large ones are reduced until the sheet is
    at most 2400 pixels wide.

    Args:
        rows: None leaves a grey cell.
        path: also write the sheet to this file, as PNG.

    Raises:
        ValueError: no pictures, or not as many as there are labels.
    """
    counts = [len(row) for row in rows]
    if not counts or not column_labels or counts != [len(column_labels)] * len(row_labels):
        raise ValueError(
            f"The rows have {counts} pictures, with labels for {len(row_labels)} rows of {len(column_labels)}. "
            "Give a label for each row and column, and None where a picture is missing."
        )
    sizes = [picture.size for row in rows for picture in row if picture] or [(SMALLEST, SMALLEST)]
    width, height = (max(sides) for sides in zip(*sizes, strict=True))

    def fitting(taken: float) -> float:
        room = (WIDEST - taken) / len(column_labels) / width
        return min(room, max(1, min(math.ceil(SMALLEST / min(width, height)), math.floor(room))))

    size = int(min(max(width * fitting(0) / 14, 16), 32))
    gap, font = size // 2, _font(size)
    label_width = min(15 * size, math.ceil(max(font.getlength(_plain(label)) for label in row_labels)))
    left, factor = label_width + 2 * gap, fitting(label_width + gap * (len(column_labels) + 2))
    cell = max(1, int(width * factor)), max(1, int(height * factor))
    lines = [_labels(["", *column_labels], cell[0], size, 0.5)]
    for label, row in zip(_labels(row_labels, label_width, size, 1, cell[1]), rows, strict=True):
        lines.append([label, *(_cell(picture, cell, factor) for picture in row)])
    heights = [max(image.height for image in line) for line in lines]
    sheet_size = left + (cell[0] + gap) * len(column_labels), sum(heights) + gap * (len(lines) + 1)
    sheet = Image.new("RGB", sheet_size, "white")
    top = gap
    for line, room in zip(lines, heights, strict=True):
        for place, image in enumerate(line):
            x = left + (place - 1) * (cell[0] + gap) if place else gap
            sheet.paste(image, (x, top + (room - image.height) // 2))
        top += room + gap
    if path is not None:
        with storage.write_file(Path(path)) as partial:
            sheet.save(partial, "PNG")
    return sheet


def _cell(picture: Image.Image | None, size: tuple[int, int], factor: float) -> Image.Image:
    """A picture in the middle of a white cell; a grey cell where there is none."""
    if picture is None:
        return Image.new("RGB", size, "#eeeeee")
    way = Image.Resampling.NEAREST if factor >= 1 and factor == int(factor) else Image.Resampling.LANCZOS
    shown = picture.convert("RGBA").resize([max(1, int(side * factor)) for side in picture.size], way)
    cell = Image.new("RGB", size, "white")
    cell.paste(shown, ((size[0] - shown.width) // 2, (size[1] - shown.height) // 2), shown)
    return cell


def _labels(texts: Sequence[str], width: int, size: int, align: float, height: float = math.inf) -> list[Image.Image]:
    """Pictures of texts, `width` pixels wide, all in the largest font up to `size` that breaks no word and keeps to
    `height`; where even a font of 10 pixels cannot, words break and pictures get higher."""
    texts = [_plain(text) for text in texts]
    for points in range(size, 9, -1):
        font, line = _font(points), math.ceil(points * 1.3)
        blocks = [_wrapped(text, font, width) for text in texts]
        whole = all(" ".join(block) == text for block, text in zip(blocks, texts, strict=True))
        if whole and all(len(block) * line <= height for block in blocks):
            break
    pictures = [Image.new("RGB", (width, len(block) * line), "white") for block in blocks]
    for picture, block in zip(pictures, blocks, strict=True):
        draw = ImageDraw.Draw(picture)
        for i, text in enumerate(block):
            draw.text((align * (width - font.getlength(text)), i * line), text, "#222222", font=font)
    return pictures


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Lines no wider than `width` pixels, broken between words, or inside a word that is wider than a line."""
    for letters in range(len(text), 1, -1):
        lines = textwrap.wrap(text, letters, break_on_hyphens=False)
        if all(font.getlength(line) <= width for line in lines):
            return lines
    return list(text.replace(" ", "")) or [""]


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has more scripts than Pillow's own font."""
    from matplotlib import font_manager

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def _plain(text: str) -> str:
    """A text in one line, without characters that XML refuses."""
    return " ".join(UNPRINTABLE.sub("�", text).split())
