"""Formats of checkpoints that are quantized already: their tensors as `QTensor`s and back.

Each function here makes a `Codec`, whose `decode` carries codes and scales of a file over exactly,
and whose `encode` writes them again, byte for byte.
"""

from jquant.formats.base import Codec
from jquant.formats.block_types import gguf
from jquant.formats.compressed_tensors import (
    float_quantized,
    int_quantized,
    mxfp4_pack_quantized,
    nvfp4_pack_quantized,
    pack_quantized,
)
from jquant.formats.mlx import mlx
from jquant.formats.qwix import qarray
from jquant.formats.transposed import awq, gptq

__all__ = [
    "Codec",
    "awq",
    "float_quantized",
    "gguf",
    "gptq",
    "int_quantized",
    "mlx",
    "mxfp4_pack_quantized",
    "nvfp4_pack_quantized",
    "pack_quantized",
    "qarray",
]
