"""A function as one straight list of steps, in which calls and stacks of layers are written out.

A jaxpr nests: `jit` in `remat` in `scan`. To stop between two weights, the network must be a line.
`flatten` inlines every call, and writes a scan over planned weights out layer by layer: the body's
equations come once per layer, reading `Piece`s (one layer of a stack each). Every value has a
number; equal equations on equal operands are one step (q, k and v each casting their common input).
No jaxpr is built: a step is an equation with numbers in place of its variables.

A scan over a stack is written out if the stack reaches it through views that keep each layer to
itself (casts, transposes): these are then taken of the layer alone. So is a layer that a function
picks by a plain index. Any other loop or branch stays one step, with whatever weights are in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jquant.programs.calls import callee, close, passed_on, scan_parts
from jquant.programs.keys import equation_key, literal_key
from jquant.programs.primitives import having
from jquant.programs.walker import bind, trace
from jquant.trees import placement

Atom = int | core.Literal  # a value's number, or a number that stands in the program text


class Piece(NamedTuple):
    """A leaf of the parameters, or one layer of it: a window of length 1 on some of its axes.

    Example:
        >>> print(Piece("layers/q/kernel", ((0, 3),)))
        layers/q/kernel[3]
    """

    path: str
    where: tuple[tuple[int, int], ...] = ()  # (axis, index), outermost loop first

    def __str__(self) -> str:
        return self.path + "".join(f"[{index}]" for _, index in self.where)

    def index(self, rank: int) -> tuple[slice, ...]:
        """What to index the leaf with; the axes stay, with size 1."""
        window = dict(self.where)
        return tuple(
            slice(window[axis], window[axis] + 1) if axis in window else slice(None)
            for axis in range(rank)
        )

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape of a piece of a leaf of shape `whole`."""
        window = dict(self.where)
        return tuple(1 if axis in window else size for axis, size in enumerate(whole))


class Step(NamedTuple):
    """One equation: it reads `ins` and makes `outs`."""

    eqn: core.JaxprEqn
    ins: tuple[Atom, ...]
    outs: tuple[int, ...]

    @property
    def reads(self) -> list[int]:
        return [atom for atom in self.ins if isinstance(atom, int)]


@dataclass(frozen=True)
class Flat:
    """A flattened function at given input shapes.

    Attributes:
        steps: in the order of evaluation.
        inputs: the numbers of the input leaves.
        pieces: the parameters' numbers. Those of leaves come first, in the order of the tree.
        consts: arrays that the function closes over.
        shapes: of every value.
        layers: pieces → (which loop, which turn); loop -1 where an index stands in the function.
        outputs: what the function returns.
    """

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    pieces: dict[int, Piece]
    consts: dict[int, Any]
    shapes: dict[int, jax.ShapeDtypeStruct]
    layers: dict[Piece, tuple[int, int]]
    outputs: tuple[Atom, ...]


def flatten(
    fn: Callable[..., Any],
    params: Sequence[tuple[str, jax.ShapeDtypeStruct]],
    structure: Any,
    inputs: tuple[Any, ...],
    stacks: Mapping[str, Collection[int]],
) -> Flat:
    """Flatten `fn(params, *inputs)`.

    Args:
        fn: any JAX function.
        params: the leaves of its parameters, `(path, shape and dtype)`.
        structure: the tree they are the leaves of.
        inputs: arrays, or their shapes.
        stacks: the weights, path → the axes along which layers lie that are to be walked one by
            one, if any.
    """
    tree = jax.tree.unflatten(structure, [shape for _, shape in params])
    closed, _ = trace(fn, tree, *inputs)
    flattener = _Flattener(stacks)
    leaves = [flattener.piece(Piece(path), shape) for path, shape in params]
    numbers = [flattener.value(leaf) for leaf in jax.tree.leaves(inputs)]
    outputs = flattener.run(closed, [*leaves, *numbers])
    return Flat(
        tuple(flattener.steps), tuple(numbers), flattener.pieces, flattener.consts,
        flattener.shapes, flattener.layers, tuple(outputs),
    )  # fmt: skip


class _View(NamedTuple):
    """How a value was made of a piece: views that keep layers apart, and what became of its axes"""

    piece: Piece
    views: tuple[core.JaxprEqn, ...]
    axes: tuple[int, ...]  # of the leaf, for every axis of the value


class _Flattener:
    def __init__(self, stacks: Mapping[str, Collection[int]]):
        self.stacks = stacks
        self.steps: list[Step] = []
        self.pieces: dict[int, Piece] = {}
        self.consts: dict[int, Any] = {}
        self.shapes: dict[int, jax.ShapeDtypeStruct] = {}
        self.layers: dict[Piece, tuple[int, int]] = {}
        self._numbers: dict[Piece, int] = {}
        self._views: dict[int, _View] = {}
        self._known: dict[Any, tuple[int, ...]] = {}  # equal equations on equal operands
        self._fixed: dict[int, bool] = {}  # values of parameters alone: whether of a weight
        self._loops = 0

    def value(self, like: Any) -> int:
        """A new number for a value of this shape and dtype."""
        number = len(self.shapes)
        self.shapes[number] = placement.like(like)
        return number

    def const(self, array: Any) -> int:
        key = (
            ("const", id(array)) if isinstance(array, jax.Array) else ("const", literal_key(array))
        )
        if key not in self._known:
            number = self.value(jnp.asarray(array) if np.ndim(array) == 0 else array)
            self.consts[number] = array  # which also keeps its id unique
            self._known[key] = (number,)
        return self._known[key][0]

    def piece(self, piece: Piece, shape: jax.ShapeDtypeStruct) -> int:
        if piece not in self._numbers:
            number = self.value(shape)
            self.pieces[number] = piece
            self._numbers[piece] = number
            self._fixed[number] = piece.path in self.stacks
            self._views[number] = _View(piece, (), tuple(range(len(shape.shape))))
        return self._numbers[piece]

    def run(self, closed: core.ClosedJaxpr, args: Sequence[Atom]) -> list[Atom]:
        """Write out a jaxpr's equations; every call gets numbers of its own."""
        env: dict[Any, Atom] = dict(zip(closed.jaxpr.invars, args, strict=True))
        env.update(
            (v, self.const(c)) for v, c in zip(closed.jaxpr.constvars, closed.consts, strict=True)
        )

        def read(atom: Any) -> Atom:
            return atom if isinstance(atom, core.Literal) else env[atom]

        for eqn in closed.jaxpr.eqns:
            ins = [read(atom) for atom in eqn.invars]
            env.update(zip(eqn.outvars, self.equation(eqn, ins), strict=True))
        return [read(atom) for atom in closed.jaxpr.outvars]

    def call(self, fn: Callable[..., Any], *args: Atom) -> list[Atom]:
        """Write out a function of values."""
        shapes = [self.shapes[a] if isinstance(a, int) else a.val for a in args]
        return self.run(trace(fn, *shapes)[0], args)

    def equation(self, eqn: core.JaxprEqn, ins: list[Atom]) -> Sequence[Atom]:
        body = callee(eqn)
        if body is not None:
            return self.run(body, ins)
        if eqn.primitive.name == "scan":
            consts, carry = scan_parts(eqn.params)
            if any(self._layered(x) for x in ins[consts + carry :]):
                return self._written_out(eqn, ins, consts, carry)
        return self.step(eqn, ins, [var.aval for var in eqn.outvars])

    def step(self, eqn: core.JaxprEqn, ins: Sequence[Atom], shapes: Sequence[Any]) -> list[int]:
        if eqn.primitive.name == "slice":
            layer = self._sliced(eqn, ins[0])
            if layer is not None:
                return [layer]
        key = equation_key(eqn), tuple(a if isinstance(a, int) else literal_key(a.val) for a in ins)
        if key in self._known and not eqn.effects:
            return list(self._known[key])
        outs = tuple(map(self.value, shapes))
        self._known[key] = outs
        of = {a for a in ins if isinstance(a, int)} - self.consts.keys()
        if of and of <= self._fixed.keys():
            self._fixed |= dict.fromkeys(outs, any(self._fixed[a] for a in of))
        self.steps.append(Step(eqn, tuple(ins), outs))
        self._view(eqn, ins, outs)
        return list(outs)

    def _view(self, eqn: core.JaxprEqn, ins: Sequence[Atom], outs: tuple[int, ...]) -> None:
        old = self._views.get(ins[0]) if ins and isinstance(ins[0], int) else None
        name, params = eqn.primitive.name, eqn.params
        if old is None or name not in having("layerwise"):
            return
        axes = old.axes
        if name == "transpose":
            axes = tuple(axes[k] for k in params["permutation"])
        elif name == "squeeze":
            axes = tuple(a for k, a in enumerate(axes) if k not in params["dimensions"])
        self._views[outs[0]] = _View(old.piece, (*old.views, eqn), axes)

    def _layered(self, x: Atom) -> bool:
        view = self._views.get(x) if isinstance(x, int) else None
        return view is not None and view.axes[0] in self.stacks.get(view.piece.path, ())

    def _sliced(self, eqn: core.JaxprEqn, x: Atom) -> int | None:
        """The one layer of a stack that a slice takes, if that is what it does."""
        view = self._views.get(x) if isinstance(x, int) else None
        if view is None or not isinstance(x, int):
            return None
        starts, sizes = eqn.params["start_indices"], self.shapes[x].shape
        result: Any = eqn.outvars[0].aval
        cut = [
            (axis, start, length)
            for axis, size, start, length in zip(
                view.axes, sizes, starts, result.shape, strict=True
            )
            if length != size
        ]
        if len(cut) != 1:
            return None
        ((axis, start, length),) = cut
        if length != 1 or axis not in self.stacks.get(view.piece.path, ()):
            return None
        return self._layer(view, axis, (-1, start))

    def _written_out(
        self, eqn: core.JaxprEqn, ins: list[Atom], num_consts: int, num_carry: int
    ) -> Sequence[Atom]:
        """A scan, turn by turn."""
        closed, length = close(eqn.params["jaxpr"]), eqn.params["length"]
        consts, carry = ins[:num_consts], ins[num_consts : num_consts + num_carry]
        loop, self._loops = self._loops, self._loops + 1
        rows: list[list[Atom]] = []
        for turn in range(length)[:: -1 if eqn.params["reverse"] else 1]:
            xs = [self._row(x, loop, turn) for x in ins[num_consts + num_carry :]]
            results = self.run(closed, [*consts, *carry, *xs])
            carry, row = results[:num_carry], results[num_carry:]
            rows.append(row)
        rows = rows[:: -1 if eqn.params["reverse"] else 1]
        passed = passed_on(eqn)[num_carry:]  # slices that come out as they went in: the whole of it
        stacked = [
            self.call(lambda *row: jnp.stack(row), *column)[0] if at is None else ins[at]
            for at, column in zip(passed, zip(*rows, strict=True), strict=True)
        ]
        return [*carry, *stacked]

    def _row(self, x: Atom, loop: int, turn: int) -> Atom:
        """What the scan's body sees of `x` in this turn."""
        view = self._views.get(x) if isinstance(x, int) else None
        if view is None and isinstance(x, int) and self._fixed.get(x):
            # A weight is followed only where it is told which of its layers this is.
            return self.call(functools.partial(_picked, turn=turn), x)[0]
        if view is None:
            at = self.const(np.int32(turn))  # an operand, so that all turns have one program
            return self.call(_pick, x, at)[0]
        return self.call(_first, self._layer(view, view.axes[0], (loop, turn)))[0]

    def _layer(self, view: _View, axis: int, turn: tuple[int, int]) -> int:
        """The same view of one layer alone; the axis of the stack stays, with size 1."""
        whole = self.shapes[self._numbers[view.piece]]
        layer = Piece(view.piece.path, (*view.piece.where, (axis, turn[1])))
        number = self.piece(layer, placement.sliced(whole, {axis}))
        self.layers.setdefault(layer, self.layers.get(view.piece, turn))
        for eqn in view.views:
            result = jax.eval_shape(functools.partial(_bind, eqn), self.shapes[number])
            (number,) = self.step(eqn, [number], [result])
        return number


def _bind(eqn: core.JaxprEqn, value: Any) -> Any:
    return bind(eqn, [value])[0]


def _pick(x: jax.Array, at: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(x, at, 0, keepdims=False)


def _picked(x: jax.Array, turn: int) -> jax.Array:
    return lax.index_in_dim(x, turn, 0, keepdims=False)


def _first(x: jax.Array) -> jax.Array:
    return lax.squeeze(x, (0,))
