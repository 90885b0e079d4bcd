"""Roundings: how a code is chosen for every weight. See `jquant.rounding.base` for what one is."""

from jquant.rounding.adaround import AdaRound
from jquant.rounding.base import Rounded, Rounding
from jquant.rounding.descent import Descent
from jquant.rounding.discquant import DiscQuant
from jquant.rounding.elementwise import Nearest
from jquant.rounding.gptq import GPTQ
from jquant.rounding.guided import Guided
from jquant.rounding.nupes import NUPES
from jquant.rounding.polish import Polish
from jquant.rounding.signround import SignRound
from jquant.rounding.stochastic import Stochastic, stochastic_round

__all__ = [
    "GPTQ",
    "NUPES",
    "AdaRound",
    "Descent",
    "DiscQuant",
    "Guided",
    "Nearest",
    "Polish",
    "Rounded",
    "Rounding",
    "SignRound",
    "Stochastic",
    "stochastic_round",
]
