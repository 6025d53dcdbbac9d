"""The doctor lists every optional package by the commands that need it, and says what is missing."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from lavender.cli import app
from lavender.doctor import examine_machine
from lavender.errors import OPTIONAL_PACKAGES

HIDDEN = [name for name in OPTIONAL_PACKAGES if name != "triton"]
NEEDED = {"diffusers", "pyarrow", "filelock", "datasets", "accelerate", "peft", "jinja2", "rich", "matplotlib"}
"""Those that commands need as they are by default."""


class _Finder:
    """Finds none of some packages, installed or not."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def hide(monkeypatch):
    def hide(names):
        for name in names:
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "meta_path", [_Finder(names), *sys.meta_path])

    return hide


def test_every_package_is_listed_by_what_needs_it(hide):
    for installed in (True, False):
        if not installed:
            hide(HIDDEN)
        findings = {finding.topic: finding for finding in examine_machine()}
        for name in HIDDEN:
            finding, package = findings[name], OPTIONAL_PACKAGES[name]
            for command in package.commands:
                assert f"lavender {command}" in finding.result
            for use in package.uses:
                assert use in finding.result
            if not installed:
                assert finding.result.startswith("not installed; for ")
                said = finding.remedy or finding.result
                assert f"'lavender-attention[{package.extra}]'" in said or not package.extra
                assert "pip install" in said
                assert bool(finding.remedy) == (name in NEEDED), name


@pytest.mark.parametrize(("name", "code"), [("peft", 1), ("pyarrow", 1), ("matplotlib", 1), ("ray", 0), ("torchvision", 0)])
def test_the_command_ends_by_what_a_command_lacks(hide, name, code):
    hide([name])
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == code
    assert f"{name} " in result.output
    assert "not installed; for" in result.output


def test_a_package_of_which_metadata_alone_is_left_is_not_installed(monkeypatch):
    """As after a removal that was cut off."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "rich" else find(name, *rest))
    [finding] = [finding for finding in examine_machine() if finding.topic == "rich"]
    assert finding.result == "not installed; for lavender demo"
