"""The one driver: a grid, a rounding and a plan meet here, and nowhere else.

`quantize_weight` turns one array into a `QTensor`: canonical view, rounding, packing. `quantize`
does
it for every weight of a plan: it checks all there is to check before any work, reads the evidence
out of the function, and says in the report what became of each weight.
"""

from __future__ import annotations

import resource
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jquant.blocks import Layout, from_blocks, to_blocks
from jquant.calibration.capture import capture
from jquant.calibration.evidence import Evidence
from jquant.calibration.weights import path_of
from jquant.distortion import bits_per_weight, output_error
from jquant.errors import EvidenceError, PlanError, WeightError, near
from jquant.grids.base import nearest
from jquant.qtensor import QTensor
from jquant.report import Report, WeightReport
from jquant.rounding.base import Rounded
from jquant.scheme import Plan, Scheme

Progress = Callable[[str, int, int], None]  # what ("capture" or a path), done, of how many


def quantize_weight(
    w: Float[Array, ...],
    scheme: Scheme,
    layout: Layout,
    *,
    evidence: Evidence | None = None,
    key: PRNGKeyArray | None = None,
) -> tuple[QTensor, dict[str, Array]]:
    """Quantize one weight.

    Args:
        w: the weight, in its own shape.
        scheme: what to do.
        layout: how `w` is read as `[*batch, out, in]`; see `Weight.layout`.
        evidence: what is known of its inputs.
        key: randomness, for roundings that need it.

    Returns:
        the quantized weight, and numbers per `[*batch]`: `error`, `nearest_error` and `power` (the
        output error of this and of nearest rounding, and of leaving the weight out; without
        evidence those of the weights themselves), and what the rounding reports.
    """
    canonical = layout.canonical(w)
    rounded = scheme.rounding(canonical, scheme.grid, scheme.groups, evidence=evidence, key=key)
    moment = None if evidence is None else evidence.second_moment
    info = dict(_errors(canonical, rounded, moment, scheme), **rounded.info)
    q = QTensor(
        rounded.codes, dict(rounded.params), scheme.grid, scheme.groups, layout, jnp.dtype(w.dtype)
    )
    return q, info


@jax.jit(static_argnames="scheme")
def _errors(
    w: Float[Array, "*batch out in"],
    rounded: Rounded,
    moment: Float[Array, "*batch in in"] | None,
    scheme: Scheme,
) -> dict[str, Array]:
    """Squared errors that the rounding has not reported itself."""
    grid, blocks = scheme.grid, scheme.groups
    length = w.shape[-1 if blocks.axis == "in" else -2]
    w = w.astype(jnp.float32)

    def size(e: Array) -> Array:
        return jnp.sum(e**2, (-2, -1)) if moment is None else output_error(e, moment)

    def decoded(codes: Array) -> Array:
        return from_blocks(grid.decode(codes, rounded.params), blocks, length)

    found = {"power": size(w)}
    if "error" not in rounded.info:
        found["error"] = size(w - decoded(to_blocks(rounded.codes.astype(jnp.int32), blocks)))
    if "nearest_error" not in rounded.info:
        found["nearest_error"] = size(
            w - decoded(nearest(grid, to_blocks(w, blocks), rounded.params))
        )
    return found


def quantize(
    fn: Callable[..., Any],
    params: PyTree,
    plan: Plan,
    batches: Iterable[Any] | None = None,
    *,
    evidence: Mapping[str, Evidence] | None = None,
    key: PRNGKeyArray | None = None,
    progress: Progress | None = None,
) -> tuple[PyTree, Report]:
    """Quantize the weights of a plan, calibrated on batches or on given evidence.

    All weights are calibrated in one pass of the unquantized function, then solved one by one.

    Args:
        fn: any JAX function `fn(params, *inputs)`; not called when no evidence is to be read.
        params: its parameters.
        plan: what `plan` returned.
        batches: calibration batches, each one array or a tuple of `fn`'s inputs.
        evidence: path → `Evidence` (as from `capture`), for the weights it names instead of
            batches.
        key: randomness, required when a rounding needs it; each weight's key is derived from its
            path, so that adding a weight changes no other.
        progress: called as `progress(what, done, total)` while capturing and after every weight.

    Returns:
        the parameters with a `QTensor` in place of each planned weight, and the report.

    Raises:
        PlanError, WeightError, EvidenceError: see the messages; raised before any work, except for
            inputs that turn out not finite, and for a factorisation that fails where the scheme
            allows no fallback.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    arrays = {path_of(keys): leaf for keys, leaf in leaves}
    _check_weights(plan, arrays)
    found = dict(evidence or {})
    _check_needs(plan, found, batches is not None, key)
    if batches is not None:
        wanted = [p for p in plan if plan.weights[p].has_inputs and p not in found]
        total = len(batches) if hasattr(batches, "__len__") else 0  # type: ignore[arg-type]
        if wanted:
            told = None if progress is None else lambda done: progress("capture", done, total)
            found |= capture(fn, params, batches, paths=wanted, progress=told)
    _check_evidence(plan, found)
    done: dict[str, QTensor] = {}
    rows: dict[str, WeightReport] = {}
    for number, (path, scheme) in enumerate(plan.items(), start=1):
        start = time.perf_counter()
        own = None if key is None else jax.random.fold_in(key, zlib.crc32(path.encode()))
        layout = plan.weights[path].layout
        q, info = quantize_weight(
            arrays[path], scheme, layout, evidence=found.get(path),
            key=own if "key" in scheme.rounding.needs else None,
        )  # fmt: skip
        numbers = {name: np.asarray(value) for name, value in info.items()}
        seconds = time.perf_counter() - start
        rows[path] = _row(path, scheme, q, numbers, found.get(path), seconds)
        done[path] = q
        if progress is not None:
            progress(path, number, len(plan))
    quantized = [done.get(path_of(keys), leaf) for keys, leaf in leaves]
    kept = tuple(path for path in plan.weights if path not in plan)
    distinct = {id(e.second_moment): e for e in found.values()}.values()
    held = sum(leaf.nbytes for e in distinct for leaf in jax.tree.leaves(e))
    return jax.tree.unflatten(structure, quantized), Report(rows, kept, held, _peak_bytes())


def _row(
    path: str,
    scheme: Scheme,
    q: QTensor,
    info: Mapping[str, np.ndarray],
    evidence: Evidence | None,
    seconds: float,
) -> WeightReport:
    failed = bool(np.any(info.get("failed", 0)))
    if failed and not scheme.fallback:
        raise EvidenceError(
            f"weight {path!r}: its second moment could not be factorised at any damping up to the "
            "cap; pass more calibration tokens, a larger damping, or Scheme(..., fallback=True) to "
            "let nearest rounding stand in"
        )
    power = float(info["power"].sum()) or 1.0
    return WeightReport(
        path=path,
        shape=q.shape,
        scheme=scheme,
        bits_per_weight=bits_per_weight(q.codes, q.params, scheme.grid.bits),
        error=max(float(info["error"].sum()), 0.0) / power,
        nearest_error=max(float(info["nearest_error"].sum()), 0.0) / power,
        tokens=None if evidence is None else int(np.asarray(evidence.count).min()),
        damping=float(info["damping"].max()) if "damping" in info else None,
        dead=int(info["dead"].sum()) if "dead" in info else 0,
        fallback=failed,
        seconds=seconds,
    )


def _check_weights(plan: Mapping[str, Scheme], arrays: Mapping[str, Any]) -> None:
    if not isinstance(plan, Plan):
        raise PlanError(
            f"expected what jq.plan returns, got {type(plan).__name__}; call jq.plan first"
        )
    flags = {}
    for path in plan:
        leaf = arrays.get(path)
        if leaf is None:
            raise PlanError(
                f"plan names {path!r}, which params do not have; near: {near(path, arrays)}"
            )
        if tuple(leaf.shape) != plan.weights[path].shape:
            raise PlanError(
                f"plan was made for {path!r} of shape {plan.weights[path].shape}, got "
                f"{tuple(leaf.shape)}; make the plan from find_weights on these params"
            )
        if isinstance(leaf, QTensor) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise WeightError(f"weight {path!r} must be a float array, got {leaf.dtype}; keep it")
        if leaf.ndim < 2:
            raise WeightError(f"weight {path!r} has {leaf.ndim} axes, needs at least 2; keep it")
        flags[path] = _finite(leaf)
    for path, flag in flags.items():
        if not flag:
            raise WeightError(
                f"weight {path!r} holds NaN or infinite values; repair it, or keep it (jq.keep)"
            )


@jax.jit
def _finite(leaf: Array) -> Array:
    return jnp.all(jnp.isfinite(leaf))


def _check_needs(
    plan: Plan, evidence: Mapping[str, Evidence], batches: bool, key: PRNGKeyArray | None
) -> None:
    for path, scheme in plan.items():
        needs, name = scheme.rounding.needs, type(scheme.rounding).__name__
        if "key" in needs and key is None:
            raise PlanError(f"weight {path!r}: {name} is random; pass key=jax.random.key(seed)")
        if "moment" in needs and path not in evidence:
            if not plan.weights[path].has_inputs:
                raise EvidenceError(
                    f"weight {path!r} is only looked up, so it has no second moment, which {name} "
                    "needs; use rounding.Nearest() or keep it"
                )
            if not batches:
                raise EvidenceError(
                    f"weight {path!r}: {name} needs the second moment of its inputs; pass "
                    "calibration batches, or evidence={path: Evidence(...)}"
                )


def _check_evidence(plan: Plan, evidence: Mapping[str, Evidence]) -> None:
    for path, scheme in plan.items():
        if path not in evidence:
            continue
        found, weight = evidence[path], plan.weights[path]
        moment = found.second_moment
        shape = jax.eval_shape(
            weight.layout.canonical, jax.ShapeDtypeStruct(weight.shape, weight.dtype)
        ).shape
        if moment.shape != (*shape[:-2], shape[-1], shape[-1]):
            raise EvidenceError(
                f"weight {path!r}: second moment must be {(*shape[:-2], shape[-1], shape[-1])}, "
                f"got {moment.shape}"
            )
        fine, skew = (np.asarray(a) for a in _sound(moment))
        if not fine:
            raise EvidenceError(f"weight {path!r}: its second moment holds NaN or infinite values")
        if skew > 1e-3:
            raise EvidenceError(
                f"weight {path!r}: its second moment is not symmetric (off by {skew:.1e} of its "
                "largest entry); pass the sum of x xᵀ over tokens"
            )
        if "moment" in scheme.rounding.needs:
            tokens = np.asarray(found.count)
            if tokens.max() <= 0:
                raise EvidenceError(
                    f"weight {path!r} has seen no tokens; pass batches that reach it"
                )
            if tokens.min() < shape[-1]:
                warnings.warn(
                    f"weight {path!r}: {int(tokens.min())} tokens for {shape[-1]} input channels; "
                    "its second moment is rank deficient, more tokens would help",
                    stacklevel=3,
                )


@jax.jit
def _sound(moment: Array) -> tuple[Array, Array]:
    skew = jnp.max(jnp.abs(moment - jnp.swapaxes(moment, -1, -2)))
    return jnp.all(jnp.isfinite(moment)), skew / jnp.maximum(jnp.max(jnp.abs(moment)), 1e-30)


def _peak_bytes() -> int:
    """The largest resident size of this process so far; kilobytes on Linux, bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
