"""Small networks of every making, and the stages in which they are to be quantized.

Each network is a function `fn(params, *inputs)`, its parameters, calibration batches (the last one
mostly of another size), expressions for the weights that are quantized, and the expected stages,
written by hand from the network's drawing: one tuple of piece names per stage. `path[2]` is layer 2
of a scanned stack. Shapes are tiny; weights are random; every weight sees at least as many tokens
as it has inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Stages = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)  # hashed by identity
class Network:
    """A network and its stages: `weight` and `block` are the two granularities."""

    name: str
    fn: Callable[..., Any]
    params: Any
    batches: list[tuple[Any, ...]]
    paths: tuple[str, ...]  # regular expressions: what is quantized
    weight: Stages
    block: Stages

    def __repr__(self) -> str:
        return self.name


# Random numbers are NumPy's: JAX would compile a program for every shape.


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def _array(values: Any) -> jax.Array:
    return jnp.asarray(np.asarray(values, np.float32))


def _tokens(vocabulary: int, *shapes: tuple[int, int]) -> list[tuple[Any, ...]]:
    return [
        (jnp.asarray(np.random.default_rng(k).integers(vocabulary, size=shape), jnp.int32),)
        for k, shape in enumerate(shapes, start=100)
    ]


def _floats(*shapes: tuple[int, ...]) -> list[tuple[Any, ...]]:
    """Inputs whose channels are correlated and of unlike size."""
    width = shapes[0][-1]
    mix = _normal(99, width, width) * np.linspace(0.3, 1.5, width)
    return [(_array(_normal(k, *shape) @ mix),) for k, shape in enumerate(shapes, start=100)]


class _Seeds:
    """Random matrices, one after the other, scaled so that signals keep their size."""

    def __init__(self, seed: int) -> None:
        self.seed = 1000 * seed

    def __call__(self, *shape: int, fan: int | None = None, scale: float = 1.0) -> jax.Array:
        self.seed += 1
        return _array(scale * _normal(self.seed, *shape) / (fan or shape[-2]) ** 0.5)


def _norm(x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """One head of attention, `[batch, time, features]`."""
    scores = jnp.einsum("btd,bsd->bts", q, k) / q.shape[-1] ** 0.5
    return jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores), v)


# 1. Linen: a scanned stack of rematerialised blocks, attention and a gated MLP in each.


class _Gated(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        h = nn.LayerNorm(name="norm")(x)
        q, k, v = (nn.DenseGeneral((2, 3), name=name)(h) for name in ("query", "key", "value"))
        scores = nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k) / 3**0.5)
        mixed = jnp.einsum("bnts,bsnh->btnh", scores, v)
        x = x + nn.DenseGeneral(8, axis=(-2, -1), name="out")(mixed)
        h = nn.LayerNorm(name="norm_mlp")(x)
        h = nn.silu(nn.Dense(12, name="gate")(h)) * nn.Dense(12, name="up")(h)
        return x + nn.Dense(8, name="down")(h), None


class _Scanned(nn.Module):
    axis: int = 0
    block: type[nn.Module] = _Gated

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(13, 8, name="embed")(tokens)
        stack = nn.scan(
            nn.remat(self.block),  # type: ignore[arg-type]
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = stack(name="blocks")(x, None)
        return nn.Dense(5, name="head")(nn.LayerNorm(name="norm")(x))


def _linen_params(model: nn.Module, *inputs: Any) -> Any:
    """Parameters in which no bias, scale or statistic is trivial."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    made = []
    for seed, (keys, leaf) in enumerate(leaves, start=200):
        noise, name = _normal(seed, *leaf.shape), str(keys[-1].key)
        kinds = {"kernel": 0.35 * noise, "embedding": noise, "bias": 0.2 * noise,
                 "mean": 0.2 * noise}  # fmt: skip
        made.append(_array(kinds.get(name, 1 + 0.5 * np.abs(noise))))  # scales and variances
    return jax.tree.unflatten(structure, made)


def _linen_scan() -> Network:
    model = _Scanned()
    batches = _tokens(13, (4, 12), (4, 12), (3, 12))
    blocks = "params/blocks"
    weight: list[tuple[str, ...]] = []
    block: list[tuple[str, ...]] = []
    for k in range(3):
        layer = [
            (f"{blocks}/query/kernel[{k}]", f"{blocks}/key/kernel[{k}]",
             f"{blocks}/value/kernel[{k}]"),
            (f"{blocks}/out/kernel[{k}]",),
            (f"{blocks}/gate/kernel[{k}]", f"{blocks}/up/kernel[{k}]"),
            (f"{blocks}/down/kernel[{k}]",),
        ]  # fmt: skip
        weight += layer
        block.append(tuple(piece for stage in layer for piece in stage))
    head = ("params/head/kernel",)
    return Network(
        "linen-scan-attention", model.apply, _linen_params(model, *batches[0]), batches,
        ("params/blocks/.*/kernel", "params/head/kernel"), (*weight, head), (*block, head),
    )  # fmt: skip


# 1b. The same with the layers on the second axis of every kernel, as MaxText stores them.


class _Plain(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        h = nn.tanh(nn.Dense(6, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(8, name="down")(h), None


def _linen_scan_axis() -> Network:
    model = _Scanned(axis=1, block=_Plain)
    batches = _tokens(13, (4, 12), (3, 12))
    up, down = "params/blocks/up/kernel", "params/blocks/down/kernel"
    return Network(
        "linen-scan-axis-1", model.apply, _linen_params(model, *batches[0]), batches,
        ("params/blocks/.*/kernel", "params/head/kernel"),
        weight=(
            (f"{up}[0]",), (f"{down}[0]",),
            (f"{up}[1]",), (f"{down}[1]",),
            (f"{up}[2]",), (f"{down}[2]",),
            ("params/head/kernel",),
        ),
        block=(
            (f"{up}[0]", f"{down}[0]"),
            (f"{up}[1]", f"{down}[1]"),
            (f"{up}[2]", f"{down}[2]"),
            ("params/head/kernel",),
        ),
    )  # fmt: skip


# 2. NNX: a list of blocks between two projections.


class _NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class _NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.enter = nnx.Linear(6, 8, rngs=rngs)
        self.blocks = nnx.List([_NnxBlock(rngs) for _ in range(3)])
        self.leave = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(jnp.tanh(x))


def _nnx_list() -> Network:
    graph, params = nnx.split(_NnxNet(nnx.Rngs(0)))

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(x)

    return Network(
        "nnx-list", fn, params, _floats((16, 6), (16, 6), (9, 6)), (".*/kernel/value",),
        weight=(
            ("enter/kernel/value",),
            ("blocks/0/up/kernel/value",), ("blocks/0/down/kernel/value",),
            ("blocks/1/up/kernel/value",), ("blocks/1/down/kernel/value",),
            ("blocks/2/up/kernel/value",), ("blocks/2/down/kernel/value",),
            ("leave/kernel/value",),
        ),
        block=(
            ("enter/kernel/value",),
            ("blocks/0/up/kernel/value", "blocks/0/down/kernel/value"),
            ("blocks/1/up/kernel/value", "blocks/1/down/kernel/value"),
            ("blocks/2/up/kernel/value", "blocks/2/down/kernel/value"),
            ("leave/kernel/value",),
        ),
    )  # fmt: skip


# 3. Equinox: blocks whose attention and MLP stand side by side on one normalised input.


class _EqxBlock(eqx.Module):
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 3)
        self.norm = eqx.nn.LayerNorm(8, dtype=jnp.float32)
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[0], dtype=jnp.float32)
        self.up = eqx.nn.Linear(8, 10, key=keys[1], dtype=jnp.float32)
        self.down = eqx.nn.Linear(10, 8, key=keys[2], dtype=jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:  # [time, features]
        h = jax.vmap(self.norm)(x)
        mlp = jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(h)))
        return x + self.attention(h, h, h) + mlp


class _EqxNet(eqx.Module):
    blocks: list[_EqxBlock]
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 3)
        self.blocks = [_EqxBlock(keys[0]), _EqxBlock(keys[1])]
        self.head = eqx.nn.Linear(8, 5, key=keys[2], dtype=jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(x)


def _equinox() -> Network:
    params, static = eqx.partition(_EqxNet(jax.random.key(0)), eqx.is_inexact_array)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(params, static))(x)

    first = [
        (f"blocks/{k}/attention/query_proj/weight", f"blocks/{k}/attention/key_proj/weight",
         f"blocks/{k}/attention/value_proj/weight", f"blocks/{k}/up/weight")
        for k in (0, 1)
    ]  # fmt: skip
    second = [
        (f"blocks/{k}/attention/output_proj/weight", f"blocks/{k}/down/weight") for k in (0, 1)
    ]
    head = ("head/weight",)
    return Network(
        "equinox-parallel", fn, params, _floats((3, 7, 8), (3, 7, 8), (2, 7, 8)), (".*/weight",),
        weight=(first[0], second[0], first[1], second[1], head),
        block=((*first[0], *second[0]), (*first[1], *second[1]), head),
    )  # fmt: skip


# 4. Haiku's naming: a flat dictionary of modules, slashes in the keys.


def _haiku() -> Network:
    make = _Seeds(4)
    params: dict[str, dict[str, jax.Array]] = {"tower/~/linear": {"w": make(6, 8), "b": make(1, 8)}}
    for k in range(2):
        params[f"tower/~/block_{k}/~/linear"] = {"w": make(8, 16), "b": make(1, 16)}
        params[f"tower/~/block_{k}/~/linear_1"] = {"w": make(16, 8), "b": make(1, 8)}
    params["tower/~/linear_1"] = {"w": make(8, 3), "b": make(1, 3)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        def linear(name: str, x: jax.Array) -> jax.Array:
            return x @ params[name]["w"] + params[name]["b"][0]

        x = linear("tower/~/linear", x)
        for k in range(2):
            # The first half is gated by the second: only 8 of 16 features are new.
            h = jax.nn.glu(linear(f"tower/~/block_{k}/~/linear", _norm(x)))
            x = x + linear(f"tower/~/block_{k}/~/linear_1", jnp.concatenate([h, x], -1))
        return linear("tower/~/linear_1", x)

    t = "tower/~"
    return Network(
        "haiku", fn, params, _floats((20, 6), (20, 6), (7, 6)), (".*/w",),
        weight=(
            (f"{t}/linear/w",),
            (f"{t}/block_0/~/linear/w",), (f"{t}/block_0/~/linear_1/w",),
            (f"{t}/block_1/~/linear/w",), (f"{t}/block_1/~/linear_1/w",),
            (f"{t}/linear_1/w",),
        ),
        block=(
            (f"{t}/linear/w",),
            (f"{t}/block_0/~/linear/w", f"{t}/block_0/~/linear_1/w"),
            (f"{t}/block_1/~/linear/w", f"{t}/block_1/~/linear_1/w"),
            (f"{t}/linear_1/w",),
        ),
    )  # fmt: skip


# 5. An encoder whose head is its embedding: the lookup is no stage, the product is the last one.


def _tied() -> Network:
    make = _Seeds(5)

    def layer() -> dict[str, jax.Array]:
        return {"q": make(8, 8), "k": make(8, 8), "v": make(8, 8), "o": make(8, 8),
                "up": make(8, 12), "down": make(12, 8)}  # fmt: skip

    params = {"embed": make(17, 8, fan=1), "layers": [layer(), layer()], "position": make(1, 9, 8)}

    def fn(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens] + params["position"]
        for p in params["layers"]:
            h = _norm(x)
            x = x + _attend(h @ p["q"], h @ p["k"], h @ p["v"]) @ p["o"]
            x = x + jax.nn.relu(_norm(x) @ p["up"]) @ p["down"]
        return _norm(x) @ params["embed"].T

    layers = [
        [
            (f"layers/{k}/q", f"layers/{k}/k", f"layers/{k}/v"),
            (f"layers/{k}/o",),
            (f"layers/{k}/up",),
            (f"layers/{k}/down",),
        ]
        for k in (0, 1)
    ]
    return Network(
        "tied-encoder", fn, params, _tokens(17, (3, 9), (3, 9), (2, 9)), ("embed", "layers/.*"),
        weight=(*layers[0], *layers[1], ("embed",)),
        block=(sum(layers[0], ()), sum(layers[1], ()), ("embed",)),
    )  # fmt: skip


# 6. Convolutions with batch normalisation: by stored statistics, and by those of the batch.


class _Residual(nn.Module):
    features: int
    stride: int
    stored: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def norm(x: jax.Array) -> jax.Array:
            return nn.BatchNorm(use_running_average=self.stored)(x)

        strides = (self.stride, self.stride)
        h = nn.relu(norm(nn.Conv(self.features, (3, 3), strides)(x)))
        h = norm(nn.Conv(self.features, (3, 3))(h))
        if self.stride > 1:
            x = nn.Conv(self.features, (1, 1), strides)(x)
        return nn.relu(x + h)


class _ResNet(nn.Module):
    stored: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.BatchNorm(use_running_average=self.stored)(nn.Conv(4, (3, 3))(x))
        x = _Residual(4, 1, self.stored)(nn.relu(x))
        x = _Residual(6, 2, self.stored)(x)
        return nn.Dense(5)(x.mean((1, 2)))


def _resnet(stored: bool) -> Network:
    model = _ResNet(stored)
    batches = _floats((5, 6, 6, 3), (5, 6, 6, 3), (3, 6, 6, 3))

    def fn(params: Any, x: jax.Array) -> jax.Array:
        if stored:
            return model.apply(params, x)  # type: ignore[return-value]
        return model.apply(params, x, mutable=["batch_stats"])[0]  # type: ignore[index]

    # Every convolution is a numbered component; of a residual block, the block is the first one.
    zero, one = "params/_Residual_0", "params/_Residual_1"
    return Network(
        f"conv-{'stored' if stored else 'batch'}-statistics",
        fn, _linen_params(model, *batches[0]), batches, (".*/kernel",),
        weight=(
            ("params/Conv_0/kernel",),
            (f"{zero}/Conv_0/kernel",), (f"{zero}/Conv_1/kernel",),
            (f"{one}/Conv_0/kernel", f"{one}/Conv_2/kernel"), (f"{one}/Conv_1/kernel",),
            ("params/Dense_0/kernel",),
        ),
        block=(
            ("params/Conv_0/kernel",),
            (f"{zero}/Conv_0/kernel", f"{zero}/Conv_1/kernel"),
            (f"{one}/Conv_0/kernel", f"{one}/Conv_1/kernel", f"{one}/Conv_2/kernel"),
            ("params/Dense_0/kernel",),
        ),
    )  # fmt: skip


# 7. Experts by `ragged_dot`, rows sorted by expert, beside an expert that all tokens share.


def _ragged() -> Network:
    make = _Seeds(7)

    def layer() -> dict[str, Any]:
        return {"router": make(6, 3, scale=2), "up": make(3, 6, 8), "down": make(3, 8, 6),
                "shared": {"up": make(6, 7), "down": make(7, 6)}}  # fmt: skip

    params = {"layers": [layer(), layer()], "head": make(6, 4)}

    def experts(p: Any, x: jax.Array) -> jax.Array:
        probabilities = jax.nn.softmax(x @ p["router"])
        chosen = jnp.argmax(probabilities, -1)
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=3)
        h = jnp.tanh(jax.lax.ragged_dot(x[order], p["up"], sizes))
        y = jax.lax.ragged_dot(h, p["down"], sizes)[jnp.argsort(order)]
        return y * jnp.max(probabilities, -1, keepdims=True)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        for p in params["layers"]:
            h = _norm(x)
            x = x + experts(p, h) + jnp.tanh(h @ p["shared"]["up"]) @ p["shared"]["down"]
        return x @ params["head"]

    # Which rows an expert sees depends on the router; the shared expert waits for nobody.
    layers = [
        [
            (f"layers/{k}/router", f"layers/{k}/shared/up"),
            (f"layers/{k}/up", f"layers/{k}/shared/down"),
            (f"layers/{k}/down",),
        ]
        for k in (0, 1)
    ]
    return Network(
        "moe-ragged", fn, params, _floats((40, 6), (40, 6), (25, 6)), (".*",),
        weight=(*layers[0], *layers[1], ("head",)),
        block=(sum(layers[0], ()), sum(layers[1], ()), ("head",)),
    )  # fmt: skip


# 8. Experts as a batch axis: one-hot dispatch into slots, then a layer that weighs all of them.


def _dispatched() -> Network:
    make = _Seeds(8)

    def layer() -> dict[str, jax.Array]:
        return {"router": make(6, 3, scale=2), "up": make(3, 6, 8), "down": make(3, 8, 6)}

    params = {"Experts_0": layer(), "Experts_1": layer(), "head": make(6, 4)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        p, h = params["Experts_0"], _norm(x)
        gates = jax.nn.softmax(h @ p["router"])
        chosen = jax.nn.one_hot(jnp.argmax(gates, -1), 3, dtype=h.dtype)  # [tokens, experts]
        slot = (jnp.cumsum(chosen, 0) - 1) * chosen
        slots = jax.nn.one_hot(slot.astype(jnp.int32), 20, dtype=h.dtype)
        dispatch = chosen[..., None] * slots  # [tokens, experts, slots]
        rows = jnp.einsum("tec,td->ecd", dispatch, h)
        rows = jax.nn.gelu(jnp.einsum("ecd,edf->ecf", rows, p["up"]))
        rows = jnp.einsum("ecf,efd->ecd", rows, p["down"])
        x = x + jnp.einsum("tec,te,ecd->td", dispatch, gates, rows)

        p, h = params["Experts_1"], _norm(x)
        gates = jax.nn.softmax(h @ p["router"])
        rows = jax.nn.gelu(jnp.einsum("td,edf->etf", h, p["up"]))
        rows = jnp.einsum("etf,efd->etd", rows, p["down"])
        x = x + jnp.einsum("te,etd->td", gates, rows)
        return x @ params["head"]

    # Without dispatch no expert's input depends on the router, so it stands beside `up`.
    first = [("Experts_0/router",), ("Experts_0/up",), ("Experts_0/down",)]
    second = [("Experts_1/router", "Experts_1/up"), ("Experts_1/down",)]
    return Network(
        "moe-dispatch", fn, params, _floats((40, 6), (40, 6), (25, 6)), (".*",),
        weight=(*first, *second, ("head",)),
        block=(sum(first, ()), sum(second, ()), ("head",)),
    )  # fmt: skip


# 9. A U-Net: two inputs (image, time), skips that cross levels, a convolution on one of them.


def _conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _unet() -> Network:
    make = _Seeds(9)

    def kernel(width: int, into: int, out: int) -> jax.Array:
        return make(width, width, into, out, fan=width * width * into)

    params = {
        "time": {"a": make(6, 8), "b": make(8, 4)},
        "enc_0": {"a": kernel(3, 2, 4), "b": kernel(3, 4, 4)},
        "enc_1": {"a": kernel(3, 4, 6), "b": kernel(3, 6, 6)},
        "mid": kernel(3, 6, 6),
        "skip": kernel(1, 4, 3),
        "dec_1": {"a": kernel(3, 12, 6), "b": kernel(3, 6, 4)},
        "dec_0": {"a": kernel(3, 7, 4)},
        "head": kernel(1, 4, 2),
    }

    def fn(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        p, tanh = params, jnp.tanh
        angles = t[:, None] * jnp.array([1.0, 2.0, 4.0], t.dtype)
        t = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        t = tanh(t @ p["time"]["a"]) @ p["time"]["b"]
        x = tanh(_conv(x, p["enc_0"]["a"]) + t[:, None, None, :])
        x = outer = tanh(_conv(x, p["enc_0"]["b"]))
        x = tanh(_conv(x, p["enc_1"]["a"], 2))
        x = inner = tanh(_conv(x, p["enc_1"]["b"]))
        x = tanh(_conv(x, p["mid"]))
        x = tanh(_conv(jnp.concatenate([x, inner], -1), p["dec_1"]["a"]))
        x = tanh(_conv(x, p["dec_1"]["b"]))
        x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
        x = jnp.concatenate([x, tanh(_conv(outer, p["skip"]))], -1)
        return _conv(tanh(_conv(x, p["dec_0"]["a"])), p["head"])

    batches = [
        (image, _array(_normal(k, image.shape[0])))
        for k, (image,) in enumerate(_floats((5, 6, 6, 2), (5, 6, 6, 2), (3, 6, 6, 2)))
    ]
    return Network(
        "unet", fn, params, batches, (".*",),
        weight=(
            ("time/a", "enc_0/a"), ("time/b",), ("enc_0/b",),
            ("enc_1/a", "skip"), ("enc_1/b",), ("mid",),
            ("dec_1/a",), ("dec_1/b",), ("dec_0/a",), ("head",),
        ),
        block=(
            ("time/a", "enc_0/a", "time/b", "enc_0/b"),
            ("enc_1/a", "skip", "enc_1/b"),
            ("mid",),
            ("dec_1/a", "dec_1/b"),
            ("dec_0/a",),
            ("head",),
        ),
    )  # fmt: skip


# 10. Recurrent: scans over time, in both directions, whose weights are constants of the scan.


def _recurrent() -> Network:
    make = _Seeds(10)

    def cell(width: int) -> dict[str, jax.Array]:
        return {"x": make(width, 14), "h": make(7, 14)}

    params = {"enter": make(5, 6), "forth": cell(6), "back": cell(6), "second": cell(14),
              "leave": make(7, 3)}  # fmt: skip

    def run(p: Any, x: jax.Array, reverse: bool = False) -> jax.Array:
        def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            gate, new = jnp.split(x @ p["x"] + h @ p["h"], 2, -1)
            gate = jax.nn.sigmoid(gate)
            h = gate * h + (1 - gate) * jnp.tanh(new)
            return h, h

        start = jnp.zeros((x.shape[0], 7), jnp.float32)
        return jax.lax.scan(step, start, x.swapaxes(0, 1), reverse=reverse)[1].swapaxes(0, 1)

    def fn(params: Any, x: jax.Array) -> jax.Array:  # [batch, time, features]
        x = jnp.tanh(x @ params["enter"])
        x = jnp.concatenate([run(params["forth"], x), run(params["back"], x, True)], -1)
        return run(params["second"], x) @ params["leave"]

    stages = (
        ("enter",),
        ("forth/x", "forth/h", "back/x", "back/h"),
        ("second/x", "second/h"),
        ("leave",),
    )
    batches = _floats((4, 9, 5), (4, 9, 5), (2, 6, 5))
    return Network("recurrent", fn, params, batches, (".*",), stages, stages)


# 11. One block applied three times (ALBERT), and a weight beside it that leaps over all three.


def _shared() -> Network:
    make = _Seeds(11)
    block = {"q": make(8, 8), "k": make(8, 8), "v": make(8, 8), "o": make(8, 8),
             "up": make(8, 12), "down": make(12, 8)}  # fmt: skip
    params = {"embed": make(15, 5, fan=1), "enter": make(5, 8), "block": block,
              "leap": make(8, 8), "pool": make(8, 6), "head": make(6, 3)}  # fmt: skip

    def fn(params: Any, tokens: jax.Array) -> jax.Array:
        x = start = params["embed"][tokens] @ params["enter"]
        p = params["block"]
        for _ in range(3):
            h = _norm(x)
            x = x + _attend(h @ p["q"], h @ p["k"], h @ p["v"]) @ p["o"]
            x = x + jax.nn.gelu(_norm(x) @ p["up"]) @ p["down"]
        x = x + start @ params["leap"]
        return jnp.tanh(x @ params["pool"]) @ params["head"]

    inside = ("q", "k", "v", "o", "up", "down")
    stages = (
        ("enter",),
        (*(f"block/{name}" for name in inside), "leap"),
        ("pool",),
        ("head",),
    )
    return Network(
        "shared-blocks", fn, params, _tokens(15, (3, 9), (3, 9), (2, 11)),
        ("enter", "block/.*", "leap", "pool", "head"), stages, stages,
    )  # fmt: skip


# 12. No two stages alike: convolution, loop, branches, a stack indexed by hand, fused heads.


def _odd() -> Network:
    make = _Seeds(12)
    params = {
        "conv": make(3, 1, 8, fan=3),  # depthwise, [width, 1, groups × out]
        "mix": make(8, 10),
        "loop": {"a": make(10, 7), "b": make(7, 10)},
        "yes": {"a": make(10, 6), "b": make(6, 9)},
        "no": make(10, 9),
        "stack": make(2, 9, 9),
        "between": make(9, 9),
        "qkv": make(9, 18),
        "join": make(2, 3, 11, fan=6),
        "rows": make(5, 11, fan=11),
    }

    @jax.custom_vjp
    def project(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w.T

    project.defvjp(lambda x, w: (x @ w.T, (x, w)), lambda r, g: (g @ r[1], g.T @ r[0]))

    def fn(params: Any, x: jax.Array) -> jax.Array:  # [batch, time, 4]
        positive = x[0, 0, 0] > 0
        x = jnp.tanh(
            jax.lax.conv_general_dilated(
                x, params["conv"], (1,), "SAME", feature_group_count=4,
                dimension_numbers=("NWC", "WIO", "NWC"),
            )
        )  # fmt: skip
        x = jax.jit(lambda x, w: x @ w)(x, params["mix"])

        def again(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            k, h = state
            return k + 1, h + jnp.tanh(h @ params["loop"]["a"]) @ params["loop"]["b"]

        _, x = jax.lax.while_loop(lambda state: state[0] < 2, again, (jnp.int32(0), x))
        x = jax.lax.cond(
            positive,
            lambda x: jnp.sin(x @ params["yes"]["a"]) @ params["yes"]["b"],
            lambda x: x @ params["no"],
            x,
        )
        x = jnp.tanh(x @ params["stack"][0])
        x = jnp.tanh(x @ params["between"])
        x = jnp.tanh(x @ params["stack"][1])
        q, k, v = jnp.split(x @ params["qkv"], 3, -1)
        heads = _attend(q, k, v).reshape(*x.shape[:2], 2, 3)
        x = jax.checkpoint(lambda x, w: jnp.einsum("btnh,nhd->btd", x, w))(heads, params["join"])
        return project(jnp.tanh(x), params["rows"])

    batches = _floats((3, 8, 4), (3, 8, 4), (2, 8, 4))
    signs = (1.0, -1.0, 1.0)
    batches = [
        (x.at[0, 0, 0].set(sign),) for (x,), sign in zip(batches, signs, strict=True)
    ]  # both branches are taken
    stages = (
        ("conv",),
        ("mix",),
        ("loop/a", "loop/b"),
        ("yes/a", "yes/b", "no"),
        ("stack[0]",),
        ("between",),
        ("stack[1]",),
        ("qkv",),
        ("join",),
        ("rows",),
    )
    return Network("odd", fn, params, batches, (".*",), stages, stages)


NETWORKS = [
    _linen_scan(),
    _linen_scan_axis(),
    _nnx_list(),
    _equinox(),
    _haiku(),
    _tied(),
    _resnet(stored=True),
    _resnet(stored=False),
    _ragged(),
    _dispatched(),
    _unet(),
    _recurrent(),
    _shared(),
    _odd(),
]
