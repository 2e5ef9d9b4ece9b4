"""The result of a check of pictures or captions: findings and figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lorakit import storage
from lorakit.dataset.folder import Dataset
from lorakit.dataset.gallery import Note, gallery, text_lines

Severity = Literal["serious", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("serious", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """Advice about pictures, or about the whole set."""

    kind: str  # file, resolution, crop, blur, upscaled, jpeg, exposure, subject, duplicate, trigger, too_long, …
    severity: Severity
    message: str  # the problem, with its value, and what to do
    pictures: tuple[str, ...] = ()  # names: paths relative to the dataset's root; () for the set


@dataclass(frozen=True, repr=False)
class Report:
    """Findings about a dataset, with the figures behind them. A notebook shows it with thumbnails.

    Attributes:
        summary: lines of text about the whole set.
        figures: name → value that JSON can hold.
        measured: of `check_quality`, a `Measured` for each picture that can be opened.
    """

    summary: tuple[str, ...]
    findings: tuple[Finding, ...]
    figures: dict[str, Any]
    dataset: Dataset | None = None
    measured: tuple[Any, ...] = field(default=(), compare=False)

    def facts(self) -> dict[str, Any]:
        """The report for JSON: its figures, and under "findings" an entry for each picture of each finding."""
        entries = [
            {"picture": name, "kind": finding.kind, "severity": finding.severity, "message": finding.message}
            for finding in self.findings for name in finding.pictures or (None,)
        ]  # fmt: skip
        return self.figures | {"findings": entries}

    def describe(self, most: int = 8) -> str:
        """The report as text, the most serious findings first, and at most so many of a kind."""
        lines = [*self.summary, *(text for _, text in self._lines(self.findings, most))]
        return storage.printable("\n".join(lines if self.findings else [*lines, "no problems"]))

    def _lines(self, findings: Sequence[Finding], most: int) -> list[Note]:
        groups: dict[tuple[Severity, str], list[str]] = defaultdict(list)
        for finding in sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)):
            names = ", ".join(finding.pictures[:5]) or "the set"
            names += f" and {len(finding.pictures) - 5} more" if len(finding.pictures) > 5 else ""
            groups[finding.severity, finding.kind].append(f"  {names}: {finding.message}")
        lines: list[Note] = []
        for (severity, kind), texts in groups.items():
            more = [f"  … and {len(texts) - most} more"] * (len(texts) > most)
            lines += [(severity, text) for text in (f"{severity}: {kind} × {len(texts)}", *texts[:most], *more)]
        return lines

    def _repr_html_(self) -> str:
        by_name = self.dataset.by_name if self.dataset else {}
        notes: dict[str, list[Note]] = defaultdict(list)
        for finding in sorted(self.findings, key=lambda finding: SEVERITIES.index(finding.severity)):
            for name in finding.pictures:
                notes[name].append((finding.severity, f"{finding.kind}: {finding.message}"))
        cards = [(by_name[name], name, of_picture) for name, of_picture in notes.items() if name in by_name]
        others = [finding for finding in self.findings if not by_name.keys() & set(finding.pictures)]
        lines = [*(("info", line) for line in self.summary), *self._lines(others, 8)]
        return storage.printable(text_lines(lines) + (gallery(cards) if cards else ""))

    def __repr__(self) -> str:
        return self.describe()
