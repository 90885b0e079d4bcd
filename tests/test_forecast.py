"""What a job takes on a mesh, on paper: against what lies so, and programs compiled for it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jquant as jq
from jquant.app import cli
from jquant.calibration.evidence import Evidence
from jquant.errors import PlanError
from jquant.jobs.forecast import forecast

many = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


def network(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["up"]) @ p["down"]


PARAMS = {"up": jnp.ones((16, 32)), "down": jnp.ones((32, 16))}
BATCHES = [jnp.ones((64, 16)), jnp.ones((64, 16))]


def costs(mesh: dict[str, int], scheme: Any = None) -> Any:
    plan = jq.plan(
        jq.find_weights(network, PARAMS, BATCHES[0]), {".*": scheme or jq.presets.int4_gptq(8)}
    )
    return forecast(network, PARAMS, plan, BATCHES, mesh=mesh)


def test_terms_of_a_mesh() -> None:
    one, eight = costs({}), costs({"data": 2, "model": 4})
    assert one.stages == eight.stages == (("up",), ("down",))
    for costs_, devices in ((one, 1), (eight, 8)):
        assert costs_.flops["rounding"] == 2 * 16 * 32 * 24 / devices  # rows times inputs squared
    assert eight.device_bytes["weights of a stage"] == 2 * 4 * 16 * 32 / 4
    # On one device the first stage is the largest, by its activations; on eight the other.
    assert one.device_bytes["second moments"] == 3 * 4 * 16 * 16
    assert eight.device_bytes["second moments"] == 3 * 4 * 32 * 32
    assert one.sent_bytes == dict.fromkeys(one.sent_bytes, 0.0)
    assert eight.flops["forwards"] == one.flops["forwards"] / 8
    assert costs({}, jq.presets.int4_nearest()).flops["factors"] == 0


@many
def test_moments_send_what_paper_says() -> None:
    """An all-reduce of the second moment for each batch, and sums for each input beside it."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=NamedSharding(mesh, P("d")))
    everywhere = NamedSharding(mesh, P())
    text = jax.jit(Evidence.of, out_shardings=everywhere).lower(x).compile().as_text() or ""
    reduced = re.findall(r"f32\[([\d,]*)\][^=]*? all-reduce\(", text)
    sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in reduced]
    assert "all-gather" not in text
    assert max(sizes) == 16 * 16
    mine = costs({"data": 8}).sent_bytes["moments"]
    assert mine == 2 * 7 / 8 * 4 * (16 * 16 + 32 * 32) * len(BATCHES)


def test_refusals() -> None:
    with pytest.raises(PlanError, match="data=3"):
        costs({"data": 3})
    with pytest.raises(PlanError, match="axes data and model"):
        costs({"pipeline": 2})
    with pytest.raises(PlanError, match="the largest part is activations between stages"):
        costs({}).check(10.0)
    costs({}).check(1e9)


CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


def test_a_model_of_which_there_is_but_a_configuration(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    words = ["quantize", str(tmp_path), "-o", str(tmp_path / "out"), "--dry-run", "-q"]
    mesh = ["--mesh", "data=8,model=8", "--length", "16"]
    assert cli.run([*words, *mesh]) == 0
    told = capsys.readouterr().out
    assert "data 8 × model 8" in told and "second moments" in told
    assert cli.run([*words, *mesh, "--memory-per-device", "0.00001"]) == 1
    assert "the largest part is" in capsys.readouterr().err
    for wrong in (["--mesh", "data=8;x"], ["--mesh", "model=0"], ["--memory-per-device", "1"],
                  [*mesh, "--rates", "speed=1"]):  # fmt: skip
        assert cli.run([*words, *wrong]) == 1
        assert "--" in capsys.readouterr().err
    assert cli.run([*words[:-2], "--mesh", "data=4096"]) == 1
    assert "asks for 4096 devices" in capsys.readouterr().err
