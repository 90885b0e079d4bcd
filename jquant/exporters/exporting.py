"""`export`: a quantized model as a folder, or a GGUF file, that others open.

First everything is looked at and may be refused: the format, the place, the names, every weight.
Then the folder is written, leaf by leaf, beside its place; read back; and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jquant.errors import CheckpointError, FormatError
from jquant.exporters.arrays import array_of
from jquant.exporters.beside import room
from jquant.exporters.described import Described, Holding
from jquant.exporters.folder import need_place, new_folder, write_sidecar
from jquant.exporters.fused import notes_of
from jquant.exporters.pieces import pieces_of
from jquant.exporters.shards import write_shards
from jquant.exporters.targets import Target, held, need_alike, need_module, target_named
from jquant.trees.lazy import Lazy
from jquant.trees.placement import transferring
from jquant.weights.qtensor import QTensor

MAX_SHARD = 5 * 10**9


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where it lies; a file, of GGUF.
        format: as it was asked for.
        nbytes: of all tensors.
        weights: path of every quantized weight → how it is held, such as "pack-quantized".
        kept: names of the tensors that are written as they were.
        notes: what to know of it, see `need_held`.
    """

    folder: Path
    format: str
    nbytes: int
    weights: Mapping[str, str]
    kept: tuple[str, ...]
    notes: tuple[str, ...] = ()


@transferring
def export(
    fn: Any,
    qparams: Any,
    folder: str | os.PathLike[str],
    *,
    format: str = "compressed-tensors",
    like: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    max_shard_bytes: int = MAX_SHARD,
    verify: bool = True,
    force: bool = False,
) -> Exported:
    """Write a quantized model as a folder, or as a GGUF file, that other engines open.

    Codes and scales are carried over as they are: nothing is quantized anew. What the format cannot
    hold is refused before anything is written. The folder appears when it is complete, and has been
    read back and compared; memory is that of one weight, so leaves may be `Lazy`.

    Args:
        fn: the model's function, as `jquant.models.load` gave it: a `Decoder` or `TorchFunction`.
            Of orbax and qwix any function, since names are those of the tree.
        qparams: its parameters, quantized or not, lazy or not.
        folder: what to write. It must not exist, be empty, or be an earlier export, with `force`.
            Of GGUF it is a file.
        format: "compressed-tensors" (which of its formats follows from each weight's grid), "gptq",
            "gptq_v2", "awq"; "gguf": one file, for llama.cpp; or "safetensors": the arrays that the
            weights stand for. "mlx": for mlx-lm. "orbax": a checkpoint of Orbax, from which
            `jquant.io.restore` makes the tree again; "qwix": one with a `QArray` for each weight.
            "tunix" and "tunix-arrays": the parameters of tunix's class for a `Decoder`, with
            `QArray`s or the arrays that they stand for; "maxtext" and "maxtext-unscanned": arrays,
            of MaxText's, layers stacked or apart.
        like: the Hugging Face folder that the model is of: its `config.json`, tokenizer and other
            small files are taken over, and the dtypes of tensors that are not quantized where these
            hold their values. None: `config.json` is told from the decoder's numbers. Of GGUF, a
            folder or GGUF file with the tokenizer.
        tokenizer: a `transformers` tokenizer to write; default: the one of `like`, if any.
        max_shard_bytes: of the tensors in one file (default: 5 GB, as transformers had it); a GGUF
            file is never split.
        verify: whether what was written is read back and compared, bit for bit.
        force: whether an earlier export, or a GGUF file, may be replaced; nothing else ever is.

    Returns:
        what was written, see `Exported`.

    Raises:
        FormatError: there is no such format, or it cannot hold a weight: names its path, what
            stands in the way, and the nearest scheme that it holds.
        ExportError: the folder is in use; the disk has no room; what was read back is not what was
            to be written.
        CheckpointError: `like` is no folder of this network.
        TreeError: the parameters are not those of `fn`.
        MissingPackageError: the extra `models` is not installed.

    Example:
        >>> import jax, tempfile
        >>> import jquant as jq
        >>> fn = jq.models.Decoder(jq.models.DecoderConfig(32, 32, 64, 1, heads=4, kv_heads=2))
        >>> params = fn.init(jax.random.key(0))
        >>> weights = jq.find_weights(fn, params, jax.numpy.zeros((1, 4), "int32"))
        >>> plan = jq.plan(weights, {"layers.*": jq.presets.int4_nearest(32), ".*": jq.keep})
        >>> qparams, _ = jq.quantize(fn, params, plan)
        >>> out = jq.export(fn, qparams, tempfile.mkdtemp() + "/model-ct")
        >>> len(out.weights), set(out.weights.values()), out.kept[0]
        (7, {'pack-quantized'}, 'model.embed_tokens.weight')
    """
    target, place = target_named(format), Path(folder)
    if target.name == "gguf":
        from jquant.exporters.gguf import export_gguf

        return Exported(place, *export_gguf(place, fn, qparams, tokenizer, like, (force, verify)))
    if target.tree:
        model = (fn, qparams, None if like is None else _folder(Path(like)))
        return _export_tree(place, target, model, tokenizer, (force, verify))
    need_place(place, force)
    if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be a positive int, got {max_shard_bytes!r}")
    from jquant.exporters.hugging_face import hf_model
    from jquant.exporters.load_back import need_same

    original = None if like is None else _folder(Path(like))
    model = hf_model(fn, qparams, original, tokenizer)
    holdings = _holdings(target, fn, model)
    config, expected = _config(target, model, holdings), _expected(model, holdings)
    pieces = pieces_of(target, expected, holdings)
    with room(place, sum(p.nbytes for p in pieces)), new_folder(place, force) as temporary:
        nbytes = write_shards(temporary, pieces, max_shard_bytes)
        (temporary / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
        _write_beside(temporary, original, tokenizer)
        if verify:
            need_same(temporary, fn, expected)
        write_sidecar(temporary, target.name)
    paths = {tensor.name: tensor.path for tensor in model.tensors}
    weights = {paths[name]: holding.name for name, holding in holdings.items()}
    kept = tuple(name for name in expected if name not in holdings)
    notes = _notes(target, paths, expected)
    return Exported(place, target.name, nbytes, weights, kept, notes)


def _export_tree(
    place: Path,
    target: Target,
    model: tuple[Any, Any, Path | None],
    tokenizer: Any,
    flags: tuple[bool, bool],
) -> Exported:
    """A tree of parameters, of the function's own names or of another library's class."""
    fn, qparams, original = model

    def beside(where: Path) -> None:
        _write_beside(where, original, tokenizer)

    need_place(place, flags[0])
    if target.library:
        from jquant.exporters.named_trees import export_named

        return Exported(place, *export_named(place, target, (fn, qparams, original), beside, flags))
    from jquant.exporters.trees import export_tree

    return Exported(place, *export_tree(place, target, qparams, beside, flags))


def _notes(target: Target, paths: Mapping[str, str], leaves: Mapping[str, Any]) -> tuple[str, ...]:
    described = {
        paths[name]: Described.of(leaf) for name, leaf in leaves.items()
        if isinstance(leaf, QTensor)
    }  # fmt: skip
    return notes_of(target.name, paths.values(), described)


def _write_beside(folder: Path, original: Path | None, tokenizer: Any) -> None:
    """Write what lies beside tensors and `config.json`: the original's small files, a tokenizer."""
    if original is None and tokenizer is None:
        return
    from jquant.exporters.hugging_face import BESIDE

    for file in () if original is None else map(original.joinpath, BESIDE):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _folder(like: Path) -> Path:
    if not (like / "config.json").is_file():
        raise CheckpointError(f"like={str(like)!r}: there is no config.json; pass a local folder")
    return like


def _holdings(target: Target, fn: Any, model: Any) -> dict[str, Holding]:
    """How each quantized weight is held, by its tensor's name."""
    from jquant.exporters.hugging_face import kind_of

    holdings = {}
    for tensor in model.tensors:
        if not isinstance(tensor.leaf, QTensor):
            continue
        is_weight = tensor.name.endswith(".weight")
        need_module(target, tensor.path, kind_of(fn, tensor.path) if is_weight else "other")
        if tuple(tensor.leaf.codes.shape[-2:]) != tuple(tensor.leaf.shape[-2:]):
            raise FormatError(
                f"{tensor.path!r}: its inputs are its rows, codes {tensor.leaf.codes.shape} of an "
                f"array {tensor.leaf.shape}; keep this weight"
            )
        holdings[tensor.name] = held(target, tensor.path, Described.of(tensor.leaf))
    need_alike(target, [(t.path, holdings[t.name]) for t in model.tensors if t.name in holdings])
    if target.config is not None and not holdings:
        raise FormatError(f"nothing is quantized; {target.name} is for weights that are")
    return holdings


def _config(target: Target, model: Any, holdings: Mapping[str, Holding]) -> dict[str, Any]:
    if target.config is None:
        return model.config
    modules = [(name.removesuffix(".weight"), holding) for name, holding in holdings.items()]
    quantized = {name for name, _ in modules}
    ignored = [name for name in model.linear if name not in quantized]
    return {**model.config, target.key: target.config(modules, ignored)}


def _expected(model: Any, holdings: Mapping[str, Holding]) -> dict[str, Lazy | QTensor]:
    """Every tensor as it is to be read back: weights as their codec has them, arrays in the dtype
    that they are written in."""
    from jquant.exporters.hugging_face import stored_dtype

    leaves: dict[str, Any] = {}
    for tensor in model.tensors:
        holding, leaf = holdings.get(tensor.name), tensor.leaf
        if holding is not None and holding.codec is not None:
            leaves[tensor.name] = holding.stored(leaf)
            continue
        array = leaf if holding is None else array_of(leaf)
        dtype = stored_dtype(tensor._replace(leaf=array), model.dtypes)
        leaves[tensor.name] = array.astype(dtype)
    return leaves
