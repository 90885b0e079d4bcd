"""What is committed: no links, no paths of somebody's machine, no slow test that is gone."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Written so that it does not find itself.
MACHINE = re.compile(rb"(?<![\w.~-])/(?:home|opt|private|root|Users|work)/\w")


def committed() -> list[tuple[str, Path]]:
    """The mode and the path of every file that git tracks."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-s", "-z"], cwd=ROOT, capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout that it does not trust
        pytest.skip("git does not list the files")
    rows = [os.fsdecode(row).split("\t", 1) for row in listed.split(b"\0") if row]
    return [(mode.split()[0], ROOT / path) for mode, path in rows]


def test_no_link_is_committed() -> None:
    """One that leads to itself, where a cache goes, once cost every run its compiled programs."""
    links = [str(path.relative_to(ROOT)) for mode, path in committed() if mode == "120000"]
    assert not links, f"not files of their own: {links}"


def test_no_path_of_a_machine_is_committed() -> None:
    offences = []
    for mode, path in committed():
        if mode != "120000" and path.is_file():
            content = path.read_bytes()
            if b"\0" not in content[:8192] and (hit := MACHINE.search(content)):
                line = content.count(b"\n", 0, hit.start()) + 1
                offences.append(f"{path.relative_to(ROOT)}:{line}")
    assert not offences, f"paths that nobody else has: {offences}"


def test_the_slow_tests_of_the_list_exist(slow_and_gone: list[str]) -> None:
    """By their ids, of each file that was collected as a whole."""
    assert not slow_and_gone, f"not in tests any more, but in tests/slow.txt: {slow_and_gone[:9]}"
