"""Ways out: quantized models as the files that other engines open.

`export` writes a Hugging Face folder (compressed-tensors, GPTQ, AWQ, plain safetensors) or a GGUF
file of a model that `jquant.models.load` gave; `need_held` tells before quantizing whether a format
can hold a plan. Of what lies on a disk, `check` reads all, and `ask` has the engine itself compute.
"""

from jquant.exporters.checking import Checked, CheckedTensor, check
from jquant.exporters.clients import Answer, Apart, apart, ask
from jquant.exporters.exporting import Exported, export
from jquant.exporters.folder import edited
from jquant.exporters.planned import need_held

__all__ = [
    "Answer", "Apart", "Checked", "CheckedTensor", "Exported", "apart", "ask", "check",
    "edited", "export", "need_held",
]  # fmt: skip
