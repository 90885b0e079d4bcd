"""The formats that can be written, a row of a table each.

A row says which weights a format holds, and how its configuration is said; how a folder is written
is the same for all but GGUF, which is one file. To add a format of Hugging Face folders is to write
these two functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jquant.errors import FormatError, near
from jquant.exporters import compressed_tensors, gguf_types, mlx, qwix, transposed
from jquant.exporters.described import Described, Holding
from jquant.formats.transposed import BITS

Config = Callable[[Sequence[tuple[str, Holding]], Sequence[str]], dict[str, Any]]


class Target(NamedTuple):
    """A format of Hugging Face folders, or GGUF.

    Attributes:
        name: of the format.
        hold: how it holds a weight; FormatError: it does not, and why.
        nearest: a weight that it does hold, near to one that it does not; None: there is none.
        holds: what it can hold, in words.
        config: the `quantization_config` of the modules by name and of the linear modules that are
            not quantized; None: the folder has none.
        alike: whether all modules are held in one way.
        modules: the kinds of modules whose weights can be quantized, see `hugging_face.kind_of`;
            None: all.
        key: of `config.json` under which `config` stands.
        tree: whether it is a checkpoint of Orbax, of the parameters of any function.
        library: whose class the tree is of, see `jquant.models.tree_names`; empty: of nobody's.
        scanned: whether its layers are stacked.
        stacks: whether the experts of a layer are one tensor, as MLX has them.
    """

    name: str
    hold: Callable[[Described], Holding]
    nearest: Callable[[Described], Described | None]
    holds: str
    config: Config | None = None
    alike: bool = False
    modules: tuple[str, ...] | None = ("linear", "expert")
    key: str = "quantization_config"
    tree: bool = False
    library: str = ""
    scanned: bool = False
    stacks: bool = False


def _as_array(weight: Described) -> Holding:
    if weight.inputs is not None:
        raise FormatError("quantized inputs, of which an array says nothing")
    return Holding(None)


def _in_a_tree(weight: Described) -> Holding:
    del weight
    return Holding(None, kind="plain arrays")


def _without_inputs(weight: Described) -> Described:
    return dataclasses.replace(weight, inputs=None)


_OF_GPTQ = transposed.nearest_of(BITS, 32, 32)
TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            "compressed-tensors", compressed_tensors.hold, compressed_tensors.nearest,
            compressed_tensors.HOLDS, compressed_tensors.config,
        ),
        Target(
            "gptq", transposed.hold_gptq(1), _OF_GPTQ, transposed.GPTQ_HOLDS,
            transposed.gptq_config, alike=True,
        ),
        Target(
            "gptq_v2", transposed.hold_gptq(2), _OF_GPTQ, transposed.GPTQ_HOLDS,
            transposed.gptq_config, alike=True,
        ),
        Target(
            "awq", transposed.hold_awq, transposed.nearest_of((4,), 8, 1), transposed.AWQ_HOLDS,
            transposed.awq_config, alike=True,
        ),
        Target(
            "mlx", mlx.hold, mlx.nearest, mlx.HOLDS, mlx.config,
            modules=("linear", "expert", "table"), key="quantization", stacks=True,
        ),
        Target("gguf", gguf_types.hold, gguf_types.nearest, gguf_types.HOLDS, modules=None),
        Target(
            "orbax", _in_a_tree, lambda weight: weight, "whatever `jquant.save` holds",
            modules=None, tree=True,
        ),
        Target("qwix", qwix.hold, qwix.nearest, qwix.HOLDS, modules=None, tree=True),
        Target(
            "tunix", qwix.hold, qwix.nearest, qwix.HOLDS, modules=("linear",), tree=True,
            library="tunix",
        ),
        *(
            Target(
                name, _as_array, _without_inputs, "arrays of numbers", modules=None, tree=True,
                library=name.partition("-")[0], scanned=name == "maxtext",
            )
            for name in ("tunix-arrays", "maxtext", "maxtext-unscanned")
        ),
        Target(
            "safetensors", _as_array, _without_inputs, "arrays of numbers", modules=None,
        ),
    )
}  # fmt: skip


def target_named(name: str) -> Target:
    """The row of a format.

    Raises:
        FormatError: there is none.
    """
    if name not in TARGETS:
        raise FormatError(
            f"format={str(name)[:80]!r} cannot be written; supported: {', '.join(TARGETS)} "
            f"(near: {near(str(name), TARGETS)})"
        )
    return TARGETS[name]


def held(target: Target, path: str, weight: Described) -> Holding:
    """How a format holds the weight of a path.

    Raises:
        FormatError: it does not; names the path, what stands in the way, and the nearest scheme.

    Example:
        >>> from jquant.axes import Groups
        >>> from jquant.grids import Uniform
        >>> weight = Described((64, 64), Uniform(5, scale_dtype="float16"), Groups("in", 32))
        >>> held(TARGETS["gptq"], "mlp/up", weight)
        Traceback (most recent call last):
        ...
        jquant.errors.FormatError: 'mlp/up': gptq cannot hold the grid Uniform(bits=5, ...
    """
    try:
        return target.hold(weight)
    except FormatError as error:
        instead = target.nearest(weight)
        advice = "keep this weight" if instead is None else f"the nearest that it holds: {instead}"
        raise FormatError(
            f"{path!r}: {target.name} cannot hold {error}; {advice} ({target.name} holds "
            f"{target.holds})"
        ) from error


def need_module(target: Target, path: str, kind: str) -> None:
    """FormatError: a format does not quantize modules of this kind."""
    if target.modules is None or kind in target.modules:
        return
    words = {"linear": "linear layers", "table": "tables of tokens"}
    able = " and ".join(word for name, word in words.items() if name in target.modules)
    raise FormatError(f"{path!r}: {target.name} quantizes {able} alone; keep this weight")


def need_alike(target: Target, holdings: Sequence[tuple[str, Holding]]) -> None:
    """FormatError: weights are held in several ways where a format has one for all."""
    first: dict[Any, str] = {}
    for path, holding in holdings:
        first.setdefault(holding.settings, path)
    if target.alike and len(first) > 1:
        (one, a), (other, b) = list(first.items())[:2]
        raise FormatError(
            f"{target.name} holds all weights alike; {a!r} is {one}, {b!r} is {other}; quantize "
            "them by one scheme, or export to compressed-tensors"
        )
