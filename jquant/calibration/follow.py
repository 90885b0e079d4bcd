"""Following tokens through a program: the place of every operand where a weight may be used.

Nothing is run. One rule per kind of operation says which axes of its result run over which tokens
(`place.py`); an operation without a rule loses them. Loops are gone through until what they carry
stays where it is. Sites are those of `walker.Walker`, so that whoever walks the same program
can look up where the tokens of an operand are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jax.extend import core

from jquant.calibration.place import Place, joined, settled
from jquant.programs.calls import callee, close, scan_parts
from jquant.programs.primitives import having

Site = tuple[int, ...]
Places = tuple[Place, ...]

# Entry by entry; along an axis they run over (cumulative sums) the order stays.
_ELEMENTWISE = frozenset().union(
    *map(having, ("elementwise", "complex", "identity", "running")),
)
_TIMES = 8  # a loop's carry is gone through, before what still moves is given up


class Follower:
    """The table of places that a program was followed into: site → places in, places out."""

    def __init__(self) -> None:
        self.table: dict[Site, tuple[Places, Places]] = {}

    def run(self, closed: core.ClosedJaxpr, args: Sequence[Place], site: Site = ()) -> Places:
        """Follow a jaxpr's equations from the places of its arguments to those of its results."""
        env: dict[Any, Place] = {v: Place.blank(v.aval.shape) for v in closed.jaxpr.constvars}
        env.update(zip(closed.jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Place:
            if isinstance(atom, core.Literal):
                return Place.blank(np.shape(atom.val))
            return env[atom]

        for at, eqn in enumerate(closed.jaxpr.eqns):
            outs = self.step(eqn, [read(atom) for atom in eqn.invars], (*site, at))
            env.update(zip(eqn.outvars, outs, strict=True))
        return tuple(read(atom) for atom in closed.jaxpr.outvars)

    def step(self, eqn: core.JaxprEqn, ins: Sequence[Place], site: Site) -> Places:
        """The places of an equation's results."""
        ins, name = tuple(ins), eqn.primitive.name
        outs = self._step(eqn, ins, site)
        if name in having("product"):
            self.table[site] = ins, outs
        return outs

    def _step(self, eqn: core.JaxprEqn, ins: Places, site: Site) -> Places:
        name, shapes = eqn.primitive.name, [_shape(eqn, k) for k in range(len(eqn.outvars))]
        body = callee(eqn)
        if body is not None:
            inner = (*site, 0) if name in ("remat2", "checkpoint") else site
            return self.run(body, ins, inner)
        if name in _LOOPS:
            return _LOOPS[name](self, eqn, ins, site)
        if all(place.is_blank for place in ins):
            return tuple(map(Place.blank, shapes))
        rule = _elementwise if name in _ELEMENTWISE else _RULES.get(name)
        outs = () if rule is None else rule(eqn, ins)
        return outs or tuple(Place.blank(shape, name) for shape in shapes)

    def _scan(self, eqn: core.JaxprEqn, ins: Places, site: Site) -> Places:
        closed = close(eqn.params["jaxpr"])
        consts, carried = scan_parts(eqn.params)
        heads = [place.axes[:1] for place in ins[consts + carried :]]
        over = {head for head in heads if not Place(head).is_blank}
        rows = [_row(place) for place in ins[consts + carried :]]

        def turn(carry: Places) -> Places:
            return self.run(closed, [*ins[:consts], *carry, *rows], (*site, 0))

        outs = self._carry(ins[consts : consts + carried], turn, "scan")
        length = eqn.params["length"]
        head = next(iter(over)) if len(over) == 1 else Place.blank([length]).axes
        stacked = [replace(place, axes=(*head, *place.axes)) for place in outs[carried:]]
        return (*outs[:carried], *stacked)

    def _while(self, eqn: core.JaxprEqn, ins: Places, site: Site) -> Places:
        params = eqn.params
        cond, body = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]

        def turn(carry: Places) -> Places:
            self.run(close(params["cond_jaxpr"]), [*ins[:cond], *carry], (*site, 1))
            return self.run(close(params["body_jaxpr"]), [*ins[cond:body], *carry], (*site, 0))

        return self._carry(ins[body:], turn, "while")

    def _carry(self, carry: Places, turn: Callable[[Places], Places], name: str) -> Places:
        """The results of a loop's turn once its carry stays what it is."""
        for _ in range(_TIMES):
            outs = turn(carry)
            pairs = zip(carry, outs, strict=False)
            after = tuple(joined(pair, name) for pair in pairs)
            if after == carry:
                return (*after, *outs[len(carry) :])
            carry = after
        carry = tuple(replace(_blank(place), lost=place.lost or name) for place in carry)
        return (*carry, *turn(carry)[len(carry) :])

    def _cond(self, eqn: core.JaxprEqn, ins: Places, site: Site) -> Places:
        branches = [
            self.run(close(branch), ins[1:], (*site, k))
            for k, branch in enumerate(eqn.params["branches"])
        ]
        return tuple(joined(several, "cond") for several in zip(*branches, strict=True))


_LOOPS: dict[str, Callable[[Follower, core.JaxprEqn, Places, Site], Places]] = {
    "scan": Follower._scan,
    "while": Follower._while,
    "cond": Follower._cond,
}


def _blank(place: Place) -> Place:
    return Place.blank([math.prod(d.length for d in axis) for axis in place.axes])


def _shape(eqn: core.JaxprEqn, result: int = 0) -> tuple[int, ...]:
    aval: Any = eqn.outvars[result].aval
    return tuple(aval.shape)


def _row(place: Place) -> Place:
    """What a scan's body sees of an array: lost, where it scans over tokens."""
    head, row = place.axes[:1], replace(place, axes=place.axes[1:])
    return row if Place(head).is_blank else replace(row, lost=row.lost or "scan")


def _elementwise(eqn: core.JaxprEqn, ins: Places) -> Places:
    name = eqn.primitive.name
    if len(eqn.outvars) > 1:  # each operand for itself
        return ins if len(ins) == len(eqn.outvars) else ()
    rank = len(_shape(eqn))
    scalars = [replace(p, axes=()) for p in ins if len(p.axes) != rank]
    full = [p for p in ins if len(p.axes) == rank]
    one = joined(full, name)
    return (settled(one.axes, [one, *scalars], one.lost, name),)


def _dot(eqn: core.JaxprEqn, ins: Places) -> Places:
    (contract, batch), name = eqn.params["dimension_numbers"], eqn.primitive.name
    shared = [
        replace(place, axes=tuple(place.axes[k] for k in dims))
        for place, dims in zip(ins, batch, strict=True)
    ]
    both = joined(shared, name)
    used = [(*of, *along) for of, along in zip(contract, batch, strict=True)]
    free = [
        axis
        for place, dims in zip(ins, used, strict=True)
        for k, axis in enumerate(place.axes)
        if k not in dims
    ]
    product = settled((*both.axes, *free), ins, both.lost, name)
    return (_summed(product, ins, contract, used, name),)


def _summed(
    product: Place,
    ins: Sequence[Place],
    contract: Sequence[Sequence[int]],
    used: Sequence[Sequence[int]],
    name: str,
) -> Place:
    """A product's place: tokens that were added up in it are lost, if it runs over no others.

    Experts' slots are filled so, by a product with ones and zeros. Where an operand has no axis of
    its own the result is a mean of the other one: a pooled vector.
    """
    if any(len(place.axes) == len(dims) for place, dims in zip(ins, used, strict=True)):
        return product
    gone = {
        d.axis
        for place, dims in zip(ins, contract, strict=True)
        for k in dims
        for d in place.axes[k]
    }
    left = {d.axis for axis in product.axes for d in axis} | {d.axis for d in product.fixed}
    return replace(product, lost=product.lost or (name if gone - left - {-1} else ""))


def _ragged(eqn: core.JaxprEqn, ins: Places) -> Places:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract, batch), rows = numbers.dot_dimension_numbers, numbers.lhs_ragged_dimensions
    left, right, *_ = ins
    shape = _shape(eqn)
    if not right.is_blank or batch != ((), ()) or rows == contract[0]:
        return ()
    free = [axis for k, axis in enumerate(left.axes) if k not in contract[0]]
    blank = Place.blank(shape).axes[len(free) :]
    product = replace(left, axes=(*free, *blank))
    return (_summed(product, [left], contract[:1], contract[:1], eqn.primitive.name),)


def _conv(eqn: core.JaxprEqn, ins: Places) -> Places:
    x, kernel = ins
    params, shape = eqn.params, _shape(eqn)
    numbers = params["dimension_numbers"]
    if not kernel.is_blank or params["batch_group_count"] != 1:
        return ()
    batch, feature, *spatial = numbers.lhs_spec
    patches = x.resize(feature, shape[numbers.out_spec[1]], eqn.primitive.name)
    for k, dim in enumerate(spatial):
        size = shape[numbers.out_spec[2 + k]]
        same = (
            params["window_strides"][k] == 1
            and params["lhs_dilation"][k] == 1
            and math.prod(d.length for d in x.axes[dim]) == size
        )
        if not same:
            patches = patches.resize(dim, size, eqn.primitive.name)
    turn = dict(zip(numbers.out_spec, (batch, feature, *spatial), strict=True))
    return (patches.transpose([turn[k] for k in range(len(shape))]),)


def _gather(eqn: core.JaxprEqn, ins: Places) -> Places:
    table, at = ins
    numbers, name = eqn.params["dimension_numbers"], eqn.primitive.name
    shape, sizes = _shape(eqn), eqn.params["slice_sizes"]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    picked = [k for k in range(len(sizes)) if k not in numbers.operand_batching_dims]
    for k in picked:
        if not Place(table.axes[k : k + 1]).is_blank and sizes[k] != _length(ins[0], k):
            table = table.resize(k, sizes[k], name)
    rows = [k for k in range(len(shape)) if k not in numbers.offset_dims]
    kept = [k for k in range(len(sizes)) if k not in gone]
    axes = list(Place.blank(shape).axes)
    for k, dim in zip(rows, range(len(at.axes) - 1), strict=True):
        axes[k] = at.axes[dim]
    one = replace(at, axes=tuple(axes))
    axes = list(Place.blank(shape).axes)
    for k, dim in zip(numbers.offset_dims, kept, strict=True):
        if _length(table, dim) == shape[k]:
            axes[k] = table.axes[dim]
    for dim, other in zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    ):
        axes[rows[other]] = table.axes[dim]
    return (joined([one, replace(table, axes=tuple(axes))], name),)


def _length(place: Place, dim: int) -> int:
    return math.prod(d.length for d in place.axes[dim])


def _concatenate(eqn: core.JaxprEqn, ins: Places) -> Places:
    dim, size, name = eqn.params["dimension"], _shape(eqn)[eqn.params["dimension"]], "concatenate"
    told = [k for k, place in enumerate(ins) if not Place(place.axes[dim : dim + 1]).is_blank]
    pieces, before = [], 0
    for k, place in enumerate(ins):
        alone = [k] == told
        pieces.append(
            place.extend(dim, before, size, name) if alone else place.resize(dim, size, name)
        )
        before += _length(place, dim)
    return (joined(pieces, name),)


def _pad(eqn: core.JaxprEqn, ins: Places) -> Places:
    place, shape = ins[0], _shape(eqn)
    for dim, some in enumerate(eqn.params["padding_config"]):
        if tuple(some) != (0, 0, 0):
            place = place.resize(dim, shape[dim], "pad")
    return (place,)


def _slice(eqn: core.JaxprEqn, ins: Places) -> Places:
    place, shape = ins[0], _shape(eqn)
    for dim, start in enumerate(eqn.params["start_indices"]):
        if (eqn.params["strides"] or [1] * len(shape))[dim] != 1:
            place = place.resize(dim, shape[dim], "slice")
        else:
            place = place.window(dim, start, shape[dim], "slice")
    return (place,)


def _split(eqn: core.JaxprEqn, ins: Places) -> Places:
    at, pieces = 0, []
    for size in eqn.params["sizes"]:
        pieces.append(ins[0].window(eqn.params["axis"], at, int(size), "split"))
        at += int(size)
    return tuple(pieces)


def _dynamic_slice(eqn: core.JaxprEqn, ins: Places) -> Places:
    place = ins[0]
    for dim, size in enumerate(_shape(eqn)):
        if size != _length(place, dim):
            place = place.resize(dim, size, "dynamic_slice")
    return (place,)


def _dynamic_update_slice(eqn: core.JaxprEqn, ins: Places) -> Places:
    (whole, part), name = ins[:2], eqn.primitive.name
    for dim, size in enumerate(_shape(eqn)):
        if size != _length(part, dim):
            whole, part = whole.resize(dim, size, name), part.resize(dim, size, name)
    return (joined([whole, part], name),)


def _reordered(eqn: core.JaxprEqn, ins: Places) -> Places:
    """Sorting, reversing, choosing the largest along some axes, where there may be no tokens."""
    params, name = eqn.params, eqn.primitive.name
    rank = len(ins[0].axes)
    dims = params.get("dimensions", (params.get("dimension", params.get("axis", -1)),))
    place = joined(ins, name)
    for dim in dims:
        place = place.resize(dim % rank, _shape(eqn)[dim % rank], name)
    return (place,) * len(eqn.outvars)


def _reshape(eqn: core.JaxprEqn, ins: Places) -> Places:
    place, turn = ins[0], eqn.params.get("dimensions")
    return ((place if turn is None else place.transpose(turn)).reshape(eqn.params["new_sizes"]),)


def _broadcast(eqn: core.JaxprEqn, ins: Places) -> Places:
    return (ins[0].broadcast(eqn.params["shape"], eqn.params["broadcast_dimensions"]),)


_RULES: dict[str, Callable[[core.JaxprEqn, Places], Places]] = {
    "dot_general": _dot,
    "ragged_dot": _ragged,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "concatenate": _concatenate,
    "pad": _pad,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "sort": _reordered,
    "rev": _reordered,
    "top_k": _reordered,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "transpose": lambda eqn, ins: (ins[0].transpose(eqn.params["permutation"]),),
    "squeeze": lambda eqn, ins: (ins[0].squeeze(eqn.params["dimensions"]),),
    **{name: lambda eqn, ins: (ins[0].drop(eqn.params["axes"]),) for name in having("reduction")},
}
