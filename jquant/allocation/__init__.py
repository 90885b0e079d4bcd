"""Choosing a scheme for every weight: by rules, and the axis of its groups by what harms less."""

from jquant.allocation.axes import adadim
from jquant.allocation.choices import Choice, Choices
from jquant.allocation.exponents import power_exponent
from jquant.allocation.rules import plan

__all__ = ["Choice", "Choices", "adadim", "plan", "power_exponent"]
