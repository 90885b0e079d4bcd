"""Choosing a scheme for every weight: by rules, the axis of its groups, the rank of its term."""

from jquant.allocation.axes import adadim
from jquant.allocation.choices import Choice, Choices
from jquant.allocation.exponents import power_exponent
from jquant.allocation.ranks import lorc_ranks
from jquant.allocation.rules import plan

__all__ = ["Choice", "Choices", "adadim", "lorc_ranks", "plan", "power_exponent"]
