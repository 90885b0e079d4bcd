"""Quantized models as files that other programs run."""

from jquant.exporters.gguf import write_gguf

__all__ = ["write_gguf"]
