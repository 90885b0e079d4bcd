"""Drift of tokens that a network sends where its data says: rows are paired by token."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jquant as jq
from jquant.calibration.cutting import Recording
from jquant.calibration.data import Data
from jquant.calibration.routing import routing
from jquant.calibration.stages import cut_at_weights
from jquant.calibration.walk import Walk
from jquant.jobs.estimate import estimate
from jquant.programs.straight import Piece, flatten
from jquant.weights.leaves import Leaves

TOKENS, WIDTH, EXPERTS, SLOTS = 24, 6, 3, 12


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


PARAMS = {
    "mix": normal(1, WIDTH, WIDTH),
    "gate": normal(2, WIDTH, EXPERTS),
    "up": normal(3, EXPERTS, WIDTH, 4),
}
MOVED = PARAMS["mix"] + 0.3 * normal(4, WIDTH, WIDTH)  # far enough for many other choices
X = normal(5, TOKENS, WIDTH)

# How inputs of experts, [experts, slots, width], are made of values `h`, where `p` decides: the
# probability of each expert for each token.


def capacity(p: jax.Array, h: jax.Array) -> jax.Array:
    choice = jax.nn.one_hot(jnp.argmax(p, -1), EXPERTS, dtype=jnp.int32)
    place = jnp.cumsum(choice, 0) * choice - 1
    return jnp.einsum("tec,td->ecd", jax.nn.one_hot(place, SLOTS, dtype=h.dtype), h)


def counted_in_floats(p: jax.Array, h: jax.Array) -> jax.Array:
    choice = (p == p.max(-1, keepdims=True)).astype(jnp.float32)
    place = jnp.cumsum(choice, 0) * choice
    slots = place[..., None] == 1 + jnp.arange(SLOTS, dtype=jnp.float32)
    return jnp.einsum("tec,td->ecd", jnp.where(slots, 1.0, 0.0).astype(h.dtype), h)


def weighed_at_dispatch(p: jax.Array, h: jax.Array) -> jax.Array:
    choice = jax.nn.one_hot(jnp.argmax(p, -1), EXPERTS)
    place = (jnp.cumsum(choice, 0) * choice).astype(jnp.int32) - 1
    half = jax.nn.one_hot(place, SLOTS, dtype=h.dtype) * 0.5
    return jnp.sum(half[..., None] * h[:, None, None], 0)


def masked(p: jax.Array, h: jax.Array) -> jax.Array:
    """Each expert's tokens are mixed by a mask, with no slots to count."""
    mask = (p > 0.4).astype(jnp.float32)
    return jnp.einsum("te,ts,td->esd", mask, jnp.ones((TOKENS, 1), h.dtype), h)


def tokens_of_experts(p: jax.Array, h: jax.Array) -> jax.Array:
    return h[lax.top_k(p.T, SLOTS)[1]]


def largest_with_their_values(p: jax.Array, h: jax.Array) -> jax.Array:
    values, places = lax.top_k(p.T, SLOTS)
    return h[places] * jnp.sign(values)[..., None]


def sorted_by_expert(p: jax.Array, h: jax.Array) -> jax.Array:
    return h[jnp.argsort(p, axis=0)].swapaxes(0, 1)[:, :SLOTS].reshape(EXPERTS, SLOTS, -1)


def carried_along(p: jax.Array, h: jax.Array) -> jax.Array:
    keys = jnp.broadcast_to(p[:, :1], h.shape)
    rows = lax.sort((keys, h), dimension=0, num_keys=1)[1]
    return rows[: EXPERTS * 8].reshape(EXPERTS, 8, -1)


def scattered(p: jax.Array, h: jax.Array) -> jax.Array:
    expert = jnp.argmax(p, -1)
    place = jnp.take_along_axis(jnp.cumsum(jax.nn.one_hot(expert, EXPERTS), 0), expert[:, None], 1)
    empty = jnp.zeros((EXPERTS, SLOTS, h.shape[-1]), h.dtype)
    return empty.at[expert, place[:, 0].astype(jnp.int32) - 1].set(h, mode="drop")


def windows(p: jax.Array, h: jax.Array) -> jax.Array:
    starts = jnp.argmax(p, 0)
    return jax.vmap(lambda at: lax.dynamic_slice_in_dim(h, at, SLOTS))(starts)


def one_window(p: jax.Array, h: jax.Array) -> jax.Array:
    start = jnp.sum(jnp.argmax(p, -1)) % SLOTS
    rows = lax.dynamic_slice_in_dim(h, start, EXPERTS * 4)
    return rows.reshape(EXPERTS, 4, -1)


DISPATCHES = [
    capacity, counted_in_floats, weighed_at_dispatch, masked, tokens_of_experts,
    largest_with_their_values, sorted_by_expert, carried_along, scattered, windows, one_window,
]  # fmt: skip


def network(dispatch: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ params["mix"])
        p = jax.nn.softmax(h @ params["gate"])
        return jnp.einsum("ecd,edf->ecf", dispatch(p, h), params["up"])

    return fn


def read(fn: Any, sequential: Any = "weight") -> Any:
    """The evidence of `up` behind another `mix`, beside the network as it came."""
    recording = Recording({"mix": (), "up": ()}, sequential, drift=True)
    walk = Walk.start(fn, Leaves.of(PARAMS), Data.of([X]), recording)
    values = dict(PARAMS)

    def current(piece: Piece) -> jax.Array:
        return values[piece.path]

    def original(piece: Piece) -> jax.Array:
        return PARAMS[piece.path]

    walk.advance(None, current, original)
    for stage, _ in enumerate(walk.stages):
        found = walk.gather(stage, current, original)
        if Piece("up") in found:
            return found[Piece("up")]
        values["mix"] = MOVED
        walk.advance(stage, current, original)
    raise AssertionError


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_drift_is_of_the_same_tokens(dispatch: Any) -> None:
    full, moved = (jnp.tanh(X @ mix) for mix in (PARAMS["mix"], MOVED))
    p = jax.nn.softmax(full @ PARAMS["gate"])
    with jax.default_matmul_precision("highest"):
        there, here = dispatch(p, full), dispatch(p, moved)
        own = dispatch(jax.nn.softmax(moved @ PARAMS["gate"]), moved)
    assert not np.allclose(here, own), "the two networks choose alike by themselves"
    found = read(network(dispatch))
    wanted = jnp.einsum("ecd,ecf->edf", there - here, here, precision="highest")
    np.testing.assert_allclose(found.drift, wanted, rtol=1e-4, atol=1e-4)
    moment = jnp.einsum("ecd,ecf->edf", here, here, precision="highest")
    np.testing.assert_allclose(found.second_moment, moment, rtol=1e-4, atol=1e-4)


def test_drift_of_ragged_groups() -> None:
    def groups(p: jax.Array) -> tuple[jax.Array, jax.Array]:
        expert = jnp.argmax(p, -1)
        return jnp.argsort(expert), jnp.bincount(expert, length=EXPERTS).astype(jnp.int32)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ params["mix"])
        order, sizes = groups(jax.nn.softmax(h @ params["gate"]))
        return lax.ragged_dot(h[order], params["up"], sizes)

    full, moved = (jnp.tanh(X @ mix) for mix in (PARAMS["mix"], MOVED))
    expert = jnp.argmax(full @ PARAMS["gate"], -1)
    mask = jax.nn.one_hot(expert, EXPERTS, dtype=jnp.float32)
    wanted = jnp.einsum("te,td,tf->edf", mask, full - moved, moved, precision="highest")
    found = read(fn)
    np.testing.assert_allclose(found.drift, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.count, mask.sum(0))


def test_choices_are_shared_across_stages() -> None:
    """Chosen before a stage begins, used after it: what is alive is the full network's choice."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ params["mix"])
        places = lax.top_k((h @ params["gate"]).T, SLOTS)[1]
        later = jnp.tanh(h @ params["then"])
        return jnp.einsum("ecd,edf->ecf", later[places], params["up"])

    params = PARAMS | {"then": normal(6, WIDTH, WIDTH)}
    recording = Recording({"mix": (), "then": (), "up": ()}, drift=True)
    walk = Walk.start(fn, Leaves.of(params), Data.of([X, X[::-1]]), recording)

    def current(piece: Piece) -> jax.Array:
        return MOVED if piece.path == "mix" else params[piece.path]

    def original(piece: Piece) -> jax.Array:
        return params[piece.path]

    walk.advance(None, original, original)
    walk.advance(0, current, original)
    walk.advance(1, current, original)
    found = walk.gather(2, current, original)[Piece("up")]
    wanted, moment = 0.0, 0.0
    for x in (X, X[::-1]):
        full, moved = (jnp.tanh(x @ mix) for mix in (PARAMS["mix"], MOVED))
        places = lax.top_k((full @ PARAMS["gate"]).T, SLOTS)[1]
        there, here = (jnp.tanh(h @ params["then"])[places] for h in (full, moved))
        wanted += jnp.einsum("ecd,ecf->edf", there - here, here, precision="highest")
        moment += jnp.einsum("ecd,ecf->edf", here, here, precision="highest")
    np.testing.assert_allclose(found.drift, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.second_moment, moment, rtol=1e-4, atol=1e-4)


# What is no routing stays this network's own.


def leaky(h: jax.Array, gate: jax.Array) -> jax.Array:
    return jnp.where(h > 0, h, 0.1 * h)


def rectified_by_hand(h: jax.Array, gate: jax.Array) -> jax.Array:
    return h * (h > 0).astype(h.dtype)


def dense_experts(h: jax.Array, gate: jax.Array) -> jax.Array:
    p = jax.nn.softmax(h @ gate)
    kept = jnp.where(p >= lax.top_k(p, 2)[0][:, -1:], p, 0.0)
    return jnp.einsum("te,ted->td", kept, jnp.stack([h, h + 1.0, h * 2.0], 1))


def integers_in_between(h: jax.Array, gate: jax.Array) -> jax.Array:
    codes = jnp.round(h * 31.0).astype(jnp.int8)
    return codes.astype(jnp.float32) / 31.0


def in_order(h: jax.Array, gate: jax.Array) -> jax.Array:
    return jnp.sort(h, axis=0)  # continuous in `h`, unlike its order


def by_place(h: jax.Array, gate: jax.Array) -> jax.Array:
    mask = jnp.tri(TOKENS, dtype=h.dtype) / TOKENS
    return (mask @ h)[jnp.arange(TOKENS)[::-1]]


@pytest.mark.parametrize(
    "between", [leaky, rectified_by_hand, dense_experts, integers_in_between, in_order, by_place]
)
def test_what_does_not_route_is_left_alone(between: Any) -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        return between(x @ params["mix"], params["gate"]) @ params["up"][0]

    found = cut_of(fn, {"mix"})
    assert not any(s.shared for s in (found.prologue, *found.gathers, *found.advances))
    assert not found.unpaired


def cut_of(fn: Any, planned: set[str]) -> Any:
    shapes = [(path, jax.ShapeDtypeStruct(w.shape, w.dtype)) for path, w in sorted(PARAMS.items())]
    flat = flatten(fn, shapes, jax.tree.structure(PARAMS), (X,), {})
    assert routing(flat, {}) == (frozenset(), {}), "without weights nothing moves"
    return cut_at_weights(flat, planned.__contains__, "weight", drift=True)


# Loops that stay one step.


def mapped(h: jax.Array) -> jax.Array:
    return lax.map(lambda row: row[jnp.argsort(row)], h)


def carried_choice(h: jax.Array) -> jax.Array:
    def turn(carry: Any, row: jax.Array) -> Any:
        return jnp.argmax(row), jnp.roll(row, 1) + h[carry]

    return lax.scan(turn, jnp.argmax(h[0]), h)[1]


def while_it_moves(h: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 3, lambda k, h: h[jnp.argsort(h[:, 0])] * 0.9, h)


def in_a_branch(h: jax.Array) -> jax.Array:
    return lax.cond(h.sum() > 0, lambda h: h[jnp.argsort(h[:, 0])], lambda h: h, h)


def counted(h: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 3, lambda k, out: out + h[k], jnp.zeros_like(h))


def scanned(h: jax.Array) -> jax.Array:
    return lax.scan(lambda c, row: (c + row, jnp.maximum(c, row)), h[0], h)[1]


def branched(h: jax.Array) -> jax.Array:
    return lax.cond(h.sum() > 0, lambda h: h, jnp.tanh, h)


@pytest.mark.parametrize(
    "loop, pairs",
    [
        (mapped, False), (carried_choice, False), (while_it_moves, False), (in_a_branch, False),
        (counted, True), (scanned, True), (branched, True),
    ],
)  # fmt: skip
def test_what_a_loop_rearranges_is_known_to_be_unpaired(loop: Any, pairs: bool) -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(loop(x @ params["mix"])) @ params["gate"]

    found = cut_of(fn, {"mix", "gate"})
    assert set(found.unpaired) == (set() if pairs else {Piece("gate")})


def test_corrected_experts_are_no_worse_than_plain_ones() -> None:
    """Mispaired tokens cost several times the error of nearest rounding."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ params["mix"])
        p = jax.nn.softmax(h @ params["gate"])
        choice = jax.nn.one_hot(jnp.argmax(p, -1), EXPERTS, dtype=jnp.int32)
        slots = jax.nn.one_hot(jnp.cumsum(choice, 0) * choice - 1, x.shape[0], dtype=jnp.float32)
        inner = jnp.einsum("tec,td->ecd", slots, h)
        outer = jnp.tanh(jnp.einsum("ecd,edf->ecf", inner, params["up"]))
        return jnp.einsum("tec,ecf->tf", slots * p[..., None], outer)

    x = normal(7, 128, WIDTH)
    weights = jq.find_weights(fn, PARAMS, x)
    errors = []
    for rounding in (jq.rounding.GPTQ(), jq.rounding.GPTQ(correction="qep")):
        scheme = jq.Scheme(jq.grids.Uniform(3), None, rounding)
        found, report = jq.quantize(
            fn, PARAMS, jq.plan(weights, {"gate": jq.keep, ".*": scheme}), [x]
        )
        errors.append(float(jnp.mean((jq.apply(fn)(found, x) - fn(PARAMS, x)) ** 2)))
        assert report["up"].ratio < 1.5
    assert errors[1] < 1.5 * errors[0]


def test_the_programs_of_shared_choices_are_estimated() -> None:
    fn = network(tokens_of_experts)
    scheme = jq.Scheme(jq.grids.Uniform(4), None, jq.rounding.GPTQ(correction="qep"))
    plan = jq.plan(jq.find_weights(fn, PARAMS, X), {".*": scheme})
    found = estimate(fn, PARAMS, plan, [X])
    assert len(found.stages) == 3
