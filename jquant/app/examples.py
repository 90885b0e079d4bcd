"""What a command calibrates or measures on, as batches: arrays of a file, or what code yields.

    images.npy                one input
    pairs.npz                 the function's inputs, in the order of the arrays in the file, or of a
                              model of transformers by the names that its forward gives them
    package.module:batches    a callable of no arguments that returns batches

The first axis of arrays counts examples. Without any of these, what the model's maker gave, or
windows of text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from cyclopts import Parameter
from numpy.lib.npyio import NpzFile

from jquant.app.named_inputs import arrays_of, need_fitting
from jquant.app.recipes import in_batches
from jquant.app.sources import Model, called, names_maker
from jquant.app.texts import need_text, some, windows_of

AT_ONCE = 32  # examples in a batch, at most


CALIBRATION, MEASURED = 16, 8  # windows of text, unless the command line says otherwise


@Parameter(name="*")
@dataclass(frozen=True)
class Examples:
    """What a command line says about the examples to work on: its options."""

    samples: Annotated[
        int | None,
        Parameter(
            help=f"How many windows of text (default: {CALIBRATION} to calibrate, {MEASURED} to "
            "measure), or of the batches (default: all)."
        ),
    ] = None
    length: Annotated[
        int | None,
        Parameter(help="Tokens per window; default: 512, or the model's context if it is shorter."),
    ] = None
    text: Annotated[
        Path | None,
        Parameter(
            help="Text: a UTF-8 file, .jsonl or .parquet; default: Python's own help. 80 % "
            "calibrates, 20 % measures."
        ),
    ] = None
    batches: Annotated[
        str | None,
        Parameter(
            help="Inputs in place of text: a .npy or .npz file, or module:function that returns "
            "a list of batches."
        ),
    ] = None


def calibration(model: Model, asked: Examples) -> list[Any]:
    """The batches that a model is calibrated on.

    Raises:
        ValueError: as `read_batches` and `windows_of`, or there are not so many.
    """
    batches = _given(model, asked)
    return in_batches(_windows(model, asked, 0)) if batches is None else batches


def held_out(model: Model, asked: Examples) -> list[Any]:
    """The batches that a model is measured on: of text, what calibration does not see.

    Raises:
        ValueError: as `calibration`.
    """
    batches = _given(model, asked)
    return one_by_one([_windows(model, asked, 1)]) if batches is None else batches


def one_by_one(batches: Iterable[Any]) -> list[Any]:
    """Batches of one example each, of batches whose arrays have a first axis of examples.

    A batch whose arrays differ in their first axis stays as it is.

    Example:
        >>> [batch.shape for batch in one_by_one([np.zeros((2, 8)), np.zeros((1, 8))])]
        [(1, 8), (1, 8), (1, 8)]
    """
    return [one for batch in batches for one in _examples(batch)]


def count_examples(batches: Iterable[Any]) -> int:
    """How many examples batches hold: the first axis of their first arrays."""
    return sum(len(jax.tree.leaves(batch)[0]) for batch in batches)


def count_tokens(batches: Iterable[Any]) -> int:
    """How many tokens batches hold: elements of their first arrays, where these are integers."""
    firsts = (np.asarray(jax.tree.leaves(batch)[0]) for batch in batches)
    return sum(first.size for first in firsts if first.dtype.kind in "iu")


def _examples(batch: Any) -> list[Any]:
    leaves, structure = jax.tree.flatten(batch)
    counts = {np.shape(leaf)[:1] for leaf in leaves}
    if len(counts) != 1 or counts == {()}:
        return [batch]
    ((count,),) = counts
    return [structure.unflatten([x[at : at + 1] for x in leaves]) for at in range(count)]


def _given(model: Model, asked: Examples) -> list[Any] | None:
    """The batches of a file, of a callable or of the maker; None where text is to be read."""
    if asked.batches is not None and asked.text is not None:
        raise ValueError("--batches and --text both say what to work on; leave out one")
    if asked.batches is not None:
        batches = read_batches(asked.batches, getattr(model.fn, "inputs", ()))
        need_fitting(model, batches, asked.batches)
    elif model.batches is not None and asked.text is None:
        batches = batch_list(model.batches, model.source)
        need_fitting(model, batches, f"batches of {model.source}")
    elif model.is_made and model.tokenizer is None:
        raise ValueError(
            f"nothing to run {model.source} on: pass --batches FILE.npz or module:function, let "
            "the callable return (fn, params, batches), or pass --tokenizer for a language model"
        )
    else:
        return None
    if asked.samples is None:
        return batches
    return some(batches, asked.samples, "there are", "batches")


def _windows(model: Model, asked: Examples, part: int) -> np.ndarray:
    """Windows `[N, length]` of text: of part 0 of it, to calibrate on, or of 1, to measure on."""
    need_text(model.fn, model.source)
    windows = windows_of(model.fn, model.tokenizer, asked.length, asked.text)[part]
    usual = (CALIBRATION, MEASURED)[part]
    return some(windows, usual if asked.samples is None else asked.samples)


def read_batches(source: str, inputs: Sequence[str] = ()) -> list[Any]:
    """The batches that a file or a callable holds: each a tuple of inputs, or the only input.

    Arrays of a `.npz` file that have the names of the inputs are put in the order of these.

    Raises:
        ValueError: no such file or callable, arrays of different lengths, or nothing in them.
    """
    if names_maker(source):
        return batch_list(called(source), source)
    path = Path(source)
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"--batches {source}: expected a .npy or .npz file, or module:function")
    with arrays_of(path) as value:
        if isinstance(value, NpzFile):
            names = inputs if set(value.files) == set(inputs) else value.files
            arrays = [value[name] for name in names]
        else:
            arrays = [value]
    counts = {array.shape[:1] for array in arrays}
    if len(counts) != 1 or counts <= {(), (0,)}:
        shapes = ", ".join(str(array.shape) for array in arrays) or "none"
        raise ValueError(f"{source}: arrays must have one first axis of examples, got {shapes}")
    return _cut(arrays)


def batch_list(batches: Iterable[Any], source: str) -> list[Any]:
    """Batches as a list.

    Raises:
        ValueError: they cannot be iterated over, are one array or tuple, or none.
    """
    if isinstance(batches, tuple) or hasattr(batches, "shape") or not isinstance(batches, Iterable):
        raise ValueError(f"{source}: expected a list of batches, got {type(batches).__name__}")
    listed = list(batches)
    if not listed:
        raise ValueError(f"{source}: no batches")
    return listed


def _cut(arrays: list[np.ndarray]) -> list[Any]:
    """Arrays in equal batches of at most `AT_ONCE` examples, so that one program serves all."""
    count = len(arrays[0])
    size = max(k for k in range(1, AT_ONCE + 1) if count % k == 0)
    parts = [tuple(a[at : at + size] for a in arrays) for at in range(0, count, size)]
    return parts if len(arrays) > 1 else [only for (only,) in parts]
