"""What quantizing models takes that this machine could not hold: on paper, from configurations.

python -m benchmarks.paper      # seconds; results/paper.json
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import write
from jquant.app.devices import Devices
from jquant.app.paper import costs_of, on_paper, weights_of
from jquant.app.recipes import plan_of
from jquant.schemes.presets import named

MESH, RECIPE, LENGTH = "data=8,model=8", "int4-qep", 2048
_LLAMA: dict[str, Any] = {
    "model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 500000.0,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "vocab_size": 128256,
    "num_key_value_heads": 8,
}  # fmt: skip
# The published sizes of Llama 3 and 3.1 (arXiv:2407.21783, table 3).
MODELS: dict[str, dict[str, int]] = {
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
             "num_attention_heads": 128},
}  # fmt: skip


def costs(sizes: dict[str, int]) -> dict[str, Any]:
    start, devices = time.perf_counter(), Devices(mesh=MESH)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_LLAMA | sizes))
        model = on_paper(folder, devices.batch, LENGTH)
    assert model is not None
    batches: Any = model.batches
    plan = plan_of(weights_of(model, batches[0]), named(RECIPE, None), {}, None)
    forecast = costs_of(
        model, plan, batches, mesh=devices.axes, rates=devices.speeds, sequential="weight"
    )
    told = dataclasses.asdict(forecast) | {"stages": len(forecast.stages)}
    weights = sum(map(len, forecast.stages))
    return {**told, "weights": weights, "seconds": time.perf_counter() - start}


def main() -> None:
    settings = {"mesh": MESH, "recipe": RECIPE, "windows": 128, "length": LENGTH}
    rows = {name: costs(sizes) for name, sizes in MODELS.items()}
    write("paper", settings=settings, rates=dataclasses.asdict(Devices().speeds), rows=rows)


if __name__ == "__main__":
    main()
