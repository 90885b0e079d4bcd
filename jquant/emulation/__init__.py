"""Low-precision arithmetic for any JAX program: `emulate` rounds every result to a format."""

from jquant.emulation.emulate import emulate
from jquant.emulation.operations import Operation

__all__ = ["Operation", "emulate"]
