"""Quantized inputs as a weight stores them: a scheme's choice, and the ranges of static ones."""

from __future__ import annotations

import jax

from jquant.calibration.evidence import Evidence
from jquant.calibration.spread import Spread
from jquant.numerics.extremes import largest
from jquant.schemes.scheme import check_inputs
from jquant.weights.activations import Activations
from jquant.weights.inputs import Inputs

_ranges = jax.jit(Spread.params, static_argnums=1)


def quantized_inputs(choice: Activations | None, evidence: Evidence | None) -> Inputs | None:
    """What is stored of how inputs are quantized; None where they are not.

    Raises:
        EvidenceError: ranges are static, and evidence (None: there is none) does not tell them.
    """
    if choice is None or choice.granularity != "static":
        return None if choice is None else Inputs(choice)
    check_inputs("", choice, evidence)
    assert evidence is not None
    if evidence.spread is not None:
        return Inputs(choice, dict(_ranges(evidence.spread, choice)))
    assert evidence.abs_max is not None
    most = largest(evidence.abs_max, axis=-1)
    return Inputs(choice, dict(choice.fit(-most, most)))
