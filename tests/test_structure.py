"""The shape of the code base: what imports what, what is public, what is never used."""

import ast
import importlib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jquant"

# A module or folder imports only from the rows above its own. Inside a folder, imports must not
# form a cycle. `jquant/__init__.py` is not here: it gathers the public names and holds nothing.
RANKS = (
    ("placement",),
    (
        "errors",
        "blocks",
        "calls",
        "client",
        "distortion",
        "distances",
        "extremes",
        "lazy",
        "narrow",
        "noise",
        "objectives",
        "opaque",
        "packed",
        "significand",
    ),  # fmt: skip
    ("interpreter",),
    ("grids",),
    ("activations",),
    ("qtensor",),
    ("arguments",),
    ("calibration",),
    ("rounding", "compensation"),
    ("scheme",),
    ("standin",),
    ("report", "progress", "solve", "checks", "citations"),
    ("allocation", "presets", "emulation", "inference", "io"),
    ("work", "learning"),
    ("fingerprint", "job", "whole"),
    ("tuning",),
    ("quantize",),
    ("evaluate", "recipes", "estimate"),
    ("models",),
    ("console", "texts"),
    ("listing", "budgets"),
    ("demo",),
    ("cli",),
    ("__main__",),
)

# Installed only with an extra, so imported only inside the functions that need them.
OPTIONAL = {
    "beartype", "chex", "equinox", "haiku", "hypothesis", "matplotlib", "orbax", "ot", "ott",
    "pandas", "pytest", "tensorstore", "torch",
}  # fmt: skip

# Running what a file says, or reading arrays that may hold objects.
FORBIDDEN = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE.parent)) for path in FILES]
each_file = pytest.mark.parametrize("path", FILES, ids=NAMES)


def module_of(path: Path) -> str:
    """`jquant/grids/base.py` as `jquant.grids.base`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[str]:
    """The modules that a tree imports, by their full dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            assert node.module is not None
            yield node.module
            # `from jquant import grids` names a module, not the package it lies in.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_module_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported, `if TYPE_CHECKING:` left out."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def rank(top: str) -> int:
    found = [i for i, row in enumerate(RANKS) if top in row]
    assert found, f"jquant.{top} has no rank; give it one in tests/test_structure.py"
    return found[0]


def own_imports(path: Path) -> set[str]:
    """The modules of jquant that a file imports, without the package itself."""
    known = {module_of(p) for p in FILES}
    tree = ast.parse(path.read_text("utf-8"))
    named = {name for name in imports(tree) if name.split(".")[0] == "jquant"}
    return {name for name in named if name in known} - {"jquant", module_of(path)}


@each_file
def test_imports_point_down(path: Path) -> None:
    module = module_of(path)
    if module == "jquant":
        return
    top = module.split(".")[1]
    for name in own_imports(path):
        other = name.split(".")[1]
        assert other == top or rank(other) < rank(top), f"{module} imports {name}"


def test_no_cycles_inside_a_folder() -> None:
    graph = {
        module_of(path): {
            name for name in own_imports(path)
            if name.rpartition(".")[0] == module_of(path).rpartition(".")[0]
        }
        for path in FILES
        if path.name != "__init__.py"
    }  # fmt: skip
    left = dict(graph)
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left, f"these import each other: {sorted(left)}"


@each_file
def test_files_are_short_and_open_with_their_idea(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text)), "a file opens with its idea"


@each_file
def test_nothing_forbidden_is_used(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    for name in imports(tree):
        assert not name.startswith("jax._src"), f"{name} is private to JAX"
        assert name.split(".")[0] not in FORBIDDEN, f"{name} runs what a file says"
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle" or ast.unparse(node.value) == "False"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), ast.unparse(node)
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, "an except without a type hides errors"


@each_file
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    for statement in at_module_level(ast.parse(path.read_text("utf-8"))):
        for name in imports(statement):
            assert name.split(".")[0] not in OPTIONAL, f"{name} at module level"


@pytest.mark.parametrize("module", [module_of(p) for p in FILES if p.name != "__main__.py"])
def test_public_names_exist_and_are_documented(module: str) -> None:
    loaded = importlib.import_module(module)
    public = getattr(loaded, "__all__", [])
    assert len(public) == len(set(public)), "a name stands twice in __all__"
    for name in public:
        value = getattr(loaded, name)
        if isinstance(value, (type, types.FunctionType, types.ModuleType)):
            assert value.__doc__ and value.__doc__.strip(), f"{module}.{name} has no docstring"
            generated = isinstance(value, type) and value.__doc__.startswith(f"{name}(")
            assert not generated, f"{module}.{name} has only the docstring dataclass made"


# Where each takes the dtype, counted from zero; without one it follows `jax_enable_x64`.
MAKERS = {"zeros": 1, "ones": 1, "empty": 1, "full": 2, "eye": 3, "arange": 3, "linspace": 5,
          "normal": 2, "uniform": 2}  # fmt: skip


@each_file
def test_arrays_are_made_of_a_dtype(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if ast.unparse(node.func.value) in ("jnp", "jax.numpy", "jax.random"):
            place = MAKERS.get(node.func.attr, 0)
            told = len(node.args) > place or any(key.arg == "dtype" for key in node.keywords)
            assert told or not place, f"{ast.unparse(node)}: its dtype depends on jax_enable_x64"
