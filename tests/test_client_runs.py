"""`./run clients` without a network: what fails is told with its file, and stops no others."""

from __future__ import annotations

import ast
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("benchmarks.clients.flavours")  # not part of the source distribution
from benchmarks.environments import Failed, logged  # noqa: E402

RUNNER = importlib.import_module("benchmarks.clients.__main__")


def test_what_an_installation_says_is_added_to_its_file(tmp_path: Path) -> None:
    log = tmp_path / "client.log"
    for word in ("one", "two"):
        logged([sys.executable, "-c", f"print({word!r})"], log)
    assert log.read_text().split() == ["one", "two"]


def test_the_reason_of_a_failure_is_of_the_command_that_failed(tmp_path: Path) -> None:
    log = tmp_path / "client.log"
    log.write_text("OldError: of a command before\n")
    with pytest.raises(Failed, match=r"^ended with status 3; see .*client\.log$"):
        logged([sys.executable, "-c", "raise SystemExit(3)"], log)
    with pytest.raises(Failed, match=r"^ValueError: no wheel; see .*client\.log$"):
        logged([sys.executable, "-c", "raise ValueError('no wheel')"], log)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="groups of processes are POSIX's")
def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    log = tmp_path / "client.log"
    grandchild = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    with pytest.raises(Failed, match=r"took more than 0\.01 minutes"):
        logged([sys.executable, "-c", child], log, minutes=0.01)
    pid = int(log.read_text())
    for _ in range(100):  # its new parent may take a moment to bury it
        if not _runs(pid):
            break
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # a zombie that nobody buries does not run
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_no_file_beside_a_script_is_taken_for_a_package_that_it_imports() -> None:
    folder = Path(RUNNER.__file__).parent
    own = {"small_network"}
    for script in (*folder.glob("*_child.py"), folder / "qwix_client.py"):
        for node in ast.walk(ast.parse(script.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            taken = {name.partition(".")[0] for name in names} - own
            assert not [name for name in taken if (folder / f"{name}.py").exists()], script


def test_clients_that_fail_are_told_at_the_end_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clients.json").write_text(json.dumps({"rows": {"mlx": {"old": {}}}}))

    def environment(client: str) -> Path:
        if client == "mlx":
            raise Failed("no wheel")
        return tmp_path

    def rows_of(client: str, python: Path) -> dict[str, Any]:
        if client == "gptqmodel":
            raise RuntimeError("whatever an engine does")
        return {"a": {"client": client}}

    monkeypatch.setattr(RUNNER, "RESULTS", tmp_path)
    monkeypatch.setattr(RUNNER, "environment", environment)
    monkeypatch.setattr(RUNNER, "rows_of", rows_of)
    monkeypatch.setattr(sys, "argv", ["clients"])
    with pytest.raises(SystemExit) as ended:
        RUNNER.main()
    assert "gptqmodel: whatever an engine does\n  mlx: no wheel" in str(ended.value)
    assert str(ended.value).endswith("again: ./run clients gptqmodel mlx")
    rows = json.loads((tmp_path / "clients.json").read_text())["rows"]
    assert set(rows) == (set(RUNNER.CLIENTS) | set(RUNNER.APART)) - {"gptqmodel"}
    assert rows["mlx"] == {"old": {}}  # as they were
    assert rows["qwix"] == {"a": {"client": "qwix"}}
    order = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert order[-1] == "llama-cpp:"  # what is compiled comes last
