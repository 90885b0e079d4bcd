"""Runs of settings × methods, each in a process of its own, whose results are added one by one."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.harness import RESULTS, machine


def main(
    name: str,
    description: str,
    settings: Iterable[str],
    methods: Iterable[str],
    run: Callable[[str, str], dict[str, Any]],
) -> None:
    """The command line of `benchmarks.<name>`: what `results/<name>.json` has not yet.

    Args:
        name: of the module and of its results.
        description: first line of the help.
        settings: what `--only` takes.
        methods: what `--method` takes.
        run: one run, of a setting and a method, in this process.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", choices=settings, action="append", help="settings to run")
    parser.add_argument("--method", choices=methods, action="append", help="methods to run")
    parser.add_argument("--here", action="store_true", help="run in this process and print JSON")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(run(options.only[0], options.method[0])))
        return
    path = RESULTS / f"{name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    asked = options.only or options.method
    for method in options.method or methods:
        for setting in options.only or settings:
            if method in rows.get(setting, {}) and not asked:
                continue
            command = [sys.executable, "-m", f"benchmarks.{name}", "--here"]
            command += ["--only", setting, "--method", method]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = json.loads(printed.stdout.splitlines()[-1])
            rows.setdefault(setting, {})[method] = row
            print(setting, method, row, flush=True)
            path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
