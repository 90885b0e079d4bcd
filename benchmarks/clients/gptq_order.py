"""Folders that GPTQModel writes with `desc_act`, read by jquant: the same weights, the same logits.

    python -m benchmarks.clients.gptq_order --client VENV/bin/python            # what is not there
    python -m benchmarks.clients.gptq_order --client VENV/bin/python --only "2 bits, zero points"

With `desc_act` the groups of a weight are runs of its inputs in the order of their activations, so
that a file says of every input which group it is of. A random Llama of two layers is quantized by
GPTQModel itself, in each of its formats and widths; what it saved is read by `jq.models.load(...,
quantized="keep")`. Compared are the arrays that its layers say they hold, in the float16 that they
say it in, its logits with those of `jq.apply`, and the tensors of the file with those of
`jq.export`. VENV is the environment of `python -m benchmarks.clients gptqmodel`. Writes
`results/gptq_order.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

import jquant as jq
from benchmarks.clients.__main__ import NETWORK, ROOT, tokenizer
from benchmarks.harness import RESULTS, write
from benchmarks.rivals.child import kernel_path
from jquant.models import Decoder
from jquant.trees.paths import path_of

_ORDERED = {"group_size": 32, "desc_act": True, "act_group_aware": False, "static_groups": False}
CASES: dict[str, dict[str, Any]] = {
    "4 bits, symmetric": {"bits": 4, "sym": True, "format": "gptq"},
    "8 bits, symmetric": {"bits": 8, "sym": True, "format": "gptq"},
    "4 bits, zero points": {"bits": 4, "sym": False, "format": "gptq_v2"},
    "3 bits, zero points": {"bits": 3, "sym": False, "format": "gptq_v2"},
    "2 bits, zero points": {"bits": 2, "sym": False, "format": "gptq_v2"},
    "4 bits, static groups": {"bits": 4, "sym": False, "format": "gptq_v2", "static_groups": True},
}


def write_network(folder: Path) -> None:
    """The network as a folder of Hugging Face."""
    fn = Decoder(NETWORK)
    params = jax.tree.map(lambda x: x * 1.5 if x.ndim > 1 else x, fn.init(jax.random.key(7)))
    jq.export(fn, params, folder, format="safetensors", tokenizer=tokenizer())


def quantized(client: Path, settings: dict[str, Any], scratch: Path) -> dict[str, str]:
    """GPTQModel's folder is made in `scratch / "out"`; the versions there."""
    job = {"model": str(scratch.parent / "model"), "out": str(scratch / "out"),
           "tokens": str(scratch.parent / "tokens.npy"), "said": str(scratch / "said.npz"),
           "settings": settings}  # fmt: skip
    (scratch / "job.json").write_text(json.dumps(job))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTHON"))}
    command = [client, "-m", "benchmarks.clients.gptq_order_child", str(scratch / "job.json")]
    kept |= {"OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    kept["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(  # it leaves its logs where it runs
        command, cwd=scratch, env=kept, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def compared(scratch: Path, tokens: np.ndarray) -> dict[str, Any]:
    """What jquant makes of the folder, beside what GPTQModel said of it."""
    fn, params, _ = jq.models.load(scratch / "out", quantized="keep")
    said = dict(np.load(scratch / "said.npz"))
    theirs = said.pop("logits")
    leaves = jax.tree_util.tree_leaves_with_path(jq.dequantize(params))
    own = {path_of(keys): np.asarray(leaf) for keys, leaf in leaves}
    equal = [
        np.array_equal(own[kernel_path(name)].astype(np.float16), weight)
        for name, weight in said.items()
    ]
    logits = np.asarray(jq.apply(fn)(params, tokens))
    config = json.loads((scratch / "out" / "config.json").read_text())["quantization_config"]
    form = "gptq_v2" if config["checkpoint_format"] == "gptq_v2" else "gptq"
    jq.export(fn, params, scratch / "back", format=form)
    file, back = (tensors(scratch / folder) for folder in ("out", "back"))
    parts = ("qweight", "qzeros", "scales", "g_idx")
    names = [name for name in file if name.endswith(parts)]
    same = [name in back and _same(file[name], back[name]) for name in names]
    orders = [value for name, value in file.items() if name.endswith("g_idx")]
    return {
        "weights": len(equal),
        "equal": sum(equal),
        "out_of_order": sum(bool((np.diff(order) < 0).any()) for order in orders),
        "largest_difference": float(np.abs(logits - theirs).max() / np.abs(theirs).max()),
        "tensors": len(names),
        "written_the_same": sum(same),
        "format": form,
    }


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder."""
    files = folder.glob("*.safetensors")
    return {name: value for file in files for name, value in load_file(file).items()}


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--client", type=Path, required=True, help="GPTQModel's interpreter")
    parser.add_argument("--only", nargs="*", choices=CASES, help="these, whether there or not")
    asked = parser.parse_args()
    client = asked.client.absolute()  # a virtual environment's interpreter is a link out of it
    tokens = np.random.default_rng(0).integers(0, NETWORK.vocab, (34, 64)).astype(np.int32)
    path = RESULTS / "gptq_order.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        write_network(Path(folder, "model"))
        np.save(Path(folder, "tokens.npy"), tokens)
        for number, name in enumerate(asked.only or [name for name in CASES if name not in rows]):
            scratch = Path(folder, str(number))
            scratch.mkdir()
            packages = quantized(client, _ORDERED | CASES[name], scratch)
            rows[name] = compared(scratch, tokens[-2:])
            print(name, rows[name], flush=True)
            rows = {name: rows[name] for name in CASES if name in rows}
            write("gptq_order", client=packages, group=_ORDERED["group_size"], rows=rows)


if __name__ == "__main__":
    main()
