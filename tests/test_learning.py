"""Weights learned together, on a stage or the whole network: what is promised and refused."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import floats

import jquant as jq
from jquant.axes.groups import to_groups
from jquant.errors import EvidenceError, ObjectiveError, PlanError
from jquant.grids import Uniform
from jquant.learning.objectives import KL, MSE, Reconstruction
from jquant.rounding import NUPES, AdaRound, Descent, DiscQuant, Nearest, SignRound
from jquant.weights.qtensor import QTensor

pytestmark = pytest.mark.slow

KEY = jax.random.key(7)
SHORT = Descent(40, 0.1, checks=4)
DISC = DiscQuant(rho=1.0, unit="nearest", descent=SHORT)
SIGN = SignRound(descent=Descent(40, 1 / 40, "sign_sgd", "linear", checks=4))
HERE = Path(__file__).parent


def network(blocks: int = 2, width: int = 16):
    """Residual blocks and a head of logits, with correlated inputs."""
    keys = iter(jax.random.split(jax.random.key(0), 3 * blocks + 3))
    params = {
        "blocks": [
            {
                "up": jax.random.normal(next(keys), (width, 2 * width)) / 4,
                "down": jax.random.normal(next(keys), (2 * width, width)) / 6,
            }
            for _ in range(blocks)
        ],
        "head": jax.random.normal(next(keys), (width, 8)),
    }
    mix = jnp.eye(width) + jax.random.normal(next(keys), (width, width)) / 4
    x = jax.random.normal(next(keys), (6, 32, width)) @ mix
    return params, list(x)


def fn(params, x):
    for block in params["blocks"]:
        x = x + jax.nn.relu(x @ block["up"]) @ block["down"]
    return x @ params["head"]


def planned(params, x, rounding, grid=Uniform(3), **rules):
    rules = {rf".*{name}": rule for name, rule in rules.items()}
    scheme = jq.Scheme(grid, getattr(grid, "group", None) or 8, rounding)
    return jq.plan(jq.find_weights(fn, params, x), rules | {".*": scheme})


def loss_of(qparams, params, batches, objective=KL()) -> float:
    def loss(qparams, x):
        return objective(jq.apply(fn)(qparams, x), fn(params, x), x)

    loss = jax.jit(loss)
    return float(np.mean([loss(qparams, x) for x in batches]))


@pytest.mark.parametrize("rounding", [DISC, SIGN, AdaRound(descent=SHORT)])
def test_the_whole_network_is_learned_on_kl(rounding):
    params, batches = network()
    plan = planned(params, batches[0], rounding)
    qparams, report = jq.quantize(fn, params, plan, batches, objective=KL(), key=KEY)
    nearest, _ = jq.quantize(fn, params, planned(params, batches[0], Nearest()))
    (trace,) = report.traces
    assert trace.names == tuple(plan) and len(trace.loss) == len(trace.rounded) == 40
    assert list(trace.looks) == [0, 10, 20, 30, 40] and trace.kept_at in trace.looks
    # What the trace says of rounded weights is what anyone finds.
    found = loss_of(qparams, params, batches[:4])
    np.testing.assert_allclose(found, trace.looks[trace.kept_at], rtol=1e-4)
    np.testing.assert_allclose(loss_of(nearest, params, batches[:4]), trace.looks[0], rtol=1e-4)
    assert found < 0.8 * trace.looks[0] or isinstance(rounding, AdaRound)
    assert all(row.note.startswith("of step") for row in report.values())
    json.dumps(report.to_json())


def test_codes_learned_on_the_network_are_neighbours_on_the_grid_as_fitted():
    params, batches = network()
    plan = planned(params, batches[0], DISC)
    qparams, _ = jq.quantize(fn, params, plan, batches, objective=KL(), key=KEY)
    q, w = qparams["blocks"][1]["up"], params["blocks"][1]["up"].T
    fitted = Uniform(3).fit(to_groups(w, q.groups))
    for name, leaf in floats(q.params).items():
        np.testing.assert_array_equal(leaf, floats(fitted)[name])
    lo, hi = Uniform(3).bracket(to_groups(w, q.groups), fitted)
    codes = to_groups(q.codes.astype(jnp.int32), q.groups)
    assert bool(jnp.all((codes == lo) | (codes == hi)))


def test_other_weights_are_quantized_first_and_kept_ones_stay():
    params, batches = network()
    head = jq.Scheme(Uniform(2), None, Nearest())
    plan = planned(params, batches[0], SIGN, head=head, down=jq.keep)
    qparams, report = jq.quantize(fn, params, plan, batches, objective=KL())
    assert isinstance(qparams["head"], QTensor) and qparams["head"].grid == Uniform(2)
    assert qparams["blocks"][0]["down"] is params["blocks"][0]["down"]
    assert set(report) == {"blocks/0/up", "blocks/1/up", "head"}
    assert report.kept == ("blocks/0/down", "blocks/1/down")
    assert report.traces[0].names == ("blocks/0/up", "blocks/1/up")
    assert list(report) == list(plan)
    before = dict(params, head=qparams["head"])  # what nearest rounding of the rest would give
    rest = planned(params, batches[0], Nearest(), head=jq.keep, down=jq.keep)
    nearest, _ = jq.quantize(fn, params, rest)
    nearest = dict(nearest, head=before["head"])
    np.testing.assert_allclose(
        loss_of(nearest, params, batches[:4]), report.traces[0].looks[0], rtol=1e-4
    )


@pytest.mark.parametrize("sequential", ["weight", "block"])
def test_stages_are_reconstructed_one_after_the_other(sequential):
    params, batches = network()
    plan = planned(params, batches[0], SIGN)
    qparams, report = jq.quantize(
        fn, params, plan, batches, objective=Reconstruction(), sequential=sequential
    )
    nearest, _ = jq.quantize(fn, params, planned(params, batches[0], Nearest()))
    assert [trace.names for trace in report.traces] == list(report.stages)
    assert len(report.stages) == (3 if sequential == "block" else 5)
    for trace in report.traces:
        assert trace.looks[trace.kept_at] == min(trace.looks.values())
    assert loss_of(qparams, params, batches) < 0.9 * loss_of(nearest, params, batches)


def test_a_stage_starts_from_quantized_inputs_and_aims_at_the_original():
    """The last stage's loss with rounded weights is the whole function's."""
    params, batches = network()
    plan = planned(params, batches[0], SIGN)
    qparams, report = jq.quantize(
        fn, params, plan, batches[:4], objective=Reconstruction(), sequential="block"
    )
    last = report.traces[-1]
    assert last.names == ("head",)
    found = loss_of(qparams, params, batches[:4], MSE())
    np.testing.assert_allclose(found, last.looks[last.kept_at], rtol=1e-4)


def test_distilled_stages_do_not_depend_on_each_other():
    """LKD: whatever the first block has become, the second starts from the original's values."""
    params, batches = network()
    found = {}
    for bits in (2, 6):
        for inputs in ("full", "quantized"):
            first = jq.Scheme(Uniform(bits), None, SIGN)
            plan = dict(planned(params, batches[0], SIGN))
            plan = jq.plan(
                jq.find_weights(fn, params, batches[0]),
                {"blocks/0/.*": first, "head": jq.keep, ".*": plan["blocks/1/up"]},
            )
            qparams, report = jq.quantize(
                fn, params, plan, batches[:2],
                objective=Reconstruction(inputs=inputs), sequential="block",
            )  # fmt: skip
            found[bits, inputs] = report.traces[1].loss, qparams["blocks"][1]["up"].codes
    np.testing.assert_array_equal(found[2, "full"][0], found[6, "full"][0])
    np.testing.assert_array_equal(found[2, "full"][1], found[6, "full"][1])
    assert found[2, "quantized"][0][0] != found[6, "quantized"][0][0]
    with pytest.raises(ValueError, match=r"Reconstruction\.inputs"):
        Reconstruction(inputs="student")  # type: ignore[arg-type]


def test_equal_stages_are_learned_by_one_set_of_programs(compiles):
    def count(blocks):
        params, batches = network(blocks, width=24)
        plan = planned(params, batches[0], SIGN)
        jax.clear_caches()
        with compiles() as programs:
            jq.quantize(fn, params, plan, batches, objective=Reconstruction(), sequential="block")
        return len([entry for entry in programs if "gradient" in entry])

    assert count(2) == count(3) == 2  # a block's and the head's


def test_a_custom_objective_sees_the_inputs():
    params, batches = network()
    seen = []

    def objective(found, wanted, x):
        seen.append(x.shape)
        return jnp.mean((found - wanted) ** 2)

    jq.quantize(fn, params, planned(params, batches[0], SIGN), batches, objective=objective)
    assert seen and set(seen) == {(32, 16)}


def test_an_endless_stream_of_batches_is_taken_as_far_as_needed():
    params, batches = network()
    taken = []

    def stream():
        for number in itertools.count():
            taken.append(number)
            yield batches[number % len(batches)]

    jq.quantize(fn, params, planned(params, batches[0], SIGN), stream(), objective=KL())
    assert len(taken) == SIGN.descent.steps


def test_accumulated_batches_are_one_step():
    params, batches = network()

    def steps(accumulate, data):
        descent = Descent(3, 0.1, "sgd", "constant", accumulate=accumulate, checks=1)
        rounding = DiscQuant(rho=1.0, kappa=1e9, start_at="original", descent=descent)
        plan = planned(params, batches[0], rounding)
        _, report = jq.quantize(fn, params, plan, data, objective=MSE_ABSOLUTE, key=KEY)
        return report.traces[0].loss

    once = steps(1, [jnp.concatenate(batches[:2])])
    np.testing.assert_allclose(steps(2, batches[:2]), once, rtol=2e-3)


def test_remat_changes_no_loss():
    params, batches = network()
    losses = []
    for remat in (False, True):
        rounding = DiscQuant(descent=Descent(3, 0.1, checks=1, remat=remat), start_at="original")
        plan = planned(params, batches[0], rounding)
        _, report = jq.quantize(fn, params, plan, batches, objective=KL())
        losses.append(report.traces[0].loss)
    np.testing.assert_allclose(*losses, rtol=1e-5)


def MSE_ABSOLUTE(found, wanted, x):
    return jnp.mean((found - wanted) ** 2)


def test_a_learning_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    params, batches = network()
    plan = planned(params, batches[0], DISC, head=jq.Scheme(Uniform(4), None, Nearest()))
    wanted, report = jq.quantize(fn, params, plan, batches, objective=KL(), key=KEY)

    def stop(progress):
        if progress.doing == "learning" and progress.done == 27:
            raise KeyboardInterrupt

    again = dict(objective=KL(), key=KEY, work_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        jq.quantize(fn, params, plan, batches, progress=stop, **again)
    told = []
    qparams, resumed = jq.quantize(
        fn, params, plan, batches, progress=lambda p: told.append((p.doing, p.done)), **again
    )
    assert [done for doing, done in told if doing == "learning"][0] == 21
    assert resumed.traces == report.traces
    jax.tree.map(np.testing.assert_array_equal, floats_of(qparams), floats_of(wanted))
    with pytest.raises(jq.errors.WorkDirError, match="the plan"):
        jq.quantize(fn, params, planned(params, batches[0], DISC), batches, **again)


def floats_of(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def test_what_diverges_stops_says_so_and_keeps_the_best():
    params, batches = network()
    descent = Descent(40, 1e3, "sgd", "constant", checks=4)

    def objective(found, wanted, x):
        return jnp.where(jnp.mean(found**2) < 1e3, jnp.mean((found - wanted) ** 2), jnp.inf)

    rounding = NUPES(weight=0.0, descent=descent)
    qparams, report = jq.quantize(
        fn, params, planned(params, batches[0], rounding, Uniform(8)), batches, objective=objective
    )
    (trace,) = report.traces
    assert "not" not in trace.stopped and "smaller learning rate than 1000" in trace.stopped
    assert len(trace.loss) < 40 and trace.kept_at in trace.looks
    assert loss_of(qparams, params, batches[:4], MSE_ABSOLUTE) <= trace.looks[0] * 1.001


def test_objectives_that_cannot_be_descended_are_refused():
    params, batches = network()
    plan = planned(params, batches[0], SIGN)
    with pytest.raises(ObjectiveError, match="objective is nan"):
        jq.quantize(fn, params, plan, batches, objective=lambda a, b, x: jnp.mean(a) * jnp.nan)
    with pytest.raises(ObjectiveError, match="no gradient with respect to 'head'"):
        jq.quantize(without_head, params, plan, batches, objective=MSE())
    with pytest.raises(PlanError, match="must be a function"):
        jq.quantize(fn, params, plan, batches, objective="kl")
    with pytest.raises(PlanError, match="no scheme of the plan has a rounding that is learned"):
        nearest = planned(params, batches[0], Nearest())
        jq.quantize(fn, params, nearest, batches, objective=KL())
    with pytest.raises(PlanError, match="'head' and 'blocks/0/down' .* pass one rounding"):
        other = planned(params, batches[0], SIGN, head=jq.Scheme(Uniform(3), 8, DISC))
        jq.quantize(fn, params, other, batches, objective=KL(), key=KEY)
    with pytest.raises(PlanError, match=r"'head' is learned together .* pass LoRC\(rank\)"):
        again = jq.Scheme(Uniform(3), 8, SIGN, compensation=jq.LoRC(2, rounds=2))
        jq.quantize(
            fn, params, planned(params, batches[0], SIGN, head=again), batches, objective=KL()
        )
    with pytest.raises(PlanError, match="starts at random; pass key"):
        jq.quantize(fn, params, planned(params, batches[0], DISC), batches, objective=KL())
    with pytest.raises(EvidenceError, match="descended on batches"):
        jq.quantize(fn, params, plan, objective=KL())
    with pytest.raises(EvidenceError, match="got no batches"):
        jq.quantize(fn, params, plan, [], objective=KL())
    with pytest.raises(PlanError, match="needs stages"):
        jq.quantize(fn, params, plan, batches, objective=Reconstruction(), sequential=None)


def without_head(params, x):
    return fn(dict(params, head=jax.lax.stop_gradient(params["head"])), x)


SHARDED = """
import sys; sys.path.insert(0, {here!r})
import jax, numpy as np, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import jquant as jq
from test_learning import KEY, DISC, KL, fn, network, planned
params, batches = network(1, width=32)
plan = planned(params, batches[0], DISC)
alone, _ = jq.quantize(fn, params, plan, batches, objective=KL(), key=KEY)
mesh = jax.make_mesh((8,), ("shards",), axis_types=(jax.sharding.AxisType.Auto,))
split = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("shards"))), params)
data = [jax.device_put(x, NamedSharding(mesh, P("shards"))) for x in batches]
together, report = jq.quantize(fn, split, plan, data, objective=KL(), key=KEY)
codes = [np.asarray(q.codes).astype(int) for q in jax.tree.leaves(
    together, is_leaf=lambda x: isinstance(x, jq.QTensor))]
wanted = [np.asarray(q.codes).astype(int) for q in jax.tree.leaves(
    alone, is_leaf=lambda x: isinstance(x, jq.QTensor))]
same = np.mean([np.mean(a == b) for a, b in zip(codes, wanted)])
q = together["blocks"][0]["up"].codes
print("same", same, "devices", len(q.sharding.device_set), q.sharding.is_fully_replicated)
"""


def test_eight_devices_learn_what_one_does():
    """Sums come in another order, so a weight half-way between two codes may fall the other way."""
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED.format(here=str(HERE))],
        capture_output=True, text=True, check=False, cwd=HERE.parent,
        env={**dict(__import__("os").environ), **environment, "PYTHONPATH": str(HERE.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    _, same, _, devices, replicated = done.stdout.split()
    assert float(same) > 0.98 and int(devices) == 8 and replicated == "False"
