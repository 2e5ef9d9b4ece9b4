import ast
import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def python(cell) -> str:
    """The cell without IPython's own lines."""
    lines = "".join(cell["source"]).splitlines()
    return "\n".join(line.replace(line.strip(), "pass") if line.strip()[:1] in "!%" else line for line in lines if line)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_cells_are_thin_and_hold_no_outputs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"]
    assert notebook["metadata"]["accelerator"] == "GPU" and notebook["metadata"]["colab"]["gpuType"] == "T4"
    for cell in code_cells(path):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        assert cell["metadata"]["cellView"] == "form" and cell["source"][0].startswith("#@title")
        tree = ast.parse(python(cell))
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.For, ast.While)
        assert not [node for node in ast.walk(tree) if isinstance(node, kinds)], cell["source"][0]


def executed(name, folder, monkeypatch, **exchanged):
    """A notebook, run whole in a folder of its own; texts in its cells exchanged."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # tracing takes as long again
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    for cell in notebook.cells:
        for old, new in exchanged.items():
            cell.source = cell.source.replace(old, new)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    return outputs


def test_quickstart_runs_whole_and_shows_what_it_promises(tmp_path, monkeypatch):
    """With few steps: whether it learns is test_demo's question."""
    shorter = {"steps = 400": "steps = 20", "seed=seed)": "seed=seed, sample_steps=4)"}
    outputs = executed("quickstart.ipynb", tmp_path, monkeypatch, **shorter)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4  # pictures, loss, before/after, prompt
    assert (tmp_path / "runs" / "quickstart" / "flatto.safetensors").is_file()
    assert "'family': 'sd15'" in str(outputs[-1]) and "'hash': 'verified'" in str(outputs[-1])


def test_a_dataset_is_prepared_from_end_to_end(tmp_path, monkeypatch):
    outputs = executed("prepare_dataset.ipynb", tmp_path, monkeypatch)
    panels = [output for output in outputs if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
    assert len(panels) == 2 and "0 captions drafted" in str(outputs)
    assert "flatto" in str(outputs[-1])
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 30
