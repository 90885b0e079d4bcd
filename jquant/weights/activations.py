"""Quantized inputs of matrix products: which range, which grid, and how the product is computed.

The input `x` of a product with a weight is seen as `[*batch, tokens, in]`: what is contracted comes
last, what runs along with the weight (experts, layers) first. It is rounded to nearest on a grid
whose parameters fit a range `[low, high]`:

    token    the minimum and maximum of each token, found when the function runs (ZeroQuant)
    tensor   those of all tokens together, likewise
    static   one range per weight, found in calibration (`calibration/spread.py`) and stored with it

A token's range is its own: what else is in the batch does not change it, and scaling a token scales
its result. The other two know no such law. A token that holds NaN or infinity gives NaN, and has no
part in the range of the others. Static: the choice (`Activations`). Arrays: parameters of the grid.

With `x = a (c - z)` and `w = b (d - y)`, `Σ x w = a b (Σ c d - y Σ c - z Σ (d - y))`: a product of
codes, with scales outside. `numbers` gives the `c` and `d` of a grid that has such.

References: Yao et al., ZeroQuant: Efficient and Affordable Post-Training Quantization for
Large-Scale Transformers, 2022, https://arxiv.org/abs/2206.01861 (token-wise); Wu et al.,
ZeroQuant-FP, 2023, https://arxiv.org/abs/2307.09782 (FP8 inputs)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from jquant import deprecated, grids
from jquant.axes.groups import Groups
from jquant.errors import PlanError
from jquant.grids import MSE, Grid, GridParams, MinMax, Uniform, nearest
from jquant.numerics.extremes import all_finite

Granularity = Literal["token", "tensor", "static"]
Compute = Literal["auto", "integer", "fake_quant"]
Way = Literal["integer", "float", "fake_quant"]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Percentile:
    """A static range that leaves out the outermost inputs.

    Args:
        percent: of the inputs that lie inside, above 50 and at most 100; of magnitudes on a
            symmetric grid, else at each end. Default: heuristic.

    Raises:
        ValueError: `percent` is out of its set.

    Example:
        >>> Activations(Uniform(8), "static", range=Percentile(99.9)).range
        Percentile(percent=99.9)
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        if isinstance(self.percent, bool) or not 50 < self.percent <= 100:
            raise ValueError(f"Percentile.percent must be in (50, 100], got {self.percent!r}")


@deprecated.keywords("Activations")
@jax.tree_util.register_static
@dataclass(frozen=True)
class Activations:
    """How the inputs of a weight's matrix products are quantized.

    Inputs are rounded to nearest on a grid whose parameters fit a range, from the smallest to the
    largest input. A token that holds NaN or infinity gives NaN, and leaves the others as they are.

    Args:
        grid: of the inputs: `grids.Uniform`, or `grids.Float` without groups of its own.
        granularity: what has a range of its own. "token": each token, taken while the function
            runs, so that a token's result does not depend on the others (ZeroQuant's, the default);
            "tensor": all tokens of a call together, likewise; "static": each weight, from
            calibration.
        range: of "static" alone: `MinMax()`, `MSE()`, or `Percentile(99.99)`. Default: MinMax.
        compute: "integer": `int8 × int8 → int32` products of codes, refused where grids or groups
            have none; "fake_quant": float products of the rounded inputs and the decoded weight;
            "auto": integers where possible, else products of narrow floats where both grids have
            exact ones (FP8), else "fake_quant". Results differ by the rounding of sums alone.

    Raises:
        ValueError: an argument is out of its set, or they contradict each other.

    Example:
        >>> Activations(Uniform(8, symmetric=True, convention="S3")).granularity
        'token'
    """

    grid: Grid
    granularity: Granularity = "token"
    range: MinMax | MSE | Percentile = MinMax()
    compute: Compute = "auto"

    def __post_init__(self) -> None:
        compute = deprecated.current("Activations.compute", self.compute)
        object.__setattr__(self, "compute", compute)
        for name, allowed in (("granularity", Granularity), ("compute", Compute)):
            got = getattr(self, name)
            if got not in get_args(allowed):
                raise ValueError(
                    f"Activations.{name} must be one of {get_args(allowed)}, got {got!r}"
                )
        if not isinstance(self.range, MinMax | MSE | Percentile):
            raise ValueError(
                f"Activations.range must be MinMax(), MSE() or Percentile(), got {self.range!r}"
            )
        if self.granularity != "static" and self.range != MinMax():
            raise ValueError(
                f"Activations.range={self.range!r} is of granularity='static'; ranges that are "
                "found while the function runs are MinMax()"
            )
        grid = self.grid
        if not _is_of_inputs(grid):
            raise ValueError(
                "Activations.grid must be a grids.Uniform or a grids.Float, with range=MinMax() "
                f"and without groups of its own, of a convention with zero among its values and "
                f"positive scales (not S4, S5), got {grid!r}"
            )
        if self.granularity == "static" and getattr(grid, "scale", "") is None:
            raise ValueError(
                "Activations.granularity='static' is of grids with a scale; pass "
                f"scale='float32', or granularity='token', got {grid!r}"
            )
        if self.compute == "integer" and not isinstance(grid, Uniform):
            raise ValueError(
                f"Activations.compute='integer' needs a grid of integers, grids.Uniform, got "
                f"{grid!r}; pass compute='auto'"
            )

    @property
    def needs(self) -> frozenset[str]:
        """What calibration must tell: "inputs" (anything of them), "spread" (their histogram)."""
        if self.granularity != "static":
            return frozenset()
        simple = self.range == MinMax() and even(self.grid)
        return frozenset({"inputs"} if simple else {"inputs", "spread"})

    @property
    def papers(self) -> tuple[str, ...]:
        floats = () if isinstance(self.grid, Uniform) else ("wu2023zeroquantfp",)
        return ("yao2022zeroquant", *floats)

    @property
    def label(self) -> str:
        return f"inputs {type(self.grid).__name__} {self.grid.bits}b {self.granularity}"

    def check(self, grid: Grid, groups: Groups) -> None:
        """Raise PlanError if no product is computed as `compute` says."""
        self.way(grid, groups)

    def way(self, grid: Grid, groups: Groups) -> Way:
        """How products with a weight on `grid` in `groups` are computed.

        Raises:
            PlanError: `compute="integer"`, and there is no such product.
        """
        if self.compute == "fake_quant":
            return "fake_quant"
        way: Way = "fake_quant"
        if groups.axis == "in":
            both = {_kind(self.grid), _kind(grid)}
            way = "integer" if both == {"integer"} else "fake_quant" if None in both else "float"
        if self.compute == "integer" and way != "integer":
            why = (
                f"{type(grid).__name__} has no integers"
                if groups.axis == "in"
                else "scales of groups along the output axis stand inside the sum"
            )
            raise PlanError(
                f"Activations.compute='integer' with a weight on {grid!r} in {groups!r}: {why}; "
                "pass grids.Uniform in groups along the input axis, or compute='auto'"
            )
        return way

    def fit(self, low: Float[Array, "*r"], high: Float[Array, "*r"]) -> GridParams:
        """The grid's parameters for ranges `[low, high]`, one for each."""
        return self.grid.fit(jnp.stack([low, high], axis=-1).astype(jnp.float32))


def _is_of_inputs(grid: Any) -> bool:
    """Whether a grid can be that of inputs, whose ranges are found as they come."""
    if not isinstance(grid, Uniform | grids.Float) or grid.range != MinMax():
        return False
    if isinstance(grid, Uniform):
        # Zero has to be among the values, and a range has no largest entry with a sign.
        return grid.convention not in ("S4", "S5")
    return grid.scale != "e4m3" and grid.macro is None and grid.group is None


def even(grid: Grid) -> bool:
    """Whether the grid's range reaches as far below zero as above."""
    return bool(getattr(grid, "symmetric", getattr(grid, "signed", False)))


def _kind(grid: Grid) -> str | None:
    """Which numbers a grid has besides its scale, "integer" or "float"; None: neither."""
    if isinstance(grid, Uniform):
        return "integer"
    if not isinstance(grid, grids.Float) or grid.scale == "e4m3" or grid.macro is not None:
        return None
    # bfloat16 must hold them all as normal numbers.
    exact = grid.mantissa_bits <= 7 and grid.format.smallest >= 2.0**-126
    return "float" if exact else None


def encode(
    x: Float[Array, "*batch tokens in"], choice: Activations, static: GridParams | None
) -> tuple[Integer[Array, "*batch tokens in"], GridParams, Float[Array, "*batch tokens"]]:
    """The codes of an input, int32, on the grid of its range.

    Args:
        x: any float dtype; arithmetic is float32.
        choice: grid and granularity.
        static: the grid's parameters, `[*batch]`, where ranges are static.

    Returns:
        codes; parameters `[*batch, tokens]` or, of one range for all tokens, `[*batch, 1]`; and one
        for every token, NaN for those that are not finite, to multiply results by.
    """
    x = x.astype(jnp.float32)
    finite = all_finite(x, axis=-1)
    # Zero is in every range: it keeps its value, and an empty token has one.
    if even(choice.grid):
        high = jnp.max(jnp.abs(x), axis=-1, initial=0.0)
        low = -high
    else:
        low = jnp.min(x, axis=-1, initial=0.0)
        high = jnp.max(x, axis=-1, initial=0.0)
    sound = jnp.where(finite, 1.0, jnp.nan).astype(jnp.float32)
    if static is not None:
        params = jax.tree.map(lambda leaf: leaf[..., None], static)
    else:
        low, high = jnp.where(finite, low, 0.0), jnp.where(finite, high, 0.0)
        if choice.granularity == "tensor":
            low = jnp.min(low, axis=-1, keepdims=True, initial=0.0)
            high = jnp.max(high, axis=-1, keepdims=True, initial=0.0)
        params = choice.fit(low, high)
    return nearest(choice.grid, x, params), params, sound


def rounded(
    x: Float[Array, "*batch tokens in"], choice: Activations, static: GridParams | None
) -> Float[Array, "*batch tokens in"]:
    """The input as its codes say, float32; gradients pass as if nothing had been rounded.

    Example:
        >>> x = jnp.array([[4.0, 3.0, -0.9]])
        >>> rounded(x, Activations(Uniform(2, symmetric=True, convention="S3")), None).tolist()
        [[4.0, 4.0, 0.0]]
    """

    @jax.custom_jvp
    def run(x: Array, static: GridParams | None) -> Array:
        codes, params, sound = encode(x, choice, static)
        return choice.grid.decode(codes, params) * sound[..., None]

    @run.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        return run(*primals), tangents[0].astype(jnp.float32)

    return run(x, static)


def numbers(grid: Grid, codes: Integer[Array, "*s"], dtype: Any) -> tuple[Array, int]:
    """Codes as the numbers that a scale multiplies, in a narrow dtype, and what was taken off them.

    Args:
        grid: a `Uniform` or `Float` grid.
        codes: of any integer dtype.
        dtype: int8, or a float dtype that holds the numbers exactly.

    Example:
        >>> c, less = numbers(Uniform(8), jnp.array([0, 255], jnp.uint8), jnp.int8)
        >>> c.tolist(), less
        ([-128, 127], 128)
    """
    if not isinstance(grid, Uniform):
        return grid.numbers(codes).astype(dtype), 0  # type: ignore[attr-defined]
    if grid.convention == "S5":
        return (2 * codes.astype(jnp.int32) + 1).astype(dtype), 0
    if dtype == jnp.int8 and grid.codes[1] > 127:
        if codes.dtype == jnp.uint8:  # a byte for a byte
            return lax.bitcast_convert_type(codes ^ jnp.uint8(128), jnp.int8), 128
        return (codes.astype(jnp.int32) - 128).astype(jnp.int8), 128
    return codes.astype(dtype), 0
