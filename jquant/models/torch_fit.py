"""From the tensors of a Hugging Face folder to the parameters of its PyTorch module.

`transformers` names and lays out some parameters otherwise than checkpoints do: prefixes come and
go with a head, old names are renamed, the experts of a layer are put together to one array. The
same rules are followed here, `transformers`' own, on `Lazy` leaves: which tensors make which
parameter, and of what shape, is known from headers; what must be put together is, when it is read.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jquant.errors import CheckpointError, near
from jquant.models.hf_folder import HFFolder
from jquant.models.torch_function import parameter_shapes
from jquant.models.torch_module import TorchConfig, torch_module
from jquant.trees.lazy import Lazy, Window

# Tables that older versions kept in files, and that are computed.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


@dataclass
class _Recipe:
    """How a parameter (or several, told apart by `rule`) is made of tensors.

    Attributes:
        rule: transformers' `WeightConverter`; None: it is the one tensor as it is.
        tensors: pattern of the rule → names of the tensors that match it, in order.
    """

    rule: Any = None
    tensors: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [name for names in self.tensors.values() for name in names]


def fit(
    config: TorchConfig, folder: HFFolder, *, param_dtype: str = "float32", partly: bool = False
) -> dict[str, Lazy]:
    """The parameters of `TorchFunction`, every leaf `Lazy`, from a folder's tensors.

    Args:
        config: of the module.
        folder: the tensors.
        param_dtype: dtype of the leaves.
        partly: leave out tensors that the module has no place for.

    Returns:
        name → leaf. Reading one raises `CheckpointError` if the file has changed, or if a tensor
        holds NaN or infinity.

    Raises:
        CheckpointError: a tensor is missing, misshapen, or left over; its name is told.
    """
    shapes = parameter_shapes(config)
    recipes, left = _recipes(config, folder.shapes)
    leaves: dict[str, Lazy] = {}
    for name, recipe in recipes.items():
        leaves |= _leaves(config, folder, name, recipe)
    for name, alias in _aliases(config):  # tied: files may have it under any of its names
        if alias in leaves:
            leaf = leaves.pop(alias)
            leaves.setdefault(name, leaf)
    left += [name for name in leaves if name not in shapes]
    if left and not partly:
        raise CheckpointError(
            f"{folder.name}: {len(left)} tensors that {config.architecture} has no place for, such "
            f"as {min(left)!r}; pass architecture= (--architecture) with the name of the class "
            f"that the checkpoint is of, or with {config.architecture!r} to leave them out"
        )
    dtype = jax.dtypes.canonicalize_dtype(param_dtype)
    return {
        name: _checked(folder, name, leaves, shape).astype(dtype)
        for name, shape in shapes.items()
    }  # fmt: skip


def tensor_names(config: TorchConfig, folder: HFFolder) -> dict[str, str]:
    """Parameter → the tensor of a folder that it is, of those that are one tensor as it is."""
    recipes, _ = _recipes(config, folder.shapes)
    names = {name: r.names[0] for name, r in recipes.items() if r.rule is None}
    for name, alias in _aliases(config):
        if alias in names:
            names.setdefault(name, names[alias])
    return names


def linear_parameters(config: TorchConfig) -> dict[str, None]:
    """The parameters that are weights of linear layers, tied ones by each name, in order."""
    import torch

    modules = torch_module(config).named_modules()
    return {f"{n}.weight": None for n, module in modules if isinstance(module, torch.nn.Linear)}


def _checked(
    folder: HFFolder, name: str, leaves: Mapping[str, Lazy], shape: tuple[int, ...]
) -> Lazy:
    """The leaf, of the shape that the module has, refused when it is read if a value is none."""
    leaf = leaves.get(name)
    if leaf is None:
        raise CheckpointError(
            f"{folder.name}: tensor {name!r} is missing; near: "
            + near(name, list(folder.shapes)[:300])
        )
    if leaf.shape != shape:
        raise CheckpointError(
            f"{folder.name}: tensor {name!r} has shape {leaf.shape}; the configuration calls for "
            f"{shape}"
        )

    def check(value: np.ndarray) -> np.ndarray:
        if not np.isfinite(value).all():
            raise CheckpointError(f"{folder.name}: tensor {name!r} holds NaN or infinity")
        return value

    return leaf.map(check, leaf.dtype, "finite")


def _recipes(config: TorchConfig, tensors: Iterable[str]) -> tuple[dict[str, _Recipe], list[str]]:
    """Parameter → how it is made, and the tensors of which nothing is made but should be."""
    from transformers.core_model_loading import dot_natural_key

    named = _naming(config)
    recipes: dict[str, _Recipe] = {}
    left: list[str] = []
    for tensor in sorted(tensors, key=dot_natural_key):
        name, pattern, rule = named(tensor)
        if name in parameter_shapes(config) or _is_alias(config, name):
            recipe = recipes.setdefault(name, _Recipe(rule))
            recipe.tensors.setdefault(pattern or tensor, []).append(tensor)
        else:
            left.append(tensor)
    return recipes, [tensor for tensor in left if not _is_computed(config, tensor)]


def _naming(config: TorchConfig) -> Callable[[str], tuple[str, str | None, Any]]:
    """For each tensor the parameter that it belongs to, by which pattern of which rule, if any.

    As `transformers.core_model_loading.convert_and_load_state_dict_in_model` goes about it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    module = torch_module(config)
    state, prefix = module.state_dict(), module.base_model_prefix
    mapping = get_model_conversion_mapping(module)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    rules = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in rules for pattern in rule.source_patterns}

    def named(tensor: str) -> tuple[str, str | None, Any]:
        name, pattern = rename_source_key(tensor, renamings, rules, prefix, state)
        if name not in state and tensor in state:
            name, pattern = rename_source_key(tensor, [], [], prefix, state)
        return name, pattern, None if pattern is None else of_pattern[pattern]

    return named


def _is_computed(config: TorchConfig, tensor: str) -> bool:
    """Whether a tensor is a table that the module computes, or that its class says to leave out."""
    module = torch_module(config)
    names = {tensor, f"{module.base_model_prefix}.{tensor}"}
    ignored = [*_COMPUTED, *(module._keys_to_ignore_on_load_unexpected or ())]
    return any(name in names for name, _ in module.named_buffers()) or any(
        re.search(pattern, tensor) for pattern in ignored
    )


def _is_alias(config: TorchConfig, name: str) -> bool:
    return any(name == alias for _, alias in _aliases(config))


def _leaves(config: TorchConfig, folder: HFFolder, name: str, recipe: _Recipe) -> dict[str, Lazy]:
    """The parameters that a recipe makes."""
    sources = {tensor: folder.tensor(tensor) for tensor in recipe.names}
    if recipe.rule is None:
        return {name: sources[recipe.names[0]]}
    import torch

    def made(tensors: Mapping[str, Any]) -> dict[str, Any]:
        rule = copy.deepcopy(recipe.rule)
        for pattern, names in recipe.tensors.items():
            for tensor in names:
                rule.add_tensor(name, tensor, pattern, lambda tensor=tensor: tensors[tensor])
        module = torch_module(config)
        results = rule.convert(name, model=module, config=module.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in results.items()}

    def leaf(target: str, shape: tuple[int, ...]) -> Lazy:
        def read(window: Window) -> np.ndarray:
            tensors = {tensor: torch.from_numpy(lazy[...]) for tensor, lazy in sources.items()}
            return made(tensors)[target].numpy()[window]

        whole = "; ".join(lazy.identity for lazy in sources.values())
        return Lazy(shape, np.dtype(np.float32), read, f"{target} of {recipe.rule!r} of {whole}")

    try:
        shapes = made({k: torch.empty(v.shape, device="meta") for k, v in sources.items()})
    except Exception as error:  # of transformers' operations, on shapes that do not go together
        raise CheckpointError(
            f"{folder.name}: {name!r} cannot be put together of {len(sources)} tensors, such as "
            f"{recipe.names[0]!r}: {error!s:.200}"
        ) from error
    return {target: leaf(target, tuple(value.shape)) for target, value in shapes.items()}


@functools.lru_cache(maxsize=8)
def _aliases(config: TorchConfig) -> list[tuple[str, str]]:
    """(name, another name) of tied parameters."""
    module = torch_module(config)
    first: dict[int, str] = {}
    pairs = []
    for name, value in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(value), name) != name:
            pairs.append((first[id(value)], name))
    return pairs
