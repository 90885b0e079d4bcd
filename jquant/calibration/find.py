"""Which leaves of a parameter tree are weights, found by running the function abstractly.

A weight is a leaf of two or more axes that reaches a `dot_general`, a convolution, a `ragged_dot`
or an embedding lookup, through any views, calls, loops and branches. Its axes come from the
operation's dimension numbers, never from its rank or name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jaxtyping import Array, PyTree

from jquant.axes.agreement import Spot, counted, digits, is_together, outputs, settled
from jquant.axes.layout import Layout
from jquant.axes.roles import Axes, Kind, Reading, Sighting
from jquant.calibration.crosswise import check_astray
from jquant.calibration.evidence import Evidence
from jquant.calibration.observe import Observer
from jquant.calibration.place import Place
from jquant.calibration.tagged import Tagged, constant, is_key
from jquant.calibration.tokens import Tokens, input_places
from jquant.programs.walker import Walker, trace
from jquant.weights.arguments import path_of, shapes_of


@dataclass(frozen=True)
class Use:
    """One use of a weight: the kind of operation, and the axes it gave the weight.

    `counted` is False for a use whose axes differ from those chosen for the weight: its inputs are
    not in the weight's evidence. `through` are the elementwise operations between the weight and
    this use (masks, noise, other summands), but for multiplication by one number: codes are of the
    weight before them. `together` says that one input meets several of the weight's matrices there
    (layers of a stack as one wide kernel).
    """

    kind: Kind
    in_axes: tuple[int, ...]
    counted: bool = True
    through: tuple[str, ...] = ()
    together: bool = False


@dataclass(frozen=True)
class Weight:
    """A weight as the function uses it. Axis numbers index `split_shape`.

    Attributes:
        path: `/`-joined keys of the leaf.
        shape, dtype: of the leaf.
        in_axes: contracted axes (of a pure lookup: the features), at the use with most rows.
        out_axes: axes that appear in the result (of a pure lookup: the rows).
        batch_axes: axes that run along with the input: stacked layers, experts, conv groups.
        uses: every operation it enters.
        split_shape: `shape`, unless one axis plays two roles and is split in two.
        slices: how many different inputs parts of its outputs meet, as of a fused kernel that is
            sliced. Its evidence is of all of them together.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...]
    uses: tuple[Use, ...]
    split_shape: tuple[int, ...]
    slices: int = 1

    @property
    def note(self) -> str:
        """What is to be known when its evidence is read, or nothing."""
        through = dict.fromkeys(name for use in self.uses for name in use.through)
        notes = [f"codes are of the weight before {', '.join(through)}"] if through else []
        others = [use for use in self.uses if use.kind != "lookup" and not use.counted]
        if others:
            notes.append(f"its inputs over {_axes_in_words(others)} are not counted")
        if self.slices > 1:
            notes.append(f"slices of its outputs meet {self.slices} inputs: one moment of all")
        return "; ".join(notes)

    @property
    def layout(self) -> Layout:
        """How the array is read as `[*batch, out, in]`."""
        return Layout.of(
            self.shape,
            in_axes=self.in_axes,
            batch_axes=self.batch_axes,
            split_shape=self.split_shape,
        )

    @property
    def axes(self) -> Axes:
        """For each axis of the leaf its digits `(size, role)`, outermost first."""
        sizes, roles = iter(self.split_shape), self.layout.axes
        return tuple(tuple((next(sizes), f.role) for f in axis) for axis in roles)

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The axes of the leaf that are a batch axis and nothing else: layers, experts."""
        axes = enumerate(self.layout.axes)
        return tuple(axis for axis, factors in axes if [f.role for f in factors] == ["batch"])

    @property
    def has_inputs(self) -> bool:
        """Whether any use contracts it, so that a second moment exists (a pure lookup has none)."""
        return any(use.kind != "lookup" for use in self.uses)


@dataclass(frozen=True)
class Weights(Mapping[str, Weight]):
    """Mapping path → `Weight`, in the order of the parameter tree.

    `others` says of every other leaf why it is not a weight.
    """

    weights: Mapping[str, Weight]
    others: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, path: str) -> Weight:
        return self.weights[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sightings:
    """All that one run of a function showed: evidence (arrays), and how it belongs (static).

    `values` holds every distinct piece of evidence once; `keys` files it: (path, reading,
    position).
    """

    values: list[Evidence]
    keys: tuple[tuple[str, Reading, int], ...] = field(metadata={"static": True})
    uses: tuple[Sighting, ...] = field(metadata={"static": True})
    mixed: tuple[tuple[str, str], ...] = field(metadata={"static": True})
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = field(metadata={"static": True})
    unmatched: tuple[tuple[str, str], ...] = field(default=(), metadata={"static": True})


def observe(
    fn: Callable[..., Any],
    watched: Callable[[str], bool],
    params: PyTree,
    inputs: tuple[Any, ...],
    spread: bool = False,
    weights: Array | None = None,
) -> Sightings:
    """Run `fn(params, *inputs)` under the walker, watching the leaves whose path is `watched`.

    `weights`: of the tokens of the inputs.
    """
    closed, _ = trace(fn, params, *inputs)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    tokens = None
    if weights is not None:
        places = [Place.blank(leaf.shape) for _, leaf in leaves]
        places += input_places(inputs, weights.shape)
        tokens = Tokens.of(weights, lambda follower: follower.run(closed, places))
    args = [
        Tagged.of(path_of(keys), leaf) if watched(path_of(keys)) else Tagged(leaf)
        for keys, leaf in leaves
    ]
    observer = Observer(spread=spread, tokens=tokens)
    walker = Walker(observer, constant=constant)
    args += [Tagged(x) if is_key(x) else x for x in jax.tree.leaves(inputs)]
    observer.leave(walker.run(closed, args), walker)
    shapes = [(path_of(keys), tuple(leaf.shape)) for keys, leaf in leaves]
    return sightings(walker, observer, shapes)


def sightings(
    walker: Walker, observer: Observer, shapes: Sequence[tuple[str, tuple[int, ...]]]
) -> Sightings:
    """What a walker has emitted and its observer has seen; `shapes` of all leaves by path."""
    values: list[Evidence] = []
    where: dict[int, int] = {}
    for evidence in walker.emitted.values():
        if id(evidence) not in where:
            where[id(evidence)] = len(values)
            values.append(evidence)
    filed = tuple((path, reading, where[id(e)]) for (path, reading), e in walker.emitted.items())
    uses, mixed = tuple(observer.uses.values()), tuple(observer.mixed.items())
    lost = () if observer.tokens is None else tuple(observer.tokens.unmatched.items())
    return Sightings(values, filed, uses, mixed, tuple(shapes), lost)


def find_weights(
    fn: Callable[..., Any], params: PyTree, *inputs: Any, ignore: str | None = None
) -> Weights:
    """The weights of `fn(params, *inputs)`, without computing anything.

    Args:
        fn: any JAX function.
        params: its parameters, arrays or `ShapeDtypeStruct`s.
        *inputs: example inputs, arrays or `ShapeDtypeStruct`s.
        ignore: regular expression; leaves whose whole path matches are treated as plain arrays.

    Raises:
        TreeError: params or inputs hold what is no array or number, or two leaves have one path.
        UnsupportedPrimitiveError: a weight enters an operation that its inputs cannot be read from;
            the message names path and primitive.
        WeightError: parts of a leaf (layers of a stack, slices of a fused kernel) are contracted
            along different axes; the message names path, parts and axes.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}
        >>> weights = find_weights(lambda p, x: x @ p["w"] + p["b"], params, jnp.ones((2, 3)))
        >>> weights["w"].in_axes, weights["w"].out_axes
        ((0,), (1,))
        >>> weights.others
        {'b': 'it has 1 axis'}
    """
    shapes = shapes_of(params, inputs)

    def watched(path: str) -> bool:
        return ignore is None or re.fullmatch(ignore, path) is None

    seen = jax.eval_shape(lambda params, inputs: observe(fn, watched, params, inputs), *shapes)
    uses: dict[str, list[Sighting]] = {}
    for sighting in seen.uses:
        uses.setdefault(sighting.path, []).append(sighting)
    weights: dict[str, Weight] = {}
    others: dict[str, str] = {}
    mixed = dict(seen.mixed)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(shapes[0])[0]:
        path = path_of(keys)
        if path in uses:
            keys = [(reading, at) for name, reading, at in seen.keys if name == path]
            weights[path] = _weight(path, leaf, uses[path], keys)
        elif leaf.ndim < 2:
            others[path] = f"it has {leaf.ndim} {'axis' if leaf.ndim == 1 else 'axes'}"
        elif leaf.size == 0:
            others[path] = "it has no elements"
        elif not watched(path):
            others[path] = f"ignored by {ignore!r}"
        else:
            others[path] = (
                f"it is used by {mixed[path]!r} only" if path in mixed else "it is not used"
            )
    return Weights(weights, others)


def _weight(
    path: str,
    leaf: jax.ShapeDtypeStruct,
    sightings: list[Sighting],
    keys: Sequence[tuple[Reading, int]],
) -> Weight:
    """The weight that these uses, and the evidence gathered there, make of a leaf."""
    axes = settled(sightings, leaf.shape)
    check_astray(path, sightings, leaf.shape, axes)
    flat = [digit for axis in axes for digit in axis]

    def numbers(flat: Sequence[tuple[int, str]], role: str) -> tuple[int, ...]:
        return tuple(k for k, digit in enumerate(flat) if digit[1] == role)

    uses = []
    for _, reading, _, through in sightings:
        inner = numbers([digit for axis in reading.axes(leaf.shape) for digit in axis], "in")
        agrees = reading.kind != "lookup" and counted(reading, axes, leaf.shape)
        together = agrees and is_together(reading, axes, leaf.shape)
        uses.append(Use(reading.kind, inner, agrees, through, together))
    return Weight(
        path, leaf.shape, leaf.dtype,
        numbers(flat, "in"), numbers(flat, "out"), numbers(flat, "batch"),
        tuple(uses), tuple(size for size, _ in flat), _slices(leaf.shape, axes, keys),
    )  # fmt: skip


def _axes_in_words(uses: Sequence[Use]) -> str:
    """The axes that these uses contract, each once."""
    return " and ".join(dict.fromkeys(f"axes {use.in_axes}" for use in uses))


def _slices(shape: Sequence[int], axes: Axes, keys: Sequence[tuple[Reading, int]]) -> int:
    """How many inputs are met by parts of the outputs; 1 where every input meets all outputs.

    Of several matrices (layers, experts), that of those which meet most.
    """
    batch = digits(axes, "batch")
    met: dict[Any, list[tuple[Any, Any]]] = {}
    for reading, at in keys:
        if counted(reading, axes, shape):
            layers = tuple(Spot.of(reading, digit, shape).index for digit in batch)
            shown = ((out, (at, which)) for out, which in outputs(reading, axes, shape))
            met.setdefault(layers, []).extend(shown)
    if len(met) == 1:
        return max(map(_inputs, met.values()))
    each: dict[Any, list[tuple[Any, Any]]] = {}
    for layers, seen in met.items():
        for matrix in itertools.product(*layers):
            each.setdefault(matrix, []).extend(seen)
    return max(map(_inputs, each.values()), default=1)


def _inputs(met: Sequence[tuple[Any, Any]]) -> int:
    """How many inputs parts of the outputs meet, where not all of these meet all of those."""
    inputs: dict[Any, set[Any]] = {}
    for shown, at in met:
        inputs.setdefault(shown, set()).add(at)
    together = set[Any]().union(*inputs.values())
    return len(together) if any(met != together for met in inputs.values()) else 1
