"""Lazy packages: `import lorakit` is instant, and torch is loaded with the first name that needs it."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def attach(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the `__getattr__` and `__dir__` (PEP 562) of a package whose names are imported on first use.

    The names are those that its `__init__.py` imports under `if TYPE_CHECKING`, so that editors and type checkers see
    what Python does.
    """
    module = sys.modules[package]
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    blocks = [node.body for node in tree.body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block if isinstance(node, ast.ImportFrom)]
    sources = {alias.asname or alias.name: (str(node.module), alias.name) for node in imports for alias in node.names}

    def __getattr__(name: str) -> Any:
        if name not in sources:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        source, original = sources[name]
        return import_module(f"{package}.{name}") if source == package else getattr(import_module(source), original)

    return __getattr__, lambda: sorted(module.__all__)
