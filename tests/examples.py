"""The files of `examples/` as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[1] / "examples"


def loaded(example: str, file: str = "main") -> ModuleType:
    """`examples/<example>/<file>.py`; files beside it are the caller's to put on the path."""
    path = EXAMPLES / example / f"{file}.py"
    spec = importlib.util.spec_from_file_location(f"example_{example}_{file}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
