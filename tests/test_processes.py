"""Jobs of two processes (gloo): the codes of one process, records that one takes up, refusals."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from two_processes import job, made

import jquant as jq
from jquant.errors import ProcessError
from jquant.trees import processes


def both(folder: Path, mode: str) -> list[str]:
    """What two processes say."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("two_processes.py")
    run = [
        subprocess.Popen(
            [sys.executable, str(script), str(port), str(process), str(folder), mode],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=240) for process in run]
    finally:
        for process in run:
            process.kill()
    assert [process.returncode for process in run] == [0, 0], told
    return [out.strip().splitlines()[-1] for out, _ in told]  # Gloo says things before


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    """Bit for bit; one process reads what they have saved, and takes their records up."""
    assert both(tmp_path, "job") == ["done", "done"]
    params, batches = made()
    params, batches = jax.tree.map(jax.numpy.asarray, (params, batches))
    told: list[str] = []
    alone, resumed = (
        job(params, batches),
        job(params, batches, work_dir=tmp_path / "work", progress=lambda p: told.append(p.doing)),
    )
    assert "rounding" not in told  # all stages came from records
    for other in (jq.load(tmp_path / "saved"), resumed):
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(other), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("batches", "ProcessError the number of batches on process 1 is not that of process 0"),
        ("plan", "ProcessError the plan on process 1 is not that of process 0"),
        ("folders", "is not the folder that process 0 has"),
    ],
)
def test_processes_that_do_not_agree(mode: str, told: str, tmp_path: Path) -> None:
    words = both(tmp_path, mode)
    assert told in words[1]
    assert words[0].startswith("ProcessError")


def test_one_process_agrees_with_itself() -> None:
    assert processes.from_all("x") == ["x"]
    assert processes.fallen(None) == []
    assert len(processes.one_token()) == 8
    with processes.on_all(True, "go on"):
        pass
    with pytest.raises(OSError, match="full"), processes.on_all(True, "go on"):
        raise OSError("full")


def test_another_process_that_fell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "fallen", lambda error: [1, 3])
    with pytest.raises(ProcessError, match="process 1 and 3 could not write"):
        with processes.on_all(True, "write"):
            pass
