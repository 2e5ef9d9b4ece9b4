"""Thumbnails, pages of them, and text for HTML: what the panels share."""

import io
from collections.abc import Callable, Sequence
from functools import lru_cache
from html import escape

import ipywidgets as widgets
from PIL import Image

from lorakit import dataset as datasets
from lorakit.dataset import Picture
from lorakit.plots import TONES

SIDE = 128  # pixels of a thumbnail
LABEL = {"description_width": "initial"}  # as wide as its text, and at the left


@lru_cache(2048)  # a dataset's, some 10 MB
def thumbnail(picture: Picture) -> bytes:
    """A picture at most SIDE pixels wide and high, as JPEG; one that cannot be opened any more is a grey square."""
    try:
        image = datasets.open_picture(picture)
    except (ValueError, OSError):
        image = Image.new("RGB", (SIDE, SIDE), "gray")
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return stream.getvalue()


def shown(picture: Picture) -> widgets.Image:
    """A thumbnail in a square of its own."""
    square = widgets.Layout(width=f"{SIDE}px", height=f"{SIDE}px", object_fit="contain", flex="0 0 auto")
    return widgets.Image(value=thumbnail(picture), format="jpeg", layout=square)


def button(text: str, act: Callable[[], None], style: str = "", tooltip: str = "") -> widgets.Button:
    """A button as wide as its text that does something."""
    made = widgets.Button(description=text, button_style=style, tooltip=tooltip)
    made.layout = widgets.Layout(width="auto", flex="0 0 auto")  # never narrower than its text
    made.on_click(lambda _: act())
    return made


def note(text: str, colour: str = "") -> str:
    """A line of HTML; colours are those that can be read on white and on black."""
    tone = TONES[colour]
    return f'<div style="color:{tone};line-height:1.3;white-space:pre-wrap">{escape(text)}</div>'


def bars(counts: Sequence[tuple[str, int]], of: int) -> str:
    """Names with bars beside them, as HTML.

    Args:
        of: the count whose bar is full.
    """
    rows = [
        f'<div style="display:flex;gap:8px;line-height:1.5"><span style="flex:0 0 180px;overflow:hidden;'
        f'text-overflow:ellipsis;white-space:nowrap" title="{escape(name)}">{escape(name)}</span>'
        f'<span style="flex:1;max-width:320px;align-self:center;height:10px"><span style="display:block;height:10px;'
        f'border-radius:2px;background:#4c8bf5;width:{count / max(of, 1):.1%}"></span></span>'
        f"<span>{count}</span></div>"
        for name, count in counts
    ]
    return "".join(rows)


def discard(widget: widgets.Widget) -> None:
    """Close a widget and all it is made of, which otherwise stays in kernel and page as long as they live."""
    for part in (*getattr(widget, "children", ()), getattr(widget, "layout", None), getattr(widget, "style", None)):
        if part is not None:
            discard(part)
    widget.close()


class Pages(widgets.VBox):
    """Things shown a page at a time; only those of the page that is seen are made.

    Args:
        make: makes the widget of a thing.
        most: things on a page.
        columns: wrap into rows (True), or one below the other.
    """

    def __init__(self, make: Callable[[object], widgets.Widget], most: int, wrap: bool = False):
        self.make, self.most, self.things, self.page = make, most, [], 0
        self.where = widgets.HTML()
        self.back, self.next = (
            button(text, lambda by=by: self.turn(by)) for text, by in (("‹ back", -1), ("next ›", 1))
        )
        flow = widgets.Layout(display="flex", flex_flow="row wrap" if wrap else "column", grid_gap="8px")
        self.seen = widgets.Box(layout=flow)
        line = widgets.HBox([self.back, self.where, self.next])
        line.layout = widgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="8px")
        super().__init__([line, self.seen])

    def show(self, things: Sequence, page: int = 0) -> None:
        """Show other things, or a page of them again."""
        self.things = list(things)
        pages = max(1, -(-len(self.things) // self.most))
        self.page = min(max(0, page), pages - 1)
        first = self.page * self.most
        here = self.things[first : first + self.most]
        gone, self.seen.children = self.seen.children, [self.make(thing) for thing in here]
        for widget in gone:
            discard(widget)
        place = f"{first + 1}–{first + len(here)} of {len(self.things)}, page {self.page + 1} of {pages}"
        self.back.disabled, self.next.disabled = self.page == 0, self.page == pages - 1
        self.where.value = note(place if here else "none")  # last: what it says is then to be seen

    def turn(self, by: int) -> None:
        self.show(self.things, self.page + by)
