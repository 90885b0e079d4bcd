"""A weight whose codes are of its rotation: inputs are rotated where they meet it.

With a rotation R of the inputs, `x Wᵀ = (x Rᵀ)(W Rᵀ)ᵀ`. A Hadamard matrix after random signs
spreads a large channel, of the weight or of its inputs, over all of its block, so that a coarse
grid clips less. It costs two thin products for each input; weights that share an input share
them, as compilers merge equal computations.

Static: all. There are no arrays: signs are a function of a number, the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jquant.numerics.hadamard import by_hadamard, has_hadamard
from jquant.weights.parts import Part


def signs(seed: int, width: int) -> Float[np.ndarray, " in"]:
    """±1 for each of `width` inputs: the highest bits of SplitMix64's numbers from a seed.

    Example:
        >>> signs(0, 8).astype(int).tolist()
        [-1, 1, 1, -1, 1, 1, 1, -1]
    """
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, width + 1, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.where(z >> np.uint64(63), -1.0, 1.0).astype(np.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rotated:
    """The codes stand for the weight times `Rᵀ`, `R = blocks of H / √block · signs`.

    Attributes:
        block: order of the Hadamard matrix; it divides the number of inputs.
        seed: of the signs, 0 to 2**63 - 1; None: all are 1.
    """

    block: int = field(metadata={"static": True})
    seed: int | None = field(default=0, metadata={"static": True})

    @property
    def alters(self) -> bool:
        return False

    @property
    def rank(self) -> int:
        return 0

    def weight(self, values: Float[Array, "*batch out in"]) -> Float[Array, "*batch out in"]:
        back = by_hadamard(values, self.block, transposed=True)
        return back if self.seed is None else back * signs(self.seed, values.shape[-1])

    def rows(self, x: Float[Array, "*batch tokens in"]) -> Float[Array, "*batch tokens in"]:
        """`x Rᵀ`, float32."""
        x = x.astype(jnp.float32)
        return by_hadamard(
            x if self.seed is None else x * signs(self.seed, x.shape[-1]), self.block
        )

    def factors(self) -> Any:
        raise AssertionError("a rotation has no factors")

    def picked(self, pick: Callable[[Array], Array]) -> Part:
        return self

    def array_bits(self) -> list[float]:
        return []

    def check(self, whole: Any) -> None:
        """Raise if there is no such rotation, or none of the weight's inputs."""
        for name, value, most in (("block", self.block, 2**31), ("seed", self.seed, 2**63)):
            if name == "seed" and value is None:
                continue
            if type(value) is not int or not 0 <= value < most:
                raise TypeError(f"a rotation's {name} cannot be {value!r}")
        if whole is not None and (self.block < 1 or whole.codes.shape[-1] % self.block):
            raise ValueError(f"blocks of {self.block} do not divide codes {whole.codes.shape}")
        if whole is not None and not has_hadamard(self.block):
            raise ValueError(f"there is no Hadamard matrix of order {self.block}")
