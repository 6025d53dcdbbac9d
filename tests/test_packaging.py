"""Installing builds nothing: no compiler and no torch, and the CUDA C++ sources come along."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What a build needs, copied: it leaves build/ and an egg-info folder behind."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("lavender", "csrc", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    return built(checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    run(["-c", code], checkout)
    return next(folder.glob("*.tar.gz"))


def run(arguments: list[str], cwd: Path, **variables: str) -> str:
    """The output of a Python whose PATH is one folder with nothing in it: no compiler."""
    empty = cwd / "empty"
    empty.mkdir(exist_ok=True)
    environment = {**os.environ, "PATH": str(empty), **variables}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(source: Path, folder: Path) -> Path:
    """The wheel that pip builds from a folder or an sdist, as a user's does: in an environment that has setuptools alone."""
    run(["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir", "--wheel-dir", ".", str(source)], folder)
    return next(folder.glob("*.whl"))


def names_in(wheel: Path) -> set[str]:
    return {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_a_wheel_has_every_file_of_the_package_alone_and_nothing_compiled(checkout, wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    package = {path.relative_to(checkout).as_posix() for path in (checkout / "lavender").rglob("*") if path.is_file()}
    kernels = {f"lavender/csrc/{path.name}" for path in (checkout / "csrc").glob("*.cuh")}
    assert kernels >= {"lavender/csrc/device.cuh", "lavender/csrc/row_maps.cuh", "lavender/csrc/column_maps.cuh"}
    assert "lavender/miniworld/weights/student/model.safetensors" in package
    assert names_in(wheel) == package | kernels


def test_an_sdist_gives_the_same_wheel(checkout, wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"csrc/{path.name}" for path in (checkout / "csrc").glob("*.cuh")} <= names
    assert names_in(built(sdist, tmp_path)) == names_in(wheel)


def test_installed_kernels_are_the_packages_own(checkout, wheel, tmp_path):
    target = tmp_path / "installed"
    run(["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)], tmp_path)
    code = "from lavender.kernels.cuda import driver; print(driver.sources()); print(driver.source('row_maps.cuh'), end='')"
    folder, _, text = run(["-c", code], tmp_path, PYTHONPATH=str(target)).partition("\n")
    assert Path(folder) == target / "lavender" / "csrc"
    assert text == (checkout / "csrc" / "row_maps.cuh").read_text()
