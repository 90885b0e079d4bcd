"""Floating point grids: `value = scale * (a number of the format)`, MX and NV blocks among them.

A code is the rank of a magnitude with the sign of the number, so codes increase with values, E2M1
has the codes -7 ... 7, and `|code|` is the bit pattern of the format (`numerics/formats.py`). Two
numbers make the rest: what a format can hold and how the scale of a group is stored.

    MX  scale 2^k in one byte (E8M0), groups of 32    k = floor(log2 max |w|) - floor(log2 largest)
    NV  scale in E4M3, groups of 16, and one float32  tensor = max |W| / (448 * 6)
        scale for the tensor                          scale = E4M3(max |w| / 6 / tensor)

Under the rule of OCP for MX, weights between the largest number and the next power of two clip;
there are three other rules, and neighbouring groups may share a mantissa (`macro.py`). Of NV, each
group may have its largest weight at 4 in place of 6, where steps are even. Static: all but the
parameters `scale` `[*g]`, `tensor` `[1, 1]` and `macro`, one for some neighbouring groups.

References: OCP Microscaling Formats (MX) v1.0, 2023 (§6.3 has the scale); NVIDIA, Pretraining large
language models with NVFP4, 2025, https://arxiv.org/abs/2509.25149 (both scales); Chhugani et al.,
Unveiling the Potential of Quantization with MXFP4, 2026, https://arxiv.org/abs/2603.08713 (the rule
"oas" and `macro`); Cook et al., Four Over Six: More Accurate NVFP4 Quantization with Adaptive Block
Scaling, 2025, https://arxiv.org/abs/2512.02010.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32, Integer
from jaxtyping import Float as Real

from jquant.grids.base import GridParams
from jquant.grids.macro import best_mantissa, multiplier, of_groups, of_largest
from jquant.grids.ranges import MSE, MinMax, best_factor, factors_of, loss_at
from jquant.grids.scales import CAP, SCALES, Rule, as_stored, power_of_two
from jquant.numerics import require
from jquant.numerics.extremes import largest
from jquant.numerics.formats import Format, Overflow, Special, find_format

_ROOM = 256.0  # what the largest group's scale is then, of E4M3's 448: 3/2 of it still fits


@jax.tree_util.register_static
@dataclass(frozen=True)
class Float:
    """Numbers of a floating point format, times a scale per group if asked.

    Args:
        exponent_bits: 1 to 8.
        mantissa_bits: 0 to 23, the leading one not counted. Codes take `1 + e + m` bits, of which
            up to 16 can be stored.
        signed: whether there are negative numbers; without, they become zero.
        bias: of the exponent; default that of the known format of as many bits (E2M1, E2M3, E3M2,
            E4M3, E5M2, ...), else `2^(e-1) - 1`.
        special: which patterns are no numbers: "ieee" the top exponent, "nan" the top pattern,
            "none"; default as `bias`, else "ieee". `Float(5, 10)` is IEEE's half precision.
        overflow: what `round` makes of numbers beyond the largest: "saturate", or "infinity" (NaN
            where the format has no infinity, and the largest number where it has no NaN either).
            Codes are always finite.
        scale: how the scale of a group is stored: None (there is none), "float32", "float16",
            "bfloat16", "e8m0" (powers of two) or "e4m3", with one float32 scale per tensor.
        tensor_scale: whether there is that one. Without, as MLX has NVFP4, scales are those of
            E4M3 itself, 2^-9 to 448: those of groups of small weights are rounded coarsely.
        scale_rule: how "e8m0" takes a power of two from a group's largest weight: "floor" as OCP,
            "even" rounded to the format's mantissa first (to the next one from 1.75 for E2M1, as
            compressed-tensors does), "ceil" the least that clips nothing, "oas" half of that where
            it clips by no more than half a step (overflow-aware scaling: for E2M1 the largest
            weight comes to lie in (3.5, 7] times the scale, so that it is "even" but for ties).
        macro: how many neighbouring groups share a mantissa of one byte, by which their scales
            "e8m0" are multiplied (macro block scaling; 4 of MX's are the paper's 128 weights).
            None: there is none. With `MSE` it is searched too, together with the powers of two.
        four_six: whether the largest weight of a group may lie at 4 in place of 6, where that makes
            the smaller squared error, weighted as that of `MSE` (four over six). For E2M1 with
            "e4m3", whose tensor scale then leaves room for it: that of NV is 7/4 as large.
        range: `MinMax()`, or `MSE()` to search for a scale that clips on purpose.
        group: the group size that a `Scheme` without groups takes.
        negative_zero: whether there is a code for -0, below the smallest number's. Files have it,
            rounding never chooses it.

    Raises:
        ValueError: an argument is out of its set, or they contradict each other.

    Example:
        >>> grid = Float(2, 1, scale="float32")
        >>> w = jnp.array([[-12.0, 0.0, 0.9, 5.0]])
        >>> codes = grid.nearest(w, grid.fit(w))
        >>> codes.tolist(), grid.decode(codes, grid.fit(w)).tolist()
        ([[-7, 0, 1, 4]], [[-12.0, 0.0, 1.0, 4.0]])
    """

    exponent_bits: int
    mantissa_bits: int
    _: KW_ONLY
    signed: bool = True
    bias: int | None = None
    special: Special | None = None
    overflow: Overflow = "saturate"
    scale: str | None = None
    scale_rule: Rule = "floor"
    range: MinMax | MSE = MinMax()
    group: int | None = None
    negative_zero: bool = False
    macro: int | None = None
    four_six: bool = False
    tensor_scale: bool = True

    def __post_init__(self) -> None:
        row = self.format
        object.__setattr__(self, "bias", row.bias)
        object.__setattr__(self, "special", row.special)
        require.one_of("Float.overflow", self.overflow, get_args(Overflow))
        require.one_of("Float.scale", self.scale, (None, *SCALES))
        require.one_of("Float.scale_rule", self.scale_rule, get_args(Rule))
        require.made_by("Float.range", self.range, MinMax, MSE)
        require.boolean("Float.negative_zero", self.negative_zero)
        if self.negative_zero and not self.signed:
            raise ValueError("Float.negative_zero=True has no sign to be of; pass signed=True")
        size = self.group
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"Float.group must be a positive int or None, got {size!r}")
        if self.scale is None and self.range != MinMax():
            raise ValueError("Float without a scale has no range to search; pass scale= too")
        if self.scale != "e8m0" and self.scale_rule != "floor":
            raise ValueError(f"Float.scale_rule={self.scale_rule!r} is of the scale 'e8m0' alone")
        self._check_scales(row)
        if self.scale is not None and row.largest / row.smallest > 2.0**200:
            raise ValueError(f"{row} spans the range of float32 and needs no scale; pass None")

    def _check_scales(self, row: Format) -> None:
        """Refuse what is of other scales than the grid's. ValueError: there is such."""
        if self.macro is not None:
            require.integer("Float.macro", self.macro, 2, 2**16)
            if self.scale != "e8m0":
                raise ValueError(f"Float.macro={self.macro} is of the scale 'e8m0' alone")
        require.boolean("Float.tensor_scale", self.tensor_scale)
        if not self.tensor_scale and self.scale != "e4m3":
            raise ValueError("Float.tensor_scale=False is of the scale 'e4m3' alone, as NV()")
        require.boolean("Float.four_six", self.four_six)
        if self.four_six and (self.scale, row) != ("e4m3", find_format(2, 1)):
            raise ValueError("Float.four_six=True is of E2M1 with the scale 'e4m3' alone, as NV()")

    @property
    def format(self) -> Format:
        """The numbers, without a scale."""
        size = self.exponent_bits, self.mantissa_bits
        return find_format(*size, self.bias, self.special, self.signed)

    @property
    def papers(self) -> tuple[str, ...]:
        blocks = {"e8m0": ("rouhani2023microscaling",), "e4m3": ("nvidia2025nvfp4",)}
        eight = (self.exponent_bits, self.mantissa_bits) in ((4, 3), (5, 2)) and self.signed
        chosen = {
            "micikevicius2022fp8": eight,
            "chhugani2026mxfp4": self.macro is not None or self.scale_rule == "oas",
            "cook2025foursix": self.four_six,
        }
        return blocks.get(str(self.scale), ()) + tuple(key for key, on in chosen.items() if on)

    @property
    def bits(self) -> int:
        """Bits a stored code takes."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest code, both included."""
        top = self.format.top
        return -top - self.negative_zero if self.signed else 0, top

    def round(self, x: Real[Array, "*s"]) -> Real[Array, "*s"]:
        """Every number as the nearest one of the format, ties to even; the scale has no part.

        Args:
            x: any shape; arithmetic in float32, which is exact for narrower types, or float64.

        Returns:
            float32, or float64 if `x` is, with the sign of zeros kept, NaN where `x` is NaN, and
            `overflow` as chosen.

        Example:
            >>> Float(5, 10, overflow="infinity").round(jnp.array([1e-8, 65519.0, 7e4])).tolist()
            [0.0, 65504.0, inf]
        """
        return self.format.round(x, self.overflow)

    def fit(
        self, w: Real[Array, "*g b"], importance: Real[Array, "*#g #b"] | None = None
    ) -> GridParams:
        """Group parameters: none, or `scale` `[*g]` in its stored dtype; for "e4m3" `tensor`,
        float32, over the last two axes of `*g`, which are kept with size one; and with `macro`,
        uint8, one number for so many along the last of `*g`.

        `importance` weighs errors where there is more than one scale to choose from. Finite weights
        give finite parameters and values; a group of zeros has scale 1 (times that of the macro
        block), one of tiny weights a scale at which values stay normal, and one that holds NaN a
        scale of NaN.
        """
        if self.scale is None:
            return {}
        w, numbers, stored = w.astype(jnp.float32), self.format, SCALES[self.scale]
        top = jnp.minimum(largest(jnp.abs(w) if self.signed else w, axis=-1, initial=0.0), CAP)
        least = 2.0**-126 / numbers.smallest
        if self.scale == "e8m0":
            return self._powers(w, top, importance)
        tensor = None
        if self.scale == "e4m3" and self.tensor_scale:
            axes = tuple(range(max(top.ndim - 2, 0), top.ndim))
            whole = largest(top, axis=axes, keepdims=True)
            unit = numbers.largest * (_ROOM if self.four_six else stored.most)
            tensor = as_stored(whole, unit, SCALES["float32"], least / stored.least)

        def at(factor: Array | float) -> GridParams:
            if tensor is None:
                return {"scale": as_stored(top * factor, numbers.largest, stored, least)}
            scale = as_stored(top * factor, numbers.largest * tensor, stored, 0.0)
            return {"scale": scale, "tensor": tensor}

        factors = self._factors
        if len(factors) == 1:
            return at(1.0)
        return at(best_factor(factors, self._loss(w, importance, at), top.shape)[0])

    @property
    def _factors(self) -> np.ndarray:
        """What a group's range may be multiplied by, 1 first."""
        own = factors_of(self.range)
        if self.scale == "e8m0":  # those between would only give the same powers of two again
            return 2.0 ** -np.arange(int(np.ceil(-np.log2(own.min()))) + 1, dtype=np.float32)
        if self.four_six:
            wider = own * np.float32(1.5)
            return np.concatenate([own, wider[wider > 1]])
        return own

    def _loss(self, w: Array, importance: Array | None, at: Callable[[Any], GridParams]) -> Any:
        norm = self.range.norm if isinstance(self.range, MSE) else 2.0
        return loss_at(self, w, importance, norm, at)

    def _powers(
        self, w: Float32[Array, "*g b"], top: Float32[Array, "*g"], importance: Array | None
    ) -> GridParams:
        """Powers of two for the groups, and with `macro` what multiplies them."""
        numbers, together = self.format, self.macro

        def at(mantissa: Array | None) -> Callable[[Array | float], GridParams]:
            if mantissa is None or together is None:
                return lambda factor: {
                    "scale": power_of_two(top * factor, numbers, self.scale_rule)
                }
            part = top / multiplier(of_groups(mantissa, together, top.shape[-1]))
            return lambda factor: {
                "scale": power_of_two(part * factor, numbers, self.scale_rule), "macro": mantissa,
            }  # fmt: skip

        def best(mantissa: Array | None) -> tuple[Array, Array]:
            loss = self._loss(w, importance, at(mantissa))
            return best_factor(self._factors, loss, top.shape)

        searched = isinstance(self.range, MSE)
        mantissa = None if together is None else of_largest(top, numbers.largest, together)
        if searched and mantissa is not None and together is not None:
            mantissa = best_mantissa(mantissa, together, lambda m: best(m)[1])
        return at(mantissa)(best(mantissa)[0] if searched else 1.0)

    def spread(self, params: GridParams) -> GridParams:
        """Parameters of which `macro` stands for no more than one group."""
        if "macro" not in params or self.macro is None:
            return params
        count = params["scale"].shape[-1]
        return {**params, "macro": of_groups(params["macro"], self.macro, count)}

    def _scale(self, params: GridParams) -> Float32[Array, "*g 1"] | None:
        """What a number of the format is multiplied by, with an axis for the weights of a group."""
        if self.scale is None:
            return None  # not 1: dividing by it would flush float32's subnormals to zero
        params = self.spread(params)
        scale = params["scale"].astype(jnp.float32)
        if "macro" in params:
            scale = scale * multiplier(params["macro"])
        if "divisor" in params:  # a file may keep one, whose inverse is no float32
            scale = scale / params["divisor"]
        return (scale * params["tensor"] if "tensor" in params else scale)[..., None]

    def _numbers(self, w: Real[Array, "*g b"], params: GridParams) -> Float32[Array, "*g b"]:
        w, scale = w.astype(jnp.float32), self._scale(params)
        return w if scale is None else w / scale

    def _signed(self, rank: Int32[Array, "*g b"], x: Float32[Array, "*g b"]) -> Array:
        """Ranks as codes, which have the sign of `x`."""
        # The sign by its bit: comparisons with zero take tiny numbers for it.
        sign = lax.bitcast_convert_type(x, jnp.int32) >> 31
        return (rank ^ sign) - sign if self.signed else jnp.where(sign < 0, 0, rank)

    def nearest(self, w: Real[Array, "*g b"], params: GridParams) -> Int32[Array, "*g b"]:
        """The code of the nearest value; ties go to the even mantissa, as IEEE 754 has it."""
        x = self._numbers(w, params)
        return self._signed(jnp.minimum(self.format.rank(x), self.format.top), x)

    def bracket(
        self, w: Real[Array, "*g b"], params: GridParams
    ) -> tuple[Int32[Array, "*g b"], Int32[Array, "*g b"]]:
        """The neighbouring codes; equal where the weight is outside the grid's range."""
        x = self._numbers(w, params)
        rank = jnp.minimum(self.format.rank(x), self.format.top)
        # Positive floats are ordered as their bits are, the tiny ones included.
        bits = lax.bitcast_convert_type(self.format.magnitude(rank), jnp.int32)
        above = bits > lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
        inner = jnp.where(above, rank - 1, rank)
        outer = jnp.minimum(inner + 1, self.format.top)
        inner, outer = self._signed(inner, x), self._signed(outer, x)
        return jnp.minimum(inner, outer), jnp.maximum(inner, outer)

    def decode(self, codes: Integer[Array, "*g b"], params: GridParams) -> Float32[Array, "*g b"]:
        """`scale * number`, float32."""
        value, scale = self.numbers(codes), self._scale(params)
        return value if scale is None else scale * value

    shifts = False

    def rescaled(
        self, params: GridParams, factor: Real[Array, "*g"], shift: Real[Array, "*g"]
    ) -> GridParams:
        """Parameters, as stored, of values near `factor * value`; the tensor's scale stays."""
        del shift
        if self.scale is None:
            return params
        stored = SCALES[self.scale]
        least = stored.least if "tensor" in params else 2.0**-126 / self.format.smallest
        scale = params["scale"].astype(jnp.float32) * factor
        scale = jnp.clip(scale, max(stored.least, least), stored.most)
        return {**params, "scale": scale.astype(stored.dtype)}

    def numbers(self, codes: Integer[Array, "*s"]) -> Float32[Array, "*s"]:
        """The numbers of the format that codes of any integer type stand for, float32."""
        codes = codes.astype(jnp.int32)
        rank = jnp.abs(codes)
        if self.negative_zero:
            rank = jnp.where(rank > self.format.top, 0, rank)
        value = self.format.magnitude(rank)
        return jnp.where(codes < 0, -value, value)
