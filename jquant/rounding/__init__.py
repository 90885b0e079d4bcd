"""Roundings: how a code is chosen for every weight. See `jquant.rounding.base` for what one is."""

from jquant.rounding.base import Rounded, Rounding
from jquant.rounding.elementwise import Nearest
from jquant.rounding.gptq import GPTQ
from jquant.rounding.stochastic import Stochastic, stochastic_round

__all__ = ["GPTQ", "Nearest", "Rounded", "Rounding", "Stochastic", "stochastic_round"]
