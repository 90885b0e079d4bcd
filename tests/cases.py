"""What the laws run over: grids, roundings, shapes. A new grid or rounding adds one line."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jquant.axes.groups import Groups
from jquant.grids import (
    AF4,
    GGUF,
    HQQ,
    MSE,
    MX,
    NF4,
    NV,
    Affine,
    Codebook,
    Float,
    Grid,
    Joint,
    KMeans,
    Power,
    Uniform,
)
from jquant.rounding import (
    GPTQ,
    NUPES,
    AdaRound,
    Descent,
    DiscQuant,
    Nearest,
    Polish,
    Rounding,
    SignRound,
    Stochastic,
)

UNIFORM: dict[str, Uniform] = {
    "A1-2": Uniform(2),
    "A1-4": Uniform(4),
    "A1-8": Uniform(8),
    "A1-3-half": Uniform(3, scale_dtype="float16"),
    "A1-4-mse": Uniform(4, range=MSE()),
    "A1-2-joint": Uniform(2, range=Joint()),
    "A2-4": Uniform(4, convention="A2"),
    "A3-3": Uniform(3, convention="A3"),
    "A3-3-joint": Uniform(3, convention="A3", range=Joint(2.5, steps=8)),
    "A4-3-half": Uniform(3, convention="A4", scale_dtype="float16"),
    "A4-4-hqq": Uniform(4, range=HQQ()),
    "A4-2-joint-half": Uniform(2, convention="A4", range=Joint(), scale_dtype="float16"),
    "S1-4": Uniform(4, symmetric=True),
    "S1-2-mse": Uniform(2, symmetric=True, range=MSE()),
    "S2-8": Uniform(8, symmetric=True, convention="S2"),
    "S3-5-bf16": Uniform(5, symmetric=True, convention="S3", scale_dtype="bfloat16"),
    "S4-3": Uniform(3, symmetric=True, convention="S4"),
    "S4-2-joint": Uniform(2, symmetric=True, convention="S4", range=Joint()),
    "S4-4-mse-half": Uniform(4, True, "S4", range=MSE(), scale_dtype="float16"),
    "S5-2": Uniform(2, symmetric=True, convention="S5"),
    "S5-4-joint-bf16": Uniform(4, True, "S5", range=Joint(), scale_dtype="bfloat16"),
}
AFFINE: dict[str, Affine] = {
    "affine-4-bf16": Affine(4, scale_dtype="bfloat16"),
    "affine-3-half-mse": Affine(3, MSE(steps=20, resolution=40), "float16"),
    "affine-8": Affine(8),
}
FLOATING: dict[str, Float] = {
    "E3M2": Float(3, 2),
    "E5M2-half": Float(5, 2, scale="float16"),
    "E3M4-bf16-mse": Float(3, 4, scale="bfloat16", range=MSE()),
    "UE4M3": Float(4, 3, signed=False, scale="float32"),
    "mx-E2M1": MX(),
    "mx-E2M1-ceil-mse": MX(scale_rule="ceil", range=MSE()),
    "mx-INT8": MX("INT8"),
    "mx-E2M1-oas-macro": MX(scale_rule="oas", macro=4),
    "mx-E2M1-macro-mse": MX(scale_rule="oas", macro=2, range=MSE(norm=2.0)),
    "nv": NV(),
    "nv-four-six": NV(four_six=True),
    "nv-alone": NV(tensor_scale=False),
}
POWER: dict[str, Power] = {
    "power-4": Power(4),
    "power-3-groups": Power(3, per="group", scale_dtype="float16"),
    "power-8-root": Power(8, 0.5),
    "power-2-mse": Power(2, 0.7, range=MSE(steps=20, resolution=40)),
    "power-8-steep": Power(8, 0.2, scale_dtype="bfloat16"),
    "power-5-flat": Power(5, 3.0),
}
TABLES: dict[str, Grid] = {
    "nf4": NF4,
    "af4-mse": Codebook(AF4.values, range=MSE(), scale_dtype="float16"),
    "codebook-5": Codebook((-3.0, -1.0, 0.25, 1.0, 2.5), scale_dtype="bfloat16"),
    "kmeans-4": KMeans(4),
    "kmeans-2-bf16": KMeans(2, table_dtype="bfloat16"),
    "kmeans-7": KMeans(7, iterations=3),
    "codebook-97": Codebook(tuple(float(k * abs(k)) for k in range(-48, 49))),
}
BLOCK_TYPES: dict[str, Grid] = {
    f"gguf-{kind}": GGUF(kind) for kind in ("Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K", "Q6_K")
} | {
    f"gguf-{kind}-mse": GGUF(kind, MSE(steps=5, resolution=10, norm=2.0))
    for kind in ("Q4_0", "Q5_1", "Q2_K", "Q3_K")
}
GRIDS: dict[str, Grid] = {**UNIFORM, **AFFINE, **FLOATING, **POWER, **TABLES, **BLOCK_TYPES}

ROUNDINGS: dict[str, Rounding] = {
    "nearest": Nearest(),
    "stochastic": Stochastic(),
    "gptq": GPTQ(),
    "gptq-natural": GPTQ(order="natural"),
    "gptq-dynamic": GPTQ(order="natural", groups="dynamic"),
    "polish": Polish(GPTQ(), rounds=2),
    "adaround": AdaRound(descent=Descent(30, 0.1)),
    "discquant": DiscQuant(rho=1.0, unit="nearest", descent=Descent(30, 0.1)),
    "nupes": NUPES(descent=Descent(30, 0.1)),
    "signround": SignRound(descent=Descent(30, 1 / 30, "sign_sgd", "linear")),
}
# Of the learned ones, those that run on grids which search for their own ranges too.
LEARNED = ("adaround", "discquant", "nupes")

# (out, in) and groups: even, ragged, along either axis, and one group for all.
BLOCKS: dict[str, tuple[tuple[int, int], Groups]] = {
    "in-8": ((12, 40), Groups("in", 8)),
    "in-ragged": ((8, 45), Groups("in", 17)),
    "out-ragged": ((11, 40), Groups("out", 4)),
    "whole": ((12, 40), Groups()),
}


def layer(out: int, width: int, seed: int = 0, batch: tuple[int, ...] = ()):
    """A weight `[*batch, out, in]` and the second moment of correlated, unevenly scaled inputs."""
    random = np.random.default_rng(seed)
    mix = np.eye(width) + 0.4 * random.normal(size=(width, width)) / np.sqrt(width)
    x = random.normal(size=(*batch, 3 * width, width)) @ mix
    x = x * np.exp(0.5 * random.normal(size=width))
    w = random.normal(size=(*batch, out, width))
    moment = np.swapaxes(x, -1, -2) @ x
    return jnp.asarray(w, jnp.float32), jnp.asarray(moment, jnp.float32)


def position(grid: Uniform, params) -> Callable[[np.ndarray], np.ndarray]:
    """Where a weight lies among the codes, as a real number: for telling ties from mistakes."""
    scale = np.asarray(params["scale"], np.float64)[..., None]
    between = grid.convention == "S5"
    scale = 2 * scale if between else scale
    fixed = -0.5 if between else 0.0
    zero = np.asarray(params["zero"], np.float64)[..., None] if "zero" in params else fixed
    return lambda w: np.clip(np.asarray(w, np.float64) / scale + zero, *grid.codes)


def assert_codes_equal_but_for_ties(
    got: np.ndarray, wanted: np.ndarray, position: np.ndarray, width: float = 1e-3
) -> None:
    """Equal codes, except where the weight lay within `width` of half-way between the two.

    `position` is the weight in units of codes (see `position`). Ties must stay rare, or the
    comparison would say nothing.
    """
    got, wanted = np.asarray(got).astype(int), np.asarray(wanted).astype(int)
    half = np.abs(position - np.floor(position) - 0.5) < width
    assert half.mean() < 0.05, f"{half.mean():.1%} of the weights are ties"
    np.testing.assert_array_equal(got[~half], wanted[~half])
    assert np.abs(got - wanted).max(initial=0) <= 1


def floats(tree) -> dict[str, np.ndarray]:
    """Every leaf of a mapping as float64."""
    return {name: np.asarray(jax.device_get(leaf), np.float64) for name, leaf in tree.items()}
