"""Whether a format can hold what a plan will make, asked before anything is quantized."""

from __future__ import annotations

from typing import Any

from jquant.exporters.described import Described
from jquant.exporters.fused import notes_of
from jquant.exporters.targets import held, need_alike, need_module, target_named
from jquant.schemes.scheme import Plan


def need_held(fn: Any, plan: Plan, format: str) -> tuple[str, ...]:
    """Raise unless a format holds every weight that a plan quantizes; `export` then has no reason
    to refuse one.

    Args:
        fn: the model's function, as `jquant.models.load` gave it.
        plan: see `jquant.plan`.
        format: see `export`.

    Returns:
        what to know of the export that this would be, such as weights that engines multiply as one
        and that the plan has several schemes for.

    Raises:
        FormatError: it does not hold one; names its path, what stands in the way, and the nearest
            scheme that it holds. Or there is no such format.

    Example:
        >>> import jax, jquant as jq
        >>> fn = jq.models.Decoder(jq.models.DecoderConfig(32, 32, 64, 1, heads=4, kv_heads=2))
        >>> params = fn.init(jax.random.key(0))
        >>> weights = jq.find_weights(fn, params, jax.numpy.zeros((1, 4), "int32"))
        >>> plan = jq.plan(weights, {"layers.*": jq.presets.nf4(32), ".*": jq.keep})
        >>> need_held(fn, plan, "gptq")
        Traceback (most recent call last):
        ...
        jquant.errors.FormatError: 'layers/0/attention/k/kernel': gptq cannot hold the grid ...
    """
    target = target_named(format)
    if target.library:
        from jquant.exporters.named_trees import need_named

        need_named(target, fn, plan)
        return ()
    holdings, weights = [], {}
    for path, scheme in plan.items():
        if target.modules is not None:
            need_module(target, path, _kind_of(fn, path))
        weights[path] = Described.planned(plan.weights[path], scheme)
        holdings.append((path, held(target, path, weights[path])))
    need_alike(target, holdings)
    return notes_of(target.name, plan.weights, weights)


def _kind_of(fn: Any, path: str) -> str:
    from jquant.exporters.hugging_face import kind_of

    return kind_of(fn, path)
