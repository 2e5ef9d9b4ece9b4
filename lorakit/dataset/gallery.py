"""Pictures with notes as HTML, for notebooks."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

from lorakit import storage
from lorakit.dataset.picture import Picture, thumbnail

MOST = 24  # thumbnails
SIDE = 128  # pixels of a thumbnail
TONES = {"serious": "#d64545", "warning": "#c77d00", "info": "inherit"}  # legible on white and on black
CARD = f"width:{SIDE}px;font-size:11px;line-height:1.3;overflow-wrap:anywhere"
Note = tuple[str, str]  # severity, text


def text_lines(notes: Iterable[Note]) -> str:
    """Texts below each other, as HTML, in the colours of their severity."""
    style = "white-space:pre-wrap;line-height:1.3"
    return "".join(f'<div style="{style};color:{TONES[tone]}">{escape(text)}</div>' for tone, text in notes)


def gallery(cards: Sequence[tuple[Picture, str, Sequence[Note]]]) -> str:
    """The first pictures as thumbnails, each with its name and notes, as HTML.

    Args:
        cards: picture, its name, notes about it.
    """
    shown = cards[:MOST]
    with storage.thread_pool() as pool:
        images = [base64.b64encode(jpeg).decode() for jpeg in pool.map(thumbnail, [card[0] for card in shown])]
    parts = [
        f'<div style="{CARD}" title="{escape(name)}"><img src="data:image/jpeg;base64,{image}" alt="" style="display:'
        f'block;width:{SIDE}px;height:{SIDE}px;object-fit:contain"><b>{escape(name.rpartition("/")[2])}</b>'
        f"{text_lines((tone, text if len(text) < 160 else f'{text[:158]} …') for tone, text in notes)}</div>"
        for (_, name, notes), image in zip(shown, images, strict=True)
    ]
    more = text_lines([("info", f"… and {len(cards) - MOST} more pictures")] * (len(cards) > MOST))
    return f'<div style="display:flex;flex-wrap:wrap;gap:8px">{"".join(parts)}</div>{more}'
