"""Measures one recipe, in the environment of its package: `python -m benchmarks.zoo.measure NAME`.

The last line that it prints is JSON. Weights that an embedding lookup reads are kept, as the
command line keeps them, and every other weight gets 4 bits by GPTQ in groups of 32 inputs (one
group where 32 does not divide them); the last batch measures, the others calibrate. An error is the
norm of the output's difference over the norm of the output.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jquant as jq
from benchmarks.zoo.packages import BASE, GROUP, Package, Recipe, recipe_named
from jquant.app.sources import called
from jquant.weights.arguments import inputs_of, path_of


def scheme_of(weight: jq.Weight) -> jq.Scheme:
    """4 bits by GPTQ, in groups of 32 where they divide the inputs."""
    inputs = math.prod(weight.split_shape[axis] for axis in weight.in_axes)
    return jq.presets.int4_gptq(None if inputs % GROUP else GROUP)


def is_kept(weight: jq.Weight) -> bool:
    """Whether tokens are looked up in it."""
    return any(use.kind == "lookup" for use in weight.uses)


def distance(a: Any, b: Any) -> float:
    """Norm of the difference over the norm of `b`, over all arrays of an output, in float64."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    wide = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs]
    gap = sum(float(np.sum((x - y) ** 2)) for x, y in wide)
    return math.sqrt(gap / sum(float(np.sum(y**2)) for _, y in wide))


def refusal(fn: Any, params: Any, inputs: Sequence[Any]) -> str:
    """What `find_weights` says without `ignore=`, or nothing."""
    try:
        jq.find_weights(fn, params, *inputs)
    except jq.errors.UnsupportedPrimitiveError as error:
        return str(error)
    return ""


def measure(recipe: Recipe) -> dict[str, Any]:
    """Everything that a row of the results holds, but the versions."""
    fn, params, batches = called(recipe.maker)
    *calibration, last = batches
    inputs = inputs_of(last)
    refused = refusal(fn, params, inputs)
    weights = jq.find_weights(fn, params, *inputs, ignore=recipe.ignore)
    kept = [path for path, weight in weights.items() if is_kept(weight)]
    schemes = {path: scheme_of(weight) for path, weight in weights.items() if path not in kept}
    nearest = {path: replace(s, rounding=jq.rounding.Nearest()) for path, s in schemes.items()}
    clock = time.process_time()
    q, report = jq.quantize(fn, params, jq.Plan(schemes, weights), calibration)
    seconds = time.process_time() - clock
    plain, _ = jq.quantize(fn, params, jq.Plan(nearest, weights))
    before = jax.jit(fn)(params, *inputs)
    after = jq.apply(fn)(q, *inputs)
    leaves = {path_of(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(params)}
    matrices = {path for path, leaf in leaves.items() if jnp.ndim(leaf) > 1}
    return {
        "parameters": sum(jnp.size(leaf) for leaf in leaves.values()),
        "in_weights": sum(math.prod(weight.shape) for weight in weights.values()),
        "matrices": len(matrices),
        "weights": len(weights),
        "quantized": len(schemes),
        "stages": len(report.stages),
        "kept": kept,
        "others": {path: weights.others[path] for path in sorted(matrices - set(weights))},
        "ignore": recipe.ignore,
        "refused": refused,
        "warnings": list(report.warnings),
        "gptq": distance(after, before),
        "nearest": distance(jq.apply(fn)(plain, *inputs), before),
        "apply": distance(after, jax.jit(fn)(jq.dequantize(q), *inputs)),
        "seconds": seconds,
    }


def by_command(recipe: Recipe) -> str:
    """What keeps `jquant quantize` from taking the same recipe; nothing where it does."""
    from jquant.app.cli import app

    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder, "out"))
        asked = ["quantize", recipe.maker, "-o", output, "--recipe", "int4-nearest", "--quiet"]
        try:
            app([*asked, "--group", str(GROUP), *recipe.arguments], result_action="return_value")
            return "" if Path(output, "jquant.safetensors").exists() else "nothing was written"
        except (ValueError, SystemExit) as error:
            return str(error)


def versions(package: Package) -> dict[str, str]:
    """Of JAX and of what the package's environment was asked for, by name."""
    asked = [line.partition("==")[0] for line in (*BASE, *package.requirements, *package.bare)]
    return {name: metadata.version(name) for name in asked}


def main() -> None:
    package, recipe = recipe_named(sys.argv[1])
    row = measure(recipe)
    row |= {"command": by_command(recipe), "python": platform.python_version()}
    print(json.dumps(row | {"versions": versions(package)}))


if __name__ == "__main__":
    main()
