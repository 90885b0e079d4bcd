"""A plain driver around the published column loop: PyTorch, literal, no tool around it.

As the public GPTQ script goes: the inputs of the first block are caught; for every block, a hook on
each linear accumulates its own Hessian while the block runs on all batches, the column loop rounds
each linear (activation order, static groups), and the block runs again for the next one's inputs.
Hessians of q, k, v (and gate, up) are each computed, as there. Batches as everybody's here, where
the script takes windows one at a time. Timed: all of that, on a loaded model.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.gptq_torch import gptq
from benchmarks.rivals import child


class Caught(Exception):
    pass


@torch.no_grad()
def quantize(model: Any, batches: list[torch.Tensor]) -> dict[str, float]:
    """Replace the linears of all blocks; seconds of the three parts."""
    spent = {"calibration": 0.0, "column loop": 0.0, "second run": 0.0}
    inputs: list[torch.Tensor] = []
    extras: list[dict[str, Any]] = []

    def catch(_: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0])
        extras.append(kwargs)
        raise Caught

    start = time.perf_counter()
    layers = model.model.layers
    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for batch in batches:
        try:
            model(batch, use_cache=False)
        except Caught:
            pass
    handle.remove()

    for layer in layers:
        linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
        hessians = {m: torch.zeros(m.in_features, m.in_features) for m in linears}
        seen = dict.fromkeys(linears, 0)

        def add(
            module: torch.nn.Linear, args: tuple[torch.Tensor, ...], _: Any,
            hessians: dict[Any, torch.Tensor] = hessians, seen: dict[Any, int] = seen,
        ) -> None:  # fmt: skip
            x = args[0].reshape(-1, args[0].shape[-1]).t()
            new = args[0].shape[0]
            hessians[module] *= seen[module] / (seen[module] + new)
            seen[module] += new
            x = (2 / seen[module]) ** 0.5 * x
            hessians[module] += x.matmul(x.t())

        handles = [m.register_forward_hook(add) for m in linears]
        for x, extra in zip(inputs, extras, strict=True):
            layer(x, **extra)
        for handle in handles:
            handle.remove()
        spent["calibration"] += time.perf_counter() - start
        start = time.perf_counter()
        for module in linears:
            _, module.weight.data = gptq(
                module.weight.data, hessians[module],
                bits=child.BITS, group=child.GROUP, damping=child.DAMPING, ordered=True,
            )  # fmt: skip
        spent["column loop"] += time.perf_counter() - start
        start = time.perf_counter()
        for number, extra in enumerate(extras):
            out = layer(inputs[number], **extra)
            inputs[number] = out[0] if isinstance(out, tuple) else out
        spent["second run"] += time.perf_counter() - start
        start = time.perf_counter()
    return {name: round(seconds, 3) for name, seconds in spent.items()}


def run(job: child.Job) -> dict[str, Any]:
    import transformers

    torch.set_num_threads(2)
    model = transformers.LlamaForCausalLM.from_pretrained(job.folder, dtype=torch.float32)
    batches = [torch.from_numpy(batch.astype("int64")) for batch in job.batches()]
    spent, found = child.timed(lambda: quantize(model, batches))
    job.keep(
        lambda: {
            name: module.weight.detach().numpy()
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and "layers." in name
        }
    )
    used = child.versions("torch", "transformers")
    return found | {"parts_s": spent, "versions": used, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    child.main(run)
