"""The rooms stand on floors: a room imports only from floors below its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "lorakit"
FLOORS = [
    {"files"},
    {"config", "fetch", "measures", "original", "processes", "quantize"},
    {"archive", "index", "kohya", "video"},
    {"dataset", "captions", "buckets"},
    {"base", "adapter", "optim", "loss", "audit", "decisions"},
    {"prompting", "memory", "lora", "draft", "check", "eyes"},
    {"cache"},
    {"sample", "plan", "metadata"},
    {"train", "generate"},
    {"checkpoint", "evaluate", "initial", "export", "plots", "board", "backup"},
    {"record", "prepare", "merge"},
    {"live", "hub", "hosts", "compare"},
    {"run", "report"},
    {"trials"},
    {"demo"},
    {"widgets"},
    {"__main__"},
]
LEVEL = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def rooms_imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "lorakit":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorakit."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lorakit.")}
    return found


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: f.relative_to(ROOT).as_posix())
def test_imports_point_down(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    room = parts[0]
    if room == "__init__":
        assert rooms_imported(file) == set()
        return
    assert room in LEVEL, f"{room} stands on no floor: give it one"
    for other in rooms_imported(file) - {room}:
        assert LEVEL[other] < LEVEL[room], f"{room} imports {other}, which is not below it"


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_lorakit_loads_nothing_heavy():
    assert not loaded_by("import lorakit") & {"torch", "numpy", "diffusers", "pydantic"}


def test_the_lower_rooms_need_no_torch():
    rooms = ", ".join(f"lorakit.{room}" for room in ("config", "dataset", "buckets", "captions", "audit"))
    assert not loaded_by(f"import {rooms}") & {"torch", "diffusers", "transformers"}


def test_help_at_the_terminal_loads_no_torch():
    assert "torch" not in loaded_by("import lorakit.__main__")


def test_no_pickle_is_loaded_anywhere():
    for file in ROOT.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for forbidden in ("torch.load(", "import pickle", "joblib", "allow_pickle=True", "torch.save("):
            assert forbidden not in text, f"{file.name} uses {forbidden}"
