"""Captions in a paged grid, edited by hand or many at once, seen before it is done, and undone."""

from collections import Counter
from html import escape
from pathlib import Path

import ipywidgets as widgets

from lorakit import dataset as datasets
from lorakit.dataset import Dataset
from lorakit.widgets.parts import LABEL, Pages, bars, button, note, shown

PAGE = 8  # captions on a page
FIELD = {"width": "auto", "flex": "1 1 150px", "max_width": "260px"}
WIDE = {"width": "auto", "max_width": "900px", "margin": "2px 0"}


class Captions(widgets.VBox):
    """A panel for the captions of a dataset. `captions` holds them as they are now, written or not.

    Args:
        dataset: from `dataset.scan`.
        trigger: the word that calls the LoRA up, for the form and the filter.
        into: folder that gets the caption files; None writes beside the pictures.
    """

    def __init__(self, dataset: Dataset, trigger: str = "", into: Path | None = None):
        self.dataset, self.trigger, self.into = dataset, trigger, into
        self.pictures = dict(zip(datasets.captions_of(dataset), dataset.pictures, strict=True))
        self.written = datasets.captions_of(dataset)
        self.captions = dict(self.written)
        self.planned: dict[str, str] | None = None
        self.pages = Pages(self._row, PAGE)
        self.filter = widgets.Dropdown(
            options=["all", "without caption", "without trigger", "edited", "the same as another"], description="show"
        )
        self.search = widgets.Text(placeholder="only with this text", continuous_update=False)
        self.search.layout = widgets.Layout(**FIELD)
        self.edit = widgets.Dropdown(options=list(EDITS), description="edit all")
        for choice in (self.filter, self.edit):
            choice.style, choice.layout = LABEL, widgets.Layout(width="240px")
        self.first, self.second = (widgets.Text(layout=widgets.Layout(**FIELD)) for _ in range(2))
        self.regex = widgets.Checkbox(description="pattern", indent=False, layout=widgets.Layout(width="90px"))
        self.preview, self.status, self.frequent = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.apply = button("Do it", self._apply, "primary")
        for field in (self.filter, self.search):
            field.observe(lambda _: self.show(), "value")
        self.edit.observe(lambda _: self._ask(), "value")
        row = widgets.Layout(display="flex", flex_flow="row wrap", align_items="center", grid_gap="8px")
        fields = [self.edit, self.first, self.second, self.regex, button("Preview", self._preview), self.apply]
        finish = [button("Save", self.save, "success"), button("Undo the last save", self.undo), self.status]
        super().__init__([
            widgets.Box([self.filter, self.search], layout=row), self.pages, widgets.Box(fields, layout=row),
            self.preview, widgets.Box(finish, layout=row), self.frequent,
        ])  # fmt: skip
        self._ask()
        self.show()

    # ── What is seen ──────────────────────────────────────────────────────────────────────────────────────────────

    def show(self, page: int = 0) -> None:
        """Show the captions that the filter lets through, and what is frequent among all."""
        times = Counter(self.captions.values())
        keep = {
            "all": lambda name, text: True,
            "without caption": lambda name, text: not text,
            "without trigger": lambda name, text: self.trigger.lower() not in text.lower(),
            "edited": lambda name, text: text != self.written[name],
            "the same as another": lambda name, text: times[text] > 1,
        }[self.filter.value]
        wanted = self.search.value.strip().lower()
        self.pages.show([n for n, text in self.captions.items() if keep(n, text) and wanted in text.lower()], page)
        tags = Counter(tag.lower() for text in self.captions.values() for tag in set(datasets.tags(text)))
        self.frequent.value = (
            note(f"Most frequent of {len(tags)} tags") + bars(tags.most_common(15), len(self.captions)) if tags else ""
        )

    def _row(self, name: str) -> widgets.Widget:
        layout = widgets.Layout(**WIDE)
        text = widgets.Textarea(value=self.captions[name], layout=layout, rows=3, continuous_update=False)

        def changed(change) -> None:
            self.captions[name] = " ".join(change["new"].split())
            self._say()

        text.observe(changed, "value")
        title = widgets.HTML(f'<div style="font-size:12px;line-height:1.3;overflow-wrap:anywhere">{escape(name)}</div>')
        beside = widgets.VBox([title, text], layout=widgets.Layout(flex="1 1 0%", min_width="0px"))
        return widgets.HBox([shown(self.pictures[name]), beside], layout=widgets.Layout(grid_gap="8px"))

    def _say(self, text: str = "", colour: str = "") -> None:
        waiting = len(datasets.changes(self.written, self.captions))
        self.status.value = note(text or (f"{waiting} edited, not saved yet" if waiting else ""), colour or "warning")

    # ── Many at once ──────────────────────────────────────────────────────────────────────────────────────────────

    def _ask(self) -> None:
        """Show the fields that the chosen edit needs."""
        labels = EDITS[self.edit.value][0]
        for field, label in zip((self.first, self.second), (*labels, "", "")[:2], strict=True):
            field.placeholder, field.layout.display = label, "" if label else "none"
        self.first.value = "a photo of {trigger}, {caption}" if "form" in labels[:1] else ""
        self.regex.layout.display = "" if len(labels) == 2 else "none"
        self._forget()

    def _forget(self) -> None:
        self.planned, self.preview.value, self.apply.disabled = None, "", True

    def _preview(self) -> None:
        """Show what the chosen edit would change."""
        self._forget()
        try:
            self.planned = EDITS[self.edit.value][1](self)
        except ValueError as error:
            self.preview.value = note(str(error), "bad")
            return
        found = datasets.changes(self.captions, self.planned)
        self.preview.value = note(datasets.preview(found, 5))
        self.apply.disabled = not found

    def _apply(self) -> None:
        if self.planned is not None:
            self.captions = dict(self.planned)
            self._forget()
            self.show(self.pages.page)
            self._say()

    # ── Files ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def save(self) -> None:
        """Write the captions that were edited; what was there is kept for `undo`."""
        found = datasets.changes(self.written, self.captions)
        try:
            paths = datasets.write_captions(found, self.dataset.root, into=self.into)
        except (ValueError, OSError) as error:
            self._say(str(error), "bad")
            return
        self.written = dict(self.captions)
        self._say(f"{_count(paths)} saved" if paths else "nothing was edited", "good")

    def undo(self) -> None:
        """Bring back what the last save changed."""
        try:
            paths = datasets.undo_captions(self.dataset.root)
        except (ValueError, OSError) as error:
            self._say(str(error), "bad")
            return
        files = datasets.caption_files(self.captions, self.into or self.dataset.root)
        back = {name: datasets.caption_text(path.read_bytes()) if path.exists() else "" for name, path in files.items()}
        touched = set(paths)
        for name, path in files.items():
            if path in touched:
                self.captions[name] = self.written[name] = back[name]
        self.show(self.pages.page)
        self._say(f"{_count(paths)} brought back", "good")


def _count(paths) -> str:
    return "1 caption" if len(paths) == 1 else f"{len(paths)} captions"


EDITS = {  # what it is called -> what its fields ask for, and how it is done
    "put into a form": (("form",), lambda p: datasets.apply_template(p.captions, p.first.value, p.trigger)),
    "find and replace": (
        ("find", "replace by"),
        lambda p: datasets.replace_text(p.captions, p.first.value, p.second.value, regex=p.regex.value),
    ),
    "add tags at the end": (("tag, tag",), lambda p: datasets.retag(p.captions, add=datasets.tags(p.first.value))),
    "remove tags": (("tag, tag",), lambda p: datasets.retag(p.captions, remove=datasets.tags(p.first.value))),
    "tidy tags": ((), lambda p: datasets.retag(p.captions, spaces=True, lower=True, unique=True, keep=1)),
    "sort tags": ((), lambda p: datasets.retag(p.captions, sort=True, unique=True, keep=1)),
}
