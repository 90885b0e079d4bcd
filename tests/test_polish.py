"""Polish: a loss that never rises, ends that nothing improves, and what stays as it was."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BLOCKS, GRIDS, floats, layer
from marks import mostly_slow
from test_gptq_correction import case

import jquant as jq
from jquant.axes.groups import Groups, to_groups
from jquant.errors import EvidenceError, PlanError
from jquant.grids import MX, NF4, NV, KMeans, Uniform
from jquant.grids.grouped import Grouped
from jquant.jobs.report import describe
from jquant.rounding import GPTQ, Nearest, Polish, SignRound, Stochastic

A4 = Uniform(2, convention="A4")
LAWS = {
    "A1": Uniform(2),
    "A4-bf16": Uniform(3, convention="A4", scale_dtype="bfloat16"),
    "S1-half": Uniform(3, symmetric=True, scale_dtype="float16"),
    "nf4": NF4,
    "mx": MX(),
    "nv": NV(),
    "kmeans": KMeans(2),
    **{name: GRIDS[name] for name in ("power-4", "gguf-Q4_1", "gguf-Q2_K", "gguf-Q3_K")},
}
AXES = mostly_slow([Groups("in", 8), Groups("out", 4)], [Groups("in", 8)])
QUICK = [("A4-bf16", "in-ragged", 1), ("A1", "out-ragged", 1), ("gguf-Q2_K", "in-8", 1)]


def values(result, grid, groups):
    return np.asarray(Grouped(grid, groups).decode(result.codes, result.params), np.float64)


def damped(moment, damping=Polish().damping):
    h = np.asarray(moment, np.float64)
    live = np.diag(h) > 0
    return h + damping * np.diag(h)[live].mean() * np.diag(live)


def by_row(error, h):
    return np.einsum("...oi,...ij,...oj->...o", error, h, error)


@pytest.mark.parametrize(
    ("grid", "shape", "inner"), mostly_slow(itertools.product(LAWS, BLOCKS, (0, 1)), QUICK)
)
def test_no_step_raises_the_loss_of_any_row(grid, shape, inner):
    inner, grid, ((out, width), groups) = (GPTQ(), Nearest())[inner], LAWS[grid], BLOCKS[shape]
    w, moment = layer(out, width)
    h, plain = damped(moment), inner(w, grid, groups, evidence=moment)
    last = first = by_row(values(plain, grid, groups) - np.asarray(w), h)
    steps = Polish(inner, 1, refit=False), Polish(inner, 1), Polish(inner, 2), Polish(inner, 4)
    for step in steps:
        result = step(w, grid, groups, evidence=moment)
        now = by_row(values(result, grid, groups) - np.asarray(w), h)
        if groups.axis == "in":
            assert (now <= first * (1 + 1e-5)).all()
        part = now.sum() / first.sum() if first.sum() > 0 else 1.0  # as many values as weights
        assert part < 1 or first.sum() == 0
        np.testing.assert_allclose(result.info["polished"], part, rtol=1e-4)
        error = by_row(values(result, grid, groups) - np.asarray(w), np.asarray(moment, float))
        np.testing.assert_allclose(result.info["error"], error.sum(), rtol=1e-4)
        assert result.codes.dtype == plain.codes.dtype
        for name, leaf in result.params.items():
            assert leaf.shape == plain.params[name].shape
            assert leaf.dtype == plain.params[name].dtype
        if step.refit:  # rounds of one kind
            assert (now <= last * (1 + 1e-5)).all() or groups.axis == "out" or last is first
            last = now


@pytest.mark.parametrize("groups", AXES)
def test_in_the_end_no_other_code_is_better(groups):
    w, moment = layer(6, 24)
    h, grid = damped(moment), Uniform(2)
    result = Polish(Nearest(), 40, refit=False)(w, grid, groups, evidence=moment)
    codes, reached = np.asarray(result.codes).astype(int), values(result, grid, groups)
    least = by_row(reached - np.asarray(w), h)
    grouped = Grouped(grid, groups)
    for code in range(4):
        # All weights at this code: each column of it replaces one column of the result.
        other = np.asarray(grouped.decode(jnp.full_like(result.codes, code), result.params))
        for column in range(24):
            tried = reached.copy()
            tried[:, column] = other[:, column]
            assert (by_row(tried - np.asarray(w), h) >= least * (1 - 1e-5)).all()
    assert (codes != np.asarray(Nearest()(w, grid, groups).codes).astype(int)).any()


@pytest.mark.parametrize("convention", ["A4", "A1"])
def test_in_the_end_parameters_solve_the_least_squares_of_their_codes(convention):
    w, moment = layer(6, 24)
    h, groups, grid = damped(moment), Groups("in", 8), Uniform(3, convention=convention)
    result = Polish(Nearest(), 60)(w, grid, groups, evidence=moment)
    v, target = values(result, grid, groups), np.asarray(w, np.float64)
    root, now = np.linalg.cholesky(h), by_row(v - target, h)
    for row, part in itertools.product(range(6), (slice(0, 8), slice(8, 16), slice(16, 24))):
        rest = target[row] - v[row]
        rest[part] = target[row, part]
        bases = [v[row, part], np.ones(8)] if convention == "A4" else [v[row, part]]
        directions = np.zeros((24, len(bases)))
        directions[part] = np.stack(bases, 1)
        best, *_ = np.linalg.lstsq(root.T @ directions, root.T @ rest, rcond=None)
        left = root.T @ (rest - directions @ best)
        np.testing.assert_allclose(now[row], left @ left, rtol=2e-3)


def test_a_refit_of_groups_along_the_outputs_is_the_least_squares_of_one_column():
    w, moment = layer(12, 24)
    h, groups, grid = damped(moment), Groups("out", 4), Uniform(2, convention="A4")
    result = Polish(Nearest(), 60)(w, grid, groups, evidence=moment)
    v, target = values(result, grid, groups), np.asarray(w, np.float64)
    aim = v - ((v - target) @ h) / np.diag(h)
    for rows, column in itertools.product((slice(0, 4), slice(4, 8), slice(8, 12)), range(24)):
        basis = np.stack([v[rows, column], np.ones(4)], 1)
        best, *_ = np.linalg.lstsq(basis, aim[rows, column], rcond=None)
        least = ((basis @ best - aim[rows, column]) ** 2).sum()
        np.testing.assert_allclose(((v - aim)[rows, column] ** 2).sum(), least, rtol=1e-2)


def test_codes_of_uncorrelated_inputs_are_nearest_already():
    w, moment = layer(12, 40)
    diagonal = jnp.diag(jnp.diagonal(moment))
    plain = Nearest()(w, Uniform(3), Groups("in", 8), evidence=diagonal)
    result = Polish(Nearest(), refit=False)(w, Uniform(3), Groups("in", 8), evidence=diagonal)
    np.testing.assert_array_equal(result.codes, plain.codes)
    assert float(result.info["polished"]) == 1 and float(result.info["changed"]) == 0


def test_layers_together_are_layers_apart():
    w, moment = layer(8, 20, batch=(2, 2))
    together = Polish(Nearest())(w, A4, Groups("in", 7), evidence=moment)
    alone = Polish(Nearest())(w[1, 0], A4, Groups("in", 7), evidence=moment[1, 0])
    np.testing.assert_array_equal(together.codes[1, 0], alone.codes)
    for name, leaf in floats(alone.params).items():
        np.testing.assert_allclose(np.asarray(together.params[name][1, 0], float), leaf, rtol=1e-5)


def test_rows_are_independent():
    w, moment = layer(9, 20)
    whole, part = (Polish(Nearest())(x, A4, Groups("in", 5), evidence=moment) for x in (w, w[4:]))
    np.testing.assert_array_equal(whole.codes[4:], part.codes)


def test_dead_inputs_keep_their_codes_and_disturb_nobody():
    w, moment = layer(6, 24)
    dead = np.array([0, 7, 23])
    moment = moment.at[dead].set(0.0).at[:, dead].set(0.0)
    for groups in (Groups("in", 8), Groups("out", 3)):
        inner = Nearest()(w, Uniform(2), groups, evidence=moment)
        result = Polish(Nearest())(w, Uniform(2), groups, evidence=moment)
        np.testing.assert_array_equal(result.codes[:, dead], inner.codes[:, dead])
        assert float(result.info["polished"]) < 1
    nothing = Polish(Nearest())(w, Uniform(2), evidence=jnp.zeros_like(moment))
    np.testing.assert_array_equal(nothing.codes, Nearest()(w, Uniform(2)).codes)
    assert float(nothing.info["error"]) == 0


def test_a_failed_factorisation_leaves_all_as_it_was():
    w, moment = layer(12, 40, batch=(2,))
    broken = moment.at[1].set(3.0 - 2.0 * jnp.eye(40, dtype=moment.dtype))
    for inner in (GPTQ(), Nearest()):  # the latter does not see that it is no second moment
        plain = inner(w, Uniform(2), Groups("in", 8), evidence=broken)
        result = Polish(inner)(w, Uniform(2), Groups("in", 8), evidence=broken)
        if isinstance(inner, GPTQ):
            np.testing.assert_array_equal(result.codes[1], plain.codes[1])
            np.testing.assert_array_equal(result.params["scale"][1], plain.params["scale"][1])
            np.testing.assert_array_equal(np.asarray(result.info["failed"]), [0, 1])
            assert np.isnan(result.info["error"][1]) and np.isnan(result.info["nearest_error"][1])
        assert 0 <= float(result.info["polished"][1]) <= 1
        assert (np.asarray(result.codes[0]) != np.asarray(plain.codes[0])).any()


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Failing:
    """Nearest rounding that says it has failed."""

    needs = frozenset()

    def __call__(self, w, grid, groups=Groups(), *, evidence=None, key=None):
        plain = Nearest()(w, grid, groups, evidence=evidence)
        return plain._replace(info={"failed": jnp.ones((), jnp.float32)})


def test_a_failure_is_heeded_where_the_loss_could_still_fall():
    w, moment = layer(12, 40)
    plain, result = (r(w, Uniform(2), evidence=moment) for r in (Nearest(), Polish(Failing())))
    assert float(result.info["failed"]) == 1 and float(result.info["changed"]) == 0
    assert float(result.info["polished"]) == 1 and np.isnan(result.info["error"])
    np.testing.assert_array_equal(result.codes, plain.codes)
    np.testing.assert_array_equal(result.params["scale"], plain.params["scale"])


@pytest.mark.parametrize("share", [pytest.param(0.5, marks=pytest.mark.slow), 5.0])
def test_a_target_is_polished_and_no_loss_of_it_looks_negative(share):
    w, evidence = case(share=share)
    inner, grid, groups = GPTQ(correction="qep"), Uniform(2), Groups("in", 8)
    plain = inner(w, grid, groups, evidence=evidence)
    result = Polish(inner)(w, grid, groups, evidence=evidence)
    h, target = damped(evidence.second_moment), np.asarray(plain.target, np.float64)
    before, after = (by_row(values(r, grid, groups) - target, h) for r in (plain, result))
    assert (after <= before * (1 + 1e-5)).all()
    np.testing.assert_array_equal(result.target, plain.target)
    np.testing.assert_allclose(result.info["polished"], after.sum() / before.sum(), rtol=1e-4)
    exact = np.asarray(evidence.second_moment, float)
    error = by_row(values(result, grid, groups) - np.asarray(w), exact).sum()
    np.testing.assert_allclose(result.info["error"], error, rtol=1e-4)
    np.testing.assert_array_equal(result.info["nearest_error"], plain.info["nearest_error"])


@pytest.mark.parametrize("inner", mostly_slow([Nearest(), Stochastic(), GPTQ()], [Nearest()]))
def test_nearest_error_is_that_of_nearest_rounding_on_the_grid_fitted_to_the_weight(inner):
    w, moment = layer(12, 40)
    grid, groups = Uniform(2), Groups("in", 8)
    plain = values(Nearest()(w, grid, groups, evidence=moment), grid, groups) - np.asarray(w)
    told = Polish(inner)(w, grid, groups, evidence=moment, key=jax.random.key(0)).info
    expected = by_row(plain, np.asarray(moment, float)).sum()
    np.testing.assert_allclose(told["nearest_error"], expected, rtol=1e-3)


@pytest.mark.parametrize("groups", AXES)
def test_what_is_prepared_once_serves_every_weight(groups):
    (w, moment), (other, _) = layer(12, 40), layer(7, 40, seed=1)
    seen = Polish().prepare(moment, groups)
    for one in (w, other):
        given = Polish()(one, A4, groups, evidence=seen)
        anew = Polish()(one, A4, groups, evidence=moment)
        jax.tree.map(np.testing.assert_array_equal, tuple(given), tuple(anew))


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**40])
def test_a_sum_and_a_mean_are_one(factor):
    w, moment = layer(12, 40)
    one, two = (
        Polish(Nearest())(w, A4, Groups("in", 8), evidence=h) for h in (moment, factor * moment)
    )
    np.testing.assert_array_equal(one.codes, two.codes)
    np.testing.assert_allclose(two.info["error"], factor * one.info["error"], rtol=1e-5)


@pytest.mark.parametrize("wide", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_wide_numbers_and_no_compiler_change_nothing(wide):
    w, moment = layer(3, 7)  # without the compiler every operation is a program
    rounding, groups = Polish(Nearest(), 1), Groups("in", 4)
    plain = rounding(w, A4, groups, evidence=moment)
    with jax.enable_x64(True) if wide else jax.disable_jit():
        given = jnp.asarray(w, jnp.float64) if wide else w
        result = rounding(given, A4, groups, evidence=moment)
    np.testing.assert_array_equal(np.asarray(result.codes), np.asarray(plain.codes))
    assert all(leaf.dtype == jnp.float32 for leaf in result.info.values())
    assert result.params["scale"].dtype == jnp.float32


def test_parameters_in_bfloat16_are_judged_as_stored():
    w, moment = layer(12, 40)
    grid, h = LAWS["A4-bf16"], damped(moment)
    result = Polish(Nearest())(w, grid, Groups("in", 8), evidence=moment)
    assert {leaf.dtype for leaf in result.params.values()} == {jnp.dtype(jnp.bfloat16)}
    now = by_row(values(result, grid, Groups("in", 8)) - np.asarray(w), h).sum()
    plain = Nearest()(w, grid, Groups("in", 8), evidence=moment)
    was = by_row(values(plain, grid, Groups("in", 8)) - np.asarray(w), h).sum()
    np.testing.assert_allclose(result.info["polished"], now / was, rtol=1e-4)
    assert now < 0.9 * was


class Plain:
    """A grid of somebody else's: three points, no parameters that can follow."""

    bits, codes = 2, (-1, 1)

    def fit(self, w, importance=None):
        return {"top": jnp.max(jnp.abs(w), -1)}

    def bracket(self, w, params):
        down = jnp.floor(w / params["top"][..., None])
        return jnp.clip(down, -1, 1).astype(jnp.int32), jnp.clip(down + 1, -1, 1).astype(jnp.int32)

    def decode(self, codes, params):
        return codes.astype(jnp.float32) * params["top"][..., None]


def test_a_grid_that_cannot_be_refitted_is_refused_or_gets_better_codes():
    w, moment = layer(12, 40)
    with pytest.raises(ValueError, match=r"has no method rescaled.*pass refit=False"):
        Polish()(w, Plain(), Groups("in", 8), evidence=moment)
    grid = Plain()
    result = Polish(Nearest(), refit=False)(w, grid, Groups("in", 8), evidence=moment)
    assert float(result.info["polished"]) < 1
    np.testing.assert_array_equal(
        result.params["top"], grid.fit(to_groups(w, Groups("in", 8)))["top"]
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rounding": GPTQ}, "Polish.rounding must be a rounding, such as GPTQ"),
        ({"rounds": 0}, "Polish.rounds"),
        ({"refit": 1}, "Polish.refit"),
        ({"damping": -0.1}, "Polish.damping must be a number from 0"),
        ({"damping": float("nan")}, "Polish.damping must be a number from 0"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments, says):
    with pytest.raises(ValueError, match=says):
        Polish(**arguments)


def test_bad_calls_are_refused_in_words():
    w, moment = layer(12, 40)
    with pytest.raises(EvidenceError, match="Polish needs the second moment"):
        Polish(Nearest())(w, Uniform(2))
    with pytest.raises(EvidenceError, match=r"Polish on weights \(12, 40\) needs"):
        Polish(Nearest())(w, Uniform(2), evidence=moment[:3, :3])
    with pytest.raises(EvidenceError, match="needs to know how far the inputs are"):
        Polish(GPTQ(correction="qep"))(w, Uniform(2), evidence=moment)


def test_what_it_needs_and_is_called():
    qep = Polish(GPTQ(correction="qep"))
    assert qep.needs == {"moment", "drift"} and Polish(SignRound()).needs >= {"moment"}
    assert Polish(Stochastic()).needs == {"moment", "key"}
    assert qep == Polish(GPTQ(correction="qep")) != Polish() and hash(qep)
    assert describe(jq.Scheme(Uniform(2), 64, Polish(qep))) == (
        "Uniform 2b, in 64, Polish(Polish(GPTQ))"
    )
    keys = [line for line in jq.cite(qep).splitlines() if line.startswith("@")]
    assert [key.split("{")[1].strip(",") for key in keys] == [
        "jquant", "behdin2023quantease", "kim2025guidedquant", "frantar2022gptq", "arai2025qep",
    ]  # fmt: skip


def network(params, x):
    x = x + jnp.tanh(x @ params["a"]["w"]) @ params["b"]["w"]
    return jnp.tanh(x @ params["c"]["w"])


def test_stage_by_stage_with_drift_and_taken_up_again(tmp_path):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"a": (16, 24), "b": (24, 16), "c": (16, 12)}
    pairs = zip(keys, shapes.items(), strict=False)
    params = {name: {"w": jax.random.normal(k, s) / 4} for k, (name, s) in pairs}
    batches = [jax.random.normal(keys[3], (64, 16)) @ jnp.tri(16)]
    weights = jq.find_weights(network, params, batches[0])

    def run(rounding, **more):
        plan = jq.plan(weights, {".*": jq.Scheme(Uniform(2), 8, rounding)})
        return jq.quantize(network, params, plan, batches, sequential="weight", **more)

    plain, polished = GPTQ(correction="qep"), Polish(GPTQ(correction="qep"))
    q, report = run(polished, work_dir=tmp_path)
    assert all("Polish(GPTQ)" in describe(row.scheme) for row in report.values())
    again, _ = run(polished, work_dir=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, q, again)
    with pytest.raises(jq.errors.WorkDirError, match="the plan changed"):
        run(Polish(GPTQ(correction="qep"), rounds=2), work_dir=tmp_path)
    full = network(params, batches[0])

    def off(q):
        return float(jnp.mean((jq.apply(network)(q, batches[0]) - full) ** 2))

    assert off(q) < off(run(plain)[0])
    with pytest.raises(PlanError, match=r"Polish\(Stochastic\) is random"):
        run(Polish(Stochastic()))


def test_files_hold_what_was_polished(tmp_path):
    w, moment = layer(12, 40)

    def fn(p, x):
        return x @ p["w"].T

    weights = jq.find_weights(fn, {"w": w}, jnp.ones((1, 40)))
    plan = jq.plan(weights, {"w": jq.Scheme(Uniform(3, scale_dtype="bfloat16"), 8, Polish())})
    evidence = {"w": jq.Evidence(moment, jnp.float32(120))}
    q, _ = jq.quantize(fn, {"w": w}, plan, evidence=evidence)
    jq.save(tmp_path / "q.safetensors", q)
    jax.tree.map(np.testing.assert_array_equal, q, jq.load(tmp_path / "q.safetensors"))
