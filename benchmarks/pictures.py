"""Pictures that say which results they were drawn from, so that a test can tell an old one."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

PICTURES = Path(__file__).parents[1] / "docs" / "images"


def save(figure: Any, name: str, *results: str) -> None:
    """Write a figure to `docs/images`, as SVG; `results` are the files that it shows."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "jquant"  # the same picture gives the same file
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / name, metadata={"Date": None, "Description": _origin(results)})
    print(PICTURES / name)


def is_current(name: str) -> bool:
    """Whether a picture was drawn from the results as they are."""
    told = re.search(r"Drawn from [^<]*", (PICTURES / name).read_text())
    return told is not None and told[0] == _origin(re.findall(r"[a-z_]+\.json", told[0]))


def _origin(results: Any) -> str:
    digests = [hashlib.sha256((RESULTS / name).read_bytes()).hexdigest() for name in results]
    files = zip(results, digests, strict=True)
    return "Drawn from " + ", ".join(f"{name} ({digest[:16]})" for name, digest in files)
