"""A decoder as a wider one that computes the same, for block types of 256 weights.

SmolLM2 is 576 wide, so that llama.cpp gives K-quants to `ffn_down` alone and other types to the
rest. Zeros make it 768 wide with twelve heads. A mean of squares over more channels is less by a
factor that the norms' scales take up; everything else is multiplied by zero.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np

from jquant.models.decoder import Decoder
from jquant.weights.arguments import by_path

BLOCK = 256


def padded(fn: Decoder, params: Any) -> tuple[Decoder, dict[str, Any]]:
    """The wider network and its parameters, float32 arrays."""
    config, size = fn.config, fn.config.head_dim
    width, hidden = (-(-n // BLOCK) * BLOCK for n in (config.width, config.hidden))
    step = BLOCK // math.gcd(BLOCK, size)  # heads that fill blocks
    heads = -(-config.heads // step) * step
    keys = heads // (config.heads // config.kv_heads)
    share = config.width / width
    wide = dataclasses.replace(
        config, width=width, hidden=hidden, heads=heads, kv_heads=keys,
        norm_eps=config.norm_eps * share,
    )  # fmt: skip
    sizes = {
        r"embed/embedding": (config.vocab, width),
        r"head/kernel": (width, config.vocab),
        r".*/q/kernel": (width, heads * size),
        r".*/[kv]/kernel": (width, keys * size),
        r".*/out/kernel": (heads * size, width),
        r".*/(gate|up)/kernel": (width, hidden),
        r".*/down/kernel": (hidden, width),
        r".*norm/scale": (width,),
    }
    tree: dict[str, Any] = {}
    for path, leaf in by_path(params).items():
        values = np.asarray(leaf[...], np.float32)
        shape = next(size for pattern, size in sizes.items() if re.fullmatch(pattern, path))
        stack = values.ndim - len(shape)  # an axis of layers, or none
        more = [(0, n - m) for n, m in zip(shape, values.shape[stack:], strict=True)]
        values = np.pad(values, [(0, 0)] * stack + more)
        if path.endswith("norm/scale"):
            values = values * np.float32(share**0.5)
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = values
    return dataclasses.replace(fn, config=wide), tree
