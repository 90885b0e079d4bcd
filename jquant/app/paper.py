"""A decoder on paper: of a folder with nothing but `config.json`, what quantizing it will take.

Blocks of one kind take the same, so few are traced. Two blocks of each kind make a small network;
with a third of one kind it takes more by what every further block of that kind takes. Kinds differ
by the window of their attention and by what the plan says of their weights.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jquant.app.sources import Model
from jquant.calibration.find import Weight, Weights, find_weights
from jquant.errors import CheckpointError
from jquant.jobs.forecast import Forecast, extended, forecast
from jquant.models.assembly import Checkpoint, assemble, sources
from jquant.models.config import from_hf
from jquant.models.decoder import Decoder
from jquant.models.hf_folder import read_json
from jquant.schemes.scheme import Plan
from jquant.trees.lazy import Lazy
from jquant.weights.arguments import by_path, inputs_of

_WINDOWS = (
    128  # of text, in batches of as many as the mesh has along `data`; --samples counts batches
)
_LENGTH = 2048  # tokens of a window, as in GPTQ's paper (arXiv:2210.17323)
_LAYER = re.compile(r"layers/(\d+)/(.*)", re.DOTALL)


def on_paper(source: str, rows: int, length: int | None) -> Model | None:
    """The model that a folder with nothing but `config.json` describes; None of any other source.

    Args:
        source: of the command line.
        rows: windows of a batch.
        length: tokens of a window; None: 2048, or the model's context if that is shorter.

    Raises:
        CheckpointError: the configuration is of no family that the reference decoder computes.
    """
    folder = Path(source)
    if not (folder / "config.json").is_file():
        return None
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        return None
    config = from_hf(read_json(folder / "config.json"))

    def nothing(window: Any) -> np.ndarray:
        raise CheckpointError(f"{source} has no weights, only their shapes")

    shapes = {one.name: one.shape for one in sources(config, "hf")}
    dtype = np.dtype(jax.numpy.bfloat16)
    checkpoint = Checkpoint(
        "hf", source, shapes, lambda name: Lazy(shapes[name], dtype, nothing, name)
    )
    params = assemble(config, checkpoint, param_dtype="bfloat16")
    tokens = min(length or _LENGTH, config.context)
    batches = [np.zeros((rows, tokens), np.int32)] * max(1, _WINDOWS // rows)
    return Model(source, Decoder(config, dtype="bfloat16"), params, None, batches)


def weights_of(model: Model, batch: Any) -> Weights:
    """`find_weights` of a model; of a decoder, from one block of each kind."""
    inputs = inputs_of(batch)
    if not _is_deep(model.fn):
        return find_weights(model.fn, model.params, *inputs)
    kinds = _windows(model.fn)
    chosen = sorted({kinds.index(kind) for kind in kinds})
    shown = find_weights(*_few(model, chosen), *inputs)
    place = {kinds[layer]: at for at, layer in enumerate(chosen)}
    weights: dict[str, Weight] = {}
    others: dict[str, str] = {}
    for path in by_path(model.params):
        layer, rest = _split(path)
        like = path if layer is None else f"layers/{place[kinds[layer]]}/{rest}"
        if like in shown:
            weights[path] = replace(shown[like], path=path)
        else:
            others[path] = shown.others[like]
    return Weights(weights, others)


def costs_of(model: Model, plan: Plan, batches: Any, **how: Any) -> Forecast:
    """`forecast` of a model; of a decoder, from a few blocks of each kind.

    Raises:
        what `forecast` raises.
    """
    if not _is_deep(model.fn):
        return forecast(model.fn, model.params, plan, batches, **how)
    kinds = _kinds(model.fn, plan)
    groups: dict[Hashable, list[int]] = {}
    for layer, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(layer)

    def costs(chosen: Sequence[int]) -> Forecast:
        return forecast(*_few(model, chosen), _part(plan, chosen), batches, **how)

    base = sorted(layer for own in groups.values() for layer in own[:2])
    small = costs(base)
    larger = [
        (costs(sorted((*base, own[2]))), len(own) - 2) for own in groups.values() if len(own) > 2
    ]
    place = {kinds[layer]: at for at, layer in reversed(list(enumerate(base)))}
    stages = _stages(small.stages, [place[kind] for kind in kinds])
    return extended(small, larger, stages)


def _kinds(decoder: Decoder, plan: Plan) -> list[Hashable]:
    """For each layer its window, and what the plan says of its weights."""
    schemes: dict[int, dict[str, Hashable]] = {}
    for path in plan:
        layer, rest = _split(path)
        if layer is not None:
            schemes.setdefault(layer, {})[rest] = plan[path]
    return [
        (window, tuple(sorted(schemes.get(layer, {}).items(), key=lambda item: item[0])))
        for layer, window in enumerate(_windows(decoder))
    ]


def _is_deep(fn: Any) -> bool:
    return isinstance(fn, Decoder) and not fn.scan_layers


def _windows(decoder: Decoder) -> Sequence[int]:
    return decoder.config.windows or (0,) * decoder.config.layers


def _split(path: str) -> tuple[int | None, str]:
    """The layer of a leaf of a decoder, and its path there; None for what is of no layer."""
    match = _LAYER.fullmatch(path)
    return (None, path) if match is None else (int(match[1]), match[2])


def _few(model: Model, chosen: Sequence[int]) -> tuple[Decoder, Any]:
    """The decoder of some of a decoder's layers, and its parameters."""
    config = model.fn.config
    windows = tuple(config.windows[layer] for layer in chosen) if config.windows else ()
    fewer = replace(config, layers=len(chosen), windows=windows)
    layers = {str(at): model.params["layers"][str(layer)] for at, layer in enumerate(chosen)}
    return replace(model.fn, config=fewer), {**model.params, "layers": layers}


def _part(plan: Plan, chosen: Sequence[int]) -> Plan:
    """What a plan says of some layers, and of what is of none."""
    place = {layer: at for at, layer in enumerate(chosen)}

    def renamed(paths: Mapping[str, Any]) -> dict[str, str]:
        names = {}
        for path in paths:
            layer, rest = _split(path)
            if layer is None or layer in place:
                names[path] = path if layer is None else f"layers/{place[layer]}/{rest}"
        return names

    weights = {
        name: replace(plan.weights[path], path=name) for path, name in renamed(plan.weights).items()
    }
    return Plan({name: plan[path] for path, name in renamed(plan).items()}, weights)


def _stages(few: Sequence[Sequence[str]], like: Sequence[int]) -> tuple[tuple[str, ...], ...]:
    """The stages of all layers; `like`: for each layer, which of the few it is like."""
    layers = [_layers(stage) for stage in few]
    if any(len(own) > 1 for own in layers):  # all weights are one stage
        return (_together([name for stage in few for name in stage], like),)
    inside = [at for at, own in enumerate(layers) if own]
    first, last = (inside[0], inside[-1] + 1) if inside else (len(few), len(few))
    stages = [tuple(stage) for stage in few[:first]]
    for k, at in enumerate(like):
        own = [few[stage] for stage in inside if layers[stage] == {at}]
        stages += [tuple(_moved(name, k) for name in stage) for stage in own]
    return (*stages, *map(tuple, few[last:]))


def _layers(names: Sequence[str]) -> set[int | None]:
    """The layers that weights are of."""
    return {_split(name)[0] for name in names} - {None}


def _together(names: Sequence[str], like: Sequence[int]) -> tuple[str, ...]:
    """The weights of all layers, where they are one stage: of no layer first."""
    ends = [name for name in names if _split(name)[0] is None]
    own = {at: [name for name in names if _split(name)[0] == at] for at in like}
    return (*ends, *(_moved(name, k) for k, at in enumerate(like) for name in own[at]))


def _moved(name: str, layer: int) -> str:
    """The name of a weight in another layer."""
    return f"layers/{layer}/{_split(name)[1]}"
