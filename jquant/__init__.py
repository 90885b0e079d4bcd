"""jquant: functional quantization for JAX.

A quantized weight is a grid × a rounding × an optional compensation, chosen per weight by a plan,
informed by evidence that jquant reads out of any JAX function, and run by that same function.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from jquant import (
    adapters,
    allocation,
    deprecated,
    errors,
    evaluate,
    exchange,
    exporters,
    formats,
    grids,
    io,
    rounding,
)
from jquant.adapters.adapt import adapt
from jquant.adapters.fold import fold
from jquant.adapters.kinds import LoRA
from jquant.adapters.merge import merge
from jquant.allocation import plan
from jquant.arithmetic import distances, emulate
from jquant.axes import Groups, Layout
from jquant.calibration import (
    Evidence,
    Saliency,
    TokenWeights,
    Weight,
    capture,
    find_weights,
    saliency,
)
from jquant.exchange import compress, decompress
from jquant.exporters import Exported, export
from jquant.inference import apply
from jquant.io import load, save
from jquant.jobs.estimate import Estimate, estimate
from jquant.jobs.progress import Progress
from jquant.jobs.quantize import quantize
from jquant.jobs.report import Report
from jquant.layerwise.weight import quantize_weight
from jquant.learning import objectives
from jquant.learning.scales import tune_scales
from jquant.rounding import stochastic_round
from jquant.schemes import presets
from jquant.schemes.cite import cite
from jquant.schemes.lorc import LoRC
from jquant.schemes.rotation import Hadamard
from jquant.schemes.scheme import Plan, Scheme, keep
from jquant.trees.lazy import Lazy, realize
from jquant.weights.activations import Activations, Percentile
from jquant.weights.qtensor import LowRank, QTensor, dequantize, tree_map_weights

if TYPE_CHECKING:
    from jquant import models

__all__ = [
    "Activations",
    "Estimate",
    "Evidence",
    "Exported",
    "Groups",
    "Hadamard",
    "Layout",
    "Lazy",
    "LoRA",
    "LoRC",
    "LowRank",
    "Percentile",
    "Plan",
    "Progress",
    "QTensor",
    "Report",
    "Saliency",
    "Scheme",
    "TokenWeights",
    "Weight",
    "adapt",
    "adapters",
    "allocation",
    "apply",
    "capture",
    "cite",
    "compress",
    "decompress",
    "dequantize",
    "distances",
    "emulate",
    "errors",
    "estimate",
    "evaluate",
    "exchange",
    "export",
    "exporters",
    "find_weights",
    "fold",
    "formats",
    "grids",
    "io",
    "keep",
    "load",
    "merge",
    "models",
    "objectives",
    "plan",
    "presets",
    "quantize",
    "quantize_weight",
    "realize",
    "rounding",
    "saliency",
    "save",
    "stochastic_round",
    "tree_map_weights",
    "tune_scales",
]

# Where modules with public names lay before: imports from there find what they found.
_MOVED = {
    "activations": "weights.activations",
    "blocks": "axes",
    "citations": "schemes.cite",
    "compensation": "schemes.lorc",
    "distances": "arithmetic.distances",
    "emulation": "arithmetic",
    "estimate": "jobs.estimate",
    "lazy": "trees.lazy",
    "objectives": "learning.objectives",
    "presets": "schemes.presets",
    "progress": "jobs.progress",
    "qtensor": "weights.qtensor",
    "quantize": "jobs.quantize",
    "report": "jobs.report",
    "scheme": "schemes.scheme",
    "solve": "layerwise.weight",
    "tuning": "learning.scales",
}
for _old, _new in _MOVED.items():
    sys.modules[f"{__name__}.{_old}"] = sys.modules[f"{__name__}.{_new}"]

# Modules whose packages come with an extra and cost more to import than all the rest.
_WHEN_USED = ("models",)


def __getattr__(name: str) -> Any:
    """`jq.models`, imported when it is first used; modules and names by what they were before."""
    if name in _WHEN_USED or name in _MOVED:
        return importlib.import_module(f"{__name__}.{name}")
    return deprecated.attribute(__name__, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHEN_USED})
