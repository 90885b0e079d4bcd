"""The arguments that several commands have, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from jquant.models.loading import Quantized
from jquant.schemes.presets import presets

Source = Annotated[str, Parameter(help="A GGUF file, a folder, a hub id, or package.module:make.")]
Quiet = Annotated[bool, Parameter(name=["--quiet", "-q"], negative="", help="Only the result.")]
RECIPES = f"One of {', '.join(presets())}: see `jquant recipes`."
Recipe = Annotated[str, Parameter(name=["--recipe", "-r"], help=RECIPES)]
Orbax = Annotated[
    Path | None,
    Parameter(
        help="Folder of an Orbax checkpoint (or of a manager, or one of its steps) with the "
        "parameters of a model that code makes."
    ),
]
Tokenizer = Annotated[
    str | None, Parameter(help="A folder, GGUF file or hub id to take the tokenizer from instead.")
]
Backend = Annotated[
    Literal["auto", "jax", "torch"],
    Parameter(help="The reference decoder (jax), or a folder's own PyTorch code (torch)."),
]
Kept = Annotated[
    Quantized, Parameter(help="Of a GGUF or HF file's own codes: keep takes less memory.")
]
