"""Evidence added up over batches, and what was wrong with the inputs of each.

Sums stay on the device; what is wrong with a batch is a small array of codes, looked at once all
batches are added, so nothing returns to the host in between.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from jquant.axes.agreement import counted
from jquant.axes.roles import Axes, Reading
from jquant.calibration.assemble import assemble
from jquant.calibration.evidence import Evidence
from jquant.calibration.find import Sightings
from jquant.calibration.saliency import Misfit
from jquant.errors import EvidenceError


class Tally:
    """Sums over batches, and what is wrong with the inputs of each batch (`_FLAWS`).

    Attributes:
        total: the sums; weights go by their place in `names` there.
        names: the weights that the batches show.
    """

    def __init__(self) -> None:
        self.total: Sightings | None = None
        self.names: tuple[Hashable, ...] = ()
        self.flaws: list[UInt8[Array, " values"]] = []

    def add(self, names: Sequence[Hashable], run: Callable[..., Any], *operands: Any) -> None:
        """Add a batch: `run(total, *operands)` gives what `accumulate` does.

        Raises:
            EvidenceError: the batch shows other uses than the ones before.
        """
        try:
            if self.total is None:
                self.names = tuple(names)
                shapes = jax.eval_shape(run, None, *operands)[0]
                self.total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            if tuple(names) != self.names:
                raise UsesDiffer
            self.total, flaws = run(self.total, *operands)
        except Misfit as error:
            raise error.of(str(self.names[int(error.name)]), len(self.flaws)) from error
        except UsesDiffer as error:
            raise EvidenceError(
                f"batch {len(self.flaws)} takes another path through the function than batch 0: "
                "its weights are used differently; pass batches that take the same path, or "
                "capture them apart and merge"
            ) from error
        self.flaws.append(flaws)

    def wait(self) -> None:
        """Until the last batch is done, where it would otherwise be queued only."""
        jax.block_until_ready(self.flaws[-1])

    def evidence(self, axes: Mapping[Any, Axes], where: str = "") -> dict[Any, Evidence]:
        """The evidence of whole weights by name; `where` serves the error's message.

        `axes`: of each of them, as `settled` has them.

        Raises:
            EvidenceError: an input was not finite, or too large for its moment; names weight, batch
                and `where`.
        """
        if self.total is None:
            return {}
        table = np.asarray(jnp.stack(self.flaws))  # [batches, values]
        for place, _, position in self.total.keys:
            column = table[:, position]
            if column.any():
                batch = int(np.argmax(column > 0))
                flaw, remedy = _FLAWS[int(column[batch])]
                raise EvidenceError(
                    f"the input of weight {str(self.names[int(place)])!r} is {flaw}, first in "
                    f"batch {batch}{where}; {remedy}"
                )
        own = {str(k): axes[name] for k, name in enumerate(self.names)}
        return {self.names[int(place)]: one for place, one in _file(self.total, own).items()}


# What may be wrong with an input, and what to do about it.
_FLAWS = {
    1: (
        "finite, but so large that its second moment is beyond float32",
        "scale the function's inputs or the weights before it so that sums of squares over tokens "
        "stay below 3e38 (values up to 1e16 always do), or keep the weight (jq.keep)",
    ),
    2: ("NaN or infinite", "check that batch, or run the function in a wider dtype"),
}


class UsesDiffer(Exception):
    """Two batches show different weights or readings."""


def accumulate(
    total: Sightings | None, new: Sightings
) -> tuple[Sightings, UInt8[Array, " values"]]:
    """Both together, and for each value of `new` what is wrong with it: 0 nothing, see `_FLAWS`.

    Raises:
        UsesDiffer: they are not sightings of the same uses.
    """
    single = new.values
    if total is not None:
        if (total.keys, len(total.values)) != (new.keys, len(new.values)):
            raise UsesDiffer
        values = [old.merge(more) for old, more in zip(total.values, new.values, strict=True)]
        new = replace(new, values=values)
    flaws = [_flaw(one, all_) for one, all_ in zip(single, new.values, strict=True)]
    return new, jnp.stack(flaws) if flaws else jnp.zeros(0, jnp.uint8)


def _flaw(batch: Evidence, total: Evidence) -> UInt8[Array, ""]:
    """What is wrong with the inputs of a batch, or with the sums that they are added to."""
    assert batch.abs_max is not None
    # Whatever is too large shows in its own sum of squares.
    sums = [
        leaf
        for each in (total, total.guided)
        if each is not None
        for leaf in (jnp.diagonal(each.second_moment, axis1=-2, axis2=-1), each.drift)
    ]
    fine = [jnp.all(jnp.isfinite(leaf)) for leaf in sums if leaf is not None]
    flaw = jnp.where(jnp.all(jnp.stack(fine)), 0, 1)
    return jnp.where(jnp.all(jnp.isfinite(batch.abs_max)), flaw, 2).astype(jnp.uint8)


def _file(total: Sightings, axes: Mapping[str, Axes]) -> dict[str, Evidence]:
    """The evidence of whole weights, by path; weights with a common input keep sharing arrays."""
    shapes = dict(total.shapes)
    uses: dict[str, list[tuple[Reading, Evidence]]] = {}
    for path, reading, position in total.keys:
        if counted(reading, axes[path], shapes[path]):
            uses.setdefault(path, []).append((reading, total.values[position]))
    return {path: assemble(seen, shapes[path], axes[path]) for path, seen in uses.items()}
