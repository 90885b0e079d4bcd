"""What mkdocstrings is to make of our docstrings beyond Google's style.

`Example:` is a section of code, as `Examples:` is there. The idea that opens a file (formula,
paper, conventions) is shown with the noun of that file, since readers of the site see no modules.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

# Whose file's opening is shown beside them.
NOUNS = {
    "Activations", "AdaRound", "Codebook", "DiscQuant", "Evidence", "Float", "GPTQ", "Grid", "HQQ",
    "KMeans", "LoRC", "NUPES", "Polish", "Power", "Rounding", "SignRound", "Stochastic", "Uniform",
    "adadim", "allocate", "cmpq", "emulate", "exact_kl", "fisher", "lorc_ranks", "plain", "save",
    "wasserstein",
}  # fmt: skip


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of a package once it has been read."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        del kwargs
        self.rewrite(pkg)

    def rewrite(self, node: griffe.Object) -> None:
        for name, member in list(node.members.items()):
            if isinstance(member, griffe.Alias):
                continue
            if member.docstring:
                text = member.docstring.value
                text = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
                opening = node.docstring.value if node.docstring and node.is_module else ""
                if name in NOUNS and "\n\n" in opening:
                    text += "\n\nBackground:\n" + textwrap.indent(opening, "    ")
                member.docstring.value = text
            self.rewrite(member)
