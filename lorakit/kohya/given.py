"""Settings by sd-scripts' names, read as numbers, texts and switches; what is made of each is noted."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.kohya.tables import DEFAULTS

SECRET = re.compile("(hf|access|hub|face)_?token|api_?key|password|secret", re.IGNORECASE)


@dataclass
class Given:
    """The settings that were given.

    Attributes:
        used: those that were looked at.
        notes: for the user, in the order of `MATTERS`: what changes the result comes first.
    """

    settings: Mapping[str, Any]
    used: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def take(self, key: str, default: Any = None) -> Any:
        self.used.add(key)
        return self.settings.get(key, DEFAULTS.get(key, default))

    def note(self, key: str, text: str) -> None:
        """Note what becomes of a setting; its value is shown shortened, a secret not at all."""
        value = "…" if SECRET.search(key) else str(self.take(key))
        self.notes.append(f"{key}={value if len(value) <= 60 else value[:60] + '…'}: {text}")

    def number(self, key: str) -> float | None:
        """A number; None if it is not set, or is none, which is noted."""
        value = self.take(key)
        if value is None or value is False:
            return None
        try:
            number = float(value)
            if math.isfinite(number):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
        self.note(key, "left out, it is not a number")
        return DEFAULTS.get(key)

    def numbers(self, key: str) -> list[float]:
        """One or several numbers: a list, or a text with commas or spaces between them."""
        value = self.take(key)
        items = value if isinstance(value, list | tuple) else str(value).replace(",", " ").split()
        try:
            numbers = [float(item) for item in items] if value is not None else []
        except (TypeError, ValueError, OverflowError):
            numbers = [math.nan]
        if all(map(math.isfinite, numbers)):
            return numbers
        self.note(key, "left out, these are not numbers")
        return []

    def text(self, key: str) -> str | None:
        value = self.take(key)
        if value is None or isinstance(value, str):
            return value or None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if value:
            self.note(key, "left out, it is not a text")
        return None

    def flag(self, key: str) -> bool:
        value = self.take(key)
        return value.lower() in ("true", "1", "yes") if isinstance(value, str) else bool(value)

    @property
    def sdxl(self) -> bool:
        """Whether the settings say that the base is an SDXL."""
        return "sdxl" in str(self.take("script") or "") or self.flag("sdxl") or self.flag("sdxl_checkbox")
