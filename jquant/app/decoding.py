"""Weights decoded once, where every token would decode them anew.

XLA's CPU compiler decodes a quantized weight each time that a program meets it, and a token is one
product with every weight: decoding is then most of the time. Elsewhere codes are read faster than
the arrays they stand for.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

from jquant.app.console import Narrator, megabytes
from jquant.weights.qtensor import dequantize_weight, is_qtensor, tree_map_weights


def decoded_once(params: Any, narrator: Narrator) -> Any:
    """The parameters with arrays in place of codes, on the CPU and where they take at most half of
    the machine's memory (heuristic); else as they are.

    Weights whose inputs are quantized stay codes, since an array says nothing of these.
    """
    leaves = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_qtensor) if _is_to_decode(leaf)]
    nbytes = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves)
    if not leaves or jax.default_backend() != "cpu" or nbytes > _memory() // 2:
        return params
    narrator.say(
        f"decoding {len(leaves)} weights once ({megabytes(nbytes)}), so that no token has to; "
        "--quantized keep leaves them codes: less memory, more time"
    )
    decode = jax.jit(dequantize_weight)
    return tree_map_weights(lambda leaf: decode(leaf) if _is_to_decode(leaf) else leaf, params)


def _is_to_decode(leaf: Any) -> bool:
    return is_qtensor(leaf) and leaf.activations is None


def _memory() -> int:
    """Bytes of memory that the machine has; 0 where the system does not tell."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
