"""The arguments that several commands have, with their help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

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
Kept = Annotated[
    Quantized,
    Parameter(
        help="Of a GGUF or HF file's own codes, and of all codes in generate: keep takes less "
        "memory, and more time."
    ),
]


@Parameter(name="*")
@dataclass(frozen=True)
class Reading:
    """What a command line says about how a model's files are read: its options."""

    tokenizer: Annotated[
        str | None,
        Parameter(help="A folder, GGUF file or hub id to take the tokenizer from instead."),
    ] = None
    backend: Annotated[
        Literal["auto", "jax", "torch"],
        Parameter(help="The reference decoder (jax), or a folder's own PyTorch code (torch)."),
    ] = "auto"
    architecture: Annotated[
        str | None,
        Parameter(
            help="The class of transformers to run a folder by, such as BertModel, in place of the "
            "one that its config.json names; tensors that it has no place for are left out."
        ),
    ] = None

    def choices(self) -> dict[str, Any]:
        """The options by the names that `models.load` has for them."""
        return dict(vars(self))
