"""The walker's client that watches weights being used: one rule per kind of operation.

What depends on no input is followed as a `Tagged` value (`tagged.py`): views and elementwise maps
of a weight, sums and concatenations of several, products of parameters. Where such a value is
contracted with an input, the reading is recorded for each of its weights and the input's evidence
is emitted. An operation that is none of these breaks the tag; a broken tag may still be added to or
multiply an input (biases, norm scales, positions), but contracting it with one raises: the weight
behind it would silently go unseen. So does any operation that mixes a weight and an input in a way
that is not listed here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jquant.axes.origin import Origin
from jquant.axes.roles import Kind, Reading, Sighting
from jquant.calibration.evidence import Evidence
from jquant.calibration.pending import (
    Lookup,
    Pairs,
    Pending,
    Product,
    is_read_so,
    reassociated,
    seen_from,
)
from jquant.calibration.rows import Arrangement, Role, Share
from jquant.calibration.tagged import (
    ELEMENTWISE,
    IDENTITIES,
    Tagged,
    array_of,
    changed,
    combined,
    fitted,
    is_independent,
    is_uniform,
    joined,
    padded,
    view,
)
from jquant.calibration.tokens import Tokens
from jquant.calibration.uses import RULES, floats, reading_of, unsupported
from jquant.programs.walker import DESCENDED, LOOPS, Walker, bind, scan_parts
from jquant.trees.placement import automatic

# Where a parameter may meet an input without being a weight: biases, scales, positions, masks.
_MIXERS = ELEMENTWISE | {"concatenate", "dynamic_update_slice", "pad", "stack"}


class Observer:
    """Client of `interpreter.Walker`; see the module docstring.

    To see two networks at once (one with quantized weights, one without), an observer that walks
    the first is given the `rows` that another has kept of the second, walked in the same order.

    Args:
        keep: keep the rows of inputs in `rows`, by site.
        full: the rows another observer has kept.
        spread: whether evidence says how inputs are spread.
        tokens: what every token counts, and where they are; None: each row is a token.
        roots: positions of the steps that are known to use weights, where only a part of a function
            is walked.
    """

    def __init__(
        self,
        *,
        keep: bool = False,
        full: Mapping[Any, jax.Array] | None = None,
        spread: bool = False,
        tokens: Tokens | None = None,
        roots: Collection[int] | None = None,
    ) -> None:
        self.keep, self.full, self.spread, self.tokens = keep, full, spread, tokens
        self.rows: dict[Any, jax.Array] = {}
        self.uses: dict[
            tuple[tuple[int, ...], Any], Sighting
        ] = {}  # by site and operand: each use once
        self.mixed: dict[str, str] = {}  # path -> the operation that took it in as a plain array
        self.pending = Pending(roots)

    def special(self, value: Any) -> bool:
        return isinstance(value, Tagged)

    def asks(self, eqn: core.JaxprEqn, values: Sequence[Any]) -> bool:
        """Also for numbers that are made of none but literals, and for one number made many."""
        if not any(isinstance(v, jax.Array) for v in values):
            return not eqn.effects
        return eqn.primitive.name == "broadcast_in_dim" and jnp.size(values[0]) == 1

    def names(self, value: Tagged) -> frozenset[str]:
        return frozenset(value.paths)

    def merge(self, left: Evidence, right: Evidence) -> Evidence:
        return left.merge(right)

    def drop(self, value: Tagged, eqn: core.JaxprEqn, data: bool = False) -> jax.Array:
        if data:  # the first state of a recurrence
            self.mix([value], eqn.primitive.name)
        elif value.origins and not value.dependent:
            why = "a loop or branch changes it or passes it out"
            raise unsupported(self.pending.weight(value.origins[0]), eqn, why)
        self.reach([replace(value, origins=())])
        return value.array

    def leave(self, results: list[Any], walker: Walker) -> list[Any]:
        """End a function, or the body of a loop: what is pending in it is decided now."""
        inner = self.pending.inside(walker.site)
        name = walker.within[-1].primitive.name if walker.within else None
        results = [self.pending.outside(v, inner, name) if self.special(v) else v for v in results]
        if name is None:  # the function itself: what it returns is used
            self.reach(results)
        site = walker.site
        for number in sorted(inner, reverse=True):
            item, counts = self.pending.end(number)
            walker.site = item.site
            if isinstance(item, Lookup) and counts:
                self.uses |= {(item.site, (0, k)): use for k, use in enumerate(item.uses)}
            elif isinstance(item, Product) and counts:
                self._see_each_other(walker, item)
            elif isinstance(item, Product):  # it went into other weights, if anywhere
                for path in (*item.left.paths, *item.right.paths):
                    self.mixed.setdefault(path, "dot_general")
        walker.site = site
        return results

    def _see_each_other(self, walker: Walker, item: Product) -> None:
        """A product of parameters is an activation of its own: the rows of each are parameters."""
        self.reach([item.left, item.right])
        for k, (own, other) in enumerate(((item.left, item.right), (item.right, item.left))):
            plain = Tagged(own.array, tuple(o for o in own.good if o.product is None))
            pairs = seen_from(k, item.contract), seen_from(k, item.batch)
            self._meet(walker, ("alone", k), plain, other.array, *pairs, 1 - k)

    def reach(self, values: Sequence[Any]) -> None:
        """These values met an input, or were returned."""
        self.pending.reach(v for v in values if isinstance(v, Tagged))

    def mix(self, values: Sequence[Any], name: str) -> None:
        """Weights among the values were taken in as plain arrays."""
        self.reach(values)
        for value in values:
            for path in value.paths if isinstance(value, Tagged) else ():
                self.mixed.setdefault(path, name)

    def rule(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> Sequence[Any] | None:
        name = eqn.primitive.name
        free = all(map(is_independent, eqn.invars, values))
        if name in LOOPS and free:
            return self._closed_loop(eqn, values, walker)
        if name in DESCENDED:
            return None
        if name == "dot_general":
            return self._dot(eqn, values, walker)
        if name in RULES:
            return RULES[name](self, eqn, values, walker)
        if name in IDENTITIES:
            results = bind(eqn, list(map(array_of, values)))
            return [_retag(v, r) for v, r in zip(values, results, strict=False)]
        seen = view(eqn, values)
        if seen is not None:
            return seen
        if name in ELEMENTWISE:
            return self._elementwise(eqn, values, free)
        if name == "broadcast_in_dim":  # of one number
            return [Tagged(r, dependent=not free, uniform=True) for r in bind(eqn, values)]
        if free and name in ("concatenate", "stack", "pad"):
            return [(padded if name == "pad" else joined)(eqn, values)]
        return self.other(eqn, values, free)

    def _closed_loop(
        self, eqn: core.JaxprEqn, values: list[Any], walker: Walker
    ) -> list[Any] | None:
        """A loop or branch that no input enters: a network of its own, or what makes a weight."""
        weights = [v for v in values if isinstance(v, Tagged) and v.origins]
        before = len(self.uses)
        if eqn.primitive.name == "scan" and weights:
            consts, carry = scan_parts(eqn.params)
            if any(v is w for v in values[consts + carry :] for w in weights):
                results = walker.descend(eqn, values)
                if len(self.uses) > before:
                    return [r if isinstance(r, Tagged) else Tagged(r) for r in results]
        return self.other(eqn, values, True)

    def _elementwise(self, eqn: core.JaxprEqn, values: list[Any], free: bool) -> list[Any]:
        name, arrays = eqn.primitive.name, list(map(array_of, values))
        (result,) = bind(eqn, arrays)
        if free:
            value, paths = combined(name, values, result)
            for path in paths:
                self.mixed.setdefault(path, name)
            return [value]
        if name == "convert_element_type":
            return [_retag(values[0], result)]
        full = [v for v in values if not is_uniform(v)]
        scaled = name == "mul" or (name == "div" and bool(full) and values[0] is full[0])
        if scaled and len(full) == 1 and isinstance(full[0], Tagged) and full[0].good:
            self.reach([v for v in values if v is not full[0]])
            return [replace(fitted(full[0], result.shape), array=result)]
        # What data has picked from weights, and what independent values make of that.
        cases = values[1:] if name == "select_n" else values
        atoms = eqn.invars[len(values) - len(cases) :]
        picked = [v for v in cases if isinstance(v, Tagged) and v.origins]
        if picked and all(isinstance(v, Tagged) or is_independent(a, v)
                          for a, v in zip(atoms, cases, strict=True)):  # fmt: skip
            reach = tuple(sorted({n for v in picked for n in v.reach}))
            value = Tagged(result, picked[0].origins[:1], reach, dependent=True)
            return [changed(value, result, [None], name)]
        self.mix(values, name)
        if not full:
            return [Tagged(result, dependent=True, uniform=True)]
        return [result]

    def other(self, eqn: core.JaxprEqn, values: list[Any], free: bool) -> list[Any]:
        """An operation that is no view, no map and no use."""
        name = eqn.primitive.name
        tagged = [v for v in values if isinstance(v, Tagged)]
        weights = [v for v in tagged if v.origins and not v.dependent]
        if not eqn.outvars:  # a print, a callback: nothing that a weight could go on in
            return bind(eqn, list(map(array_of, values)))
        if weights and any(True for _ in core.jaxprs_in_params(eqn.params)) and name not in LOOPS:
            raise unsupported(weights[0].origins[0], eqn, "jquant has no rule to look inside it")
        if weights and not free and name not in _MIXERS:
            raise unsupported(weights[0].origins[0], eqn, "it mixes the weight with other values")
        results = bind(eqn, list(map(array_of, values)))
        if not free:
            self.mix(values, name)
            return results
        origins = tuple(o for v in tagged for o in v.origins)
        reach = tuple(sorted({n for v in tagged for n in v.reach}))
        value = Tagged(jnp.zeros((), jnp.float32), origins, reach)
        return [
            replace(v, origins=v.origins[:1])
            for v in (changed(value, r, [None] * len(origins), name) for r in results)
        ]

    def see(
        self,
        walker: Walker,
        where: Any,
        kind: Kind,
        origin: Origin,
        roles: Sequence[Role],
        rows: int,
    ) -> Reading:
        """Record a use of a weight; `roles` are those of the axes of the array that is used."""
        for eqn in walker.within[:-1]:
            rows *= eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        use = Sighting(origin.path, reading_of(kind, origin, roles, walker), rows, origin.through)
        self.uses[walker.site, where] = use
        return use.reading

    def postpone(self, walker: Walker, origins: Sequence[Origin], roles: Sequence[Role]) -> int:
        """Lookups that count if what they picked meets an input as it is."""
        uses = [
            Sighting(o.path, reading_of("lookup", o, roles, walker), 0, o.through)
            for o in origins
            if o.product is None
        ]
        return self.pending.add(Lookup(walker.site, tuple(uses)))

    def _meet(
        self,
        walker: Walker,
        where: Any,
        weight: Tagged,
        x: jax.Array,
        contract: Pairs,
        batch: Pairs,
        operand: int | None,
    ) -> None:
        """An effective weight is contracted with rows: (its dimensions, those of `x`).

        `operand`: which one of the equation holds the rows; None: a product with parameters.
        """
        rank = weight.array.ndim
        meets: dict[int, tuple[Role, int]] = {}
        for role, (own, other) in (("in", contract), ("batch", batch)):
            meets |= {dim: (role, there) for dim, there in zip(own, other, strict=True)}  # type: ignore[misc]
        roles: list[Role] = [meets[k][0] if k in meets else "out" for k in range(rank)]
        for k, origin in enumerate(weight.good):
            if origin.product is not None:
                self._follow(walker, (where, k), origin, rank, x, contract, batch, operand)
                continue
            own, offsets = origin.own(rank), origin.own_offsets(rank)
            way = Arrangement.of(x.shape, {
                there: Share(role, own[dim], offsets[dim]) for dim, (role, there) in meets.items()
            })  # fmt: skip
            reading = self.see(walker, (where, k), "dot", origin, roles, way.tokens)

            weights = self.tokens and self.tokens.rows(walker.site, operand, origin.path, way)

            def compute(
                x: jax.Array,
                where: Any = (where, way),
                way: Arrangement = way,
                weights: jax.Array | None = weights,
            ) -> Evidence:
                rows, count = way.rows(x), None
                if way.batch:  # experts: slots that hold no token are zero rows
                    held = jnp.any(rows != 0, -1)
                    held = held if weights is None else jnp.where(held, weights, 0 * weights)
                    count = jnp.sum(held, -1, dtype=jnp.float32)
                return self._evidence(walker, where, floats(rows), count, weights=weights)

            found = walker.share(("dot", way), x, partial(automatic, compute, x))
            walker.emit((origin.path, reading), found)

    def _follow(
        self,
        walker: Walker,
        where: Any,
        origin: Origin,
        rank: int,
        x: jax.Array,
        contract: Pairs,
        batch: Pairs,
        operand: int | None,
    ) -> None:
        """A product of parameters is contracted with an input."""
        product = self.pending.product(origin)
        steps = reassociated(product, origin, rank, x, contract, batch)
        if steps is None:
            why = "as part of a product of parameters that cannot be taken apart there"
            raise unsupported(self.pending.weight(origin), walker.within[-1], why)
        self.reach([side for side in (product.left, product.right) if not side.good])
        sides, (near, one, two) = (product.left, product.right), steps
        if is_read_so(sides[near], product.contract[near], self.uses.values()):
            pairs = seen_from(near, product.contract), seen_from(near, product.batch)
            self._meet(walker, (where, 0), sides[near], sides[1 - near].array, *pairs, None)
        else:
            self._meet(walker, (where, 0), *one, operand)
        self._meet(walker, (where, 1), *two, None)

    def _dot(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> list[Any]:
        contract, batch = eqn.params["dimension_numbers"]
        results = bind(eqn, list(map(array_of, values)))
        free = all(map(is_independent, eqn.invars, values))
        tagged = [isinstance(v, Tagged) and bool(v.origins) for v in values]
        if not contract[0]:  # each number of one times numbers of the other: a scale
            if free and any(tagged):
                return self.other(eqn, values, True)
            self.mix(values, eqn.primitive.name)
            return [Tagged(r) for r in results] if free else results
        if free:
            left, right = (v if isinstance(v, Tagged) else Tagged(jnp.asarray(v)) for v in values)
            reach = tuple(sorted({*left.reach, *right.reach}))
            if not left.good and not right.good:
                return self.other(eqn, values, True)
            number = self.pending.add(Product(walker.site, left, right, contract, batch))
            origin = Origin.of("", results[0].shape, number)
            return [Tagged(results[0], (origin,), reach)]
        for slot, weight in enumerate(values):
            other = values[1 - slot]
            if not isinstance(weight, Tagged) or (isinstance(other, Tagged) and tagged[1 - slot]
                                                  and not tagged[slot]):  # fmt: skip
                continue
            if weight.lost and not tagged[1 - slot]:
                why = f"it has been through {weight.lost[0].broken!r}"
                raise unsupported(weight.lost[0], eqn, why)
            if not weight.dependent:
                pairs = seen_from(slot, contract), seen_from(slot, batch)
                self._meet(walker, slot, weight, array_of(other), *pairs, 1 - slot)
        self.reach([v for v in values if isinstance(v, Tagged) and not v.good])
        return results

    def _evidence(
        self,
        walker: Walker,
        what: Any,
        rows: jax.Array,
        count: jax.Array | None = None,
        sizes: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> Evidence:
        """The evidence of these rows, and of their drift where the other network's are known.

        `sizes`: of groups that each have evidence of their own; `weights`: of the tokens.
        """
        full = None
        if len(walker.site) == 1:  # what is inside a loop stays in it
            if self.keep:
                self.rows[walker.site, what] = rows
            full = None if self.full is None else self.full[walker.site, what]
        if sizes is not None:
            return Evidence.grouped(rows, sizes, full=full, spread=self.spread, weights=weights)
        return Evidence.of(rows, count, full=full, spread=self.spread, weights=weights)


def _retag(value: Any, result: Any) -> Any:
    return replace(value, array=result) if isinstance(value, Tagged) else result
