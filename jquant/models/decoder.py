"""A decoder of stacked blocks as a Flax NNX module, used as one pure function.

    x <- x + attention(norm(x));   x <- x + mlp(norm(x));   logits = head(norm(x))

`Llama` is the NNX module, whose blocks (`blocks.py`) have what the configuration says: norms before
or after, windows, experts, caps. A `Decoder` is the same thing as a value: a frozen, hashable
function `decoder(params, tokens)` whose parameters are a plain nested dict
(`layers/0/attention/q/kernel`, `embed/embedding`, ...), which is all that the rest of jquant asks
of a model.

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

from jquant.models.blocks import Block, Cache
from jquant.models.config import DecoderConfig
from jquant.models.layers import Linear, Norm, dot, normal
from jquant.models.positions import Views, views

Params = Mapping[str, Any]


class Embed(nnx.Module):
    """The table of token vectors `[vocab, width]`; also the head where the two are tied."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs | None):
        shape = (config.vocab, config.width)
        self.embedding = nnx.Param(normal(rngs, shape, config.width**-0.5))

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        # A token outside the vocabulary gives NaN, which is seen; clamping would not be.
        rows = jnp.take(self.embedding[...], tokens, axis=0, mode="fill", fill_value=jnp.nan)
        return rows.astype(jnp.float32)


class Llama(nnx.Module):
    """The whole network; `layers` is a list of blocks, or one block of stacked parameters."""

    def __init__(
        self, config: DecoderConfig, rngs: nnx.Rngs | None, *, scan_layers: bool, dtype: str
    ):
        self.config = config
        self.embed = Embed(config, rngs)
        if scan_layers:
            assert rngs is not None
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
        c = self.config
        steps = position + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        length = tokens.shape[1] if cache is None else jax.tree.leaves(cache)[0].shape[-3]
        x = self.embed(tokens)
        x = x if c.embed_scale == 1.0 else x * c.embed_scale
        x, cache = self._blocks(x, views(c, steps, length), cache, position)
        x = self.norm(x)
        if self.head is None:
            logits = dot(x, self.embed.embedding[...], kernel_axis=1)
        else:
            logits = self.head(x)
        logits = logits if c.logits_divisor == 1.0 else logits / c.logits_divisor
        cap = c.logits_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap), cache

    def _blocks(
        self, x: Array, seen: Views, cache: Cache | None, position: Any
    ) -> tuple[Array, Cache | None]:
        if isinstance(self.layers, nnx.List):
            after: Cache = {}
            for i, block in enumerate(self.layers):
                past = None if cache is None else cache[str(i)]
                x, after[str(i)] = block(x, *seen.of(i), past, position)
            return x, None if cache is None else after
        graph, stacked = nnx.split(self.layers)
        tables, numbers = seen.stacked()

        def body(x: Array, layer: Any) -> tuple[Array, Cache | None]:
            state, past, number = layer
            return nnx.merge(graph, state)(x, *tables.at(number), past, position)

        return jax.lax.scan(body, x, (nnx.to_pure_dict(stacked), cache, numbers))


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

    @property
    def shapes(self) -> dict[str, Any]:
        """The tree of `init` with a `jax.ShapeDtypeStruct` in place of every array.

        Example:
            >>> config = DecoderConfig(vocab=32, width=8, hidden=16, layers=2, heads=4, kv_heads=2)
            >>> Decoder(config).shapes["norm"]["scale"].shape
            (8,)
        """
        pure = _string_keys(nnx.to_pure_dict(nnx.state(_abstract(self))))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), pure)

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

    def _build(self, rngs: nnx.Rngs | None) -> Llama:
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
def _abstract(decoder: Decoder) -> Llama:
    """The module without its numbers, made once per decoder."""
    if decoder.scan_layers:  # one block is traced, whose arrays then get one axis more
        return nnx.eval_shape(lambda: decoder._build(nnx.Rngs(params=0)))
    return decoder._build(None)


@functools.lru_cache(maxsize=64)
def _graph(decoder: Decoder) -> nnx.GraphDef:
    """The structure of the NNX module without its arrays."""
    return nnx.graphdef(_abstract(decoder))


def _string_keys(tree: Any) -> Any:
    """Dict keys as strings: list positions survive any file format and sort beside names."""
    if not isinstance(tree, dict):
        return tree
    return {str(key): _string_keys(value) for key, value in tree.items()}
