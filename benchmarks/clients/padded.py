"""SmolLM2-135M as a network of width 768 that computes the same, for block types of 256 weights.

Its width is 576, so that llama.cpp gives K-quants to `ffn_down` alone and other types to the rest.
Zeros make it 768 wide with twelve heads. A mean of squares over more channels is less by a factor
that the norms' scales take up; everything else is multiplied by zero.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from jquant.models.decoder import Decoder
from jquant.weights.arguments import by_path

WIDTH, HEADS, KV_HEADS = 768, 12, 4


def padded(fn: Decoder, params: Any) -> tuple[Decoder, dict[str, Any]]:
    """The wider network and its parameters, float32 arrays."""
    config = fn.config
    share = config.width / WIDTH
    wide = dataclasses.replace(
        config, width=WIDTH, heads=HEADS, kv_heads=KV_HEADS, norm_eps=config.norm_eps * share
    )
    sizes = {
        r"embed/embedding": (config.vocab, WIDTH),
        r".*/q/kernel": (WIDTH, HEADS * config.head_dim),
        r".*/[kv]/kernel": (WIDTH, KV_HEADS * config.head_dim),
        r".*/out/kernel": (HEADS * config.head_dim, WIDTH),
        r".*/(gate|up)/kernel": (WIDTH, config.hidden),
        r".*/down/kernel": (config.hidden, WIDTH),
        r".*norm/scale": (WIDTH,),
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
    return Decoder(wide), tree
