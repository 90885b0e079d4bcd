"""Functions of models, their loaders and the demo's model.

`load(source)` turns a GGUF file, a Hugging Face directory or a hub id into `(fn, params,
tokenizer)`. The function is a `Decoder`, or a `TorchFunction`, which runs the code of
`transformers`: frozen values, pure in their parameters, so everything else in jquant treats them
like any other function. `from_torch` makes such a function of any PyTorch module. Nothing in the
library depends on this package; the command line, the notebooks and the benchmarks do.
"""

from jquant.errors import extra

with extra("models"):
    from jquant.models import smollm2
    from jquant.models.config import DecoderConfig
    from jquant.models.decoder import CachedStep, Decoder, Llama
    from jquant.models.generation import generate, stream
    from jquant.models.loading import load
    from jquant.models.quantized import is_quantized, load_quantized, save_quantized
    from jquant.models.torch_function import TorchFunction
    from jquant.models.torch_module import TorchConfig
    from jquant.models.torch_plain import from_torch
    from jquant.models.tree_in import from_tree

__all__ = [
    "CachedStep",
    "Decoder",
    "DecoderConfig",
    "Llama",
    "TorchConfig",
    "TorchFunction",
    "from_torch",
    "from_tree",
    "generate",
    "is_quantized",
    "load",
    "load_quantized",
    "save_quantized",
    "smollm2",
    "stream",
]
