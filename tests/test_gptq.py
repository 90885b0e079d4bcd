"""GPTQ: against a NumPy transcription of its column loop, and the facts known about it."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import layer
from marks import covering, mostly_slow
from oracles import gptq as oracle

import jquant as jq
from jquant.axes.groups import Groups, from_groups, to_groups
from jquant.calibration.evidence import Evidence
from jquant.errors import EvidenceError
from jquant.grids import MSE, MX, NF4, NV, Float, KMeans, Power, Uniform, nearest
from jquant.grids.grouped import Grouped
from jquant.rounding import GPTQ, Nearest, arrangement, gptq
from jquant.rounding import substitution as sweep

GRID = Uniform(4)
NATURAL = GPTQ(order="natural")


def values(result, grid, blocks, shape):
    """What the codes of a result stand for."""
    codes = to_groups(jnp.asarray(result.codes).astype(jnp.int32), blocks)
    length = shape[-1 if blocks.axis == "in" else -2]
    return np.asarray(from_groups(grid.decode(codes, result.params), blocks, length), np.float64)


def loss(error, moment):
    """tr(E H Eᵀ) in float64."""
    error, moment = np.asarray(error, np.float64), np.asarray(moment, np.float64)
    return np.trace(error @ moment @ error.T)


def same(one, other):
    """Equal codes and equal parameters."""
    np.testing.assert_array_equal(np.asarray(one.codes), np.asarray(other.codes))
    for name in one.params:
        np.testing.assert_array_equal(np.asarray(one.params[name]), np.asarray(other.params[name]))


def a1_fit(group):
    """The A1 grid in NumPy: scale and zero of `[m, b]`."""
    group = group.astype(np.float32)
    low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
    scale = ((high - low) / np.float32(15)).astype(np.float32)
    return scale, np.round(-low / scale)


def a1_round(x, params):
    """Codes, values, and how far from a tie every weight was, in codes."""
    scale, zero = (p[:, None].astype(np.float64) for p in params)
    where = x / scale
    codes = np.clip(np.round(where) + zero, 0, 15)
    return codes.astype(int), scale * (codes - zero), np.abs(where - np.floor(where) - 0.5)


SETTINGS = [
    ((12, 40), Groups("in", 8), "natural", "static"),
    ((12, 40), Groups("in", 8), "activation", "static"),
    ((12, 40), Groups("in", 8), "natural", "dynamic"),  # group smaller than the block
    ((12, 40), Groups("in", 2), "natural", "dynamic"),
    ((8, 300), Groups("in", 150), "natural", "dynamic"),  # larger
    ((8, 300), Groups("in", 150), "activation", "static"),
    (
        (99, 45),
        Groups("in", 17),
        "natural",
        "dynamic",
    ),  # ragged; rows whose last weight is the largest
    ((8, 45), Groups("in", 17), "activation", "static"),
    ((12, 40), Groups(), "activation", "dynamic"),  # one group
    ((12, 40), Groups("out", 4), "activation", "static"),
    ((11, 40), Groups("out", 4), "activation", "dynamic"),  # ragged
    ((11, 150), Groups("out", 4), "natural", "dynamic"),
    ((3, 600), Groups("in", 64), "activation", "static"),  # more than one chunk
]


@pytest.mark.parametrize(
    ("shape", "blocks", "order", "groups"),
    mostly_slow(SETTINGS, [SETTINGS[k] for k in (1, 3, 6, 9)]),
)
def test_agrees_with_the_column_loop(shape, blocks, order, groups):
    w, moment = layer(*shape)
    result = GPTQ(order=order, groups=groups)(w, GRID, blocks, evidence=moment)
    codes, wanted, margins = oracle.gptq(
        np.asarray(w), np.asarray(moment), fit=a1_fit, round_to=a1_round, axis=blocks.axis,
        group=blocks.size, order=order, groups=groups,
    )  # fmt: skip
    # A tie may fall differently in float32, and takes the rest of its row along: such rows are left
    # out.
    clear = margins.min(axis=1) > 1e-5
    assert clear.mean() > 0.6
    np.testing.assert_array_equal(np.asarray(result.codes).astype(int)[clear], codes[clear])
    got = values(result, GRID, blocks, shape)
    np.testing.assert_allclose(got[clear], wanted[clear], rtol=1e-4, atol=1e-5)
    error = loss(np.asarray(w) - got, moment)
    floor = 1e-6 * float(result.info["nearest_error"]) + 1e-9
    np.testing.assert_allclose(result.info["error"], error, rtol=1e-3, atol=floor)
    plain = values(Nearest()(w, GRID, blocks), GRID, blocks, shape)
    plain_error = loss(np.asarray(w) - plain, moment)
    np.testing.assert_allclose(result.info["nearest_error"], plain_error, rtol=1e-3)


def test_beats_nearest_in_aggregate():
    ratios = []
    for seed in range(10):
        w, moment = layer(12, 40, seed)
        info = GPTQ()(w, GRID, Groups("in", 8), evidence=moment).info
        ratios.append(float(info["error"] / info["nearest_error"]))
    assert np.mean(ratios) < 0.8


def test_an_unclipped_row_is_within_babai_s_bound():
    w, moment = layer(6, 24)
    grid = Uniform(8)
    wide = jnp.concatenate(
        [w, jnp.full((6, 1), 9.0, w.dtype), jnp.full((6, 1), -9.0, w.dtype)], axis=1
    )
    moment = jnp.zeros((26, 26), moment.dtype).at[:24, :24].set(moment)
    moment = moment + jnp.diag(
        jnp.zeros(26, moment.dtype).at[24:].set(float(jnp.trace(moment)) / 24)
    )
    result = NATURAL(wide, grid, evidence=moment)
    error = np.asarray(wide, np.float64) - values(result, grid, Groups(), wide.shape)
    damped = np.array(moment, np.float64)
    damped += 0.01 * np.diag(damped).mean() * np.eye(26)
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    scale = np.asarray(result.params["scale"], np.float64)[:, 0]
    bound = 0.25 * scale**2 * (1 / np.diag(factor) ** 2).sum()
    assert (np.einsum("oi,ij,oj->o", error, damped, error) <= bound * 1.001).all()


@pytest.mark.parametrize(
    ("rounding", "blocks"),
    [
        (GPTQ(), Groups("in", 8)),
        (GPTQ(), Groups("out", 4)),
        (GPTQ(groups="dynamic"), Groups("out", 4)),
        (NATURAL, Groups("in", 8)),
        (GPTQ(order="natural", groups="dynamic"), Groups("in", 8)),
        (GPTQ(groups="dynamic"), Groups()),
    ],
)
def test_is_nearest_bit_for_bit_when_inputs_are_uncorrelated(rounding, blocks):
    w, _ = layer(12, 40)
    diagonal = jnp.exp(jax.random.normal(jax.random.key(0), (40,)))
    result = rounding(w, GRID, blocks, evidence=jnp.diag(diagonal))
    same(result, Nearest()(w, GRID, blocks))


@pytest.mark.parametrize(
    ("grid", "blocks"),
    mostly_slow(
        covering(
            [NF4, MX(), MX(macro=2), NV(), Float(2, 1, scale="float16"), Power(4), KMeans(3)],
            [Groups("in", 8), Groups("out", 8)],
        ),
        lambda case: case[0] == NF4,
    ),
)
def test_every_grid_with_a_diagonal_moment_is_nearest(grid, blocks):
    """Also those with a parameter for many groups, which every column must be given."""
    w, _ = layer(16, 40)
    diagonal = jnp.exp(jax.random.normal(jax.random.key(0), (40,)))
    result = GPTQ()(w, grid, blocks, evidence=jnp.diag(diagonal))
    same(result, Nearest()(w, grid, blocks, evidence=jnp.diag(diagonal)))


@pytest.mark.parametrize("grid", [NV(), MX(macro=2), Power(4)])
def test_dynamic_groups_of_a_grid_that_shares_parameters_are_refused(grid):
    w, moment = layer(16, 40)
    with pytest.raises(ValueError, match="stands for several: pass groups='static'"):
        GPTQ(order="natural", groups="dynamic")(w, grid, Groups("in", 8), evidence=moment)


@pytest.mark.parametrize("block", [(16, 4, 8), (200, 7, 50)])
def test_block_sizes_do_not_matter(block, monkeypatch):
    w, moment = layer(8, 150)
    wanted = NATURAL(w, GRID, Groups("in", 32), evidence=moment)
    names = ((arrangement, "BLOCK"), (arrangement, "LEAF"), (sweep, "CHUNK"))
    for (module, name), value in zip(names, block, strict=True):
        monkeypatch.setattr(module, name, value)
    # The sizes are not part of what a compiled program is known by: compile afresh.

    @jax.jit
    def sized(w, moment):
        prepared = gptq._prepare.__wrapped__(moment, None, NATURAL, 150)
        return gptq._round_one(w, prepared, choice=NATURAL, grid=Grouped(GRID, Groups("in", 32)))

    same(sized(w, moment), wanted)


def test_activation_order_is_a_permutation_of_columns_with_their_parameters():
    # Groups along the output axis stay whole when columns move.
    w, moment = layer(12, 40)
    order = jnp.argsort(-jnp.diagonal(moment))
    blocks = Groups("out", 4)
    got = GPTQ()(w, GRID, blocks, evidence=moment)
    moved = NATURAL(w[:, order], GRID, blocks, evidence=moment[order][:, order])
    np.testing.assert_array_equal(got.codes[:, order], moved.codes)
    np.testing.assert_array_equal(got.params["scale"][order], moved.params["scale"])


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20, 1 / 3000])
def test_a_sum_and_a_mean_are_one(factor):
    w, moment = layer(12, 40)
    one = GPTQ()(w, GRID, Groups("in", 8), evidence=moment)
    other = GPTQ()(w, GRID, Groups("in", 8), evidence=moment * factor)
    same(one, other)
    np.testing.assert_allclose(other.info["error"], one.info["error"] * factor, rtol=1e-4)


def test_rows_are_independent():
    w, moment = layer(12, 40)
    whole = GPTQ()(w, GRID, Groups("in", 8), evidence=moment)
    part = GPTQ()(w[3:7], GRID, Groups("in", 8), evidence=moment)
    np.testing.assert_array_equal(whole.codes[3:7], part.codes)


def test_layers_together_are_layers_apart():
    blocks = Groups("in", 8)
    w, moment = layer(12, 40, batch=(2, 2))
    together = GPTQ()(w, GRID, blocks, evidence=moment)
    for place in np.ndindex(2, 2):
        alone = GPTQ()(w[place], GRID, blocks, evidence=moment[place])
        same(jax.tree.map(lambda leaf, place=place: leaf[place], together), alone)
        np.testing.assert_allclose(together.info["error"][place], alone.info["error"], rtol=1e-5)


def test_evidence_and_its_second_moment_are_one():
    x = jax.random.normal(jax.random.key(0), (64, 40))
    w, _ = layer(12, 40)
    evidence = Evidence.of(x)
    same(
        GPTQ()(w, GRID, Groups("in", 8), evidence=evidence),
        GPTQ()(w, GRID, Groups("in", 8), evidence=evidence.second_moment),
    )


def test_dead_inputs_keep_nearest_codes_and_disturb_nobody():
    w, moment = layer(12, 40)
    dead = np.array([0, 13, 39])
    live = np.setdiff1d(np.arange(40), dead)
    holed = moment.at[dead].set(0.0).at[:, dead].set(0.0)
    blocks = Groups("out", 4)  # parameters per column, so that leaving columns out keeps the rest
    result = GPTQ()(w, GRID, blocks, evidence=holed)
    plain = Nearest()(w, GRID, blocks)
    np.testing.assert_array_equal(result.codes[:, dead], plain.codes[:, dead])
    without = GPTQ()(w[:, live], GRID, blocks, evidence=moment[live][:, live])
    np.testing.assert_array_equal(result.codes[:, live], without.codes)
    assert float(result.info["dead"]) == 3
    np.testing.assert_allclose(result.info["error"], without.info["error"], rtol=1e-5)


def test_no_live_input_at_all_is_nearest():
    w, moment = layer(12, 40)
    result = GPTQ()(w, GRID, Groups("in", 8), evidence=jnp.zeros_like(moment))
    same(result, Nearest()(w, GRID, Groups("in", 8)))
    assert [float(result.info[name]) for name in ("dead", "failed", "error")] == [40, 0, 0]


def test_rank_deficient_evidence_is_damped_enough():
    w, _ = layer(12, 40)
    x = jax.random.normal(jax.random.key(0), (5, 40))
    info = GPTQ()(w, GRID, Groups("in", 8), evidence=x.T @ x).info
    assert float(info["failed"]) == 0 and float(info["error"]) < float(info["nearest_error"])


@pytest.mark.parametrize(("shift", "damping"), [(0.0, 0.01), (0.05, 0.1), (0.5, 1.0)])
def test_damping_rises_by_tens_until_the_factorisation_succeeds(shift, damping):
    # Eigenvalues of 1 and one of -shift: not a second moment, but nearly.
    w, _ = layer(12, 40)
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))
    moment = jnp.asarray(basis @ np.diag([-shift, *np.ones(39)]) @ basis.T, jnp.float32)
    result = GPTQ()(w, GRID, Groups("in", 8), evidence=moment)
    np.testing.assert_allclose(result.info["damping"], damping, rtol=1e-6)
    assert float(result.info["failed"]) == 0


def test_a_failed_factorisation_gives_nearest_codes_and_says_so():
    w, moment = layer(12, 40, batch=(2,))
    # The second has an eigenvalue of minus twice its diagonal: no damping up to the cap helps.
    broken = moment.at[1].set(3.0 - 2.0 * jnp.eye(40, dtype=moment.dtype))
    for rounding in (GPTQ(), GPTQ(order="natural", groups="dynamic")):
        result = rounding(w, GRID, Groups("in", 8), evidence=broken)
        plain = Nearest()(w, GRID, Groups("in", 8))
        np.testing.assert_array_equal(np.asarray(result.info["failed"]), [0, 1])
        np.testing.assert_array_equal(result.codes[1], plain.codes[1])
        np.testing.assert_array_equal(result.params["scale"][1], plain.params["scale"][1])
        assert (np.asarray(result.codes[0]) != np.asarray(plain.codes[0])).any()
        # Its neighbour in the batch is not disturbed by further attempts.
        alone = rounding(w[0], GRID, Groups("in", 8), evidence=broken[0])
        np.testing.assert_array_equal(result.codes[0], alone.codes)
        np.testing.assert_array_equal(result.info["damping"][0], alone.info["damping"])


def test_a_range_search_weighs_inputs_by_their_power():
    w, moment = layer(12, 40)
    grid = Uniform(2, range=MSE())
    result = GPTQ()(w, grid, Groups("in", 8), evidence=moment)
    same_params = Nearest()(w, grid, Groups("in", 8), evidence=moment).params
    np.testing.assert_array_equal(result.params["scale"], same_params["scale"])


def instructions(width):
    """HLO instructions of the compiled program, but for constants: equal ones are shared."""
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    program = jax.jit(lambda w, h: GPTQ()(w, Uniform(4), Groups("in", 64), evidence=h))
    program = program.lower(shape((64, width)), shape((width, width))).compile()
    lines = re.findall(r"^ *(?:ROOT )?%\S+ = .*$", program.as_text(), re.MULTILINE)
    return sum(" constant(" not in line for line in lines)


def test_a_wider_layer_needs_no_longer_program():
    assert instructions(512) == instructions(2048)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"order": "actorder"}, "'activation' or 'natural'"),
        ({"groups": "none"}, "'static' or 'dynamic'"),
        ({"damping": 0.0}, "0 < damping"),
        ({"damping": 0.1, "max_damping": 0.01}, "max_damping"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments, says):
    with pytest.raises(ValueError, match=says):
        GPTQ(**arguments)


def test_bad_calls_are_refused_in_words():
    w, moment = layer(6, 24)
    with pytest.raises(EvidenceError, match="pass evidence="):
        GPTQ()(w, GRID)
    with pytest.raises(EvidenceError, match=r"\(24, 24\), got \(20, 20\)"):
        GPTQ()(w, GRID, evidence=moment[:20, :20])
    with pytest.raises(ValueError, match="order='natural'"):
        GPTQ(groups="dynamic")(w, GRID, Groups("in", 8), evidence=moment)


def test_padding_of_the_sweep_never_shows():
    # 17 columns in leaves of 16: 15 places are padding.
    w, moment = layer(5, 17)
    result = GPTQ()(w, GRID, evidence=moment)
    assert result.codes.shape == (5, 17)
    assert (np.asarray(nearest(GRID, w, GRID.fit(w))) != np.asarray(result.codes)).any()


@pytest.mark.parametrize("blocks", [Groups("in", 8), Groups("out", 4)])
@pytest.mark.parametrize("rounding", [GPTQ(), NATURAL, GPTQ(order="natural", groups="dynamic")])
def test_what_is_prepared_once_serves_every_weight(rounding, blocks):
    first, moment = layer(12, 40)
    prepared = rounding.prepare(moment, blocks)
    for w in (first, first[::-1]):
        same(
            rounding(w, GRID, blocks, evidence=prepared),
            rounding(w, GRID, blocks, evidence=moment),
        )


def test_weights_of_a_stage_that_share_inputs_share_a_factor(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 5)
    params = {n: jax.random.normal(k, (2, 16, 16)) for n, k in zip("koqv", keys, strict=False)}
    x = jax.random.normal(keys[4], (64, 16))

    def block(x, p):
        mixed = jax.nn.softmax((x @ p["q"]) @ (x @ p["k"]).T) @ (x @ p["v"])
        return x + mixed @ p["o"], None

    def network(params, x):
        return jax.lax.scan(block, x, params)[0]

    made, prepare = [], GPTQ.prepare
    monkeypatch.setattr(GPTQ, "prepare", lambda *args: made.append(0) or prepare(*args))
    plan = jq.plan(jq.find_weights(network, params, x), {".*": jq.presets.int4_gptq(8)})
    shared, _ = jq.quantize(network, params, plan, [x])
    assert len(made) == 4  # q, k and v have one in each of two layers, o has its own
    alone, _ = jq.quantize(network, params, jq.plan(plan.weights, {"q": plan["q"]}), [x])
    np.testing.assert_array_equal(shared["q"].codes[0], alone["q"].codes[0])
