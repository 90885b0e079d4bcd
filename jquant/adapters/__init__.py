"""What is trained beside the codes of a quantized model, and what comes of it afterwards."""

from jquant.adapters.adapt import Frozen, adapt
from jquant.adapters.fold import Folded, FoldedWeight, fold
from jquant.adapters.kinds import LoRA, Scales, Whole
from jquant.adapters.merge import merge

__all__ = ["Folded", "FoldedWeight", "Frozen", "LoRA", "Scales", "Whole", "adapt", "fold", "merge"]
