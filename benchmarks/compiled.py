"""Products with quantized weights, compiled for accelerators that are not there.

    python -m benchmarks.compiled

XLA compiles for a GPU or a TPU that is only described. What it says then is no time: how much
memory a product takes beside its operands (a weight that is written out shows there), and of TPUs
the compiler's own estimate of seconds, by which it chooses among programs. One product of bfloat16
inputs and a weight of 4096 by 4096, in the weight's dtype, decoded (`decoded`: what the table of
kernels falls back to) and as the table has it (`kernel`).

Environments with the compilers are made under `build/compiled`, a gigabyte each. Writes
`results/compiled.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from typing import Any

from benchmarks import harness
from benchmarks.environments import ROOT, made, run

JAX = "0.10.2"
OURS = ("optax", "jaxtyping", "safetensors", "numpy")
PACKAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # and those without dependencies
    "cuda": (
        (
            f"jax=={JAX}", f"jaxlib=={JAX}", "absl-py", "nvidia-cuda-nvcc", "nvidia-nvjitlink",
            "nvidia-cuda-runtime", "nvidia-cuda-nvrtc", *OURS,
        ),
        (f"jax-cuda13-plugin=={JAX}", f"jax-cuda13-pjrt=={JAX}"),
    ),
    "tpu": ((f"jax[tpu]=={JAX}", *OURS), ()),
}  # fmt: skip
DEVICES = {"NVIDIA H200": "cuda", "TPU v5e": "tpu", "TPU v6e": "tpu"}
SETTINGS = {  # autotuning needs the device
    "cuda": {"XLA_FLAGS": "--xla_gpu_autotune_level=0"},
    "tpu": {"TPU_SKIP_MDS_QUERY": "1"},
}
H200 = """gpu_device_info {
 threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
 memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
 cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
 registers_per_block_limit: 65536
} platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
device_description_str: "NVIDIA H200" """
WIDTH, TOKENS = 4096, (1, 16, 64, 256)


def topology(device: str) -> Any:
    from jax.experimental.topologies import get_topology_desc

    if device == "NVIDIA H200":
        return get_topology_desc(platform="cuda", topology="1x1x1", target_config=H200)
    return get_topology_desc(platform="tpu", topology_name=f"{device.split()[1]}:2x2")


def rows(device: str) -> list[dict[str, Any]]:
    """What the compiler says of each product; in an environment that has it."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import jquant as jq
    from jquant.grids import Uniform
    from jquant.inference import kernels

    mesh = Mesh(np.array(topology(device).devices[:1]), ("x",))
    there = NamedSharding(mesh, PartitionSpec())
    w = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16)

    def product(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["w"]

    def compiled(fn: Any, params: Any, tokens: int) -> dict[str, Any]:
        x = jax.ShapeDtypeStruct((tokens, WIDTH), jnp.bfloat16)
        args = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there), (params, x)
        )
        program = jax.jit(fn).lower(*args).compile()
        memory, cost = program.memory_analysis(), program.cost_analysis() or {}
        assert memory is not None
        seconds = cost.get("optimal_seconds", 0)  # negative where the compiler has none
        return {
            "tokens": tokens,
            "arguments_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "estimated_seconds": seconds if 0 < seconds < 1 else None,
        }

    table, result = kernels.TABLE, []
    layout = jq.find_weights(product, {"w": w}, jnp.ones((1, WIDTH), w.dtype))["w"].layout
    grids = {
        "4 bits, signed": Uniform(4, symmetric=True),
        "4 bits": Uniform(4),
        "8 bits": Uniform(8),
    }
    for tokens in TOKENS:
        full = compiled(product, {"w": w}, tokens)
        result.append({"weight": "bfloat16", "group": 0, "way": "full", **full})
        for name, grid in grids.items():
            for group in (64, 128):
                scheme = jq.Scheme(grid, groups=group)
                q = jax.eval_shape(lambda w, s=scheme: jq.quantize_weight(w, s, layout)[0], w)
                for way in ("decoded", "kernel"):
                    kernels.TABLE = table if way == "kernel" else ()
                    row = compiled(jq.apply(lambda p, x: product(p, x)), {"w": q}, tokens)
                    result.append({"weight": name, "group": group, "way": way, **row})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=DEVICES, help="print what its compiler says, here")
    device = parser.parse_args().device
    if device is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print(json.dumps(rows(device)))
        return
    result = {}
    for device, kind in DEVICES.items():
        packages, bare = PACKAGES[kind]
        folder = ROOT / "build" / "compiled" / kind
        python = made(folder, "3.11", [*packages, *bare], packages, bare)
        there = os.environ | SETTINGS[kind] | {"JAX_PLATFORMS": "cpu"}
        text = run([str(python), "-m", "benchmarks.compiled", "--device", device], env=there)
        result[device] = json.loads(text.strip().splitlines()[-1])
        print(device, len(result[device]), "products", flush=True)
    harness.write("compiled", width=WIDTH, rows=result)


if __name__ == "__main__":
    main()
