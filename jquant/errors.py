"""The typed errors of jquant.

Every class here is a `ValueError`, so callers may catch that; every message names the path or
argument, what was got, and what to pass instead. They are raised before work starts (never silently
less), on the host, never from inside a compiled program.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class TreeError(ValueError):
    """Parameters or inputs hold what is no array or number, or two leaves with one path."""


class WeightError(ValueError):
    """A parameter cannot be quantized as asked: non-finite, wrong rank, wrong dtype."""


class PlanError(ValueError):
    """A plan does not fit the weights: a rule matches nothing, is shadowed, or is not a scheme."""


class EvidenceError(ValueError):
    """Evidence a rounding needs is missing, malformed, or rests on no tokens."""


class ObjectiveError(ValueError):
    """An objective is not finite, or a weight that is to be learned does not move it."""


class UnsupportedPrimitiveError(ValueError):
    """An operation that a weight enters, or a program to emulate has, is not understood."""


class QuantizedWeightError(ValueError, TypeError, AttributeError):
    """A quantized weight is used as the array it stands for.

    Also what Python raises for an operand, and for an attribute that is not there, so that whoever
    asks whether a value can be used as an array (`hasattr(value, "T")`) is told that it cannot.
    """


class FormatError(ValueError):
    """Numbers cannot be rounded to a format, a rule for formats decides nothing, or a checkpoint's
    format cannot hold a weight."""


class CheckpointError(ValueError):
    """A file is truncated, corrupt, hostile, or of another version; nothing of it was used."""


class PacketError(ValueError):
    """A packet is damaged or of another form than its receiver's, or packets have no mean."""


class ExportError(ValueError):
    """An export cannot take its place, or what was read back is not what was to be written."""


class ClientError(ValueError):
    """An engine that an export is to be run by is not installed, or does not open it."""


class WorkDirError(ValueError):
    """A work directory cannot be written to, or holds the stages of another job."""


class ProcessError(ValueError):
    """The processes of a job do not ask for the same, or one of them could not go on."""


class MissingPackageError(ValueError, ImportError):
    """A package that an optional part of jquant needs is not installed."""


@contextlib.contextmanager
def extra(name: str, otherwise: str = "") -> Iterator[None]:
    """A `with` block of imports from packages that `pip install 'jquant-jax[name]'` installs.

    Args:
        name: the extra, as in `pyproject.toml`.
        otherwise: what can be done without the packages, for the message.

    Raises:
        MissingPackageError: an import of the block fails; the message names the extra.

    Example:
        >>> with extra("distances"):
        ...     import no_such_package
        Traceback (most recent call last):
        ...
        jquant.errors.MissingPackageError: No module named 'no_such_package': pip install ...
    """
    try:
        yield
    except ImportError as error:
        advice = f"pip install 'jquant-jax[{name}]'{otherwise and ', ' + otherwise}"
        missing = MissingPackageError(f"{error}: {advice}")
        missing.name = error.name
        raise missing from error


def near(name: str, names: Iterable[str], count: int = 3) -> str:
    """`did you mean …` for an error message: the `count` names nearest to `name`."""
    nearest = difflib.get_close_matches(name, list(names), n=count, cutoff=0.0)
    return ", ".join(map(repr, nearest)) or "none exist"
