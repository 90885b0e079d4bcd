"""Which cases of a test `./run tests` runs; the others are of the same law and marked slow."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest

EVERY_CASE = os.environ.get("EVERY_CASE", "0") != "0"


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


def covering(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Tuples in which every value of every axis occurs, as many as the longest axis has values.

    For laws in which the axes have little to do with each other. `EVERY_CASE=1` gives the product.
    """
    lists = [list(axis) for axis in axes]
    if EVERY_CASE:
        return list(itertools.product(*lists))
    # An axis that is through moves by one more than those before it: else equal lengths would
    # always meet in the same pairs.
    return [
        tuple(axis[(k + turn * (k // len(axis))) % len(axis)] for turn, axis in enumerate(lists))
        for k in range(max(map(len, lists)))
    ]
