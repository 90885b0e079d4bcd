"""Hadamard matrices: entries ±1, rows at right angles; as products of small ones.

`H Hᵀ = n I`, so `H / √n` is a rotation, and one whose entries are all of the same size: it spreads
what stands in one coordinate over all of them. Orders are 1, 2 and multiples of 4. Those here are
Kronecker products of Sylvester's `[[1, 1], [1, -1]]`, of both of Paley's constructions for a prime
q (order q + 1 where q ≡ 3, and 2 (q + 1) where q ≡ 1 modulo 4), and of Williamson's arrays of four
symmetric circulants, whose first rows were found by search; none above `LARGEST`, since these are
applied as they are. Up to that, of all multiples of 4 only 156, 188, 236 and 244 are missing.

A Kronecker product is applied factor by factor, `n · (k₁ + k₂ + …)` multiplications for `k₁ k₂ …`
entries; factors are gathered until they are of `DENSE` rows, where a matrix unit has enough to do.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8, Integer

DENSE = 64  # heuristic
LARGEST = 256  # heuristic

# The first halves of the circulants' first rows; the others mirror them.
_WILLIAMSON = {
    52: "+--++++ +++-+-+ +-++--+ +-+++--",
    92: "+--+-+-+++++ +--++-+-+-++ +++---++--++ +--+--+++---",
    100: "+-++---++++++ +-+---+---+++ +-+--+-++--++ ++--+--++-+--",
    116: "+--+-++---+++++ +-+-++---+--+++ +++-++-++++---+ +-+-+----++-++-",
    172: "+---++--++++-+-+++-++- ++---++++-+--+--++---- "
    "+++-+-++--+-+-++++-+-- ++-++++++----+-+--++-+",
}


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % k for k in range(2, math.isqrt(q) + 1))


def _circulant(row: Integer[np.ndarray, " n"]) -> Integer[np.ndarray, "n n"]:
    return np.stack([np.roll(row, k) for k in range(len(row))])


def _paley(q: int, doubled: bool) -> Integer[np.ndarray, "n n"]:
    """Paley's matrix of order q + 1, or 2 (q + 1)."""
    squares = {k * k % q for k in range(1, q)}
    character = np.array([0] + [1 if k in squares else -1 for k in range(1, q)])
    core = np.zeros((q + 1, q + 1), int)
    core[0, 1:], core[1:, 0] = 1, 1 if doubled else -1
    core[1:, 1:] = _circulant(character).T
    one = np.eye(q + 1, dtype=int)
    if not doubled:
        return core + one
    return np.kron(core, [[1, 1], [1, -1]]) + np.kron(one, [[1, -1], [-1, -1]])


def _williamson(halves: str) -> Integer[np.ndarray, "n n"]:
    """Williamson's array of circulants of these halves of rows."""
    rows = [[1 if sign == "+" else -1 for sign in half] for half in halves.split()]
    a, b, c, d = (_circulant(np.array([*row, *row[:0:-1]])) for row in rows)
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def _own(n: int) -> Integer[np.ndarray, "n n"] | None:
    """A matrix of an order by one of the constructions, no product of smaller ones."""
    if n == 2:
        return np.array([[1, 1], [1, -1]])
    if n > LARGEST or n % 4:
        return None
    if n in _WILLIAMSON:
        return _williamson(_WILLIAMSON[n])
    if _is_prime(n - 1):  # n - 1 ≡ 3 modulo 4
        return _paley(n - 1, False)
    q = n // 2 - 1
    return _paley(q, True) if q % 4 == 1 and _is_prime(q) else None


@functools.cache
def _orders(n: int) -> tuple[int, ...] | None:
    """The orders of factors of a Hadamard matrix of order n, none of which is taken apart."""
    if n == 1:
        return ()
    for k in (2, *range(12, min(n, LARGEST) + 1, 4)):  # of Sylvester's are those between
        if n % k == 0 and _own(k) is not None and (rest := _orders(n // k)) is not None:
            return (k, *rest)
    return None


def has_hadamard(n: int) -> bool:
    """Whether there is a matrix of this order here.

    Example:
        >>> [n for n in range(1, 50) if has_hadamard(n)]
        [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48]
    """
    return _orders(n) is not None


@functools.cache
def _factors(n: int) -> tuple[Int8[np.ndarray, "k k"], ...]:
    """Matrices whose Kronecker product is a Hadamard matrix of order n, gathered up to `DENSE`."""
    orders = _orders(n)
    if orders is None:
        raise ValueError(f"no Hadamard matrix of order {n} is known here")
    gathered: list[np.ndarray] = []
    for order in sorted(orders, reverse=True):
        one = _own(order)
        assert one is not None
        if gathered and len(gathered[-1]) * order <= DENSE:
            gathered[-1] = np.kron(gathered[-1], one)
        else:
            gathered.append(one)
    return tuple(one.astype(np.int8) for one in gathered)


def hadamard(n: int) -> Int8[np.ndarray, "n n"]:
    """The matrix of order n, entries ±1.

    Raises:
        ValueError: there is none here, see `has_hadamard`.

    Example:
        >>> h = hadamard(12).astype(int)
        >>> bool((h @ h.T == 12 * np.eye(12)).all())
        True
    """
    return functools.reduce(np.kron, _factors(n), np.ones((1, 1), np.int8))


def by_hadamard(
    x: Float[Array, "*rows in"], n: int, *, transposed: bool = False
) -> Float[Array, "*rows in"]:
    """Rows times `H / √n` from the left, each run of n entries for itself, float32.

    Args:
        x: rows; n divides their length.
        n: order of the matrix.
        transposed: whether it is `Hᵀ`, which undoes it.

    Example:
        >>> x = jnp.arange(24.0).reshape(1, 24)
        >>> y = by_hadamard(x, 12)
        >>> bool(jnp.allclose(by_hadamard(y, 12, transposed=True), x, atol=1e-5))
        True
    """
    factors = _factors(n)
    *rows, width = x.shape
    y = x.astype(jnp.float32).reshape(*rows, width // n, *(len(f) for f in factors))
    for k, factor in enumerate(factors):
        axis = len(rows) + 1 + k
        matrix = jnp.asarray(factor, jnp.float32)
        y = lax.dot_general(
            y, matrix, (((axis,), (0 if transposed else 1,)), ((), ())),
            precision=lax.Precision.HIGHEST,
        )  # fmt: skip
        y = jnp.moveaxis(y, -1, axis)
    return y.reshape(x.shape) * jnp.float32(n**-0.5)
