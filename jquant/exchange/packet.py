"""A tree of updates as a packet: every floating leaf a `QTensor`, everything else as it is.

A leaf is seen as one row `[1, n]`, cut into groups along it; its rounding has a key of its own,
from the packet's key and the leaf's path, so equal keys give equal packets, and a leaf more
changes no other's. Stochastic rounding on a grid that encloses its groups gives a packet whose mean
is the tree: the mean of many packets comes near to that of the trees, as the errors of different
keys have nothing to do with each other. Those of one key are the same, so a packet carries its
key's fingerprint, by which `average` tells packets that were rounded with one.

With a rotation, codes are of the leaf after random signs and a Hadamard matrix. The mean is the
same; a group's largest entry, and with it the step, is smaller where few entries stand out.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, UInt32

from jquant.axes.groups import Groups
from jquant.axes.layout import Layout
from jquant.errors import TreeError, WeightError
from jquant.exchange.enclosing import Enclosing, check_encloses, is_enclosed
from jquant.grids.base import Grid
from jquant.numerics import require
from jquant.numerics.hadamard import has_hadamard
from jquant.rounding.elementwise import Nearest
from jquant.rounding.stochastic import Stochastic, stochastic_round
from jquant.schemes.rotation import Hadamard
from jquant.trees.lazy import Lazy, read
from jquant.trees.paths import key_of
from jquant.weights.arguments import by_path, replaced
from jquant.weights.leaves import is_finite
from jquant.weights.qtensor import QTensor, canonical_weight, dequantize, is_qtensor
from jquant.weights.rotated import Rotated

GROUP = 128  # heuristic: a float16 scale adds an eighth of a bit


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packet:
    """A compressed tree, as `compress` makes it; a pytree, so `jit`, `vmap` and `jq.save` take it.

    Attributes:
        tree: the tree with a `QTensor` in place of every floating leaf.
        fingerprint: of the key that it was rounded with, uint32 `[2]`; zeros where there was none.
    """

    tree: PyTree
    fingerprint: UInt32[Array, "2"]


@dataclass(frozen=True)
class Choice:
    """How leaves are rounded, checked."""

    grid: Grid
    groups: Groups
    rounding: Stochastic | Nearest
    rotation: Hadamard | None

    @staticmethod
    def of(
        grid: Grid,
        key: PRNGKeyArray | None,
        group: int | None,
        rounding: Stochastic | Nearest,
        rotation: Hadamard | None,
    ) -> Choice:
        """The choice that arguments make; errors as `compress`."""
        if not isinstance(grid, Grid):
            raise ValueError(f"compress rounds to a grid such as jq.grids.Uniform(4), got {grid!r}")
        if group is None:
            group = getattr(grid, "group", None) or GROUP
        require.integer("compress: group", group, 1)
        require.made_by("compress: rounding", rounding, Stochastic, Nearest)
        if rotation is not None:
            require.made_by("compress: rotation", rotation, Hadamard)
        if rounding.needs:
            if key is None:
                raise ValueError("compress rounds at random: pass key=jax.random.key(seed)")
            require.key("compress: key", key)
            check_encloses(grid)
        return Choice(grid, Groups("in", group), rounding, rotation)


def compress(
    tree: PyTree,
    grid: Grid,
    key: PRNGKeyArray | None,
    *,
    group: int | None = None,
    rounding: Stochastic | Nearest = Stochastic(),
    rotation: Hadamard | None = None,
) -> Packet:
    """A packet of a tree: floating leaves on a grid, in groups of entries, others as they are.

    Unbiased: over keys, the mean of `decompress` is the tree, to the precision of float32, in which
    all is computed. Scales are stretched until the grid encloses each group. May be called under
    `jit` and `vmap`; there nothing can be refused, and a group that holds NaN decodes to NaN.

    Args:
        tree: any pytree of arrays and numbers, of any floating dtype and shape.
        grid: of one group. `Uniform(4, symmetric=True, convention="S3")` has 15 levels, zero among
            them; with 2 bits its levels are -1, 0 and 1 times the largest.
        key: randomness; a new one for every round and client
            (`jax.random.fold_in(jax.random.fold_in(key, round), client)`). None with `Nearest()`.
        group: entries that share a scale, in the order of the flattened leaf. None (default): as
            the grid has it, or 128 (heuristic).
        rounding: `Stochastic()` (default), or `Nearest()`, which is biased: for `with_feedback`.
        rotation: `Hadamard(block)` takes off a rotation first: blocks of the largest order up to
            `block` that divides a leaf's size (a size that none divides is left as it is), signs by
            its seed. None (default): none.

    Raises:
        FormatError: stochastic rounding on a grid that clips would be biased.
        TreeError: a leaf is no array or number, a random key, or quantized already.
        WeightError: a floating leaf holds NaN or infinite values, or numbers beyond float32.
        ValueError: an argument is out of its set, or there is no key.

    Example:
        >>> import jquant as jq
        >>> grid = jq.grids.Uniform(4, symmetric=True, convention="S3")
        >>> update = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "step": jnp.int32(7)}
        >>> packet = jq.compress(update, grid, jax.random.key(0))
        >>> packet.tree["w"].codes.dtype.name, packet.tree["w"].shape
        ('int4', (2, 3))
        >>> back = jq.decompress(packet)
        >>> bool(jnp.abs(back["w"] - update["w"]).max() < 1 / 7), int(back["step"])
        (True, 7)
    """
    choice = Choice.of(grid, key, group, rounding, rotation)
    leaves = floating_leaves(tree)
    dtypes = {path: leaf.dtype for path, leaf in leaves.items()}
    return packed(tree, singles(leaves, choice, key), dtypes, choice, key)


def decompress(packet: Packet, *, dtype: Any = None) -> PyTree:
    """The tree that a packet stands for.

    Args:
        packet: what `compress` or `from_bytes` returned.
        dtype: of floating leaves. None (default): each its own. A sum over packets is best taken in
            float32, since rounding to fewer bits afterwards is to nearest, and not without bias.

    Raises:
        ValueError: it is no packet, or the dtype is not floating.

    Example:
        >>> import jquant as jq
        >>> update = {"b": jnp.ones(3, jnp.bfloat16)}
        >>> packet = jq.compress(update, jq.grids.NF4(), jax.random.key(0))
        >>> jq.decompress(packet)["b"].dtype.name
        'bfloat16'
        >>> jq.decompress(packet, dtype="float32")["b"].tolist()
        [1.0, 1.0, 1.0]
    """
    require.made_by("decompress: packet", packet, Packet)
    if dtype is None:
        return dequantize(packet.tree)
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(f"decompress: dtype must be floating, got {dtype!r}")
    leaves = by_path(packet.tree, "packet.tree")
    wide = {p: replace(q, dtype=jnp.dtype(dtype)) for p, q in leaves.items() if is_qtensor(q)}
    return dequantize(replaced(packet.tree, wide))


def floating_leaves(tree: PyTree) -> dict[str, Any]:
    """The floating arrays of a tree by path; refuses leaves that no packet holds."""
    floating = {}
    for path, leaf in by_path(tree, "tree").items():
        if is_qtensor(leaf):
            raise TreeError(
                f"tree, at {path!r}, is quantized already; pass jq.dequantize(tree), or send its "
                "codes by jq.save"
            )
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TreeError(
                f"tree, at {path!r}, is only described by a ShapeDtypeStruct; pass arrays, or call "
                "jax.eval_shape on a function that compresses"
            )
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TreeError(f"tree, at {path!r}, is a random key; leave it out of what is sent")
        if leaf.size and jnp.issubdtype(leaf.dtype, jnp.floating):
            floating[path] = (
                jnp.asarray(read(leaf)) if isinstance(leaf, Lazy) else jnp.asarray(leaf)
            )
    return floating


def singles(
    leaves: Mapping[str, Array], choice: Choice, key: PRNGKeyArray | None
) -> dict[str, Float[Array, ...]]:
    """The leaves in float32; float64 ones are rounded to it as the choice rounds."""
    cast = {}
    for path, leaf in leaves.items():
        if leaf.dtype == jnp.float64 and choice.rounding.needs:
            own = jax.random.fold_in(key_of(key, path), 1)  # type: ignore[arg-type]
            beyond = jnp.abs(leaf) > float(jnp.finfo(jnp.float32).max)
            single = stochastic_round(own, leaf, jnp.float32)
            cast[path] = jnp.where(beyond, jnp.float32(jnp.inf), single)
        else:
            cast[path] = leaf.astype(jnp.float32)
    return cast


class _Rounded(NamedTuple):
    weight: QTensor
    enclosed: Bool[Array, ""]


def packed(
    tree: PyTree,
    leaves: Mapping[str, Float[Array, ...]],
    dtypes: Mapping[str, Any],
    choice: Choice,
    key: PRNGKeyArray | None,
) -> Packet:
    """The packet of a tree whose floating leaves are given in float32; they are checked here."""
    _check(
        {path: is_finite(leaf) for path, leaf in leaves.items()},
        "holds NaN or infinite values, or numbers beyond float32",
        "skip this update, or repair it: jnp.nan_to_num",
    )
    random = bool(choice.rounding.needs)
    rounded = {
        path: _leaf(leaf, choice, key_of(key, path) if random else None, dtypes[path])  # type: ignore[arg-type]
        for path, leaf in leaves.items()
    }
    if random:
        _check(
            {path: one.enclosed for path, one in rounded.items()},
            f"holds numbers that no scale of {choice.grid} reaches",
            "pass a grid whose scales reach farther, such as scale_dtype='float32'",
        )
    weights = {path: one.weight for path, one in rounded.items()}
    mark = fingerprint(key) if random else jnp.zeros(2, jnp.uint32)  # type: ignore[arg-type]
    others = {p: read(x) if isinstance(x, Lazy) else x for p, x in by_path(tree).items()}
    return Packet(replaced(tree, {**others, **weights}), mark)


def _check(flags: Mapping[str, Array], what: str, advice: str) -> None:
    """Refuse a tree of which a leaf's flag is not set; those that are being traced pass."""
    here = {p: flag for p, flag in flags.items() if not isinstance(flag, Tracer)}
    bad = [path for path, flag in jax.device_get(here).items() if not flag]
    if bad:
        raise WeightError(
            f"tree, at {bad[0]!r}, {what} ({len(bad)} of {len(flags)} floating leaves); {advice}"
        )


def _leaf(
    leaf: Float[Array, ...], choice: Choice, key: PRNGKeyArray | None, dtype: Any
) -> _Rounded:
    layout = Layout.of(leaf.shape, in_axes=range(leaf.ndim))
    row, parts = layout.canonical(leaf), ()
    order = _order(leaf.size, choice.rotation)
    if order is not None:
        part = Rotated(order, choice.rotation.seed)  # type: ignore[union-attr]
        row, parts = part.rows(row), (part,)
    fitted = Enclosing(choice.grid) if choice.rounding.needs else choice.grid
    rounded = choice.rounding(row, fitted, choice.groups, key=key)
    weight = QTensor(
        rounded.codes, rounded.params, choice.grid, choice.groups, layout, jnp.dtype(dtype),
        transforms=parts,
    )  # fmt: skip
    return _Rounded(weight, is_enclosed(choice.grid, choice.groups, rounded.params, row))


def _order(size: int, rotation: Hadamard | None) -> int | None:
    """The largest Hadamard order that divides a size and is no larger than the block."""
    if rotation is None:
        return None
    most = min(size, rotation.block or size)
    small = [k for k in range(1, math.isqrt(size) + 1) if size % k == 0]
    divisors = sorted({*small, *(size // k for k in small)}, reverse=True)
    return next((n for n in divisors if 2 <= n <= most and has_hadamard(n)), None)


def fingerprint(key: PRNGKeyArray) -> UInt32[Array, "2"]:
    """Two words that tell keys apart and from which no key can be told."""
    own = jax.random.fold_in(key, zlib.crc32(b"fingerprint of a packet"))
    return jax.random.bits(own, (2,), jnp.uint32)


def values_of(packet: Packet) -> dict[str, Float[Array, ...]]:
    """The floating leaves that a packet stands for, float32."""
    leaves = by_path(packet.tree, "packet.tree")
    return {
        path: q.layout.original(canonical_weight(q)) for path, q in leaves.items() if is_qtensor(q)
    }
