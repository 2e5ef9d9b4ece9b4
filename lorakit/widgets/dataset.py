"""Choose pictures, read the findings about each, and leave some out or replace them with a click."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from lorakit import dataset as datasets
from lorakit import hosts, storage
from lorakit.dataset import Buckets, Dataset, Decisions, Finding, Picture, Report
from lorakit.widgets.parts import LABEL, SIDE, Pages, across, button, discard, note, on_change, reporting, thumbnail

PAGE = 24  # pictures on a page
TONES = {"serious": "bad", "warning": "warning", "info": ""}  # of findings, the most serious first
NOTHING_OPEN = "No pictures are open yet: give a folder and press Open."


class Pictures(widgets.VBox):
    """A panel for the pictures of a dataset. `dataset` has the pictures as decided.

    Args:
        path: as for `dataset.scan`; opened at once.
        kind, trigger: as for `dataset.check_quality`.
        resolution: side of the square bucket in pixels; or all settings of the buckets, which make `step` unused.
        step: sides of buckets are multiples of this many pixels.
        store: file for the decisions, by folder or archive. Nothing is written into the pictures' folder.
        uploads: folder for uploaded files.
        otherwise: opened if there is no path, and `store` has none that was opened last.
    """

    def __init__(
        self, path: str = "", *, kind: str = "character", trigger: str = "", resolution: int | Buckets = 512,
        step: int = 64, store: Path | None = None, uploads: Path = Path("uploads"), otherwise: str | Path = "",
    ):  # fmt: skip
        self.kind, self.trigger, self.store, self.uploads = kind, trigger, store, uploads
        self.buckets = resolution if isinstance(resolution, Buckets) else Buckets(resolution, step)
        self.scanned: Dataset | None = None
        self.report: Report | None = None
        self.decisions, self.opened = Decisions(), ""
        self.by_name: dict[str, Picture] = {}  # with a replacement in place of its picture
        self.findings: dict[str, list[Finding]] = {}  # by picture; "" for the whole set
        self.path = widgets.Text(value=path, placeholder="folder, zip or tar")
        self.path.layout = widgets.Layout(width="auto", flex="1 1 200px", max_width="380px")
        self.dialog = widgets.Box()  # for Colab's upload
        if hosts.here() is hosts.COLAB:  # where FileUpload breaks above 1 MB
            self.upload = button("Upload", self._upload_on_colab)
        else:
            self.upload = widgets.FileUpload(accept=".zip,.tar,.tgz", multiple=False, description="Upload a zip")
            self.upload.layout = widgets.Layout(width="auto")
            self.upload.observe(lambda change: self._uploaded(change["new"]), "value")
        self.message, self.filter = widgets.HTML(), widgets.Dropdown(options=["all"], description="show")
        self.filter.style, self.filter.layout = LABEL, widgets.Layout(width="220px")
        on_change(self.show, self.filter)
        self.pages = Pages(self._cell, PAGE, wrap=True)
        self.sheet = widgets.Image(format="png", layout=widgets.Layout(display="none", max_width="100%"))
        choose = [self.path, button("Open", lambda: self.read(self.path.value), "primary"), self.upload]
        again = [self.filter, button("Check again", self.check), button("Show crops", self._show_crops)]
        super().__init__([across(*choose), self.dialog, self.message, across(*again), self.pages, self.sheet])
        if source := path or (store and datasets.last_source(store)) or otherwise:
            self.read(str(source))

    @property
    def source(self) -> str:
        """The open folder or archive, for the setting `dataset`; `store` is for the setting `decisions`.

        Raises:
            ValueError: nothing is open.
        """
        if self.scanned is None:
            raise ValueError(NOTHING_OPEN)
        return self.opened

    @property
    def dataset(self) -> Dataset:
        """The pictures as decided.

        Raises:
            ValueError: nothing is open, or all pictures are left out.
        """
        if self.scanned is None:
            raise ValueError(NOTHING_OPEN)
        return datasets.apply_decisions(self.scanned, self.decisions)

    def read(self, path: str) -> None:
        """Scan a folder or archive and check its pictures."""
        self.message.value = note(f"reading {path} …")
        with reporting(self.message):
            scanned = datasets.scan(path)
            saved = datasets.load_decisions(self.store, path) if self.store and self.store.exists() else Decisions()
            self.scanned, self.by_name = scanned, scanned.by_name
            self.opened = self.path.value = str(path)
            names = self.by_name.keys()  # pictures that no longer exist need no decision
            leave_out, keep = (tuple(n for n in of if n in names) for of in (saved.leave_out, saved.keep))
            self.decisions = Decisions(leave_out, keep)
            problems = {name: self._replace(name, file) for name, file in saved.replace.items() if name in names}
            self._decide(self.decisions)
            self.check()
            lost = [note(f"{name} is no longer replaced: {why}", "bad") for name, why in problems.items() if why]
            self.message.value += "".join(lost)

    def check(self) -> None:
        """Measure the pictures as decided and show the findings."""
        self.message.value = note("checking …")
        with reporting(self.message):
            dataset, keep = self.dataset, self.decisions.keep
            self.report = datasets.check_quality(
                dataset, kind=self.kind, trigger=self.trigger, buckets=self.buckets, keep=keep
            )
            assert self.scanned
            self.findings = defaultdict(list)
            for finding in self.report.findings:
                for name in finding.pictures or ("",):
                    self.findings[name].append(finding)
            lines = [_note(finding, finding.severity) for finding in self.findings.pop("", ())]
            self.message.value = "".join([note(self.scanned.describe()), *lines])
            kinds = Counter(finding.kind for findings in self.findings.values() for finding in findings)
            self.filter.options = [
                ("all", "all"), (f"with findings ({len(self.findings)})", "marked"), ("left out", "left out"),
                *((f"{kind} ({count})", kind) for kind, count in kinds.most_common()),
            ]  # fmt: skip
            self.show()

    def show(self) -> None:
        """Show the pictures that pass the filter, those with the most serious findings first."""
        chosen, order = self.filter.value, list(TONES)

        def passes(name: str) -> bool:
            findings = self.findings.get(name, ())
            usual = {"all": True, "marked": bool(findings), "left out": name in self.decisions.leave_out}
            return usual.get(chosen, any(finding.kind == chosen for finding in findings))

        def rank(name: str) -> int:
            return min((order.index(finding.severity) for finding in self.findings.get(name, ())), default=len(order))

        self.pages.show(sorted(filter(passes, self.by_name), key=rank))

    def _cell(self, name: str) -> widgets.Widget:
        """A picture with its findings, and toggles for the decisions about it."""
        width = widgets.Layout(width=f"{SIDE}px")  # shared by the toggles, which saves the page many models

        def toggle(on: bool, text: str, hint: str, act: Callable[[bool], None]) -> widgets.ToggleButton:
            widget = widgets.ToggleButton(on, description=text, tooltip=hint, layout=width)
            on_change(lambda: act(widget.value), widget)
            return widget

        decisions, findings, image = self.decisions, self.findings.get(name, []), thumbnail(self.by_name[name])
        leave_out = toggle(name in decisions.leave_out, "leave out", name, lambda on: self._mark(name, "leave_out", on))
        keep = toggle(name in decisions.keep, "is fine", "no more findings", lambda on: self._mark(name, "keep", on))
        file, problem = decisions.replace.get(name, ""), widgets.HTML()
        folded = widgets.Layout(width=width.width, display="" if file else "none")
        path = widgets.Text(file, placeholder="by the file …", continuous_update=False, layout=folded)

        def use_file() -> None:
            reason = self._replace(name, path.value)
            problem.value = f'<div style="font-size:11px">{note(reason, "bad")}</div>' if reason else ""
            image.value = datasets.thumbnail(self.by_name[name])

        def unfold(on: bool) -> None:
            path.layout.display, path.value = "" if on else "none", ""

        on_change(use_file, path)
        swap = toggle(bool(file), "replace", "train on another file in its place", unfold)
        lines = "".join(_note(finding, finding.kind) for finding in findings)
        hint = "\n".join([name, *(finding.message for finding in findings)])  # all of it, if the cell is too small
        text = widgets.HTML(
            f'<div style="font-size:11px;line-height:1.3;width:{SIDE}px;height:{100 if self.findings else 30}px;'
            f'overflow:auto;overflow-wrap:anywhere" title="{escape(hint)}"><b>{escape(name.rpartition("/")[2])}</b>'
            f"{lines}</div>"
        )
        cell = widgets.Layout(width=f"{SIDE + 4}px")  # with the margins
        return widgets.VBox([image, text, leave_out, *([keep] if findings else []), swap, path, problem], layout=cell)

    # ── Decisions ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _mark(self, name: str, kind: str, on: bool) -> None:
        """Add or remove a picture's name in one of the lists of decisions."""
        names = [other for other in getattr(self.decisions, kind) if other != name] + [name] * on
        change: dict[str, Any] = {kind: tuple(names)}
        self._decide(replace(self.decisions, **change))

    def _replace(self, name: str, file: str) -> str:
        """Replace a picture by a file, or restore it with ""; returns the reason if that is impossible."""
        others = {other: path for other, path in self.decisions.replace.items() if other != name}
        files = {name: str(Path(file.strip()).expanduser())} if file.strip() else {}
        assert self.scanned
        try:
            self.by_name[name] = datasets.apply_decisions(self.scanned, Decisions(replace=files)).by_name[name]
        except OSError as error:
            return f"{Path(file).name}: {(error.strerror or str(error)).lower()}"
        except ValueError as error:
            return str(error)
        self._decide(replace(self.decisions, replace=others | files))
        return ""

    def _decide(self, decisions: Decisions) -> None:
        self.decisions = decisions
        if self.store:
            datasets.save_decisions(decisions, self.store, self.opened)

    def _show_crops(self) -> None:
        """Show the parts of pictures that the buckets cut off."""
        if self.scanned:
            self.sheet.value = datasets.crop_previews(self.dataset, self.buckets)._repr_png_()
            self.sheet.layout.display = ""

    # ── Uploads ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _upload_on_colab(self) -> None:
        """Open the files that are chosen in Colab's dialog."""
        output, uploaded = widgets.Output(), None  # made late, because Notebook 6 shows no panel that contains one
        self.dialog.children = [output]
        with output:
            try:
                uploaded = hosts.upload(self.uploads)
            except Exception as error:  # an error of Colab's page, a full disk …
                self.message.value = note(f"nothing was uploaded: {error}. Try again, or give a path on Drive", "bad")
        self.dialog.children = []
        discard(output)
        if uploaded:
            self._open_upload(uploaded)

    def _uploaded(self, value: Any) -> None:
        """Open an uploaded archive; ipywidgets 7 gives a dictionary by name, 8 a tuple."""
        files = value.items() if isinstance(value, dict) else [(file["name"], file) for file in value]
        for name, file in files:
            target = self.uploads / Path(name).name
            with storage.write_file(target) as partial:
                partial.write_bytes(bytes(file["content"]))
            self._open_upload(target)

    def _open_upload(self, path: Path) -> None:
        """Open an uploaded folder, or the folder that an archive is unpacked into, where edited captions are kept."""
        with reporting(self.message):
            folder, refused = storage.unpack(path, self.uploads / "unpacked") if path.is_file() else (path, [])
            self.read(str(folder))
            self.message.value += "".join(note(text, "warning") for text in refused)


def _note(finding: Finding, about: str) -> str:
    return note(f"{about}: {finding.message}", TONES[finding.severity])
