"""Writes the figures of README and docs from `results/*.json`: no number is typed by hand.

python -m benchmarks.pages           # rewrite README.md and docs/
python -m benchmarks.pages --check   # exit 1 if a page is not up to date

What stands in a page between `<!-- generated: NAME -->` and `<!-- end of NAME -->` is rewritten.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS
from benchmarks.sections import (
    architectures,
    arithmetic,
    backends,
    choices,
    clients,
    few_bits,
    fp4,
    learned,
    listings,
    llama_cpp,
    quality,
    rotation,
    scale,
    speed,
    zoo,
)

ROOT = Path(__file__).parents[1]
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def of(file: str, section: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """A section made from `results/<file>.json`."""
    return lambda: section(json.loads((RESULTS / f"{file}.json").read_text()))


SECTIONS: dict[str, Callable[[], str]] = {
    "headline": of("stages", quality.headline),
    "quality": of("quality", quality.quality),
    "stages": of("stages", quality.stages),
    "steps": of("stages", quality.steps),
    "minilm": of("minilm", quality.minilm),
    "learned": of("learned", learned.learned),
    "learned_smollm2": of("learned_smollm2", learned.learned_smollm2),
    "grids": of("grids", choices.grids),
    "ranges": of("ranges", choices.ranges),
    "fp4": of("fp4", fp4.fp4),
    "adadim": of("adadim", choices.adadim),
    "lorc": of("lorc", choices.lorc),
    "bits": of("bits", choices.bits),
    "worth": of("bits", choices.worth),
    "activations": of("activations", choices.activations),
    "total_time": of("total_time", speed.total_time),
    "depth": of("depth", speed.depth),
    "flat": of("depth", speed.flat),
    "compiled": of("compiled", speed.compiled),
    "gptq_solver": of("gptq_solver", speed.solver),
    "capture": of("capture", speed.capture),
    "encode": of("encode", speed.encode),
    "arithmetic": of("arithmetic", arithmetic.arithmetic),
    "architectures": of("architectures", architectures.architectures),
    "backends": of("backends", backends.backends),
    "gptq_order": of("gptq_order", backends.gptq_order),
    "clients": of("clients", clients.clients),
    "tpu_inference": of("tpu_inference", clients.tpu_inference),
    "w4a16": of("w4a16", clients.w4a16),
    "few_bits": of("few_bits", few_bits.few_bits),
    "rotation": of("rotation", rotation.rotation),
    "zoo": of("zoo", zoo.zoo),
    "llama_cpp": of("llama_cpp", llama_cpp.llama_cpp),
    "paper": of("paper", scale.paper),
    "recipes": listings.recipes,
}


def pages() -> list[Path]:
    """Every page that may hold generated parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def parts(page: Path) -> list[str]:
    """The names of a page's generated parts."""
    return [match[2] for match in PART.finditer(page.read_text("utf-8"))]


def render(page: Path) -> str:
    """The page with its generated parts as they are to be."""

    def part(match: re.Match[str]) -> str:
        return f"{match[1]}\n{SECTIONS[match[2]]()}\n{match[3]}"

    return PART.sub(part, page.read_text("utf-8"))


def main() -> int:
    stale = [page for page in pages() if render(page) != page.read_text("utf-8")]
    if "--check" not in sys.argv:
        for page in stale:
            page.write_text(render(page), "utf-8")
            print(page.relative_to(ROOT))
        return 0
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
