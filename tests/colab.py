"""A machine with the versions that Colab ships of all that draws panels, and Notebook 6 in a headless browser.

Colab's own frontend cannot be had; Notebook 6 stands on the same ipywidgets 7.7 and the same kernel. Those versions are
installed once, into a folder of the environment that runs the tests; its name is made from them. A machine is a virtual
environment that has them first, then all else (torch, diffusers …) from the environment that runs the tests, but not
lorakit itself, and a torchao that peft refuses, as Colab has it.
"""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import browser
import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent
FAKES = Path(__file__).parent / "fakes"  # google.colab
PINS = (
    "ipykernel==6.17.1", "ipywidgets==7.7.1", "ipython==7.34.0", "notebook==6.5.7", "jupyter_client==7.4.9",
    "tornado==6.5.7",
    # What these stand on and newer ones do not, or have at versions too new.
    "widgetsnbextension==3.6.10", "jupyterlab_widgets==1.1.11", "nbclassic==1.3.1", "nest-asyncio==1.6.0",
    "entrypoints==0.4", "ipython_genutils==0.2.0", "decorator==5.2.1", "pickleshare==0.7.5", "backcall==0.2.0",
    "setuptools==80.9.0",
)  # fmt: skip


def packages() -> Path:
    """The folder with Colab's versions, installed at the first call."""
    key = hashlib.sha256("\n".join([sys.version, *PINS]).encode()).hexdigest()[:16]
    folder = Path(sys.prefix) / "share" / "lorakit-tests" / f"colab-{key}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        pytest.skip(f"Colab's versions cannot be installed here: {error}")
    with FileLock(f"{folder}.lock"):  # other tests run beside this one
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--upgrade",
                       "--no-cache-dir", "--target", str(partial), *PINS]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"Colab's versions cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
            partial.rename(folder)
    return folder


@dataclass(frozen=True)
class Machine:
    """An environment as Colab's, used up by what is installed into it."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site(self) -> Path:
        return Path(sysconfig.get_path("purelib", vars={"base": str(self.folder), "platbase": str(self.folder)}))

    @property
    def environment(self) -> dict[str, str]:
        """What Jupyter and its kernels are to be started with."""
        places = {"JUPYTER_PATH": [self.folder / "jupyter", packages() / "share" / "jupyter"],
                  "JUPYTER_CONFIG_PATH": [packages() / "etc" / "jupyter"]}  # fmt: skip
        return {name: os.pathsep.join(map(str, found)) for name, found in places.items()} | {
            "COLAB_RELEASE_TAG": "release-colab-tests", "WORKSPACE": str(self.folder / "content"),
            "IPYTHONDIR": str(self.folder / "ipython"), "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }  # fmt: skip


def machine(folder: Path, ready: bool = False) -> Machine:
    """Make a machine, whose kernel is called "colab".

    Args:
        ready: as after the set-up, with this checkout importable and no torchao; otherwise that is a notebook's to do.
    """
    made = Machine(folder)
    venv.create(folder, symlinks=True)
    shared = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    # Plain lines: what other .pth files there say, where lorakit is, is not read.
    lines = dict.fromkeys(map(str, [packages(), FAKES, *([ROOT] if ready else []), *shared]))
    (made.site / "machine.pth").write_text("\n".join(lines) + "\n")
    if not ready:
        _old_torchao(made.site)
    kernel = folder / "jupyter" / "kernels" / "colab"
    kernel.mkdir(parents=True)
    command = [str(made.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "Colab", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    return made


def _old_torchao(site: Path) -> None:
    """What peft and pip see of one: a module, and what it says of itself."""
    about = site / "torchao-0.10.0.dist-info"
    contents = {
        site / "torchao" / "__init__.py": '__version__ = "0.10.0"\n',
        about / "METADATA": "Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n", about / "INSTALLER": "pip\n",
    }  # fmt: skip
    contents[about / "RECORD"] = "".join(f"{file.relative_to(site)},,\n" for file in (*contents, about / "RECORD"))
    for file, text in contents.items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)


@contextmanager
def notebook6(on: Machine, folder: Path) -> Iterator[str]:
    """A server of Notebook 6 on a machine, of the notebooks in a folder; yields its address."""
    command = [
        str(on.python), "-m", "notebook", "--allow-root", "--no-browser", "--ip=127.0.0.1", "--port={port}",
        "--NotebookApp.token=t", f"--notebook-dir={folder}", "--MultiKernelManager.default_kernel_name=colab",
    ]  # fmt: skip
    with browser.served(folder, command, on.environment) as address:
        yield address


@contextmanager
def opened(context, address: str, name: str) -> Iterator:
    """A notebook of Notebook 6 in a browser, its kernel ready: yields playwright's page."""
    with browser.browsed(context, f"{address}/notebooks/{name}?token=t") as page:
        page.wait_for_selector("#notebook-container .code_cell")
        page.wait_for_selector(".kernel_idle_icon")
        yield page


def run_all(page) -> None:
    """Cell → Run All."""
    page.click("#celllink")
    page.click("#run_all_cells a")
