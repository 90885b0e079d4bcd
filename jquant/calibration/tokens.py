"""How much each token counts: padding left out of calibration, or tokens weighed.

Token weights are given beside the batches, as a function of a batch's inputs or one array for each.
They are checked on the host and normalised: bool where all are 0 or 1, which leaves the arithmetic
of the other tokens as it is, else float32. Where the tokens go in the function is followed
(`follow.py`), and every row of a weight's input gets the weight of its token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jquant.axes.rows import Arrangement
from jquant.calibration.follow import Follower, Places, Site
from jquant.calibration.place import Place
from jquant.errors import EvidenceError
from jquant.programs.straight import Step
from jquant.weights.arguments import inputs_of

Weighing = Callable[..., Any] | Iterable[Any]  # of a batch's inputs, or one array for each batch
_END = object()


@dataclass(frozen=True)
class TokenWeights:
    """What each token counts in calibration, and what to do where it is not known.

    A row that is made of several tokens by adding them up (a pooled vector) has the largest weight
    of these, a pair of tokens the smaller one.

    Args:
        of: a function `(*inputs) -> array`, called on every batch, or an iterable of one array for
            each batch. Arrays are bool, integer or float, not negative and finite, of the leading
            axes of one of the inputs: `[batch, time]` beside tokens `[batch, time]`.
        unmatched: what to do where a weight's input has rows whose tokens are not known: behind
            whatever moves tokens by what is in them (experts with capacity, a gather, a sort), and
            in a loop over time. "raise" (default), or "count" all these rows, which the report
            then says of the weight.

    Raises:
        EvidenceError: `unmatched` is neither, or `of` is neither a function nor an iterable.

    Example:
        >>> fn = lambda p, x, mask: x @ p["w"]
        >>> x, mask = jnp.ones((2, 3, 4)), jnp.array([[1, 1, 0], [1, 0, 0]])
        >>> from jquant.calibration import capture
        >>> of = TokenWeights(lambda x, mask: mask, unmatched="count")
        >>> float(capture(fn, {"w": jnp.ones((4, 2))}, [(x, mask)], token_weights=of)["w"].count)
        3.0
    """

    of: Weighing
    unmatched: Literal["raise", "count"] = "raise"

    def __post_init__(self) -> None:
        if self.unmatched not in ("raise", "count"):
            raise EvidenceError(
                f"TokenWeights.unmatched must be 'raise' or 'count', got {self.unmatched!r}"
            )
        if not callable(self.of) and not isinstance(self.of, Iterable):
            raise EvidenceError(
                "token_weights must be a function (*inputs) -> array or one array for each batch, "
                f"got {type(self.of).__name__}"
            )


Given = TokenWeights | Callable[..., Any] | Iterable[Any] | None  # what `token_weights=` takes


def chosen(given: Given) -> TokenWeights | None:
    """The same as `TokenWeights`."""
    return given if given is None or isinstance(given, TokenWeights) else TokenWeights(given)


Weights = Bool[np.ndarray, "*tokens"] | Float[np.ndarray, "*tokens"]


def weighed(
    batches: Iterable[Any], given: Given
) -> Iterator[tuple[tuple[Any, ...], Weights | None]]:
    """Every batch as a tuple of inputs, with the weights of its tokens.

    Raises:
        EvidenceError: weights that are no weights, or not as many of them as batches; names the
            batch.
    """
    weights = chosen(given)
    of = None if weights is None else weights.of
    arrays = itertools.repeat(None) if of is None or callable(of) else iter(of)
    for number, batch in enumerate(batches):
        inputs = inputs_of(batch, number)
        if of is None:
            yield inputs, None
            continue
        array = of(*inputs) if callable(of) else next(arrays, _END)
        if array is _END:
            raise EvidenceError(f"token_weights has {number} arrays, and there are more batches")
        yield inputs, _checked(array, inputs, number)
    if of is not None and not callable(of) and next(arrays, _END) is not _END:
        raise EvidenceError("token_weights has more arrays than there are batches")


def check_any(arrays: Sequence[Weights]) -> None:
    """Refuse weights that leave nothing."""
    if arrays and not any(bool(w.any()) for w in arrays):
        raise EvidenceError(
            f"token_weights are 0 for all tokens of all {len(arrays)} batches; real tokens have a "
            "weight above 0"
        )


def _checked(given: Any, inputs: tuple[Any, ...], number: int) -> Weights:
    try:
        array = np.asarray(jax.device_get(given))
    except Exception as error:  # ragged lists, strings, objects
        raise EvidenceError(f"batch {number}: token_weights are no array: {error}") from error
    where = f"batch {number}: token_weights {array.dtype}{list(array.shape)}"
    real = jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.kind in "iub"
    if not real or array.ndim < 1:
        raise EvidenceError(f"{where} must be a bool, integer or float array with a token axis")
    shapes = [np.shape(x) for x in jax.tree.leaves(inputs)]
    if not any(shape[: array.ndim] == array.shape for shape in shapes):
        raise EvidenceError(
            f"{where} must have the leading axes of one of the inputs, [batch, time] beside tokens "
            f"[batch, time]; the inputs are {', '.join(str(list(shape)) for shape in shapes)}"
        )
    wide = weights_of(array, where)
    return wide.astype(np.bool_) if bool(((wide == 0) | (wide == 1)).all()) else wide


def input_places(inputs: Any, tokens: Sequence[int]) -> Places:
    """The places of the inputs' arrays, beside token weights of shape `tokens`."""
    leaves = jax.tree.leaves(inputs)
    return tuple(Place.of(np.shape(x), tokens, f"input {k}") for k, x in enumerate(leaves))


def follow_steps(
    follower: Follower, steps: Sequence[Step], places: dict[int, Place]
) -> dict[int, Place]:
    """Follow a flat program's steps; `places` holds their sources', then their results' too."""
    for at, step in enumerate(steps):
        ins = [places[a] if isinstance(a, int) else Place.blank(np.shape(a.val)) for a in step.ins]
        places.update(zip(step.outs, follower.step(step.eqn, ins, (at,)), strict=True))
    return places


@dataclass
class Tokens:
    """The weights of the tokens that flow through a program, and where they are in it.

    Attributes:
        weights: bool or float32.
        table: see `Follower`.
        unmatched: weights of the network that were used on rows whose tokens are not known → why.
    """

    weights: Array
    table: dict[Site, tuple[Places, Places]]
    unmatched: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(weights: Array, follow: Callable[[Follower], Any]) -> Tokens:
        follower = Follower()
        follow(follower)
        return Tokens(weights, follower.table)

    def rows(
        self, site: Site, number: int | None, path: str, shape: Sequence[int], way: Arrangement
    ) -> Array:
        """The weights of the rows that an operand of an equation is arranged to, `[*batch, rows]`.

        Args:
            number: which operand; None: the rows are made of one and of parameters.
            shape: of the array that is arranged.
        """
        if number is None:
            place = Place.blank(shape, "a product with parameters")
        else:
            place = self._at(site, 0, number, shape)
        if way.cuts:
            place = place.reshape(shape)
        for axis, start, stop in way.cuts:
            place = place.window(axis, start, stop - start, "slice")
        sizes, turn, kept = way.outline
        weights = self._rows(place, path, sizes, turn, kept)
        return weights.reshape(*weights.shape[: way.batch], way.tokens)

    def result(self, site: Site, path: str, like: Any, feature: int) -> Array:
        """The weights of all rows of an equation's result, whose features are along one axis."""
        shape = like.shape
        turn = [*(k for k in range(len(shape)) if k != feature), feature]
        place = self._at(site, 1, 0, shape)
        return self._rows(place, path, shape, turn, len(shape) - 1).reshape(-1)

    def _at(self, site: Site, side: int, number: int, shape: Sequence[int]) -> Place:
        places = self.table.get(site)
        if places is None:
            return Place.blank(shape, "an operation that jquant does not follow tokens into")
        return places[side][number]

    def _rows(
        self, place: Place, path: str, sizes: Sequence[int], turn: Sequence[int], kept: int
    ) -> Array:
        weights, why = place.weights(self.weights, sizes, turn, kept)
        if why:
            words = why if " " in why else f"lost in {why!r}"
            self.unmatched.setdefault(path, f"input [{', '.join(map(str, sizes))}] ({words})")
        return weights


def refuse(unmatched: Sequence[tuple[str, str]]) -> None:
    """Raise for weights that are used on rows whose tokens are not known.

    Raises:
        EvidenceError: names path, shape and what lost the tokens.
    """
    if not unmatched:
        return
    path, why = unmatched[0]
    more = f" (and {len(unmatched) - 1} more)" if len(unmatched) > 1 else ""
    raise EvidenceError(
        f"weight {path!r}{more}: the tokens of its {why} are not known, so its rows cannot be "
        "weighed by token_weights; pass jq.TokenWeights(..., unmatched='count') to count all rows "
        "there, or evidence={path: Evidence(...)} for it"
    )


def weights_of(array: np.ndarray, where: str) -> np.ndarray:
    """The numbers as float32 weights.

    Raises:
        EvidenceError: one is NaN, infinite or below zero; the message begins with `where`.
    """
    wide = array.astype(np.float32)
    bad = ~np.isfinite(wide) | (wide < 0)
    if bad.any():
        at = tuple(int(k) for k in np.argwhere(bad)[0])
        raise EvidenceError(f"{where} hold {array[at]} at {at}; pass finite weights, 0 or more")
    return wide
