"""What llama.cpp computes with a file, in an environment of its own that has llama-cpp-python.

    python llama_cpp_child.py measure JOB.json OUT.json
    python llama_cpp_child.py quantize JOB.json OUT.json

`measure`: logits of `tokens` (a .npy, int32 `[windows, length]`) by each of `files`, compared with
those of `against` (a .npy, float32 `[windows, length, vocab]`): a file's own where it is a mapping.
`quantize`: `source`, a file of numbers, by llama.cpp's own quantizer as each of `types`, with the
importances of `importance` (an .npz, by tensor) and without. NumPy and llama_cpp only.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

llama_cpp: Any = importlib.import_module("llama_cpp")  # not the file beside this one: `python -P`

PROMPT = "The capital of France is"
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12,
              "Q4_K": 15, "Q5_K": 17, "Q6_K": 18}  # fmt: skip
Q8_0 = 8  # a `ggml_type`


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def measured(file: str, tokens: np.ndarray, against: np.ndarray) -> dict[str, Any]:
    """KL from the reference in nats per token, perplexities of both, what it writes."""
    length = tokens.shape[1]
    model = llama_cpp.Llama(
        file, n_ctx=length, n_batch=length, n_ubatch=length, logits_all=True, verbose=False,
        n_threads=1, n_threads_batch=1,
    )  # fmt: skip
    kl, ours, theirs, agree, largest = [], [], [], [], 0.0
    for window, reference in zip(tokens, against, strict=True):
        model.reset()
        model.eval(window.tolist())
        logits = np.array(model.scores[:length])
        largest = max(largest, float(np.abs(logits - reference).max()))
        p, q = log_softmax(reference), log_softmax(logits)
        kl.append((np.exp(p) * (p - q)).sum(-1))
        agree.append(p.argmax(-1) == q.argmax(-1))
        at = np.arange(length - 1), window[1:]
        theirs.append(p[at])
        ours.append(q[at])
    text, ids = "", []
    if model.metadata["tokenizer.ggml.model"] != "no_vocab":
        model.reset()
        text = model(PROMPT, max_tokens=12, temperature=0.0)["choices"][0]["text"]
        ids = model.tokenize(PROMPT.encode() + b"\n\n  12345 'tis", add_bos=False, special=False)
    return {
        "kl": float(np.mean(kl)),
        "perplexity": float(np.exp(-np.mean(ours))),
        "reference_perplexity": float(np.exp(-np.mean(theirs))),
        "agreement": float(np.mean(agree)),
        "largest_difference": largest,
        "largest_logit": float(np.abs(against).max()),
        "bytes": Path(file).stat().st_size,
        "writes": text,
        "ids": ids,
    }


def quantize(source: str, target: str, kind: str, importance: dict[str, np.ndarray] | None) -> None:
    """`target` by llama.cpp's quantizer: every matrix of one type, the table of tokens Q8_0."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.pure, params.nthread = FILE_TYPES[kind], True, 2
    params.token_embedding_type = params.output_tensor_type = Q8_0
    kept = []
    if importance is not None:
        rows = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for row, (name, values) in zip(rows, importance.items(), strict=False):
            values = np.ascontiguousarray(values, np.float32)
            kept.append(values)
            row.name = name.encode()
            row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            row.size = values.size
        params.imatrix = ctypes.cast(rows, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if failed:
        raise SystemExit(f"llama_model_quantize: {failed}")


def main(mode: str, job_file: str, out: str) -> None:
    job = json.loads(Path(job_file).read_text("utf-8"))
    results: dict[str, Any] = {"version": llama_cpp.__version__}
    if mode == "measure":
        tokens = np.load(job["tokens"])
        for name, (file, against) in job["files"].items():
            results[name] = measured(file, tokens, np.load(against, mmap_mode="r"))
            print(name, {k: v for k, v in results[name].items() if k != "ids"}, flush=True)
    else:
        importance = dict(np.load(job["importance"]))
        for kind in job["types"]:
            for name, given in (("plain", None), ("imatrix", importance)):
                quantize(job["source"], f"{job['folder']}/{kind}-{name}.gguf", kind, given)
    Path(out).write_text(json.dumps(results), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
