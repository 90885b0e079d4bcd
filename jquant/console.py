"""What a long command says while it works: bars with the time left, or plain lines, or nothing.

`Narrator` writes to standard error, so that standard output holds results only. On a terminal a
stage of work is a bar that moves; elsewhere (a log, CI) it is a line when it begins, one every
`EVERY` seconds with the time left, and one when it ends.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

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
            with self._bar() as progress:
                task = progress.add_task(title, total=total)
                yield lambda done: progress.update(task, completed=done)
        else:
            self.say(f"{title} ...")
            lines = _Lines(self, title, total)
            yield lines.update
            self.say(f"{title}: done in {_duration(time.monotonic() - lines.start)}")

    @contextlib.contextmanager
    def stages(self, titles: dict[str, tuple[str, int]]) -> Iterator[Callable[[str, int], None]]:
        """Stages that follow one another: `update(name, done)` moves the one of that name.

        `titles` maps a name to its title and its number of steps. The first stage begins with the
        block, each other one with its first step, which ends the one before.
        """
        now = next(iter(titles))
        with contextlib.ExitStack() as current:
            move = current.enter_context(self.stage(*titles[now]))

            def update(name: str, done: int) -> None:
                nonlocal now, move
                if name != now:
                    current.close()
                    now, move = name, current.enter_context(self.stage(*titles[name]))
                move(done)

            yield update

    def _bar(self) -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.err,
            expand=True,
        )


class _Lines:
    """The lines of a stage where there is no terminal."""

    def __init__(self, narrator: Narrator, title: str, total: int) -> None:
        self.narrator, self.title, self.total = narrator, title, total
        self.start = self.said = time.monotonic()

    def update(self, done: int) -> None:
        now = time.monotonic()
        if now - self.said < EVERY or not 0 < done < self.total:
            return
        self.said = now
        left = (now - self.start) / done * (self.total - done)
        self.narrator.say(f"{self.title}: {done}/{self.total}, about {_duration(left)} left")


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
