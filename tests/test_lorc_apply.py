"""Compensated weights in use: run beside, sliced, stored, joined, walked stage by stage."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_hostile_files import forge, refuse
from test_io import assert_same

import jquant as jq
from jquant import LoRC, LowRank, io
from jquant.errors import CheckpointError
from jquant.grids import Uniform
from jquant.rounding import GPTQ
from jquant.trees.lazy import realize
from jquant.weights.qtensor import QTensor, dequantize_weight, weight_bits
from tests.functions import CASES, Case, _normal
from tests.marks import covering, mostly_slow

COARSE = Uniform(2)
BYTES = Uniform(8, symmetric=True)
pytestmark = pytest.mark.filterwarnings("ignore:.*rank deficient")


def smallest(weights) -> int:
    return min(min(w.layout.size("out"), w.layout.size("in")) for w in weights.values())


def quantized(fn, params, x, choice=LoRC(2), scheme=None):
    weights = jq.find_weights(fn, params, x)
    scheme = scheme or jq.Scheme(COARSE, 3, compensation=choice)
    return jq.quantize(fn, params, jq.plan(weights, {".*": scheme}))[0]


def close(found, wanted) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-5), found, wanted)


def bare(tree):
    """The same weights without their compensation."""
    return jq.tree_map_weights(
        lambda q: (
            QTensor(q.codes, q.params, q.grid, q.groups, q.layout, q.dtype)
            if isinstance(q, QTensor)
            else q
        ),
        tree,
    )


# Equal to the function of dequantized parameters


FLOATS = ("linen-scan-remat-tied", "vmapped-experts", "views")


@pytest.mark.parametrize(
    ("grid", "case"),
    mostly_slow(
        [(BYTES, case) for case in CASES] + [(None, case) for case in CASES if case.name in FLOATS],
        lambda pair: pair[0] is BYTES,
        ids=lambda pair: f"{'codes' if pair[0] else 'floats'}-{pair[1]}",
    ),
)
def test_equals_the_function_of_dequantized_parameters(case: Case, grid) -> None:
    q = quantized(case.fn, case.params, case.batches[0], LoRC(2, grid))
    run = jax.jit(case.fn)
    wanted = run(jq.dequantize(q), case.batches[0])
    without = run(jq.dequantize(bare(q)), case.batches[0])
    assert not np.allclose(jax.tree.leaves(wanted)[0], jax.tree.leaves(without)[0], atol=1e-3)
    close(jax.jit(jq.apply(case.fn))(q, case.batches[0]), wanted)


@pytest.mark.parametrize("name", ["linen-scan-remat-tied", "vmapped-experts", "nnx-general-einsum"])
def test_under_vmap_and_grad(name) -> None:
    case = next(c for c in CASES if c.name == name)
    q = quantized(case.fn, case.params, case.batches[0])
    stacked = jnp.stack(case.batches)
    plain, full = jax.jit(case.fn), jq.dequantize(q)
    wanted = np.stack([plain(full, batch) for batch in case.batches])
    close(jax.jit(jax.vmap(jq.apply(case.fn), (None, 0)))(q, stacked), wanted)
    if jnp.issubdtype(stacked.dtype, jnp.floating):
        slope = [
            jax.jit(jax.grad(lambda x, run=run, p=p: jnp.sum(jnp.sin(run(p, x)))))(case.batches[0])
            for run, p in ((jq.apply(case.fn), q), (case.fn, jq.dequantize(q)))
        ]
        close(*slope)


def products(fn, q, x) -> list[tuple[int, ...]]:
    """The shapes of all matrix products of `apply`, in loops too."""
    found: list[tuple[int, ...]] = []

    def walk(jaxpr) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                found.append(eqn.outvars[0].aval.shape)
            for value in eqn.params.values():
                for inner in value if isinstance(value, (list, tuple)) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        walk(inner)

    walk(jax.make_jaxpr(lambda q, x: jq.apply(fn)(q, x))(q, x).jaxpr)
    return found


W = {"w": 0.3 * _normal(0, 3, 20, 12), "o": _normal(1, 2, 6, 20), "kv": _normal(2, 2, 20, 2, 6)}


def plain(p, x):
    return x @ p["w"][0]


def transposed(p, x):
    return (p["w"][0].T @ x.T).T


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, p["w"])[0]


def experts(p, x):
    return jnp.einsum("etd,edf->tef", jnp.stack([x, 2 * x, x + 1]), p["w"])


def heads(p, x):
    kv = jnp.einsum("td,kdnh->ktnh", x, p["kv"])
    return jnp.einsum("tnh,nhd->td", kv[0] * kv[1], p["o"])


def bfloat(p, x):
    y = x.astype(jnp.bfloat16) @ p["w"][1].astype(jnp.bfloat16)
    return y.astype(jnp.float32)


def tied(p, x):
    table = p["w"][2]
    return table[jnp.array([[3, 19], [0, 5]])] @ table.T @ table


def looked_up_only(p, x):
    return p["w"][2][jnp.array([3, 19, 0])] * 2.0


SPLIT = [plain, transposed, scanned, experts, heads, bfloat]


@pytest.mark.parametrize(
    ("grid", "fn"),
    covering([BYTES, None], [*SPLIT, tied, looked_up_only]),
    ids=lambda value: getattr(value, "__name__", "codes" if value else "floats"),
)
def test_all_shapes_of_products(fn, grid) -> None:
    params = {k: v for k, v in W.items() if (k == "w") != (fn is heads)}
    x = _normal(9, 7, 20)
    q = quantized(fn, params, x, LoRC(3, grid))
    wanted, found = fn(jq.dequantize(q), x), jq.apply(fn)(q, x)
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert not np.allclose(wanted, fn(jq.dequantize(bare(q)), x), atol=1e-2)
    atol = 3e-2 * float(jnp.abs(wanted).max()) if fn is bfloat else 5e-5
    np.testing.assert_allclose(found, wanted, rtol=5e-5, atol=atol)


@pytest.mark.parametrize("fn", SPLIT, ids=lambda fn: fn.__name__)
def test_the_sum_of_codes_and_factors_is_never_made(fn) -> None:
    params = {k: v for k, v in W.items() if (k == "w") != (fn is heads)}
    x = _normal(9, 7, 20)  # seven tokens: no product of tokens has the shape of a weight
    q = quantized(fn, params, x, LoRC(3))
    shapes = products(fn, q, x)
    assert len(shapes) % 3 == 0 and len(shapes) > 0
    assert not [s for s in shapes if 7 not in s], "a product without tokens makes a weight"
    assert any(3 in s for s in shapes)


def test_where_it_cannot_be_split_the_term_is_added_in() -> None:
    """Convolutions, and a product over a part of the input axis."""

    def conv(p, x):
        y = jax.lax.conv_general_dilated(
            x[None], p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return y[0] @ p["o"].reshape(12, 20) + jnp.einsum("td,ndh->tnh", x[:, :6], p["part"]).sum()

    params = {"k": _normal(0, 3, 20, 12), "o": W["o"], "part": _normal(3, 2, 6, 5)}
    x = _normal(9, 7, 20)
    q = quantized(conv, params, x, LoRC(3))
    assert not np.allclose(conv(jq.dequantize(q), x), conv(jq.dequantize(bare(q)), x), atol=1e-2)
    close(jq.apply(conv)(q, x), conv(jq.dequantize(q), x))


def test_out_of_range_rows_are_nan_with_a_term_too() -> None:
    fn = lambda p, t: p["w"].at[t].get(mode="fill")  # noqa: E731
    params, tokens = {"w": W["w"][0]}, jnp.array([3, 99])
    q = quantized(fn, params, tokens, LoRC(2))
    found = jq.apply(fn)(q, tokens)
    assert np.isnan(found[1]).all()
    close(found[0], jq.dequantize(q)["w"][3])


def test_a_second_call_compiles_nothing(compiles) -> None:
    x = _normal(9, 7, 20)
    q = quantized(scanned, {"w": W["w"]}, x)
    other = x + 1
    jq.apply(scanned)(q, x)
    with compiles() as log:
        jq.apply(scanned)(q, other)
    assert log == []


def test_decoding_waits_for_terms_as_for_codes() -> None:
    """Sixteen unrolled layers, each a view that cannot split, may not all be decoded at once."""
    sizes = []
    for layers in (4, 16):
        params = [_normal(k, 256, 256) / 16 for k in range(layers)]

        def fn(params, x):
            for w in params:
                x = jnp.tanh(x @ w.reshape(2, 128, 256).reshape(256, 256))
            return x

        x = _normal(9, 8, 256)
        scheme = jq.Scheme(Uniform(4), 64, compensation=LoRC(4))
        q = quantized(fn, params, x, scheme=scheme)
        compiled = jax.jit(jq.apply(fn)).lower(q, x).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[1] - sizes[0] < 12 * 256 * 256 * 4 / 3


# Slices


@pytest.mark.parametrize("grid", [None, BYTES], ids=["floats", "codes"])
def test_a_slice_of_a_stack_is_the_stack_s_slice(grid) -> None:
    q = quantized(scanned, {"w": W["w"]}, _normal(9, 7, 20), LoRC(3, grid))
    layer = jax.tree.map(lambda leaf: leaf[1], q)
    assert layer["w"].shape == (20, 12) and layer["w"].compensation.shape == (12, 20)
    np.testing.assert_array_equal(jq.dequantize(layer)["w"], jq.dequantize(q)["w"][1])
    assert weight_bits(layer["w"]) == weight_bits(q["w"])


def test_no_compensation_is_no_leaf() -> None:
    q = quantized(plain, {"w": W["w"]}, _normal(9, 7, 20), None)["w"]
    assert len(jax.tree.leaves(q)) == 1 + len(q.params)
    again = QTensor(q.codes, q.params, q.grid, q.groups, q.layout, q.dtype)
    assert jax.tree.structure(again) == jax.tree.structure(q)


# Stages


@pytest.mark.parametrize(
    "case",  # all of them by `test_quantize`
    mostly_slow([c for c in CASES if c.name in FLOATS], lambda case: case.name == "views", ids=str),
)
def test_stages_run_on_with_the_compensated_weights(case: Case, tmp_path: Path) -> None:
    """And their layers' factors are joined; a job with a work directory gives the same bits."""
    weights = jq.find_weights(case.fn, case.params, case.batches[0])
    choice = LoRC(min(2, smallest(weights)), BYTES, metric="hessian")
    plan = jq.plan(weights, {".*": jq.Scheme(Uniform(3), 4, GPTQ(), choice, fallback=True)})
    q, report = jq.quantize(case.fn, case.params, plan, case.batches)
    for path, row in report.items():
        assert 0 <= row.error < 0.5, path
    kept, _ = jq.quantize(case.fn, case.params, plan, case.batches, work_dir=tmp_path)
    assert_same(realize(kept), q)


def test_what_comes_later_is_calibrated_on_compensated_weights() -> None:
    """With the whole rank in the first layer, the second sees the inputs of the full network."""
    params = {"a": _normal(0, 8, 12) / 3, "b": _normal(1, 12, 6)}
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    x = _normal(2, 64, 8)
    weights = jq.find_weights(fn, params, x)
    last = jq.Scheme(Uniform(3), 4, GPTQ())
    exact = jq.Scheme(COARSE, None, compensation=LoRC(8, dtype="float32"))
    found = {}
    for name, first in (("exact", exact), ("coarse", jq.Scheme(COARSE)), ("kept", jq.keep)):
        plan = jq.plan(weights, {"a": first, "b": last})
        found[name] = jq.quantize(fn, params, plan, [x])[1]["b"].error
    assert found["exact"] == pytest.approx(found["kept"], rel=1e-3)
    assert found["coarse"] != pytest.approx(found["kept"], rel=1e-2)


def test_the_report_counts_and_names_it() -> None:
    q = quantized(plain, {"w": W["w"]}, _normal(9, 7, 20))
    x, params = _normal(9, 7, 20), {"w": W["w"]}
    weights = jq.find_weights(plain, params, x)
    plan = jq.plan(weights, {"w": jq.Scheme(COARSE, 3, compensation=LoRC(2))})
    _, report = jq.quantize(plain, params, plan)
    assert report["w"].bits_per_weight == weight_bits(q["w"])
    assert jq.report.describe(plan["w"]) == "Uniform 2b, in 3, Nearest, LoRC 2"
    left = np.asarray(W["w"]) - np.asarray(jq.dequantize(q)["w"])
    wanted = np.sum(left**2) / np.sum(np.asarray(W["w"]) ** 2)
    assert report["w"].error == pytest.approx(wanted, rel=1e-4)
    assert jq.estimate(plain, params, plan).result_bytes == pytest.approx(
        report["w"].bits_per_weight * W["w"].size / 8, abs=1
    )


# Checkpoints


@pytest.mark.parametrize(
    ("dtype", "grid"),
    [("float16", None), ("bfloat16", BYTES), ("float32", Uniform(5))],
    ids=["float16-floats", "bfloat16-bytes", "float32-5 bits"],
)
def test_a_round_trip_keeps_every_bit(grid, dtype, tmp_path: Path) -> None:
    choice = LoRC(3, grid, dtype=dtype)
    q = quantized(scanned, {"w": W["w"]}, _normal(9, 7, 20), choice)
    jq.save(tmp_path / "w", {"a": q, "b": [W["w"], q["w"]]})
    assert_same(jq.load(tmp_path / "w"), {"a": q, "b": [W["w"], q["w"]]})
    lazy = jq.load(tmp_path / "w", lazy=True)
    assert lazy["a"]["w"].shape == (3, 20, 12)
    assert_same(realize(lazy)["a"], q)
    assert_same(io.load_matching(tmp_path / "w", "a/w")["a/w"], q["w"])
    header = io.read_header(tmp_path / "w")
    assert header.leaves["a/w"].rank == 3 and header.leaves["b/0"].rank == 0
    tensors = header.leaves["a/w"].bytes
    assert tensors == pytest.approx(weight_bits(q["w"]) * q["w"].size / 8, abs=4)


def test_a_weight_without_a_term_is_stored_as_it_always_was(tmp_path: Path) -> None:
    q = quantized(plain, {"w": W["w"]}, _normal(9, 7, 20), None)
    jq.save(tmp_path / "w", q)
    raw = (tmp_path / "w").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    node = json.loads(header["__metadata__"]["jquant"])["tree"]["dict"][0][1]
    assert set(node["fields"]) == {"codes", "params"}


def _stored(tmp_path: Path, choice) -> bytes:
    q = quantized(plain, {"w": W["w"]}, _normal(9, 7, 20), choice)
    jq.save(tmp_path / "w", q)
    return (tmp_path / "w").read_bytes()


def test_files_that_lie_about_factors(tmp_path: Path) -> None:
    raw = _stored(tmp_path, LoRC(3, BYTES))

    def weight(body):
        return body["tree"]["dict"][0][1]["fields"]

    def swapped(header, body) -> None:
        low = weight(body)["compensation"]["fields"]
        low["left"], low["right"] = low["right"], low["left"]

    def broadcast(header, body) -> None:
        left = weight(body)["compensation"]["fields"]["left"]["fields"]["codes"]
        left["shape"] = [3, 36, 1]

    def nested(header, body) -> None:
        low = weight(body)["compensation"]["fields"]
        low["left"] = {"class": "LowRank", "static": 0, "fields": dict(low)}

    def no_term(header, body) -> None:
        fields = weight(body)
        fields["compensation"] = fields["compensation"]["fields"]["left"]

    def missing(header, body) -> None:
        del weight(body)["compensation"]["fields"]["right"]

    def dropped(header, body) -> None:
        del weight(body)["compensation"]

    def statics(header, body) -> None:
        weight(body)["compensation"]["static"] = 0

    for edit in (swapped, broadcast, nested, no_term, missing, dropped, statics):
        refuse(tmp_path / "x", forge(raw, edit))
    low = quantized(plain, {"w": W["w"]}, _normal(9, 7, 20))["w"].compensation
    q = quantized(plain, {"w": W["w"]}, _normal(9, 7, 20))["w"]
    row = dataclasses.replace(q, compensation=LowRank(low.left[:, :1], low.right))
    jq.save(tmp_path / "w", {"w": row})  # would be added to every row
    with pytest.raises(CheckpointError, match="its compensation does not fit codes"):
        jq.load(tmp_path / "w")
    ints = LowRank(low.left.astype(jnp.int32), low.right)
    jq.save(tmp_path / "w", {"low": ints})
    with pytest.raises(CheckpointError, match="factors must be floats"):
        jq.load(tmp_path / "w")


def test_orbax_restores_it(tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    q = quantized(plain, {"w": W["w"]}, _normal(9, 7, 20), LoRC(3, BYTES))
    q = jax.tree.map(lambda a: a.astype(jnp.int8) if a.dtype.name == "uint2" else a, q)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", q)
        checkpointer.wait_until_finished()
        assert_same(checkpointer.restore(tmp_path / "c", q), q)


def test_dequantize_is_the_sum() -> None:
    q = quantized(plain, {"w": W["w"]}, _normal(9, 7, 20))["w"]
    left, right = (np.asarray(f, np.float64) for f in q.compensation.factors())
    term = np.swapaxes(left @ right, -1, -2)
    wanted = np.asarray(dequantize_weight(bare(q))) + term
    np.testing.assert_allclose(dequantize_weight(q), wanted, atol=1e-6)
