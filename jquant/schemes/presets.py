"""Schemes by name, for whoever wants a good one rather than a choice: `presets.int4_qep()`.

Each is a function that returns a `Scheme`, so a preset can be printed, compared, cited (`jq.cite`)
and changed with `dataclasses.replace`. `named` finds one by the name the command line uses
(`int4-qep`). A preset is a scheme for one weight; which weights get it is the plan's business.

The integer presets have groups of 64 along the input axis with float16 scales and zero points as
narrow as the codes: 4.31 bits per weight at 4 bits. Groups of 128 would take 4.16. Those by GPTQ
and QEP search each group's range by the error its inputs weigh (`MSE`, an option of GPTQ's own code
that is off there by default). On SmolLM2 at 4 bits, KL to the full model: nearest 0.296, GPTQ with
the weights' own ranges 0.102, with searched ones 0.07, with QEP's correction too 0.041; see
`benchmarks/stages.py` and, for the grids, `benchmarks/grids.py`, `fp4.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace

from jquant.axes.groups import Groups
from jquant.errors import near
from jquant.grids import GGUF, MSE, MX, NF4, NV, Float, MinMax, Power, Uniform
from jquant.rounding import GPTQ, NUPES, AdaRound, DiscQuant, Nearest, Polish, SignRound
from jquant.schemes.scheme import Scheme
from jquant.weights.activations import Activations

__all__ = [  # the best first
    "int4_qep",
    "int4_best",
    "int3_best",
    "int2_best",
    "int3_qep",
    "int2_qep",
    "qronos",
    "int8_gptq",
    "int4_gptq",
    "int3_gptq",
    "int2_gptq",
    "int8_nearest",
    "int4_nearest",
    "int3_nearest",
    "int2_nearest",
    "int4_per_input",
    "w4a16_qep",
    "w8a8",
    "w4a8_qep",
    "w8a8_fp8",
    "fp8",
    "nf4",
    "nf4_gptq",
    "mxfp4",
    "mxfp4_gptq",
    "nvfp4",
    "nvfp4_gptq",
    "q6_k_qep",
    "q5_k_qep",
    "q4_k_qep",
    "q3_k_qep",
    "q2_k_qep",
    "q4_0_qep",
    "q8_0_nearest",
    "power4",
    "power4_nupes",
    "int4_adaround",
    "int4_signround",
    "int3_discquant",
    "named",
]


_INPUTS = Uniform(8, symmetric=True, convention="S3")  # the largest input is a code
_NF4 = replace(NF4, scale_dtype="float16")


def _affine(bits: int, search: MinMax | MSE = MinMax()) -> Uniform:
    return Uniform(bits, range=search, scale_dtype="float16")


def int4_qep(group: int | None = 64) -> Scheme:
    """4-bit groups by GPTQ that makes up for what earlier layers have lost: try this first.

    Walks the full network beside the quantized one: 1.8 times the time of `int4_gptq`, and stage by
    stage only.

    Example:
        >>> int4_qep().rounding.correction
        'qep'
    """
    return Scheme(_affine(4, MSE()), group, GPTQ(correction="qep"))


def int3_qep(group: int | None = 64) -> Scheme:
    """As `int4_qep`, with 3 bits: text of small models suffers a little."""
    return Scheme(_affine(3, MSE()), group, GPTQ(correction="qep"))


def int2_qep(group: int | None = 64) -> Scheme:
    """As `int4_qep`, with 2 bits: for research, and for models far larger than they need be."""
    return Scheme(_affine(2, MSE()), group, GPTQ(correction="qep"))


def qronos(group: int | None = 64, bits: int = 4) -> Scheme:
    """Qronos, as QEP with all of its correction and next to no damping.

    Qronos alternates between rounding a weight to what corrects the errors made so far and moving
    the others to their least squares solution. With damping λ that solution is
    `W (G + λI) (H + λI)⁻¹` minus what is rounded already (G: of full and quantized inputs), which
    is QEP's target at strength 1 followed by GPTQ; the codes of the very first weight of a row may
    differ. Qronos has λ at a millionth of the largest eigenvalue of H; here it is 1e-5 of the mean
    of its diagonal, and ranges are searched as in `int4_qep`. For comparisons: in the small
    network of the tests `int4_qep` and its like are better at 4, 3 and 2 bits.

    Example:
        >>> qronos().rounding.strength, qronos(bits=3).grid.bits
        (1.0, 3)
    """
    rounding = GPTQ(correction="qep", strength=1.0, damping=1e-5)
    return Scheme(_affine(bits, MSE()), group, rounding)


def int4_best(group: int | None = 64) -> Scheme:
    """`int4_qep`, and then codes and scales polished: the least error that takes no gradients.

    `Polish` takes 4 to 6 times the time of GPTQ's own rounding, a whole job less than twice.

    Example:
        >>> int4_best().rounding.rounding.correction
        'qep'
    """
    return replace(int4_qep(group), rounding=Polish(GPTQ(correction="qep")))


def int3_best(group: int | None = 64) -> Scheme:
    """As `int4_best`, with 3 bits."""
    return replace(int3_qep(group), rounding=Polish(GPTQ(correction="qep")))


def int2_best(group: int | None = 64) -> Scheme:
    """As `int4_best`, with 2 bits, where it gains most."""
    return replace(int2_qep(group), rounding=Polish(GPTQ(correction="qep")))


def int8_gptq(group: int | None = None) -> Scheme:
    """8-bit symmetric, one scale per output channel, by GPTQ: as near as 8 bits come."""
    return Scheme(Uniform(8, symmetric=True), group, GPTQ())


def int4_gptq(group: int | None = 64) -> Scheme:
    """4-bit affine groups rounded by GPTQ in activation order, ranges searched.

    Example:
        >>> int4_gptq().grid.bits
        4
    """
    return Scheme(_affine(4, MSE()), group, GPTQ())


def int3_gptq(group: int | None = 64) -> Scheme:
    """As `int4_gptq`, with 3 bits."""
    return Scheme(_affine(3, MSE()), group, GPTQ())


def int2_gptq(group: int | None = 64) -> Scheme:
    """As `int4_gptq`, with 2 bits: for comparing with what aims at 2 bits."""
    return Scheme(_affine(2, MSE()), group, GPTQ())


def int8_nearest(group: int | None = None) -> Scheme:
    """8-bit symmetric, one scale per output channel, rounded to nearest: near lossless."""
    return Scheme(Uniform(8, symmetric=True), group, Nearest())


def int4_nearest(group: int | None = 64) -> Scheme:
    """4-bit affine groups rounded to nearest: what all others are measured by."""
    return Scheme(_affine(4), group, Nearest())


def int3_nearest(group: int | None = 64) -> Scheme:
    """As `int4_nearest`, with 3 bits: a baseline."""
    return Scheme(_affine(3), group, Nearest())


def int2_nearest(group: int | None = 64) -> Scheme:
    """As `int4_nearest`, with 2 bits: a baseline."""
    return Scheme(_affine(2), group, Nearest())


def int4_per_input(group: int | None = 128) -> Scheme:
    """4-bit groups along the output axis, one set per input channel, by GPTQ (AdaDim's other axis).

    Which axis is better is a matter of the weight: `jq.allocation.adadim` finds out.
    """
    grid = Uniform(4, convention="A2", scale_dtype="float16")
    return Scheme(grid, Groups("out", group), GPTQ(groups="dynamic"))


def w4a16_qep(group: int | None = 128) -> Scheme:
    """4-bit symmetric groups by GPTQ with QEP's correction: the W4A16 that engines serve.

    What `jquant.export` writes as compressed-tensors' pack-quantized, which vLLM reads on GPUs and
    tpu-inference on TPUs; both take symmetric codes with bfloat16 scales, in groups of 128.

    Example:
        >>> w4a16_qep().grid.symmetric, w4a16_qep().grid.scale_dtype
        (True, 'bfloat16')
    """
    grid = Uniform(4, symmetric=True, range=MSE(), scale_dtype="bfloat16")
    return Scheme(grid, group, GPTQ(correction="qep"))


def w8a8(group: int | None = None) -> Scheme:
    """8-bit weights and inputs, a scale per output channel and per token: integer products.

    ZeroQuant's. On a CPU with matrix units the products are many times faster than float32's.

    Example:
        >>> w8a8().activations.granularity
        'token'
    """
    return replace(int8_nearest(group), activations=Activations(_INPUTS))


def w4a8_qep(group: int | None = 64) -> Scheme:
    """`int4_qep` with 8-bit inputs, a scale per token: integer products, group by group."""
    return replace(int4_qep(group), activations=Activations(_INPUTS))


def w8a8_fp8(group: int | None = None) -> Scheme:
    """`fp8` weights with inputs in E4M3, a scale per token."""
    return replace(fp8(group), activations=Activations(Float(4, 3, scale="float32")))


def fp8(group: int | None = None) -> Scheme:
    """8-bit floating point (E4M3), one scale per output channel: near lossless."""
    return Scheme(Float(4, 3, scale="float32"), group, Nearest())


def nf4(group: int | None = 64) -> Scheme:
    """QLoRA's 4-bit table of normal quantiles."""
    return Scheme(_NF4, group, Nearest())


def nf4_gptq(group: int | None = 64) -> Scheme:
    """`nf4`, rounded by GPTQ."""
    return Scheme(_NF4, group, GPTQ())


def mxfp4() -> Scheme:
    """OCP's MXFP4: 4-bit floats, a power of two for each 32 of them."""
    return Scheme(MX(), None, Nearest())


def mxfp4_gptq() -> Scheme:
    """`mxfp4`, rounded by GPTQ, its scales overflow-aware (OAS)."""
    return Scheme(MX(scale_rule="oas"), None, GPTQ())


def nvfp4() -> Scheme:
    """NVIDIA's NVFP4: 4-bit floats, an 8-bit float for each 16 of them."""
    return Scheme(NV(), None, Nearest())


def nvfp4_gptq() -> Scheme:
    """`nvfp4`, rounded by GPTQ, its scales searched, the largest code 4 or 6 (four over six)."""
    return Scheme(NV(four_six=True, range=MSE()), None, GPTQ())


def _block(kind: str) -> GGUF:
    """A block type, its scales searched: coarsely, as least squares follow each try."""
    return GGUF(kind, MSE(steps=20, resolution=40, norm=2.0))


def q6_k_qep() -> Scheme:
    """llama.cpp's Q6_K as `q4_k_qep` has Q4_K."""
    return Scheme(_block("Q6_K"), None, GPTQ(correction="qep"))


def q5_k_qep() -> Scheme:
    """llama.cpp's Q5_K as `q4_k_qep` has Q4_K."""
    return Scheme(_block("Q5_K"), None, GPTQ(correction="qep"))


def q4_k_qep() -> Scheme:
    """llama.cpp's Q4_K by GPTQ with QEP's correction, both levels of scales searched.

    What `jquant.export(format="gguf")` writes for llama.cpp; a weight's inputs have to be a
    multiple of 256, as of all types with a K.

    Example:
        >>> q4_k_qep().grid.kind
        'Q4_K'
    """
    return Scheme(_block("Q4_K"), None, GPTQ(correction="qep"))


def q3_k_qep() -> Scheme:
    """llama.cpp's Q3_K as `q4_k_qep` has Q4_K."""
    return Scheme(_block("Q3_K"), None, GPTQ(correction="qep"))


def q2_k_qep() -> Scheme:
    """llama.cpp's Q2_K as `q4_k_qep` has Q4_K."""
    return Scheme(_block("Q2_K"), None, GPTQ(correction="qep"))


def q4_0_qep() -> Scheme:
    """llama.cpp's Q4_0 by GPTQ with QEP's correction: 4-bit groups of 32, scales searched."""
    return Scheme(_block("Q4_0"), None, GPTQ(correction="qep"))


def q8_0_nearest() -> Scheme:
    """llama.cpp's Q8_0, 8-bit groups of 32, rounded to nearest: near lossless."""
    return Scheme(GGUF("Q8_0"), None, Nearest())


def power4(group: int | None = None) -> Scheme:
    """PowerQuant's 4-bit power grid, one scale per output channel, its exponent searched."""
    return Scheme(Power(4), group, Nearest())


def power4_nupes(group: int | None = None) -> Scheme:
    """NUPES: codes and exponent of `power4` learned by gradients."""
    return Scheme(Power(4), group, NUPES())


def int4_adaround(group: int | None = 64) -> Scheme:
    """AdaRound: up or down of every weight learned by gradients, on the error of its outputs."""
    return Scheme(_affine(4), group, AdaRound())


def int4_signround(group: int | None = 64) -> Scheme:
    """SignRound, AutoRound's algorithm: shifts and ranges learned by signs of gradients.

    Meant for blocks: `quantize(..., objective=objectives.Reconstruction(), sequential="block")`.
    """
    return Scheme(_affine(4), group, SignRound())


def int3_discquant(group: int | None = 64) -> Scheme:
    """DiscQuant on the paper's 3.25 bits, learned by gradients.

    Meant for the whole network: `quantize(..., objective=objectives.KL(), key=)`. The unit is that
    of nearest rounding, in which one ρ suits networks of all sizes.

    Example:
        >>> int3_discquant().rounding.unit
        'nearest'
    """
    grid = Uniform(3, symmetric=True, scale_dtype="float16")
    return Scheme(grid, group, DiscQuant(rho=1.0, unit="nearest"))


def presets() -> Mapping[str, Callable[..., Scheme]]:
    """Every preset by its command-line name."""
    return {name.replace("_", "-"): globals()[name] for name in __all__ if name != "named"}


def named(name: str, group: int | None = None) -> Scheme:
    """The preset of that name, `-` or `_` alike; `group` changes its group size.

    Raises:
        ValueError: there is no such preset (the message lists the nearest), or it is of a format
            that fixes the size of its groups.

    Example:
        >>> named("int4-gptq", 128).groups
        Groups(axis='in', size=128)
    """
    by_name = presets()
    preset = by_name.get(name.replace("_", "-"))
    if preset is None:
        raise ValueError(f"no preset is called {name!r}; did you mean {near(name, by_name)}?")
    if group is None:
        return preset()
    if "group" not in inspect.signature(preset).parameters:
        raise ValueError(
            f"{name} has groups of {preset().grouping.size}, which its format fixes; leave out the "
            f"group size {group}"
        )
    return preset(group)
