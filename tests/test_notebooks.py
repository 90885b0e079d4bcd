"""Every notebook runs from top to bottom, and is stored as it ran: with outputs, small, no traces.

The model is downloaded on the first run. Compiled programs are kept between runs, as for all tests.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.optimized

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS_PER_CELL = 900  # many times what the longest takes, also beside other tests
LARGEST = 1_000_000  # bytes
# What a machine leaves behind: folders of a system or a user, addresses of objects.
TRACES = r"/(?:home|Users|root|opt|tmp|work)/|site-packages|[A-Z]:\\\\|\bat 0x[0-9a-f]{6}"

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@every_notebook
def test_stored_as_it_ran(path: Path) -> None:
    stored = path.read_text("utf-8")
    cells = [cell for cell in json.loads(stored)["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run it from top to bottom in a fresh kernel"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and not [o for o in outputs if o["output_type"] == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"], "a warning is stored"
    assert len(stored.encode()) < LARGEST
    for cell in cells:
        for output in cell["outputs"]:
            data = output.get("data", {})
            for text in (
                output.get("text", []),
                data.get("text/plain", []),
                data.get("text/html", []),
            ):
                assert not re.search(TRACES, "".join(text))
        assert not re.search(TRACES, "".join(cell["source"]))


@every_notebook
def test_runs_from_top_to_bottom(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS_PER_CELL, resources={"metadata": {"path": str(tmp_path)}}
    )
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {
        "PYTHONPATH": search,  # this jquant, installed or not
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "IPYTHONDIR": str(tmp_path / "ipython"),  # nobody's history or start-up files
    }
    client.execute(env=os.environ | settings)
    assert not list(tmp_path.glob("*.safetensors")), "it leaves files behind"
