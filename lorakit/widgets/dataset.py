"""Choose pictures, see what was found about each, and leave some out with a click."""

from collections import Counter, defaultdict
from html import escape
from pathlib import Path

import ipywidgets as widgets

from lorakit import check, files
from lorakit import dataset as datasets
from lorakit.check import Decisions, Finding, Report
from lorakit.dataset import Dataset
from lorakit.widgets.pictures import SIDE, Pages, button, note, shown

PAGE = 24  # pictures on a page
COLOURS = {"serious": "bad", "warning": "warning", "info": ""}
ROW = widgets.Layout(display="flex", flex_flow="row wrap", align_items="center", grid_gap="8px")


class Pictures(widgets.VBox):
    """A panel for a dataset. `dataset` is what is to be trained on: all that was found but what was left out.

    Args:
        path: what `dataset.scan` takes; opened at once where it is given.
        kind, resolution, trigger: as for `check.check`.
        store: file that keeps what was decided; read where it is there. The pictures' folder is never written.
        uploads: folder that uploaded files are put in.
    """

    def __init__(
        self, path: str = "", *, kind: str = "character", resolution: int = 512, trigger: str = "",
        store: Path | None = None, uploads: Path = Path("uploads"),
    ):  # fmt: skip
        self.kind, self.resolution, self.trigger, self.store, self.uploads = kind, resolution, trigger, store, uploads
        self.found: Dataset | None = None
        self.report: Report | None = None
        self.decisions = check.load(store) if store and store.exists() else Decisions()
        self.by_name: dict[str, datasets.Picture] = {}
        self.findings: dict[str, list[Finding]] = {}
        self.path = widgets.Text(value=path, placeholder="folder, zip or tar", layout=widgets.Layout(width="380px"))
        self.upload = widgets.FileUpload(accept=".zip,.tar,.tgz", multiple=False, description="or a zip up to 1 MB")
        self.upload.layout = widgets.Layout(width="auto")
        self.upload.observe(lambda change: self._uploaded(change["new"]), "value")
        self.told, self.filter = widgets.HTML(), widgets.Dropdown(options=["all"], description="show")
        self.pages = Pages(self._cell, PAGE, wrap=True)
        self.sheet = widgets.Image(format="png", layout=widgets.Layout(display="none", max_width="100%"))
        self.filter.observe(lambda _: self.show(), "value")
        again = [button("Check again", self.check), button("What is cut off", self._crops)]
        choose = [self.path, button("Open", lambda: self.read(self.path.value), "primary"), self.upload]
        super().__init__([
            widgets.Box(choose, layout=ROW), self.told, widgets.Box([self.filter, *again], layout=ROW), self.pages,
            self.sheet,
        ])  # fmt: skip
        if path:
            self.read(path)

    @property
    def dataset(self) -> Dataset:
        """The pictures as decided.

        Raises:
            ValueError: nothing is open, or all is left out.
        """
        if self.found is None:
            raise ValueError("No pictures are open yet: give a folder and press Open.")
        return check.decide(self.found, self.decisions)

    def read(self, path: str) -> None:
        """Scan a folder or archive, and check what is in it."""
        self.told.value = note(f"reading {path} …")
        try:
            self.found = datasets.scan(path)
        except (OSError, ValueError) as error:
            self.told.value = note(str(error), "bad")
            return
        self.path.value = str(path)
        self.by_name = {check.name_of(picture.path, self.found): picture for picture in self.found.pictures}
        here = self.by_name.keys()  # what was decided of others is of no use here
        self.decisions = Decisions(
            tuple(name for name in self.decisions.leave_out if name in here),
            tuple(name for name in self.decisions.keep if name in here),
            {name: file for name, file in self.decisions.replace.items() if name in here},
        )
        self.check()

    def check(self) -> None:
        """Measure the pictures as decided, and show what was found."""
        self.told.value = note("checking …")
        try:
            self.report = check.check(
                self.dataset, kind=self.kind, resolution=self.resolution, trigger=self.trigger, keep=self.decisions.keep
            )
        except ValueError as error:
            self.told.value = note(str(error), "bad")
            return
        self.findings = defaultdict(list)
        for finding in self.report.findings:
            self.findings[finding.picture or ""].append(finding)
        of_set = [
            note(f"{finding.severity}: {finding.message}", COLOURS[finding.severity]) for finding in self.findings[""]
        ]
        self.told.value = note(self.found.describe()) + "".join(of_set)
        kinds = Counter(finding.kind for finding in self.report.findings if finding.picture)
        marked = len({finding.picture for finding in self.report.findings if finding.picture})
        self.filter.options = [
            ("all", "all"), (f"with findings ({marked})", "marked"), ("left out", "left out"),
            *((f"{kind} ({count})", kind) for kind, count in kinds.most_common()),
        ]  # fmt: skip
        self.show()

    def show(self) -> None:
        """Show the pictures that the filter lets through, the worst first."""
        wanted, grave = self.filter.value, list(COLOURS)

        def let_through(name: str) -> bool:
            own = self.findings.get(name, ())
            by_kind = {"all": True, "marked": bool(own), "left out": name in self.decisions.leave_out}
            return by_kind.get(wanted, any(finding.kind == wanted for finding in own))

        def rank(name: str) -> int:
            return min((grave.index(finding.severity) for finding in self.findings.get(name, ())), default=len(grave))

        self.pages.show(sorted(filter(let_through, self.by_name), key=rank))

    def _cell(self, name: str) -> widgets.Widget:
        out = widgets.ToggleButton(name in self.decisions.leave_out, description="leave out", tooltip=name)
        fine = widgets.ToggleButton(name in self.decisions.keep, description="is fine", tooltip="say nothing about it")
        out.observe(lambda change: self._decide(name, "leave_out", change["new"]), "value")
        fine.observe(lambda change: self._decide(name, "keep", change["new"]), "value")
        width = widgets.Layout(width=f"{SIDE}px")
        for toggle in (out, fine):
            toggle.layout = width
        own = self.findings.get(name, [])
        said = "".join(note(f"{finding.kind}: {finding.message}", COLOURS[finding.severity]) for finding in own)
        text = widgets.HTML(
            f'<div style="font-size:11px;line-height:1.3;width:{SIDE}px;height:72px;overflow:auto;'
            f'overflow-wrap:anywhere" title="{escape(name)}"><b>{escape(name.rpartition("/")[2])}</b>{said}</div>'
        )
        return widgets.VBox([shown(self.by_name[name]), text, out, *([fine] if own else [])], layout=width)

    def _decide(self, name: str, what: str, yes: bool) -> None:
        names = [other for other in getattr(self.decisions, what) if other != name] + [name] * yes
        self.decisions = Decisions(**(vars(self.decisions) | {what: tuple(names)}))
        if self.store:
            check.save(self.decisions, self.store)

    def _crops(self) -> None:
        """Show what the buckets cut off."""
        if self.found:
            self.sheet.value = check.crops(self.dataset, resolution=self.resolution)._repr_png_()
            self.sheet.layout.display = ""

    def _uploaded(self, value) -> None:
        """Open an archive that was uploaded; ipywidgets 7 gives a dictionary by name, 8 a tuple."""
        sent = value.items() if isinstance(value, dict) else [(file["name"], file) for file in value]
        for name, file in sent:
            target = self.uploads / Path(name).name
            with files.replacing(target) as partial:
                partial.write_bytes(bytes(file["content"]))
            self.read(str(target))
