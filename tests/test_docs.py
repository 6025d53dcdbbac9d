"""The tests that documents name are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`((?:tests/[\w/]+\.py)?)::(\w+)`")


SECTIONS = {
    "docs/training.md": ("## What users", "## Memory"),
    "docs/pipelines.md": ("## What users", "\0"),
    "docs/extraction.md": ("## What users", "\0"),
}
"""Documents with tables of what users do: where these begin, and what follows them."""


@pytest.mark.parametrize("document", SECTIONS)
def test_every_row_of_what_users_do_names_a_test_that_is_there(document):
    """A name without a file is of the file before it in its row."""
    text = (ROOT / document).read_text()
    start, end = SECTIONS[document]
    rows = [line for line in text.partition(start)[2].partition(end)[0].splitlines() if line.startswith("| ")][1:]
    named = []
    for row in rows:
        file = ""
        for path, name in NAMED.findall(row):
            file = path or file
            named.append((file, name))
    assert len(named) >= len(rows) > 15
    functions = {
        file: {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)}
        for file in {file for file, _ in named}
    }
    assert [(file, name) for file, name in named if name not in functions[file]] == []
