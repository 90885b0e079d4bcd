"""Ways out: quantized models as the files that other engines open.

`export` writes a Hugging Face folder (compressed-tensors, GPTQ, AWQ, plain safetensors) of a model
that `jquant.models.load` gave.
"""

from jquant.exporters.exporting import Exported, export
from jquant.exporters.folder import edited

__all__ = ["Exported", "edited", "export"]
