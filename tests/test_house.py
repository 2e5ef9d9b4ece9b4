"""The folders are stages, one above the other: imports point down, and into a folder only through its face."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "lorakit"
FLOORS = [  # a folder, or a file that stands beside them; each imports only what stands on a lower floor
    {"_lazy", "named"},
    {"storage"},
    {"config", "console"},
    {"device"},
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


# ── Functions ───────────────────────────────────────────────────────────────────────────────────────────────────────

PARAMETERS, LINES, NESTING = 8, 60, 3
LEVELS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)


def nesting(node: ast.AST, level: int = 0) -> int:
    """The deepest level of if, for, while, with, try and match inside a function; an elif is no deeper than its if."""
    deepest = level
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        chained = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, nesting(child, level + (isinstance(child, LEVELS) and not chained)))
    return deepest


def too_much(function: ast.FunctionDef) -> list[str]:
    """The limits that a function breaks."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    count = len(names) + bool(given.vararg) + bool(given.kwarg) - (names[:1] in (["self"], ["cls"]))
    lines, levels = function.end_lineno - function.lineno + 1, nesting(function)
    return [
        f"{size} {what}, at most {limit}"
        for size, limit, what in (
            (count, PARAMETERS, "parameters"),
            (lines, LINES, "lines"),
            (levels, NESTING, "levels"),
        )
        if size > limit
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_functions_fit_on_a_screen(file):
    functions = [n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)]
    assert {f.name: limits for f in functions if (limits := too_much(f))} == {}


def test_what_is_too_much_is_noticed():
    def of(source: str) -> list[str]:
        return too_much(ast.parse(source).body[0])

    assert of("def f(self, a, b, c, d, e, f, g, *, h): ...") == []
    assert of("def f(a, b, c, d, e, f, g, *rest, h): ...") == ["9 parameters, at most 8"]
    assert of("def f():\n" + " a\n" * 59) == [] and of("def f():\n" + " a\n" * 60) == ["61 lines, at most 60"]
    assert of("def f():\n if a:\n  for b in c:\n   with d:\n    e\n   if g: h\n   elif i: j\n") == []
    assert of("def f():\n if a:\n  for b in c:\n   with d:\n    if e: g\n") == ["4 levels, at most 3"]


# ── English ─────────────────────────────────────────────────────────────────────────────────────────────────────────

PAGES = [ROOT.parent / name for name in ("README.md", "CHANGELOG.md", "lorakit/README.md", "notebooks/README.md",
         "tests/bench/README.md", ".github/CONTRIBUTING.md", "colab_setup.sh")]  # fmt: skip
PAGES += sorted((ROOT.parent / "notebooks").glob("*.ipynb"))
AWKWARD = {  # a phrase → what to write instead
    r"\b(is|are|was|were|be) told\b|\btold (of|that|to|where|about)\b": "who sees or gets what: 'shown', 'called with'",
    r"\b(goes|going|gone|went) on\b": "continue, resume",
    r"\b(come|comes|came) down to\b": "reduce",
    r"\bmend(s|ed)?\b": "repair, fix",
    r"\bwhat (it was|they were) taught\b": "what it learned",
    r"\bbeside\b": "next to, in addition to",
    r"\balone\b": "only",
    r"\bin (its|the) midst\b": "during",
    r"\bsays? of (itself|them|it)\b|\bis said of\b": "its metadata",
    r"\bshall\b": "must, will",
    r"\bno word of\b": "nothing about",
}


@pytest.mark.parametrize("file", [*FILES, *PAGES], ids=lambda f: f.relative_to(ROOT.parent).as_posix())
def test_english_is_plain(file):
    text = file.read_text(encoding="utf-8")
    awkward = [
        f"{file.name}:{text[: match.start()].count(chr(10)) + 1}: {match[0]!r}: write {instead}"
        for phrase, instead in AWKWARD.items()
        for match in re.finditer(phrase, text, re.IGNORECASE)
        if not match[0].isupper()  # a constant
    ]
    assert awkward == []


# ── The surface ─────────────────────────────────────────────────────────────────────────────────────────────────────

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
