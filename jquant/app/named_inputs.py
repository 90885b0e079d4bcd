"""What a model of `transformers` takes besides text, told and checked before work starts.

Arrays of a file count by their names where these are arguments of the model's `forward`
(`input_ids`, `attention_mask`, …), and by their order otherwise.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.lib.npyio import NpzFile

from jquant.app.sources import Model, names_maker
from jquant.calibration.tokens import TokenWeights
from jquant.errors import UnsupportedPrimitiveError
from jquant.models import Decoder, TorchFunction
from jquant.models.torch_module import torch_module
from jquant.weights.arguments import inputs_of, shapes_of

# What arrays of these names hold. Of others nothing is told, nor asked.
TOKENS, MASK = "whole numbers [examples, tokens]", "0 or 1 [examples, tokens]"
NAME = "attention_mask"
MEANINGS = {
    "input_ids": TOKENS,
    "decoder_input_ids": TOKENS,
    "token_type_ids": TOKENS,
    "position_ids": TOKENS,
    NAME: MASK,
    "decoder_attention_mask": MASK,
    "pixel_values": "floats [examples, channels, height, width]",
    "input_features": "floats [examples, features, frames]",
    "input_values": "floats [examples, samples]",
}


def taken(fn: TorchFunction) -> str:
    """The inputs of a function, by name, with what they hold."""
    named = (f"{name} ({MEANINGS[name]})" if name in MEANINGS else name for name in fn.inputs)
    return ", ".join(named)


def taking(model: Model, batches: str | None) -> Model:
    """The model with the inputs that the arrays of a `.npz` file name, if they name any.

    Raises:
        ValueError: some of the names are the model's inputs, others are not.
    """
    names = names_in(batches)
    if not isinstance(model.fn, TorchFunction) or not names:
        return model
    forward = type(torch_module(model.fn.config)).forward
    arguments = set(inspect.signature(forward).parameters) - {"self"}
    if arguments.isdisjoint(names):
        return model
    if strange := [name for name in names if name not in arguments]:
        raise ValueError(
            f"{batches}: {strange[0]!r} is no input of {model.fn.config.architecture}; it takes "
            f"{taken(model.fn)}, or others of: {', '.join(sorted(arguments))}"
        )
    usual = [name for name in model.fn.inputs if name in names]
    inputs = (*usual, *(name for name in names if name not in usual))
    return replace(model, fn=replace(model.fn, inputs=inputs))


def names_in(batches: str | None) -> tuple[str, ...]:
    """The names of the arrays of a `.npz` file; of anything else none."""
    if batches is None or names_maker(batches) or Path(batches).suffix != ".npz":
        return ()
    with arrays_of(batches) as file:
        return tuple(file.files) if isinstance(file, NpzFile) else ()


@contextlib.contextmanager
def arrays_of(path: str | Path) -> Iterator[np.ndarray | NpzFile]:
    """What a `.npy` or `.npz` file holds; arrays of the latter are read in the `with` block.

    Raises:
        OSError: it cannot be opened.
        ValueError: NumPy cannot read it, there or in the block.
    """
    with open(path, "rb") as file:
        try:
            yield np.load(file, allow_pickle=False)
        except Exception as error:  # of damaged files zipfile, zlib and tokenize raise their own
            raise ValueError(f"{path} cannot be read as NumPy arrays: {error!r:.200}") from error


def real_tokens(model: Model, batches: Sequence[Any]) -> TokenWeights | None:
    """What tokens count: those that an attention mask `[examples, tokens]` keeps.

    Rows whose tokens are not known are counted, and reports say so. None where nothing is masked,
    and of a model with tokens of two kinds, as a decoder beside its encoder has them.
    """
    names = model.fn.inputs if isinstance(model.fn, TorchFunction) else ()
    if NAME not in names or any(name.startswith("decoder_") for name in names):
        return None
    at = names.index(NAME)
    masks = [np.asarray(inputs_of(batch)[at]) for batch in batches]
    if any(mask.ndim != 2 for mask in masks) or all(mask.all() for mask in masks):
        return None
    return TokenWeights(lambda *inputs: np.asarray(inputs[at]) != 0, unmatched="count")


def need_fitting(model: Model, batches: Sequence[Any], source: str) -> None:
    """ValueError: a model cannot be run on batches; says why, or what it takes."""
    fn, each = model.fn, {_types(batch): inputs_of(batch) for batch in batches}
    for types, inputs in each.items():
        shapes = ", ".join(f"{dtype} {shape}" for shape, dtype in types)
        if not isinstance(fn, TorchFunction):
            problem = _refusal(fn, model.params, inputs)
            if problem is not None:
                raise ValueError(f"{source}: {model.source} cannot be run on {shapes}: {problem}")
            continue
        problem = _problem(fn, model.params, inputs)
        if problem is not None:
            raise ValueError(
                f"{source}: {problem}; {model.source} takes {taken(fn)}, and gets {shapes}"
            )
    if isinstance(fn, TorchFunction | Decoder):
        for batch in batches:
            _need_tokens(model, inputs_of(batch), source)


def _types(batch: Any) -> tuple[Any, ...]:
    leaves = jax.tree.leaves(inputs_of(batch))
    return tuple((np.shape(x), str(getattr(x, "dtype", type(x).__name__))) for x in leaves)


def _problem(fn: TorchFunction, params: Any, inputs: Sequence[Any]) -> str | None:
    """Why a function cannot be run on inputs like these; None: it can."""
    if len(inputs) != len(fn.inputs):
        return f"{len(inputs)} inputs in place of {len(fn.inputs)}"
    for name, value in zip(fn.inputs, inputs, strict=True):
        meaning, kind = MEANINGS.get(name, ""), np.asarray(value).dtype.kind
        if meaning.startswith("whole") and kind not in "iu":
            return f"{name} are no whole numbers"
        if meaning.startswith("floats") and kind != "f":
            return f"{name} are no floats"
    refusal = _refusal(fn, params, inputs)
    return None if refusal is None else f"{fn.config.architecture} refuses them: {refusal}"


def _refusal(fn: Any, params: Any, inputs: Sequence[Any]) -> str | None:
    """What a function raises of inputs like these, in a line; None: nothing."""
    shapes, given = shapes_of(params, tuple(inputs))
    try:
        jax.eval_shape(fn, shapes, *given)
    except UnsupportedPrimitiveError:
        raise
    except Exception as error:  # of PyTorch's own checks, of JAX's, of the user's code
        line = next(iter(str(error).splitlines()), "")
        return f"{type(error).__name__}: {line:.200}"
    return None


def _need_tokens(model: Model, inputs: Sequence[Any], source: str) -> None:
    names = model.fn.inputs if isinstance(model.fn, TorchFunction) else ("input_ids",)
    for name, value in zip(names, inputs, strict=True):
        vocab = model.fn.config.vocab
        if name.endswith("input_ids") and vocab and np.size(value):
            least, most = int(np.min(value)), int(np.max(value))
            if least < 0 or most >= vocab:
                raise ValueError(
                    f"{source}: {name} holds token {least if least < 0 else most}; "
                    f"{model.source} has tokens 0 to {vocab - 1}"
                )
