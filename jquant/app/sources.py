"""The model that a command works on: of files that `models.load` reads, or of the user's code.

`package.module:make` names a callable of no arguments. It returns `(fn, params)` or `(fn, params,
batches)`, or an object with attributes of these names. What `jquant quantize` makes of such a model
is a folder with its weights; the function stays where it is, and a file never names code to run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jquant import models
from jquant.io import lazy_orbax, load, save
from jquant.models.quantized import CHECKPOINT
from jquant.models.tokenizing import tokenizer_named
from jquant.trees.lazy import realize

_NAME = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")


@dataclass(frozen=True, eq=False)
class Model:
    """A function, its parameters, and what belongs to them.

    Attributes:
        source: what the command line calls it.
        fn: `fn(params, *inputs)`.
        params: its parameters, which may be lazy.
        tokenizer: of a language model, or None.
        batches: what the maker gave to calibrate on, or None.
        is_made: whether code made it, and not `models.load`.
    """

    source: str
    fn: Any
    params: Any
    tokenizer: Any = None
    batches: Iterable[Any] | None = None
    is_made: bool = False

    def save(self, folder: Path, qparams: Any) -> Path:
        """Write quantized parameters to a folder; the path of the checkpoint in it."""
        if not self.is_made:
            return models.save_quantized(folder, self.fn, qparams, self.tokenizer)
        folder.mkdir(parents=True, exist_ok=True)
        save(folder / CHECKPOINT, qparams, metadata={"made by": self.source})
        return folder / CHECKPOINT

    def parameters(self, folder: str) -> Any:
        """The parameters in a folder that `save` wrote, in the tree of this model's.

        Raises:
            CheckpointError, TreeError: there are none, or they do not fit.
        """
        path = Path(folder)
        return load(path if path.is_file() else path / CHECKPOINT, like=self.params)


def opened(
    source: str,
    *,
    params: Path | None = None,
    tokenizer: str | None = None,
    lazy: bool = False,
    **choices: Any,
) -> Model:
    """The model of a name, file or folder.

    Args:
        source: `package.module:make`, or what `models.load` takes.
        params: the folder of an Orbax checkpoint, for a model that code makes: its parameters, read
            lazily into the tree that the code makes, which may hold shapes alone.
        tokenizer: take the tokenizer from this instead.
        lazy: leave parameters in their files.
        choices: what else `models.load` is told.

    Raises:
        CheckpointError, TreeError: files are missing, damaged, or do not fit.
        ValueError: there is no such callable, it returns something else, or `params` is given for a
            model that has its own, or `architecture` for one that code makes.
    """
    need_options(source, params, choices.get("architecture"))
    if not names_maker(source):
        return Model(source, *models.load(source, lazy=lazy, tokenizer=tokenizer, **choices))
    fn, made, batches = _made(source)
    if params is not None:
        made = lazy_orbax(params, like=made)
    elif any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(made)):
        raise ValueError(f"{source} returned shapes in place of parameters; pass --params FOLDER")
    words = None if tokenizer is None else tokenizer_named(tokenizer)
    return Model(source, fn, made if lazy else realize(made), words, batches, is_made=True)


def need_options(source: str, params: Path | None, architecture: str | None) -> None:
    """ValueError: an option that is for code is given for a file, or one for files for code."""
    if params is not None and not names_maker(source):
        raise ValueError(f"--params is for models that code makes; {source} has its own")
    if architecture is not None and names_maker(source):
        raise ValueError(f"--architecture is for Hugging Face folders; {source} is code of its own")


def names_maker(source: str) -> bool:
    """Whether a source has the form `package.module:make`, and there is no file of that name."""
    return _NAME.fullmatch(source) is not None and not Path(source).exists()


def called(name: str) -> Any:
    """What the callable that `package.module:name` names returns; the working folder's count too.

    Raises:
        ValueError: there is no such module, it has no such callable, or the callable needs
            arguments; or the user's code raises something, with the line of it that does.
    """
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    with _telling(f"{name}: importing {module!r}"):
        try:
            there = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError as error:  # a package above it, or what that one imports
            if not f"{module}.".startswith(f"{error.name}."):
                raise
            there = False
    if not there:
        raise ValueError(f"{name}: no module {module!r} on Python's path or in {here}")
    with _telling(f"{name}: importing {module!r}"):
        value: Any = importlib.import_module(module)
    for part in attribute.split("."):
        value = getattr(value, part, None)
    if not callable(value):
        has = [key for key, own in vars(sys.modules[module]).items() if callable(own)]
        own = ", ".join(key for key in has if not key.startswith("_"))
        raise ValueError(f"{name}: {module} has no callable {attribute!r}; it has {own or 'none'}")
    try:
        inspect.signature(value).bind()
    except TypeError as error:
        raise ValueError(f"{name} is called without arguments: {error}") from error
    with _telling(name):
        return value()


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
    """ValueError: the user's code raises something; says what, and where."""
    try:
        yield
    except Exception as error:  # of whatever kind: it is not our code
        raise ValueError(
            f"{what} raised {type(error).__name__}: {error} ({_place(error)}JQUANT_DEBUG=1 shows "
            "all of it)"
        ) from error


def _place(error: Exception) -> str:
    """The last line of the user's code that an error went through; "" if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (__file__, importlib.__file__)
    theirs = [f for f in frames if f.filename not in ours and not f.filename.startswith("<frozen")]
    outside = [frame for frame in theirs if "site-packages" not in frame.filename] or theirs
    return f"{outside[-1].filename}, line {outside[-1].lineno}; " if outside else ""


def _made(maker: str) -> tuple[Callable[..., Any], Any, Iterable[Any] | None]:
    """`(fn, params, batches)` as the callable returns them; batches may be None."""
    value = called(maker)
    if not isinstance(value, tuple):
        parts = [getattr(value, name, None) for name in ("fn", "params", "batches")]
    else:
        parts = [*value, None] if len(value) == 2 else [*value]
    if len(parts) != 3 or not callable(parts[0]) or parts[1] is None:
        shown = f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
        raise ValueError(
            f"{maker} returned {shown}; it must return (fn, params), (fn, params, batches) or an "
            "object with these attributes, fn being called as fn(params, *inputs)"
        )
    return parts[0], parts[1], parts[2]
