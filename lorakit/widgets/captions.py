"""Read and edit captions, one by one or many at once; an edit of many is previewed first, and a save can be undone."""

from collections import Counter
from collections.abc import Callable
from html import escape
from pathlib import Path

import ipywidgets as widgets

from lorakit import dataset as datasets
from lorakit import named
from lorakit import page as pages
from lorakit.dataset import Dataset
from lorakit.widgets.parts import LABEL, Pages, across, button, line, note, on_change, reporting, thumbnail

PAGE = 8  # captions on a page
FIELD = {"width": "auto", "flex": "1 1 150px", "max_width": "260px"}
WIDE = {"width": "auto", "max_width": "900px", "margin": "2px 0"}


class Captions(widgets.VBox):
    """A panel for the captions of a dataset. `captions` has them as they are now, saved or not.

    Args:
        dataset: from `dataset.scan`.
        trigger: the word that activates the LoRA, for the form and the filter.
        into: folder for the caption files; None writes next to the pictures.
    """

    def __init__(self, dataset: Dataset, trigger: str = "", into: Path | None = None):
        self.dataset, self.trigger, self.into = dataset, trigger, into
        self.pictures, self.saved, self.captions = dataset.by_name, dataset.captions, dataset.captions
        self.edited: dict[str, str] | None = None  # captions after the previewed edit
        self.pages = Pages(self._row, PAGE)
        filters = ["all", "without caption", "without trigger", "edited", "the same as another"]
        self.filter = widgets.Dropdown(options=filters, description="show")
        self.search = widgets.Text(placeholder="only with this text", continuous_update=False)
        self.search.layout = widgets.Layout(**FIELD)
        self.edit = widgets.Dropdown(options=list(EDITS), description="edit all")
        for choice in (self.filter, self.edit):
            choice.style, choice.layout = LABEL, widgets.Layout(width="240px")
        self.first, self.second = (widgets.Text(layout=widgets.Layout(**FIELD)) for _ in range(2))
        self.regex = widgets.Checkbox(description="pattern", indent=False, layout=widgets.Layout(width="90px"))
        self.preview, self.status, self.frequent = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.apply = button("Apply", self._apply, "primary")
        on_change(self.show, self.filter, self.search)
        on_change(self._choose_edit, self.edit)
        fields = [self.edit, self.first, self.second, self.regex, button("Preview", self._preview), self.apply]
        finish = [button("Save", self.save, "success"), button("Undo the last save", self.undo), self.status]
        top = [across(self.filter, self.search), self.pages]
        super().__init__([*top, across(*fields), self.preview, across(*finish), self.frequent])
        self._choose_edit()
        self.show()

    def show(self, page: int = 0) -> None:
        """Show the captions that pass the filter, and the most frequent tags of all captions."""
        times = Counter(self.captions.values())
        passes = {
            "all": lambda name, text: True,
            "without caption": lambda name, text: not text,
            "without trigger": lambda name, text: self.trigger.lower() not in text.lower(),
            "edited": lambda name, text: text != self.saved[name],
            "the same as another": lambda name, text: times[text] > 1,
        }[self.filter.value]
        part = self.search.value.strip().lower()
        self.pages.show([n for n, text in self.captions.items() if passes(n, text) and part in text.lower()], page)
        tags = Counter(tag.lower() for text in self.captions.values() for tag in set(datasets.split_tags(text)))
        bar = '<meter max="{}" value="{}"></meter>'
        rows = [[escape(t), bar.format(len(self.captions), count), str(count)] for t, count in tags.most_common(15)]
        self.frequent.value = note(f"Most frequent of {len(tags)} tags") + pages.table(rows) if tags else ""

    @property
    def tags(self) -> list[str]:
        """The tags in the first field."""
        return datasets.split_tags(self.first.value)

    def _row(self, name: str) -> widgets.Widget:
        layout = widgets.Layout(**WIDE)
        text = widgets.Textarea(value=self.captions[name], layout=layout, rows=3, continuous_update=False)

        def edit() -> None:
            self.captions[name] = " ".join(text.value.split())
            self._report()

        on_change(edit, text)
        title = widgets.HTML(line(name, "font-size:12px;overflow-wrap:anywhere"))
        right = widgets.VBox([title, text], layout=widgets.Layout(flex="1 1 0%", min_width="0px"))
        return widgets.HBox([thumbnail(self.pictures[name]), right], layout=widgets.Layout(grid_gap="8px"))

    def _report(self) -> None:
        unsaved = len(datasets.caption_changes(self.saved, self.captions))
        self.status.value = note(f"{unsaved} edited, not saved yet" if unsaved else "", "warning")

    # ── Many at once ──────────────────────────────────────────────────────────────────────────────────────────────

    def _choose_edit(self) -> None:
        """Show the fields that the chosen edit needs."""
        labels = EDITS[self.edit.value][0]
        for field, label in zip((self.first, self.second), (*labels, "", "")[:2], strict=True):
            field.placeholder, field.layout.display = label, "" if label else "none"
        self.first.value = "a photo of {trigger}, {caption}" if "form" in labels[:1] else ""
        self.regex.layout.display = "" if len(labels) == 2 else "none"
        self._forget()

    def _forget(self) -> None:
        self.edited, self.preview.value, self.apply.disabled = None, "", True

    def _preview(self) -> None:
        """Show the changes that the chosen edit would make."""
        self._forget()
        with reporting(self.preview):
            self.edited = EDITS[self.edit.value][1](self)
            changes = datasets.caption_changes(self.captions, self.edited)
            self.preview.value = note(datasets.describe_changes(changes, 5))
            self.apply.disabled = not changes

    def _apply(self) -> None:
        if self.edited is not None:
            self.captions = dict(self.edited)
            self._forget()
            self.show(self.pages.page)
            self._report()

    # ── Files ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def save(self) -> None:
        """Write the edited captions; the old ones are kept for `undo`."""
        with reporting(self.status):
            changes = datasets.caption_changes(self.saved, self.captions)
            paths = datasets.write_captions(changes, self.dataset.root, into=self.into)
            self.saved = dict(self.captions)
            self.status.value = note(
                f"captions saved: {len(paths)}" if paths else "no caption was edited", "good" if paths else ""
            )

    def undo(self) -> None:
        """Restore the captions from before the last save."""
        with reporting(self.status):
            paths = datasets.undo_captions(self.dataset.root)
            files = datasets.caption_files(self.captions, self.into or self.dataset.root)
            for name, path in files.items():
                if path in paths:
                    text = datasets.caption_text(path.read_bytes()) if path.exists() else ""
                    self.captions[name] = self.saved[name] = text
            self.show(self.pages.page)
            self.status.value = note(f"captions restored: {len(paths)}", "good")


Edit = Callable[[Captions], dict[str, str]]
EDITS: dict[str, tuple[tuple[str, ...], Edit]] = {  # name → the labels of its fields, and the captions it makes
    "put into a form": (("form",), lambda p: datasets.apply_template(p.captions, p.first.value, p.trigger)),
    "find and replace": (
        ("find", "replace by"),
        lambda p: datasets.replace_text(p.captions, p.first.value, p.second.value, regex=p.regex.value),
    ),
    "add tags at the end": (("tag, tag",), lambda p: datasets.retag(p.captions, add=p.tags)),
    "remove tags": (("tag, tag",), lambda p: datasets.retag(p.captions, remove=p.tags)),
    "tidy tags": ((), lambda p: datasets.retag(p.captions, spaces=True, lower=True, unique=True, keep=1)),
    "sort tags": ((), lambda p: datasets.retag(p.captions, sort=True, unique=True, keep=1)),
    "order tags as a base does": (
        ("base, such as noobai-1.1",),
        lambda p: datasets.order_tags(p.captions, named.tag_order(p.tags), p.trigger),
    ),
}
