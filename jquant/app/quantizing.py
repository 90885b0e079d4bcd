"""What `jquant quantize` does around the job: checks before it, what it leaves and shows after."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from cyclopts import Parameter

from jquant.allocation import Allocation
from jquant.allocation.choices import Choices
from jquant.app.console import Narrator
from jquant.app.recipes import Aim
from jquant.calibration.stages import Sequential
from jquant.deprecated import RENAMED
from jquant.jobs.report import Report
from jquant.models.loading import quantized_as
from jquant.schemes.scheme import Scheme

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


def say_requantized(narrator: Narrator, source: str) -> None:
    """Says of a model whose file is quantized already that it is quantized anew."""
    if kinds := quantized_as(source):
        narrator.say(
            f"{source} is quantized already ({', '.join(kinds)}): its weights are dequantized, and "
            "quantized anew; evaluate and generate take it as it is with --quantized keep"
        )


def need_foreseeable(objective: Aim, dry_run: bool) -> None:
    """ValueError: a dry run of a job whose steps are not known beforehand."""
    if dry_run and objective != "own":
        raise ValueError(f"--dry-run cannot tell what --objective {objective} takes; leave out one")


def needs_text(plan: Mapping[str, Scheme], objective: Aim) -> bool:
    """Whether the job runs the model on text."""
    return objective != "own" or any(scheme.needs for scheme in plan.values())


def write_report(folder: Path, report: Report, chosen: Chosen) -> None:
    """Leaves `report.json` beside the checkpoint."""
    rows = report.to_json()
    if chosen.shares is not None:
        rows |= {"allocation": chosen.shares.to_json()}
    (folder / "report.json").write_text(json.dumps(rows, indent=1, default=str), "utf-8")


def show_weights(narrator: Narrator, report: Report, chosen: Chosen) -> None:
    """Shows a line for every weight, of each thing that was chosen and of the job."""
    for part in (*chosen, report):
        if part is not None:
            narrator.show(part.table())
