"""A decoder as the parameters of another library's class: tunix's and MaxText's trees.

    tunix                        weights are `QArray`s of qwix, by which some classes multiply
    tunix-arrays                 the arrays that they stand for
    maxtext, maxtext-unscanned   arrays too: layers stacked on the second axis, or apart

Names and axes are a table (`jquant.models.tree_names`). Beside the checkpoint of Orbax lie
`config.json`, as Hugging Face has it, and `settings.json`: what the class has to be told so that it
computes this network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jquant.errors import ExportError, FormatError
from jquant.exporters.arrays import array_of
from jquant.exporters.described import Described, Holding
from jquant.exporters.hugging_face import hf_model, kind_of
from jquant.exporters.qwix import qarray_of
from jquant.exporters.targets import Target, held, need_module
from jquant.exporters.trees import New, fault, write_tree
from jquant.io.orbax import lazy_orbax
from jquant.models.decoder import Decoder
from jquant.models.disassembly import Tensor
from jquant.models.hf_config import to_hf
from jquant.models.tree_in import QARRAY, arrays_in, tensor_in
from jquant.models.tree_places import LAYERS_AXIS, Place, Tree, part, tree_of
from jquant.schemes.scheme import Plan
from jquant.trees.lazy import read
from jquant.trees.paths import nested
from jquant.weights.qtensor import QTensor

SETTINGS = "settings.json"


def export_named(
    place: Path,
    target: Target,
    model: tuple[Any, Any, Path | None],
    beside: Callable[[Path], None],
    flags: tuple[bool, bool],
) -> tuple[str, int, dict[str, str], tuple[str, ...]]:
    """What `export` does for trees of other libraries' classes.

    Args:
        place: see `export`.
        target: the format.
        model: the function, its parameters, and the folder that it is like, or None.
        beside: writes what lies beside the checkpoint.
        flags: `force` and `verify`.

    Returns:
        of `Exported`, all but the place.

    Raises:
        FormatError, ExportError, TreeError: see `export`.
    """
    fn, qparams, like = model
    _need_decoder(fn)
    whole = hf_model(fn, qparams, like)
    tree = tree_of(target.library, whole.config["model_type"], fn.config, target.scanned)
    _need_qarrays(target, tree)
    tensors, places = {one.name: one for one in whole.tensors}, tree.places()
    described = {
        at: _described(at, Described.of(leaf)) for at in places
        if isinstance(leaf := tensors[at.source.name].leaf, QTensor)
    }  # fmt: skip
    if not described:
        raise FormatError(f"nothing is quantized; {target.name} is for weights that are")
    paths = {at: tensors[at.source.name].path for at in places}
    holdings = _holdings(target, fn, paths, described)

    def make(new: New) -> Any:
        return nested(_arrays(target, tree, places, tensors, new))

    def check(folder: Path) -> None:
        _need_same(folder, tree, places, tensors)

    def files(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(whole.config, indent=2), "utf-8")
        (folder / SETTINGS).write_text(json.dumps(settings(tree), indent=2), "utf-8")
        beside(folder)

    nbytes = write_tree(place, target.name, (make, check), files, flags)
    kept = tuple(dict.fromkeys(at.path for at in places if at not in described))
    return target.name, nbytes, {paths[at]: one.name for at, one in holdings.items()}, kept


def settings(tree: Tree) -> dict[str, Any]:
    """What a class has to be told: `class`, and `config`, of tunix's `ModelConfig` or MaxText's."""
    own = tree.own
    told = {name: getattr(tree.config, field) for name, field in own.says.items()}
    if tree.library.name == "MaxText":
        told |= {"scan_layers": tree.scanned, "param_scan_axis": LAYERS_AXIS}
    told |= own.more(tree.config)
    whole = {name: int(n) for name, n in told.items() if isinstance(n, float) and n.is_integer()}
    return {"class": own.name, "config": {**told, **whole}}


def need_named(target: Target, fn: Any, plan: Plan) -> None:
    """What `need_held` does for trees of other libraries' classes; raises as it does."""
    _need_decoder(fn)
    tree = tree_of(target.library, to_hf(fn.config)["model_type"], fn.config, target.scanned)
    _need_qarrays(target, tree)
    paths, described, schemes = {}, {}, dict(plan.items())
    for at in tree.places():
        source = at.source
        apart = source.leaf.replace("layers/", f"layers/{source.layer}/", 1)
        path = source.leaf if source.layer is None or source.leaf in plan.weights else apart
        paths[at] = path
        if path in schemes:
            described[at] = _described(at, Described.planned(plan.weights[path], schemes[path]))
    _holdings(target, fn, paths, described)


def _need_decoder(fn: Any) -> None:
    if not isinstance(fn, Decoder):
        raise ExportError(
            f"fn is a {type(fn).__name__}; trees of tunix and MaxText are made of the reference "
            "decoder's parameters: load the model with backend='jax' (--backend jax)"
        )


def _need_qarrays(target: Target, tree: Tree) -> None:
    if target.name == "tunix" and not tree.own.qarrays:
        raise FormatError(
            f"{tree.own.name} of tunix {tree.library.version} does not multiply by QArrays, it "
            "casts its weights: export as 'tunix-arrays'"
        )


def _described(at: Place, weight: Described) -> Described:
    return replace(weight, layout=at.layout)


def _holdings(
    target: Target, fn: Any, paths: Mapping[Place, str], described: Mapping[Place, Described]
) -> dict[Place, Holding]:
    """How each weight is held.

    Raises:
        FormatError: one is not; or parts of one array are not alike.
    """
    holdings = {}
    for at, weight in described.items():
        if target.modules is not None:
            need_module(target, paths[at], kind_of(fn, paths[at]))
        holdings[at] = held(target, paths[at], weight)
    if target.name == "tunix":
        first: dict[str, Place] = {}
        for at, path in paths.items():
            other = first.setdefault(at.path, at)
            if described.get(other) != described.get(at):
                raise FormatError(
                    f"{paths[other]!r} and {path!r} are one array of tunix's, {at.path!r}: quantize"
                    f" them by one scheme; they are {described.get(other, 'kept')} and "
                    f"{described.get(at, 'kept')}"
                )
    return holdings


def _arrays(
    target: Target, tree: Tree, places: Iterable[Place], tensors: Mapping[str, Tensor], new: New
) -> dict[str, np.ndarray | None]:
    """The arrays of a tree by path, filled part by part."""
    arrays: dict[str, np.ndarray | None] = {}
    for at in places:
        leaf = tensors[at.source.name].leaf
        if isinstance(leaf, QTensor) and target.name == "tunix":
            arrays[f"{at.path}{QARRAY}zero_point"] = None  # Orbax stores that there is none
            own = qarray_of(replace(leaf, layout=at.layout))
            parts = {at.path + QARRAY + name: array for name, array in own.items()}
        else:
            plain = tree.ordered(at.source, array_of(leaf) if isinstance(leaf, QTensor) else leaf)
            parts = {at.path: part(at, np.asarray(read(plain)))}
        for path, value in parts.items():
            whole = arrays.get(path)
            if whole is None:
                arrays[path] = whole = new(at.around(value.shape), value.dtype)
            whole[at.window(whole.ndim)] = value
    return arrays


def _need_same(
    folder: Path, tree: Tree, places: Iterable[Place], tensors: Mapping[str, Tensor]
) -> None:
    """ExportError: the tensors that are taken out of a folder's tree are not those of the model."""
    leaves = arrays_in(lazy_orbax(folder))
    for at in places:
        leaf = tensors[at.source.name].leaf
        array = array_of(leaf) if isinstance(leaf, QTensor) else leaf
        mine = np.asarray(read(array)).astype(np.float32)
        theirs = np.asarray(tree.usual(at.source, tensor_in(at, leaves))[...]).astype(np.float32)
        off = float(np.abs(mine - theirs).max())
        if not off <= 4 * float(jax.numpy.finfo(array.dtype).eps) * float(np.abs(mine).max()):
            raise fault(f"tensor {at.source.name!r} comes back {off:.1g} off")
