"""Few bits: what each ingredient gives SmolLM2-135M, KL on held-out text against bits and time.

    python -m benchmarks.few_bits                                   # what is not there yet
    python -m benchmarks.few_bits --only "W2 g64" --method "QEP"    # some, whether there or not

Model, tokens and evaluation are those of `quality`: 64 windows of 512 tokens, 16 held out, all 210
linears of the blocks. Scales are float16, zero points as narrow as codes or, between codes (A4),
float16 too; all of that is counted in the bits. Stage by stage, finest granularity. Every run is a
process of its own. KL is also measured on the text it was calibrated on and on another one, the
docstrings of the standard library's modules; hashes of all tokens are in the results. Results are
added to `results/few_bits.json` one by one.
"""

from __future__ import annotations

import ast
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np

import jquant as jq
from benchmarks import apart
from benchmarks.quality import LINEARS, SETTINGS, digest
from jquant.grids import MSE, Joint, Uniform
from jquant.models import smollm2
from jquant.rounding import GPTQ, Polish

FULL = GPTQ(correction="qep", strength=1.0)
METHODS: dict[str, tuple[dict[str, Any], Any, tuple[Any, ...]]] = {
    "GPTQ": ({"range": MSE()}, GPTQ(), ()),
    "QEP": ({"range": MSE()}, GPTQ(correction="qep"), ()),
    "QEP, strength 1": ({"range": MSE()}, FULL, ()),
    "QEP, polished": ({"range": MSE()}, Polish(GPTQ(correction="qep")), ()),
    "QEP, strength 1, polished": ({"range": MSE()}, Polish(FULL), ()),
    "QEP, strength 1, A4, polished": (
        {"range": Joint(3.0), "convention": "A4"}, Polish(FULL), (),
    ),
    "QEP, strength 1, Joint, polished": ({"range": Joint(3.0)}, Polish(FULL), ()),
    "QEP, strength 1, rotated, polished": ({"range": MSE()}, Polish(FULL), (jq.Hadamard(),)),
}  # fmt: skip
WINDOWS = {"calibration": 64, "evaluation": 16}


def other_text(tokenizer: Any) -> Any:
    """Windows `[16, 512]` of tokens of docstrings of more than 400 characters."""
    pieces = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
                pieces.append(ast.get_docstring(node) or "")
    text = "\n\n".join(piece for piece in pieces if len(piece) > 400)
    tokens = tokenizer(text[:60_000], add_special_tokens=False)["input_ids"]
    return np.asarray(tokens[: 16 * 512], np.int32).reshape(16, 512)


def run(setting: str, method: str) -> dict[str, Any]:
    """One run, in this process."""
    bits, group = SETTINGS[setting]
    choices, rounding, transforms = METHODS[method]
    fn, params, tokenizer = jq.models.load(smollm2.fetch())
    calibration, evaluation = smollm2.text_windows(tokenizer)
    batches = list(calibration[: WINDOWS["calibration"]].reshape(-1, 4, 512))
    evaluation = evaluation[: WINDOWS["evaluation"]]
    weights = jq.find_weights(fn, params, batches[0])
    grid = Uniform(bits, scale_dtype="float16", **choices)
    scheme = jq.Scheme(grid, group, rounding, transforms=transforms)
    plan = jq.plan(weights, {LINEARS: scheme, ".*": jq.keep})
    wall, processor = time.perf_counter(), time.process_time()
    q, report = jq.quantize(fn, params, plan, batches)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor

    def kl(windows: Any) -> float:
        return jq.evaluate.kl(fn, params, q, list(windows.reshape(-1, 2, 512)))

    other = other_text(tokenizer)
    texts = {"calibration": calibration, "evaluation": evaluation, "other": other}
    return {
        **vars(jq.evaluate.compare(fn, params, q, evaluation.reshape(-1, 2, 512))),
        "kl_calibration": kl(calibration[: WINDOWS["evaluation"]]),
        "kl_other": kl(other),
        "bits_per_weight": report.bits_per_weight,
        "seconds": wall,
        "processor_seconds": processor,
        "phases": dict(report.seconds),
        "peak_bytes": report.peak_bytes,
        "error_vs_nearest": report.ratio,
        "tokens": {name: digest(windows) for name, windows in texts.items()},
    }


if __name__ == "__main__":
    apart.main("few_bits", __doc__.splitlines()[0], SETTINGS, METHODS, run)
