"""GGUF's affine blocks: `value = scale * code - offset`, scales themselves quantized in K-quants.

A K-quant has two levels. Its groups of 16 or 32 weights have small integers for scale and offset,
and 8 or 16 neighbouring groups, a super-block of 256 weights, share the float16 numbers that these
multiply:

    value = (scale * scale_code) * code - (offset * offset_code)

    kind  bits  group  together  scale_code  offset_code  bits per weight
    Q4_0   4     32       1          -            -            4.5
    Q5_0   5     32       1          -            -            5.5
    Q8_0   8     32       1          -            -            8.5
    Q4_1   4     32       1          -            -            5
    Q5_1   5     32       1          -            -            6
    Q2_K   2     16      16       0 .. 15      0 .. 15         2.625
    Q3_K   3     16      16     -32 .. 31         -            3.4375
    Q4_K   4     32       8       0 .. 63      0 .. 63         4.5
    Q5_K   5     32       8       0 .. 63      0 .. 63         5.5
    Q6_K   6     16      16    -128 .. 127        -            6.5625

All products are exact in float32 (11 bits of a float16, at most 7 and 5 of the integers), so values
are those of llama.cpp bit for bit, whether a compiler fuses the difference or not. Files of Q4_0,
Q5_0 and Q8_0 are read as `Uniform(b, symmetric=True, scale_dtype="float16")` in groups of 32, which
is the same set of values; MXFP4 is `MX()`. A file may hold scales that are zero or negative, whose
values then fall as the code rises; `fit` makes none that are zero, and negative ones only where
it searches in a type that has no offset. Static: the kind, the range; arrays: the parameters.

References: llama.cpp, `ggml/src/ggml-quants.c` (blocks); https://github.com/ggml-org/llama.cpp/pull/1684
(K-quants).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jquant.grids.base import GridParams, closest, neighbours
from jquant.grids.gguf_kinds import KINDS, Kind
from jquant.grids.gguf_search import Affine, Held, Problem, best_levels, best_pair
from jquant.grids.macro import in_blocks, of_groups
from jquant.grids.ranges import LEAST_SCALE, MSE, MinMax
from jquant.numerics import require
from jquant.numerics.extremes import largest, least

# A step below 2^-16 of the offset would leave float32 too few bits to tell codes apart.
_LEAST_STEP = 2.0**-16
_HALF = float(jnp.finfo(jnp.float16).max)


@jax.tree_util.register_static
@dataclass(frozen=True)
class GGUF:
    """The points of an affine GGUF block type: what `formats.gguf(kind)` writes as it is.

    Args:
        kind: "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K" or "Q6_K".
        range: `MinMax()` (default), or `MSE()` to search for scales and offsets that make the least
            weighted error, levels of super-blocks included (see `gguf_search.py`). Its `norm` is
            that of errors, its factors those of the ranges that are tried.

    Raises:
        ValueError: it is another kind, or another range.

    Example:
        >>> grid = GGUF("Q4_1")
        >>> params = grid.fit(jnp.array([[-1.0, 0.0, 2.75]]))
        >>> sorted(params), grid.decode(jnp.array([[0, 15]]), params).tolist()
        (['offset', 'scale'], [[-1.0, 2.75]])
        >>> sorted(GGUF("Q4_K").fit(jnp.ones((16, 32))))
        ['offset', 'offset_code', 'scale', 'scale_code']
    """

    kind: str
    range: MinMax | MSE = MinMax()

    def __post_init__(self) -> None:
        require.one_of("GGUF.kind", self.kind, tuple(KINDS))
        require.made_by("GGUF.range", self.range, MinMax, MSE)

    def __repr__(self) -> str:
        """As it is made, the range left out where it is that of the weights."""
        more = "" if isinstance(self.range, MinMax) else f", range={self.range!r}"
        return f"GGUF(kind={self.kind!r}{more})"

    @property
    def row(self) -> Kind:
        """What the table says of the kind."""
        return KINDS[self.kind]

    @property
    def bits(self) -> int:
        """Bits a stored code takes."""
        return self.row.bits

    @property
    def group(self) -> int:
        """Weights that share a scale and an offset."""
        return self.row.group

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest code, both included."""
        return self.row.codes

    def fit(
        self, w: Float[Array, "*g b"], importance: Float[Array, "*#g #b"] | None = None
    ) -> GridParams:
        """`scale` and, where the kind has one, `offset`, float16: `[*g]`, or in a K-quant one for
        each super-block along the last of these axes; there also `scale_code` and `offset_code`,
        `[*g]`.

        With `MinMax` ranges are those of the weights, with zero inside in K-quants; with `MSE` they
        are those of the least error, weighed by `importance`, and never worse than these. Finite
        weights give finite parameters, no scale of zero, and values that increase, or decrease in
        all of a group; weights beyond what float16 scales reach are clipped. A group that holds NaN
        has a scale of NaN.
        """
        w = w.astype(jnp.float32)
        params = self._ranges(w)
        if isinstance(self.range, MinMax):
            return params
        weight = jnp.float32(1.0) if importance is None else importance.astype(jnp.float32)
        return self._searched(self.range, w, jnp.broadcast_to(weight, w.shape), params)

    def _ranges(self, w: Float[Array, "*g b"]) -> GridParams:
        """Parameters for the ranges of the weights."""
        row, zero_inside = self.row, 0.0 if self.row.scale_codes else None
        low = least(w, axis=-1, initial=zero_inside)
        high = largest(w, axis=-1, initial=zero_inside)
        if not row.has_offset:
            step = 2.0 * jnp.maximum(high, -low) / (2**row.bits - 1)
            return self._levels("scale", step, floor=1)
        low = jnp.clip(low, -_HALF, _HALF)
        if row.scale_codes is None:
            offset = (-low).astype(jnp.float16)
            step = jnp.maximum(high - low, 0.0) / (2**row.bits - 1)
            floor = jnp.maximum(LEAST_SCALE["float16"], jnp.abs(low) * _LEAST_STEP)
            step = jnp.where((high == 0) & (low == 0), 1.0, jnp.clip(step, floor, _HALF))
            return {"scale": step.astype(jnp.float16), "offset": offset}
        steps = self._levels("scale", (high - low) / (2**row.bits - 1), floor=1)
        return {**steps, **self._levels("offset", -low, floor=0)}

    def _searched(
        self, search: MSE, w: Float[Array, "*g b"], weight: Float[Array, "*g b"], start: GridParams
    ) -> GridParams:
        """Parameters of the least error that was found, from those of the ranges on."""
        row = self.row
        names = [name for name in ("scale", "offset") if name in start]
        held = {name: leaf.astype(jnp.float32) for name, leaf in start.items()}
        if row.scale_codes is None:
            problem = Problem(row, search, w, weight)
            at = Affine(held["scale"], held.get("offset", jnp.zeros_like(held["scale"])))
            best = best_pair(problem, at)._asdict()
            chosen = {"scale": best["step"], "offset": best["offset"]}
            return {name: chosen[name].astype(jnp.float16) for name in names}
        cut = partial(in_blocks, together=row.together)
        problem = Problem(row, search, cut(w, axis=-2), cut(weight, axis=-2))
        nothing = jnp.zeros_like(held["scale"]), jnp.zeros_like(held["scale_code"])
        unit, code, offset_unit, offset_code = (
            held["scale"], held["scale_code"],
            held.get("offset", nothing[0]), held.get("offset_code", nothing[1]),
        )  # fmt: skip
        best = best_levels(
            problem, Held(unit[..., None], cut(code), offset_unit[..., None], cut(offset_code))
        )
        chosen = {
            "scale": best.unit[..., 0], "scale_code": best.code,
            "offset": best.offset_unit[..., 0], "offset_code": best.offset_code,
        }  # fmt: skip
        return {
            name: chosen[name].reshape(*leaf.shape[:-1], -1)[..., : leaf.shape[-1]]
            .astype(jnp.int32 if name.endswith("_code") else jnp.float16)
            .astype(leaf.dtype)
            for name, leaf in start.items()
        }  # fmt: skip

    def _levels(self, name: str, x: Float[Array, "*g"], floor: int) -> GridParams:
        """Positive numbers as float16 ones of super-blocks and integers that these multiply."""
        row = self.row
        if row.scale_codes is None:
            step = jnp.where(x == 0, 1.0, jnp.clip(x, LEAST_SCALE["float16"], _HALF))
            return {name: step.astype(jnp.float16)}
        most = row.scale_codes[1]
        count = x.shape[-1]
        blocks = in_blocks(x, row.together)
        top = largest(blocks, axis=-1)
        unit = jnp.clip(top / most, LEAST_SCALE["float16"], _HALF)
        unit = jnp.where(top == 0, 1.0, unit).astype(jnp.float16)
        code = jnp.round(blocks / unit.astype(jnp.float32)[..., None])
        code = jnp.clip(code, floor, most).reshape(*x.shape[:-1], -1)[..., :count]
        return {name: unit, f"{name}_code": code.astype(jnp.int32).astype(row.scale_dtype)}

    def spread(self, params: GridParams) -> GridParams:
        """Parameters of which none stands for more than one group: `scale` and `offset` `[*g]`."""
        if self.row.scale_codes is None:
            return params
        count = params["scale_code"].shape[-1]

        return {
            name: leaf if name.endswith("_code") else of_groups(leaf, self.row.together, count)
            for name, leaf in params.items()
        }

    def _affine(self, params: GridParams) -> tuple[Array, Array | float]:
        """The step and the offset of every group as float32, with an axis for its weights."""
        params = {n: leaf.astype(jnp.float32) for n, leaf in self.spread(params).items()}
        step = params["scale"] * params.get("scale_code", 1.0)
        if not self.row.has_offset:
            return step[..., None], 0.0
        return step[..., None], (params["offset"] * params.get("offset_code", 1.0))[..., None]

    def _position(self, w: Float[Array, "*g b"], params: GridParams) -> Float[Array, "*g b"]:
        """Where weights lie among the codes, as real numbers; zero where a file's step is zero."""
        step, offset = self._affine(params)
        some = step != 0
        return jnp.where(some, (w + offset) / jnp.where(some, step, 1.0), 0.0)

    def bracket(
        self, w: Float[Array, "*g b"], params: GridParams
    ) -> tuple[Integer[Array, "*g b"], Integer[Array, "*g b"]]:
        """The neighbouring int32 codes; equal where the weight is outside the grid's range."""
        return neighbours(self._position(w, params), self.codes)

    def nearest(self, w: Float[Array, "*g b"], params: GridParams) -> Integer[Array, "*g b"]:
        """The code of the nearest value; ties go to even codes."""
        return closest(self._position(w, params), self.codes)

    def decode(self, codes: Integer[Array, "*g b"], params: GridParams) -> Float[Array, "*g b"]:
        """`step * code - offset`, float32."""
        step, offset = self._affine(params)
        values = step * codes.astype(jnp.float32)
        return values - offset if self.row.has_offset else values

    @property
    def shifts(self) -> bool:
        """Whether all values of a group can be moved by one number."""
        return self.row.has_offset

    def rescaled(
        self, params: GridParams, factor: Float[Array, "*g"], shift: Float[Array, "*g"]
    ) -> GridParams:
        """Parameters, as stored, of values near `factor * value + shift`.

        In a K-quant those of super-blocks stay, and the integers that they multiply move.
        """
        row, moved = self.row, dict(params)
        for name, more, floor in (("scale", 0.0, 1), ("offset", shift, 0)):
            if name not in params:
                continue
            held, key = self.spread(params)[name].astype(jnp.float32), name
            part, least, most = held * factor - more, LEAST_SCALE["float16"], _HALF
            if row.scale_codes is not None:
                key, least, most = f"{name}_code", float(floor), float(row.scale_codes[1])
                unit = jnp.where(held == 0, 1.0, held)
                part = jnp.round(params[key].astype(jnp.float32) * factor - more / unit)
            if name == "offset":
                part = jnp.clip(part, -_HALF if key == name else least, most)
            else:  # a step keeps its sign
                sign = jnp.where(params[key].astype(jnp.float32) < 0, -1.0, 1.0)
                part = sign * jnp.clip(jnp.abs(part), least, most)
            moved[key] = part.astype(jnp.int32 if key != name else jnp.float16)
            moved[key] = moved[key].astype(params[key].dtype)
        return moved
