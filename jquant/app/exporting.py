"""`jquant export`: a quantized model as a folder that other engines open."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.table import Table

from jquant import models
from jquant.app.console import Narrator, megabytes
from jquant.app.options import Quiet, Reading, Source
from jquant.app.sources import Model, names_maker
from jquant.exporters import Exported, export, need_held
from jquant.schemes.scheme import Plan

Format = Literal[
    "compressed-tensors",
    "mlx",
    "gptq",
    "gptq_v2",
    "awq",
    "gguf",
    "orbax",
    "qwix",
    "tunix",
    "tunix-arrays",
    "maxtext",
    "maxtext-unscanned",
    "safetensors",
]
_TREES = ("orbax", "qwix")  # whose names are those of the parameters
To = Annotated[
    Format | None,
    Parameter(help="Write what another engine reads, as `jquant export` does, not jquant's own."),
]


def export_model(
    source: Source,
    *,
    to: Annotated[Format, Parameter(help="What the other engine reads.")],
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    like: Path | None = None,
    reading: Reading = Reading(),
    shard: Annotated[float, Parameter(name="--shard-gb")] = 5.0,
    verify: bool = True,
    force: Annotated[bool, Parameter(negative="")] = False,
    quiet: Quiet = False,
) -> None:
    """Write a quantized model as a folder that other engines open: vLLM, transformers, and others.

    Codes and scales are carried over as they are. The folder is read back and compared with what
    was to be written before it appears.

        jquant export model-w4 --to compressed-tensors -o model-ct
        jquant export model-w4 --to gptq -o model-gptq --like path/to/model
        jquant export model-q4 --to gguf -o model-q4_k.gguf

    Parameters
    ----------
    output
        The folder to write, or the file, of gguf.
    like
        The Hugging Face folder that the model is of: its config.json, tokenizer and dtypes are
        taken over. Of gguf, a folder or GGUF file with the tokenizer. Without it they are told from
        the quantized model.
    shard
        Gigabytes of tensors that one file may have.
    verify
        Whether the folder is read back and compared, bit for bit.
    force
        Replace an earlier export, or a file; no other folder ever is.
    """
    narrator = Narrator(quiet)
    _need_names(source)
    narrator.say(f"loading {source}")
    fn, qparams, words = models.load(source, lazy=True, quantized="keep", **reading.choices())
    narrator.say(f"writing {output}" + (", and reading it back" if verify else ""))
    done = export(
        fn, qparams, output, format=to, like=like, verify=verify, force=force,
        tokenizer=words if like is None or reading.tokenizer is not None else None,
        max_shard_bytes=int(shard * 1e9),
    )  # fmt: skip
    narrator.show(f"{source} → {output}")
    narrator.show(_summary(done))
    for note in done.notes:
        narrator.show(f"note: {note}")


def need_plan(to: To, model: Model, plan: Plan, narrator: Narrator) -> None:
    """ValueError: the model, or its plan, is not for the format that is asked for, if one is.
    What else is to be known of it is said."""
    if to is not None:
        if to not in _TREES:
            _need_names(model.source)
        for note in need_held(model.fn, plan, to):
            narrator.show(f"note: {note}")


def saved(model: Model, output: Path, qparams: Any, to: To, force: bool) -> int:
    """Writes quantized parameters to a folder, jquant's own or another format's; the bytes."""
    if to is None:
        return model.save(output, qparams).stat().st_size
    source = Path(model.source)
    has_words = source.is_file() if to == "gguf" else (source / "config.json").is_file()
    like = source if has_words else None
    words = model.tokenizer if like is None else None
    done = export(model.fn, qparams, output, format=to, like=like, tokenizer=words, force=force)
    return done.nbytes


def _need_names(source: str) -> None:
    if names_maker(source):
        raise ValueError(
            f"{source}: the names of tensors are known of models that files hold, not of one that "
            "code makes"
        )


def _summary(done: Exported) -> Table:
    table = Table(show_header=False)
    table.add_row("format", done.format)
    kinds = list(done.weights.values())
    for kind in dict.fromkeys(kinds):
        table.add_row("quantized", f"{kinds.count(kind)} weights as {kind}")
    table.add_row("kept", f"{len(done.kept)} tensors as they were")
    table.add_row("bytes", megabytes(done.nbytes))
    return table
