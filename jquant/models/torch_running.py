"""Running PyTorch code on JAX's tracers: each operator of PyTorch becomes its JAX program.

torchax does it; what it lacks, or refuses, is told by errors of jquant that name the network.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from jquant.errors import TreeError, UnsupportedPrimitiveError, near

_TURN = threading.RLock()  # a call puts its parameters into the module, which all calls share


def arrays_of(module: Any) -> dict[str, Any]:
    """Name → tensor of what a function of the module takes as parameters, tied ones once.

    Buffers that belong to a checkpoint (running means) are among them; whole numbers are not.
    """
    state = module.state_dict().keys()
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: x for name, x in tensors if name in state and x.is_floating_point()}


def constants_of(module: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """The buffers that are no parameters of the function: tables that the module has computed."""
    return {name: value for name, value in module.named_buffers() if name not in params}


def need_all(network: str, names: Iterable[str], params: Mapping[str, Any]) -> None:
    """TreeError: parameters lack one of these names."""
    absent = next((name for name in names if name not in params), None)
    if absent is not None:
        raise TreeError(
            f"{absent!r} is missing in the parameters of {network}; near: " + near(absent, params)
        )


@contextmanager
def running(architecture: str) -> Iterator[tuple[Any, Any]]:
    """PyTorch and torchax's environment, in which the operators of PyTorch are JAX's.

    One call at a time; torchax mixes ranks and dtypes, and asks for 64 bits where JAX has 32.
    """
    import torch
    import torchax  # pyright: ignore[reportMissingImports]

    lenient = jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard")
    with _TURN, lenient[0], lenient[1], warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        with jax.ensure_compile_time_eval():  # a key that torchax keeps is made by the first call
            environment = _environment()
            environment.param  # noqa: B018
        try:
            with environment:
                yield torch, environment
        except torchax.tensor.OperatorNotFound as error:
            raise UnsupportedPrimitiveError(
                f"{architecture}: {error} (torchax {torchax.__version__}); try a newer torchax, or "
                "a configuration without what needs this operator"
            ) from error
        except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
            raise UnsupportedPrimitiveError(
                f"{architecture}: its PyTorch code depends on the values of its inputs, and cannot "
                f"be traced: {str(error).splitlines()[0]:.200}; pass the inputs that spare it the "
                "question (fn.inputs), or write the network in JAX"
            ) from error
        except AssertionError as error:
            if "mixed math" not in str(error):
                raise
            raise UnsupportedPrimitiveError(
                f"{architecture}: its PyTorch code uses a tensor that is neither a parameter, a "
                "buffer nor an attribute of a module; register_buffer makes it one"
            ) from error


@functools.cache
def _environment() -> Any:
    """torchax's, with two operators: one that it lacks, and one that it has wrong for views."""
    import torch
    from torchax.ops.ops_registry import all_aten_ops  # pyright: ignore[reportMissingImports]
    from torchax.tensor import Environment  # pyright: ignore[reportMissingImports]

    environment, copy = Environment(), all_aten_ops[torch.ops.aten.copy_].func

    def grouped_mm(x: Any, weight: Any, offs: Any, *rest: Any, **options: Any) -> Any:
        del rest, options
        ends = offs.jax()
        sizes = jnp.diff(ends, prepend=jnp.zeros_like(ends[:1]))
        product = jax.lax.ragged_dot(x.jax(), weight.jax(), sizes.astype(jnp.int32))
        return environment.j2t_iso(product)

    def copy_(x: Any, y: Any, *rest: Any, **options: Any) -> Any:
        y = y.torch() if hasattr(y, "view_info") else y
        return copy(x, y, *rest, env=environment, **options)

    environment.override_op_definition(torch.ops.aten._grouped_mm, grouped_mm)
    environment.override_op_definition(torch.ops.aten.copy_, copy_, is_view_op=True)
    return environment
