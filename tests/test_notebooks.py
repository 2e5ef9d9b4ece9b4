"""Notebooks are thin, tidy, and call what is there; their set-up cell finds lorakit or says what to do.

Here they are run whole without a kernel of their own, which would import everything anew; test_colab.py has kernels.
"""

import ast
import atexit
import builtins
import importlib
import inspect
import io
import json
import os
import shutil
import subprocess
import sys
import types
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import browser
import pytest
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import display
from said import names, naming
from traitlets import List
from traitlets.config import Config

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
GIVEN = {*dir(builtins), "get_ipython", "display", "_exit_code"}  # by Python and IPython

spec = util.spec_from_file_location("tidy", ROOT / "notebooks" / "tidy.py")
tidy = util.module_from_spec(spec)
spec.loader.exec_module(tidy)

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def code_cells(path):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def python(cell) -> str:
    """The cell without IPython's own lines."""
    lines = "".join(cell["source"]).splitlines()
    return "\n".join(line.replace(line.strip(), "pass") if line.strip()[:1] in "!%" else line for line in lines if line)


@every_notebook
def test_cells_are_thin_and_hold_no_outputs(path):
    """Fields and calls: nothing is defined, tried or repeated. A list of labels may be made in place."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"]
    assert notebook["metadata"]["accelerator"] == "GPU" and notebook["metadata"]["colab"]["gpuType"] == "T4"
    for cell in code_cells(path):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        assert cell["metadata"]["cellView"] == "form" and cell["source"][0].startswith("#@title")
        tree = ast.parse(python(cell))
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.For, ast.AsyncFor, ast.While, ast.Try)
        assert not [node for node in ast.walk(tree) if isinstance(node, kinds)], cell["source"][0]


@every_notebook
def test_notebooks_are_as_tidy_writes_them(path):
    text = path.read_text(encoding="utf-8")
    assert tidy.tidied(text, path.name, tidy.address(ROOT / "pyproject.toml")) == text, "run: python notebooks/tidy.py"


def test_one_address_reaches_every_notebook(tmp_path, monkeypatch):
    """And taking it away again leaves every byte as it was."""
    pyproject, notebooks = tmp_path / "pyproject.toml", tmp_path / "notebooks"
    notebooks.mkdir()
    for path in NOTEBOOKS:
        shutil.copy(path, notebooks)
    said = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pyproject.write_text(
        said.replace("[project.urls]", '[project.urls]\nRepository = "https://github.com/me/my.kit.git"')
    )
    for _ in range(2):
        tidy.main(notebooks, pyproject)
    for path in sorted(notebooks.iterdir()):
        first, *_ = json.loads(path.read_text(encoding="utf-8"))["cells"]
        link = f"https://colab.research.google.com/github/me/my.kit/blob/main/notebooks/{path.name}"
        assert "".join(first["source"]) == f"{tidy.BADGE}({link})"
        (setup,) = [cell for cell in code_cells(path) if cell["source"][0].startswith("#@title 1. Set-up")]
        assert setup["source"][1] == 'repository = "https://github.com/me/my.kit"  #@param {type:"string"}\n'
    pyproject.write_text(said.replace("[project.urls]", '[project.urls]\nRepository = "https://example.org/lorakit/"'))
    tidy.main(notebooks, pyproject)  # not GitHub's: Colab cannot open it, and git can
    text = (notebooks / "quickstart.ipynb").read_text(encoding="utf-8")
    assert "colab.research" not in text and 'https://example.org/lorakit\\"' in text
    shutil.copy(ROOT / "pyproject.toml", pyproject)
    tidy.main(notebooks, pyproject)
    for path in NOTEBOOKS:
        assert (notebooks / path.name).read_bytes() == path.read_bytes()


def test_what_running_leaves_behind_is_stripped():
    path = NOTEBOOKS[0]
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["metadata"]["widgets"] = {"state": {}}
    notebook["metadata"]["language_info"]["version"] = "3.12.1"
    notebook["nbformat_minor"] = 5
    for number, cell in enumerate(notebook["cells"]):
        cell["id"] = cell["metadata"]["id"] = f"c{number}"
    ran = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    ran["execution_count"], ran["metadata"]["outputId"] = 7, "x"
    ran["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["/home/me"]}]
    repository = tidy.address(ROOT / "pyproject.toml")
    assert tidy.tidied(json.dumps(notebook), path.name, repository) == path.read_text(encoding="utf-8")
    notebook["cells"] = [cell for cell in notebook["cells"] if cell is not ran]
    with pytest.raises(ValueError, match=naming(path.name)):
        tidy.tidied(json.dumps(notebook), path.name, repository)


# ── What cells name is there ────────────────────────────────────────────────────────────────────────────────────────


def names_bound(tree: ast.AST) -> set[str]:
    """Every name that a cell gives a meaning, anywhere in it."""
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    found |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    imports = [alias for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) for alias in n.names]
    return found | {(alias.asname or alias.name).split(".")[0] for alias in imports}


def imported(tree: ast.AST) -> dict[str, object]:
    """What a cell imports from lorakit, by the name it has there."""
    found = {}
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import) else ():
            if alias.name == "lorakit":
                found[alias.asname or alias.name] = importlib.import_module(alias.name)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lorakit":
            for alias in node.names:
                try:
                    thing = getattr(importlib.import_module(node.module), alias.name)
                except AttributeError:
                    thing = importlib.import_module(f"{node.module}.{alias.name}")
                found[alias.asname or alias.name] = thing
    return found


def resolved(node: ast.AST, known: dict[str, object]) -> object | None:
    """The thing of lorakit's that `a.b.c` names; None where it is not known before the cell runs.

    Raises:
        AttributeError: there is no such thing.
    """
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolved(node.value, known)
        if isinstance(owner, types.ModuleType | type):
            return getattr(owner, node.attr)
    return None


def faults(sources: list[str]) -> list[str]:
    """What cells name and nobody gave a meaning, or call with words it does not take."""
    wrong, bound, known = [], set(GIVEN), {}
    for source in sources:
        tree = ast.parse(source)
        here = names_bound(tree)
        bound |= here
        known = {name: thing for name, thing in known.items() if name not in here} | imported(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id not in bound:
                wrong.append(f"{node.id} is not bound in this cell or an earlier one")
            elif isinstance(node, ast.Attribute | ast.Call):
                try:
                    thing = resolved(node.func if isinstance(node, ast.Call) else node, known)
                    words = {keyword.arg: ... for keyword in getattr(node, "keywords", ())}
                    if isinstance(node, ast.Call) and thing is not None and None not in words:  # None: of **words
                        inspect.signature(thing).bind(*node.args, **words)
                except (AttributeError, TypeError) as error:
                    wrong.append(str(error))
    return sorted({*wrong})  # an attribute that is called is met twice


@every_notebook
def test_what_cells_name_is_there(path):
    pytest.importorskip("torch")
    assert faults([python(cell) for cell in code_cells(path)]) == []


def test_what_is_not_there_would_be_found():
    begin = "from lorakit import demo\nfrom lorakit.widgets.dataset import Pictures"
    assert faults([begin, "x = 1", "demo.config(steps=x)\nPictures('p', kind='style')"]) == []
    for cell in ("demo.confog()", "demo.copy()", "demo.copy('a', into='b')", "y", "Pictures(cind='style')"):
        assert len(faults([begin, cell])) == 1, cell
    assert faults(["import lorakit as lk", "lk.plan.predict(lk.demo.config())"]) == []
    for cell in ("lk.plam", "lk.plan.predikt", "lk.plan.predict()", "lk.run.Run('a', foldr='b')"):
        assert len(faults(["import lorakit as lk", cell])) == 1, cell


# ── Set-up ──────────────────────────────────────────────────────────────────────────────────────────────────────────

# What a kernel does with a cell, where lorakit is not on the path.
KERNEL = """
import sys
from pathlib import Path
from IPython.core.interactiveshell import InteractiveShell

sys.path[:] = [*sys.argv[1:], "", *(p for p in sys.path if p and not Path(p, "lorakit", "__init__.py").is_file())]
shell = InteractiveShell.instance()
for _ in range(2):  # a cell is run again and again
    if not shell.run_cell(Path("cell.txt").read_text()).success:
        sys.exit(1)
"""
STUB = 'echo "set up for $LORAKIT_PYTHON"'


def set_up(folder: Path, repository: str = "", path: Path | None = None) -> subprocess.CompletedProcess:
    """Run the set-up cell in a folder, twice; `path` comes first on the kernel's."""
    cell = tidy.SETUP.format(address=repository) + "\nfrom lorakit import __version__\nprint(__version__)"
    (folder / "cell.txt").write_text(cell)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"IPYTHONDIR": str(folder / ".ipython"), "NO_COLOR": "1", "GIT_TERMINAL_PROMPT": "0"}
    command = [sys.executable, "-c", KERNEL, *([str(path)] if path else [])]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def checkout(folder: Path, script: str = STUB) -> Path:
    """Something like a checkout."""
    (folder / "lorakit").mkdir(parents=True)
    (folder / "lorakit" / "__init__.py").write_text(f"__version__ = 'that of {folder.name}'\n")
    (folder / "colab_setup.sh").write_text(script + "\n")
    return folder


def test_set_up_without_an_address_says_what_to_do(tmp_path):
    (tmp_path / "lorakit" / "runs").mkdir(parents=True)  # a folder of that name is no package
    done = set_up(tmp_path)
    assert done.returncode == 1 and "FileNotFoundError" in done.stdout
    assert "fatal" not in done.stdout + done.stderr and "git" not in done.stderr  # nothing is cloned from nowhere


@pytest.mark.parametrize("where", ["lorakit-main", "..", "."])
def test_set_up_finds_a_checkout_beside_or_above(tmp_path, where):
    here = tmp_path / "my lora" / "notebooks"
    here.mkdir(parents=True)
    made = checkout(here / where)
    done = set_up(here)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"that of {made.name}") == 2
    assert done.stdout.count(f"set up for {sys.executable}") == 2  # what went missing meanwhile comes back


def test_set_up_leaves_an_installed_lorakit_alone(tmp_path):
    site = checkout(tmp_path / "site-packages")
    (site / "colab_setup.sh").unlink()
    done = set_up(checkout(tmp_path / "other"), path=site)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["that", "of", "site-packages"] * 2


def test_set_up_clones_what_the_field_names(tmp_path):
    made, here = checkout(tmp_path / "published"), tmp_path / "here"
    here.mkdir()
    as_me = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "."], [*as_me, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", "-C", made, *command], check=True)
    done = set_up(here, repository=f"file://{made}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"set up for {sys.executable}") == 2 == done.stdout.count("that of published")


def test_a_set_up_that_fails_ends_the_cell(tmp_path):
    checkout(tmp_path / "lorakit-main", "echo no room; exit 1")
    done = set_up(tmp_path)
    assert done.returncode == 1 and "no room" in done.stdout and "RuntimeError" in done.stdout
    here = tmp_path / "here"
    here.mkdir()
    done = set_up(here, repository=f"file://{tmp_path}/nothing")
    assert done.returncode == 1 and "RuntimeError" in done.stdout and "that of" not in done.stdout


# ── Run whole ───────────────────────────────────────────────────────────────────────────────────────────────────────


WIDGET = "application/vnd.jupyter.widget-view+json"


class Page(DisplayPublisher):
    """What cells show: (name or None, data of each kind). What is shown anew under a name takes its place."""

    shown = List()

    def publish(self, data, metadata=None, *_, transient=None, update=False, **__):
        name = (transient or {}).get("display_id")
        if update:
            self.shown = [(each, data if each == name else old) for each, old in self.shown]
        else:
            self.shown = [*self.shown, (name, data)]


@dataclass(frozen=True)
class Cell:
    source: str
    printed: str
    shown: list[dict]  # data by their kinds


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """Runs a notebook whole, in an IPython of this process and the test's folder; texts in its cells exchanged.

    Args:
        script: run colab_setup.sh in the set-up cell; otherwise it is only named there.
    """
    folder = tmp_path / "notebook"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)  # IPython would look for its packages
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(builtins, "display", display, raising=False)  # what IPython puts there goes again
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    stub = tmp_path / "bin" / "bash"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\necho "set up $LORAKIT_PYTHON by $1"\n')
    stub.chmod(0o755)

    def execute(name: str, exchanged: dict[str, str], script: bool = False) -> list[Cell]:
        path = ROOT / "notebooks" / name
        module, settings, cells = types.ModuleType("lorakit_cells"), Config(), []
        settings.HistoryManager.enabled = False
        shell = InteractiveShell.instance(config=settings, user_module=module, display_pub_class=Page)
        shell.display_trap.hook = lambda result: None if result is None else display(result)
        try:
            for cell in code_cells(path):
                source = "".join(cell["source"])
                for old, new in exchanged.items():
                    source = source.replace(old, new)
                before = len(shell.display_pub.shown)
                with redirect_stdout(io.StringIO()) as printed, monkeypatch.context() as here:
                    if not script:
                        here.setenv("PATH", f"{stub.parent}{os.pathsep}{os.environ['PATH']}")
                    shell.run_cell(source).raise_error()
                cells.append((source, printed.getvalue(), before))
            shown = [data for _, data in shell.display_pub.shown]
        finally:
            shell.atexit_operations()
            atexit.unregister(shell.atexit_operations)
            InteractiveShell.clear_instance()
            sys.modules.pop(module.__name__, None)
        ends = [before for *_, before in cells[1:]] + [len(shown)]
        whole = [Cell(*text, shown[start:end]) for (*text, start), end in zip(cells, ends, strict=True)]
        if not script:
            assert names(whole[0].printed, sys.executable, ROOT / "colab_setup.sh")
        return whole

    return execute


def cell_of(cells: list[Cell], call: str) -> Cell:
    """The one that contains a call."""
    (found,) = [cell for cell in cells if call in cell.source]
    return found


def kinds(cells: list[Cell], kind: str) -> int:
    """How many outputs have data of a kind."""
    return sum(kind in data for cell in cells for data in cell.shown)


def test_quickstart_runs_whole_and_shows_what_it_promises(executed, small_bases):
    """With few steps on a smaller base: whether it learns is test_demo's question."""
    cells = executed("quickstart.ipynb", browser.shorter_quickstart(small_bases["sd15"]), script=True)
    assert kinds(cells, "image/png") == 3  # loss, before/after, prompt
    assert cell_of(cells, "run.scan_dataset(").shown[0]["text/html"].count("<img") > 20
    assert names(cell_of(cells, "plan.predict(").shown[0]["text/plain"], 2)  # steps
    assert Path("runs", "quickstart", "flatto.safetensors").is_file()
    facts = ast.literal_eval(cells[-1].shown[-1]["text/plain"])
    assert (facts["family"], facts["hash"]) == ("sd15", "verified")


def test_a_dataset_is_prepared_from_end_to_end(executed):
    pytest.importorskip("torch")
    cells = executed("prepare_dataset.ipynb", {})
    assert kinds(cells, WIDGET) == 2 and names(cell_of(cells, "dataset.draft_captions(").printed, 0)
    assert names(cell_of(cells, "dataset.audit_captions(").printed, "flatto")
    assert len(list(Path("pictures").rglob("*.png"))) == 30


@pytest.mark.usefixtures("weights_only")
def test_a_run_is_made_compared_and_exported(executed, small_bases):
    """With few steps on a smaller base; where a run is there, that is taken."""
    smaller = f"base={str(small_bases['sd15'])!r}, resolution=32, bucket_step=8, steps=2, save_every=1"
    shorter = {"steps=100, batch_size=2, save_every=50": smaller, "validate_every=50": "validate_every=1"}
    run = Path("runs", "demo").absolute()
    cells = executed("compare_and_export.ipynb", shorter)
    assert names(cell_of(cells, "run.Run(").printed, run)
    (exported,) = Path("exports").iterdir()
    assert exported.name in [f"flatto-step-00000{n}.safetensors" for n in (1, 2)]
    before = (run / "log.jsonl").read_bytes()
    cells = executed("compare_and_export.ipynb", {"download = False": "download = True"})
    assert f'download="{exported.name}"' in cell_of(cells, "hosts.download(").shown[-1]["text/html"]
    assert (run / "log.jsonl").read_bytes() == before


@pytest.mark.usefixtures("weights_only")
def test_train_lora_goes_the_whole_way_and_goes_on_when_run_again(executed):
    """With few steps; the second time the finished run is found, with its settings, and nothing is trained again."""
    shorter = {
        "name=name, trigger": "name=name, steps=2, batch_size=1, validate_every=2, sample_every=2, trigger",
        "validation_share=0.1": 'validation_share=0.04, sample_prompts=("flatto style, pizza",), sample_steps=1',
        'strengths = "0, 0.7, 1"': 'strengths = "1"',
    }
    executed("train_lora.ipynb", shorter)
    run = Path("runs", "flatto_v1")
    log = (run / "log.jsonl").read_text()
    assert log.count("\n") == 2 and "validation_loss" in log
    (exported,) = Path("exports").glob("*.safetensors")
    assert exported.stat().st_size > 1e6 and Path("flatto_v1.settings.json").is_file()
    cells = executed("train_lora.ipynb", shorter)
    assert (run / "log.jsonl").read_text() == log
    assert kinds(cells, WIDGET) == 6  # pictures, captions, settings, training, comparison, proof
    assert kinds([cell_of(cells, "training.train()")], "image/png") == 1  # the loss, which stays
