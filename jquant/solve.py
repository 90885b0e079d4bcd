"""One weight: a grid and a rounding meet here, and nowhere else.

`quantize_weight` turns one array into a `QTensor`: canonical view, rounding, packing. `Outcome` is
what the report needs to know of it, as plain numbers, so that it can wait in a file.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jquant.blocks import Layout, from_blocks, to_blocks
from jquant.calibration.evidence import Evidence
from jquant.distortion import bits_per_weight, output_error
from jquant.grids.base import nearest
from jquant.qtensor import QTensor
from jquant.rounding.base import Rounded
from jquant.rounding.elementwise import Nearest
from jquant.scheme import Scheme


def quantize_weight(
    w: Float[Array, ...],
    scheme: Scheme,
    layout: Layout,
    *,
    evidence: Evidence | None = None,
    key: PRNGKeyArray | None = None,
) -> tuple[QTensor, dict[str, Array]]:
    """Quantize one weight.

    Args:
        w: the weight, in its own shape.
        scheme: what to do.
        layout: how `w` is read as `[*batch, out, in]`; see `Weight.layout`.
        evidence: what is known of its inputs.
        key: randomness, for roundings that need it.

    Returns:
        the quantized weight, and numbers per `[*batch]`: `error`, `nearest_error` and `power` (the
        output error of this and of nearest rounding, and of leaving the weight out; without
        evidence those of the weights themselves), and what the rounding reports.
    """
    canonical = layout.canonical(w)
    rounded = scheme.rounding(canonical, scheme.grid, scheme.groups, evidence=evidence, key=key)
    return stored(canonical, rounded, scheme, layout, w.dtype, evidence)


def stored(
    canonical: Float[Array, "*batch out in"],
    rounded: Rounded,
    scheme: Scheme,
    layout: Layout,
    dtype: Any,
    evidence: Evidence | None,
) -> tuple[QTensor, dict[str, Array]]:
    """What `quantize_weight` returns of a weight that has been rounded."""
    moment = None if evidence is None else evidence.second_moment
    info = dict(_errors(canonical, rounded, moment, scheme), **rounded.info)
    q = QTensor(
        rounded.codes, dict(rounded.params), scheme.grid, scheme.groups, layout, jnp.dtype(dtype)
    )
    return q, info


def key_of(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """The key of one weight, from its name: adding a weight changes no other's."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def stored_bits(shape: Sequence[int], scheme: Scheme, layout: Layout | None = None) -> float:
    """Bits per weight that a scheme stores of a weight, group parameters counted; nothing is run.

    Args:
        shape: of the weight.
        scheme: grid and blocks count, the rounding does not.
        layout: how the weight is read; default as `[..., out, in]`.

    Example:
        >>> from jquant.grids import Uniform
        >>> stored_bits((8, 128), Scheme(Uniform(4, scale_dtype="float16"), 64))
        4.3125
    """
    rank = len(shape)
    layout = layout or Layout.of(shape, in_axes=(rank - 1,), batch_axes=tuple(range(rank - 2)))
    nearest_only = dataclasses.replace(scheme, rounding=Nearest())
    q = jax.eval_shape(
        lambda w: quantize_weight(w, nearest_only, layout)[0],
        jax.ShapeDtypeStruct(tuple(shape), jnp.float32),
    )
    return bits_per_weight(q.codes, q.params, scheme.grid.bits)


@jax.jit(static_argnames="scheme")
def _errors(
    w: Float[Array, "*batch out in"],
    rounded: Rounded,
    moment: Float[Array, "*batch in in"] | None,
    scheme: Scheme,
) -> dict[str, Array]:
    """Squared errors that the rounding has not reported itself."""
    grid, blocks = scheme.grid, scheme.groups
    length = w.shape[-1 if blocks.axis == "in" else -2]
    w = w.astype(jnp.float32)

    def size(e: Array) -> Array:
        return jnp.sum(e**2, (-2, -1)) if moment is None else output_error(e, moment)

    def decoded(codes: Array) -> Array:
        return from_blocks(grid.decode(codes, rounded.params), blocks, length)

    found = {"power": size(w)}
    if "error" not in rounded.info:
        found["error"] = size(w - decoded(to_blocks(rounded.codes.astype(jnp.int32), blocks)))
    if "nearest_error" not in rounded.info:
        found["nearest_error"] = size(
            w - decoded(nearest(grid, to_blocks(w, blocks), rounded.params))
        )
    return found


@dataclass(frozen=True)
class Outcome:
    """What became of a weight, or of one layer of a stacked one; errors are not yet relative."""

    error: float
    nearest_error: float
    power: float
    tokens: int | None
    damping: float | None
    dead: int
    failed: bool
    seconds: float
    kept_at: int | None = None  # of a learned one, the step its codes are of
    rounded: float | None = None  # the share of weights that needed no rounding at the end

    @staticmethod
    def of(info: Mapping[str, Array], evidence: Evidence | None, seconds: float) -> Outcome:
        """The outcome that `quantize_weight`'s numbers tell."""
        found = {name: np.asarray(value) for name, value in info.items()}
        return Outcome(
            error=float(found["error"].sum()),
            nearest_error=float(found["nearest_error"].sum()),
            power=float(found["power"].sum()),
            tokens=None if evidence is None else int(np.asarray(evidence.count).min()),
            damping=float(found["damping"].max()) if "damping" in found else None,
            dead=int(found["dead"].sum()) if "dead" in found else 0,
            failed=bool(np.any(found.get("failed", 0))),
            seconds=seconds,
            kept_at=int(found["kept_at"].min()) if "kept_at" in found else None,
            rounded=float(found["rounded"].mean()) if "rounded" in found else None,
        )

    @staticmethod
    def sum(parts: Sequence[Outcome]) -> Outcome:
        """The outcome of a weight from those of its layers."""
        tokens = [part.tokens for part in parts if part.tokens is not None]
        damping = [part.damping for part in parts if part.damping is not None]
        kept_at = [part.kept_at for part in parts if part.kept_at is not None]
        rounded = [part.rounded for part in parts if part.rounded is not None]
        return Outcome(
            error=sum(part.error for part in parts),
            nearest_error=sum(part.nearest_error for part in parts),
            power=sum(part.power for part in parts),
            tokens=min(tokens) if tokens else None,
            damping=max(damping) if damping else None,
            dead=sum(part.dead for part in parts),
            failed=any(part.failed for part in parts),
            seconds=sum(part.seconds for part in parts),
            kept_at=min(kept_at) if kept_at else None,
            rounded=sum(rounded) / len(rounded) if rounded else None,
        )

    @property
    def ratio(self) -> float:
        """Error relative to nearest rounding; 1 where both are exact."""
        return self.error / self.nearest_error if self.nearest_error > 0 else 1.0
