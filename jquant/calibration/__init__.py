"""Reading evidence out of any JAX function: which leaves are weights, and what flows into them."""

from jquant.calibration.capture import capture
from jquant.calibration.evidence import Evidence
from jquant.calibration.find import Use, Weight, Weights, find_weights
from jquant.calibration.tokens import TokenWeights

__all__ = ["Evidence", "TokenWeights", "Use", "Weight", "Weights", "capture", "find_weights"]
