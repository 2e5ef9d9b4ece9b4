"""Layouts, HTML and small widgets that the panels share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import ipywidgets as widgets

from lorakit import dataset as datasets
from lorakit.dataset import Picture
from lorakit.plots import TONES

SIDE = 128  # pixels of a thumbnail
Kinds = type[Exception] | tuple[type[Exception], ...]
LABEL = {"description_width": "initial"}  # as wide as its text

# ── Text ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def line(text: str, style: str = "") -> str:
    """A text as HTML, below the one before."""
    return f'<div style="line-height:1.3;{style}">{escape(text)}</div>'


def note(text: str, tone: str = "") -> str:
    """A message as HTML, in a colour that is legible on white and on black."""
    return line(text, f"color:{TONES[tone]};white-space:pre-wrap")


def explain(error: BaseException) -> str:
    """An error as a message; the type is named only where lorakit did not expect the error."""
    if "OutOfMemory" in type(error).__name__:
        return "The card has too little free memory: make smaller pictures, or stop other notebooks that use the card."
    expected = isinstance(error, ValueError | OSError | FloatingPointError | ImportError)
    return str(error) if expected and str(error) else f"{type(error).__name__}: {error}"


@contextmanager
def reporting(message: widgets.HTML, kinds: Kinds = (ValueError, OSError)) -> Iterator[None]:
    """Show errors of these kinds in a widget instead of raising them."""
    try:
        yield
    except kinds as error:
        message.value = note(explain(error), "bad")


def span(seconds: float) -> str:
    """A duration in words: 45 s, 12 min, 1 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


# ── Widgets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def button(text: str, act: Callable[[], Any], style: str = "", tooltip: str = "") -> widgets.Button:
    """A button as wide as its text that calls a function."""
    layout = widgets.Layout(width="auto", flex="0 0 auto")  # never narrower than its text
    widget = widgets.Button(description=text, button_style=style, tooltip=tooltip, layout=layout)
    widget.on_click(lambda _: act())
    return widget


def on_change(act: Callable[[], Any], *fields: widgets.Widget) -> None:
    """Call a function whenever one of the fields has a new value."""
    for field in fields:
        field.observe(lambda _: act(), "value")


def across(*children: widgets.Widget) -> widgets.Box:
    """Widgets next to each other, wrapped where there is no room."""
    # Each row has its own layout: a second page on the same kernel cannot show one that the first page has made.
    layout = widgets.Layout(display="flex", flex_flow="row wrap", align_items="center", grid_gap="8px")
    return widgets.Box(children, layout=layout)


def above(text: str, field: widgets.Widget) -> widgets.VBox:
    """A field below its name, which is never cut off."""
    name = widgets.HTML(line(text, "font-size:12px;opacity:.8"), layout=widgets.Layout(margin="0"))
    field.layout.width, field.layout.margin = "auto", "0"
    return widgets.VBox([name, field], layout=widgets.Layout(min_width="0px", max_width="900px"))


def columns(fields: Sequence[widgets.Widget], least: int, most: int) -> widgets.Box:
    """Fields in as many columns, each at least `least` pixels wide, as fit into `most` pixels."""
    template = f"repeat(auto-fit, minmax({least}px, 1fr))"
    layout = widgets.Layout(display="grid", grid_template_columns=template, grid_gap="8px", max_width=f"{most}px")
    return widgets.Box(fields, layout=layout)


def thumbnail(picture: Picture) -> widgets.Image:
    """A picture in a square of SIDE pixels."""
    square = widgets.Layout(width=f"{SIDE}px", height=f"{SIDE}px", object_fit="contain", flex="0 0 auto")
    return widgets.Image(value=datasets.thumbnail(picture), format="jpeg", layout=square)


def discard(widget: widgets.Widget) -> None:
    """Close a widget and its parts, which otherwise stay in the kernel's memory and in the page's."""
    for part in (*getattr(widget, "children", ()), getattr(widget, "layout", None), getattr(widget, "style", None)):
        if part is not None:
            discard(part)
    widget.close()


class Pages(widgets.VBox):
    """Items shown a page at a time; only the widgets of the visible page exist.

    Args:
        make: makes the widget of an item.
        most: items on a page.
        wrap: several items in a row; otherwise each below the one before.
    """

    def __init__(self, make: Callable[[Any], widgets.Widget], most: int, wrap: bool = False):
        self.make, self.most, self.page = make, most, 0
        self.items: list[Any] = []
        self.position = widgets.HTML()
        self.back, self.next = button("‹ back", lambda: self.turn(-1)), button("next ›", lambda: self.turn(1))
        flow = widgets.Layout(display="flex", flex_flow="row wrap" if wrap else "column", grid_gap="8px")
        self.visible = widgets.Box(layout=flow)
        super().__init__([across(self.back, self.position, self.next), self.visible])

    def show(self, items: Sequence[Any], page: int = 0) -> None:
        """Show a page of other items, or of the same ones again."""
        self.items = list(items)
        pages = max(1, -(-len(self.items) // self.most))
        self.page = min(max(0, page), pages - 1)
        first = self.page * self.most
        shown = self.items[first : first + self.most]
        before, self.visible.children = self.visible.children, [self.make(item) for item in shown]
        for widget in before:
            discard(widget)
        self.back.disabled, self.next.disabled = self.page == 0, self.page == pages - 1
        text = f"{first + 1}–{first + len(shown)} of {len(self.items)}, page {self.page + 1} of {pages}"
        self.position.value = note(text if shown else "none")  # last, because browser tests wait for it

    def turn(self, by: int) -> None:
        self.show(self.items, self.page + by)
