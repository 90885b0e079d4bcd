"""Products of inputs and codes whose scales come after, for compilers that fuse them so.

A weight in groups that is decoded before its product is written out by XLA's GPU compiler, and read
at two and a half times its bytes by that of TPUs: neither fuses a scale that changes along the
contracted axis. Both fuse the product of every group alone, in which codes are unpacked as they are
read; the scale multiplies its result,

    y = sum_g  s_g (x_g · c_g  -  z_g sum(x_g))

That takes `n` results in place of one, four bytes each for every token: with many tokens more than
the weight itself would. What the compilers make of both is measured by
`benchmarks/compiled.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from jquant.grids import Uniform
from jquant.inference.codes import FEWEST, filled
from jquant.inference.operand import Operand
from jquant.weights.qtensor import QTensor

Numbers = Callable[[Integer[Array, "*s"]], tuple[Integer[Array, "*s"], int]]


def fuses(q: QTensor, operand: Operand) -> bool:
    """Whether a group's product is one that compilers fuse and whose sums are as exact.

    Inputs of 32 bits are left as the function has them: what a platform makes of their products
    (of fewer bits, TPUs) would not be what it makes of their sums. So is what asks for a precision,
    and a last group that is shorter than the others.
    """
    width = q.codes.shape[-1]
    whole = width == q.groups.count(width) * q.groups.group(width)
    return whole and operand.dtype.itemsize == 2 and operand.precision is None


def fuses_on_gpus(q: QTensor, operand: Operand) -> bool:
    """Where results of groups, which are written out, take less memory than the decoded weight."""
    width = q.codes.shape[-1]
    count = q.groups.count(width)
    few = count == 1 or 4 * max(operand.tokens, FEWEST) * count < 2 * width
    return few and fuses(q, operand)


def fuses_on_tpus(q: QTensor, operand: Operand) -> bool:
    """Results of groups are not written out there; with more tokens products take the time."""
    return operand.tokens <= 256 and fuses(q, operand)


def as_stored(codes: Integer[Array, "*s"]) -> tuple[Integer[Array, "*s"], int]:
    """Codes, and nothing that was taken off them: what TPUs fuse."""
    return codes, 0


def signed(codes: Integer[Array, "*s"]) -> tuple[Integer[Array, "*s"], int]:
    """Codes of 4 or 8 bits with a sign, and what was taken off them: GPUs fuse no others."""
    bits = 8 if codes.dtype in (jnp.uint8, jnp.int8) else 4
    kind, middle = jnp.dtype(f"int{bits}"), 1 << (bits - 1)
    if codes.dtype == jnp.dtype(f"uint{bits}"):
        flipped = codes ^ jnp.asarray(middle, codes.dtype)
        return lax.bitcast_convert_type(flipped, kind), middle
    return codes.astype(kind), 0


def scaled_after(
    rows: Float[Array, "*batch tokens in"], q: QTensor, numbers: Numbers
) -> Float[Array, "*batch tokens out"]:
    """The product of an input and a weight in groups of inputs that all have one length, float32.

    Args:
        rows: the input, of a float dtype of 16 bits; sums are of float32.
        q: a weight on a `Uniform` grid without parts.
        numbers: what is multiplied in place of codes, and what was taken off them.
    """
    tokens, width = rows.shape[-2:]
    count = q.groups.count(width)
    x = filled(rows, tokens, axis=-2)
    x = x.reshape(*x.shape[:-1], count, width // count)
    codes, less = numbers(q.codes)
    codes = codes.reshape(*codes.shape[:-1], count, width // count)
    *batch, token, group, inner = range(x.ndim)
    dims = (((inner,), (inner,)), ((*batch, group), (*batch, group)))
    each = lax.dot_general(x, codes.astype(x.dtype), dims, preferred_element_type=jnp.float32)
    scale, zero = _affine(q)
    y = jnp.sum(each * scale[..., None, :], axis=-3)
    if zero is not None or less:
        below = ((0 if zero is None else zero) - jnp.float32(less)) * scale
        sums = jnp.sum(x, axis=-1, dtype=jnp.float32)  # [*batch, tokens, n]
        y = y - jnp.matmul(sums, below, precision=lax.Precision.HIGHEST)
    return y[..., :tokens, :]


def _affine(
    q: QTensor,
) -> tuple[Float[Array, "*batch n out"], Float[Array, "*batch n out"] | None]:
    """The scale of codes less a zero point, and this; groups before rows, float32."""
    assert isinstance(q.grid, Uniform)
    shape = (*q.codes.shape[:-1], q.groups.count(q.codes.shape[-1]))

    def by_group(name: str) -> Array:
        leaf = jnp.broadcast_to(q.params[name].astype(jnp.float32), shape)
        return jnp.swapaxes(leaf, -1, -2)

    scale = by_group("scale")
    if q.grid.convention == "S5":  # scale * (2 * code + 1)
        return 2 * scale, jnp.full_like(scale, -0.5)
    return scale, by_group("zero") if "zero" in q.params else None
