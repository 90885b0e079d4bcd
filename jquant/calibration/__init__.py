"""Reading evidence out of any JAX function: which leaves are weights, and what flows into them."""

from jquant.calibration.backward import saliency
from jquant.calibration.capture import capture
from jquant.calibration.evidence import Evidence
from jquant.calibration.find import Use, Weight, Weights, find_weights
from jquant.calibration.saliency import Saliency
from jquant.calibration.tokens import TokenWeights

__all__ = [
    "Evidence",
    "Saliency",
    "TokenWeights",
    "Use",
    "Weight",
    "Weights",
    "capture",
    "find_weights",
    "saliency",
]
