"""What pyproject.toml cannot say: the CUDA C++ sources of csrc/ travel as data of the package. Nothing is compiled here."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lavender*"]), "lavender.csrc"],
    package_dir={"lavender.csrc": "csrc"},
    package_data={
        "lavender": ["py.typed"],
        "lavender.csrc": ["*.cuh"],
        "lavender.miniworld": ["report.html.jinja", "study.json", "weights/**/*"],
    },
)
