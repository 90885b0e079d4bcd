"""Quantized weights in programs that `jax.export` writes: their static data as JSON.

An exported program says what trees it takes and gives, so JAX must know how to write the part of
them that is no array. Importing this module tells it, once per process, for the weights and for the
evidence. What is written is what checkpoints hold (`schemes.py`), and reading it runs no code.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from jax import export

from jquant.calibration.evidence import Evidence
from jquant.calibration.spread import Spread
from jquant.errors import CheckpointError
from jquant.io.container import parse_json
from jquant.io.schemes import from_json, to_json
from jquant.io.tree import NODES


def write_static(static: tuple[Any, ...]) -> bytes:
    """The static fields of a node, in their order, as JSON.

    Raises:
        ValueError: one is of a kind that cannot be read back, such as a grid of the user's own.
    """
    return json.dumps(to_json(tuple(static)), allow_nan=False).encode()


def read_static(raw: bytes, kind: type) -> tuple[Any, ...]:
    """The static fields of a `kind` that `write_static` has written.

    Raises:
        CheckpointError: these bytes are no such fields.
    """
    static = from_json(parse_json(bytes(raw), f"the static data of a {kind.__name__}"))
    count = sum(bool(f.metadata.get("static")) for f in dataclasses.fields(kind))
    if not isinstance(static, tuple) or len(static) != count:
        raise CheckpointError(f"a {kind.__name__} has {count} static fields, the program {static}")
    return static


def _register(kind: type) -> None:
    export.register_pytree_node_serialization(
        kind,
        serialized_name=f"jquant.{kind.__name__}",
        serialize_auxdata=write_static,
        deserialize_auxdata=lambda raw: read_static(raw, kind),
    )


for _kind in (*NODES.values(), Evidence, Spread):
    _register(_kind)
