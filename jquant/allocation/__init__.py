"""Choosing a scheme for every weight: by rules, its axis, its rank, and who gets the bits."""

from jquant.allocation.adadim import adadim
from jquant.allocation.bits import Allocation, Share, allocate
from jquant.allocation.candidates import Candidates, candidates
from jquant.allocation.choices import Choice, Choices
from jquant.allocation.clusters import clusters
from jquant.allocation.correlation import canonical_correlation, cmpq
from jquant.allocation.disturbed import pmpq, tdmpq
from jquant.allocation.exact import exact_kl
from jquant.allocation.exponents import power_exponent
from jquant.allocation.gradients import fisher, kl_gradient, next_token_loss, taylor
from jquant.allocation.ranks import lorc_ranks
from jquant.allocation.sensitivity import Sensitivity
from jquant.schemes.plan import plan

__all__ = [
    "Allocation",
    "Candidates",
    "Choice",
    "Choices",
    "Sensitivity",
    "Share",
    "adadim",
    "allocate",
    "candidates",
    "canonical_correlation",
    "clusters",
    "cmpq",
    "exact_kl",
    "fisher",
    "kl_gradient",
    "lorc_ranks",
    "next_token_loss",
    "plan",
    "pmpq",
    "power_exponent",
    "taylor",
    "tdmpq",
]
