"""Grids: the points a weight may take. See `jquant.grids.base` for what one is."""

from functools import partial

from jquant import deprecated
from jquant.grids.affine import Affine
from jquant.grids.base import Grid, GridParams, code_dtype, nearest
from jquant.grids.blocks import MX, NV
from jquant.grids.codebook import AF4, NF4, Codebook
from jquant.grids.floating import Float
from jquant.grids.gguf import GGUF
from jquant.grids.hqq import HQQ
from jquant.grids.joint import Joint
from jquant.grids.kmeans import KMeans
from jquant.grids.power import Power
from jquant.grids.ranges import MSE, MinMax
from jquant.grids.uniform import Uniform

__all__ = [
    "AF4",
    "GGUF",
    "HQQ",
    "MSE",
    "MX",
    "NF4",
    "NV",
    "Affine",
    "Codebook",
    "Float",
    "Grid",
    "GridParams",
    "Joint",
    "KMeans",
    "MinMax",
    "Power",
    "Uniform",
    "code_dtype",
    "nearest",
]

__getattr__ = partial(deprecated.attribute, __name__)
