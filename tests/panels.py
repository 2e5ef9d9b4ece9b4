"""What the HTML of a panel says, and in which tone, without its wording."""

import re
from html import unescape

from lorakit.plots import TONES


def words(html: str) -> str:
    """The text of a widget's HTML."""
    return unescape(re.sub("<[^>]*>", " ", html))


def tone(html: str) -> str | None:
    """The tone of the first line of a widget's HTML: "good", "warning", "bad" or ""; None without a line."""
    colour = re.search("color:([^;]+)", html)
    return colour and {colour: name for name, colour in TONES.items()}[colour[1]]
