"""The folders are stages, one above the other: imports point down, and into a folder only through its face."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "lorakit"
FLOORS = [  # a folder, or a file that stands beside them; each imports only what stands on a lower floor
    {"_lazy"},
    {"storage"},
    {"config", "device"},
    {"presets", "kohya"},
    {"dataset"},
    {"plots"},
    {"page"},
    {"base"},
    {"adapter"},
    {"sample"},
    {"train"},
    {"plan"},
    {"run"},
    {"publish", "hosts"},
    {"evaluate"},
    {"demo"},
    {"widgets"},
    {"__main__"},
]
LEVEL = {stage: number for number, stages in enumerate(FLOORS) for stage in stages}
FOLDERS = sorted(folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").exists())
FILES = sorted(ROOT.rglob("*.py"))


def imported(file: Path) -> set[tuple[str, ...]]:
    """The modules of lorakit that a file imports, as paths below it: ("base",) or ("base", "model")."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "lorakit":
            modules |= {(alias.name,) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorakit."):
            parts = tuple(node.module.split(".")[1:])
            submodules = {
                (*parts, alias.name) for alias in node.names if (ROOT.joinpath(*parts, f"{alias.name}.py")).exists()
            }
            modules |= submodules or {parts}
        elif isinstance(node, ast.Import):
            modules |= {tuple(a.name.split(".")[1:]) for a in node.names if a.name.startswith("lorakit.")}
    return modules


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_imports_point_down(file):
    stage = file.relative_to(ROOT).with_suffix("").parts[0]
    if stage == "__init__":
        return
    assert stage in LEVEL, f"{stage} stands on no floor: give it one"
    for other, *inside in imported(file):
        if other != stage:
            assert LEVEL[other] < LEVEL[stage], f"{stage} imports {other}, which is not below it"
            assert not inside or other == "widgets", f"{file} reaches into {other}: take {inside} from lorakit.{other}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_of_a_folder_import_each_other_in_no_circle(folder):
    below = {file.stem: {m[1] for m in imported(file) if m[0] == folder and len(m) > 1}
             for file in (ROOT / folder).glob("*.py") if file.stem != "__init__"}  # fmt: skip
    while below:
        free = {name for name, others in below.items() if not others & below.keys()}
        assert free, f"a circle among {sorted(below)} of {folder}"
        below = {name: others for name, others in below.items() if name not in free}


STAGES = [folder for folder in FOLDERS if folder not in ("demo", "widgets")]


@pytest.mark.parametrize("folder", ["", *STAGES])
def test_a_folder_shows_a_dozen_names(folder):
    package = import_module(f"lorakit.{folder}".rstrip("."))
    assert dir(package) == sorted(package.__all__) and len(package.__all__) <= (12 if folder else 13)


@pytest.mark.parametrize("folder", ["", *STAGES])
def test_what_a_folder_hands_on_is_there(folder):
    pytest.importorskip("torch")
    package = import_module(f"lorakit.{folder}".rstrip("."))
    face = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    handed_on = {alias.name for node in ast.walk(face) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(package.__all__) <= handed_on
    for name in handed_on - {"TYPE_CHECKING", "_lazy"}:
        assert getattr(package, name) is not None
        hidden = folder and (ROOT / folder / f"{name}.py").exists()
        assert not hidden, f"importing the file {folder}/{name}.py hides the name {name}"


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_lorakit_loads_nothing_heavy():
    assert not loaded_by("import lorakit; dir(lorakit)") & {"torch", "numpy", "diffusers", "pydantic"}


def test_datasets_and_settings_need_no_torch():
    use = "lk.Config; lk.preset; lk.dataset.scan; lk.dataset.audit_captions; lk.dataset.check_quality"
    assert not loaded_by(f"import lorakit as lk; {use}") & {"torch", "diffusers", "transformers"}


def test_help_at_the_terminal_loads_no_torch():
    assert "torch" not in loaded_by("import lorakit.__main__")


def test_no_pickle_is_loaded_anywhere():
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        for forbidden in ("torch.load(", "import pickle", "joblib", "allow_pickle=True", "torch.save("):
            assert forbidden not in text, f"{file.name} uses {forbidden}"
