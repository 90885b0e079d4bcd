"""Other people's switches: JAX's strictest settings change no result, and no type.

A few tests run with all others. The whole of it is a leg of `.ci/run`, as it compiles everything
once more for every switch, on eight devices that the host pretends to be:

    export SWITCHES=all XLA_FLAGS=--xla_force_host_platform_device_count=8
    ./run tests tests/test_switches.py
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import BLOCKS, GRIDS, ROUNDINGS

import jquant as jq
from jquant.blocks import Blocks, Layout
from jquant.calibration.evidence import Evidence
from jquant.qtensor import dequantize_weight
from jquant.rounding import GPTQ, Nearest
from jquant.scheme import Scheme
from jquant.solve import quantize_weight

ALL = os.environ.get("SWITCHES") == "all"
slow = pytest.mark.skipif(not ALL, reason="a leg of .ci/run: SWITCHES=all")

Context = Callable[[], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def strictest() -> Iterator[None]:
    """All switches that can be seen from types alone."""
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        yield


# Types: everything is traced, nothing compiled.

IN, SHAPE = Blocks("in", 8), (2, 8, 20)
ACTIVATIONS = {
    "token": jq.Activations(jq.grids.Uniform(8)),
    "static": jq.Activations(jq.grids.Uniform(8), granularity="static"),
    "percentile": jq.Activations(
        jq.grids.Uniform(8), granularity="static", range=jq.activations.Percentile(99.0)
    ),
    "mse": jq.Activations(jq.grids.Uniform(8), granularity="static", range=jq.grids.MSE()),
}
SCHEMES: dict[str, Scheme] = {
    **{f"nearest {name}": Scheme(grid, IN) for name, grid in GRIDS.items()},
    **{
        f"{name} {blocks}": Scheme(GRIDS["A1-4"], BLOCKS[blocks][1], rounding)
        for name, rounding in ROUNDINGS.items()
        for blocks in (BLOCKS if ALL else ["in-8"])
    },
    "gptq out": Scheme(GRIDS["A1-4"], Blocks("out", 4), ROUNDINGS["gptq-dynamic"]),
    "qep": Scheme(GRIDS["A1-4"], IN, GPTQ(correction="qep")),
    "gptaq": Scheme(GRIDS["A1-4"], IN, GPTQ(correction="gptaq")),
    "gptq power": Scheme(GRIDS["power-3-groups"], IN, GPTQ()),
    "low rank": Scheme(GRIDS["A1-4"], IN, GPTQ(), compensation=jq.LoRC(2)),
    **{
        f"inputs {name}": Scheme(GRIDS["A1-4"], IN, Nearest(), activations=choice)
        for name, choice in ACTIVATIONS.items()
    },
}


FEW = (
    "nearest A1-4-mse", "nearest A4-4-hqq", "nearest nf4", "nearest kmeans-4", "gptq-dynamic in-8",
    "nearest power-3-groups", "discquant in-8", "gptaq", "low rank", "inputs mse",
)  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES if ALL else FEW)
def test_strict_switches_change_no_type(name: str) -> None:
    """64-bit types that nobody asked for, promoted ranks and dtypes: of all grids and roundings."""

    def solved(w: Any, x: Any, full: Any, key: Any) -> Any:
        evidence = Evidence.of(x, full=full, spread=True)
        layout = Layout.of(SHAPE, in_axes=(2,), batch_axes=(0,))
        evidence = evidence.merge(evidence)
        q, info = quantize_weight(w, SCHEMES[name], layout, evidence=evidence, key=key)
        return q, info, dequantize_weight(q), evidence

    def types() -> list[Any]:
        jax.clear_caches()  # inner programs are traced once per process otherwise
        rows = jax.ShapeDtypeStruct((2, 30, 20), jnp.float32)
        w, key = jax.ShapeDtypeStruct(SHAPE, jnp.float32), jax.random.key(0)
        return [
            (x.shape, x.dtype) for x in jax.tree.leaves(jax.eval_shape(solved, w, rows, rows, key))
        ]

    wanted = types()
    with strictest():
        assert types() == wanted
