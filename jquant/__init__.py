"""jquant: functional quantization for JAX.

A quantized weight is a grid × a rounding × an optional compensation, chosen per weight by a plan,
informed by evidence that jquant reads out of any JAX function, and run by that same function.
"""

from jquant import (
    allocation,
    distances,
    errors,
    evaluate,
    grids,
    io,
    models,
    objectives,
    presets,
    rounding,
)
from jquant.activations import Activations, Percentile
from jquant.allocation import plan
from jquant.blocks import Blocks, Layout
from jquant.calibration import Evidence, TokenWeights, Weight, capture, find_weights
from jquant.citations import cite
from jquant.compensation import LoRC
from jquant.emulation import emulate
from jquant.estimate import Estimate, estimate
from jquant.inference import apply
from jquant.io import load, save
from jquant.lazy import Lazy, realize
from jquant.progress import Progress
from jquant.qtensor import LowRank, QTensor, dequantize, tree_map_weights
from jquant.quantize import quantize
from jquant.report import Report
from jquant.rounding import stochastic_round
from jquant.scheme import Plan, Scheme, keep
from jquant.solve import quantize_weight
from jquant.tuning import tune_scales

__all__ = [
    "Activations",
    "Blocks",
    "Estimate",
    "Evidence",
    "Layout",
    "Lazy",
    "LoRC",
    "LowRank",
    "Percentile",
    "Plan",
    "Progress",
    "QTensor",
    "Report",
    "Scheme",
    "TokenWeights",
    "Weight",
    "allocation",
    "apply",
    "capture",
    "cite",
    "dequantize",
    "distances",
    "emulate",
    "errors",
    "estimate",
    "evaluate",
    "find_weights",
    "grids",
    "io",
    "keep",
    "load",
    "models",
    "objectives",
    "plan",
    "presets",
    "quantize",
    "quantize_weight",
    "realize",
    "rounding",
    "save",
    "stochastic_round",
    "tree_map_weights",
    "tune_scales",
]
