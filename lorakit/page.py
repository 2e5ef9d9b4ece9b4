"""Parts of HTML pages: style, tables, pictures."""

import base64
import io
from collections.abc import Sequence

from PIL import Image

from lorakit import plots


def jpeg(picture: Image.Image, most: int) -> str:
    """A picture as a data URI: JPEG of at most so many pixels a side."""
    small, stream = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((most, most))
    small.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


# ── The page ────────────────────────────────────────────────────────────────────────────────────────────────────────

TONES = plots.TONES | {"doubtful": plots.TONES["warning"], "not measured": "#888888"}
STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em}"
    "@media(prefers-color-scheme:dark){body{background:#161616;color:#eee}}"
)


def table(rows: Sequence[Sequence[str]], *heads: str) -> str:
    """An HTML table; cells are HTML already."""
    cell = 'style="padding:4px 8px;text-align:left;vertical-align:top"'
    head = "".join(f"<th {cell}>{name}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td {cell}>{value}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div style="overflow-x:auto"><table style="border-collapse:collapse"><tr>{head}</tr>{body}</table></div>'


def image(picture: Image.Image | None, side: int = 128) -> str:
    if picture is None:
        return "—"
    return f'<img style="width:{side}px;display:block" alt="" src="{jpeg(picture, 2 * side)}">'
