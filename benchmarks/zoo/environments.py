"""Environments under `build/zoo`: a base with JAX, Flax and jquant, and a layer for each package.

JAX takes longer to unpack than all the rest, so it is installed once.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.environments import ROOT, made
from benchmarks.zoo.packages import BASE, Package

FOLDER = ROOT / "build" / "zoo"


def environment(package: Package, version: str) -> Path:
    """The interpreter of a package's environment, which is made where it is not as it should be.

    Raises:
        Failed: there is no such Python, or pip cannot install what is asked.
    """
    declared = (ROOT / "pyproject.toml").read_text()
    own = ["--editable", f"{ROOT}[cli]", *BASE]
    base = made(FOLDER / f"base-{version}", version, [*BASE, declared], own)
    asked = [*BASE, *package.requirements, *package.bare, declared]
    folder = FOLDER / f"{package.name}-{version}"
    return made(folder, version, asked, package.requirements, package.bare, base)
