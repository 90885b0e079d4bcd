"""From rules to two trees: what stays as it is, and the arrays that are trained.

Rules are ordered, as those of a plan: regular expressions matched against whole paths. The first
one that matches a leaf, and holds adapters for such a leaf, decides; leaves that none decides stay
as they are. A rule that decides nothing is an error, which says why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jquant.adapters.kinds import Adapter, LoRA, Trained
from jquant.axes.layout import Layout
from jquant.calibration.find import Weight
from jquant.errors import PlanError, TreeError, near
from jquant.numerics import require
from jquant.schemes.scheme import Keep
from jquant.trees.paths import key_of
from jquant.weights.arguments import by_path, replaced
from jquant.weights.qtensor import QTensor

Adapters = tuple[Adapter, ...]
Trainable = dict[str, Trained]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Frozen:
    """What stays as it is, and how trained arrays go beside it: the first result of `adapt`.

    A pytree of the arrays in `params`, so it goes through `jit` as an argument.

    Attributes:
        params: the tree that was given; of a weight whose own low-rank term is trained, without it.
        choices: path and adapters of each leaf that is trained.
        shapes: path, name and shape of each trained array.
        layouts: path and layout of leaves that are not quantized and get a low-rank term.
    """

    params: PyTree
    choices: tuple[tuple[str, Adapters], ...] = field(metadata={"static": True})
    shapes: tuple[tuple[str, str, tuple[int, ...]], ...] = field(metadata={"static": True})
    layouts: tuple[tuple[str, Layout], ...] = field(default=(), metadata={"static": True})


def adapt(
    qparams: PyTree,
    rules: Mapping[str, Adapter | Sequence[Adapter] | Keep] | None = None,
    *,
    rank: int | None = 8,
    key: PRNGKeyArray | None = None,
    weights: Mapping[str, Weight] | None = None,
) -> tuple[Frozen, dict[str, dict[str, Array]]]:
    """A tree taken apart into what stays as it is and what is trained beside it.

    `jq.apply(fn)(jq.merge(frozen, trainable), x)` is the function; before the first step it is the
    function of `qparams`. Gradients with respect to `trainable` reach nothing else.

    Args:
        qparams: parameters, quantized weights among them.
        rules: ordered mapping from regular expressions (matched against the whole path) to an
            adapter (`LoRA`, `adapters.Scales`, `adapters.Whole`), a sequence of them for the same
            leaf, or `jq.keep`. A leaf goes by the first rule that matches it and has adapters for
            such a leaf. None: `LoRA(rank)` beside every quantized weight.
        rank: of the low-rank terms where there are no rules.
        key: randomness, required by `LoRA(rank)`; each leaf's key is derived from its path.
        weights: what `find_weights` returned: how weights lie that are not quantized. Needed for
            low-rank terms beside such, which are added to the weight: that costs an array of its
            size.

    Returns:
        `(frozen, trainable)`: a `Frozen`, and path → name → float32 array, which optimizers take as
        it is. Arrays lie on the devices of their weight.

    Raises:
        TreeError: `qparams` holds what is no array or number, or two leaves have one path.
        PlanError: a rule decides nothing, is no valid expression, or its value is no adapter; a
            rank is above a side of a weight; a key is missing; nothing is quantized, or nothing
            would be trained.
        ValueError: an argument is of another kind.

    Example:
        >>> import jax.numpy as jnp, jquant as jq
        >>> fn = lambda p, x: x @ p["w"] + p["b"]
        >>> params = {"w": jnp.linspace(-1.0, 1.0, 32).reshape(8, 4), "b": jnp.zeros(4)}
        >>> x = jnp.ones((2, 8))
        >>> plan = jq.plan(jq.find_weights(fn, params, x), {".*": jq.presets.int4_nearest()})
        >>> qparams, _ = jq.quantize(fn, params, plan)
        >>> frozen, trainable = adapt(qparams, rank=2, key=jax.random.key(0))
        >>> jax.tree.map(jnp.shape, trainable)
        {'w': {'left': (4, 2), 'right': (2, 8)}}
        >>> loss = lambda t: jnp.sum(jq.apply(fn)(jq.merge(frozen, t), x) ** 2)
        >>> jax.grad(loss)(trainable)["w"]["left"].shape
        (4, 2)
    """
    _check_arguments(qparams, rules, key, weights)
    leaves = by_path(qparams, "qparams")
    layouts = {path: weight.layout for path, weight in (weights or {}).items()}
    _check_weights(weights or {}, leaves)
    taken = _every(leaves, rank) if rules is None else _decided(leaves, layouts, rules)
    kept: dict[str, Any] = {}
    trainable: Trainable = {}
    for path, adapters in taken.items():
        own = None if key is None else key_of(key, path)
        kept[path], trainable[path] = _begun(path, leaves[path], adapters, layouts.get(path), own)
    shapes = tuple((p, n, a.shape) for p, arrays in trainable.items() for n, a in arrays.items())
    plain = tuple(
        (path, layouts[path])
        for path in taken
        if path in layouts and not isinstance(leaves[path], QTensor)
    )
    return Frozen(replaced(qparams, kept), tuple(taken.items()), shapes, plain), trainable


def _check_arguments(qparams: Any, rules: Any, key: Any, weights: Any) -> None:
    """Refuse arguments of another kind."""
    if isinstance(qparams, Frozen):
        raise TreeError(
            "qparams is adapted already; pass jq.merge(frozen, trainable), whose terms then stay "
            "as they are beside new ones"
        )
    for name, value, kind in (
        ("rules", rules, "path expression → adapter, such as {'layers/.*': jq.LoRA(8)}"),
        ("weights", weights, "what jq.find_weights(fn, params, x) returned"),
    ):
        if value is not None and not isinstance(value, Mapping):
            raise PlanError(f"adapt: {name} must be {kind}, got {value!r:.100}")
    for path, weight in (weights or {}).items():
        if not isinstance(weight, Weight):
            raise PlanError(
                f"adapt: weights must be what jq.find_weights(fn, params, x) returned, got "
                f"{weight!r:.100} for {path!r}"
            )
    if key is not None:
        require.key("adapt: key", key)


def _begun(
    path: str, leaf: Any, adapters: Adapters, layout: Layout | None, key: PRNGKeyArray | None
) -> tuple[Any, Trained]:
    """What of a leaf stays, and what all its adapters train."""
    trained: Trained = {}
    for adapter in adapters:
        leaf, more = adapter.begin(path, leaf, layout, key)
        trained |= more
    return leaf, trained


def _every(leaves: Mapping[str, Any], rank: int | None) -> dict[str, Adapters]:
    """A low-rank term beside every quantized weight."""
    taken: dict[str, Adapters] = {
        path: (LoRA(rank),) for path, leaf in leaves.items() if isinstance(leaf, QTensor)
    }
    if not taken:
        raise PlanError(
            "no weight of qparams is quantized; pass what jq.quantize returned, or rules and "
            "weights=jq.find_weights(fn, params, x)"
        )
    return taken


def _check_weights(weights: Mapping[str, Weight], leaves: Mapping[str, Any]) -> None:
    for path, weight in weights.items():
        leaf = leaves.get(path)
        if leaf is not None and tuple(leaf.shape) != tuple(weight.shape):
            raise PlanError(
                f"weights= has {path!r} of shape {weight.shape}, qparams of {leaf.shape}; pass "
                "find_weights of these parameters"
            )


def _decided(
    leaves: Mapping[str, Any], layouts: Mapping[str, Layout], rules: Mapping[str, Any]
) -> dict[str, Adapters]:
    """Path → adapters, of all leaves that have some, in the order of the tree."""
    read = [(p, _expression(p), _adapters(p, value)) for p, value in rules.items()]
    taken: dict[str, Adapters] = {}
    idle = {pattern for pattern, _, _ in read}
    for path, leaf in leaves.items():
        for pattern, expression, adapters in read:
            if not expression.fullmatch(path):
                continue
            if any(one.refusal(leaf, layouts.get(path)) for one in adapters):
                continue
            idle.discard(pattern)
            if adapters:
                taken[path] = adapters
            break
    for pattern, expression, adapters in read:
        if pattern in idle:
            raise PlanError(_idle(expression, adapters, leaves, layouts))
    if not taken:
        raise PlanError(
            f"rules {dict(rules)!r:.100} train nothing; give some leaves an adapter, such as "
            "{'.*': jq.LoRA(8)}"
        )
    return taken


def _expression(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise PlanError(f"rule {pattern!r} is not a regular expression: {error}") from error


def _adapters(pattern: str, value: Any) -> Adapters:
    """The adapters of a rule; none where its leaves are kept."""
    if isinstance(value, Keep):
        return ()
    several = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not several or any(isinstance(v, type) or not isinstance(v, Adapter) for v in several):
        raise PlanError(
            f"rule {pattern!r}: expected a jq.LoRA, another adapter of jq.adapters, a list of such "
            f"or jq.keep, got {value!r}"
        )
    kinds = [type(one) for one in several]
    if len(set(kinds)) < len(kinds):
        raise PlanError(f"rule {pattern!r}: {value!r} holds two adapters of a kind; pass one")
    return several


def _idle(
    expression: re.Pattern[str],
    adapters: Adapters,
    leaves: Mapping[str, Any],
    layouts: Mapping[str, Layout],
) -> str:
    """Why a rule decides nothing."""
    pattern = expression.pattern
    matched = list(filter(expression.fullmatch, leaves))
    if not matched:
        return (
            f"rule {pattern!r} matches no leaf (it must match the whole path); near paths: "
            f"{near(pattern, leaves)}"
        )
    for path in matched:
        for one in adapters:
            refusal = one.refusal(leaves[path], layouts.get(path))
            if refusal is not None:
                return f"rule {pattern!r} matches {path!r}, which {refusal}"
    return (
        f"rule {pattern!r} decides nothing: earlier rules already match all of {matched[:3]}; put "
        "it before them or drop it"
    )
