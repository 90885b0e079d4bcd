"""A model as a Hugging Face folder has it: tensors by name, `config.json`, which layers are linear.

A `Decoder`'s names come from the table that loading uses. A `TorchFunction` has Hugging Face's
names, but for those that `transformers` renames when it loads, which the original folder tells.
Imported when a model is written, since `jquant.models` costs more to import than all the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jquant.errors import CheckpointError, ExportError
from jquant.formats.config import claimed
from jquant.models.config import from_hf
from jquant.models.decoder import Decoder
from jquant.models.disassembly import Tensor, disassemble, lazy_leaf
from jquant.models.families import HF
from jquant.models.hf_config import to_hf, unlike
from jquant.models.hf_folder import HFFolder, read_json
from jquant.models.torch_fit import linear_parameters, tensor_names
from jquant.models.torch_function import TorchFunction, parameter_shapes
from jquant.models.torch_module import TorchConfig
from jquant.trees.lazy import Lazy
from jquant.weights.qtensor import QTensor

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Files that lie beside the tensors, and are the same whatever becomes of these.
BESIDE = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class HFModel(NamedTuple):
    """What a folder is to hold.

    Attributes:
        tensors: in order, weights `[out, in]`.
        config: of `config.json`, without `quantization_config`.
        linear: the names of all linear modules.
        dtypes: the dtypes of the tensors in the folder that the model is like, by name.
    """

    tensors: list[Tensor]
    config: dict[str, Any]
    linear: list[str]
    dtypes: Mapping[str, str]


def hf_model(fn: Any, qparams: Any, like: Path | None, tokenizer: Any = None) -> HFModel:
    """The model under Hugging Face's names; nothing is read but headers.

    Raises:
        CheckpointError: the folder `like` is none, or of another network; or there is none, and
            the network's `config.json` cannot be told without it.
        ExportError: `fn` is no model of `jquant.models`, or a parameter is made of several tensors.
        TreeError: the parameters are not those of `fn`.
    """
    claims, folder = None, None
    if like is not None:
        claims = dict(read_json(like / "config.json"))
        claimed(claims)
        folder = HFFolder.open(like, claims) if any(like.glob("*.safetensors")) else None
    dtypes = {} if folder is None else {n: _DTYPES.get(d, "") for n, d in folder.dtypes.items()}
    if isinstance(fn, Decoder):
        tensors, config, linear = _of_decoder(fn, qparams, claims)
    elif isinstance(fn, TorchFunction):
        tensors, config, linear = _of_torch(fn, qparams, claims, folder)
    else:
        raise ExportError(
            f"fn is a {type(fn).__name__}; only models that jquant.models.load gives can be "
            "exported, since nobody knows what others call their tensors"
        )
    if claims is None:
        config |= {key: getattr(tokenizer, key, None) for key in _TOKENS}
        config["dtype"] = _common(tensors)
    return HFModel(tensors, config, linear, dtypes)


def kind_of(fn: Any, path: str) -> Literal["linear", "expert", "table", "other"]:
    """What a parameter is the weight of: a linear layer, layers of experts, the table of tokens."""
    if isinstance(fn, TorchFunction):
        return "linear" if path in linear_parameters(fn.config) else "other"
    leaf = path.partition("[")[0]  # of a layer or an expert of a stack
    if not leaf.endswith("/kernel"):
        return "table" if leaf == "embed/embedding" else "other"
    experts = isinstance(fn, Decoder) and fn.config.experts
    return "expert" if experts and re.search("/mlp/(gate|up|down)/kernel$", leaf) else "linear"


def stored_dtype(tensor: Tensor, dtypes: Mapping[str, str]) -> np.dtype:
    """The dtype that an array is written in: the original's where that holds its values, else its
    own. The array is read if the two differ."""
    leaf = tensor.leaf
    own = np.dtype(leaf.dtype)
    original = np.dtype(dtypes.get(tensor.name) or own)
    if not isinstance(leaf, Lazy) or original.itemsize >= own.itemsize:
        return own
    value = leaf[...]
    with np.errstate(over="ignore"):
        same = np.array_equal(value.astype(original).astype(own), value)
    return original if same else own


def _of_decoder(
    fn: Decoder, qparams: Any, claims: dict[str, Any] | None
) -> tuple[list[Tensor], dict[str, Any], list[str]]:
    if claims is None:
        config = to_hf(fn.config)
    else:
        config = claims
        if difference := unlike(fn.config, from_hf(claims)):
            raise CheckpointError(
                f"config.json of like= is of another network than fn ({difference}); pass the "
                "folder that the model was loaded from"
            )
    offset = HF[config["model_type"]].hf.norm_offset
    tensors = disassemble(fn.config, qparams, "hf", scan_layers=fn.scan_layers, norm_offset=offset)
    linear = [tensor.name.removesuffix(".weight") for tensor in tensors if tensor.linear]
    return tensors, config, linear + ["lm_head"] * fn.config.tied


def _of_torch(
    fn: TorchFunction, qparams: Any, claims: dict[str, Any] | None, folder: HFFolder | None
) -> tuple[list[Tensor], dict[str, Any], list[str]]:
    if claims is None or folder is None:
        raise CheckpointError(
            f"{fn.config.architecture} by its own code: pass like= (--like) with the Hugging Face "
            "folder that it was loaded from, whose config.json and names of tensors it has"
        )
    config = TorchConfig.of(claims, fn.config.architecture)
    if config != fn.config:
        mine, theirs = json.loads(fn.config.values), json.loads(config.values)
        keys = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        raise CheckpointError(f"config.json of like= is of another network than fn ({keys[0]})")
    names, weights = tensor_names(config, folder), linear_parameters(config)
    tensors = []
    for path in parameter_shapes(config):
        name, leaf = names.get(path), qparams[path]
        if name is None:
            raise ExportError(
                f"parameter {path!r} is made of several tensors of the file, and is not taken "
                "apart again; load the model by the reference decoder where it serves (backend="
                "'jax')"
            )
        tensors.append(Tensor(name, lazy_leaf(leaf), path, path in weights))
    linear = [names.get(path, path).removesuffix(".weight") for path in weights]
    return tensors, claims | {"architectures": [fn.config.architecture]}, linear


def _common(tensors: list[Tensor]) -> str:
    """The dtype of most arrays."""
    kinds = [np.dtype(t.leaf.dtype).name for t in tensors if not isinstance(t.leaf, QTensor)]
    return max(set(kinds), key=kinds.count) if kinds else "float32"
