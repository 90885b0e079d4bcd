"""GPTQModel on the CPU: its `quantize`, activation order with static groups.

Timed: `model.quantize(...)` on a loaded model; it calibrates block by block and inside a block
(q, k, v; out; gate, up; down), and packs the codes, which it has no option to leave out. Nothing is
saved. Weights stay in memory (`offload_to_disk=False`), float32; it packs scales as float16.
"""

from __future__ import annotations

import contextlib
import sys
import types
from typing import Any

from benchmarks.rivals import child


def engine() -> Any:
    """The package, imported beside PyTorch for CPUs."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    with contextlib.suppress(RuntimeError):  # a torchvision for CUDA describes these, and lacks
        for name in ("nms", "qnms"):  # them beside a torch for CPUs; it is imported in vain
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # One of its model definitions, not ours, imports torchvision, which PyPI has for CUDA only.
    absent = types.ModuleType("gptqmodel.models.definitions.internvl_chat")
    absent.__dict__["InternVLChatQModel"] = type("InternVLChatQModel", (), {})
    sys.modules.setdefault(absent.__name__, absent)
    import gptqmodel  # pyright: ignore[reportMissingImports]

    return gptqmodel


def run(job: child.Job) -> dict[str, Any]:
    import torch

    library = engine()
    torch.set_num_threads(2)
    settings = library.QuantizeConfig(
        bits=child.BITS, group_size=child.GROUP, sym=False, desc_act=True, static_groups=True,
        act_group_aware=False, damp_percent=child.DAMPING, offload_to_disk=False, device="cpu",
    )  # fmt: skip
    model = library.GPTQModel.load(str(job.folder), settings, dtype=torch.float32)
    rows = [
        {"input_ids": torch.from_numpy(row[None]), "attention_mask": torch.ones(1, len(row)).long()}
        for row in job.tokens.astype("int64")
    ]
    _, found = child.timed(lambda: model.quantize(rows, batch_size=child.BATCH))

    def weights() -> dict[str, Any]:
        out = {}
        for name, module in model.model.named_modules():
            if hasattr(module, "qweight"):
                out[name] = dequantized(module)
        return out

    job.keep(weights)
    used = child.versions("gptqmodel", "torch", "transformers")
    return found | {"versions": used, "threads": torch.get_num_threads()}


def dequantized(module: Any) -> Any:
    """`[out, in]` from the packed layer, which stores zero points less one (its format 1)."""
    from gptqmodel.utils.model import (  # pyright: ignore[reportMissingImports]
        convert_gptq_v1_to_v2_format_module as plain_zeros,
    )

    if module.qzero_format() == 1:
        plain_zeros(module, bits=module.bits, pack_dtype=module.pack_dtype)
    module.post_init()
    return module.dequantize_weight().float().numpy().T


if __name__ == "__main__":
    child.main(run)
