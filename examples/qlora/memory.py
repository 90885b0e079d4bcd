"""What a compiled step of training holds, and what arithmetic says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def bytes_of(loss: Callable[..., Any], program: Any, arguments: Any) -> dict[str, float]:
    """Bytes that the compiled step holds, and their sum by arithmetic.

    Activations are what the backward pass is given by the forward pass: its residuals that are no
    arguments. Beside them the step holds a gradient of each adapter, and one pair of logits and
    their gradient, which no residual is at the time.
    """
    trainable, state, frozen, tokens = arguments

    def residuals(trainable: Tree, frozen: Any, tokens: Any) -> Any:
        return jax.vjp(lambda t: loss(t, frozen, tokens), trainable)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, trainable, frozen, tokens))
    given = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((trainable, frozen))}
    activations = sum(r.size * r.dtype.itemsize for r in kept if (r.shape, r.dtype) not in given)
    stats = program.memory_analysis()
    parts = {
        "frozen": sum(map(_stored, jax.tree.leaves(frozen))),
        "adapters": sum(map(_stored, jax.tree.leaves(trainable))),
        "optimizer": sum(map(_stored, jax.tree.leaves(state))),
        "activations": activations,
    }
    measured = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    parts |= {"gradients": parts["adapters"], "program": measured}
    parts["program, arguments"] = stats.argument_size_in_bytes
    parts["by arithmetic"] = sum(
        parts[name] for name in ("frozen", "adapters", "optimizer", "activations", "gradients")
    )
    return {name: float(value) for name, value in parts.items()}


def _stored(leaf: Any) -> float:
    """Bytes of an array as a program takes it; two codes of four bits share one."""
    bits = jnp.iinfo(leaf.dtype).bits if jnp.issubdtype(leaf.dtype, jnp.integer) else None
    return leaf.size * (bits / 8 if bits else leaf.dtype.itemsize)
