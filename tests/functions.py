"""Functions in every style jquant must read: what they are, and what flows into their weights.

Each case is a function `fn(params, *inputs)`, its parameters, two batches, and `moments`: an
independent computation of second moments by path, written with the forward pass spelled out by hand
(for one batch). Shapes are tiny; weights are random.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


@dataclass(frozen=True)
class Case:
    name: str
    fn: Callable[..., Any]
    params: Any
    batches: list[Any]
    moments: Callable[..., dict[str, Any]]  # (params, *inputs) -> path -> [*batch, in, in]

    def __repr__(self) -> str:
        return self.name


# A power of two that holds all but the largest.
DRAWN = 1 << 16


@functools.cache
def _drawn(seed: int) -> np.ndarray:
    return np.asarray(jax.random.normal(jax.random.key(seed), (DRAWN,), jnp.float32))


def _normal(seed: int, *shape: int) -> jax.Array:
    """What `jax.random.normal` draws of a key, to the bit, by one program for every small shape.

    Each number is made of the key and of where it stands.
    """
    count = math.prod(shape)
    if count > DRAWN:
        return jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    return jnp.asarray(_drawn(seed)[:count].reshape(shape))


def _gram(x: Any) -> np.ndarray:
    x = np.asarray(x, np.float64)
    x = x.reshape(-1, x.shape[-1])
    return x.T @ x


# Linen: a scanned stack of rematerialised blocks, and a tied embedding.


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        up = nn.Dense(10, name="up")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(6, name="down")(nn.relu(up)), None


class _Stack(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(11, 6, name="embed")
        stack = nn.scan(
            nn.remat(_Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = stack(name="blocks")(embed(tokens), None)
        return embed.attend(x)


def _linen_moments(params: Any, tokens: jax.Array) -> dict[str, Any]:
    p = params["params"]
    x = p["embed"]["embedding"][tokens]
    ups, downs = [], []
    for k in range(3):
        b = jax.tree.map(lambda leaf, k=k: leaf[k], p["blocks"])
        mean = x.mean(-1, keepdims=True)
        h = (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6)
        h = h * b["norm"]["scale"] + b["norm"]["bias"]
        ups.append(_gram(h))
        h = jax.nn.relu(h @ b["up"]["kernel"] + b["up"]["bias"])
        downs.append(_gram(h))
        x = x + h @ b["down"]["kernel"] + b["down"]["bias"]
    return {
        "params/embed/embedding": _gram(x),
        "params/blocks/up/kernel": np.stack(ups),
        "params/blocks/down/kernel": np.stack(downs),
    }


def _linen() -> Case:
    model = _Stack()
    batches = [jax.random.randint(jax.random.key(k), (2, 5), 0, 11) for k in (1, 2)]
    params = model.init(jax.random.key(0), batches[0])
    params = jax.tree.map(lambda leaf: leaf + 0.1 * _normal(3, *leaf.shape), params)
    return Case("linen-scan-remat-tied", model.apply, params, batches, _linen_moments)


# NNX: LinearGeneral with two contracted axes, and Einsum.


class _Heads(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.split = nnx.Einsum("btd,dnh->btnh", (6, 2, 4), rngs=rngs)
        self.join = nnx.LinearGeneral((2, 4), 5, axis=(-2, -1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.join(jnp.tanh(self.split(x)))


def _nnx() -> Case:
    graph, params = nnx.split(_Heads(nnx.Rngs(0)))

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(x)

    def moments(params: Any, x: jax.Array) -> dict[str, Any]:
        pure = nnx.to_pure_dict(params)
        h = jnp.tanh(jnp.einsum("btd,dnh->btnh", x, pure["split"]["kernel"]))
        return {
            "split/kernel/value": _gram(x),
            "join/kernel/value": _gram(h.reshape(*h.shape[:2], 8)),
        }

    return Case("nnx-general-einsum", fn, params, [_normal(k, 2, 3, 6) for k in (1, 2)], moments)


# Convolutions: grouped, strided, dilated.


def _conv() -> Case:
    params = {"grouped": _normal(0, 3, 2, 2, 6), "strided": _normal(1, 2, 2, 6, 5)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, params["grouped"], (1, 1), "SAME", feature_group_count=2, rhs_dilation=(1, 2),
            dimension_numbers=numbers,
        )  # fmt: skip
        return jax.lax.conv_general_dilated(
            jnp.tanh(x), params["strided"], (2, 1), [(1, 0), (0, 1)], dimension_numbers=numbers
        )

    def moments(params: Any, x: jax.Array) -> dict[str, Any]:
        # kernel 3×2, dilation (1, 2): extents 3 and 3; SAME pads (1, 1) on both axes
        x = np.asarray(x, np.float64)
        wide = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        n, h, w, _ = x.shape
        groups = []
        y = np.zeros((n, h, w, 6))
        for g in range(2):
            patches = np.stack(
                [
                    wide[:, i : i + h, 2 * j : 2 * j + w, 2 * g + c]
                    for i in range(3)
                    for j in range(2)
                    for c in range(2)
                ],
                -1,
            )
            groups.append(_gram(patches))
            kernel = np.asarray(params["grouped"], np.float64)[..., 3 * g : 3 * g + 3].reshape(
                12, 3
            )
            y[..., 3 * g : 3 * g + 3] = patches @ kernel
        y = np.pad(np.tanh(y), ((0, 0), (1, 0), (0, 1), (0, 0)))
        rows, columns = (h + 1 - 2) // 2 + 1, w
        patches = np.stack(
            [
                y[:, i : i + 2 * rows - 1 : 2, j : j + columns, c]
                for i in range(2)
                for j in range(2)
                for c in range(6)
            ],
            -1,
        )
        return {"grouped": np.stack(groups), "strided": _gram(patches)}

    return Case(
        "conv-grouped-strided", fn, params, [_normal(k, 2, 5, 4, 4) for k in (2, 3)], moments
    )


# Experts under vmap, and rows routed to experts by ragged_dot.


def _experts() -> Case:
    params = {"experts": _normal(0, 3, 4, 5), "gate": _normal(1, 6, 4)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ params["gate"])  # [3, tokens, 4]
        return jax.vmap(lambda h, w: h @ w)(h, params["experts"])

    def moments(params: Any, x: jax.Array) -> dict[str, Any]:
        h = jnp.tanh(x @ params["gate"])
        return {"gate": _gram(x), "experts": np.stack([_gram(row) for row in h])}

    return Case("vmapped-experts", fn, params, [_normal(k, 3, 5, 6) for k in (2, 3)], moments)


def _ragged() -> Case:
    params = {"experts": _normal(0, 3, 4, 5)}
    sizes = jnp.array([2, 0, 4])

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(jnp.sin(x), params["experts"], sizes)

    def moments(params: Any, x: jax.Array) -> dict[str, Any]:
        x = np.sin(np.asarray(x))
        return {"experts": np.stack([_gram(x[:2]), np.zeros((4, 4)), _gram(x[2:6])])}

    return Case("ragged-dot", fn, params, [_normal(k, 6, 4) for k in (2, 3)], moments)


# Equinox, and plain functions with loops, branches, views.


def _equinox() -> Case:
    params, static = eqx.partition(
        eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(0), dtype=jnp.float32), eqx.is_inexact_array
    )

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(params, static))(x)

    def moments(params: Any, x: jax.Array) -> dict[str, Any]:
        found = {}
        for k, layer in enumerate(params.layers):
            found[f"layers/{k}/weight"] = _gram(x)
            x = x @ layer.weight.T + layer.bias
            x = jax.nn.relu(x) if k < 2 else x
        return found

    return Case("equinox-mlp", fn, params, [_normal(k, 7, 4) for k in (1, 2)], moments)


def _control() -> Case:
    params = {"loop": 0.5 * _normal(0, 4, 4), "yes": _normal(1, 4, 3), "no": _normal(2, 4, 3)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        def step(state: Any) -> Any:
            k, h = state
            return k + 1, jnp.tanh(h @ params["loop"])

        _, h = jax.lax.while_loop(lambda state: state[0] < 3, step, (0, x))
        branches = lambda h: h @ params["yes"], lambda h: (2 * h) @ params["no"]
        return jax.lax.cond(x[0, 0] > 0, *branches, h)

    def moments(params: Any, x: jax.Array) -> dict[str, Any]:
        loop, h = 0.0, x
        for _ in range(3):
            loop = loop + _gram(h)
            h = jnp.tanh(h @ params["loop"])
        yes = bool(x[0, 0] > 0)
        zero = np.zeros((4, 4))
        return {"loop": loop, "yes": _gram(h) if yes else zero, "no": zero if yes else _gram(2 * h)}

    batches = [_normal(k, 5, 4) for k in (3, 4)]
    batches = [batches[0].at[0, 0].set(1.0), batches[1].at[0, 0].set(-1.0)]
    return Case("plain-cond-while", fn, params, batches, moments)


def _views() -> Case:
    """Casts, transposes, reshapes, slices, a stack indexed in a Python loop, custom derivatives."""
    params = {
        "qkv": _normal(0, 6, 12),
        "stack": 0.4 * _normal(1, 3, 4, 4),
        "rows": _normal(2, 5, 4),
    }

    @jax.custom_vjp
    def project(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    # A derivative that is not the true one, so that inlining the primal would be seen.
    project.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (2 * g @ r[1].T, r[0].T @ g))

    def fn(params: Any, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(params["qkv"].astype(jnp.bfloat16).astype(jnp.float32), 3, axis=1)
        h = (x @ q) * (x @ k) + x @ v
        for layer in range(3):
            h = jnp.tanh(h @ params["stack"][layer].T)
        return project(h, params["rows"].T.reshape(2, 2, 5).reshape(4, 5))

    def moments(params: Any, x: jax.Array) -> dict[str, Any]:
        w = params["qkv"].astype(jnp.bfloat16).astype(jnp.float32)
        h = (x @ w[:, :4]) * (x @ w[:, 4:8]) + x @ w[:, 8:]
        stack = []
        for layer in range(3):
            stack.append(_gram(h))
            h = jnp.tanh(h @ params["stack"][layer].T)
        return {"qkv": _gram(x), "stack": np.stack(stack), "rows": _gram(h)}

    return Case("views", fn, params, [_normal(k, 5, 6) for k in (3, 4)], moments)


CASES = [_linen(), _nnx(), _conv(), _experts(), _ragged(), _equinox(), _control(), _views()]
