"""Makes an environment for each package, measures its recipes there, and writes what came of it.

    python -m benchmarks.zoo                     # all packages
    python -m benchmarks.zoo tunix flax:make     # some; results of the others stay
    python -m benchmarks.zoo --python 3.13       # on another Python than the packages' own

Needs nothing but Python, pip and the network. Environments lie in `build/zoo` and are made again
when what they are to hold changes. What fails (an interpreter, an installation, a recipe) is a row
of the results too, with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.environments import Failed, run
from benchmarks.harness import RESULTS, machine
from benchmarks.zoo.environments import FOLDER, environment
from benchmarks.zoo.packages import PACKAGES, Package, Recipe

# Programs are small and many: what counts is that they are compiled fast, and once.
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "PYTHONWARNINGS": "ignore",
}


def measured(recipe: Recipe, python: Path) -> dict[str, Any]:
    """The row of a recipe: what `measure.py` found, or why it found nothing."""
    settings = os.environ | SETTINGS | {"JAX_COMPILATION_CACHE_DIR": str(FOLDER / "programs")}
    try:
        said = run([str(python), "-m", "benchmarks.zoo.measure", recipe.maker], env=settings)
    except Failed as failure:
        return {"failed": str(failure)}
    return json.loads(said.splitlines()[-1])


def rows_of(package: Package, version: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a package's recipes and their makers, each when it is there."""
    python, failed = None, ""
    try:
        python = environment(package, version)
    except Failed as failure:
        failed = f"installing: {failure}"
    for recipe in package.recipes:
        row = {"failed": failed} if python is None else measured(recipe, python)
        today = datetime.date.today().isoformat()
        yield recipe.maker, {"package": package.name, "name": recipe.name, "date": today, **row}


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Rows with the new ones in place of the old, in the order of `PACKAGES`; others are gone.

    Example:
        >>> one, two = PACKAGES[0].recipes[0].maker, PACKAGES[1].recipes[0].maker
        >>> merged({two: 2, "a recipe that was": 0}, {one: 1}) == {one: 1, two: 2}
        True
    """
    every = [recipe.maker for package in PACKAGES for recipe in package.recipes]
    return {maker: {**old, **new}[maker] for maker in every if maker in old or maker in new}


def asked_for(names: Collection[str]) -> list[Package]:
    """The packages of these names, with those of their recipes that are named; of none, all.

    Raises:
        ValueError: there is no package or recipe of a name.

    Example:
        >>> [[r.name for r in package.recipes] for package in asked_for(["tunix:qwen3"])]
        [['Qwen3']]
    """
    short = {r.maker.removeprefix("benchmarks.zoo."): p for p in PACKAGES for r in p.recipes}
    there = {package.name for package in PACKAGES} | set(short)
    if unknown := sorted(set(names) - there):
        raise ValueError(f"no {', '.join(unknown)}; there are {', '.join(sorted(there))}")
    chosen = []
    for package in PACKAGES:
        every = not names or package.name in names
        recipes = tuple(r for r in package.recipes if every or r.maker.split(".")[-1] in names)
        chosen += [replace(package, recipes=recipes)] if recipes else []
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="packages, or recipes such as tunix:qwen3")
    parser.add_argument("--python", help="a version such as 3.13; default: each package's own")
    asked = parser.parse_args()
    try:
        packages = asked_for(asked.names)
    except ValueError as error:
        parser.error(str(error))
    path = RESULTS / "zoo.json"
    for package in packages:
        print(f"{package.name}: {', '.join((*package.requirements, *package.bare))}", flush=True)
        for maker, row in rows_of(package, asked.python or package.python):
            print(f"  {maker}: {row.get('failed') or round(row['gptq'], 4)}", flush=True)
            old = json.loads(path.read_text())["rows"] if path.exists() else {}
            result = {"machine": machine(), "rows": merged(old, {maker: row})}
            path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
