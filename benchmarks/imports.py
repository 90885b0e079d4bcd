"""What `import jquant` costs beside `import jax`: `python -m benchmarks.imports [processes]`.

Fresh processes import one and the other in turn, so that both meet the same load of the machine,
and medians are compared. Compiled Python is written to a temporary folder first, as an installed
package has it. Seconds are of the processor (user and system), which other work disturbs least, and
on the clock.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

LIMIT = 1.4  # times `import jax`
STATEMENTS = ("pass", "import jax", "import jquant")


def seconds(statement: str, environment: dict[str, str]) -> tuple[float, float]:
    """Processor and clock seconds of a fresh Python that runs one statement."""
    clock, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", statement], env=environment, check=True)
    after = os.times()
    used = after.children_user + after.children_system
    used -= before.children_user + before.children_system
    return used, time.perf_counter() - clock


def main(processes: int = 10) -> None:
    """Prints medians and their ratio, the bare interpreter taken off."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "JAX_PLATFORMS": "cpu"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for statement in STATEMENTS:
            seconds(statement, environment)
        rounds = [[seconds(x, environment) for x in STATEMENTS] for _ in range(processes)]
    for place, name in enumerate(("processor", "clock")):
        bare, jax, jquant = (
            statistics.median(each[which][place] for each in rounds) for which in range(3)
        )
        ratio = (jquant - bare) / (jax - bare)
        verdict = "within" if ratio <= LIMIT else "ABOVE"
        print(
            f"{name}: import jax {jax - bare:.3f} s, import jquant {jquant - bare:.3f} s, "
            f"ratio {ratio:.2f}, {verdict} {LIMIT}"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
