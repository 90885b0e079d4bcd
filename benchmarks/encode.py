"""Encoding a weight on each grid, against the best public code that runs here.

    python -m benchmarks.encode [--quick]

One float32 weight, 4096 by 4096, normal. Encoding is fitting the groups and choosing the nearest
codes. jquant's time is that of `Nearest`, compiled, whose codes have JAX's narrowest type; beside
it stands that of the same program with codes left in bytes (`in_bytes_s`): XLA's CPU compiler
writes packed 4-bit integers one at a time. Others are measured as they come, packed or not
(`codes`), compiled if they are JAX, and eager if they are PyTorch or NumPy. One process, two
threads, methods of a grid alternating (A B A B ...), medians. Wanted, each optional: torch,
torchao, qwix, hqq, optimum-quanto, bitsandbytes, flash1dkmeans, ml_dtypes.

Where a rival would take minutes it gets a share of the rows, and its time is scaled up (`rows`).
`casts` sets `jq.stochastic_round` beside a plain cast of the same weight, on both of its sources of
random bits.
Writes `results/encode.json`, wins and losses alike.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jquant as jq
from benchmarks import harness
from jquant import grids
from jquant.axes.groups import Groups, to_groups
from jquant.grids import MX, NF4, NV, Codebook, Float, Grid, KMeans, Power, Uniform, nearest
from jquant.numerics import noise
from jquant.rounding.elementwise import _round

Array = np.ndarray
Encoder = Callable[[], Any]


class Rival(NamedTuple):
    """What encodes a weight; what its codes are; of how many of the rows."""

    make: Callable[[Array], Encoder]
    codes: str
    share: float = 1.0


def jitted(function: Callable[[jax.Array], Any]) -> Callable[[Array], Encoder]:
    def make(w: Array) -> Encoder:
        program, x = jax.jit(function), jnp.asarray(w)
        return lambda: jax.block_until_ready(program(x))

    return make


def qwix(qtype: Any, tile: int, method: str = "absmax") -> Callable[[Array], Encoder]:
    def make(w: Array) -> Encoder:
        from qwix._src.core import qarray

        how = qarray.HowToQuantize(
            qtype=qtype, channelwise_axes=[0], tiled_axes={1: tile}, calibration_method=method
        )
        return jitted(lambda x: qarray.quantize(x, how))(w)

    return make


def torch_cast(dtype: str) -> Callable[[Array], Encoder]:
    def make(w: Array) -> Encoder:
        import torch

        x = torch.from_numpy(w)
        return lambda: x.to(getattr(torch, dtype))

    return make


def numpy_cast(dtype: Any) -> Callable[[Array], Encoder]:
    return lambda w: lambda: w.astype(dtype)


def numpy_mx(dtype: Any) -> Callable[[Array], Encoder]:
    """The definition, in a few passes of NumPy, with the cast of ml_dtypes."""
    most = np.float32(ml_dtypes.finfo(dtype).max)
    emax = int(np.floor(np.log2(most)))

    def make(w: Array) -> Encoder:
        def encode() -> Any:
            blocks = w.reshape(-1, 32)
            scale = (np.abs(blocks).max(1).view(np.int32) >> 23) - emax
            x = np.ldexp(blocks, (127 - scale)[:, None])
            return np.clip(x, -most, most).astype(dtype), scale.astype(np.uint8)

        return encode

    return make


def torchao_affine(w: Array) -> Encoder:
    import torch
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        quantize_affine,
    )

    x = torch.from_numpy(w)

    def encode() -> Any:
        found = choose_qparams_affine(
            x, MappingType.ASYMMETRIC, (1, 64), torch.uint8, quant_min=0, quant_max=15
        )
        return quantize_affine(x, (1, 64), *found, torch.uint8, quant_min=0, quant_max=15)

    return encode


def torchao_mx(dtype: str) -> Callable[[Array], Encoder]:
    def make(w: Array) -> Encoder:
        import torch
        from torchao.prototype.mx_formats.mx_tensor import to_mx

        x = torch.from_numpy(w)
        return lambda: to_mx(x, getattr(torch, dtype), 32)

    return make


def torchao_nv(w: Array) -> Encoder:
    import torch
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    x = torch.from_numpy(w)
    return lambda: nvfp4_quantize(x, 16, per_tensor_amax_to_scale(x.abs().max()))


def quanto(optimizer: str) -> Callable[[Array], Encoder]:
    def make(w: Array) -> Encoder:
        import torch
        from optimum import quanto as library

        x, choice = torch.from_numpy(w), getattr(library, optimizer)()

        def encode() -> Any:
            scale, shift = choice(x, library.qint4, 0, 64)
            return library.quantize_weight(x, library.qint4, 0, scale, shift, 64)

        return encode

    return make


def hqq(optimize: bool) -> Callable[[Array], Encoder]:
    def make(w: Array) -> Encoder:
        import torch
        from hqq.core.quantize import Quantizer

        x = torch.from_numpy(w)
        return lambda: Quantizer.quantize(
            x, nbits=4, group_size=64, optimize=optimize, axis=1, device="cpu",
            compute_dtype=torch.float32,
        )  # fmt: skip

    return make


def bitsandbytes(w: Array) -> Encoder:
    import torch
    from bitsandbytes.functional import quantize_4bit

    x = torch.from_numpy(w)
    return lambda: quantize_4bit(x, blocksize=64, quant_type="nf4")


def flash_kmeans(w: Array) -> Encoder:
    import flash1dkmeans

    def encode() -> Any:
        return [flash1dkmeans.kmeans_1d(row.astype(np.float64), 16, max_iter=10) for row in w]

    return encode


def scikit_kmeans(w: Array) -> Encoder:
    """As SqueezeLLM does it, without its pool of processes."""
    from sklearn.cluster import KMeans as Theirs

    def encode() -> Any:
        return [Theirs(16, n_init=1, max_iter=50).fit(row[:, None]).labels_ for row in w]

    return encode


class Case(NamedTuple):
    """A grid, its groups, and who else encodes on it."""

    grid: Grid
    size: int | None
    rivals: dict[str, Rival]
    repeats: int = 9


def cases() -> dict[str, Case]:
    fp4, e4m3, e5m2 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
    found = {
        "Uniform 4": Case(Uniform(4), 64, {
            "torchao": Rival(torchao_affine, "uint8"),
            "optimum-quanto": Rival(quanto("MaxOptimizer"), "packed"),
            "hqq, no search": Rival(hqq(False), "packed"),
        }),
        "Uniform 4, symmetric": Case(Uniform(4, symmetric=True), 64, {
            "qwix": Rival(qwix(jnp.int4, 64), "int4"),
        }),
        "Uniform 8, symmetric": Case(Uniform(8, symmetric=True), 64, {
            "qwix": Rival(qwix(jnp.int8, 64), "int8"),
        }),
        "E4M3": Case(Float(4, 3), None, {
            "ml_dtypes": Rival(numpy_cast(e4m3), "cast"),
            "torch": Rival(torch_cast("float8_e4m3fn"), "cast"),
            "jax": Rival(jitted(lambda x: x.astype(jnp.float8_e4m3fn)), "cast"),
        }),
        "E5M2": Case(Float(5, 2), None, {
            "ml_dtypes": Rival(numpy_cast(e5m2), "cast"),
            "torch": Rival(torch_cast("float8_e5m2"), "cast"),
            "jax": Rival(jitted(lambda x: x.astype(jnp.float8_e5m2)), "cast"),
        }),
        "E2M1": Case(Float(2, 1), None, {
            "ml_dtypes": Rival(numpy_cast(fp4), "bytes"),
            "jax": Rival(jitted(lambda x: x.astype(jnp.float4_e2m1fn)), "cast"),
        }),
        "BF16": Case(Float(8, 7), None, {
            "ml_dtypes": Rival(numpy_cast(ml_dtypes.bfloat16), "cast"),
            "torch": Rival(torch_cast("bfloat16"), "cast"),
            "jax": Rival(jitted(lambda x: x.astype(jnp.bfloat16)), "cast"),
        }),
        "MX E2M1": Case(MX(), 32, {
            "torchao": Rival(torchao_mx("float4_e2m1fn_x2"), "packed"),
            "qwix": Rival(qwix("mxfp4", 32), "float4"),
            "ml_dtypes": Rival(numpy_mx(fp4), "bytes"),
        }),
        "MX E4M3": Case(MX("E4M3"), 32, {
            "torchao": Rival(torchao_mx("float8_e4m3fn"), "float8"),
            "qwix": Rival(qwix("mxfp8", 32), "float8"),
            "ml_dtypes": Rival(numpy_mx(e4m3), "float8"),
        }),
        "NV": Case(NV(), 16, {
            "torchao": Rival(torchao_nv, "packed"),
            "qwix": Rival(qwix("nvfp4", 16), "float4"),
        }),
        "NF4": Case(NF4, 64, {
            "bitsandbytes": Rival(bitsandbytes, "packed"),
            "qwix": Rival(qwix("nf4", 64), "uint4"),
        }),
        "Codebook of 256": Case(Codebook(tuple(np.linspace(-1, 1, 256) ** 3)), 64, {}),
        "Power 4": Case(Power(4, 0.5), 64, {}),
        "Power 4, searched": Case(Power(4), 64, {}, 3),
        "KMeans 4": Case(KMeans(4), None, {
            "flash1dkmeans": Rival(flash_kmeans, "int", 1 / 64),
            "scikit-learn": Rival(scikit_kmeans, "int", 1 / 256),
        }, 3),
    }  # fmt: skip
    if hasattr(grids, "HQQ"):
        found["Uniform 4, HQQ"] = Case(Uniform(4, range=grids.HQQ()), 64, {
            "hqq": Rival(hqq(True), "packed", 1 / 8),
            "optimum-quanto": Rival(quanto("HqqOptimizer"), "packed", 1 / 16),
        }, 3)  # fmt: skip
    return found


def in_bytes(grid: Grid, blocks: Groups) -> Callable[[Array], Encoder]:
    """Fit and nearest codes, in the type of a byte or two."""
    wide = np.int16 if grid.codes[1] - grid.codes[0] > 255 else np.int8
    dtype = wide if grid.codes[0] < 0 else np.uint8

    def encode(w: jax.Array) -> Any:
        groups = to_groups(w, blocks)
        params = grid.fit(groups)
        return nearest(grid, groups, params).astype(dtype), params

    return jitted(encode)


def race(name: str, case: Case, w: Array, repeats: int) -> dict[str, Any]:
    """Alternate all on one weight; ours first."""
    blocks = Groups("in", case.size)
    makers = {"jquant": Rival(jitted(lambda x: _round(x, None, case.grid, blocks)), "packed")}
    if case.repeats > 3:  # else packing takes none of the time
        makers["jquant in bytes"] = Rival(in_bytes(case.grid, blocks), "bytes")
    makers |= case.rivals
    encoders: dict[str, Encoder] = {}
    skipped: dict[str, str] = {}
    for who, rival in makers.items():
        try:
            encoders[who] = rival.make(w[: max(1, int(len(w) * rival.share))])
            encoders[who]()  # warm
        except Exception as error:  # a rival that is absent or does not run is a fact to record
            if who.startswith("jquant"):
                raise
            encoders.pop(who, None)
            skipped[who] = f"{type(error).__name__}: {error}"[:200]
    times: dict[str, list[float]] = {who: [] for who in encoders}
    for _ in range(min(repeats, case.repeats)):
        for who, encode in encoders.items():
            time.sleep(0.1)  # a rival's worker threads may still be spinning
            start = time.perf_counter()
            encode()
            times[who].append((time.perf_counter() - start) / makers[who].share)
    median = {who: float(np.median(spent)) for who, spent in times.items()}
    ours = median.pop("jquant")
    bytes_only = median.pop("jquant in bytes", ours)
    row = {
        "grid": name, "group": case.size, "seconds": round(ours, 4),
        "in_bytes_s": round(bytes_only, 4), "weights_per_second": round(w.size / ours),
        "rivals": {
            who: {
                "seconds": round(spent, 4), "codes": makers[who].codes,
                "times_jquant": round(spent / ours, 2),
                "times_jquant_in_bytes": round(spent / bytes_only, 2),
                **({"rows": makers[who].share} if makers[who].share < 1 else {}),
            }
            for who, spent in median.items()
        },
    }  # fmt: skip
    return row | ({"skipped": skipped} if skipped else {})


def casts(w: Array, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds to round `w` to a narrower type, by how; alternating medians."""
    key, x = jax.random.key(0), jnp.asarray(w)
    found = {}
    for dtype in ("bfloat16", "float16", "float8_e4m3fn"):
        programs = {
            "cast": jax.jit(lambda x, dtype=dtype: x.astype(dtype)),
            **{
                source: jax.jit(partial(jq.stochastic_round, key, to=dtype, source=source))
                for source in noise.SOURCES
            },
        }
        times: dict[str, list[float]] = {name: [] for name in programs}
        for number in range(repeats + 1):
            for name, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(x))
                if number:  # the first is compiling
                    times[name].append(time.perf_counter() - start)
        found[dtype] = {name: round(float(np.median(t)), 5) for name, t in times.items()}
        print(dtype, found[dtype], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small weight, no file")
    parser.add_argument("--only", default="", help="grids whose name holds this, no file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(2)
    size = 512 if options.quick else 4096
    w = np.random.default_rng(0).standard_normal((size, size), np.float32)
    stochastic = casts(w, 3 if options.quick else 9)
    rows = []
    for name, case in cases().items():
        if options.only in name:
            rows.append(race(name, case, w, 3 if options.quick else 9))
            print(rows[-1], flush=True)
    if not options.quick and not options.only:
        versions = {}
        for package in (
            "ml_dtypes", "torchao", "qwix", "hqq", "optimum-quanto", "bitsandbytes",
            "flash1dkmeans", "scikit-learn",
        ):  # fmt: skip
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        harness.write("encode", rivals=versions, shape=[size, size], casts=stochastic, rows=rows)


if __name__ == "__main__":
    main()
