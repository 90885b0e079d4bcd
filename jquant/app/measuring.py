"""What `jquant evaluate` shows: a model's perplexity, or how far it is from the one it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jquant.app.console import Narrator
from jquant.app.examples import count_examples, count_tokens
from jquant.app.named_inputs import real_tokens
from jquant.app.sources import Model, names_maker, opened
from jquant.app.texts import as_loaded
from jquant.evaluate import compare, output_error, perplexity
from jquant.inference import apply
from jquant.models import TorchFunction
from jquant.weights.arguments import inputs_of, shape_of

Rows = list[tuple[str, str]]


def alone(model: Model, batches: list[Any], narrator: Narrator) -> Rows:
    """The perplexity of a language model.

    Raises:
        ValueError: its outputs are no logits of tokens.
    """
    if not has_logits(model, batches):
        raise ValueError(
            f"the outputs of {model.source} are no logits of tokens that follow its first input, "
            "so there is no perplexity; pass --against the model in full precision"
        )
    with narrator.stage("evaluating", count_tokens(batches)) as update:
        value = perplexity(
            model.fn, model.params, batches,
            token_weights=real_tokens(model, batches), progress=update,
        )  # fmt: skip
    return [("perplexity", f"{value:.4f}")]


def beside(full: Model, qparams: Any, batches: list[Any], narrator: Narrator) -> Rows:
    """How far quantized parameters take a model: its distribution of tokens, or its outputs."""
    if not has_logits(full, batches):
        with narrator.stage("evaluating", len(batches)) as update:
            error = output_error(full.fn, full.params, qparams, batches, progress=update)
        return [("squared error of outputs, relative", f"{error:.6f}")]
    with narrator.stage("evaluating", count_tokens(batches)) as update:
        both = compare(
            full.fn, full.params, qparams, batches,
            token_weights=real_tokens(full, batches), progress=update,
        )  # fmt: skip
    return [
        ("KL, nats per token", f"{both.kl:.5f}"),
        ("perplexity", f"{both.perplexity_quantized:.4f}"),
        (f"perplexity of {full.source}", f"{both.perplexity_full:.4f}"),
        ("same likeliest token", f"{both.agreement:.2%}"),
    ]


def full_and_quantized(
    against: str, source: str, narrator: Narrator, **options: Any
) -> tuple[Model, Any]:
    """The model in full precision, with the other's tokenizer, and the parameters beside its own.

    Raises:
        ValueError: they are of two networks.
    """
    narrator.say(f"loading {source} and {against}")
    if names_maker(against):
        full = opened(against, **options)
        return full, full.parameters(source)
    if names_maker(source):
        raise ValueError(
            f"{source} is code and {against} is not; name the folder of its quantized weights, and "
            f"--against {source}"
        )
    model = opened(source, **options)
    full = opened(against, **as_loaded(model.fn))
    if full.fn.config != model.fn.config:
        raise ValueError(f"{against} is another network than {source}: their sizes differ")
    if isinstance(model.fn, TorchFunction):
        as_saved = replace(full.fn, inputs=model.fn.inputs, output=model.fn.output)
        full = replace(full, fn=as_saved)
    return replace(full, tokenizer=model.tokenizer), model.params


def has_logits(model: Model, batches: list[Any]) -> bool:
    """Whether a function takes tokens `[B, T]` first, and returns a logit for each next one."""
    if isinstance(model.fn, TorchFunction):
        return model.fn.config.is_causal and model.fn.output == "logits"
    inputs = inputs_of(batches[0])
    first = inputs[0]
    if np.ndim(first) != 2 or not np.issubdtype(first.dtype, np.integer):
        return False
    out = jax.eval_shape(apply(model.fn), jax.tree.map(shape_of, model.params), *inputs)
    shape = getattr(out, "shape", ())
    return len(shape) == 3 and shape[:2] == first.shape


def described(batches: list[Any]) -> str:
    """What was measured on."""
    tokens = count_tokens(batches)
    return f"{tokens} held-out tokens" if tokens else f"{count_examples(batches)} examples"
