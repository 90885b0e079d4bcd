"""What the code base is made of, counted: `python -m benchmarks.structure [FOLDER ...]`.

Each folder is a package's, such as `jquant`, or the same package in another checkout, and gets a
column. Nothing is imported: files are read and parsed.

Branches of a function: `if`, conditional expressions, loops, `except`, `case`, every `and` and
`or`, comprehensions and their conditions, of inner functions too. Parameters are counted without
`self` and `cls`. Units are what lies directly in the package: folders and modules. Levels are the
rows of the shortest table in which every unit imports only from rows above its own; 0 means that
units import each other.
"""

from __future__ import annotations

import argparse
import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

BRANCHY = 15
WIDE = 6
FEATURES = ("compensation", "activations")


def branches(function: ast.AST) -> int:
    """How many ways a function forks, see above."""
    forks = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.match_case)
    total = 0
    for node in ast.walk(function):
        if isinstance(node, forks):
            total += 1
        elif isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            total += 1 + len(node.ifs)
    return total


def parameters(function: ast.FunctionDef) -> int:
    """How many parameters a function takes, without `self` and `cls`."""
    names = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return sum(name.arg not in ("self", "cls") for name in names)


def modules(package: Path) -> dict[str, Path]:
    """The modules of a package by their names inside it, `""` for the package itself."""
    named = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """What a tree imports from the package, by names inside it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name.removeprefix(package + ".") for name in names if package + "." in name)


def levels(edges: set[tuple[str, str]], units: set[str]) -> int:
    """The rows of the table of units, or 0 where some import each other."""
    rows, left = 0, set(units)
    while free := {u for u in left if not any(a == u and b in left for a, b in edges)}:
        left -= free
        rows += 1
    return 0 if left else rows


def count(package: Path) -> dict[str, str]:
    """One column of the table."""
    named = modules(package)
    texts = {name: path.read_text("utf-8") for name, path in named.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    lengths = [len(text.splitlines()) for text in texts.values()]
    code = [
        sum(bool(line.strip()) and not line.strip().startswith("#") for line in text.splitlines())
        for text in texts.values()
    ]
    functions = [
        (name, node)
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    doors = {"", "__main__"}
    units = {name.split(".")[0] for name in named} - doors
    edges = {
        (name.split(".")[0], other.split(".")[0])
        for name, tree in trees.items()
        if name not in doors
        for other in imports(tree, package.name)
        if other in named and other.split(".")[0] != name.split(".")[0]
    }
    widest = sorted(((parameters(f), f"{m}.{f.name}") for m, f in functions), reverse=True)
    return {
        "modules": f"{len(named)}",
        "lines": f"{sum(lengths)}",
        "lines of code and docstrings": f"{sum(code)}",
        "median lines of a file": f"{statistics.median(lengths):.0f}",
        "longest file": f"{max(lengths)}",
        "top-level units": f"{len(units)}",
        "levels of imports": f"{levels(edges, units)}",
        "imports between units": f"{len(edges)}",
        "functions": f"{len(functions)}",
        f"functions of {BRANCHY} branches or more": str(
            sum(branches(f) >= BRANCHY for _, f in functions)
        ),
        f"functions of more than {WIDE} parameters": str(
            sum(parameters(f) > WIDE for _, f in functions)
        ),
        "widest": "; ".join(f"{name} {n}" for n, name in widest[:4]),
        **{
            f"files that name `{word}`": str(sum(word in t for t in texts.values()))
            for word in FEATURES
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("jquant")])
    parser.add_argument("--branchy", action="store_true", help="list the functions that fork most")
    args = parser.parse_args()
    columns = [count(folder) for folder in args.folders]
    for row in columns[0]:
        print(f"{row:42}", *(f"{column[row]:>10}" for column in columns))
    if args.branchy:
        for folder in args.folders:
            for name, path in modules(folder).items():
                for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                    if isinstance(node, ast.FunctionDef) and branches(node) >= BRANCHY:
                        print(f"{branches(node):4} {name}.{node.name}")


if __name__ == "__main__":
    main()
