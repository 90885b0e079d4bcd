"""Sparse spectral training: all singular values of a weight move, and few of its vectors at a time.

A weight W is kept as `U diag(s) Vᵀ`, all m = min(out, in) of it. Each step moves all of s. Of the
pairs of columns of U and V only `rank` move, drawn anew every `draw` steps without replacement with

    p_i = ½ (1 / m + s_i / Σ s)

so that large ones are refined and small ones are not forgotten. Moved columns are made unit vectors
again, and every `rounds` draws the three are computed anew by a singular value decomposition of W.
Gradients are the paper's enhanced ones, with s left out of those of the vectors:

    dU = dW V,    ds = diag(Uᵀ dW V),    dV = dWᵀ U

Zhao et al., Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks,
2024, https://arxiv.org/abs/2405.15481

Written from the paper's abstract and a summary of it, and where these leave it open:

1. When vectors are drawn and when W is decomposed are two numbers here, in steps and in draws.
2. Adam's moments of vectors belong to the drawn ones and begin at zero with every draw; those of s
   go on, also over a decomposition, after which the i-th value may be another one's.
3. A singular value that a step makes negative stays negative until the next decomposition.
4. One learning rate is for all three; vectors are unit vectors, so their steps are of that size.
5. Euclidean weights only; the paper trains hyperbolic ones too.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Integer, PRNGKeyArray


class Factors(NamedTuple):
    """A weight, or a stack of some, as `u diag(s) vᵀ`, with m = min(out, in)."""

    u: Float[Array, "*batch out m"]
    s: Float[Array, "*batch m"]
    v: Float[Array, "*batch in m"]


def _turned(a: Array) -> Array:
    return jnp.swapaxes(a, -1, -2)


def factorised(w: Float[Array, "*batch out in"]) -> Factors:
    """The singular value decomposition."""
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return Factors(u, s, _turned(vt))


@jax.custom_vjp
def matrix(f: Factors) -> Float[Array, "*batch out in"]:
    """The weight; its gradients are the enhanced ones."""
    return (f.u * f.s[..., None, :]) @ _turned(f.v)


def _forward(f: Factors) -> tuple[Array, Factors]:
    return matrix(f), f


def _backward(f: Factors, dw: Array) -> tuple[Factors]:
    du = dw @ f.v
    return (Factors(du, jnp.sum(f.u * du, axis=-2), _turned(dw) @ f.u),)


matrix.defvjp(_forward, _backward)


class Drawn(NamedTuple):
    """The state of one weight, or of a stack.

    Attributes:
        columns: which pairs move, `[*batch, rank]`.
        pairs, values: Adam's states, of these columns of U and V, and of s.
    """

    columns: Integer[Array, "*batch rank"]
    pairs: Any
    values: Any


class State(NamedTuple):
    """The state of all weights: how many steps are done, and a `Drawn` for each `Factors`."""

    count: Integer[Array, ""]
    weights: list[Drawn]


def is_factors(leaf: Any) -> bool:
    return isinstance(leaf, Factors)


def chances(s: Float[Array, "*batch m"]) -> Float[Array, "*batch m"]:
    """How likely each pair is to be drawn; they add up to one.

    Example:
        >>> chances(jnp.array([3.0, 1.0])).tolist()
        [0.625, 0.375]
    """
    size = jnp.abs(s)
    total = jnp.maximum(jnp.sum(size, axis=-1, keepdims=True), 1e-30)
    return 0.5 * (1.0 / s.shape[-1] + size / total)


def sparse_spectral(
    rate: optax.ScalarOrSchedule, rank: int, key: PRNGKeyArray, draw: int = 20, rounds: int = 5
) -> optax.GradientTransformation:
    """A transformation of the gradients of a tree of `Factors`.

    Args:
        rate: Adam's learning rate.
        rank: how many pairs of vectors move at a time.
        key: of the draws.
        draw: steps between two draws (heuristic).
        rounds: draws between two decompositions (heuristic).
    """
    adam = optax.adam(rate)

    def init(params: Any) -> State:
        leaves = jax.tree.leaves(params, is_leaf=is_factors)
        drawn = [_drawn(adam, f, rank, _key(key, 0, k)) for k, f in enumerate(leaves)]
        return State(jnp.zeros((), jnp.int32), drawn)

    def update(grads: Any, state: State, params: Any = None) -> tuple[Any, State]:
        if params is None:
            raise ValueError("sparse_spectral needs the factors: pass params")
        leaves, structure = jax.tree.flatten(params, is_leaf=is_factors)
        gradients = jax.tree.leaves(grads, is_leaf=is_factors)
        count, news, updates = state.count + 1, [], []
        for k, (f, g, own) in enumerate(zip(leaves, gradients, state.weights, strict=True)):
            moved, own = _moved(adam, f, g, own)
            moved = jax.lax.cond(count % (draw * rounds) == 0, _anew, lambda f: f, moved)
            fresh = partial(_drawn, adam, rank=rank, key=_key(key, count, k))
            own = jax.lax.cond(
                count % draw == 0,
                lambda f, own, fresh=fresh: fresh(f)._replace(values=own.values),
                lambda f, own: own,
                moved, own,
            )  # fmt: skip
            news.append(own)
            updates.append(jax.tree.map(jnp.subtract, moved, f))
        return jax.tree.unflatten(structure, updates), State(count, news)

    return optax.GradientTransformation(init, update)


def _key(key: PRNGKeyArray, count: Any, number: int) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.fold_in(key, count), number)


def _drawn(adam: Any, f: Factors, rank: int, key: PRNGKeyArray) -> Drawn:
    """Pairs drawn one after the other without replacement: the largest of log p + Gumbel noise."""
    noise = jax.random.gumbel(key, f.s.shape, jnp.float32)
    columns = jax.lax.top_k(jnp.log(chances(f.s)) + noise, rank)[1]
    pairs = _picked(f.u, columns), _picked(f.v, columns)
    return Drawn(columns, adam.init(pairs), adam.init(f.s))


def _moved(adam: Any, f: Factors, g: Factors, own: Drawn) -> tuple[Factors, Drawn]:
    """Factors after a step of all values and of the drawn pairs."""
    at = own.columns
    pairs = _picked(f.u, at), _picked(f.v, at)
    step, pair_state = adam.update((_picked(g.u, at), _picked(g.v, at)), own.pairs, pairs)
    news = optax.apply_updates(pairs, step)
    change, value_state = adam.update(g.s, own.values, f.s)
    u, v = (
        jnp.put_along_axis(a, _columns(at, new), _unit(new), axis=-1, inplace=False)
        for a, new in zip((f.u, f.v), news, strict=True)
    )
    return Factors(u, f.s + change, v), Drawn(at, pair_state, value_state)


def _columns(at: Array, pairs: Array) -> Array:
    return jnp.broadcast_to(at[..., None, :], pairs.shape)


def _picked(a: Float[Array, "*batch n m"], columns: Array) -> Float[Array, "*batch n rank"]:
    return jnp.take_along_axis(a, columns[..., None, :], axis=-1)


def _unit(a: Float[Array, "*batch n rank"]) -> Float[Array, "*batch n rank"]:
    return a / jnp.maximum(jnp.linalg.norm(a, axis=-2, keepdims=True), 1e-30)


def _anew(f: Factors) -> Factors:
    """The same weight, with orthogonal vectors and values that are not negative."""
    return factorised(matrix(f))
