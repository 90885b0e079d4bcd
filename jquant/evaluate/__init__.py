"""How far a quantized model has moved: on tokens, and on any outputs."""

from jquant.evaluate.logits import (
    Comparison,
    agreement,
    compare,
    compare_all,
    kl,
    perplexity,
)
from jquant.evaluate.outputs import output_error

__all__ = [
    "Comparison",
    "agreement",
    "compare",
    "compare_all",
    "kl",
    "output_error",
    "perplexity",
]
