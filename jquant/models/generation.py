"""Writing text: one prompt pass, then one token at a time from the cache.

Both are the same pure function `NextToken`: run the cached step, pick from the logits of the last
real token, return the token and the cache. It is called through `jquant.inference.apply`, so that
parameters may hold quantized weights, and it compiles twice whatever the text: once for prompts
(padded to a multiple of 64; what padding writes into the cache is overwritten before it is ever
attended to) and once for single tokens. The loop over tokens is Python's: a compiled loop would let
the compiler unpack all quantized weights once and keep them, and nothing could be streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jquant.inference import apply
from jquant.models.decoder import Cache, CachedStep, Decoder, Params
from jquant.models.torch_function import TextStep, TorchFunction

PROMPT_MULTIPLE = 64


class Drawing(NamedTuple):
    """How a token is drawn from its logits; temperature 0 takes the likeliest."""

    key: Array
    temperature: Float[Array, ""]


@dataclass(frozen=True)
class NextToken:
    """`(params, cache, tokens[B, T], position, last, drawing) -> (token[B], cache)`.

    `last` is the place among the T tokens whose logits count.
    """

    step: CachedStep | TextStep

    def __call__(
        self,
        params: Params,
        cache: Cache,
        tokens: Int[Array, "b t"],
        position: Int[Array, ""],
        last: Int[Array, ""],
        drawing: Drawing,
    ) -> tuple[Int[Array, " b"], Cache]:
        key, temperature = drawing
        logits, cache = self.step(params, cache, tokens, position)
        logits = jax.lax.dynamic_index_in_dim(logits, last, axis=1, keepdims=False)
        warm = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0, warm, jnp.argmax(logits, -1)).astype(jnp.int32), cache


def stream(
    fn: Decoder | TorchFunction,
    params: Params,
    prompt_tokens: Int[Array | np.ndarray, "b t"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    key: Array | None = None,
    eos: int | Iterable[int] = (),
) -> Iterator[np.ndarray]:
    """Yield the new tokens, int32 `[B]`, as they come; a row that has ended repeats its end token.

    Args:
        fn: the decoder; its `step` is run. A model's own PyTorch code keeps no keys and values: its
            whole text is run again for each token.
        params: its parameters, quantized or not.
        prompt_tokens: `[B, T]` or `[T]`, rows of equal length.
        max_new_tokens: at most so many tokens; fewer once every row has met one of `eos`.
        temperature: 0 is deterministic; above 0 a `key` is needed.
        eos: the token or tokens that end a text (yielded, then nothing follows).

    Raises:
        ValueError: an empty or ill-shaped prompt, a text longer than the context, or no key.
    """
    prompt = _checked(fn, prompt_tokens, max_new_tokens, temperature, key)
    ends = np.asarray([eos] if isinstance(eos, int) else list(eos), np.int32)
    key = jax.random.key(0) if key is None else key  # unused at temperature 0
    drawing = Drawing(key, jnp.float32(temperature))
    return _stream(fn, params, prompt, max_new_tokens, drawing, ends)


def generate(
    fn: Decoder | TorchFunction,
    params: Params,
    prompt_tokens: Int[Array | np.ndarray, "b t"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    key: Array | None = None,
    eos: int | Iterable[int] = (),
    on_token: Callable[[np.ndarray], None] | None = None,
) -> np.ndarray:
    """The new tokens, int32 `[B, N]` with `N <= max_new_tokens`; arguments as for `stream`.

    `on_token` is called with each `[B]` as it comes.

    Example: `tokenizer.decode(generate(fn, params, tokenizer(text)["input_ids"], 64)[0])`
    """
    written = []
    for token in stream(
        fn, params, prompt_tokens, max_new_tokens, temperature=temperature, key=key, eos=eos
    ):
        written.append(token)
        if on_token is not None:
            on_token(token)
    return np.stack(written, axis=1)


def _stream(
    fn: Decoder | TorchFunction,
    params: Params,
    prompt: np.ndarray,
    count: int,
    drawing: Drawing,
    ends: np.ndarray,
) -> Iterator[np.ndarray]:
    run = apply(NextToken(fn.step))
    rows, length = prompt.shape
    cache = fn.init_cache(rows, _rounded(length + count))
    tokens = jnp.asarray(np.pad(prompt, ((0, 0), (0, _rounded(length) - length))))
    position, last = 0, length - 1
    ended, previous = np.zeros(rows, bool), np.zeros(rows, np.int32)
    for i in range(count):
        own = drawing._replace(key=jax.random.fold_in(drawing.key, i))
        token, cache = run(params, cache, tokens, jnp.int32(position), jnp.int32(last), own)
        token = np.where(ended, previous, np.asarray(token))
        yield token
        ended, previous = ended | np.isin(token, ends), token
        if ended.all():
            return
        tokens, position, last = jnp.asarray(token)[:, None], length + i, 0


def _checked(
    fn: Decoder | TorchFunction,
    prompt_tokens: Int[Array | np.ndarray, "b t"],
    max_new_tokens: int,
    temperature: float,
    key: Array | None,
) -> np.ndarray:
    prompt = np.atleast_2d(np.asarray(prompt_tokens))
    if prompt.ndim != 2 or prompt.size == 0 or prompt.dtype.kind not in "iu":
        raise ValueError(
            f"prompt_tokens: {prompt.dtype} {prompt.shape}; expected integers [B, T] with T >= 1"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}; expected at least 1")
    if prompt.shape[1] + max_new_tokens > fn.config.context:
        raise ValueError(
            f"{prompt.shape[1]} prompt tokens and {max_new_tokens} new ones exceed the model's "
            f"context of {fn.config.context}; shorten the prompt or ask for fewer"
        )
    if not temperature >= 0:
        raise ValueError(f"temperature = {temperature}; expected 0 (deterministic) or more")
    if temperature > 0 and key is None:
        raise ValueError("temperature > 0 draws tokens: pass key=jax.random.key(seed)")
    return prompt.astype(np.int32)


def _rounded(length: int) -> int:
    return -(-length // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
