"""Any PyTorch module as a pure JAX function of its parameters.

The module is copied without its weights: what a checkpoint of it would hold (parameters, running
means) are the parameters of the function, and stand on PyTorch's meta device in the copy. The rest
(tables that the module made for itself) stays in the copy as constants. So the module that was
given is left as it was, and may be deleted.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jquant.errors import TreeError, UnsupportedPrimitiveError
from jquant.models.torch_module import need_torch
from jquant.models.torch_running import arrays_of, constants_of, need_all, running


@dataclass(frozen=True)
class ModuleFunction:
    """`fn(params, *inputs)` of a module, see `from_torch`. Equal to itself only.

    Attributes:
        module: the module without its weights.
    """

    module: Any

    def __call__(self, params: Mapping[str, Any], *inputs: Any) -> Any:
        """What the module's `forward` returns, in the dtypes that it gives.

        Raises:
            TreeError: the parameters are not those of the module.
            UnsupportedPrimitiveError: torchax lacks an operator; or the module's code depends on
                the values of its inputs, holds tensors where nobody sees them, or returns what
                holds no tensors.
        """
        name = type(self.module).__name__
        need_all(name, arrays_of(self.module), params)
        with running(name) as (torch, environment):
            weights = environment.j2t_iso({key: jnp.asarray(x) for key, x in params.items()})
            given = environment.j2t_iso(jax.tree.map(jnp.asarray, inputs))
            constants = environment.to_xla(constants_of(self.module, params))
            call = torch.func.functional_call
            result = call(self.module, {**constants, **weights}, given)
            return _arrays(result, environment, f"{name} returns ")


def from_torch(module: Any) -> tuple[ModuleFunction, dict[str, Any]]:
    """`(fn, params)` of a `torch.nn.Module`: `fn(params, *inputs)` is what its `forward` returns.

    For networks that are no model of `transformers`: those of timm or torchvision, and your own.

    Args:
        module: any, on any device. The function evaluates, whatever mode the module is in: dropout
            is off, and batch norms use their running statistics.

    Returns:
        fn: takes arrays, or trees of them, in the order of `forward`. It returns arrays as the
            module returns tensors: one, or a tuple, list or dict of them. It equals itself only,
            and is not saved: `jq.save` keeps parameters, `from_torch` makes the function again.
        params: a flat dict, name in `module.state_dict()` → array of that shape and dtype (64 bits
            as 32 unless JAX is told otherwise), a copy. Means and variances of batch norms are
            among them; whole numbers (how many batches they saw) are not. Tied parameters are one
            leaf. Of a module on the meta device the leaves are `jax.ShapeDtypeStruct`.

    Raises:
        MissingPackageError: the extra `torch` is not there.
        TypeError: it is no module.
        TreeError: the module cannot be copied, or has on the meta device what is no parameter.

    Example: `fn, params = jq.models.from_torch(network)`, then
    `jq.find_weights(fn, params, images)` with images float32 `[B, C, H, W]`.
    """
    need_torch()
    import torch

    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"from_torch takes a torch.nn.Module, got {type(module).__name__}")
    own = arrays_of(module)
    nowhere: dict[int, Any] = {id(tensor): _nowhere(tensor) for tensor in own.values()}
    try:
        skeleton = copy.deepcopy(module, nowhere).requires_grad_(False).eval()
    except Exception as error:  # of whatever a module may hold
        raise TreeError(f"{type(module).__name__} cannot be copied: {error!s:.300}") from error
    _keep_constants(skeleton)
    return ModuleFunction(skeleton), {name: _array(tensor) for name, tensor in own.items()}


def _nowhere(tensor: Any) -> Any:
    """A tensor of its shape and dtype without values; a parameter of a parameter."""
    import torch

    empty = torch.empty_like(tensor, device="meta")
    return torch.nn.Parameter(empty, False) if isinstance(tensor, torch.nn.Parameter) else empty


def _keep_constants(module: Any) -> None:
    """Constants of a module lie on the CPU, as buffers, those among them that were attributes."""
    import torch

    own = arrays_of(module)
    for prefix, part in module.named_modules():
        tables = {k: v for k, v in vars(part).items() if isinstance(v, torch.Tensor)}
        for key, tensor in tables.items():
            delattr(part, key)
            part.register_buffer(key, tensor, persistent=False)
        for key, tensor in part.named_buffers(recurse=False):
            name = f"{prefix}.{key}" if prefix else key
            if key == "num_batches_tracked":  # of a batch norm, which counts in training alone
                tensor = torch.zeros_like(tensor, device="cpu")
            if name not in own and tensor.is_meta:
                raise TreeError(
                    f"{name!r} of {type(module).__name__} is on the meta device, and is no "
                    "parameter of the function: make this table on the CPU"
                )
            part._buffers[key] = tensor if name in own else tensor.detach().cpu()


def _array(tensor: Any) -> Any:
    """A copy of a tensor in JAX; of one on the meta device its type."""
    import torch

    dtype = jnp.dtype(str(tensor.dtype).removeprefix("torch."))
    if tensor.is_meta:
        return jax.ShapeDtypeStruct(tensor.shape, jax.dtypes.canonicalize_dtype(dtype))
    values = tensor.detach().cpu().reshape(-1)  # NumPy has no bfloat16, but bytes
    return jnp.array(values.view(torch.uint8).numpy().view(dtype).reshape(tensor.shape))


def _arrays(result: Any, environment: Any, where: str) -> Any:
    """Tensors as arrays, in tuples, lists and dicts as they are; None stays None."""
    import torch

    if isinstance(result, torch.Tensor):
        return environment.t2j_iso(result)
    if isinstance(result, Mapping):
        items = result.items()
        return {k: _arrays(v, environment, f"{where}in {k!r} ") for k, v in items}
    if isinstance(result, list | tuple):
        parts = [_arrays(x, environment, f"{where}in {k} ") for k, x in enumerate(result)]
        if hasattr(result, "_fields"):
            return type(result)(*parts)
        return parts if isinstance(result, list) else tuple(parts)
    if result is None:
        return None
    raise UnsupportedPrimitiveError(
        f"{where}a {type(result).__name__}; write a module whose forward returns tensors, or a "
        "tuple, list or dict of them"
    )
