"""Weights that some engines multiply as one: q, k and v; gate and up. Told, not refused.

vLLM and tpu-inference join them when they load a folder. vLLM refuses those of several schemes, and
takes one scale of the whole tensor for all of them, the largest, where NVFP4 has one for each.
transformers, GPTQModel and mlx-lm take them apart. Unknown to the formats, so no format refuses
them either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from jquant.exporters.described import Described

JOINED = ("compressed-tensors", "gptq", "gptq_v2", "awq")  # what those engines read
_PARTS = re.compile(r"(.*[./])(q|k|v|gate|up)((?:_proj)?[./](?:kernel|weight)(?:\[.*)?)")
_TOGETHER = (("q", "k", "v"), ("gate", "up"))


def notes_of(
    format: str, paths: Iterable[str], weights: Mapping[str, Described]
) -> tuple[str, ...]:
    """What to know of an export before an engine joins its weights; nothing where all is well.

    Args:
        format: of the export.
        paths: of all parameters, or of those that could be quantized.
        weights: those that are quantized, by path.

    Example:
        >>> from jquant.axes import Groups
        >>> from jquant.grids import Uniform
        >>> paths = [f"layers/0/attention/{part}/kernel" for part in "qkv"]
        >>> weights = {paths[0]: Described((8, 8), Uniform(4), Groups())}
        >>> (note,) = notes_of("gptq", paths, weights)
        >>> note[:70]
        "vLLM and tpu-inference multiply 'layers/0/attention/q/kernel', k and v"
    """
    if format not in JOINED:
        return ()
    unlike: list[tuple[list[str], list[Described | None]]] = []
    apart: list[list[str]] = []
    for group in _groups(paths):
        held = [weights.get(path) for path in group]
        if len({str(weight) for weight in held}) > 1:
            unlike.append((group, held))
        elif held[0] is not None and held[0].of_tensor:
            apart.append(group)
    notes = []
    if unlike:
        group, held = unlike[0]
        kinds = ", ".join("kept" if weight is None else str(weight) for weight in held)
        notes.append(
            f"vLLM and tpu-inference multiply {_named(group)} as one, and vLLM refuses several "
            f"schemes ({kinds}){_more(unlike)}; for them, quantize these by one scheme"
        )
    if apart:
        notes.append(
            f"vLLM multiplies {_named(apart[0])} as one, by the largest of their tensors' scales: "
            f"each has one of its own here{_more(apart)}; transformers takes each by its own"
        )
    return tuple(notes)


def _groups(paths: Iterable[str]) -> list[list[str]]:
    """The paths that belong together, of which there are all."""
    blocks: dict[tuple[str, str, int], dict[str, str]] = {}
    for path in paths:
        if (match := _PARTS.fullmatch(path)) is not None:
            block, part, rest = match.groups()
            which = 0 if part in _TOGETHER[0] else 1
            blocks.setdefault((block, rest, which), {})[part] = path
    return [
        [parts[name] for name in _TOGETHER[which]]
        for (_, _, which), parts in blocks.items()
        if set(parts) == set(_TOGETHER[which])
    ]


def _named(group: list[str]) -> str:
    *rest, last = _TOGETHER[0][1:] if len(group) == 3 else _TOGETHER[1][1:]
    return f"{group[0]!r}{''.join(f', {name}' for name in rest)} and {last}"


def _more(groups: list) -> str:
    return f", and {len(groups) - 1} more such" if len(groups) > 1 else ""
