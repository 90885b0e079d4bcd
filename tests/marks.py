"""Which cases of a test `./run tests` runs; the others are of the same law and marked slow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def mostly_slow(
    cases: Iterable[Any], quick: Callable[[Any], bool] | Iterable[Any], ids: Any = None
) -> list[Any]:
    """The cases for `pytest.mark.parametrize`, marked slow but for the quick ones.

    Args:
        cases: values, or tuples of values.
        quick: tells those that are quick, or lists them.
        ids: of the cases in their order, or a function of a case; None: pytest's.
    """
    listed = list(cases)
    is_quick = quick if callable(quick) else [*quick].__contains__
    names: list[Any] = [None] * len(listed)
    if ids is not None:
        names = [ids(case) for case in listed] if callable(ids) else list(ids)
    assert any(map(is_quick, listed)), "no case is quick: mark the test"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if is_quick(case) else pytest.mark.slow,
            id=name,
        )
        for case, name in zip(listed, names, strict=True)
    ]
