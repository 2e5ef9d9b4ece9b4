"""HTML pages: tables, pictures, and objects that show themselves as text, in a notebook, and as a page."""

import base64
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from lorakit import plots, storage

TONES = plots.TONES | {"doubtful": plots.TONES["warning"], "not measured": "#888888"}
STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em}"
    "@media(prefers-color-scheme:dark){body{background:#161616;color:#eee}}"
)


class Page:
    """A result that shows itself: `print` gives text, a notebook tables and pictures, `save` an HTML page and JSON."""

    @property
    def title(self) -> str:
        raise NotImplementedError

    def body(self) -> str:
        """The page's content, as HTML."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """The result for programs, ready for JSON; contains no path."""
        raise NotImplementedError

    def describe(self) -> str:
        """The result as text, for a terminal."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.describe()

    def _repr_html_(self) -> str:
        return f'<div style="max-width:900px">{self.body()}</div>'

    def html(self) -> str:
        """One page that contains its pictures, for light and dark colour schemes."""
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
            f"<body><h1>{escape(self.title)}</h1>{self.body()}</body></html>\n"
        )

    def save(self, folder: str | Path, name: str) -> tuple[Path, Path]:
        """Write NAME.html and NAME.json into a folder."""
        texts = {".html": self.html(), ".json": json.dumps(self.facts(), indent=2, ensure_ascii=False) + "\n"}
        files = [Path(folder) / f"{name}{suffix}" for suffix in texts]
        for file, text in zip(files, texts.values(), strict=True):
            with storage.write_file(file) as partial:
                partial.write_text(storage.printable(text), "utf-8")
        return files[0], files[1]


def text(value: Any, form: str = "g") -> str:
    """A value for a table's cell; a dash for None.

    Args:
        form: how numbers with a fraction are formatted.
    """
    if value is None:
        return "—"
    if isinstance(value, bool | dict | list | tuple):
        return json.dumps(value)
    return f"{value:{form}}" if isinstance(value, float) else str(value)


def table(rows: Iterable[Sequence[str]], *heads: str) -> str:
    """An HTML table; cells and heads are HTML already."""
    cell = 'style="padding:4px 8px;text-align:left;vertical-align:top"'
    head = "".join(f"<th {cell}>{name}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td {cell}>{value}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div style="overflow-x:auto"><table style="border-collapse:collapse"><tr>{head}</tr>{body}</table></div>'


def pictures(
    labels: Iterable[str], rows: Iterable[Sequence[Image.Image | None]], heads: Iterable[str], side: int = 128
) -> str:
    """A table of pictures.

    Args:
        labels: of the rows; HTML already.
        heads: of the columns; plain text.
        side: width of a picture in pixels.
    """
    cells = [[label, *(image(picture, side) for picture in row)] for label, row in zip(labels, rows, strict=True)]
    return table(cells, "", *map(escape, heads))


def image(picture: Image.Image | None, side: int = 128) -> str:
    """A picture as an HTML element; a dash where there is none."""
    if picture is None:
        return "—"
    return f'<img style="width:{side}px;display:block" alt="" src="{jpeg(picture, 2 * side)}">'


def jpeg(picture: Image.Image, most: int) -> str:
    """A picture as a data URI: JPEG of at most `most` pixels a side."""
    small, stream = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((most, most))
    small.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
