"""The folder listing is the architecture: imports run down its floors, and nowhere in a circle.

Every import counts: at any depth, inside functions, under `TYPE_CHECKING`. DESIGN.md says what each floor is for.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lavender"

FLOORS = [
    {"types", "errors", "files", "signals"},
    {"config", "words", "images", "handle", "kernels", "pretrained"},
    {"data", "maps"},
    {"students", "teachers", "targets"},
    {"batches", "extraction", "evaluation", "patching", "doctor"},
    {"training", "testing"},
    {"miniworld", "benchmarks", "app"},
    {"cli"},
    {"__init__", "__main__", "deprecated"},
]
"""The rooms of lavender/, from the ground up. A room may import those of lower floors, and files of its own floor that are no
side of the method."""
SIDES = {"students", "teachers", "targets"}
"""Rooms that know nothing of each other."""
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(path: Path) -> Iterator[str]:
    """The modules of lavender that a file imports, however deep the import stands."""
    package = module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "lavender")
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])]) if node.level else node.module
            )
            if base.split(".")[0] == "lavender":
                for alias in node.names:
                    yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


GRAPH = {module: sorted(set(imported(path)) - {module}) for module, path in MODULES.items()}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def circle(graph: dict[str, list[str]]) -> list[str]:
    """One circle of a graph, or nothing."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        found = next((c for other in graph.get(node, []) if (c := visit(other, [*path, node]))), [])
        done.add(node)
        return found

    return next((c for node in graph if (c := visit(node, []))), [])


def test_every_room_has_a_floor():
    rooms = {
        path.stem if path.is_file() else path.name
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms <= FLOOR_OF.keys(), f"give them a floor: {rooms - FLOOR_OF.keys()}"


@pytest.mark.parametrize("module", GRAPH)
def test_imports_run_down(module):
    room = room_of(module)
    for other in GRAPH[module]:
        target = room_of(other)
        if target == room:
            continue
        assert FLOOR_OF[target] <= FLOOR_OF[room], f"{module} imports {other}, which is above it"
        assert not (room in SIDES and target in SIDES), f"{module} imports {other}, another side of the method"


def children(package: str) -> dict[str, list[str]]:
    """What the files and folders directly in a package import of each other."""
    depth = package.count(".") + 1
    graph: dict[str, set[str]] = {}
    for module, others in GRAPH.items():
        if module.startswith(package + "."):
            child = module.split(".")[depth]
            inside = {other.split(".")[depth] for other in others if other.startswith(package + ".")}
            graph.setdefault(child, set()).update(inside - {child})
    return {child: sorted(others) for child, others in graph.items()}


def test_no_file_imports_in_a_circle():
    assert not circle(GRAPH)


@pytest.mark.parametrize("package", sorted(module for module, path in MODULES.items() if path.name == "__init__.py"))
def test_no_folder_imports_in_a_circle(package):
    assert not circle(children(package))


def test_importing_lavender_loads_no_model_library():
    code = (
        "import sys, lavender; heavy = {'torch', 'triton', 'diffusers', 'transformers', 'peft', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; lavender.patch; assert 'torch' in sys.modules; assert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_families_and_training_name_model_classes():
    allowed = {"students", "teachers", "training"}
    for path in FILES:
        if path.relative_to(PACKAGE).parts[0] not in allowed:
            assert "ForConditionalGeneration" not in path.read_text(), path


def test_the_root_is_short_and_so_is_every_file():
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 13
    for folder in (PACKAGE, ROOT / "recipes", ROOT / "tests", ROOT / "bench"):
        for path in folder.rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 600, path


RUNS_NO_CODE = {
    "PeftConfig",
    "PeftModel",
    "UNet2DConditionModel",
    "denoiser_class",
    "kind",
    "kind.config_class",
    "type(self.pipe.scheduler)",
}
"""What is no `Auto` class and no `DiffusionPipeline`: classes that the libraries have, which know of no code of a model's own."""


def test_no_model_runs_code_of_its_own():
    """transformers asks on standard input whether to run it where nobody says no."""
    calls = [
        (path, node)
        for folder in (PACKAGE, ROOT / "recipes", ROOT / "examples", ROOT / "bench")
        for path in sorted(folder.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config", "from_pipe", "from_single_file", "download")
    ]
    assert len(calls) > 20
    for path, node in calls:
        says = [keyword.value for keyword in node.keywords if keyword.arg == "trust_remote_code"]
        refuses = any(isinstance(value, ast.Constant) and value.value is False for value in says)
        exempt = not says and ast.unparse(node.func.value) in RUNS_NO_CODE
        assert refuses or exempt, f"{path}:{node.lineno}: say trust_remote_code=False"
