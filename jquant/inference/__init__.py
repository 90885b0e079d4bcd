"""Running a function on quantized weights."""

from jquant.inference.apply import apply

__all__ = ["apply"]
