"""Writes `slow.txt`, the cases that `./run tests` leaves out because of their time.

    ./run tests -m "not optimized" --junitxml=a.xml && python tests/slow.py a.xml

A case is slow if it took more than half a second. Of each test the quickest case stays, unless that
took more than 2.5 s; those of `STAY` do in any case, since no other test would tell what they tell.
Cases that the run left out stay what they are.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

LIST = Path(__file__).with_name("slow.txt")
CASE, TEST = 0.5, 2.5  # seconds
STAY = {
    "test_weights_of_a_stage_that_share_inputs_share_a_factor",
    "test_a_large_product_between_a_sum_and_a_norm",
    "test_a_job_does_not_go_on_with_another_closure",
    "test_finished_stages_are_not_done_again",
    "test_what_is_done_beside_changes_no_result",
    "test_a_call_is_what_its_body_is",
}


def slow_cases(report: Path, before: set[str]) -> list[str]:
    """The ids of the slow cases, as pytest has them, after a run and what was slow before it."""
    tests = defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        file, name = case.get("classname", ""), case.get("name", "")
        if file.startswith("tests."):
            node = f"{file.replace('.', '/')}.py::{name}"
            tests[file, name.split("[")[0]].append((float(case.get("time", 0)), node))
    slow = before - {node for cases in tests.values() for _, node in cases}
    for (_, test), cases in tests.items():
        (quickest, _), *_ = cases = sorted(cases)
        first = 1 if test in STAY or quickest <= TEST else 0
        slow |= {node for seconds, node in cases[first:] if seconds > CASE}
    return sorted(slow)


if __name__ == "__main__":
    before = set(LIST.read_text("utf-8").splitlines())
    cases = slow_cases(Path(sys.argv[1]), before)
    LIST.write_text("".join(f"{node}\n" for node in cases), "utf-8")
