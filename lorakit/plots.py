"""What a run did, to look at: the loss as a figure and as a live SVG, pictures on a labelled sheet.

Nothing here touches pyplot, its open figures or a notebook's backend.
"""

import html
import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lorakit import storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCENT = "#2f7fe0"  # the smoothed loss: stands out from white pages and from dark ones
JUDGED = "#d9822b"  # the validation loss
TONES = {"good": "#2e9e5b", "warning": "#c77d00", "bad": "#d64545", "": "inherit"}  # legible on white and on black
COLOURS = (  # of runs side by side: each can be told from the others, on white and on black
    ACCENT, JUDGED, TONES["good"], TONES["bad"], "#8d6fd1", "#1b9aaa", "#b8860b", "#c2569b",
)  # fmt: skip
COLUMNS = 400  # across the SVG: of a longer run, each shows what lies within it
WIDEST = 2400  # pixels of a sheet
SMALLEST = 128  # pixels of a cell's shorter side
UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML 1.0 cannot hold


def smooth(losses: Sequence[float], half_life: float | None = None) -> list[float]:
    """Exponential moving average, without the usual pull towards zero at the start.

    Args:
        losses: NaN, infinity and None do not count.
        half_life: entries after which a loss weighs half; None takes a 25th of the length.

    Returns:
        As many averages; NaN where the loss does not count.

    Raises:
        ValueError: half_life is not above 0.

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


def _curves(steps, losses, half_life) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, float]:
    """Steps, raw and smoothed losses (NaN where there is none), and the lowest and highest loss worth showing."""
    if len(steps) != len(losses):
        raise ValueError(f"There are {len(steps)} steps and {len(losses)} losses. Give a loss for each step.")
    x, raw = np.array(steps, float), np.array(losses, float)
    raw[~np.isfinite(raw)] = np.nan
    average = np.array(smooth(losses, half_life), float)
    counted = ~np.isnan(raw)
    if not counted.any():
        return x, raw, average, 0.0, 1.0
    # A few batches far off would press the curve that matters flat.
    ends = [*np.quantile(raw[counted], (0.01, 0.99)), average[counted].min(), average[counted].max()]
    margin = (max(ends) - min(ends)) * 0.05 or abs(max(ends)) * 0.1 or 1.0
    return x, raw, average, float(min(ends) - margin), float(max(ends) + margin)


def loss(
    steps: Sequence[int], losses: Sequence[float], *, path: Path | None = None,
    learning_rates: Sequence[float] | None = None, half_life: float | None = None, title: str = "",
    validation: Sequence[tuple[int, float]] = (),
) -> "Figure":  # fmt: skip
    """A figure of the loss, raw and smoothed, which shows itself at the end of a notebook cell.

    Args:
        validation: (step, loss on held-out pictures), drawn beside.
        path: where to save it, too, as PNG.
        learning_rates: one for each step; drawn below.
        half_life: as in `smooth`.

    Raises:
        ValueError: not as many losses or learning rates as steps.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x, raw, average, low, high = _curves(steps, losses, half_life)
    if learning_rates is not None and len(learning_rates) != len(x):
        raise ValueError(f"There are {len(x)} steps and {len(learning_rates)} learning rates. Give one for each step.")
    with style.context("default"):  # a dark style set elsewhere is not meant for this figure
        figure = Figure(figsize=(8, 4 if learning_rates is None else 5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        panels = [4] if learning_rates is None else [4, 1]
        axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=panels)[:, 0]
        dots = "." if len(x) < 50 else ""  # one step makes no line
        axes[0].plot(x, raw, color="#555555", alpha=0.4, linewidth=0.8, marker=dots, label="each step")
        axes[0].plot(x, average, color=ACCENT, linewidth=2, marker=dots, label="smoothed")
        axes[0].margins(x=0.02)
        if judged := _finite(validation):
            axes[0].plot(*zip(*judged, strict=True), color=JUDGED, linewidth=2, marker="o", label="validation")
            low, high = _around(low, high, judged)
        axes[0].set_ylim(low, high)
        axes[0].set_ylabel("loss")
        axes[0].legend(loc="upper right", framealpha=0.85, edgecolor="none")
        if title:
            lines = textwrap.wrap(_plain(title), 80, max_lines=3, placeholder=" …")
            axes[0].set_title("\n".join(lines), loc="left", parse_math=False)
        if learning_rates is not None:
            axes[1].plot(x, np.array(learning_rates, float), color="#555555", linewidth=1.5)
            axes[1].set_ylim(bottom=0)
            axes[1].set_ylabel("learning rate")
            axes[1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        for panel in axes:
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
    # Notebooks know how to show a figure only after somebody imported pyplot there.
    figure._repr_png_ = lambda: _png(figure)
    if path is not None:
        with storage.write_file(Path(path)) as partial:
            partial.write_bytes(_png(figure))
    return figure


def _finite(validation: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, loss) for step, loss in validation if math.isfinite(loss)]


def _around(low: float, high: float, judged: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Limits that show validation losses as well."""
    least, most = min(loss for _, loss in judged), max(loss for _, loss in judged)
    margin = (max(high, most) - min(low, least)) * 0.03
    return (low if low <= least else least - margin), (high if high >= most else most + margin)


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box for a letter is no reason for alarm
        figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def loss_svg(
    steps: Sequence[int], losses: Sequence[float], *, width: int = 640, height: int = 240, total: int | None = None,
    half_life: float | None = None, title: str = "", validation: Sequence[tuple[int, float]] = (),
) -> str:  # fmt: skip
    """The loss, raw and smoothed, as one self-contained `<svg>`, drawn in milliseconds for a page of any colour.

    Args:
        width, height: pixels.
        total: steps of the whole run, which the axis then shows; None ends it at the last step.
        half_life: as in `smooth`.
        validation: (step, loss on held-out pictures), drawn beside.

    Raises:
        ValueError: not as many losses as steps.
    """
    x, raw, average, low, high = _curves(steps, losses, half_life)
    if judged := _finite(validation):
        low, high = _around(low, high, judged)
    now = average[-1] if len(x) else math.nan
    first, last = (x.min(), max(x.max(), total or 0)) if len(x) else (0, total or 1)
    last = max(last, first + 1)
    across = _ticks(first, last, max(2, width // 90), smallest=1)
    up = _ticks(low, high, max(2, height // 30))
    left, right = 10 + 7 * max(len(label) for _, label in up), width - 6 - 4 * max(len(label) for _, label in across)
    top, bottom = 28, height - 40

    def at_x(step):
        return left + (step - first) * ((right - left) / (last - first))

    def at_y(value):
        return bottom - (np.clip(value, low, high) - low) * ((bottom - top) / (high - low))

    columns = ((x - first) * ((min(COLUMNS, right - left) - 1) / (last - first))).astype(int)
    starts = np.flatnonzero(np.diff(columns, prepend=-1))
    noise_x, noise = x, raw
    if len(starts) < len(x) / 2:
        # The lowest and the highest loss of each column keep the noise's true width.
        x, noise_x = x[starts], np.repeat(x[starts], 2)
        noise = np.stack([np.fmin.reduceat(raw, starts), np.fmax.reduceat(raw, starts)], 1).ravel()
        average = (np.fmin.reduceat(average, starts) + np.fmax.reduceat(average, starts)) / 2

    said = f"step {steps[-1]}{f' of {total}' if total else ''}, loss {now:#.3g}" if len(x) else "no step yet"
    latest = f", validation {judged[-1][1]:#.3g}" if judged else ""
    coloured = f'<tspan fill="{JUDGED}">{latest}</tspan>' if judged else ""
    fits = max(0, (right - left) // 8 - len(said + latest))  # letters of the title: they are about 8 pixels wide
    title = _plain(title)
    head = html.escape(title if len(title) <= fits else title[:fits] + "…")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img" aria-label="{html.escape(title)} {said}{latest}" style="max-width:100%;height:auto"'
        f' fill="currentColor" font-family="system-ui,sans-serif" font-size="12">',
        f'<text x="{left}" y="16" font-weight="600">{head}</text>',
        f'<text x="{right}" y="16" text-anchor="end">{said}{coloured}</text>',
        f'<text x="{(left + right) / 2:.0f}" y="{height - 6}" text-anchor="middle" opacity=".75">step</text>',
    ]
    marks = [(at_x(step), label) for step, label in across], [(at_y(value), label) for value, label in up]
    parts += _frame(*marks, left, right, bottom)
    parts.append('<g fill="none" stroke-linecap="round" stroke-linejoin="round">')
    parts += ['<g stroke="currentColor" opacity=".35">', *_polylines(at_x(noise_x), at_y(noise)), "</g>"]
    parts += [f'<g stroke="{ACCENT}" stroke-width="2">', *_polylines(at_x(x), at_y(average)), "</g>"]
    if judged:
        places = np.array(judged, float)
        across, up = at_x(places[:, 0]), at_y(places[:, 1])
        parts += [f'<g stroke="{JUDGED}" stroke-width="2">', *_polylines(across, up)]
        parts += [f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="2"/>' for cx, cy in zip(across, up, strict=True)] + ["</g>"]
    return "".join([*parts, "</g></svg>"])


def _frame(
    across: Sequence[tuple[float, str]], up: Sequence[tuple[float, str]], left: int, right: int, bottom: int
) -> Iterator[str]:  # fmt: skip
    """The axes of an SVG: where which label stands, in pixels."""
    for x, label in across:
        yield f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" opacity=".75">{label}</text>'
    for y, label in up:
        yield f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" opacity=".75">{label}</text>'
        yield f'<path d="M{left} {y:.1f}H{right}" stroke="currentColor" opacity=".15"/>'
    yield f'<path d="M{left} {bottom}H{right}" stroke="currentColor" opacity=".6"/>'


def _polylines(x: np.ndarray, y: np.ndarray) -> Iterator[str]:
    """A line for each stretch without NaN; a lone point becomes a dot."""
    breaks = np.flatnonzero(np.diff(np.isnan(y))) + 1
    for x, y in zip(np.split(x, breaks), np.split(y, breaks), strict=True):  # noqa: B020 - pieces of the same
        if len(y) and not math.isnan(y[0]):
            points = [f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]
            yield f'<polyline points="{" ".join(points * 2 if len(points) == 1 else points)}"/>'


class Curve(NamedTuple):
    """The losses of a run that is drawn beside others."""

    name: str
    steps: Sequence[int]
    losses: Sequence[float]
    validation: Sequence[tuple[int, float]] = ()  # (step, loss on held-out pictures)


class _Panel(NamedTuple):
    title: str
    lines: list[tuple[np.ndarray, np.ndarray]]  # steps and values of each curve
    low: float
    high: float


def _panels(curves: Sequence[Curve]) -> list[_Panel]:
    """What is drawn of several runs: their losses, smoothed alike, and where one was validated, those below."""
    half_life = max(1.0, max((len(curve.losses) for curve in curves), default=0) / 25)
    trained = [(np.array(curve.steps, float), np.array(smooth(curve.losses, half_life), float)) for curve in curves]
    judged = [np.array(_finite(curve.validation), float).reshape(-1, 2) for curve in curves]
    panels = [("training loss, smoothed", trained), ("validation loss", [(own[:, 0], own[:, 1]) for own in judged])]
    return [
        _Panel(title, lines, *_limits(lines)) for title, lines in panels if lines is trained or any(map(len, judged))
    ]


def _limits(lines: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """The lowest and highest value worth showing."""
    values = np.concatenate([y[np.isfinite(y)] for _, y in lines] or [np.empty(0)])
    if not len(values):
        return 0.0, 1.0
    low, high = np.quantile(values, (0, 0.995))  # a curve's first loss stands alone and may lie far off
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return float(low - margin), float(high + margin)


def losses(curves: Sequence[Curve], *, path: Path | None = None) -> "Figure":
    """A figure of several runs' losses, smoothed alike, and below of their validation losses where there are some.

    Args:
        path: where to save it, too, as PNG.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(curves)
    with style.context("default"):
        figure = Figure(figsize=(8, 1 + 3 * len(panels)), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, panel in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True):
            for number, (curve, (x, y)) in enumerate(zip(curves, panel.lines, strict=True)):
                dots = "o" if panel.title.startswith("validation") else "." if len(x) < 50 else ""
                name = textwrap.shorten(_plain(curve.name), 60, placeholder=" …")
                axes.plot(
                    x, y, color=COLOURS[number % len(COLOURS)], linestyle="--" if number >= len(COLOURS) else "-",
                    linewidth=2, marker=dots, markersize=4, label=f" {name}" if name.startswith("_") else name,
                )  # fmt: skip
            axes.set_ylim(panel.low, panel.high)
            axes.set_ylabel(panel.title)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("step")
        if curves:
            for text in figure.axes[0].legend(loc="upper right", framealpha=0.85, edgecolor="none").get_texts():
                text.set_parse_math(False)  # a name may hold a $
    figure._repr_png_ = lambda: _png(figure)
    if path is not None:
        with storage.write_file(Path(path)) as partial:
            partial.write_bytes(_png(figure))
    return figure


def losses_svg(curves: Sequence[Curve], *, width: int = 640, height: int = 200) -> str:
    """What `losses` draws as one self-contained `<svg>`, for a page of any colour.

    Args:
        width, height: pixels; of each of the two panels.
    """
    panels = _panels(curves)
    steps = [curve.steps[place] for curve in curves for place in (0, -1) if len(curve.steps)] or [0]
    first, last = min(steps), max(*steps, min(steps) + 1)
    across = _ticks(first, last, max(2, width // 90), smallest=1)
    right, tall = width - 6 - 4 * max(len(label) for _, label in across), len(panels) * height + 18 * len(curves) + 6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall}" width="{width}" height="{tall}"'
        f' role="img" aria-label="losses of {len(curves)} runs" style="max-width:100%;height:auto"'
        f' fill="currentColor" font-family="system-ui,sans-serif" font-size="12">'
    ]
    ups = [_ticks(panel.low, panel.high, max(2, height // 30)) for panel in panels]
    left = 10 + 7 * max(len(label) for up in ups for _, label in up)

    def at_x(step):
        return left + (step - first) * ((right - left) / (last - first))

    for number, (panel, up) in enumerate(zip(panels, ups, strict=True)):
        top, bottom = number * height + 28, (number + 1) * height - 30

        def at_y(value, panel=panel, top=top, bottom=bottom):
            return bottom - (np.clip(value, panel.low, panel.high) - panel.low) * (
                (bottom - top) / (panel.high - panel.low)
            )

        parts.append(f'<text x="{left}" y="{top - 12}" font-weight="600">{panel.title}</text>')
        marks = [(at_x(step), label) for step, label in across], [(at_y(value), label) for value, label in up]
        parts += [*_frame(*marks, left, right, bottom), '<g fill="none" stroke-width="2" stroke-linejoin="round">']
        for place, (x, y) in enumerate(panel.lines):
            thin = slice(None, None, max(1, len(x) // COLUMNS))
            cx, cy = at_x(x[thin]), at_y(y[thin])
            dots = [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2"/>' for a, b in zip(cx, cy, strict=True)] * (number > 0)
            parts += [f"<g {_stroke(place)}>", *_polylines(cx, cy), *dots, "</g>"]
        parts.append("</g>")
    for place, curve in enumerate(curves):
        y, name = len(panels) * height + 18 * place + 12, html.escape(_plain(curve.name))
        parts.append(f'<path d="M10 {y - 4}h24" stroke-width="3" {_stroke(place)}/><text x="42" y="{y}">{name}</text>')
    return "".join([*parts, "</svg>"])


def _stroke(place: int) -> str:
    """The colour of a run's curve; from the ninth on they are dashed."""
    return f'stroke="{COLOURS[place % len(COLOURS)]}"' + ' stroke-dasharray="6 4"' * (place >= len(COLOURS))


def _ticks(low: float, high: float, about: int, smallest: float = 0.0) -> list[tuple[float, str]]:
    """About so many round numbers from low to high, at least one, and how to write them."""
    rough = max((high - low) / about, smallest)
    power = math.floor(math.log10(rough))
    step = next(m * 10.0**power for m in (1, 2, 5, 10) if m * 10.0**power >= rough * 0.999)
    numbers = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)] or [low]
    decimals = max(0, -math.floor(math.log10(step)))
    return [(n, f"{n:.{decimals}f}" if decimals < 6 and abs(n) < 1e7 else f"{n:.3g}") for n in numbers]


def grid(
    rows: Sequence[Sequence[Image.Image | None]], *, row_labels: Sequence[str], column_labels: Sequence[str],
    path: Path | None = None, scale: float | None = None, title: str = "",
) -> Image.Image:  # fmt: skip
    """Pictures on one white sheet, a label for each row and each column. Labels are wrapped or shrunk, never cut.

    Args:
        rows: pictures; None leaves a grey cell.
        path: where to save the sheet, too, as PNG.
        scale: how much larger pictures are shown. None enlarges small ones by a whole factor until a cell has 128
            pixels, and shrinks large ones until the sheet is at most 2400 wide.

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
        return scale or min(room, max(1, min(math.ceil(SMALLEST / min(width, height)), math.floor(room))))

    size = int(min(max(width * fitting(0) / 14, 16), 32))
    gap = size // 2
    font = _font(size)
    longest = max(font.getlength(_printable(label, font)) for label in row_labels)
    beside_width = min(15 * size, math.ceil(longest))
    left, factor = beside_width + 2 * gap, fitting(beside_width + gap * (len(column_labels) + 2))
    cell_width, cell_height = max(1, int(width * factor)), max(1, int(height * factor))
    sheet_width = left + (cell_width + gap) * len(column_labels)

    head = _labels([title] if title else [], sheet_width - 2 * gap, size + 4, 0)
    above = _labels(column_labels, cell_width, size, 0.5)
    beside = _labels(row_labels, beside_width, size, 1, cell_height)
    top = gap + sum(label.height + gap // 2 for label in head) + max(label.height for label in above) + gap // 2
    heights = [max(cell_height, label.height) for label in beside]
    sheet = Image.new("RGB", (sheet_width, top + sum(heights) + gap * len(rows)), "white")
    for label in head:
        sheet.paste(label, (gap, gap))
    for i, label in enumerate(above):
        sheet.paste(label, (left + i * (cell_width + gap), top - gap // 2 - label.height))
    way = Image.Resampling.NEAREST if factor >= 1 and factor == int(factor) else Image.Resampling.LANCZOS
    for row, label, room in zip(rows, beside, heights, strict=True):
        sheet.paste(label, (gap, top + (room - label.height) // 2))
        for i, picture in enumerate(row):
            x, y = left + i * (cell_width + gap), top + (room - cell_height) // 2
            if picture is None:
                sheet.paste("#eeeeee", (x, y, x + cell_width, y + cell_height))
                continue
            shown = picture.convert("RGBA").resize([max(1, int(side * factor)) for side in picture.size], way)
            sheet.paste(shown, (x + (cell_width - shown.width) // 2, y + (cell_height - shown.height) // 2), shown)
        top += room + gap
    if path is not None:
        with storage.write_file(Path(path)) as partial:
            sheet.save(partial, "PNG")
    return sheet


def _labels(texts: Sequence[str], width: int, size: int, align: float, height: float = math.inf) -> list[Image.Image]:
    """Pictures of texts, `width` pixels wide, all in the largest font up to `size` that breaks no word and keeps to
    `height`; where even a font of 10 pixels cannot, words break and pictures get higher."""
    texts = [_printable(text, _font(size)) for text in texts]
    for size in range(size, 9, -1):  # noqa: B020 - down from the size given
        font, line = _font(size), math.ceil(size * 1.3)
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


def _wrapped(text: str, font, width: int) -> list[str]:
    """Lines no wider than `width` pixels, broken between words, or inside a word that is too wide alone."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
        while len(lines[-1]) > 1 and font.getlength(lines[-1]) > width:
            n = next(n for n in range(1, len(lines[-1])) if font.getlength(lines[-1][: n + 1]) > width)
            lines[-1:] = [lines[-1][:n], lines[-1][n:]]
    return lines


@lru_cache
def _font(size: int):
    """Matplotlib's DejaVu Sans, which knows more scripts than Pillow's own font; else that, if need be as a bitmap."""
    import matplotlib

    with suppress(ImportError, OSError):
        return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)
    with suppress(ImportError, OSError, TypeError):  # TypeError: Pillow before 10.1
        return ImageFont.load_default(size)
    return ImageFont.load_default()


def _plain(text: str) -> str:
    return " ".join(UNPRINTABLE.sub("�", text).split())


def _printable(text: str, font) -> str:
    bitmap = isinstance(font, ImageFont.ImageFont)  # such a font raises on letters beyond Latin-1
    return _plain(text).encode("latin-1", "replace").decode("latin-1") if bitmap else _plain(text)
