"""Ways out: quantized models as the files that other engines open.

`export` writes a Hugging Face folder (compressed-tensors, GPTQ, AWQ, plain safetensors) or a GGUF
file of a model that `jquant.models.load` gave; `need_held` tells before quantizing whether a format
can hold a plan.
"""

from jquant.exporters.exporting import Exported, export
from jquant.exporters.folder import edited
from jquant.exporters.planned import need_held

__all__ = ["Exported", "edited", "export", "need_held"]
