"""What a program says, asked for by the values it must name, so that its sentences may be worded anew."""

import re
from collections.abc import Iterable

QUIET = {"say": lambda _: None, "progress": False}  # for calls that would print


def naming(*values: object) -> str:
    """A pattern for `pytest.raises(..., match=...)`: the message names all of these values, in any order.

    A value that begins or ends with a letter or digit is not found inside a longer word or number.
    """
    return "(?s)^" + "".join(f"(?=.*{_whole(str(value))})" for value in values)


def names(text: str, *values: object) -> bool:
    """Whether a text names all of these values, as `naming` finds them."""
    return re.search(naming(*values), text) is not None


def line(lines: Iterable[str], *values: object) -> str:
    """The first line that names all of these values; "" where none does."""
    return next((text for text in lines if names(text, *values)), "")


def _whole(value: str) -> str:
    before = r"(?<![\w])(?<!\d[.,])" if value[:1].isalnum() else ""
    after = r"(?![\w]|[.,]\d)" if value[-1:].isalnum() else ""
    return f"{before}{re.escape(value)}{after}"
