"""Choices beside the rounding: grids, axes, low-rank terms, bits, quantized inputs."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.text import ran, table


def grids(result: dict[str, Any]) -> str:
    methods = ["nearest", "GPTQ"]
    parts = []
    for bits, rows in result["rows"].items():
        lowest = {
            method: min(row[method]["kl"] for row in rows.values() if method in row)
            for method in methods
        }
        lines = []
        for name, row in rows.items():
            cells = []
            for method in methods:
                kl = row[method]["kl"] if method in row else None
                said = "–" if kl is None else f"{kl:.4f}"
                cells.append(f"**{said}**" if kl == lowest[method] else said)
            lines.append([name, f"{row['nearest']['bits_per_weight']:.2f}", *cells])
        parts.append(table([bits, "bits stored", *methods], lines))
        least = min(row["nearest"]["bits_per_weight"] for row in rows.values())
        slim = {k: v for k, v in rows.items() if v["nearest"]["bits_per_weight"] < least + 0.25}
        for method in methods:
            ranked = sorted(
                (row[method]["kl"], name) for name, row in rows.items() if method in row
            )
            best = min((row[method]["kl"], name) for name, row in slim.items() if method in row)
            said = f"At {bits}, {method}: *{ranked[0][1]}* is best"
            if best != ranked[0]:
                said += f", and *{best[1]}* of those within a quarter of a bit of the smallest"
            parts.append(said + ".\n")
    return (
        "SmolLM2-135M, evidence of one pass, 8 held-out windows: KL at about equal "
        "bits per weight, everything stored counted. Scales are float16 and groups of 64 where the "
        "format does not fix them (*MX* 32, *NV* 16); *k-means* has a table per row. At 3 bits "
        "*Float*, *MX* and *NV* hold E2M0. Lowest of a column in bold. The downloaded weights lie "
        "on a 4-bit grid of 32 with zeros between codes, which favours *HQQ*.\n\n"
        + "\n".join(parts)
        + f"\n{ran(result)}.\n"
    )


def ranges(result: dict[str, Any]) -> str:
    rows = result["rows"]
    names = list(dict.fromkeys(name for found in rows.values() for name in found))
    lowest = {setting: min(row["kl"] for row in found.values()) for setting, found in rows.items()}
    lines = []
    for name in names:
        cells = []
        for setting, found in rows.items():
            row = found.get(name)
            kl = "–" if row is None else f"{row['kl']:.4f}"
            kl = f"**{kl}**" if row is not None and row["kl"] == lowest[setting] else kl
            cells.append(kl if row is None else f"{kl} ({row['bits_per_weight']:.2f})")
        lines.append([f"`{name}`", *cells])
    return (
        "The small network of the tests (1 M weights over bytes), 64 calibration and 32 held-out "
        "windows, float16 scales; evidence of one pass, with QEP block by block: KL (stored bits "
        "per weight), lowest of a column in bold. The convention is A1 where none is named; the "
        "number is `norm`.\n\n" + table(["", *rows], lines) + f"\n{ran(result)}.\n"
    )


def adadim(result: dict[str, Any]) -> str:
    axes = ["in", "out", "AdaDim", "AdaDim, own product"]
    roundings = ["nearest", "GPTQ", "GPTQ dynamic"]
    lines = []
    for setting, rows in result["rows"].items():
        for rounding in roundings:
            found = [rows.get(f"{rounding} {axis}", {}).get("kl") for axis in axes]
            known = [kl for kl in found if kl is not None]
            if not known:
                continue
            cells = ["–" if kl is None else f"{kl:.4f}" for kl in found]
            cells = [
                f"**{c}**" if kl == min(known) else c for c, kl in zip(cells, found, strict=True)
            ]
            lines.append([setting, rounding, *cells])
    chosen = []
    for setting, levels in result["choices"].items():
        kinds = levels["residual"]["kinds"]
        said = ", ".join(f"{kind} {row['out']}" for kind, row in kinds.items() if row["out"])
        chosen.append(f"at {setting}, of 30 each, {said}")
    return (
        "SmolLM2-135M: groups of 128 along inputs, outputs, or what AdaDim chooses by the output "
        "of the attention or MLP (or by each weight's own product); grid A2, one pass, 8 held-out "
        "windows: KL. *Dynamic*: GPTQ fits groups along outputs to columns as it comes to them. "
        f"Along outputs go {'; '.join(chosen)}.\n\n"
        + table(["", "rounding", *axes], lines)
        + f"\n{ran(result)}.\n"
    )


def lorc(result: dict[str, Any]) -> str:
    rows = result["rows"]
    methods = list(dict.fromkeys(method for found in rows.values() for method in found))
    lines = []
    for method in methods:
        cells = []
        for found in rows.values():
            alike = [
                row["kl"] for m, row in found.items() if m.split(",")[0] == method.split(",")[0]
            ]
            row = found[method]
            kl = f"**{row['kl']:.3f}**" if row["kl"] == min(alike) else f"{row['kl']:.3f}"
            cells.append(f"{kl} ({row['bits_per_weight']:.2f})")
        lines.append([method, *cells])
    return (
        "SmolLM2-135M, rank 8, 8-bit factors; one pass, 8 held-out windows: "
        "KL (stored bits per weight, factors counted), lowest of each rounding in bold. *LoRC* "
        "knows no data, *QERA* is the term in the metric of the inputs; *smaller groups* spend the "
        "factors' bytes on more scales instead: where a weight has one scale per row that is the "
        "better use of them beside GPTQ, in groups of 64 the term is. At 2 bits with one scale per "
        "row and range by min-max nothing is left to save.\n\n"
        + table(["", *rows], lines)
        + f"\n{ran(result)}.\n"
    )


def bits(result: dict[str, Any]) -> str:
    lines = []
    widths = sorted({m for found in result["rows"].values() for m in found}, reverse=True)
    for method, found in result["rows"].items():
        known = {row for some in found.values() for row in some}
        lowest = {m: min(row["kl"] for row in found[m].values()) for m in found}
        for row in filter(known.__contains__, result["names"]):
            cells = []
            for mean in widths:
                kl = found.get(mean, {}).get(row, {}).get("kl")
                best = kl is not None and kl == lowest[mean]
                cells.append("–" if kl is None else f"**{kl:.4f}**" if best else f"{kl:.4f}")
            score = result["scores"].get(row)
            lines.append([method, row, *cells, f"{score['seconds']:.0f}" if score else ""])
    return (
        "SmolLM2-135M, groups of 64, 2 to 8 bits for each weight; KL on 8 "
        "held-out windows at the bytes of a mean width. *uniform*: one width, or two by depth; "
        "*ends*: the wider one for the first and last layers; the others by a score and exact "
        "dynamic programming, or by CPTQuant's three clusters. CPTQuant finds the first and last "
        "30 % of the layers the sensitive ones; here it is the kind of weight (v, then k) and the "
        "last block, and scores that know one number per block gain little or nothing.\n\n"
        "![bits by depth and by kind of weight](../images/bits-by-depth.svg)\n\n"
        + table(["rounding", "by", *(f"{m} bits" for m in widths), "seconds of the score"], lines)
        + f"\n{ran(result)}{result.get('note', '')}.\n"
    )


def worth(result: dict[str, Any]) -> str:
    """What a budget is worth, of `bits.json`."""
    rows = result["rows"]["GPTQ"]["3.5"]
    kl = {name: f"{rows[name]['kl']:.3f}" for name in ("uniform", "Fisher", "exact KL")}
    return (
        f"SmolLM2-135M at 3.5 bits on average: the uniform choice costs a KL of {kl['uniform']}, "
        f"`fisher` {kl['Fisher']}, `exact_kl` {kl['exact KL']} ([results](../results/bits.md)).\n"
    )


def activations(result: dict[str, Any]) -> str:
    lines = [
        [name, f"{row['bits_per_weight']:.2f}", f"{row['kl']:.4f}", f"{row['agreement']:.3f}"]
        for name, row in result["rows"].items()
    ]
    said = [
        "SmolLM2-135M, 8 held-out windows; 8-bit weights with one scale per "
        "output, 4-bit ones in groups of 64 or per row, all linears of the blocks. *LKD*: the "
        "weights of each block learned on its outputs, from the full model's inputs.\n\n",
        table(["weights and inputs", "bits per weight", "KL", "same first choice"], lines),
    ]
    if speed := result.get("speed"):
        rows = [
            [name, f"{row['seconds']:.2f}", f"{row['median_times_faster']:.2f}"]
            for name, row in speed["rows"].items()
        ]
        count, length = speed["tokens"]
        said += [
            f"\nA prefill of {count} × {length} tokens, programs taking turns "
            f"{speed['rounds']} times: the least of the times, and the median of how many times "
            "faster than float32 in the same turn.\n\n",
            table(["", "seconds", "times faster"], rows),
        ]
    return "".join(said) + f"\n{ran(result)}.\n"
