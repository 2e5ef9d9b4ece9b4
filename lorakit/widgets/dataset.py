"""Choose pictures, see what was found about each, and leave some out or replace them with a click."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path

import ipywidgets as widgets

from lorakit import dataset as datasets
from lorakit import hosts, storage
from lorakit.config import BucketRule as Rule
from lorakit.dataset import Dataset, Decisions, Finding, QualityReport, Sides
from lorakit.widgets.parts import LABEL, SIDE, Pages, button, discard, note, shown, thumbnail

PAGE = 24  # pictures on a page
COLOURS = {"serious": "bad", "warning": "warning", "info": ""}
UNOPENED = "No pictures are open yet: give a folder and press Open."
ROW = widgets.Layout(display="flex", flex_flow="row wrap", align_items="center", grid_gap="8px")


class Pictures(widgets.VBox):
    """A panel for a dataset. `dataset` is what is to be trained on: all that was found, but for what was decided.

    Args:
        path: what `dataset.scan` takes; opened at once where it is given.
        kind, resolution, trigger, step, rule, sides: as for `check.check`.
        store: file that keeps what was decided, by folder or archive. The pictures' folder is never written.
        uploads: folder that uploaded files are put in.
        otherwise: opened where no path is given and `store` knows none that was opened last.
    """

    def __init__(
        self, path: str = "", *, kind: str = "character", resolution: int = 512, trigger: str = "", step: int = 64,
        rule: Rule = "kohya", sides: Sides = (None, None), store: Path | None = None, uploads: Path = Path("uploads"),
        otherwise: str | Path = "",
    ):  # fmt: skip
        self.kind, self.trigger, self.store, self.uploads = kind, trigger, store, uploads
        self.fitting = {"resolution": resolution, "step": step, "rule": rule, "sides": sides}
        self.found: Dataset | None = None
        self.report: QualityReport | None = None
        self.decisions, self.opened = Decisions(), ""
        self.by_name: dict[str, datasets.Picture] = {}  # as they are seen: a replacement in its picture's place
        self.places: dict[str, int] = {}
        self.tall = 30
        self.findings: dict[str, list[Finding]] = {}
        self.path = widgets.Text(value=path, placeholder="folder, zip or tar")
        self.path.layout = widgets.Layout(width="auto", flex="1 1 200px", max_width="380px")
        self.asking = widgets.Box()
        if hosts.here() is hosts.COLAB:  # where FileUpload breaks above 1 MB
            self.upload = button("Upload", self._ask)
        else:
            self.upload = widgets.FileUpload(accept=".zip,.tar,.tgz", multiple=False, description="Upload a zip")
            self.upload.layout = widgets.Layout(width="auto")
            self.upload.observe(lambda change: self._uploaded(change["new"]), "value")
        self.told, self.filter = widgets.HTML(), widgets.Dropdown(options=["all"], description="show")
        self.filter.style, self.filter.layout = LABEL, widgets.Layout(width="220px")
        self.pages = Pages(self._cell, PAGE, wrap=True)
        self.sheet = widgets.Image(format="png", layout=widgets.Layout(display="none", max_width="100%"))
        self.filter.observe(lambda _: self.show(), "value")
        again = [button("Check again", self.check), button("What is cut off", self._crops)]
        choose = [self.path, button("Open", lambda: self.read(self.path.value), "primary"), self.upload]
        super().__init__([
            widgets.Box(choose, layout=ROW), self.asking, self.told, widgets.Box([self.filter, *again], layout=ROW),
            self.pages, self.sheet,
        ])  # fmt: skip
        path = path or (store and datasets.last_source(store)) or otherwise
        if path:
            self.read(str(path))

    @property
    def source(self) -> str:
        """What is open, for the setting `dataset`; with `store` as the setting `decisions` it is trained on as decided.

        Raises:
            ValueError: nothing is open.
        """
        if self.found is None:
            raise ValueError(UNOPENED)
        return self.opened

    @property
    def dataset(self) -> Dataset:
        """The pictures as decided.

        Raises:
            ValueError: nothing is open, or all is left out.
        """
        if self.found is None:
            raise ValueError(UNOPENED)
        return datasets.apply_decisions(self.found, self.decisions)

    def read(self, path: str) -> None:
        """Scan a folder or archive, and check what is in it."""
        self.told.value = note(f"reading {path} …")
        try:
            self.found = datasets.scan(path)
            known = datasets.load_decisions(self.store, path) if self.store and self.store.exists() else Decisions()
        except (OSError, ValueError) as error:
            self.told.value = note(str(error), "bad")
            return
        self.opened = self.path.value = str(path)
        self.by_name = {datasets.picture_name(picture.known_as, self.found): picture for picture in self.found.pictures}
        self.places = {name: place for place, name in enumerate(self.by_name)}
        here = self.by_name.keys()  # what was decided of pictures that are gone is of no use any more
        self.decisions = Decisions(*(tuple(n for n in names if n in here) for names in (known.leave_out, known.keep)))
        wrong = {name: self._swap(name, file) for name, file in known.replace.items() if name in here}
        self._keep(self.decisions)
        self.check()
        lost = [note(f"{name} is not replaced any more: {why}", "bad") for name, why in wrong.items() if why]
        self.told.value += "".join(lost)

    def check(self) -> None:
        """Measure the pictures as decided, and show what was found."""
        self.told.value = note("checking …")
        try:
            self.report = datasets.check_quality(
                self.dataset, kind=self.kind, trigger=self.trigger, keep=self.decisions.keep, **self.fitting
            )
        except (OSError, ValueError) as error:
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
        self.tall = 100 if kinds else 30  # pixels for a picture's name and what is said of it
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
        """A picture, what was found about it, and what can be decided."""
        width = widgets.Layout(width=f"{SIDE}px")  # of all toggles: a layout each would be as many more

        def toggle(on: bool, text: str, hint: str, decide: Callable[[bool], None]) -> widgets.ToggleButton:
            made = widgets.ToggleButton(on, description=text, tooltip=hint, layout=width)
            made.observe(lambda change: decide(change["new"]), "value")
            return made

        decided, image = self.decisions, shown(self.by_name[name])
        out = toggle(name in decided.leave_out, "leave out", name, lambda on: self._decide(name, "leave_out", on))
        fine = toggle(
            name in decided.keep, "is fine", "say nothing about it", lambda on: self._decide(name, "keep", on)
        )
        file, wrong = decided.replace.get(name, ""), widgets.HTML()
        folded = widgets.Layout(width=width.width, display="" if file else "none")
        path = widgets.Text(file, placeholder="by the file …", continuous_update=False, layout=folded)

        def swap(file: str) -> None:
            hindered = self._swap(name, file)
            wrong.value = f'<div style="font-size:11px">{note(hindered, "bad")}</div>' if hindered else ""
            image.value = thumbnail(self.by_name[name])

        def offer(on: bool) -> None:
            path.layout.display, path.value = "" if on else "none", ""

        instead = toggle(bool(file), "replace", "train on another file in its place", offer)
        path.observe(lambda change: swap(change["new"]), "value")
        own = self.findings.get(name, [])
        said = "".join(note(f"{finding.kind}: {finding.message}", COLOURS[finding.severity]) for finding in own)
        hint = "\n".join([name, *(finding.message for finding in own)])  # the whole of it, where the cell is too small
        text = widgets.HTML(
            f'<div style="font-size:11px;line-height:1.3;width:{SIDE}px;height:{self.tall}px;overflow:auto;'
            f'overflow-wrap:anywhere" title="{escape(hint)}"><b>{escape(name.rpartition("/")[2])}</b>{said}</div>'
        )
        fit = widgets.Layout(width=f"{SIDE + 4}px")  # and the margins
        return widgets.VBox([image, text, out, *([fine] if own else []), instead, path, wrong], layout=fit)

    def _decide(self, name: str, what: str, yes: bool) -> None:
        names = [other for other in getattr(self.decisions, what) if other != name] + [name] * yes
        self._keep(replace(self.decisions, **{what: tuple(names)}))

    def _swap(self, name: str, file: str) -> str:
        """Put a file in a picture's place, or with "" the picture back; what hinders it."""
        files_by_name = {other: path for other, path in self.decisions.replace.items() if other != name}
        own = {name: str(Path(file.strip()).expanduser())} if file.strip() else {}
        try:
            self.by_name[name] = datasets.apply_decisions(self.found, Decisions(replace=own)).pictures[
                self.places[name]
            ]
        except OSError as error:
            return f"{Path(file).name}: {(error.strerror or str(error)).lower()}"
        except ValueError as error:
            return str(error)
        self._keep(replace(self.decisions, replace=files_by_name | own))
        return ""

    def _keep(self, decided: Decisions) -> None:
        self.decisions = decided
        if self.store:
            datasets.save_decisions(decided, self.store, self.opened)

    def _crops(self) -> None:
        """Show what the buckets cut off."""
        if self.found:
            self.sheet.value = datasets.crop_previews(self.dataset, **self.fitting)._repr_png_()
            self.sheet.layout.display = ""

    def _ask(self) -> None:
        """Open what is chosen in Colab's dialog."""
        dialog, chosen = widgets.Output(), None  # only now: Notebook 6 shows no panel that holds one
        self.asking.children = [dialog]
        with dialog:
            try:
                chosen = hosts.upload(self.uploads)
            except Exception as error:  # what Colab's page answers with, a disk that is full …
                self.told.value = note(f"nothing was uploaded: {error}. Try again, or give a path on Drive", "bad")
        self.asking.children = []
        discard(dialog)
        if chosen:
            self._arrived(chosen)

    def _uploaded(self, value) -> None:
        """Open an archive that was uploaded; ipywidgets 7 gives a dictionary by name, 8 a tuple."""
        sent = value.items() if isinstance(value, dict) else [(file["name"], file) for file in value]
        for name, file in sent:
            target = self.uploads / Path(name).name
            with storage.write_file(target) as partial:
                partial.write_bytes(bytes(file["content"]))
            self._arrived(target)

    def _arrived(self, path: Path) -> None:
        """Open what was uploaded: of an archive the folder it is unpacked into, where edited captions stay as long."""
        try:
            folder, refused = storage.unpack(path, self.uploads / "unpacked") if path.is_file() else (path, [])
        except (OSError, ValueError) as error:
            self.told.value = note(str(error), "bad")
            return
        self.read(str(folder))
        self.told.value += "".join(note(line, "warning") for line in refused)
