"""Parameters that stay where they are: read for their stage, forgotten after it, results written.

A decoder of two layers whose leaves count: how often they are read, and how many weights are in
memory whenever one is read or something is done. `benchmarks/depth.py` measures the same thing in
bytes, on decoders that no memory holds.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jquant as jq
from jquant.grids import Uniform
from jquant.models import Decoder, DecoderConfig
from jquant.rounding import GPTQ
from jquant.trees.lazy import Lazy, Window, is_lazy, realize
from jquant.trees.paths import path_of

pytestmark = pytest.mark.slow

# Heads wider than the width, so that no second moment has a kernel's shape.
CONFIG = DecoderConfig(vocab=40, width=16, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=6)
KERNELS = {(16, 24), (16, 12), (24, 16), (16, 32), (32, 16)}
STAGE = 4 * 2 * 16 * 32  # bytes of the largest: gate and up
TOKENS = [np.asarray(jax.random.randint(jax.random.key(k), (2, 20), 0, 40)) for k in range(2)]
SCHEME = jq.Scheme(Uniform(4), 8, GPTQ())


@dataclass
class Spy:
    """Makes `Lazy` leaves of arrays, and looks around whenever one is read."""

    elements: Counter[str] = field(default_factory=Counter)  # read, by path
    most: int = 0  # bytes of kernels in memory at once
    _given: list[Any] = field(default_factory=list)  # weak references to what was read
    _before: list[jax.Array] = field(default_factory=jax.live_arrays)  # other tests' arrays

    def lazy(self, path: str, array: np.ndarray) -> Lazy:
        def window(index: Window) -> np.ndarray:
            value = array[index].copy()
            self.elements[path] += value.size
            self._given.append(weakref.ref(value))
            self.look()
            return value

        return Lazy(array.shape, array.dtype, window, path)

    def look(self, *_: Any) -> None:
        """Count the kernels alive: as JAX has them, and as they were read."""
        self._given = [reference for reference in self._given if reference() is not None]
        known = set(map(id, self._before))
        live = [array for array in jax.live_arrays() if id(array) not in known]
        read = sum(value.nbytes for ref in self._given if _is_kernel(value := ref()))
        made = sum(array.nbytes for array in live if _is_kernel(array))
        self.most = max(self.most, read, made)


def _is_kernel(value: Any) -> bool:
    """Whether this is one layer's kernel, in a stack of one or not, or some of them stacked."""
    return value.dtype == np.float32 and value.shape[-2:] in KERNELS and value.ndim in (2, 3)


def _prepared(scan_layers: bool, spy: Spy) -> tuple[Decoder, Any, jq.Plan]:
    """A decoder, its lazy parameters, and a plan for its kernels."""
    fn = Decoder(CONFIG, scan_layers)
    params = jax.tree.map(np.array, fn.init(jax.random.key(0)))
    lazy = jax.tree_util.tree_map_with_path(lambda keys, x: spy.lazy(path_of(keys), x), params)
    rules = {"layers/.*kernel": SCHEME, ".*": jq.keep}
    return fn, lazy, jq.plan(jq.find_weights(fn, lazy, TOKENS[0]), rules)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["listed", "scanned"])
def test_one_stage_is_in_memory_at_a_time(scan_layers: bool, tmp_path: Path) -> None:
    spy = Spy()
    fn, params, plan = _prepared(scan_layers, spy)
    assert not spy.elements  # to find and to plan reads nothing
    spy.look()
    assert spy.most == 0
    q, report = jq.quantize(fn, params, plan, TOKENS, work_dir=tmp_path, progress=spy.look)
    assert len(report.stages) == 4 * CONFIG.layers
    assert 0 < spy.most <= STAGE

    # A planned weight is read for its evidence and to be rounded; then its codes are. Others are
    # read by the segments they are used in: one before a stage, and one in it.
    sizes = {path_of(keys): x.size for keys, x in jax.tree_util.tree_leaves_with_path(params)}
    assert {path: n / sizes[path] for path, n in spy.elements.items() if n > 2 * sizes[path]} == {}
    assert set(plan) <= spy.elements.keys()

    read = spy.elements.copy()
    leaves = jax.tree_util.tree_leaves_with_path(q, is_leaf=lambda x: isinstance(x, jq.QTensor))
    for keys, leaf in leaves:
        assert all(map(is_lazy, jax.tree.leaves(leaf))), path_of(keys)
    jq.save(tmp_path / "result", q)
    kept = {path: sizes[path] for path in sizes if path not in plan}
    assert spy.elements - read == Counter(kept)  # of the weights, only the records
    assert spy.most <= STAGE

    eager, _ = jq.quantize(fn, realize(params), plan, TOKENS)
    for found in (q, jq.load(tmp_path / "result")):
        assert jax.tree.structure(found) == jax.tree.structure(eager)
        for a, b in zip(jax.tree.leaves(realize(found)), jax.tree.leaves(eager), strict=True):
            assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
