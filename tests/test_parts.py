"""A third part of a weight, and a kernel of one's own: all that is needed stands in this file.

`Scaled` gives each input channel a scale before it is rounded, as SmoothQuant does. No module of
jquant knows of it: a scheme names the choice, the protocols in `weights/parts.py` do the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_io import assert_same
from test_lorc_apply import SPLIT, W, close, heads, looked_up_only, plain, scanned, tied, transposed

import jquant as jq
from jquant import Activations, LoRC
from jquant.errors import CheckpointError, TreeError
from jquant.grids import Uniform
from jquant.inference import kernels
from jquant.inference.kernels import Row
from jquant.io import tree
from jquant.jobs.report import describe
from jquant.rounding import GPTQ
from jquant.weights.activations import rounded
from jquant.weights.parts import Choice, Part, Transform
from jquant.weights.qtensor import canonical_weight, weight_bits
from tests.functions import CASES, _normal

X = _normal(9, 7, 20) * jnp.exp(_normal(8, 20))
BYTES = Uniform(8, symmetric=True, convention="S3")
pytestmark = pytest.mark.filterwarnings("ignore:.*rank deficient")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaled:
    """The weight is what is stored times a scale for each input channel, `[*batch, in]`."""

    scale: jax.Array
    alters = False
    rank = 0

    def weight(self, values: jax.Array) -> jax.Array:
        return values * (self.scale[..., None, :] if self.scale.ndim < values.ndim else self.scale)

    def rows(self, x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) * self.scale[..., None, :]

    def factors(self) -> Any:
        raise AssertionError("none")

    def picked(self, pick: Callable[[jax.Array], jax.Array]) -> Part:
        return self

    def array_bits(self) -> list[float]:
        return [float(self.scale.size * jnp.finfo(self.scale.dtype).bits)]

    def check(self, whole: Any) -> None:
        if whole is not None and self.scale.shape != (
            *whole.codes.shape[:-2],
            *whole.codes.shape[-1:],
        ):
            raise ValueError("its scales do not fit")


@jax.tree_util.register_static
@dataclass(frozen=True)
class Smooth:
    """The largest magnitude of each input channel of the weight, to a power, as its scale."""

    power: float = 0.5
    needs = frozenset()
    papers = ("xiao2023smoothquant",)

    @property
    def label(self) -> str:
        return f"smooth {self.power}"

    def check(self, grid: Any, groups: Any) -> None:
        pass

    def apart(self, w: jax.Array, evidence: Any) -> tuple[Part, jax.Array, Any]:
        scale = jnp.max(jnp.abs(w), axis=-2).astype(jnp.float32) ** self.power
        if evidence is not None:
            turned = {"total": None, "spread": None, "drift": None}
            moment = evidence.second_moment * scale[..., :, None] * scale[..., None, :]
            most = None if evidence.abs_max is None else evidence.abs_max * scale
            evidence = dataclasses.replace(evidence, second_moment=moment, abs_max=most, **turned)
        return Scaled(scale), w / scale[..., None, :], evidence


def quantized(fn: Any, params: Any, x: Any, scheme: jq.Scheme, batches: Any = None) -> Any:
    weights = jq.find_weights(fn, params, x)
    return jq.quantize(fn, params, jq.plan(weights, {".*": scheme}), batches)


def params_of(fn: Any) -> Any:
    return {name: w for name, w in W.items() if (name == "w") != (fn is heads)}


SMOOTH = jq.Scheme(Uniform(3), 6, transforms=(Smooth(),))


def test_they_are_what_the_protocols_ask_for() -> None:
    assert isinstance(Smooth(), Transform) and isinstance(Scaled(jnp.ones(3)), Part)
    assert all(isinstance(one, Choice) for one in (Smooth(), LoRC(1), Activations(BYTES)))
    q = jq.quantize_weight(
        W["w"][0],
        dataclasses.replace(SMOOTH, compensation=LoRC(2), activations=Activations(BYTES)),
        jq.Layout.of((20, 12), in_axes=(0,)),
    )[0]
    assert [type(part).__name__ for part in q.parts] == ["Inputs", "LowRank", "Scaled"]
    assert all(isinstance(part, Part) for part in q.parts)
    with pytest.raises(ValueError, match=r"Scheme\.transforms must be a tuple of transforms"):
        jq.Scheme(Uniform(4), transforms=(Uniform(4),))  # type: ignore[arg-type]
    assert "transforms" not in repr(jq.Scheme(Uniform(4))) and "Smooth" in repr(SMOOTH)


@pytest.mark.parametrize("fn", [*SPLIT, tied, looked_up_only], ids=lambda fn: fn.__name__)
def test_apply_equals_the_function_of_dequantized_parameters(fn: Any) -> None:
    q, _ = quantized(fn, params_of(fn), X, SMOOTH)
    expected, got = fn(jq.dequantize(q), X), jq.apply(fn)(q, X)
    bare = jq.tree_map_weights(lambda q: dataclasses.replace(q, transforms=()), q)
    assert not np.allclose(expected, fn(jq.dequantize(bare), X), atol=1e-2)
    much = 3e-2 if got.dtype == jnp.bfloat16 or fn.__name__ == "bfloat" else 1e-5
    np.testing.assert_allclose(got, expected, rtol=0, atol=much * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("name", ["conv-grouped-strided", "views", "ragged-dot"])
def test_where_products_cannot_see_it_the_weight_is_decoded_with_it(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    scheme = jq.Scheme(Uniform(4), 3, transforms=(Smooth(), Smooth(0.25)))
    q, _ = quantized(case.fn, case.params, case.batches[0], scheme)
    close(jq.apply(case.fn)(q, case.batches[0]), case.fn(jq.dequantize(q), case.batches[0]))


@pytest.mark.parametrize("turned", [False, True])
def test_inputs_are_rounded_and_terms_meet_them_after_it(turned: bool) -> None:
    """x → x · scale; of that a term sees all, and codes what rounding leaves."""
    scheme = jq.Scheme(
        Uniform(4), None, GPTQ(), LoRC(3), Activations(BYTES), transforms=(Smooth(),)
    )
    fn = (lambda p, x: (p["w"].T @ x.T).T) if turned else (lambda p, x: x @ p["w"])
    q, report = quantized(fn, {"w": W["w"][0]}, X, scheme, [X])
    one = q["w"]
    seen = X * one.transforms[0].scale
    left, right = one.compensation.factors()
    codes = canonical_weight(one.only(lambda part: False))
    expected = rounded(seen, one.activations.choice, None) @ codes.T + seen @ right.T @ left.T
    got = jq.apply(fn)(q, X)
    np.testing.assert_allclose(got, expected, atol=1e-5 * float(jnp.abs(expected).max()))
    assert report["w"].error < 0.02
    assert describe(scheme).endswith("GPTQ, LoRC 3, inputs Uniform 8b token, smooth 0.5")


def test_layers_are_joined_bits_counted_and_slices_sliced() -> None:
    scheme = dataclasses.replace(SMOOTH, rounding=GPTQ())
    q, report = quantized(scanned, {"w": W["w"]}, X, scheme, [X])
    bare = dataclasses.replace(q["w"], transforms=())
    assert q["w"].transforms[0].scale.shape == (3, 20)
    assert weight_bits(q["w"]) == weight_bits(bare) + 32 / 12 == report["w"].bits_per_weight
    layer = jax.tree.map(lambda leaf: leaf[1], q)
    close(jq.dequantize(layer)["w"], jq.dequantize(q)["w"][1])
    close(jq.apply(scanned)(q, X), scanned(jq.dequantize(q), X))
    # Errors are those of outputs, in whatever scale the weights are rounded.
    first, codes = np.asarray(X, np.float64), np.asarray(jq.dequantize(q)["w"], np.float64)
    lost = np.sum((first @ (codes[0] - np.asarray(W["w"][0]))) ** 2)
    assert lost < 0.2 * np.sum((first @ np.asarray(W["w"][0])) ** 2)


def test_files_hold_what_their_table_names(tmp_path: Path, monkeypatch: Any) -> None:
    q, _ = quantized(plain, {"w": W["w"]}, X, SMOOTH)
    with pytest.raises(TreeError, match="parts of the class Scaled are not stored"):
        jq.save(tmp_path / "w", q)
    monkeypatch.setitem(tree.NODES, "Scaled", Scaled)
    jq.save(tmp_path / "w", q)
    assert_same(jq.load(tmp_path / "w"), q)
    wrong = dataclasses.replace(q["w"], transforms=(Scaled(jnp.ones(20)),))
    jq.save(tmp_path / "x", {"w": wrong})
    with pytest.raises(CheckpointError, match="its scales do not fit"):
        jq.load(tmp_path / "x")


def test_a_kernel_is_a_row_of_the_table(monkeypatch: Any) -> None:
    """Of weights in groups whose inputs are as they are, on a platform of its own."""
    seen: list[Any] = []

    def kernel(rows: jax.Array, q: jq.QTensor) -> jax.Array:
        seen.append((rows.shape, q.parts))
        return 2.0 * rows @ jnp.swapaxes(canonical_weight(q), -1, -2)

    def runs(fn: Any, q: Any) -> Any:
        return jq.apply(lambda p, x: fn(p, x))(q, X)

    q, _ = quantized(transposed, {"w": W["w"]}, X, SMOOTH)
    expected = transposed(jq.dequantize(q), X)
    table = kernels.TABLE
    for platforms, times in (((), 2.0), (("tpu", "cpu"), 2.0), (("cuda",), 1.0)):
        row = Row(None, (Uniform,), "in", kernel, platforms=platforms)
        monkeypatch.setattr(kernels, "TABLE", (row, *table))
        close(runs(transposed, q), times * expected)
        assert {(shape, parts) for shape, parts in seen} == {((7, 20), ())}
    row = Row(None, (Uniform,), "in", kernel, fits=lambda q, operand: False)
    monkeypatch.setattr(kernels, "TABLE", (row,))
    close(runs(transposed, q), expected)
