"""A job goes on only with the objective it was begun with: what it computes, not its name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.errors import WorkDirError
from jquant.grids import Uniform
from jquant.jobs.fingerprint import digest_objective
from jquant.jobs.request import Request, aim_of
from jquant.learning.objectives import KL, MSE, Fisher, Reconstruction
from jquant.rounding import Descent, DiscQuant
from tests.functions import _normal

KEY = jax.random.key(0)
PARAMS = {"a": _normal(0, 8, 8), "b": _normal(1, 8, 4)}
BATCHES = [_normal(2, 6, 8), _normal(3, 5, 8)]


def fn(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


SCHEME = jq.Scheme(Uniform(3), None, DiscQuant(descent=Descent(4, 0.1, checks=2)))
PLAN = jq.plan(jq.find_weights(fn, PARAMS, BATCHES[0]), {".*": SCHEME})


def said(objective, batches=BATCHES):
    """The item of a fingerprint, as `quantize` makes it for this objective."""
    request = Request(fn, PARAMS, PLAN, {}, KEY, aim_of(objective)).checked(batches)
    return digest_objective(request, request.walk(None))


def factory(power, weights=None):
    def objective(found, wanted, *inputs):
        if isinstance(found, list):
            (found,), (wanted,) = found, wanted
        miss = jnp.abs(found - wanted) ** power
        return jnp.mean(miss if weights is None else miss * weights[: miss.shape[-1]])

    return objective


def another(found, wanted, *inputs):
    """What `factory(2)` makes, by another name."""
    return factory(2)(found, wanted, *inputs)


HALF, ONES = jnp.full(8, 0.5, jnp.float32), jnp.ones(8, jnp.float32)
each_way = pytest.mark.parametrize("way", [lambda o: o, Reconstruction], ids=["whole", "stages"])


@each_way
def test_what_it_computes_is_what_counts(way) -> None:
    base = said(way(factory(2)))
    assert said(way(factory(2))) == said(way(another)) == said(way(lambda *a: another(*a))) == base
    assert said(way(functools.partial(another))) == base
    others = [factory(3), factory(2, HALF), factory(2, ONES), MSE(), None]
    digests = {base, *(said(way(o)) if o is not None else said(None) for o in others)}
    assert len(digests) == len(others) + 1
    assert said(way(factory(2, HALF.copy()))) == said(way(factory(2, HALF)))


def test_known_objectives_and_their_arguments() -> None:
    all_ = [KL(), KL(2.0), Fisher(), MSE(), Reconstruction(), Reconstruction(inputs="full"), None]
    assert len({said(objective) for objective in all_}) == len(all_)
    assert said(KL(2.0)) == said(KL(2.0)) and said(Reconstruction()) == said(Reconstruction(MSE()))


def test_every_kind_of_batch_is_seen() -> None:
    """An objective may be another one where there are fewer tokens."""

    def at(tokens):
        return lambda found, wanted, x: (
            jnp.mean((found - wanted) ** 2) * (2.0 if len(x) == tokens else 1.0)
        )

    assert len({said(at(6)), said(at(5)), said(at(4))}) == 3
    assert said(at(5), BATCHES[:1]) == said(at(4), BATCHES[:1])


def test_state_outside_jax_is_what_it_is_when_traced() -> None:
    state = {"scale": 1.0}
    random = np.random.default_rng(0)

    def counted(found, wanted, *inputs):
        return jnp.mean((found - wanted) ** 2) * state["scale"]

    def drawn(found, wanted, *inputs):
        return jnp.mean((found - wanted) ** 2) * float(random.random())

    before = said(counted)
    assert said(counted) == before
    state["scale"] = 2.0
    assert said(counted) != before
    assert said(drawn) != said(drawn)  # never taken for the same job


def test_python_while_it_runs_is_refused(tmp_path) -> None:
    def factory(size):
        def objective(found, wanted, *inputs):
            miss = jnp.mean((found - wanted) ** 2)
            kind = jax.ShapeDtypeStruct((), jnp.float32)
            return jax.lax.cond(
                miss > 0, lambda m: jax.pure_callback(lambda m: m * size, kind, m), abs, miss
            )

        return objective

    with pytest.raises(WorkDirError, match="calls back into Python.*write it in JAX"):
        jq.quantize(
            fn,
            PARAMS,
            PLAN,
            BATCHES,
            objective=factory(np.float32(2)),
            key=KEY,
            work_dir=tmp_path / "new",
        )
    assert not (tmp_path / "new" / "learned").exists()

    def printing(found, wanted, *inputs):
        jax.debug.print("{}", found.mean())
        return jnp.mean((found - wanted) ** 2)

    assert said(printing) == said(printing)


@each_way
def test_a_job_does_not_go_on_with_another_closure(way, tmp_path) -> None:
    def run(objective, folder=tmp_path):
        return jq.quantize(
            fn, PARAMS, PLAN, BATCHES[:1], objective=way(objective), key=KEY, work_dir=folder
        )[0]

    first = run(factory(2))
    with pytest.raises(WorkDirError, match="the objective changed"):
        run(factory(1))
    jax.tree.map(np.testing.assert_array_equal, run(another), first)
