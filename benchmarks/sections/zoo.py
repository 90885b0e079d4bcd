"""Networks of other people's packages."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks.sections.text import table

BASE = {"jax", "flax"}  # of every environment


def zoo(result: dict[str, Any]) -> str:
    """The rows that were measured, what failed, and the versions of both."""
    rows = result["rows"]
    measured = [row for row in rows.values() if "failed" not in row]
    lines = [
        [
            row["package"],
            row["name"],
            f"{row['weights']} of {row['matrices']}",
            f"{100 * row['in_weights'] / row['parameters']:.1f} %",
            str(row["stages"]),
            f"{row['nearest']:.3f}",
            f"{row['gptq']:.3f}",
            f"{row['apply']:.0e}" if row["apply"] else "0",
            "no" if row["command"] else "yes",
            f"{row['seconds']:.0f}",
        ]
        for row in measured
    ]
    head = [
        "package", "network", "weights", "of all numbers", "stages", "nearest", "GPTQ", "apply",
        "command", "seconds",
    ]  # fmt: skip
    intro = (
        "Small random networks of the packages' own classes, each package in an environment of its "
        "own. *weights*: of the leaves with two axes or more; what the others are stands below. "
        "*nearest*, *GPTQ*: the relative error of the output on a held-out batch, 4 bits in groups "
        "of 32 (one group where 32 does not divide the inputs), tables that tokens are looked up "
        "in kept. *apply*: how far the output is from that of the decoded weights, relative. "
        "*command*: whether `jquant quantize` takes the same recipe. *seconds*: of the processor, "
        "compiling included where a program is new, without most of XLA's optimizations.\n\n"
    )
    return intro + table(head, lines) + _others(measured) + _failures(rows) + _versions(result)


def _others(measured: list[dict[str, Any]]) -> str:
    """How many leaves are no weights, by the reason that was given."""
    counts: dict[str, Counter[str]] = {}
    for row in measured:
        for why in row["others"].values():
            counts.setdefault(why, Counter())[row["package"]] += 1
    lines = [
        f"* {why}: {', '.join(f'{package} {n}' for package, n in each.items())}\n"
        for why, each in counts.items()
    ]
    kept = sum(len(row["kept"]) for row in measured)
    if not lines:
        return f"\nKept: {kept} tables of embeddings.\n"
    told = f"\nKept: {kept} tables of embeddings. Other leaves with two axes or more, and why:\n\n"
    return told + "".join(lines)


def _failures(rows: dict[str, Any]) -> str:
    """What was tried in vain, and what had to be left out."""
    lines = [
        f"* {row['package']}, {row['name']}: `{row['failed']}`\n"
        for row in rows.values()
        if "failed" in row
    ]
    lines += [
        f"* {row['package']}, {row['name']}: {what}: `{row[key]}`\n"
        for row in rows.values()
        for key, what in (("refused", "refused without `ignore=`"), ("command", "command line"))
        if row.get(key)
    ]
    if not lines:
        return "\nNo recipe needs `ignore=`, and none failed.\n"
    return f"\nTried, and failed:\n\n{''.join(lines)}"


def _versions(result: dict[str, Any]) -> str:
    told: dict[str, str] = {}
    some = next(row for row in result["rows"].values() if "versions" in row)
    for row in result["rows"].values():
        every = row.get("versions", {}).items()
        own = {k: v for k, v in every if k not in BASE or v != some["versions"][k]}
        if own:
            told[row["package"]] = ", ".join(f"{name} {version}" for name, version in own.items())
    machine = result["machine"]
    own = "; ".join(told.values())
    return (
        f"\n{own}; with JAX {some['versions']['jax']}, Flax {some['versions']['flax']}, Python "
        f"{some['python']}, on {machine['cores']} cores of {machine['processor']}, "
        f"{max(row['date'] for row in result['rows'].values())}.\n"
    )
