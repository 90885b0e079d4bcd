"""The mean of many packets, and what makes it none: packets that share a key.

Errors of stochastic rounding average out because they are independent. Packets that were rounded
with one key have the same luck at every entry, so their errors add up as those of one packet; a
packet that comes twice counts twice. Both show in equal fingerprints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from jquant.errors import PacketError
from jquant.exchange.packet import Packet, values_of
from jquant.exchange.wire import described
from jquant.numerics import require
from jquant.numerics.narrow import as_dtype
from jquant.weights.arguments import by_path, replaced
from jquant.weights.qtensor import is_qtensor


def average(packets: Sequence[Packet], weights: Sequence[float] | None = None) -> PyTree:
    """The mean of the trees that packets stand for, summed in float32.

    Args:
        packets: of one form.
        weights: how much each counts, such as its client's number of examples; finite, not
            negative. None (default): all alike.

    Returns:
        The tree, floating leaves in their own dtypes; other leaves, which must agree, as they are.

    Raises:
        PacketError: packets are of different forms, were rounded with one key (not told under
            `jit`), or disagree where they are not floating.
        ValueError: there are no packets, what is no packet, or weights that do not fit.

    Example:
        >>> import jquant as jq
        >>> grid = jq.grids.Uniform(3, symmetric=True, convention="S3")
        >>> keys, update = jax.random.split(jax.random.key(0), 50), {"w": jnp.array([1.0, 0.3])}
        >>> mean = average([jq.compress(update, grid, key) for key in keys])
        >>> [round(float(x), 1) for x in mean["w"]]
        [1.0, 0.3]
        >>> average([jq.compress(update, grid, keys[0])] * 2)
        Traceback (most recent call last):
        jquant.errors.PacketError: packets 0 and 1 were rounded with one key...
    """
    if isinstance(packets, Packet):
        raise ValueError(
            "average takes a list of packets, got one; its tree is jq.decompress(packet)"
        )
    packets = list(packets)
    for number, packet in enumerate(packets):
        require.made_by(f"average: packet {number}", packet, Packet)
    shares = _shares(len(packets), weights)
    first = packets[0]
    _check_forms(packets)
    _check_keys(packets)
    _check_others(packets)
    total = {path: shares[0] * value for path, value in values_of(first).items()}
    for share, packet in zip(shares[1:], packets[1:], strict=True):
        for path, value in values_of(packet).items():
            total[path] += share * value
    leaves = by_path(first.tree)
    return replaced(first.tree, {p: as_dtype(x, leaves[p].dtype) for p, x in total.items()})


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """The weights, divided by their sum."""
    if not count:
        raise ValueError("average takes one packet or more, got none")
    if weights is None:
        return [1.0 / count] * count
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        numbers = []
    usable = all(math.isfinite(n) and n >= 0 for n in numbers) and sum(numbers) > 0
    if len(numbers) != count or not usable:
        raise ValueError(
            f"average: weights must be {count} finite numbers from 0 on, one for each packet, and "
            f"not all 0; got {weights!r:.200}"
        )
    return [n / sum(numbers) for n in numbers]


def _check_forms(packets: Sequence[Packet]) -> None:
    first = described(packets[0])
    for number, packet in enumerate(packets[1:], 1):
        other = described(packet)
        if other != first:
            paths = [p for p in {**first, **other} if first.get(p) != other.get(p)]
            one, two = (form.get(paths[0], "nothing") for form in (first, other))
            raise PacketError(
                f"packet {number} is of another form than packet 0, at {paths[0]!r}: {two}, where "
                f"packet 0 has {one}; compress equal trees with equal grid, group and rotation"
            )


def _check_keys(packets: Sequence[Packet]) -> None:
    marks = [packet.fingerprint for packet in packets]
    if any(isinstance(mark, Tracer) for mark in marks):
        return
    numbers: dict[bytes, int] = {}
    for number, mark in enumerate(map(np.asarray, jax.device_get(marks))):
        if mark.any() and (other := numbers.setdefault(mark.tobytes(), number)) != number:
            raise PacketError(
                f"packets {other} and {number} were rounded with one key, so that their errors do "
                "not average out, or are one packet that came twice; give every client and round a "
                "key of its own: jax.random.fold_in(jax.random.fold_in(key, round), client)"
            )


def _check_others(packets: Sequence[Packet]) -> None:
    """Refuse leaves that are carried as they are, and differ."""
    first = by_path(packets[0].tree)
    for number, packet in enumerate(packets[1:], 1):
        for path, leaf in by_path(packet.tree).items():
            if is_qtensor(leaf) or isinstance(leaf, Tracer):
                continue
            if not bool(jnp.array_equal(leaf, first[path])):
                raise PacketError(
                    f"packets 0 and {number} differ at {path!r}, which is not floating and has no "
                    "mean; leave it out of what is sent, or send it as floats"
                )
