"""Which schemes a weight may get: the offers among which `allocate` chooses, and their sizes.

`candidates` makes of a plan, per weight, a tuple of schemes from the smallest to the largest: the
plan's own scheme at several widths, or any schemes at all (grids, group sizes, axes, ranks). A
weight with a single candidate is fixed: it takes its bytes, and nothing is measured of it. Sizes
are bytes as a checkpoint stores them, exact, and nothing is run to know them. All of this is
static.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from jquant.calibration.find import Weight
from jquant.errors import PlanError, near
from jquant.layerwise.weight import stored_bytes
from jquant.rounding.elementwise import Nearest
from jquant.schemes.scheme import Plan, Scheme

Options = Sequence[int] | Sequence[Scheme] | Callable[[Scheme], Sequence[Scheme]]

WIDTHS = range(2, 9)


@dataclass(frozen=True)
class Candidates(Mapping[str, tuple[Scheme, ...]]):
    """Path → the schemes a weight may get, smallest first; paths in the order of the network.

    Attributes:
        schemes: the mapping.
        weights: what is known of the weights, also of those that are kept.
    """

    schemes: Mapping[str, tuple[Scheme, ...]]
    weights: Mapping[str, Weight]

    def __getitem__(self, path: str) -> tuple[Scheme, ...]:
        return self.schemes[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.schemes)

    def __len__(self) -> int:
        return len(self.schemes)

    @property
    def free(self) -> tuple[str, ...]:
        """The weights that have a choice."""
        return tuple(path for path, schemes in self.items() if len(schemes) > 1)

    def size(self, path: str) -> int:
        """How many numbers a weight has."""
        return size_of(self.weights[path])

    def bytes(self, path: str) -> tuple[int, ...]:
        """Stored bytes of a weight under each of its candidates."""
        return tuple(bytes_of(self.weights[path], scheme) for scheme in self[path])

    def plan(self, positions: Mapping[str, int]) -> Plan:
        """The plan in which each weight has the candidate at its position (0 if not named)."""
        schemes = {path: schemes[positions.get(path, 0)] for path, schemes in self.items()}
        return Plan(schemes, self.weights)


def candidates(
    plan: Plan, options: Options = WIDTHS, *, paths: Collection[str] | None = None
) -> Candidates:
    """The schemes that `allocate` may choose from, for each weight of a plan.

    Args:
        plan: what `jq.plan` returned. Kept weights stay kept.
        options: widths in bits, each weight's own scheme with a grid of that many bits (default: 2
            to 8, what integer types hold); or schemes, the same for all weights; or a function from
            a weight's planned scheme to the schemes it may get instead.
        paths: the weights that may change; the others are fixed at their scheme. None: all.

    Raises:
        PlanError: nothing to choose for any weight; a grid that has no widths to choose from, or
            not this one; a path that is not in the plan.

    Example:
        >>> import jax.numpy as jnp, jquant as jq
        >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((64, 8))}
        >>> weights = jq.find_weights(fn, params, jnp.ones((2, 64)))
        >>> choice = candidates(jq.plan(weights, {".*": jq.presets.int4_gptq()}), (3, 4))
        >>> choice.bytes("w")  # 512 codes, 8 scales and zero points
        (211, 276)
    """
    if not isinstance(plan, Plan):
        raise PlanError(
            f"expected what jq.plan returns, got {type(plan).__name__}; call jq.plan first"
        )
    for path in paths or ():
        if path not in plan:
            raise PlanError(f"paths names {path!r}, which is not planned; near: {near(path, plan)}")
    schemes: dict[str, tuple[Scheme, ...]] = {}
    for path in sorted(plan, key=depth):
        own, weight = plan[path], plan.weights[path]
        if paths is not None and path not in paths:
            schemes[path] = (own,)
            continue
        offered = options(own) if callable(options) else options
        distinct = dict.fromkeys(_scheme(path, own, option) for option in offered)
        if not distinct:
            raise PlanError(f"weight {path!r} has no candidates; pass widths, or schemes")
        schemes[path] = tuple(sorted(distinct, key=lambda scheme: bytes_of(weight, scheme)))
    by_path = Candidates(schemes, plan.weights)
    if not by_path.free:
        raise PlanError(
            f"no weight of this plan of {len(plan)} has two schemes to choose from; pass several "
            "widths or schemes, and weights that may have them"
        )
    return by_path


def depth(path: str) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts paths as people count: layer 2 comes before layer 10, embeddings first.

    Example:
        >>> sorted(["layers/10/up", "head", "layers/2/up", "embed"], key=depth)
        ['embed', 'head', 'layers/2/up', 'layers/10/up']
    """
    words = re.findall(r"\d+|\D+", path)
    return tuple((0, int(w), "") if w.isdigit() else (1, 0, w) for w in words)


# What keys of older files call by another name.
_FORMERLY = {
    "Blocks(axis=": "Groups(axis=",
    "metric='plain'": "metric='frobenius'",
    "metric='evidence'": "metric='hessian'",
}


def key_of_file(key: str) -> str:
    """The key of a scheme, as `key_of_scheme` has it, by one that a file holds."""
    for old, new in _FORMERLY.items():
        key = key.replace(old, new)
    return key


def key_of_scheme(scheme: Scheme) -> str:
    """What a score depends on: grid, groups and term of a scheme. The rounding is not in it.

    Example:
        >>> from jquant.grids import NF4
        >>> key_of_scheme(Scheme(NF4, 64)).endswith("Groups(axis='in', size=64)")
        True
    """
    key = f"{scheme.grid!r}, {scheme.grouping!r}"
    return key if scheme.compensation is None else f"{key}, {scheme.compensation!r}"


def draft(scheme: Scheme) -> Scheme:
    """The weight's part of a scheme, rounded to nearest without evidence: what scores measure."""
    term = scheme.compensation
    plain = None if term is None else replace(term, metric="frobenius", rounds=1)
    return replace(scheme, rounding=Nearest(), compensation=plain, activations=None)


def size_of(weight: Weight) -> int:
    """How many numbers a weight has."""
    total = 1
    for length in weight.shape:
        total *= length
    return total


def bytes_of(weight: Weight, scheme: Scheme) -> int:
    """Stored bytes of a weight under a scheme."""
    return stored_bytes(weight.shape, scheme, weight.layout)


def _scheme(path: str, own: Scheme, option: object) -> Scheme:
    if isinstance(option, Scheme):
        return option
    if isinstance(option, bool) or not isinstance(option, int):
        raise PlanError(f"a candidate must be a width in bits or a jq.Scheme, got {option!r}")
    if "bits" not in {field.name for field in fields(own.grid) if field.init}:  # type: ignore[arg-type]
        raise PlanError(
            f"weight {path!r}: a {type(own.grid).__name__} grid has no width to choose; pass "
            "schemes as candidates, or plan a grid such as Uniform(4)"
        )
    try:
        return replace(own, grid=replace(own.grid, bits=option))  # type: ignore[type-var]
    except ValueError as error:
        raise PlanError(f"weight {path!r} cannot have {option} bits: {error}") from error
