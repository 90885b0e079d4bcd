"""The shape of the code base: what imports what, what is public, what is never used."""

import ast
import functools
import importlib
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.structure import BRANCHY, branches

PACKAGE = Path(__file__).parents[1] / "jquant"

# A folder or module imports only from the rows above its own. Inside a folder, imports must not
# form a cycle. The two doors are not here: `jquant/__init__.py` gathers the public names and holds
# nothing, and `jquant/__main__.py` calls the command line.
RANKS = (
    ("errors", "deprecated"),
    ("numerics", "trees", "axes"),
    ("grids", "programs"),
    ("weights", "arithmetic"),
    ("calibration", "inference"),
    ("rounding", "io", "evaluate"),
    ("schemes", "formats"),
    ("layerwise", "models", "exchange"),
    ("learning", "exporters", "adapters"),
    ("jobs",),
    ("allocation",),
    ("app",),
)
DOORS = ("jquant", "jquant.__main__")

# Installed only with an extra, or costly to import, so imported only inside the functions that need
# them. Two folders are imported when they are used, and may import what nothing in them works
# without.
OPTIONAL = {
    "beartype", "chex", "cyclopts", "equinox", "flax", "gguf", "haiku", "huggingface_hub",
    "hypothesis", "jinja2", "matplotlib", "optax", "orbax", "ot", "ott", "pandas", "pyarrow",
    "pytest", "rich", "safetensors", "scipy", "tensorstore", "tokenizers", "torch", "torchax",
    "transformers",
}  # fmt: skip
WHEN_USED = {
    "models": {"flax", "gguf", "huggingface_hub", "safetensors", "tokenizers"},
    "app": {"cyclopts", "rich"},
}

# Running what a file says, or reading arrays that may hold objects.
FORBIDDEN = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text("utf-8")) for path in FILES}


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


def at_module_level(tree: ast.Module | ast.ClassDef) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported, `if TYPE_CHECKING:` left out."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ClassDef):
            yield from at_module_level(node)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def rank(top: str) -> int:
    found = [i for i, row in enumerate(RANKS) if top in row]
    assert found, f"jquant.{top} has no rank; give it one in tests/test_structure.py"
    return found[0]


def own_imports(path: Path) -> set[str]:
    """The modules of jquant that a file imports, without the package itself."""
    known = {module_of(p) for p in FILES}
    named = {name for name in imports(TREES[path]) if name.split(".")[0] == "jquant"}
    return {name for name in named if name in known} - {"jquant", module_of(path)}


def each_file(law: Callable[[Path], Iterator[str]]) -> Callable[[], None]:
    """A test that a law, which yields what offends against it, holds for every file."""

    @functools.wraps(law)
    def test() -> None:
        offences = [f"{path.relative_to(PACKAGE.parent)}: {x}" for path in FILES for x in law(path)]
        assert not offences, "\n".join(offences)

    del test.__wrapped__  # pytest would ask it for the argument
    return test


@each_file
def test_imports_point_down(path: Path) -> Iterator[str]:
    module = module_of(path)
    if module in DOORS:
        return
    top = module.split(".")[1]
    for name in own_imports(path):
        other = name.split(".")[1]
        if other != top and rank(other) >= rank(top):
            yield f"imports {name}, which does not lie below"


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
def test_files_are_short_and_open_with_their_idea(path: Path) -> Iterator[str]:
    lines = len(path.read_text("utf-8").splitlines())
    if lines > 400:
        yield f"{lines} lines, where 400 are allowed"
    if not ast.get_docstring(TREES[path]):
        yield "a file opens with its idea"


@each_file
def test_no_function_forks_too_often(path: Path) -> Iterator[str]:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef) and (forks := branches(node)) >= BRANCHY:
            yield f"{node.name} has {forks} branches, where {BRANCHY - 1} are allowed"


@each_file
def test_nothing_forbidden_is_used(path: Path) -> Iterator[str]:
    for name in imports(TREES[path]):
        if name.startswith("jax._src"):
            yield f"{name} is private to JAX"
        if name.split(".")[0] in FORBIDDEN:
            yield f"{name} runs what a file says"
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.keyword):
            if node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                yield "arrays that hold objects run what a file says"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("eval", "exec"):
                yield ast.unparse(node)
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"line {node.lineno}: an except without a type hides errors"


@each_file
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> Iterator[str]:
    folder = path.relative_to(PACKAGE).parts[0]
    optional = OPTIONAL - WHEN_USED.get(folder, set())
    for statement in at_module_level(TREES[path]):
        for name in imports(statement):
            if name.split(".")[0] in optional:
                yield f"{name} at module level"


def test_importing_jquant_imports_nothing_heavy() -> None:
    """No time is taken here, `benchmarks.imports` does that; what costs it is told by name."""
    script = "import sys, jquant; print(*sys.modules, sep=chr(10))"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    tops = {name.split(".")[0] for name in loaded}
    assert "jquant.jobs.quantize" in loaded
    assert not tops & OPTIONAL
    assert not {f"jquant.{folder}" for folder in WHEN_USED} & set(loaded)


def test_what_is_imported_when_used_is_there_all_the_same() -> None:
    script = """
import jquant as jq
assert "models" in dir(jq) and "models" in jq.__all__
assert jq.models.Decoder.__module__ == "jquant.models.decoder"
from jquant import models
assert models is jq.models
assert not hasattr(jq, "no_such_name")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_an_extra_the_error_names_it() -> None:
    script = """
import sys
sys.modules.update(dict.fromkeys(("cyclopts", "flax", "rich", "scipy")))  # as if not installed
import jquant as jq
def models(): jq.models
def command(): import jquant.app.cli
def table(): jq.Report({}).table()
def distance(): jq.distances.assignment([0.0], [1.0])
for use in (models, command, table, distance):
    try:
        use()
    except ImportError as error:
        print(error)
"""
    messages = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    extras = ("models", "cli", "cli", "distances")
    assert len(messages) == len(extras), messages
    for line, extra in zip(messages, extras, strict=True):
        assert line.endswith(f": pip install 'jquant-jax[{extra}]'"), line


@each_file
def test_public_names_exist_and_are_documented(path: Path) -> Iterator[str]:
    if path.name == "__main__.py":
        return
    module = importlib.import_module(module_of(path))
    public = getattr(module, "__all__", [])
    if len(public) != len(set(public)):
        yield "a name stands twice in __all__"
    for name in public:
        value = getattr(module, name)
        if isinstance(value, (type, types.FunctionType, types.ModuleType)):
            doc = (value.__doc__ or "").strip()
            if not doc or (isinstance(value, type) and doc.startswith(f"{name}(")):
                yield f"{name} has no docstring, or only the one that dataclass made"


def names(node: ast.AST) -> Iterator[str]:
    """The identifiers that one node of a tree reads, binds or passes by keyword."""
    match node:
        case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
            yield name
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.keyword(arg=str(name)) | ast.alias(asname=str(name)):
            yield name
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
            yield name


# Words that say how a value came about, or that somebody asked for it, not what it is.
VAGUE = {"found", "known", "said", "wanted"}


@each_file
def test_names_say_what_a_thing_is(path: Path) -> Iterator[str]:
    for node in ast.walk(TREES[path]):
        for name in VAGUE.intersection(names(node)):
            yield f"line {getattr(node, 'lineno', 0)}: {name!r} names anything; say what it is"


# Where each takes the dtype, counted from zero; without one it follows `jax_enable_x64`.
MAKERS = {"zeros": 1, "ones": 1, "empty": 1, "full": 2, "eye": 3, "arange": 3, "linspace": 5,
          "normal": 2, "uniform": 2}  # fmt: skip


@each_file
def test_arrays_are_made_of_a_dtype(path: Path) -> Iterator[str]:
    for node in ast.walk(TREES[path]):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if ast.unparse(node.func.value) in ("jnp", "jax.numpy", "jax.random"):
            place = MAKERS.get(node.func.attr, 0)
            told = len(node.args) > place or any(key.arg == "dtype" for key in node.keywords)
            if place and not told:
                yield f"{ast.unparse(node)}: its dtype depends on jax_enable_x64"


# Where public names lay before the folders were ranked.
FORMERLY = {
    "activations": ("Activations", "Percentile"),
    "blocks": ("Groups", "Layout"),
    "citations": ("cite",),
    "compensation": ("LoRC",),
    "emulation": ("emulate",),
    "estimate": ("Estimate", "estimate"),
    "lazy": ("Lazy", "realize"),
    "progress": ("Progress",),
    "qtensor": ("LowRank", "QTensor", "dequantize", "tree_map_weights"),
    "quantize": ("quantize",),
    "report": ("Report",),
    "scheme": ("Plan", "Scheme", "keep"),
    "solve": ("quantize_weight",),
    "tuning": ("tune_scales",),
}


def test_old_paths_of_public_names_lead_to_them() -> None:
    package = importlib.import_module("jquant")
    for module, names in FORMERLY.items():
        for name in names:
            old = getattr(importlib.import_module(f"jquant.{module}"), name)
            assert old is getattr(package, name), f"jquant.{module}.{name}"
    for module in ("distances", "objectives", "presets"):
        assert importlib.import_module(f"jquant.{module}") is getattr(package, module)
    assert isinstance(package.quantize, types.FunctionType)
