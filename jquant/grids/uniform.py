"""Uniform (affine) grids: `value = scale * (code - zero)`, 2 to 8 bits.

Nine conventions are in use for the step and the zero point, and mixing them up is the usual bug of
the field. They are rows of `CONVENTIONS`: every one takes a range `[low, high]` from the weights,
divides it by a number of steps, and puts zero somewhere:

    id  used by              range                       steps    zero point           codes
    A1  GPTQ (default)       [min(w, 0), max(w, 0)]      2^b - 1  round(-low/s)        0 .. 2^b - 1
    A2  AWQ, AdaDim          [min w, max w], floor 1e-5  2^b - 1  clip(round(-low/s))  0 .. 2^b - 1
    A3  DeepSpeed            [min w, max w]              2^b      round(-low/s)        0 .. 2^b - 1
    A4  HQQ                  [min w, max w]              2^b - 1  -low/s               0 .. 2^b - 1
    S1  GPTQ, DiscQuant      ±max |w|                    2^b - 1  none                 as int b
    S2  DeepSpeed            ±max |w|                    2^b      none                 as int b
    S3  int8 kernels, Power  ±max |w|                    2^b - 2  none                 ± 2^(b-1) - 1
    S4  llama.cpp's Q4_0     -e to e, e the largest      2^b      none                 as int b
    S5  Qift (2 bits)        ±max |w|                    2^b - 1  -1/2, between codes  as int b

S4 takes the entry e of largest magnitude for its lowest code, so that e is kept as it is: where e
is above zero, the step is negative. S5 has no zero among its values, which are odd multiples of the
scale, `scale * (2 * code + 1)`: with 2 bits ±1 and ±3, a mid-rise quantizer. Its step is twice its
scale. The zero point of A3 need not be a code, that of A4 not even whole; it is stored as the scale
is.
*int b* are the codes -2^(b-1) .. 2^(b-1) - 1.
S1 differs from GPTQ's code on purpose in one thing: there a group without negative weights gets
half the scale it needs and clips half its range. A2 keeps AWQ's behaviour: a group far from zero
clips, as its zero point has to be a code. Static: everything but the group parameters, which are
arrays: `scale`, and for asymmetric grids `zero`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jquant.grids.base import GridParams, code_dtype
from jquant.grids.hqq import HQQ, best_zero
from jquant.grids.joint import Joint, Space, best_pair, better
from jquant.grids.ranges import LEAST_SCALE, MSE, MinMax, best_of
from jquant.numerics import require
from jquant.numerics.extremes import largest, least


class Convention(NamedTuple):
    """One row of the table in the module docstring; `2**bits - fewer` steps, codes from `first`."""

    range: Literal["zero inside", "as found", "even", "signed"]
    fewer: int  # steps = 2**bits - fewer
    zero: Literal["code", "any", "real", "none", "half"]
    paper: str  # see `schemes/cite.py`
    floor: float = 0.0  # least width of the range

    @property
    def symmetric(self) -> bool:
        return self.zero in ("none", "half")


CONVENTIONS: dict[str, Convention] = {
    "A1": Convention("zero inside", 1, "code", "frantar2022gptq"),
    "A2": Convention("as found", 1, "code", "lin2024awq", 1e-5),
    "A3": Convention("as found", 0, "any", "yao2022zeroquant"),
    "A4": Convention("as found", 1, "real", "badri2023hqq"),
    "S1": Convention("even", 1, "none", "frantar2022gptq"),
    "S2": Convention("even", 0, "none", "yao2022zeroquant"),
    "S3": Convention("even", 2, "none", "jacob2018integer"),
    "S4": Convention("signed", 0, "none", "ggml2023llamacpp"),
    "S5": Convention("even", 1, "half", "huang2026qift"),
}

# A step below 2^-16 of the group's largest weight (only A2, A3 and A4, far from zero) would make
# zero points that float32 cannot subtract exactly from a code. A4's, in narrower types, should be
# off by a quarter at the most.
LEAST_STEP = 2.0**-16


@jax.tree_util.register_static
@dataclass(frozen=True)
class Uniform:
    """Equally spaced points, `2**bits` codes per weight.

    Args:
        bits: 2 to 8.
        symmetric: codes signed around zero and no zero point; else unsigned codes with one.
        convention: how range, steps and zero point are taken. `"A1"` (default) GPTQ's, zero inside
            the range; `"A2"` AWQ's, `"A3"` DeepSpeed's and `"A4"` HQQ's (default with `HQQ()`), the
            range as it is; of symmetric grids `"S1"` (default) GPTQ's, `2^b - 1` steps, `"S2"`
            DeepSpeed's, `2^b`, `"S3"` of int8 kernels, `2^b - 2`, without the lowest code, `"S4"`
            llama.cpp's, `2^b`, whose scale has a sign, `"S5"` Qift's, 2 to 7 bits, without zero.
        range: `MinMax()`, or `MSE()` to search for a range that clips on purpose, or `HQQ()` for a
            zero point between codes, or `Joint()` to search for range and zero point together.
        scale_dtype: `"float32"`, `"float16"` or `"bfloat16"`. The scale is rounded to it in `fit`,
            so codes are chosen for the scale that is stored.

    Raises:
        ValueError: an argument is out of its set, or `symmetric` contradicts `convention`.

    Example:
        >>> grid = Uniform(2)
        >>> params = grid.fit(jnp.array([[-1.0, 0.0, 0.4, 2.0]]))
        >>> float(params["scale"][0]), int(params["zero"][0])
        (1.0, 1)
        >>> grid.decode(grid.nearest(jnp.array([[-1.0, 0.0, 0.4, 2.0]]), params), params).tolist()
        [[-1.0, 0.0, 0.0, 2.0]]

    References:
        Frantar et al., GPTQ, 2022, https://arxiv.org/abs/2210.17323 (A1, S1, and the MSE search)
    """

    bits: int
    symmetric: bool = False
    convention: str | None = None
    range: MinMax | MSE | HQQ | Joint = MinMax()
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        require.integer("Uniform.bits", self.bits, 2, 8)
        require.boolean("Uniform.symmetric", self.symmetric)
        require.made_by("Uniform.range", self.range, MinMax, MSE, HQQ, Joint)
        between = isinstance(self.range, HQQ)
        if self.convention is None:
            default = "S1" if self.symmetric else "A4" if between else "A1"
            object.__setattr__(self, "convention", default)
        row = CONVENTIONS.get(str(self.convention))
        if row is None or row.symmetric != self.symmetric:
            fits = [name for name, row in CONVENTIONS.items() if row.symmetric == self.symmetric]
            raise ValueError(
                f"Uniform.convention with symmetric={self.symmetric} must be one of {fits} or "
                f"None, got {self.convention!r}"
            )
        if between and row.zero != "real":
            raise ValueError(
                "Uniform.range=HQQ() puts zero between codes; pass symmetric=False and "
                f"convention='A4' or None, got {self.convention!r}"
            )
        if row.zero == "half" and self.bits == 8:
            raise ValueError(
                "Uniform.convention='S5' has 2 to 7 bits, whose odd numbers fit in a byte; got 8"
            )
        require.one_of("Uniform.scale_dtype", self.scale_dtype, list(LEAST_SCALE))

    @property
    def papers(self) -> tuple[str, ...]:
        return (self._row.paper,)

    @property
    def _row(self) -> Convention:
        return CONVENTIONS[str(self.convention)]

    @property
    def _least_step(self) -> float:
        """The least step, as a part of the group's largest weight."""
        coarse = 4.0 * float(jnp.finfo(self.scale_dtype).eps)
        return max(LEAST_STEP, coarse) if self._row.zero == "real" else LEAST_STEP

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest code, both included."""
        if not self.symmetric:
            return 0, 2**self.bits - 1
        top = 2 ** (self.bits - 1) - 1
        return top + 1 - 2**self.bits + max(self._row.fewer - 1, 0), top

    def fit(
        self, w: Float[Array, "*g b"], importance: Float[Array, "*#g #b"] | None = None
    ) -> GridParams:
        """Group parameters: `scale` `[*g]`, and `zero` `[*g]` if asymmetric.

        `zero` has the grid's code dtype (float32 in A3, whose zero point may lie outside the codes;
        that of the scale in A4). `importance` weighs the errors of all searches; `MinMax` has no
        use for it. Finite weights give finite parameters and values, whatever their range: ranges
        are capped at a quarter of float32's, and a group of zeros has scale 1 (in S5 the least). A
        group that holds NaN has a scale of NaN. Scales are positive but in S4.
        """
        w = w.astype(jnp.float32)
        # Reductions start from zero where the convention wants zero inside.
        start = 0.0 if self._row.range == "zero inside" else None
        low = least(w, axis=-1, initial=start)
        high = largest(w, axis=-1, initial=start)
        if self._row.range in ("even", "signed"):
            above = high > -low
            high = jnp.maximum(high, -low)
            low = -high
            if self._row.range == "signed":  # a range that runs downwards has a negative step
                low, high = jnp.where(above, high, low), jnp.where(above, low, high)
        cap = float(jnp.finfo(jnp.float32).max) / 4
        low, high = jnp.clip(low, -cap, cap), jnp.clip(high, -cap, cap)
        if isinstance(self.range, MinMax):
            return self._params(low, high)
        if isinstance(self.range, HQQ):
            params = self._params(low, high)
            part = jnp.clip(w, -cap, cap) / params["scale"].astype(jnp.float32)[..., None]
            zero = best_zero(self.range, part, params["zero"], importance, self.codes)
            return {**params, "zero": zero}
        if isinstance(self.range, Joint):
            return self._together(self.range, w, importance, (low, high))
        return best_of(self.range, self, w, importance, lambda f: self._params(low * f, high * f))

    def _together(
        self,
        search: Joint,
        w: Float[Array, "*g b"],
        importance: Float[Array, "*#g #b"] | None,
        span: tuple[Float[Array, "*g"], Float[Array, "*g"]],
    ) -> GridParams:
        """The best scale and zero point of groups whose range is `span`."""
        low, high = span
        magnitude = jnp.maximum(jnp.abs(low), jnp.abs(high))
        unit = jnp.maximum(jnp.abs(self._step(low, high)), magnitude * self._least_step)
        unit = jnp.where(magnitude == 0, 1.0, jnp.maximum(unit, LEAST_SCALE["float32"]))
        row = self._row
        zeros = "none" if row.zero == "half" else row.zero
        signs = (1.0, -1.0) if row.range == "signed" else (1.0,)
        space = Space(unit, (low + high) / 2 / unit, self.codes, zeros, self._between, signs)
        w = jnp.clip(w, -magnitude[..., None], magnitude[..., None])
        step, zero = best_pair(search, w, importance, space)
        searched = self._stored(step, step * zero, magnitude)
        return better(search, self, w, importance, (searched, self._params(low, high)))

    def _params(self, low: Float[Array, "*g"], high: Float[Array, "*g"]) -> GridParams:
        """Scale and zero point of a range, as the convention has them."""
        magnitude = jnp.maximum(jnp.abs(low), jnp.abs(high))
        return self._stored(self._step(low, high), -low, magnitude)

    def _step(self, low: Float[Array, "*g"], high: Float[Array, "*g"]) -> Float[Array, "*g"]:
        """The step of a range; below zero where it runs downwards."""
        # XLA would multiply by the reciprocal of a constant, an ulp off what every other tool
        # divides; it cannot see that these steps are one.
        steps = 2**self.bits - self._row.fewer + 0.0 * jnp.maximum(jnp.abs(low), jnp.abs(high))
        width = high - low
        return (jnp.maximum(width, self._row.floor) if self._row.floor else width) / steps

    def _stored(
        self, step: Float[Array, "*g"], offset: Float[Array, "*g"], magnitude: Float[Array, "*g"]
    ) -> GridParams:
        """The parameters of a step, and of the offset that puts zero at `offset / step`."""
        row = self._row
        least, stored = LEAST_SCALE[self.scale_dtype], jnp.finfo(self.scale_dtype)
        size = jnp.abs(step) * (0.5 if row.zero == "half" else 1.0)
        size = jnp.maximum(size, magnitude * self._least_step)
        size = jnp.clip(size, least, float(stored.max))
        scale = jnp.where(step < 0, -size, size)
        # Where there is no zero, its neighbours should be near.
        scale = jnp.where(magnitude == 0, least if row.zero == "half" else 1.0, scale)
        scale = scale.astype(self.scale_dtype)
        if row.symmetric:
            return {"scale": scale}
        zero = offset / scale.astype(jnp.float32)
        if row.zero == "real":
            zero = jnp.clip(zero, -1.0 / self._least_step, 1.0 / self._least_step)
            return {"scale": scale, "zero": zero.astype(self.scale_dtype)}
        zero = jnp.round(zero)
        if row.zero == "any":
            return {"scale": scale, "zero": zero}
        zero = jnp.clip(zero, *self.codes).astype(jnp.int32)
        return {"scale": scale, "zero": zero.astype(code_dtype(self))}

    @property
    def _between(self) -> float:
        """Where zero lies among the codes of a symmetric grid."""
        return -0.5 if self._row.zero == "half" else 0.0

    def _affine(self, params: GridParams) -> tuple[Float[Array, "*g 1"], Float[Array, "*g 1"]]:
        """Step and zero point as float32, with an axis for the weights of a group."""
        scale = params["scale"].astype(jnp.float32)[..., None]
        if self.symmetric:
            step = 2.0 * scale if self._row.zero == "half" else scale
            return step, jnp.full_like(step, self._between)
        return scale, params["zero"].astype(jnp.float32)[..., None]

    def bracket(
        self, w: Float[Array, "*g b"], params: GridParams
    ) -> tuple[Integer[Array, "*g b"], Integer[Array, "*g b"]]:
        """The neighbouring int32 codes; equal where the weight is outside the grid's range."""
        scale, zero = self._affine(params)
        real = self._row.zero in ("real", "half")
        below = jnp.floor(w / scale + zero) if real else jnp.floor(w / scale) + zero
        first, last = self.codes
        lo, hi = jnp.clip(below, first, last), jnp.clip(below + 1.0, first, last)
        return lo.astype(jnp.int32), hi.astype(jnp.int32)

    def nearest(self, w: Float[Array, "*g b"], params: GridParams) -> Integer[Array, "*g b"]:
        """`clip(round(w / scale) + zero)`; ties go to even multiples of the scale (GPTQ's code).

        In A4 and S5 `clip(round(w / step + zero))`; ties go to even codes.
        """
        scale, zero = self._affine(params)
        real = self._row.zero in ("real", "half")
        code = jnp.round(w / scale + zero) if real else jnp.round(w / scale) + zero
        return jnp.clip(code, *self.codes).astype(jnp.int32)

    def decode(self, codes: Integer[Array, "*g b"], params: GridParams) -> Float[Array, "*g b"]:
        """`scale * (code - zero)`, float32; in S5 `scale * (2 * code + 1)`."""
        scale, zero = self._affine(params)
        return scale * (codes.astype(jnp.float32) - zero)

    @property
    def shifts(self) -> bool:
        """Whether all values of a group can be moved by any one number: zero may lie anywhere."""
        return self._row.zero == "real"

    def rescaled(
        self, params: GridParams, factor: Float[Array, "*g"], shift: Float[Array, "*g"]
    ) -> GridParams:
        """Parameters, as stored, of values near `factor * value + shift`; only A4 can shift."""
        old, stored = params["scale"].astype(jnp.float32), self.scale_dtype
        least, most = LEAST_SCALE[stored], float(jnp.finfo(stored).max)
        size = jnp.clip(jnp.abs(old) * factor, least, most)
        scale = jnp.where(old < 0, -size, size).astype(stored)
        if not self.shifts:
            return {**params, "scale": scale}
        offset = factor * old * params["zero"].astype(jnp.float32) - shift
        zero = offset / scale.astype(jnp.float32)  # of the scale that is stored
        most = 1.0 / self._least_step
        return {"scale": scale, "zero": jnp.clip(zero, -most, most).astype(stored)}
