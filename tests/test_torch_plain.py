"""Any PyTorch module as a function: its numbers, its names, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.errors import QuantizedWeightError, TreeError, UnsupportedPrimitiveError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("torchax")
nn = torch.nn


class Network(nn.Module):
    """Convolutions: with a stride, depthwise, in groups, of one pixel; then a linear layer."""

    def __init__(self, table: Any = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.project = nn.Conv2d(16, 16, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 5)
        self.table = torch.arange(5.0) if table is None else table  # no buffer, as many write it

    def forward(self, x: Any) -> Any:
        x = nn.functional.relu6(self.norm(self.stem(x)))
        x = self.project(self.grouped(self.depthwise(x)))
        return self.head(self.drop(x.mean((2, 3)))) + self.table


def network(table: Any = None) -> Network:
    torch.manual_seed(0)
    module = Network(table)
    with torch.no_grad():
        module.norm.running_mean.uniform_(-1, 1)
        module.norm.running_var.uniform_(0.5, 2)
    return module


def images(rows: int = 4) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, 3, 8, 8)).astype(np.float32)


def expected_of(module: Any, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return copy.deepcopy(module).eval()(torch.from_numpy(x)).numpy()


MATRICES = ["depthwise.weight", "grouped.weight", "head.weight", "project.weight", "stem.weight"]


def test_the_numbers_of_the_module_in_evaluation_mode() -> None:
    module, x = network(), images()
    fn, params = jq.models.from_torch(module)
    np.testing.assert_allclose(jax.jit(fn)(params, x), expected_of(module, x), atol=1e-5)
    own = {n: v for n, v in module.state_dict().items() if v.is_floating_point()}
    assert params.keys() == own.keys() and "norm.running_mean" in params
    assert all(np.array_equal(params[name], own[name].detach()) for name in own)
    assert fn == fn and hash(fn) == hash(fn) and fn != jq.models.from_torch(module)[0]
    # The module is as it was, and what becomes of it is its own matter.
    assert module.training and module.stem.weight.requires_grad and module.table.shape == (5,)
    before = fn(params, x)
    with torch.no_grad():
        module.stem.weight.zero_()
        module.table.zero_()
    np.testing.assert_array_equal(fn(params, x), before)


def test_every_convolution_is_found_and_quantized(tmp_path: Path) -> None:
    fn, params = jq.models.from_torch(network())
    x = images()
    weights = jq.find_weights(fn, params, x)
    assert list(weights) == MATRICES
    assert weights["depthwise.weight"].in_axes == (2, 3)
    plan = jq.plan(weights, {".*": jq.Scheme(jq.grids.Uniform(8))})
    qparams, report = jq.quantize(fn, params, plan)
    assert set(report.weights) == set(MATRICES)
    result = jq.apply(fn)(qparams, x)
    np.testing.assert_allclose(result, fn(jq.dequantize(qparams), x), atol=1e-5)
    with pytest.raises(QuantizedWeightError):
        fn(qparams, x)
    jq.save(tmp_path / "w8.safetensors", qparams)
    again = jq.load(tmp_path / "w8.safetensors")
    np.testing.assert_array_equal(jq.apply(fn)(again, x), result)
    with pytest.raises(TypeError, match=r"fn = a ModuleFunction; .* jquant\.save the parameters"):
        jq.models.save_quantized(tmp_path / "folder", fn, qparams)  # type: ignore[arg-type]
    assert not (tmp_path / "folder").exists()


@pytest.mark.slow
def test_stage_by_stage_by_gptq() -> None:
    fn, params = jq.models.from_torch(network())
    batches = [(images(),)]
    weights = jq.find_weights(fn, params, *batches[0])
    plan = jq.plan(weights, {"(stem|depthwise|grouped).*": jq.presets.int4_gptq(None)})
    qparams, report = jq.quantize(fn, params, plan, batches)
    assert report.stages == (("stem.weight",), ("depthwise.weight",), ("grouped.weight",))
    assert all(row.error < row.nearest_error for row in report.weights.values())


def test_a_module_on_the_meta_device_has_types() -> None:
    with torch.device("meta"):
        module = Network(torch.arange(5.0, device="cpu"))
    fn, shapes = jq.models.from_torch(module)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in shapes.values())
    assert list(jq.find_weights(fn, shapes, images())) == MATRICES
    _, params = jq.models.from_torch(network())
    np.testing.assert_allclose(fn(params, images()), expected_of(network(), images()), atol=1e-5)
    with pytest.raises(TreeError, match="'table' of Network is on the meta device"):
        jq.models.from_torch(Network(torch.arange(5.0, device="meta")))


class Pair(NamedTuple):
    mean: Any
    rest: Any


class Odd(nn.Module):
    """Parts of every kind: tied, of half precision, buffers of a checkpoint and of none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.second = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
        with torch.no_grad():  # numbers that bfloat16 holds
            self.first.weight.copy_(torch.arange(16.0).reshape(4, 4) / 4)
            self.first.bias.fill_(1)
        self.second.weight = self.first.weight
        self.register_buffer("offset", torch.full((4,), 2.0))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("table", torch.ones(4), persistent=False)
        self.parts = nn.ModuleList([nn.Linear(4, 2)])
        self.parts[0].power = torch.tensor([1.0, 3.0])

    def forward(self, x: Any, more: Any = None) -> Any:
        self.table += 1  # is not remembered
        half = self.second(self.first(x.bfloat16()))
        y = half.float() * self.table * self.count + self.offset
        last = self.parts[0](y) * self.parts[0].power
        return {"y": y, "more": [Pair(last, None), half], "sum": (more["a"] + more["b"],)}


def test_trees_go_in_and_come_out() -> None:
    module = Odd().eval()
    x, more = np.ones((2, 4), np.float32), {"a": np.float32(1), "b": np.arange(3, dtype=np.int32)}
    fn, params = jq.models.from_torch(module)
    assert sorted(params) == [
        "first.bias",
        "first.weight",
        "offset",
        "parts.0.bias",
        "parts.0.weight",
    ]
    assert params["first.weight"].dtype == jnp.bfloat16
    result = fn(params, x, more)
    given = jax.tree.map(torch.as_tensor, more)
    with torch.no_grad():
        expected = module(torch.from_numpy(x), given)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    assert result["more"][1].dtype == jnp.bfloat16 and isinstance(result["more"][0], Pair)
    np.testing.assert_allclose(result["y"], expected["y"], rtol=1e-5)
    np.testing.assert_allclose(result["more"][0].mean, expected["more"][0].mean, rtol=1e-4)
    np.testing.assert_allclose(result["sum"][0], [1, 2, 3])
    np.testing.assert_array_equal(fn(params, x, more)["y"], result["y"])
    del params["offset"]
    with pytest.raises(TreeError, match="'offset' is missing in the parameters of Odd"):
        fn(params, x, more)


class Asking(nn.Linear):
    def forward(self, x: Any) -> Any:
        return x if (x > 0).all() else -x


class Hiding(nn.Linear):
    def forward(self, x: Any, hidden: Any = (torch.ones(4),)) -> Any:
        return super().forward(x) * hidden[0]


class Naming(nn.Linear):
    def forward(self, x: Any) -> Any:
        return {"y": super().forward(x), "names": ["me", "you"]}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Asking, "Asking: its PyTorch code depends on the values"),
        (Hiding, "Hiding: its PyTorch code uses a tensor that is neither .* register_buffer"),
        (Naming, "Naming returns in 'names' in 0 a str; write a module whose"),
    ],
)
def test_what_cannot_be_traced(kind: Any, message: str) -> None:
    fn, params = jq.models.from_torch(kind(4, 4))
    with pytest.raises(UnsupportedPrimitiveError, match=message):
        jq.find_weights(fn, params, np.ones((2, 4), np.float32))


def test_what_is_no_module() -> None:
    with pytest.raises(TypeError, match="takes a torch.nn.Module, got dict"):
        jq.models.from_torch({})
    module = network()
    module.generator = (number for number in range(3))
    with pytest.raises(TreeError, match="Network cannot be copied: .*generator"):
        jq.models.from_torch(module)
