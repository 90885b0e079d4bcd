"""The table of primitives, and the rules that are written by it."""

import jax
import pytest
from jax.extend import core

from jquant.axes import contraction
from jquant.calibration import lookups, views
from jquant.programs import primitives
from jquant.programs.calls import CALLS, REMATS
from jquant.programs.primitives import having
from tests.networks import NETWORKS, Network

ROWS = frozenset().union(*primitives._TRAITS.values())


def reached(jaxpr: core.Jaxpr) -> set[str]:
    """The primitives in a jaxpr and in the bodies of its equations."""
    names = {eqn.primitive.name for eqn in jaxpr.eqns}
    for eqn in jaxpr.eqns:
        for body in core.jaxprs_in_params(eqn.params):
            names |= reached(body)
    return names


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_every_primitive_of_a_network_has_a_row(network: Network) -> None:
    closed = jax.make_jaxpr(network.fn)(network.params, *network.batches[0])
    assert reached(closed.jaxpr) <= ROWS | CALLS | REMATS


def test_every_trait_has_its_rules() -> None:
    assert having("product") == contraction.PRODUCTS
    assert having("view") == views.VIEWS.keys()
    assert having("lookup") == lookups.RULES.keys()
    assert views.MADE.keys() < having("beside")


def test_no_primitive_has_two_rows_and_no_trait_is_misspelt() -> None:
    names = [name for name, *_ in primitives._ROWS]
    assert len(names) == len(set(names))
    described = primitives.__doc__ or ""
    assert all(f"* `{trait}`:" in described for trait in primitives._TRAITS)
    with pytest.raises(KeyError):
        having("veiw")
