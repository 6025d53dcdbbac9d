"""The tests that documents name are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`((?:tests/[\w/]+\.py)?)::(\w+)`")


def test_every_row_of_what_users_do_names_a_test_that_is_there():
    """A name without a file is of the file before it in its row."""
    text = (ROOT / "docs/training.md").read_text()
    rows = [line for line in text.partition("## What users")[2].partition("## Memory")[0].splitlines() if line.startswith("|")]
    named = []
    for row in rows:
        file = ""
        for path, name in NAMED.findall(row):
            file = path or file
            named.append((file, name))
    assert len(named) > len(rows)
    functions = {
        file: {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)}
        for file in {file for file, _ in named}
    }
    assert [(file, name) for file, name in named if name not in functions[file]] == []
