"""A decoder on paper from a few of its blocks: as if every block had been traced."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jquant as jq
from jquant.app.paper import costs_of, weights_of
from jquant.app.sources import Model
from jquant.jobs.forecast import forecast
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder

SIZES: Any = {"vocab": 32, "width": 16, "hidden": 32, "heads": 2, "kv_heads": 1}


def model_of(layers: int, **more: Any) -> Model:
    fn = Decoder(DecoderConfig(layers=layers, **SIZES, **more))
    return Model("a folder", fn, fn.shapes)


BATCHES = [np.zeros((2, 8), np.int32)] * 3


def agree(model: Model, rules: dict[str, Any], **how: Any) -> None:
    weights = weights_of(model, BATCHES[0])
    assert weights == jq.find_weights(model.fn, model.params, BATCHES[0])
    plan = jq.plan(weights, rules)
    how = {"mesh": {"data": 2, "model": 2}, **how}
    few = costs_of(model, plan, BATCHES, **how)
    whole = forecast(model.fn, model.params, plan, BATCHES, **how)
    assert few.stages == whole.stages
    for name in ("device_bytes", "host_bytes", "flops", "sent_bytes", "hours"):
        mine, other = getattr(few, name), getattr(whole, name)
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            np.testing.assert_allclose(value, other[key], rtol=1e-9, err_msg=f"{name}, {key}")


def test_few_blocks_tell_of_all() -> None:
    agree(model_of(4), {".*kernel": jq.presets.int4_nearest(8)})


@pytest.mark.slow
def test_few_blocks_tell_of_programs() -> None:
    agree(model_of(4), {".*kernel": jq.presets.int4_qep(8)})


@pytest.mark.slow
def test_kinds_of_blocks() -> None:
    mixed = model_of(7, windows=(4, 4, 0, 4, 4, 0, 4), tied=True)
    rules = {".*kernel": jq.presets.int4_gptq(8), "layers/4/.*kernel": jq.presets.int8_nearest()}
    agree(mixed, dict(reversed(rules.items())))


@pytest.mark.slow
@pytest.mark.parametrize("sequential", ["block", None])
def test_stages_of_blocks(sequential: Any) -> None:
    rules = {"embed/.*": jq.presets.int8_nearest(), ".*kernel": jq.presets.int4_gptq(8)}
    agree(model_of(5, tied=True), rules, sequential=sequential)


def test_what_is_no_list_of_blocks_is_traced_as_it_is() -> None:
    def fn(p: Any, x: Any) -> Any:
        return x @ p["layers"]["0"]["w"]

    params = {"layers": {"0": {"w": jax.ShapeDtypeStruct((8, 4), np.float32)}}}
    model, x = Model("code", fn, params), np.zeros((4, 8), np.float32)
    weights = weights_of(model, x)
    assert list(weights) == ["layers/0/w"]
    plan = jq.plan(weights, {".*": jq.presets.int4_gptq(4)})
    assert costs_of(model, plan, [x], mesh={}) == forecast(fn, params, plan, [x], mesh={})
