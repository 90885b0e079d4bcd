"""Low-precision arithmetic for any JAX program: `emulate` rounds every result to a format."""

from jquant.arithmetic.emulate import emulate
from jquant.arithmetic.operations import Operation

__all__ = ["Operation", "emulate"]
