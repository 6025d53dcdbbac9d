"""Importing lavender is cheap, and imports inside the package run one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lavender"

# Lower ranks know nothing of higher ones. `if TYPE_CHECKING` imports do not count.
RANKS = [
    {"errors", "types"},
    {"config"},
    {"words", "images", "handle", "kernels"},
    {"data", "maps"},
    {"students", "teachers", "targets"},
    {"batches", "extraction", "evaluation", "patching", "doctor"},
    {"training", "testing"},
    {"miniworld"},
    {"cli"},
]
RANK_OF = {name: rank for rank, names in enumerate(RANKS) for name in names}


def test_importing_lavender_loads_no_model_library():
    code = (
        "import sys, lavender; heavy = {'torch', 'triton', 'diffusers', 'transformers', 'peft', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; lavender.patch; assert 'torch' in sys.modules; assert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _imported(path: Path) -> set[str]:
    """Top-level lavender modules that a file imports at run time, anywhere in it."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    depth = len(path.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == depth and id(node) not in skipped:
            if node.module == "miniworld.scenes":  # plain data that imports nothing of the package
                continue
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            found.update(name for name in names if name in RANK_OF)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    wrong = {name for name in _imported(path) if RANK_OF[name] > RANK_OF[own]}
    assert not wrong, f"{own} must not import {wrong}"


def test_only_recipes_and_families_name_model_classes():
    allowed = {"miniworld", "students", "teachers", "training"}
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] not in allowed:
            assert "ForConditionalGeneration" not in path.read_text(), path
