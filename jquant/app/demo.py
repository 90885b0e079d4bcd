"""The demo: a real language model to 4 bits, and what that costs and saves, on two CPU cores.

SmolLM2-135M-Instruct, its 210 block matrices in groups of 64 at 4 bits, rounded to nearest and by
GPTQ with QEP's correction; both compared with the model in full precision on text that calibration
has not seen; the better one saved, loaded back, compared bit by bit, and used.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from jquant.app.console import Narrator, megabytes
from jquant.app.recipes import in_batches, plan_of
from jquant.app.texts import asked, windows_of
from jquant.calibration import find_weights
from jquant.evaluate import Comparison, compare_all
from jquant.io import read_header
from jquant.jobs.quantize import quantize
from jquant.models import generate, load, load_quantized, save_quantized, smollm2
from jquant.models.quantized import CHECKPOINT
from jquant.schemes.presets import int4_nearest, int4_qep
from jquant.schemes.scheme import Plan

BEST = "GPTQ + QEP"
PROMPT = "Explain in two sentences why the sky is blue."


@dataclass(frozen=True)
class Sizes:
    """How much text the demo works with.

    Attributes:
        samples: calibration windows.
        held_out: evaluation windows.
        length: tokens per window.
        tokens: how many tokens to generate.
    """

    samples: int = 16
    held_out: int = 8
    length: int = 512
    tokens: int = 48


def run_demo(
    narrator: Narrator,
    sizes: Sizes = Sizes(),
    *,
    output: Path | None = None,
    source: str | Path | None = None,
) -> None:
    """Run the demo, saying every step.

    Args:
        narrator: says it.
        sizes: how much text it works with.
        output: folder for the quantized model; one in the cache folder by default.
        source: another model that `models.load` can load, instead of SmolLM2.
    """
    began = time.monotonic()
    narrator.say("1. The model: SmolLM2-135M-Instruct" if source is None else f"1. {source}")
    fn, params, tokenizer = load(smollm2.fetch(progress=narrator.say) if source is None else source)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    narrator.say(f"   {fn.config.layers} layers, {count / 1e6:.1f} million parameters in float32")

    calibration, evaluation = windows_of(fn, tokenizer, sizes.length, None)
    calibration, evaluation = calibration[: sizes.samples], evaluation[: sizes.held_out]
    narrator.say(
        f"2. The text: Python's own help; {len(calibration)} windows of {sizes.length} tokens to "
        f"calibrate, {len(evaluation)} others to evaluate"
    )
    weights = find_weights(fn, params, calibration[:1])
    plans = {
        "nearest": plan_of(weights, int4_nearest(), {}),
        BEST: plan_of(weights, int4_qep(), {}),
    }
    kept = ", ".join(path for path in weights if path not in plans[BEST])
    narrator.say(
        f"3. Quantizing {len(plans[BEST])} matrices to 4 bits in groups of 64; kept as they are: "
        f"{kept}"
    )
    models: dict[str, Any] = {}
    for name, chosen in plans.items():
        models[name] = _quantize(narrator, name, fn, params, chosen, calibration)

    narrator.say("4. Evaluating on held-out text, against the model in full precision")
    with narrator.stage(f"   {' and '.join(models)}", evaluation.size) as update:
        batches = [window[None] for window in evaluation]
        comparisons = compare_all(fn, params, models, batches, progress=update)

    folder = smollm2.cache_folder() / "demo-int4" if output is None else output
    narrator.say(f"5. Saving to {folder}, and loading it back")
    save_quantized(folder, fn, models[BEST], tokenizer)
    fn, loaded, tokenizer = load_quantized(folder)
    _assert_same(loaded, models[BEST])
    narrator.say("   every bit came back")
    narrator.show(_table(params, comparisons, plans[BEST], folder / CHECKPOINT))

    narrator.say(f"6. Using it: {PROMPT}")
    narrator.show(_answer(fn, loaded, tokenizer, sizes.tokens))
    seconds = time.monotonic() - began
    narrator.say(
        f"Done in {int(seconds) // 60} min {int(seconds) % 60} s. Next: jquant inspect {folder}; "
        f"jquant generate {folder} --prompt '...'"
    )


def _quantize(
    narrator: Narrator, name: str, fn: Any, params: Any, chosen: Plan, calibration: np.ndarray
) -> Any:
    """Quantize by a plan, with a bar."""
    needed = any(scheme.needs for scheme in chosen.values())
    batches = in_batches(calibration) if needed else None
    with narrator.job(f"   {name}") as move:
        qparams, report = quantize(fn, params, chosen, batches, progress=move)
    for path in report.fallbacks:
        narrator.say(f"   nearest rounding stands in at {path}")
    return qparams


def _assert_same(loaded: Any, saved: Any) -> None:
    same = jax.tree.structure(loaded) == jax.tree.structure(saved)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(saved), strict=True):
        same = same and a.dtype == b.dtype and bool((a == b).all())
    if not same:
        raise RuntimeError("the loaded model differs from the saved one; please report this")


def _table(
    params: Any, comparisons: dict[str, Comparison], chosen: Plan, checkpoint: Path
) -> Table:
    """What it cost in quality and saved in bytes."""
    header = read_header(checkpoint)
    packed = sum(leaf.bytes for leaf in header.leaves.values() if leaf.grid is not None)
    size = sum(math.prod(chosen.weights[path].shape) for path in chosen)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    nearest, gptq = comparisons["nearest"], comparisons[BEST]
    table = Table(title="4 bits in groups of 64: the cost and the saving")
    table.add_column("")
    for name in ("full precision", "nearest", BEST):
        table.add_column(name, justify="right")
    table.add_row("KL to full precision, nats/token", "0", f"{nearest.kl:.4f}", f"{gptq.kl:.4f}")
    table.add_row(
        "perplexity",
        f"{gptq.perplexity_full:.3f}",
        f"{nearest.perplexity_quantized:.3f}",
        f"{gptq.perplexity_quantized:.3f}",
    )
    table.add_row(
        "same likeliest token", "100 %", f"{nearest.agreement:.1%}", f"{gptq.agreement:.1%}"
    )
    bits = f"{8 * packed / size:.2f}"
    table.add_row("bits per quantized weight", "32", bits, bits)
    table.add_row(f"the {len(chosen)} matrices", megabytes(4 * size), *[megabytes(packed)] * 2)
    table.add_row("the whole model", megabytes(whole), *[megabytes(header.file_bytes)] * 2)
    return table


def _answer(fn: Any, qparams: Any, tokenizer: Any, tokens: int) -> str:
    """What the model says to `PROMPT`; as a chat where the tokenizer knows how to."""
    prompt = asked(tokenizer, PROMPT, chat=True)
    eos = () if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    answer = generate(fn, qparams, np.asarray(prompt), tokens, eos=eos)
    return tokenizer.decode(answer[0], skip_special_tokens=True).strip()
