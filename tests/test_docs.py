"""README and docs: figures are what `benchmarks/results/` says, and what is public is described.

That the pages build, and that their links lead somewhere, is what `./run docs` tells.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from test_structure import RANKS

import jquant as jq
from benchmarks.pages import ROOT, SECTIONS, pages, parts, render
from benchmarks.pictures import PICTURES, is_current

DOCS = ROOT / "docs"


def test_figures_are_generated_from_the_results() -> None:
    stale = [str(page) for page in pages() if page.read_text("utf-8") != render(page)]
    assert stale == [], "run: python -m benchmarks.pages"


def test_pictures_are_drawn_from_the_results() -> None:
    stale = [picture.name for picture in PICTURES.glob("*.svg") if not is_current(picture.name)]
    assert stale == [], "run: python -m benchmarks.headline, python -m benchmarks.bits --plot"


def test_every_section_stands_in_a_page() -> None:
    assert {name for page in pages() for name in parts(page)} == set(SECTIONS)


def test_the_readme_is_a_door_not_a_house() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


def test_the_map_shows_every_room_at_its_rank() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("| room |")[1].split("\n\n")[0]
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in text.splitlines()[2:]]
    assert tuple(map(tuple, rows)) == RANKS


def test_links_between_files_lead_somewhere() -> None:
    broken = []
    for page in (*pages(), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_every_public_name_has_an_entry() -> None:
    described = set()
    for page in (DOCS / "api").glob("*.md"):
        entries = re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
        described |= {entry.rpartition(".")[2] for entry in entries}
    spaces = (
        "adapters",
        "allocation",
        "errors",
        "evaluate",
        "exchange",
        "exporters",
        "formats",
        "grids",
        "io",
        "models",
        "objectives",
        "presets",
    )
    spaces = (*spaces, "distances", "rounding")
    public = set(jq.__all__) - set(spaces)
    for space in spaces:
        names = getattr(getattr(jq, space), "__all__", ())
        public |= {name for name in names if name != "smollm2"}
    assert public <= described, f"no entry in docs/api: {sorted(public - described)}"


def messages() -> Iterator[str]:
    """Every text that the library's code holds, with `…` for what is filled in."""
    for path in (ROOT / "jquant").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(value.value) if isinstance(value, ast.Constant) else "…"
                    for value in node.values
                )


def test_error_messages_are_those_that_the_library_gives() -> None:
    text = (DOCS / "errors.md").read_text("utf-8")
    told = re.findall(r"^### `(.+)`$", text, re.MULTILINE)
    given = list(messages())
    assert told
    for message in told:
        fragments = [part for part in re.split(r"\s*…\s*", message) if part]
        pattern = re.compile(".*".join(map(re.escape, fragments)), re.DOTALL)
        assert any(map(pattern.search, given)), f"no such message: {message}"


def test_every_error_has_its_messages() -> None:
    text = (DOCS / "errors.md").read_text("utf-8")
    kinds = [name for name in vars(jq.errors) if name.endswith("Error")]
    assert [name for name in kinds if f"## `{name}`" not in text] == []
