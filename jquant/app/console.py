"""What a long command says while it works: bars with the time left, or plain lines, or nothing.

`Narrator` writes to standard error, so that standard output holds results only. On a terminal a
stage of work is a bar that moves; elsewhere (a log, CI) it is a line when it begins, one every
`EVERY` seconds with the time left, and one when it ends.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from jquant.allocation.choices import Choices
from jquant.jobs.progress import Progress
from jquant.jobs.report import Report

EVERY = 10.0  # seconds between the lines of a stage where there is no terminal
_LOG_WIDTH = 110  # columns of tables where there is no terminal to ask

Update = Callable[[int], None]


class Narrator:
    """Says what is being done (`say`, `stage`) and shows results (`show`).

    Args:
        quiet: say nothing; results are still shown.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.out, self.err = _console(stderr=False), _console(stderr=True)
        self.quiet = quiet

    def say(self, line: str) -> None:
        """A line about the work."""
        if not self.quiet:
            self.err.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, result: RenderableType) -> None:
        """A result, on standard output."""
        if isinstance(result, str):
            self.out.print(result, markup=False, highlight=False, soft_wrap=True)
        else:
            self.out.print(result)

    @contextlib.contextmanager
    def stage(self, title: str, total: int) -> Iterator[Update]:
        """A piece of work in `total` steps; the block calls what it gets with the steps done."""
        if self.quiet:
            yield lambda done: None
        elif self.err.is_terminal:
            with self._bar(MofNCompleteColumn()) as progress:
                task = progress.add_task(title, total=total)
                yield lambda done: progress.update(task, completed=done)
        else:
            self.say(f"{title} ...")
            lines = _Lines(self, title)
            yield lambda done: lines.update(done / total, f"{done}/{total}")
            self.say(f"{title}: done in {_duration(time.monotonic() - lines.start)}")

    @contextlib.contextmanager
    def job(self, title: str) -> Iterator[Callable[[Progress], None]]:
        """A job in stages: one bar over all, with what is being done, and the error so far."""
        if self.quiet:
            yield lambda progress: None
        elif self.err.is_terminal:
            with self._bar(TaskProgressColumn()) as bar:
                task = bar.add_task(title, total=1.0)

                def move(progress: Progress) -> None:
                    bar.update(
                        task, completed=progress.fraction, description=f"{title}: {_told(progress)}"
                    )

                yield move
        else:
            self.say(f"{title} ...")
            lines = _Lines(self, title)
            yield lambda progress: lines.update(progress.fraction, _told(progress))
            self.say(f"{title}: done in {_duration(time.monotonic() - lines.start)}")

    def _bar(self, *columns: ProgressColumn) -> Bar:
        return Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            *columns,
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.err,
            expand=True,
        )


class _Lines:
    """The lines of a stage where there is no terminal."""

    def __init__(self, narrator: Narrator, title: str) -> None:
        self.narrator, self.title = narrator, title
        self.start = self.last = time.monotonic()

    def update(self, fraction: float, where: str) -> None:
        now = time.monotonic()
        if now - self.last < EVERY or not 0 < fraction < 1:
            return
        self.last = now
        left = (now - self.start) / fraction * (1 - fraction)
        self.narrator.say(f"{self.title}: {where}, about {_duration(left)} left")


def _told(progress: Progress) -> str:
    """Where a job is: `stage 3/120, rounding layers/0/mlp/down/kernel, error 0.43 of nearest`."""
    error = "" if math.isnan(progress.ratio) else f", error {progress.ratio:.2f} of nearest"
    where = f"stage {progress.stage + 1}/{progress.stages}"
    return f"{where}, {progress.doing} {progress.name}{error}"


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_LOG_WIDTH)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def megabytes(count: float) -> str:
    """Bytes for people: `56.7 MB` (10**6 bytes).

    Example:
        >>> megabytes(56_712_345), megabytes(900)
        ('56.7 MB', '0.9 kB')
    """
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def summary(report: Report, before: int, after: int, choices: Choices | None) -> Table:
    """What a quantization has come to, in a few lines; bytes before and after, axes if chosen."""
    table = Table(show_header=False)
    table.add_row("quantized", f"{len(report)} weights, {report.bits_per_weight:.2f} bits each")
    table.add_row("kept", ", ".join(report.kept) or "none")
    if choices is not None:
        outward = sum(choice.axis == "out" for choice in choices.values())
        table.add_row("axes", f"groups of {outward} weights along outputs, of the others inputs")
    table.add_row("error", f"{report.ratio:.3f} of that of nearest rounding (geometric mean)")
    looks = [(trace.looks[0], trace.looks[trace.kept_at]) for trace in report.traces]
    if looks:
        first, last = (sum(column) for column in zip(*looks, strict=True))
        table.add_row("objective", f"{first:.4g} → {last:.4g}, from nearest rounding to the best")
    for trace in report.traces:
        if trace.stopped:
            table.add_row("stopped early", f"{trace.names[0]} …: {trace.stopped}")
    table.add_row("bytes", f"{megabytes(before)} → {megabytes(after)}")
    if report.fallbacks:
        table.add_row("rounded to nearest instead", ", ".join(report.fallbacks))
    return table
