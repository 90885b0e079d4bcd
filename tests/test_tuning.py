"""Scales trained under fixed codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import floats
from test_learning import SIGN, fn, loss_of, network, planned

import jquant as jq
from jquant.errors import EvidenceError, ObjectiveError, PlanError
from jquant.grids import HQQ, MX, NF4, NV, KMeans, Power, Uniform
from jquant.learning.objectives import KL, MSE
from jquant.rounding import GPTQ, Descent, Nearest
from jquant.weights.qtensor import QTensor, is_qtensor

SHORT = Descent(30, 5e-3, checks=3)
HALF = {"scale_dtype": "float16"}
GRIDS = {
    "uniform": Uniform(3, **HALF),
    "real-zero": Uniform(3, range=HQQ()),
    "power": Power(3),
    "nf4": NF4,
    "kmeans": KMeans(2, table_dtype="float16"),
}


@pytest.mark.parametrize(
    "grid",
    [
        pytest.param(grid, id=name, marks=() if name == "uniform" else pytest.mark.slow)
        for name, grid in GRIDS.items()
    ],
)
def test_codes_stay_and_the_loss_falls(grid):
    params, batches = network()
    qparams, _ = jq.quantize(fn, params, planned(params, batches[0], Nearest(), grid))
    tuned, trace = jq.tune_scales(fn, params, qparams, batches, descent=SHORT)
    assert trace.looks[trace.kept_at] < 0.97 * trace.looks[0]
    np.testing.assert_allclose(
        loss_of(tuned, params, batches[:4]), trace.looks[trace.kept_at], rtol=1e-4
    )
    pairs = [jax.tree.leaves(tree, is_leaf=is_qtensor) for tree in (qparams, tuned)]
    for before, after in zip(*pairs, strict=True):
        np.testing.assert_array_equal(np.asarray(before.codes), np.asarray(after.codes))
        assert before.grid == after.grid and before.groups == after.groups
        for name, leaf in before.params.items():
            assert after.params[name].dtype == leaf.dtype and after.params[name].shape == leaf.shape
        assert any(
            (floats(before.params)[name] != floats(after.params)[name]).any()
            for name in before.params
        )


@pytest.mark.slow
def test_it_composes_after_gptq_and_survives_a_checkpoint(tmp_path):
    params, batches = network()
    plan = planned(params, batches[0], GPTQ(), Uniform(3, **HALF), head=jq.keep)
    qparams, _ = jq.quantize(fn, params, plan, batches)
    told = []
    tuned, _ = jq.tune_scales(
        fn, params, qparams, iter(batches), descent=SHORT, progress=told.append
    )
    assert told == list(range(1, 31)) and tuned["head"] is qparams["head"]
    assert loss_of(tuned, params, batches) < loss_of(qparams, params, batches)
    jq.save(tmp_path / "q.safetensors", tuned)
    back = jq.load(tmp_path / "q.safetensors")
    assert loss_of(back, params, batches) == loss_of(tuned, params, batches)


def test_formats_with_8_bit_scales_are_left_alone():
    params, batches = network()
    plan = planned(params, batches[0], Nearest(), head=jq.Scheme(MX(), None, Nearest()))
    qparams, _ = jq.quantize(fn, params, plan)
    tuned, trace = jq.tune_scales(fn, params, qparams, batches, descent=SHORT)
    assert tuned["head"] is qparams["head"] and "head" not in trace.names
    nv, _ = jq.quantize(fn, params, planned(params, batches[0], Nearest(), NV()))
    moved, _ = jq.tune_scales(fn, params, nv, batches, descent=SHORT)
    q, after = nv["head"], moved["head"]
    assert isinstance(q, QTensor) and isinstance(after, QTensor)
    same = {name: bool(jnp.all(q.params[name] == after.params[name])) for name in q.params}
    assert sorted(same.values()) == [False, True]  # the tensor's float32 scale moves


def test_a_compensation_stays_and_counts():
    params, batches = network()
    low = jq.Scheme(Uniform(2), 8, SIGN, compensation=jq.LoRC(2))
    plan = planned(params, batches[0], SIGN, Uniform(2), head=low)
    qparams, report = jq.quantize(fn, params, plan, batches, objective=KL())
    assert report["head"].bits_per_weight > report["blocks/0/up"].bits_per_weight
    tuned, trace = jq.tune_scales(fn, params, qparams, batches, descent=SHORT)
    np.testing.assert_allclose(loss_of(qparams, params, batches[:4]), trace.looks[0], rtol=1e-4)
    np.testing.assert_array_equal(
        tuned["head"].compensation.product(), qparams["head"].compensation.product()
    )


def test_refusals():
    params, batches = network()
    with pytest.raises(PlanError, match="no quantized weight"):
        jq.tune_scales(fn, params, params, batches)
    qparams, _ = jq.quantize(fn, params, planned(params, batches[0], Nearest()))
    with pytest.raises(EvidenceError, match="got no batches"):
        jq.tune_scales(fn, params, qparams, [])
    with pytest.raises(ObjectiveError, match="objective is inf"):
        jq.tune_scales(
            fn, params, qparams, batches, objective=lambda a, b, x: jnp.inf * MSE()(a, b)
        )
