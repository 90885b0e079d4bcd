"""One of two processes of a job: `python tests/two_processes.py PORT ID FOLDER MODE`.

Each has two devices that the host pretends to be, and holds its parts of parameters and batches.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jquant as jq


def network(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["up"]) @ p["down"]


def made() -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    params = {
        "up": rng.normal(size=(16, 32)).astype(np.float32) / 4,
        "down": rng.normal(size=(32, 16)).astype(np.float32) / 6,
    }
    return params, [rng.normal(size=(64, 16)).astype(np.float32) for _ in range(2)]


def job(params: Any, batches: Any, scheme: Any = None, **options: Any) -> Any:
    scheme = jq.presets.int4_gptq(8) if scheme is None else scheme
    plan = jq.plan(jq.find_weights(network, params, batches[0]), {".*": scheme})
    return jq.quantize(network, params, plan, batches, **options)[0]


def main(port: str, process: int, folder: Path, mode: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def put(x: np.ndarray, spec: P) -> jax.Array:
        at = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, at, lambda index: x[index])

    params, batches = made()
    specs = {"up": P("d", "m"), "down": P("m", "d")}
    params = {name: put(x, specs[name]) for name, x in params.items()}
    batches = [put(x, P("d")) for x in batches]
    if mode == "batches" and process:
        batches = batches[:1]
    scheme = jq.presets.int4_gptq(16) if mode == "plan" and process else None
    work = folder / f"work-{process}" if mode == "folders" else folder / "work"
    try:
        qparams = job(params, batches, scheme, work_dir=work)
    except ValueError as error:
        print(type(error).__name__, error, flush=True)
        return
    assert not qparams["up"].codes.is_fully_addressable
    assert qparams["up"].codes.sharding.spec == P("m", "d")
    again = job(params, batches, work_dir=work)  # from records
    assert again["down"].codes.sharding == qparams["down"].codes.sharding
    jq.save(folder / "saved", qparams)
    shardings = {".*": NamedSharding(mesh, P("d"))}
    back = jq.load(folder / "saved", shardings=shardings)
    assert back["up"].codes.sharding.spec[-1] == "d"
    print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
