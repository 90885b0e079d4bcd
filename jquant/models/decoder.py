"""The Llama family as Flax NNX modules, used as one pure function.

    x <- x + attention(norm(x));   x <- x + mlp(norm(x));   logits = head(norm(x))

`Llama` is the NNX module: rotary positions, grouped queries, RMS norms, a gated SiLU network. A
`Decoder` is the same thing as a value: a frozen, hashable function `decoder(params, tokens)` whose
parameters are a plain nested dict (`layers/0/attention/q/kernel`, `embed/embedding`, ...), which is
all that the rest of jquant asks of a model.

Three choices serve whoever interprets the jaxpr. Every projection is one `dot_general` of an
activation with an `[in, out]` kernel. q, k and v (and gate and up) receive the very same value. The
compute dtype is where matmul *inputs* live; results are always float32, and so is the residual
stream (bfloat16 inputs with float32 results are also what CPUs run fastest).

With `scan_layers` the same `Block` runs under `jax.lax.scan` over parameters stacked `[L, ...]`
(`layers/attention/q/kernel`): a program whose size does not grow with depth.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jquant.models.attention import attend
from jquant.models.config import DecoderConfig

Params = Mapping[str, Any]
Cache = dict[str, Any]
Rope = tuple[Array, Array]


class Linear(nnx.Module):
    """`x @ kernel + bias`, with a float32 result whatever the dtype of the inputs."""

    def __init__(self, inputs: int, outputs: int, bias: bool, rngs: nnx.Rngs):
        kernel = jax.random.normal(rngs.params(), (inputs, outputs), jnp.float32)
        self.kernel = nnx.Param(kernel * inputs**-0.5)
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        y = _dot(x, self.kernel[...], kernel_axis=0)
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


class Norm(nnx.Module):
    """`x / rms(x) * scale`, computed in float32 and returned in the compute dtype."""

    def __init__(self, width: int, eps: float, dtype: str):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * rms * self.scale[...].astype(jnp.float32)).astype(self.dtype)


class Attention(nnx.Module):
    """Causal attention with `heads` queries sharing `kv_heads` keys and values."""

    def __init__(self, config: DecoderConfig, dtype: str, rngs: nnx.Rngs):
        c = config
        self.config, self.dtype = config, dtype
        self.q = Linear(c.width, c.heads * c.head_dim, c.qkv_bias, rngs)
        self.k = Linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias, rngs)
        self.v = Linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias, rngs)
        self.out = Linear(c.heads * c.head_dim, c.width, c.out_bias, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], rope: Rope, mask: Array, past: Cache | None, position: Any
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        c, (rows, steps) = self.config, x.shape[:2]
        q = _rotate(self.q(x).reshape(rows, steps, c.heads, c.head_dim), rope).astype(self.dtype)
        k = _rotate(self.k(x).reshape(rows, steps, c.kv_heads, c.head_dim), rope).astype(self.dtype)
        v = self.v(x).reshape(rows, steps, c.kv_heads, c.head_dim).astype(self.dtype)
        if past is not None:
            start = (0, position, 0, 0)
            k = jax.lax.dynamic_update_slice(past["key"], k, start)
            v = jax.lax.dynamic_update_slice(past["value"], v, start)
            past = {"key": k, "value": v}
        mixed = attend(q, k, v, mask, causal=past is None)
        return self.out(mixed.reshape(rows, steps, -1).astype(self.dtype)), past


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, dtype: str, rngs: nnx.Rngs):
        self.dtype = dtype
        self.gate = Linear(config.width, config.hidden, False, rngs)
        self.up = Linear(config.width, config.hidden, False, rngs)
        self.down = Linear(config.hidden, config.width, False, rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.down((jax.nn.silu(self.gate(x)) * self.up(x)).astype(self.dtype))


class Block(nnx.Module):
    """One layer: attention, then the gated network, each on a norm of the residual stream."""

    def __init__(self, config: DecoderConfig, dtype: str, rngs: nnx.Rngs):
        self.attention_norm = Norm(config.width, config.norm_eps, dtype)
        self.attention = Attention(config, dtype, rngs)
        self.mlp_norm = Norm(config.width, config.norm_eps, dtype)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], rope: Rope, mask: Array, past: Cache | None, position: Any
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        mixed, past = self.attention(self.attention_norm(x), rope, mask, past, position)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), past


class Embed(nnx.Module):
    """The table of token vectors `[vocab, width]`; also the head where the two are tied."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        shape = (config.vocab, config.width)
        table = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.embedding = nnx.Param(table * config.width**-0.5)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        # A token outside the vocabulary gives NaN, which is seen; clamping would not be.
        rows = jnp.take(self.embedding[...], tokens, axis=0, mode="fill", fill_value=jnp.nan)
        return rows.astype(jnp.float32)


class Llama(nnx.Module):
    """The whole network; `layers` is a list of blocks, or one block of stacked parameters."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, *, scan_layers: bool, dtype: str):
        self.config = config
        self.embed = Embed(config, rngs)
        if scan_layers:
            stack = nnx.vmap(lambda r: Block(config, dtype, r), in_axes=0, out_axes=0)
            self.layers = stack(rngs.split(config.layers))
        else:
            self.layers = nnx.List([Block(config, dtype, rngs) for _ in range(config.layers)])
        self.norm = Norm(config.width, config.norm_eps, dtype)
        self.head = None if config.tied else Linear(config.width, config.vocab, False, rngs)

    def __call__(
        self, tokens: Int[Array, "b t"], cache: Cache | None = None, position: Any = 0
    ) -> tuple[Float[Array, "b t v"], Cache | None]:
        """Logits, and the cache with these tokens' keys and values at `position` and after."""
        steps = position + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        angles = steps[:, None].astype(jnp.float32) * self.config.rope_frequencies()
        rope = (jnp.cos(angles), jnp.sin(angles))
        length = tokens.shape[1] if cache is None else jax.tree.leaves(cache)[0].shape[-3]
        mask = jnp.arange(length, dtype=jnp.int32) <= steps[:, None]
        x, cache = self._blocks(self.embed(tokens), rope, mask, cache, position)
        x = self.norm(x)
        if self.head is None:
            return _dot(x, self.embed.embedding[...], kernel_axis=1), cache
        return self.head(x), cache

    def _blocks(
        self, x: Array, rope: Rope, mask: Array, cache: Cache | None, position: Any
    ) -> tuple[Array, Cache | None]:
        if isinstance(self.layers, nnx.List):
            after: Cache = {}
            for i, block in enumerate(self.layers):
                past = None if cache is None else cache[str(i)]
                x, after[str(i)] = block(x, rope, mask, past, position)
            return x, None if cache is None else after
        graph, stacked = nnx.split(self.layers)

        def body(x: Array, layer: Any) -> tuple[Array, Cache | None]:
            state, past = layer
            return nnx.merge(graph, state)(x, rope, mask, past, position)

        return jax.lax.scan(body, x, (nnx.to_pure_dict(stacked), cache))


@dataclass(frozen=True)
class Decoder:
    """A decoder as a pure function, equal and hashed by its three fields.

    `decoder(params, tokens[B, T])` gives float32 logits `[B, T, V]`. `dtype` is the compute dtype,
    "float32" or "bfloat16"; the dtype of the parameters is whatever they have.

    Example:
        >>> config = DecoderConfig(vocab=32, width=8, hidden=16, layers=2, heads=4, kv_heads=2)
        >>> fn = Decoder(config)
        >>> params = fn.init(jax.random.key(0))
        >>> params["layers"]["0"]["attention"]["k"]["kernel"].shape
        (8, 4)
        >>> jax.jit(fn)(params, jnp.zeros((1, 3), jnp.int32)).shape
        (1, 3, 32)
    """

    config: DecoderConfig
    scan_layers: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype = {self.dtype}; supported: 'float32', 'bfloat16'")

    def __call__(self, params: Params, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Float32 logits `[B, T, V]` for int tokens `[B, T]`."""
        return self._module(params)(tokens)[0]

    @property
    def step(self) -> CachedStep:
        """The cached form: `step(params, cache, tokens, position) -> (logits, cache)`."""
        return CachedStep(self)

    def init(self, key: Array) -> dict[str, Any]:
        """Random float32 parameters, for tests and benchmarks."""
        return _string_keys(nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(params=key)))))

    def init_cache(self, rows: int, length: int) -> Cache:
        """An empty cache for `rows` sequences of at most `length` tokens, in the compute dtype.

        Leaves `[rows, length, kv_heads, head_dim]`: `{"0": {"key", "value"}, ...}` per layer, or
        `{"key", "value"}` with a leading layer axis where layers are scanned.
        """
        c = self.config
        shape = (rows, length, c.kv_heads, c.head_dim)
        if self.scan_layers:
            return {name: jnp.zeros((c.layers, *shape), self.dtype) for name in ("key", "value")}
        return {
            str(i): {name: jnp.zeros(shape, self.dtype) for name in ("key", "value")}
            for i in range(c.layers)
        }

    def _build(self, rngs: nnx.Rngs) -> Llama:
        return Llama(self.config, rngs, scan_layers=self.scan_layers, dtype=self.dtype)

    def _module(self, params: Params) -> Llama:
        return nnx.merge(_graph(self), nnx.restore_int_paths(dict(params)))


@dataclass(frozen=True)
class CachedStep:
    """`step(params, cache, tokens[B, T], position) -> (logits[B, T, V], cache)`.

    Runs T tokens standing at `position` (an int32 scalar, may be traced) and after, attending to
    what the cache holds before them. Shapes are static: one program for a prompt, one for T = 1.
    The caller keeps `position + T` within the cache's length (a traced position cannot be checked).
    """

    decoder: Decoder

    def __call__(
        self, params: Params, cache: Cache, tokens: Int[Array, "b t"], position: Any
    ) -> tuple[Float[Array, "b t v"], Cache]:
        logits, after = self.decoder._module(params)(tokens, cache, position)
        assert after is not None
        return logits, after


@functools.lru_cache(maxsize=64)
def _graph(decoder: Decoder) -> nnx.GraphDef:
    """The structure of the NNX module without its arrays; traced once per decoder."""
    return nnx.graphdef(nnx.eval_shape(lambda: decoder._build(nnx.Rngs(params=0))))


def _string_keys(tree: Any) -> Any:
    """Dict keys as strings: list positions survive any file format and sort beside names."""
    if not isinstance(tree, dict):
        return tree
    return {str(key): _string_keys(value) for key, value in tree.items()}


def _dot(x: Array, kernel: Array, kernel_axis: int) -> Array:
    """Contract the last axis of `x` with one axis of `kernel`, in x's dtype, into float32.

    Rows and steps are one axis: gradients that sum over two take 2.5 times as long on XLA:CPU.
    """
    contract = (((1,), (kernel_axis,)), ((), ()))
    y = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]),
        kernel.astype(x.dtype),
        contract,
        preferred_element_type=jnp.float32,
    )
    return y.reshape(*x.shape[:-1], -1)


def _rotate(x: Float[Array, "b t h d"], rope: Rope) -> Float[Array, "b t h d"]:
    """Rotate channel `i` with channel `i + d/2` by the angle of its position and frequency."""
    cos, sin = (part[:, None, :] for part in rope)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
