"""Choosing a scheme for every weight."""

from jquant.allocation.rules import plan

__all__ = ["plan"]
