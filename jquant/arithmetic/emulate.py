"""Any JAX program in low precision: every result rounded to a format, nearest or at random.

`emulate(fn, format)` walks the program's equations (`programs.walker`) and rounds what comes out of
each one that computes. Loops stay loops, so the cost is a few integer operations for each
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
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jquant.arithmetic.once import Once, one_of
from jquant.arithmetic.rounder import Operations, Rounder, Rounding, Settings, Sums
from jquant.arithmetic.rules import Rules
from jquant.numerics import noise
from jquant.programs.client import Silent
from jquant.programs.walker import Walker, trace

PAPERS = ("paxton2022climate", "dawson2017rpe")


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
            `jq.grids.Float(e, m)`; or `float16`, `bfloat16`, `float32`, `float8_e4m3fn` or
            `float8_e5m2`, with the range and the overflow of a cast; None: leave it. A traced
            integer gives all precisions from one compiled program. Or ordered rules: a mapping
            from regular expressions, for a whole primitive (`"exp"`, `"input"`, `"constant"`),
            dtype (`"float64"`) or path (`"physics/.*"`, by `jax.named_scope`), to formats, of which
            the first that matches decides, and what none matches is left; or a function of an
            operation, with its `primitive`, `dtype` and `scope`.
        rounding: "nearest", ties to even, or "stochastic": up or down at random, with the exact
            value as the mean. What enters (inputs, constants, conversions) goes to nearest.
        operations: "all": every floating number is one of the format, inputs, constants and
            conversions too; or "arithmetic": only results are rounded. Selecting, comparing,
            moving and integers have no part.
        sums: "result": a dot product or a reduction is one operation; or "sequential": each product
            and each partial sum is rounded, `((0 + x_0) + x_1) + …`, over several axes with the
            last one running fastest.
        source: of random words: "hash" (default), counted out of the key, or "threefry", slower and
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
    settings = Settings(rules, rounding, operations, sums, source)
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
def _compiled(fn: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    @jax.jit
    def run(traced: list[Array], key: PRNGKeyArray | None, inputs: tuple[Any, ...]) -> Any:
        closed, structure = trace(fn, *inputs)
        one = one_of(jax.tree.leaves((inputs, traced, key)))
        rounder = Rounder(settings, traced, key, one)
        client = Silent(Once(rounder.rule, one))
        walker = Walker(client, every=True, constant=rounder.constant)
        leaves = [rounder.constant(leaf, leaf, walker, "input") for leaf in jax.tree.leaves(inputs)]
        results = walker.run(closed, leaves)
        rounder.target.check()
        return jax.tree.unflatten(structure, results)

    return run
