"""Export one of several checkpoints or LoRA files, prove the file, and copy or download it."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from IPython.utils.capture import capture_output

from lorakit import adapter as adapters
from lorakit import hosts, storage
from lorakit import run as running
from lorakit.evaluate import Candidates
from lorakit.widgets.parts import above, across, button, columns, line, note, on_change, reporting

LAYOUTS = (("A1111, Forge, ComfyUI (kohya's)", "kohya"), ("diffusers", "diffusers"), ("PEFT (a folder)", "peft"))
BEST = "lowest validation loss"


class Export(widgets.VBox):
    """A form that writes a LoRA as a file for other programs.

    Args:
        into: folder for exported files.
        copy_to: folder for second copies.

    Attributes:
        exported: the file or folder written last.
    """

    def __init__(self, into: str | Path, copy_to: str | Path = ""):
        self.into = Path(into)
        self.exported: Path | None = None
        self.candidates: Candidates | None = None
        self.label, self.format = widgets.Dropdown(), widgets.Dropdown(options=LAYOUTS)
        self.name, self.proposed = widgets.Text(), ""
        self.dtype = widgets.Dropdown(options=list(adapters.DTYPES))
        self.proof, self.message = widgets.HTML(), widgets.HTML()
        # JupyterLab resolves links only in an Output; Notebook 6 resolves them in HTML, and cannot show an Output.
        self.link = widgets.HTML() if widgets.__version__.startswith("7.") else widgets.Output()
        self.folder = widgets.Text(str(copy_to), placeholder="a folder, such as one on Drive")
        self.folder.layout = widgets.Layout(width="300px")
        on_change(self._propose_name, self.label)
        fields = [
            above("checkpoint or LoRA", self.label), above("file name", self.name), above("for", self.format),
            above("precision", self.dtype),
        ]  # fmt: skip
        take = [button("Download", self.download), self.folder, button("Copy it there", self.copy), self.message]
        super().__init__([
            widgets.HTML(line("Export", "font-weight:600;margin-top:12px")), columns(fields, 240, 720),
            across(button("Export", self.export, "success"), self.proof), across(*take), self.link,
        ], layout=widgets.Layout(grid_gap="8px"))  # fmt: skip

    def offer(self, candidates: Candidates | None) -> None:
        """Let the user choose among these; the best or last one is chosen first."""
        self.candidates, self.label.options = candidates, []
        if candidates:
            best = candidates.best
            self.label.options = [(f"{label}, {BEST}" if label == best else label, label) for label in candidates.paths]
            self.label.value = best or list(candidates.paths)[-1]

    @property
    def picked(self) -> Path:
        """The chosen checkpoint or file.

        Raises:
            ValueError: there is none.
        """
        if not self.candidates or self.label.value is None:
            raise ValueError("There is nothing to export yet: open a run's folder or a LoRA file.")
        return self.candidates.paths[self.label.value]

    def _propose_name(self) -> None:
        """Name the file after the chosen LoRA, unless the user has written another name."""
        if self.candidates and self.label.value and self.name.value == self.proposed:
            self.name.value = self.proposed = file_name(self.candidates, self.label.value)

    def export(self) -> None:
        """Write the file and prove it."""
        self.exported, self.message.value, self.proof.value = None, "", note("writing …")
        self._show_link(())
        with reporting(self.proof, Exception):
            lora, layout = running.lora_of(self.picked), self.format.value
            name = Path(self.name.value.strip() or "lora").name.removesuffix(".safetensors")
            path = self.into / (name if layout == "peft" else f"{name}.safetensors")
            adapters.save(lora, path, dtype=adapters.dtype_of(self.dtype.value), layout=layout)
            proof = adapters.prove(path, lora, layout=layout)
            size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*"))) / 1e6
            shown = os.path.relpath(path) if path.absolute().is_relative_to(Path.cwd()) else path.name
            self.exported = path
            text = "\n".join([f"{shown}, {size:,.1f} MB", f"read back: {proof.describe()}", *proof.losses])
            self.proof.value = note(text, "good")

    def _written(self) -> Path:
        if not self.exported:
            raise ValueError("Export it first.")
        return self.exported

    def download(self) -> None:
        """Download the exported file to the user's computer; a folder as a zip."""
        self._show_link(())
        with reporting(self.message, Exception):
            path = self._written()
            if path.is_dir():
                path = Path(shutil.make_archive(str(path), "zip", path))
            if hosts.here() is hosts.COLAB:
                hosts.download(path)
                return
            with capture_output(stdout=False, stderr=False) as captured:  # a callback's display may show nowhere
                hosts.download(path)
            self._show_link([output.data for output in captured.outputs])

    def _show_link(self, outputs: Sequence[dict[str, Any]]) -> None:
        if isinstance(self.link, widgets.HTML):
            self.link.value = "".join(data.get("text/html", "") for data in outputs)
        else:
            self.link.outputs = tuple({"output_type": "display_data", "data": d, "metadata": {}} for d in outputs)

    def copy(self) -> None:
        """Copy the exported file to a folder, and compare the copy."""
        self.message.value = note("copying …")
        with reporting(self.message, Exception):
            if not self.folder.value.strip():
                raise ValueError("Name the folder to copy it to.")
            copies = storage.copy_verified(self._written(), Path(self.folder.value.strip()).expanduser())
            text = copies[0].name if len(copies) == 1 else f"{len(copies)} files"
            self.message.value = note(f"{text} copied and read back: identical", "good")


def file_name(candidates: Candidates, label: str) -> str:
    """The name of a candidate's file, without suffix; with the run's name if there are checkpoints of several runs."""
    path = candidates.paths[label]
    if path.parent.name != "checkpoints":
        return path.name.removesuffix(".safetensors")
    if len({other.parent for other in candidates.paths.values() if other.parent.name == "checkpoints"}) > 1:
        return re.sub(r"[^\w.+=-]+", "-", label).strip("-")
    return f"{candidates.config.name}-{path.stem}" if candidates.config else path.stem
