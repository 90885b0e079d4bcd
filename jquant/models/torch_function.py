"""A `transformers` model's own PyTorch code as a pure JAX function of its parameters.

The module holds no weights (`torch_module`). torchax runs it on JAX's tracers: each operator of
PyTorch becomes its JAX program, so that what jquant sees is a function like any other, with
parameters under the names that they have in the checkpoint.

Mixtures of experts run transformers' `grouped_mm`: tokens are sorted by expert, and its product,
which torchax does not have, is `jax.lax.ragged_dot`. So each expert reads its own tokens, and no
expert's matrix is copied.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jquant.models.torch_module import TorchConfig, torch_module
from jquant.models.torch_running import arrays_of, constants_of, need_all, running


@dataclass(frozen=True)
class TorchFunction:
    """The forward pass of a `transformers` model: `fn(params, *inputs)`. Equal by its fields.

    `params` is a flat dict, name in the checkpoint → array; tied parameters are one leaf.

    Attributes:
        config: architecture and configuration.
        inputs: the arguments of the module's `forward` that are given, in order. A language model
            and an encoder take `("input_ids",)`, int tokens `[B, T]`; T5 and its like
            `("input_ids", "decoder_input_ids")`; Whisper `("input_features", "decoder_input_ids")`,
            the first one float `[B, mels, frames]`; ViT `("pixel_values",)`, float `[B, C, H, W]`.
            Name more by `dataclasses.replace`: `("input_ids", "attention_mask")` for padded rows.
        output: which output is returned: "logits" `[B, T, vocab]` or `[B, classes]` where the
            architecture has a head, else "last_hidden_state" `[B, T, width]`. "pooler_output" and
            others that it has can be named too.
        dtype: what parameters are cast to before they are used, "float32" or "bfloat16".

    Example: `fn, params, _ = jquant.models.load("folder", backend="torch")`, then
    `fn(params, tokens)`, or `jquant.apply(fn)(qparams, tokens)`.
    """

    config: TorchConfig
    inputs: tuple[str, ...]
    output: str
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype = {self.dtype}; supported: 'float32', 'bfloat16'")

    @classmethod
    def of(cls, config: TorchConfig, dtype: str = "float32") -> TorchFunction:
        """The function with the inputs and the output that its architecture usually has.

        Raises:
            CheckpointError, MissingPackageError: see `torch_module`.
        """
        module = torch_module(config)
        inputs = [module.main_input_name]
        if module.config.is_encoder_decoder:
            inputs.append("decoder_input_ids")
        head = module.get_output_embeddings() is not None or "For" in config.architecture
        return cls(config, tuple(inputs), "logits" if head else "last_hidden_state", dtype)

    def __call__(self, params: Mapping[str, Any], *inputs: Any) -> Array:
        """The output, in the dtype that the module gives it.

        Raises:
            TreeError: the parameters are not those of the module.
            UnsupportedPrimitiveError: torchax lacks an operator, or the module's code depends on
                the values of its inputs.
        """
        module = torch_module(self.config)
        need_all(self.config.architecture, parameter_shapes(self.config), params)
        if len(inputs) != len(self.inputs):
            raise TypeError(f"expected {len(self.inputs)} inputs {self.inputs}, got {len(inputs)}")
        weights = {
            name: value.astype(self.dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value
            for name, value in params.items()
        }
        arrays = map(jnp.asarray, inputs)
        settings = {"use_cache": False} if hasattr(module.config, "use_cache") else {}
        with running(self.config.architecture) as (torch, environment):
            named = dict(zip(self.inputs, arrays, strict=True))
            weights, named = environment.j2t_iso((weights, named))
            constants = environment.to_xla(constants_of(module, params))
            result = torch.func.functional_call(
                module, {**constants, **weights}, (), {**named, **settings}
            )
            if self.output not in result:
                raise ValueError(
                    f"output = {self.output!r}: {self.config.architecture} gives "
                    + ", ".join(result.keys())
                )
            return environment.t2j_iso(result[self.output])

    def init_cache(self, rows: int, length: int) -> dict[str, Array]:
        """An empty cache for generation: the text so far, int32 tokens `[rows, length]`."""
        return {"tokens": jnp.zeros((rows, length), jnp.int32)}

    @property
    def step(self) -> TextStep:
        """The form that generation runs: `step(params, cache, tokens, position)`."""
        return TextStep(self)


@dataclass(frozen=True)
class TextStep:
    """`step(params, cache, tokens[B, T], position) -> (logits[B, T, V], cache)`.

    Keeps the text in place of keys and values, and runs the network on all of it, padding at its
    end included, which no token before it sees.
    """

    function: TorchFunction

    def __call__(
        self, params: Mapping[str, Any], cache: dict[str, Array], tokens: Int[Array, "b t"],
        position: Any,
    ) -> tuple[Array, dict[str, Array]]:  # fmt: skip
        text = jax.lax.dynamic_update_slice(cache["tokens"], tokens, (0, position))
        logits = self.function(params, text)
        own = jax.lax.dynamic_slice_in_dim(logits, position, tokens.shape[1], axis=1)
        return own.astype(jnp.float32), {"tokens": text}


@functools.lru_cache(maxsize=8)
def parameter_shapes(config: TorchConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of the parameters that `TorchFunction` takes, tied ones once.

    Buffers that belong to a checkpoint (running means) are among them; whole numbers are not.
    """
    return {name: tuple(x.shape) for name, x in arrays_of(torch_module(config)).items()}
