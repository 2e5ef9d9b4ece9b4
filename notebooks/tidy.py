"""Write the shared parts of all notebooks, and remove outputs and other traces of runs: `python notebooks/tidy.py`.

The shared parts are the set-up cell (before a notebook's own imports), the badge that opens it in Colab, and the
metadata. The address in both is that of pyproject.toml, under [project.urls]; without one there is no badge.
"""

import json
import re
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

HERE = Path(__file__).parent
SETUP = """\
#@title 1. Set-up
repository = "{address}"  #@param {{type:"string"}}
import importlib.util
import sys
from pathlib import Path

folder, package = Path.cwd(), importlib.util.find_spec("lorakit")
if package and package.origin:  # a folder that is no package has none
    scripts = [*Path(package.origin).parent.parent.glob("colab_setup.sh")]
else:
    scripts = [*folder.glob("../colab_setup.sh"), *folder.glob("colab_setup.sh"), *folder.glob("*/colab_setup.sh")]
    if not scripts and not repository:
        raise FileNotFoundError(
            "lorakit is not installed. Write the address of a lorakit repository into the field above (https://…), or "
            "put its files into a folder next to this notebook (in Colab: upload the zip at the left, then !unzip it "
            "in a cell). Then run this cell again."
        )
    if not scripts:
        scripts = [folder / "lorakit-source" / "colab_setup.sh"]
        !git clone --quiet --depth 1 "{{repository}}" lorakit-source
if scripts:
    !LORAKIT_PYTHON="{{sys.executable}}" bash "{{scripts[0]}}"
    if _exit_code:  # noqa: F821 - of the previous line
        raise RuntimeError("The set-up failed; the lines above say why. Run this cell again after that is fixed.")
    sys.path.insert(0, str(scripts[0].parent.resolve()))
    importlib.invalidate_caches()
"""
OWN = re.compile(r"^(from|import) (?!importlib|sys|pathlib)", re.MULTILINE)  # the first of a notebook's own imports
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": [], "toc_visible": True},
    "kernelspec": {"display_name": "Python 3", "name": "python3"},
    "language_info": {"name": "python"},
}


def address(pyproject: Path) -> str:
    """The address of the published repository; "" if there is none."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository", "").removesuffix("/").removesuffix(".git")


def tidied(text: str, name: str, repository: str) -> str:
    """A notebook as it should be in the repository.

    Args:
        text: the .ipynb file's.
        name: of the file, for the badge.
        repository: the address, or "".

    Raises:
        ValueError: it has no set-up cell.
    """
    cells = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"]).rstrip("\n")
        code = cell["cell_type"] == "code"
        if source.startswith(BADGE):
            continue
        if source.startswith("#@title 1. Set-up"):
            own = OWN.search(source)
            source = SETUP.format(address=repository) + (f"\n{source[own.start() :]}" if own else "")
        ran = {"execution_count": None, "outputs": []} if code else {}
        lines = source.rstrip("\n").splitlines(keepends=True)
        form = {"cellView": "form"} if code else {}
        cells.append({"cell_type": cell["cell_type"], "metadata": form, "source": lines} | ran)
    if not any("".join(cell["source"]).startswith(SETUP.format(address=repository).rstrip("\n")) for cell in cells):
        raise ValueError(f"{name} has no set-up cell. Give it one that begins with: #@title 1. Set-up")
    if of_github := re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", repository):
        link = f"https://colab.research.google.com/github/{of_github[1]}/blob/main/notebooks/{name}"
        cells.insert(0, {"cell_type": "markdown", "metadata": {}, "source": [f"{BADGE}({link})"]})
    cells = [{key: cell[key] for key in sorted(cell)} for cell in cells]
    notebook = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 4}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main(folder: Path = HERE, pyproject: Path = HERE.parent / "pyproject.toml") -> None:
    """Tidy all notebooks of a folder in place; tidy ones are not written."""
    repository = address(pyproject)
    for path in sorted(folder.glob("*.ipynb")):
        before = path.read_text(encoding="utf-8")
        after = tidied(before, path.name, repository)
        if after != before:
            path.write_text(after, encoding="utf-8", newline="\n")
            print(f"tidied    {path.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
