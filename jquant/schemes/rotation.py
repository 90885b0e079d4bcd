"""Rotations of a weight's inputs, chosen by a scheme: `Scheme(..., transforms=(Hadamard(),))`.

Evidence needs no pass of its own: where x has the moment H, `R x` has `R H Rᵀ`, and drift alike. So
roundings see the rotated weight and its inputs as if they had come so.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jquant.axes.groups import Groups
from jquant.calibration.evidence import Evidence
from jquant.errors import PlanError
from jquant.grids.base import Grid
from jquant.numerics import require
from jquant.numerics.hadamard import has_hadamard
from jquant.weights.parts import Part
from jquant.weights.rotated import Rotated


@jax.tree_util.register_static
@dataclass(frozen=True)
class Hadamard:
    """A random Hadamard rotation of the inputs, which `apply` makes as it goes.

    It is for quantized inputs first: in the small trained network of the tests, inputs of 4 bits
    cost a KL of 0.033 in place of 0.087. Of weights alone it gains little or nothing there.

    Args:
        block: how many inputs are rotated together, a divisor of their number for which there is a
            Hadamard matrix. None (default): as many as there can be, as in QuIP#. 128 and the size
            of MX's groups are in use with FP4 (MR-GPTQ).
        seed: of the random signs before it, an int from 0 on; None: no signs, as in QuaRot's online
            rotations. Weights with equal inputs and seeds share the rotated input.

    Raises:
        ValueError: an argument is out of its set.
        PlanError: when weights are looked at: their number of inputs is odd, or has no such block.

    Example:
        >>> import jquant as jq
        >>> w = jnp.zeros((4, 8)).at[:, 0].set(8.0)
        >>> part, left, _ = Hadamard().apart(w, None)
        >>> round(float(jnp.abs(left).max()), 3)  # 8 / √8
        2.828
        >>> bool(jnp.allclose(part.weight(left), w, atol=1e-5))
        True
        >>> scheme = jq.Scheme(jq.grids.Uniform(3), transforms=(Hadamard(),))

    References:
        Tseng et al., QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice
        Codebooks, 2024, https://arxiv.org/abs/2402.04396
        Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, 2024,
        https://arxiv.org/abs/2404.00456
    """

    block: int | None = None
    seed: int | None = 0

    def __post_init__(self) -> None:
        if self.block is not None:
            require.integer("Hadamard.block", self.block, 2)
        if self.seed is not None:
            require.integer("Hadamard.seed", self.seed, 0, 2**63 - 1)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    @property
    def papers(self) -> tuple[str, ...]:
        return ("tseng2024quipsharp", "ashkboos2024quarot")

    @property
    def label(self) -> str:
        return "Hadamard" if self.block is None else f"Hadamard {self.block}"

    def check(self, grid: Grid, groups: Groups) -> None:
        """Every grid and all groups go."""

    def _order(self, width: int) -> int:
        """The block of a weight of so many inputs."""
        blocks = [n for n in range(2, width + 1, 2) if width % n == 0 and has_hadamard(n)]
        if self.block in blocks:
            return self.block
        if self.block is None and blocks:
            return blocks[-1]
        instead = (
            f"pass Hadamard(block=) of {blocks}"
            if blocks
            else "leave the rotation out of its scheme"
        )
        raise PlanError(f"{width} inputs have no rotation by {self!r}; {instead}")

    def apart(
        self, w: Float[Array, "*batch out in"], evidence: Evidence | None
    ) -> tuple[Part, Float[Array, "*batch out in"], Evidence | None]:
        """The rotation, the rotated weight, and the evidence of rotated inputs.

        Of these neither the largest magnitudes nor the spread are known, which static ranges of
        inputs need.
        """
        part = Rotated(self._order(w.shape[-1]), self.seed)
        if evidence is None:
            return part, part.rows(w), None

        def both(moment: Array) -> Array:
            """`R M Rᵀ`."""
            return jnp.swapaxes(part.rows(jnp.swapaxes(part.rows(moment), -1, -2)), -1, -2)

        def of(value: Array | None, turn: object) -> Array | None:
            return None if value is None else turn(value)  # type: ignore[operator]

        def turned(evidence: Evidence) -> Evidence:
            return dataclasses.replace(
                evidence,
                second_moment=both(evidence.second_moment),
                drift=of(evidence.drift, both),
                total=of(evidence.total, lambda x: part.rows(x[..., None, :])[..., 0, :]),
                abs_max=None,
                spread=None,
                guided=None if evidence.guided is None else turned(evidence.guided),
            )

        return part, part.rows(w), turned(evidence)
