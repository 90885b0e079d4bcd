"""What to cite for a plan: every choice in it names its papers, and the entries stand in a file.

A grid, a rounding or any other static choice may have an attribute `papers`, the keys of entries in
`papers.bib`; which ones may depend on its options (GPTQ with QEP's correction cites both). `cite`
walks a plan and collects them. Emulated functions have them too, and `jq.distances` as a whole.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jquant.schemes.scheme import Plan, Scheme


def cite(choice: Plan | Scheme | Any) -> str:
    """BibTeX for what a plan does, and for jquant.

    Args:
        choice: a plan, a scheme, or any part of one: a grid, a rounding, groups; or what a plan
            was made by: a sensitivity, an allocation; or what `jq.emulate` returned; or the module
            `jq.distances`.

    Returns:
        the entries, each once, in the order of first use.

    Raises:
        TypeError: `choice` is none of these.

    Example:
        >>> import jquant as jq
        >>> [line for line in cite(jq.presets.int4_gptq()).splitlines() if line[:1] == "@"]
        ['@software{jquant,', '@article{frantar2022gptq,']
    """
    named = dataclasses.is_dataclass(choice) or hasattr(choice, "papers")
    if isinstance(choice, type) or not named:
        raise TypeError(f"cite takes a plan, a scheme or a part of one, got {choice!r}")
    keys = dict.fromkeys(["jquant", *_papers(choice)])
    return "\n\n".join(entries()[key] for key in keys)


def _papers(choice: Any) -> Iterator[str]:
    """The keys of a choice and of all that it is made of."""
    yield from getattr(choice, "papers", ())
    if isinstance(choice, Plan):
        for scheme in choice.values():
            yield from _papers(scheme)
    elif isinstance(choice, tuple):
        for one in choice:
            yield from _papers(one)
    elif dataclasses.is_dataclass(choice) and not isinstance(choice, type):
        for field in dataclasses.fields(choice):
            yield from _papers(getattr(choice, field.name))


@functools.cache
def entries() -> Mapping[str, str]:
    """All entries, by key."""
    text = (Path(__file__).parent / "papers.bib").read_text(encoding="utf-8")
    keys = re.findall(r"^@\w+\{(.+?),\n(?:.*\n)*?\}$", text, re.MULTILINE)
    bodies = re.findall(r"^@\w+\{.+?,\n(?:.*\n)*?\}$", text, re.MULTILINE)
    return dict(zip(keys, bodies, strict=True))
