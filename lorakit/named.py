"""Bases that people train on, by name: where they are, how they were trained, and which settings are usual for them.

The facts are in families/named.json with their sources. What no public source says is left out.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FAMILY = {"sd15": "sd15", "sd21": "sd2", "sd21-base": "sd2", "sdxl": "sdxl"}  # configs that lorakit ships → family


@dataclass(frozen=True)
class Usual:
    """Settings that another trainer uses for a family."""

    source: str
    page: str  # its address
    settings: dict[str, Any]  # of `Config`


@dataclass(frozen=True)
class NamedBase:
    """A base with a name."""

    name: str
    title: str
    reference: str  # as `base.open` takes it: a hub id, or a file on the hub
    configs: str  # a key of FAMILY
    sources: Sequence[str]  # addresses that the facts are from
    settings: dict[str, Any] = field(default_factory=dict)  # of `Config`, which the base needs
    prompt: str = "{}"  # a prompt with the quality tags that the base knows; {} stands for the rest
    tag_order: Sequence[str] = ()  # kinds of tags in the order of the base's captions
    licence: str | None = None
    megabytes: int | None = None  # to fetch in half precision
    usual: Usual | None = None

    @property
    def family(self) -> str:
        return FAMILY[self.configs]

    def facts(self) -> dict[str, str | None]:
        """What a user wants to know before a download, by label."""
        facts = {
            "name": self.name, "base": self.title, "reference": self.reference, "family": self.family,
            "settings": listed(self.settings), "tags in order": ", ".join(self.tag_order),
            "prompts": self.prompt if self.prompt != "{}" else None, "licence": self.licence,
            "to fetch": f"{self.megabytes:,} MB" if self.megabytes else None, "sources": ", ".join(self.sources),
        }  # fmt: skip
        usual = self.usual and {self.usual.source: f"{listed(self.usual.settings)} ({self.usual.page})"}
        return facts | (usual or {})


def listed(settings: dict[str, Any]) -> str:
    """Settings in a line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _read() -> Iterator[NamedBase]:
    table = json.loads((Path(__file__).parent / "families" / "named.json").read_text("utf-8"))
    usual = {family: Usual(**facts) for family, facts in table["usual"].items()}
    for name, facts in table["bases"].items():
        yield NamedBase(name, usual=usual.get(FAMILY[facts["configs"]]), **facts)


NAMED = {base.name: base for base in _read()}
OF_FAMILY = {base.family: base for base in reversed(NAMED.values())}  # the first of each family


def find(base: str) -> NamedBase | None:
    """The named base with this name, family or reference."""
    by_reference = {known.reference: known for known in NAMED.values()}
    return NAMED.get(base) or OF_FAMILY.get(base) or by_reference.get(base)


def tag_order(words: Sequence[str]) -> Sequence[str]:
    """The order of tags of a base that is named, or kinds of tags as they are given.

    Raises:
        ValueError: nothing is given, or no order is known for the base.
    """
    base = find(words[0]) if words else None
    if words and not base:
        return words
    if base and base.tag_order:
        return base.tag_order
    bases = ", ".join(known.name for known in NAMED.values() if known.tag_order)
    raise ValueError(
        f"No order of tags is known for {base.title if base else 'nothing'}: name {bases}, or kinds of tags."
    )
