"""The arguments that several commands have, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from jquant.schemes.presets import presets

Source = Annotated[str, Parameter(help="A GGUF file, a folder, or a hub id.")]
Quiet = Annotated[bool, Parameter(name=["--quiet", "-q"], negative="", help="Only the result.")]
RECIPES = f"One of {', '.join(presets())}: see `jquant recipes`."
Recipe = Annotated[str, Parameter(name=["--recipe", "-r"], help=RECIPES)]
Samples = Annotated[int, Parameter(help="How many windows of text.")]
Length = Annotated[
    int | None,
    Parameter(help="Tokens per window; default: 512, or the model's context if it is shorter."),
]
Tokenizer = Annotated[
    str | None, Parameter(help="A folder, GGUF file or hub id to take the tokenizer from instead.")
]
Backend = Annotated[
    Literal["auto", "jax", "torch"],
    Parameter(help="The reference decoder (jax), or a folder's own PyTorch code (torch)."),
]
Text = Annotated[
    Path | None,
    Parameter(
        help="A UTF-8 text file; default: Python's own help. 80 % calibrates, 20 % measures."
    ),
]
