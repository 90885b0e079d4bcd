"""Rotated inputs: the matrices, what a product sees, and what is known of rotated inputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_io import assert_same
from test_lorc_apply import SPLIT, W, close, looked_up_only, scanned, tied
from test_parts import BYTES, X, params_of, quantized

import jquant as jq
from jquant import Activations, Evidence, Hadamard, LoRC
from jquant.errors import CheckpointError, PlanError
from jquant.grids import MX, Uniform
from jquant.jobs.report import describe
from jquant.numerics.hadamard import by_hadamard, hadamard, has_hadamard
from jquant.rounding import GPTQ
from jquant.weights.rotated import Rotated, signs
from tests.functions import CASES, _normal

pytestmark = pytest.mark.filterwarnings("ignore:.*rank deficient")
ROTATED = jq.Scheme(Uniform(3), 5, transforms=(Hadamard(),))


def matrix(width: int, block: int, seed: int | None = 0) -> np.ndarray:
    """R, written out."""
    blocks = np.kron(np.eye(width // block), hadamard(block) / np.sqrt(block))
    return blocks if seed is None else blocks * signs(seed, width)


def test_rows_of_hadamard_matrices_are_orthogonal() -> None:
    orders = [n for n in range(1, 257) if has_hadamard(n)]
    for n in orders:
        h = hadamard(n).astype(int)
        assert (np.abs(h) == 1).all() and (h @ h.T == n * np.eye(n)).all(), n
    assert [n for n in range(4, 257, 4) if n not in orders] == [156, 188, 236, 244]
    widths = [576, 768, 1536, 2560, 3072, 5120, 8192, 11008, 13824, 14336, 17408, 18944, 28672]
    assert all(has_hadamard(n) for n in widths)


@pytest.mark.parametrize("n", [2, 12, 40, 192, 576])
def test_a_product_of_factors_is_the_matrix(n: int) -> None:
    x = _normal(0, 3, 2 * n)
    np.testing.assert_allclose(by_hadamard(x, n), x @ matrix(2 * n, n, None).T, atol=2e-5)
    np.testing.assert_allclose(by_hadamard(by_hadamard(x, n), n, transposed=True), x, atol=2e-6)


@pytest.mark.parametrize("fn", [*SPLIT, tied, looked_up_only], ids=lambda fn: fn.__name__)
def test_apply_equals_the_function_of_dequantized_parameters(fn: Any) -> None:
    q, _ = quantized(fn, params_of(fn), X, ROTATED)
    expected, got = fn(jq.dequantize(q), X), jq.apply(fn)(q, X)
    much = 3e-2 if got.dtype == jnp.bfloat16 or fn.__name__ == "bfloat" else 1e-5
    np.testing.assert_allclose(got, expected, rtol=0, atol=much * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("name", ["conv-grouped-strided", "views", "ragged-dot"])
def test_where_products_cannot_see_it_the_weight_is_rotated_back(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    scheme = jq.Scheme(Uniform(4), 3, transforms=(Hadamard(2), Hadamard(2, seed=1)))
    q, _ = quantized(case.fn, case.params, case.batches[0], scheme)
    close(jq.apply(case.fn)(q, case.batches[0]), case.fn(jq.dequantize(q), case.batches[0]))


@pytest.mark.parametrize("seed", [0, None, 2**63 - 1])
def test_what_is_rounded_is_the_rotated_weight_with_its_inputs(seed: int | None) -> None:
    """Codes, target and all of QEP are those of the problem written out in rotated coordinates."""
    w, r = W["w"][0].T, matrix(20, 20, seed)
    evidence = Evidence.of(X, full=X + X @ jnp.eye(20, k=1))
    scheme = jq.Scheme(Uniform(3), 5, GPTQ(correction="qep"), transforms=(Hadamard(20, seed),))
    q, _ = jq.quantize_weight(w, scheme, jq.Layout.of(w.shape, in_axes=(1,)), evidence=evidence)
    turned = Evidence.of(X @ r.T, full=(X + X @ jnp.eye(20, k=1)) @ r.T)
    plain = dataclasses.replace(scheme, transforms=())
    expected, _ = jq.quantize_weight(
        jnp.asarray(w @ r.T, jnp.float32), plain, jq.Layout.of(w.shape, in_axes=(1,)),
        evidence=turned,
    )  # fmt: skip
    assert np.mean(np.asarray(q.codes != expected.codes)) < 0.02  # a sum's last bit
    np.testing.assert_allclose(q.params["scale"], expected.params["scale"], rtol=1e-4)
    np.testing.assert_allclose(jq.dequantize(q), jq.dequantize(expected) @ r, atol=1e-4)


def test_it_takes_the_sting_out_of_a_large_channel() -> None:
    w = _normal(1, 48, 96).at[:, 7].mul(30.0)
    layout = jq.Layout.of(w.shape, in_axes=(1,))
    errors = {
        turn: float(jnp.sum((jq.dequantize(jq.quantize_weight(
            w, jq.Scheme(Uniform(4), transforms=turn), layout)[0]) - w) ** 2))
        for turn in ((), (Hadamard(),))
    }  # fmt: skip
    assert errors[Hadamard(),] < 0.2 * errors[()]


def test_it_goes_with_all_other_parts_through_stacks_and_files(tmp_path: Path) -> None:
    scheme = jq.Scheme(
        MX(), None, GPTQ(), LoRC(3), Activations(BYTES), transforms=(Hadamard(4, None),)
    )
    q, report = quantized(scanned, {"w": W["w"]}, X, scheme, [X])
    assert describe(scheme).endswith("Hadamard 4") and report["w"].error < 0.1
    jq.save(tmp_path / "w", q)
    assert_same(jq.load(tmp_path / "w"), q)
    exact = dataclasses.replace(scheme, activations=None)
    q, _ = quantized(scanned, {"w": W["w"]}, X, exact, [X])
    close(jq.apply(scanned)(q, X), scanned(jq.dequantize(q), X))


def test_stage_by_stage_it_makes_up_for_drift() -> None:
    params = {"a": _normal(2, 20, 24) / 4, "b": _normal(3, 24, 4) / 4}

    def fn(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["a"]) @ p["b"]

    scheme = jq.Scheme(Uniform(3), 4, GPTQ(correction="qep"), transforms=(Hadamard(),))
    plan = jq.plan(jq.find_weights(fn, params, X[0]), {".*": scheme})
    q, report = jq.quantize(fn, params, plan, list(X))
    assert all(row.ratio < 1.05 for row in report.values())
    close(jq.apply(fn)(q, X), fn(jq.dequantize(q), X))


def test_weights_that_share_an_input_share_its_rotation() -> None:
    params = {name: _normal(k, 64, 16) for k, name in enumerate("qkv")}
    x = _normal(4, 8, 64)

    def fn(p: Any, x: Any) -> Any:
        return [x @ w for w in p.values()]

    q, _ = quantized(fn, params, x, dataclasses.replace(ROTATED, groups=16))
    lowered = jax.jit(jq.apply(fn)).lower(q, x)
    text = lowered.compile().as_text() or ""
    dots = text.count(" dot(")
    assert dots <= 3 + 1, dots


def test_what_cannot_be_is_refused_before_work(tmp_path: Path) -> None:
    def fn(p: Any, x: Any) -> Any:
        return x @ p["w"]

    for width, choice, says in (
        (18, Hadamard(4), r"weight 'w': 18 inputs .* pass Hadamard\(block=\) of \[2\]"),
        (15, Hadamard(), "weight 'w': 15 inputs .* leave the rotation out"),
    ):
        params = {"w": jnp.ones((width, 4))}
        scheme = jq.Scheme(Uniform(4), transforms=(choice,))
        with pytest.raises(PlanError, match=says):
            quantized(fn, params, jnp.ones((2, width)), scheme)
    for wrong in ({"block": 1}, {"block": True}, {"seed": -1}, {"seed": 2**63}):
        with pytest.raises(ValueError, match=r"Hadamard\.(block|seed) must be"):
            Hadamard(**wrong)
    static = Activations(Uniform(8, symmetric=True), granularity="static")
    scheme = jq.Scheme(Uniform(8, True), activations=static, transforms=(Hadamard(),))
    with pytest.raises(PlanError, match="weight 'w': .* are not known; pass .*granularity='token'"):
        quantized(fn, {"w": _normal(0, 8, 4)}, X[..., :8], scheme, [X[..., :8]])
    q, _ = quantized(fn, {"w": _normal(0, 20, 4)}, X, ROTATED)
    for part in (Rotated(3), Rotated(7), Rotated(0), Rotated(-2), Rotated(2**31), Rotated(4, -1)):
        jq.save(tmp_path / "w", {"w": dataclasses.replace(q["w"], transforms=(part,))})
        with pytest.raises(CheckpointError, match=r"rotation|Hadamard|blocks of"):
            jq.load(tmp_path / "w")


def test_it_is_cited() -> None:
    assert {"tseng2024quipsharp", "ashkboos2024quarot"} <= set(
        line[line.find("{") + 1 : -1] for line in jq.cite(ROTATED).splitlines() if "{" in line
    )
