"""Any JAX program in low precision: every result rounded to a format, nearest or at random.

`emulate(fn, format)` walks the program's equations (`interpreter.Walker`) and rounds what comes out
of each one that computes. Loops stay loops, so the cost is a few integer operations for each
floating one. Rounded at random, an operation takes its words from

    hash(index of the element, key, steps of the loops around, number of the operation)

so that a result depends on the key and on the program, not on how often it was compiled, on
devices, sharding, or on other members of a batch.

References: Paxton et al., Climate modeling in low precision, J. Climate 35, 2022; Dawson and Düben,
rpe v5, Geosci. Model Dev. 10, 2017 (significands cut, everything rounded); Croci et al., Stochastic
rounding, 2022.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, PRNGKeyArray, UInt32

from jquant.arithmetic.once import once, one_of
from jquant.arithmetic.operations import (
    ARITHMETIC,
    COMPLEX,
    CONVERSIONS,
    MOVES,
    SHIFTS,
    SUMS,
    UNORDERED,
    VIEWS,
    Operation,
    scope,
)
from jquant.arithmetic.rules import Lookup, Rules
from jquant.arithmetic.sums import in_order
from jquant.arithmetic.targets import Numbers, check, rounded
from jquant.errors import UnsupportedPrimitiveError
from jquant.numerics import noise
from jquant.programs.calls import split_axes
from jquant.programs.walker import DESCENDED, Walker, bind, trace

PAPERS = ("paxton2022climate", "dawson2017rpe")
Rounding = Literal["nearest", "stochastic"]
Operations = Literal["all", "arithmetic"]
Sums = Literal["result", "sequential"]


@dataclass(frozen=True)
class _Settings:
    """All that is static."""

    rules: Rules
    rounding: Rounding
    operations: Operations
    sums: Sums
    source: noise.Source


def emulate(
    fn: Callable[..., Any],
    format: Any,
    rounding: Rounding = "nearest",
    *,
    operations: Operations = "all",
    sums: Sums = "result",
    source: noise.Source = "hash",
) -> Callable[..., Any]:
    """`fn` in the arithmetic of a format, simulated in the dtypes it is written in.

    Numbers stay float32 or float64 (complex ones too, part by part) and hold values of the format.
    For formats of up to 10 bits of significand in float32, or 24 in float64, `+ - * / sqrt` are
    those of hardware with that format, bit for bit. (Subnormals of float32 itself, which are also
    bfloat16's, are zero to XLA on CPUs; in float64 they count.)

    The result is compiled once per shapes and formats, and may be used under `jit`, `vmap`,
    `scan`. Its derivatives are those of `fn` at the rounded numbers: rounding is taken for the
    identity, and custom derivative rules are not kept. For a derivative in low precision emulate
    the derivative, `emulate(jax.grad(fn), ...)`.

    Args:
        fn: any JAX function of arrays or pytrees of them.
        format: bits of significand, the leading one not counted (the range is the carrier's); or
            `jq.grids.Float(e, m)`; or a dtype, see `jquant.arithmetic.targets`; None: leave it. A
            traced integer gives all precisions from one compiled program. Or ordered rules: a
            mapping from regular expressions, for a whole primitive (`"exp"`, `"input"`,
            `"constant"`), dtype (`"float64"`) or path (`"physics/.*"`, by `jax.named_scope`), to
            formats, of which the first that matches decides, and what none matches is left; or a
            function of `jquant.arithmetic.Operation`.
        rounding: "nearest", ties to even, or "stochastic": up or down at random, with the exact
            value as the mean. What enters (inputs, constants, conversions) goes to nearest.
        operations: "all": every floating number is one of the format, inputs, constants and
            conversions too; or "arithmetic": only results are rounded. Selecting, comparing,
            moving and integers have no part.
        sums: "result": a dot product or a reduction is one operation; or "sequential": each product
            and each partial sum is rounded, in the order of the index, see
            `jquant.arithmetic.sums`.
        source: of random words, see `jquant.numerics.noise`: "hash", or "threefry", slower and
            stronger.

    Returns:
        a function of the same inputs, or of `(key, *inputs)` if rounding is stochastic.

    Raises:
        FormatError: a format is none, or has more bits than the carrier; a rule decides nothing;
            a dtype is neither float32 nor float64.
        UnsupportedPrimitiveError: it is not known what a primitive does, or its sum has no order.
        ValueError: another argument is out of its set, or there is no key.

    Example:
        >>> grow = lambda x: jax.lax.fori_loop(0, 100, lambda _, x: x + 1e-3, x)
        >>> float(emulate(grow, 7)(1.0))  # 1 + 1/128 is the next number
        1.0
        >>> keys = jax.random.split(jax.random.key(0), 1000)
        >>> ends = jax.vmap(emulate(grow, 7, "stochastic"), (0, None))(keys, 1.0)
        >>> round(float(ends.mean()), 2)
        1.1
    """
    for name, value, allowed in (
        ("rounding", rounding, get_args(Rounding)),
        ("operations", operations, get_args(Operations)),
        ("sums", sums, get_args(Sums)),
        ("source", source, noise.SOURCES),
    ):
        if value not in allowed:
            raise ValueError(f"emulate: {name} must be one of {allowed}, got {value!r}")
    rules, traced = Rules.of(format)
    settings = _Settings(rules, rounding, operations, sums, source)
    try:
        run = _compiled(fn, settings)
    except TypeError:  # an unhashable callable: compiled anew
        run = _compiled.__wrapped__(fn, settings)

    @functools.wraps(fn)
    def emulated(*inputs: Any) -> Any:
        key = None
        if rounding == "stochastic":
            key, inputs = _with_key(inputs)
        return run(traced, key, tuple(inputs))

    at_random = ("croci2022stochastic",) if rounding == "stochastic" else ()
    vars(emulated)["papers"] = (*PAPERS, *at_random)  # for `jq.cite`
    return emulated


def _with_key(inputs: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    dtype = getattr(inputs[0], "dtype", None) if inputs else None
    old = dtype == jnp.uint32 and inputs[0].shape[-1:] == (2,)
    if dtype is None or not (old or jnp.issubdtype(dtype, jax.dtypes.prng_key)):
        got = "nothing" if not inputs else type(inputs[0]).__name__ if dtype is None else dtype
        raise ValueError(
            "stochastic rounding needs randomness: call the emulated function with "
            f"(jax.random.key(seed), *inputs); its first argument was {got}"
        )
    return inputs[0], inputs[1:]


@functools.lru_cache(maxsize=64)
def _compiled(fn: Callable[..., Any], settings: _Settings) -> Callable[..., Any]:
    @jax.jit
    def run(traced: list[Array], key: PRNGKeyArray | None, inputs: tuple[Any, ...]) -> Any:
        closed, structure = trace(fn, *inputs)
        rounder = _Rounder(settings, traced, key)
        rounder.one = one_of(jax.tree.leaves((inputs, traced, key)))
        walker = Walker(rounder, every=True, constant=rounder.constant)
        leaves = [rounder.constant(leaf, leaf, walker, "input") for leaf in jax.tree.leaves(inputs)]
        results = walker.run(closed, leaves)
        rounder.target.check()
        return jax.tree.unflatten(structure, results)

    return run


class _Rounder:
    """Client of the walker: asked about every equation, it rounds what computes."""

    def __init__(self, settings: _Settings, traced: list[Array], key: PRNGKeyArray | None):
        self.settings = settings
        self.traced = traced
        self.target = Lookup(settings.rules)
        self.hashed = settings.source == "hash"
        self.start: Any = None
        if settings.rounding == "stochastic":
            assert key is not None
            self.start = noise.seed(key) if self.hashed else key
        self.one: Any = None  # see `once.py`
        self.computed: dict[int, Any] = {}  # by id, arrays of nothing but results of arithmetic
        self.numbers: dict[Any, int] = {}  # of operations, by where they stand

    def special(self, value: Any) -> bool:
        return False

    def asks(self, eqn: core.JaxprEqn, values: Sequence[Any]) -> bool:
        return False

    def names(self, value: Any) -> tuple[()]:
        return ()

    def leave(self, results: list[Any], walker: Walker) -> list[Any]:
        return results

    def merge(self, left: Any, right: Any) -> Any:
        raise AssertionError("emulation emits nothing")

    def drop(self, value: Any, eqn: core.JaxprEqn, data: bool = False) -> jax.Array:
        raise AssertionError("emulation has no special values")

    def constant(self, value: Any, kind: Any, walker: Walker, what: str = "constant") -> Any:
        """What the program gets from elsewhere, as a number of the format."""
        if self.settings.operations != "all" or not _floating(kind):
            return value
        operation = Operation(what, kind.dtype.name, scope(walker.within))
        return self.nearest(jnp.asarray(value, kind.dtype), operation)

    def nearest(self, value: Array, operation: Operation) -> Array:
        target = self.target(operation)
        if target is None:
            return value
        check(target, operation.dtype, operation.primitive, random=False)
        return rounded(value, target, self.traced)

    def rule(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> Sequence[Any] | None:
        name, all_ = eqn.primitive.name, self.settings.operations == "all"
        if name == "shard_map" and self.start is not None and split_axes(eqn):
            raise UnsupportedPrimitiveError(
                f"'shard_map' on a mesh with axes {split_axes(eqn)}: every device would round its "
                "part by the same random words; pass rounding='nearest', or make the function for "
                "a mesh of one device"
            )
        if name in DESCENDED:
            return None
        if not any(_floating(var.aval) for var in eqn.outvars):
            return bind(eqn, values)
        ordered = self.settings.sums == "sequential" and name in SUMS | UNORDERED
        if ordered and self.target(self._operation(eqn, 0, walker)) is not None:
            if name in UNORDERED:
                raise UnsupportedPrimitiveError(
                    f"{name} adds in an order that is the compiler's; sums='sequential' knows "
                    f"{sorted(SUMS)}: write it with those, or pass sums='result'"
                )
            return walker.run(trace(in_order(eqn), *values)[0], values)
        moves = name in MOVES and not (name in COMPLEX and _complex(eqn.invars[0].aval))
        arrays = [v for v in values if jnp.ndim(v) and _floating(v)]  # a padding value is none
        computed = bool(arrays) and all(id(array) in self.computed for array in arrays)
        if name in SHIFTS:
            values = [
                walker.share("once", v, lambda v=v: once(v, self.one))
                if id(v) in self.computed
                else v
                for v in values
            ]
        results = bind(eqn, values)
        if name in VIEWS | SHIFTS and computed:
            self.computed |= {id(result): result for result in results}
        if moves or (name in CONVERSIONS and not all_):
            return results
        if name not in ARITHMETIC | CONVERSIONS | MOVES and not self.settings.rules.names(name):
            raise UnsupportedPrimitiveError(
                f"emulate does not know what the primitive {name!r} computes; give it a rule of "
                f"its own: {{{name!r}: None, ...}} leaves its results, a format rounds them"
            )
        for at, (var, value) in enumerate(zip(eqn.outvars, results, strict=True)):
            if _floating(var.aval):
                results[at] = self.result(value, at, self._operation(eqn, at, walker), walker)
                if name in ARITHMETIC:
                    self.computed[id(results[at])] = results[at]
        return results

    def result(self, value: Array, at: int, operation: Operation, walker: Walker) -> Array:
        """A result of an operation that computes, or converts, rounded."""
        found = self._result(value, at, operation, walker)
        whole = isinstance(self.target(operation), Numbers)
        return once(found, self.one) if whole and operation.primitive in ARITHMETIC else found

    def _result(self, value: Array, at: int, operation: Operation, walker: Walker) -> Array:
        if self.start is None or operation.primitive in CONVERSIONS:
            return self.nearest(value, operation)
        target = self.target(operation)
        if target is None:
            return value
        check(target, operation.dtype, operation.primitive, random=True)
        number = self.numbers.setdefault((*walker.site, at), len(self.numbers))
        shape = (2, *value.shape) if _complex(value) else value.shape
        return rounded(value, target, self.traced, self.words(shape, number, walker))

    def words(self, shape: tuple[int, ...], number: int, walker: Walker) -> UInt32[Array, "..."]:
        """The random words of one operation, at this step of the loops around it."""
        fold: Any = noise.fold if self.hashed else jax.random.fold_in
        here = walker.share(
            "start", walker.steps, lambda: functools.reduce(fold, walker.steps, self.start)
        )
        if self.hashed:
            return noise.hashed(here, shape, number)
        return noise.words(jax.random.fold_in(here, number), shape, "threefry")

    def _operation(self, eqn: core.JaxprEqn, at: int, walker: Walker) -> Operation:
        """What rules are asked about: of the terms of a sum, the sum."""
        within = walker.within
        if self.settings.sums == "sequential":
            sums = (k for k, e in enumerate(within) if e.primitive.name in SUMS)
            last = next(sums, len(within) - 1)
            eqn, within = within[last], within[: last + 1]
        kind: Any = eqn.outvars[min(at, len(eqn.outvars) - 1)].aval
        return Operation(eqn.primitive.name, kind.dtype.name, scope(within))


def _floating(kind: Any) -> bool:
    return jnp.issubdtype(kind.dtype, jnp.inexact)


def _complex(kind: Any) -> bool:
    return jnp.issubdtype(kind.dtype, jnp.complexfloating)
