"""What `jquant quantize` does around the job: checks before it, what it leaves and shows after."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
from cyclopts import Parameter

from jquant.allocation import Allocation
from jquant.allocation.choices import Choices
from jquant.app.console import Narrator
from jquant.app.recipes import Aim
from jquant.app.sources import Model, names_maker
from jquant.calibration.stages import Sequential
from jquant.deprecated import RENAMED
from jquant.errors import CheckpointError
from jquant.jobs.report import Report
from jquant.models.coded import dequantized
from jquant.models.loading import quantized_as
from jquant.schemes.scheme import Scheme
from jquant.trees.lazy import is_lazy
from jquant.weights.qtensor import dequantize_weight, is_qtensor, tree_map_weights

# What --sequential was called, with "all" for none; still taken, no longer shown.
Granularity = Annotated[Literal["weight", "block", "all"] | None, Parameter(show=False)]


class Chosen(NamedTuple):
    """What was chosen for a plan before the job.

    Attributes:
        axes: of groups, where `--adadim` asks for it.
        shares: of the bits, where `--bits` asks for it.
    """

    axes: Choices | None = None
    shares: Allocation | None = None


def sequential_of(sequential: Sequential, granularity: Granularity) -> Sequential:
    """What makes one stage, by either option; a DeprecationWarning for the old one."""
    if granularity is None:
        return sequential
    message = "--granularity is deprecated, write --sequential"
    warnings.warn(message, DeprecationWarning, stacklevel=1)
    return RENAMED["quantize.sequential"].get(granularity, granularity)


def need_free(output: Path, force: bool) -> None:
    """ValueError: there is something at `output` already, and it is not to be replaced."""
    is_taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if is_taken and not force:
        raise ValueError(f"{output} is there already; give another name, or --force to replace it")


def need_unquantized(source: str, requantize: bool) -> None:
    """Refuses files whose weights are codes already, unless that is asked for; reads no weight.

    Raises:
        CheckpointError: they are; or there is no such model, or it is damaged.
    """
    if not requantize and not names_maker(source):
        _refuse(source, quantized_as(source))


def decoded(model: Model, requantize: bool, narrator: Narrator) -> Model:
    """The model with arrays in place of weights that are codes, read when their turn comes.

    Says which codes they were.

    Raises:
        CheckpointError: there are such weights, and it is not asked for.
    """
    leaves = jax.tree.leaves(model.params, is_leaf=is_qtensor)
    grids = [leaf.grid for leaf in leaves if is_qtensor(leaf)]
    kinds = tuple(sorted({f"{type(grid).__name__} of {grid.bits} bits" for grid in grids}))
    if not requantize:
        _refuse(model.source, kinds)
        return model
    if kinds or not model.is_made and (kinds := quantized_as(model.source)):
        held = f"{model.source} is quantized already ({', '.join(kinds)})"
        narrator.say(f"{held}: its weights are decoded, and quantized anew")
    return replace(model, params=tree_map_weights(_decoded, model.params))


def _decoded(leaf: Any) -> Any:
    if not is_qtensor(leaf):
        return leaf
    return dequantized(leaf, leaf.dtype) if is_lazy(leaf.codes) else dequantize_weight(leaf)


def _refuse(source: str, kinds: Sequence[str]) -> None:
    """CheckpointError: a model holds codes of some kinds."""
    if kinds:
        raise CheckpointError(
            f"{source} is quantized already ({', '.join(kinds)}), and quantizing twice would add "
            "one error to another; give the model it was made from, or pass --requantize to decode "
            "its weights and quantize them anew (`jquant evaluate --quantized keep` runs it as it "
            "is)"
        )


def need_foreseeable(objective: Aim, dry_run: bool) -> None:
    """ValueError: a dry run of a job whose steps are not known beforehand."""
    if dry_run and objective != "own":
        raise ValueError(f"--dry-run cannot tell what --objective {objective} takes; leave out one")


def needs_text(plan: Mapping[str, Scheme], objective: Aim) -> bool:
    """Whether the job runs the model on text."""
    return objective != "own" or any(scheme.needs for scheme in plan.values())


def write_report(output: Path, report: Report, chosen: Chosen) -> None:
    """Leaves `report.json` in the folder that was written, or beside the file."""
    folder = output.is_dir()
    place = output / "report.json" if folder else output.with_name(f"{output.name}.report.json")
    rows = report.to_json()
    if chosen.shares is not None:
        rows |= {"allocation": chosen.shares.to_json()}
    place.write_text(json.dumps(rows, indent=1, default=str), "utf-8")


def show_weights(narrator: Narrator, report: Report, chosen: Chosen) -> None:
    """Shows a line for every weight, of each thing that was chosen and of the job."""
    for part in (*chosen, report):
        if part is not None:
            narrator.show(part.table())
