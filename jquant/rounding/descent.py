"""How a gradient is followed: an optax optimizer, its schedule, and when to look at the result.

`Descent` is numbers and names only, so that schemes which hold one print, compare, hash and are
written into checkpoints. `learned.py` runs it for one weight inside one compiled program, for the
objective that needs no data beyond the weight's second moment; `learning/descend.py` runs it over
batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from jquant.numerics import require

if TYPE_CHECKING:
    import optax  # takes about as long to import as all of jquant, so it waits for a first step

_IN_EVERY_OPTAX = ("adam", "adamw", "sgd", "sign_sgd")  # others are looked for when they are named


@jax.tree_util.register_static
@dataclass(frozen=True)
class Descent:
    """Steps along a gradient.

    Args:
        steps: how many.
        learning_rate: at its peak.
        optimizer: the name of an optax optimizer that takes a learning rate: `"adam"`, `"adamw"`,
            `"sign_sgd"`, `"lion"`, ….
        schedule: what becomes of the learning rate after the warm-up: `"cosine"` or `"linear"` to
            0, or `"constant"`.
        warmup: steps over which it rises to its peak.
        accumulate: batches whose gradients make one step; of no effect without batches.
        checks: how often the weights are rounded and their loss is taken; the best so far is kept.
            Nearest rounding is the first, the end is the last.
        state_dtype: of the optimizer's moments, `"float32"` or `"bfloat16"`.
        remat: keep only the results of products for the backward pass, and compute all else again,
            the weights among it: less memory, some more time. On batches only.

    Raises:
        ValueError: an argument is out of its set, or optax has no such optimizer.

    Example:
        >>> Descent(100, 0.1, warmup=10).rate(10).item()
        0.10000000149011612
    """

    steps: int
    learning_rate: float
    optimizer: str = "adam"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int = 0
    accumulate: int = 1
    checks: int = 8
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup", 0), ("accumulate", 1), ("checks", 1)):
            require.integer(f"Descent.{name}", getattr(self, name), least)
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"Descent.learning_rate must be positive, got {self.learning_rate!r}")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ValueError(
                f"Descent.schedule must be 'cosine', 'linear' or 'constant', got {self.schedule!r}"
            )
        if self.state_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"Descent.state_dtype must be 'float32' or 'bfloat16', got {self.state_dtype!r}"
            )
        try:
            if self.optimizer not in _IN_EVERY_OPTAX:
                self.transformation()
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"Descent.optimizer must name an optax optimizer of a learning rate, such as "
                f"'adam', got {self.optimizer!r}"
            ) from error

    def rate(self, step: Any) -> jax.Array:
        """The learning rate of a step, from 0."""
        import optax

        rest = max(self.steps - self.warmup, 1)
        after = {
            "cosine": optax.cosine_decay_schedule(self.learning_rate, rest),
            "linear": optax.linear_schedule(self.learning_rate, 0.0, rest),
            "constant": optax.constant_schedule(self.learning_rate),
        }[self.schedule]
        rise = optax.linear_schedule(0.0, self.learning_rate, self.warmup)
        schedule = optax.join_schedules([rise, after], [self.warmup])
        return jnp.asarray(schedule(jnp.asarray(step, jnp.float32)))

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer."""
        import optax

        made = getattr(optax, self.optimizer)(self.rate)
        if not isinstance(made, optax.GradientTransformation):
            raise TypeError(f"optax.{self.optimizer} is not an optimizer")
        return stored_as(made, self.state_dtype)

    @property
    def looks(self) -> tuple[int, ...]:
        """After which numbers of steps the weights are rounded, the last after all.

        Example:
            >>> Descent(10, 0.1, checks=4).looks
            (2, 5, 8, 10)
        """
        many = min(self.checks, self.steps)
        return tuple(round(self.steps * k / many) for k in range(1, many + 1))


def stored_as(inner: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """An optimizer whose state waits between steps in some floating dtype.

    optax multiplies numbers of steps and rates without a cast, so it does in here what JAX does by
    default, also where promoting dtypes is forbidden.
    """
    import optax

    def cast(state: Any, to: Any) -> Any:
        return jax.tree.map(
            lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
        )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = inner.update(updates, cast(state, jnp.float32), params, **extra)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)
